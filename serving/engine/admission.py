"""From a message to a request the engine can run, or a refusal that says why not."""

from __future__ import annotations

from adapter.contracts import FLOOR_VERSION
from serving import ipc
from serving.engine.build import Built
from serving.engine.sequence import Sequence


class Refusal(Exception):
    """Raised when a request cannot be taken; `status` and `param` are HTTP's and OpenAI's."""

    def __init__(self, status: int, text: str, param: str | None = None) -> None:
        super().__init__(text)
        self.status = status
        self.param = param


class Admission:
    """Checks messages against what this engine can do.

    Args:
        max_model_len: tokens one request may hold, prompt and answer together.
    """

    def __init__(self, built: Built, max_model_len: int) -> None:
        self._built = built
        self._max_model_len = max_model_len

    def to_sequence(self, message: ipc.Submit, now_s: float) -> Sequence:
        """Build the request.

        Raises:
            Refusal: it does not fit, or names something that is not here.
        """
        total = len(message.token_ids) + message.max_tokens
        if total > self._max_model_len:
            raise Refusal(400, f"{total} tokens do not fit into {self._max_model_len}", "max_tokens")
        return Sequence(
            request_id=message.request_id, tokens=list(message.token_ids), prompt_tokens=len(message.token_ids),
            max_tokens=message.max_tokens, sampling=message.sampling, end_tokens=frozenset(message.end_tokens),
            segment=message.segment, gamma=message.gamma, arrived_s=now_s, version=self._version(message.version),
            priority=message.priority, cache_salt=message.cache_salt, logprobs=message.logprobs,
        )  # fmt: skip

    def _version(self, wanted: int | str | None) -> int | None:
        """Return the version a request is pinned to; None follows the live one."""
        swap = self._built.hotswap
        if wanted is None or wanted == "live":
            return None
        names = {"floor": FLOOR_VERSION, "previous": swap.previous if swap else None}
        version = names.get(wanted) if isinstance(wanted, str) else wanted
        if version is None or swap is None or swap.resident(version) is None:
            here = sorted({FLOOR_VERSION, swap.version, swap.previous} - {None}) if swap else []  # type: ignore[type-var]
            raise Refusal(
                400, f"draft version {wanted!r} is not loaded; use \"live\", \"floor\", \"previous\" or one of {here}",
                "speculative.version",
            )  # fmt: skip
        return version
