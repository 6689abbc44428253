"""Load a running service with guidellm and compare its token counts with the server's own.

    python -m bench.load --guidellm PATH --json bench/results/load.json

guidellm knows nothing of Draftsmith: it runs unmodified, in an environment of its own, against `draftsmith
serve` on a port of this machine.  A run whose counts differ ends with status 1.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from prometheus_client.parser import text_string_to_metric_families

from adapter.addresses import bind
from adapter.contracts import DraftsmithError, SettingsError
from adapter.models import prepare_pair
from adapter.sections import ApiSettings
from adapter.settings import child_environment, load_settings
from bench.environment import environment
from bench.options import PairOptions
from bench.program import parser, run, say

ENDPOINTS = ("/v1/completions", "/v1/chat/completions")
_PATIENCE_S = 300.0
_COUNTERS = {
    "prompt_tokens": "vllm:prompt_tokens",
    "output_tokens": "vllm:generation_tokens",
    "requests": "vllm:request_success",
}


@dataclass(frozen=True, slots=True, kw_only=True)
class Options(PairOptions):
    """Who asks, and for how much."""

    guidellm: Path
    requests: int = 32
    streams: int = 4
    prompt_tokens: int = 64
    output_tokens: int = 32


def measure(options: Options) -> dict[str, Any]:
    """Run guidellm against both endpoints and return the result.

    Raises:
        DraftsmithError: there is no guidellm, or it or the service failed.
    """
    where = environment()
    if not os.access(options.guidellm, os.X_OK):
        raise SettingsError(f"--guidellm {options.guidellm}: no program is there; `pip install guidellm` makes one")
    with (
        tempfile.TemporaryDirectory(prefix="dsl-") as folder,
        _service(options, Path(folder)) as (url, name, tokenizer),
    ):
        rows = [_row(options, endpoint, url, tokenizer, Path(folder)) for endpoint in ENDPOINTS]
    return {"target": name, "dtype": options.dtype, "streams": options.streams, "rows": rows} | where


@contextmanager
def _service(options: Options, folder: Path) -> Iterator[tuple[str, str, str]]:
    """Run `draftsmith serve`; yield its URL, the model's name and the folder of its tokenizer."""
    with bind("127.0.0.1", 0, setting="port") as listener:
        port = listener.getsockname()[1]
    settings = load_settings(
        data_dir=folder / "data", port=port, target=options.target, draft=options.draft, dtype=options.dtype,
        cache_dir=options.cache_dir,
    )  # fmt: skip
    own = {"api": ApiSettings(), "redis_url": None, "database_url": None}  # not those of a deployment around here
    settings = settings.model_copy(update=own)
    pair = prepare_pair(settings)
    url = f"http://127.0.0.1:{port}"
    with (folder / "serve.log").open("w+b") as log:
        process = subprocess.Popen(
            [sys.executable, "-m", "serving.cli", "serve"], env=child_environment(settings), stdout=log, stderr=log
        )
        try:
            _wait(process, f"{url}/ready", folder / "serve.log")
            yield url, pair.target_name, pair.target_path
        finally:
            process.terminate()
            process.wait()


def _wait(process: subprocess.Popen[bytes], url: str, log: Path) -> None:
    until_s = time.monotonic() + _PATIENCE_S
    while process.poll() is None and time.monotonic() < until_s:
        try:
            with urllib.request.urlopen(url, timeout=1):
                return
        except (urllib.error.URLError, OSError):
            time.sleep(0.2)
    said = log.read_text(encoding="utf-8", errors="replace").strip().splitlines()
    what = "ended" if process.poll() is not None else f"was not ready within {_PATIENCE_S:.0f} s"
    raise DraftsmithError(f"the service {what}: {said[-1] if said else 'it said nothing'}")


def _row(options: Options, endpoint: str, url: str, tokenizer: str, folder: Path) -> dict[str, Any]:
    say(f"load: {options.requests} requests to {endpoint}, {options.streams} at once")
    before = counted(url)
    report = _guidellm(options, endpoint, url, tokenizer, folder)
    after = counted(url)
    return {"endpoint": endpoint} | compare(report, {name: after[name] - before[name] for name in after})


