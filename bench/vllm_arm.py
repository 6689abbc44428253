"""vLLM on the same target, in an environment of its own: a process that answers lines of JSON.

Plain, and with vLLM's own n-gram speculation as its manual shows it.  Called by `bench.phases` when
`--vllm-python` is given.
"""

from __future__ import annotations

import contextlib
import json
import os
import subprocess
from pathlib import Path
from types import TracebackType
from typing import Any

from adapter.contracts import SettingsError
from adapter.pairs import Pair
from bench.driver import Load, Window
from bench.rows import VLLM
from bench.served import merge

ARMS: dict[str, dict[str, Any] | None] = {
    VLLM[0]: None,
    VLLM[1]: {"method": "ngram", "num_speculative_tokens": 5, "prompt_lookup_max": 4, "prompt_lookup_min": 2},
}  # fmt: skip
_WORKER = Path(__file__).with_name("vllm_worker.py")


class Vllm:
    """The worker process; leaving it ends the process.

    Args:
        arm: which of `ARMS` it is.

    Raises:
        SettingsError: the interpreter cannot be started, or the worker ended before it was ready.
    """

    def __init__(self, python: str, pair: Pair, arm: str, *, max_batch: int, max_model_len: int) -> None:
        own = {"PYTHONPATH", "OMP_WAIT_POLICY"}  # how its threads wait is vLLM's own business
        self._most_tokens = max_model_len
        try:
            self._process = subprocess.Popen(
                [python, str(_WORKER)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True,
                env={name: value for name, value in os.environ.items() if name not in own},
            )  # fmt: skip
        except OSError as error:
            raise SettingsError(
                f"--vllm-python {python} cannot be started ({error}); expected the python of an environment with vllm"
            ) from None
        job = {
            "model": pair.target_path, "dtype": pair.dtype, "max_batch": max_batch, "max_model_len": max_model_len,
            "speculative_config": ARMS[arm],
        }  # fmt: skip
        self.version = self._ask(job)["version"]

    def __enter__(self) -> Vllm:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self._process.communicate()

    def run(self, loads: list[Load], num_tokens: int) -> Window:
        """Measure one window, a load after the other."""
        windows = []
        for load in loads:
            job = {"prompts": load.prompts, "tokens": num_tokens, "most_tokens": self._most_tokens}
            windows.append(Window(**self._ask(job)))
        return merge(windows)

    def _ask(self, job: dict[str, Any]) -> dict[str, Any]:
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        with contextlib.suppress(BrokenPipeError):  # it ended: the missing answer says so
            self._process.stdin.write(json.dumps(job) + "\n")
            self._process.stdin.flush()
        line = self._process.stdout.readline()
        if not line:
            self._process.communicate()
            raise SettingsError(
                f"the vLLM worker ended with code {self._process.returncode}; its last lines above say why. It needs "
                "an environment in which `import vllm` works"
            )
        return dict(json.loads(line))