def counted(url: str) -> dict[str, int]:
    """Return what a server has counted since it started, by what is compared."""
    with urllib.request.urlopen(f"{url}/metrics", timeout=10) as response:
        families = {family.name: family for family in text_string_to_metric_families(response.read().decode())}
    totals = {}
    for name, metric in _COUNTERS.items():
        if metric not in families:
            raise DraftsmithError(f"the server at {url} has no counter {metric}")
        samples = families[metric].samples
        totals[name] = int(sum(sample.value for sample in samples if sample.name == f"{metric}_total"))
    return totals


def _guidellm(options: Options, endpoint: str, url: str, tokenizer: str, folder: Path) -> dict[str, Any]:
    out = folder / "report.json"
    lengths = f"prompt_tokens={options.prompt_tokens},output_tokens={options.output_tokens}"
    env = {name: value for name, value in os.environ.items() if not name.startswith(("DRAFTSMITH_", "PYTHON"))}
    done = subprocess.run(
        [
            options.guidellm, "run", "--backend", f"kind=openai_http,target={url},request_format={endpoint}",
            "--profile", f"kind=concurrent,streams={options.streams}",
            "--data", f"kind=synthetic_text,{lengths}", "--tokenizer", f"kind=hf_auto,model={tokenizer}",
            "--constraint", f"kind=max_requests,count={options.requests}",
            "--output", f"kind=json,path={out}", "--disable-console",
        ],
        env=env | {"HF_HUB_OFFLINE": "1"}, capture_output=True, text=True, check=False,
        timeout=_PATIENCE_S * 4,
    )  # fmt: skip
    if done.returncode or not out.exists():
        raise DraftsmithError(f"guidellm ended with status {done.returncode}: {done.stderr.strip()[-500:]}")
    return dict(json.loads(out.read_text(encoding="utf-8")))


def compare(report: dict[str, Any], server: dict[str, int]) -> dict[str, Any]:
    """Put guidellm's report beside the server's counts of the same time; `equal` says whether they agree."""
    metrics = report["benchmarks"][0]["metrics"]
    totals = metrics["request_totals"]

    def good(name: str) -> dict[str, float]:
        return dict(metrics[name]["successful"])

    theirs = {
        "requests": totals["successful"], "prompt_tokens": round(good("prompt_token_count")["total_sum"]),
        "output_tokens": round(good("output_token_count")["total_sum"]),
    }  # fmt: skip
    return {
        "guidellm": report["metadata"]["guidellm_version"], "failed": totals["errored"] + totals["incomplete"],
        **{name: {"guidellm": theirs[name], "server": server[name]} for name in theirs},
        "equal": theirs == server and totals["successful"] == totals["total"],
        "output_tokens_per_s": round(good("output_tokens_per_second")["mean"], 2),
        "ttft_ms_p50": round(good("time_to_first_token_ms")["median"], 1),
        "itl_ms_p50": round(good("inter_token_latency_ms")["median"], 2),
    }  # fmt: skip


def main() -> int:
    """Measure, write the result, and fail where counts differ."""
    arguments = parser(__doc__, PairOptions())
    arguments.add_argument("--guidellm", type=Path, required=True, help="the program, in an environment of its own")
    arguments.add_argument("--requests", type=int, default=32, help="requests to each endpoint")
    arguments.add_argument("--streams", type=int, default=4, help="requests at once")
    differ: list[str] = []

    def measured(given: dict[str, Any]) -> dict[str, Any]:
        result = measure(Options(**given))
        differ.extend(row["endpoint"] for row in result["rows"] if not row["equal"])
        return result

    status = run("bench.load", arguments, measured)
    if differ:
        say(f"guidellm and the server counted differently: {', '.join(differ)}")
    return status or int(bool(differ))


if __name__ == "__main__":
    sys.exit(main())
