"""Log-probs in OpenAI's two shapes: a list of objects for chats, four parallel lists for completions.

The values are the target's own, of the raw logits at temperature 1.  A token that is no whole
character is spelled with its bytes, so that two of them never look alike.  Knows nothing of HTTP.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from adapter.contracts import TokenLogprob
from serving.api.text import TargetText

_LOWEST = -9999.0  # JSON has no infinity; vLLM writes the same number


def chat_logprobs(
    text: TargetText, token_ids: Sequence[int], values: Sequence[TokenLogprob], num_top: int
) -> dict[str, Any]:
    """Return the `logprobs` object of a chat choice, one entry a token."""
    content = []
    for token, value in zip(token_ids, values, strict=True):
        top = zip(value.top_ids[:num_top], value.top_logprobs[:num_top], strict=True)
        content.append(
            _entry(text, token, value.logprob)
            | {"top_logprobs": [_entry(text, other, logprob) for other, logprob in top]}
        )
    return {"content": content, "refusal": None}


def completion_logprobs(
    text: TargetText, token_ids: Sequence[int], values: Sequence[TokenLogprob], offsets: Sequence[int], num_top: int
) -> dict[str, Any]:
    """Return the `logprobs` object of a plain completion: parallel lists, one item a token.

    `offsets` count characters of the answer's text; as in OpenAI's API, the chosen token is among its
    alternatives even where it is not among the `num_top` most likely.
    """
    tops = []
    for token, value in zip(token_ids, values, strict=True):
        top = dict(zip(value.top_ids[:num_top], value.top_logprobs[:num_top], strict=True))
        top.setdefault(token, value.logprob)
        tops.append({_spell(text, other, "bytes:"): _finite(logprob) for other, logprob in top.items()})
    return {
        "text_offset": list(offsets),
        "token_logprobs": [_finite(value.logprob) for value in values],
        "tokens": [_spell(text, token, "bytes:") for token in token_ids],
        "top_logprobs": tops,
    }


def _entry(text: TargetText, token_id: int, logprob: float) -> dict[str, Any]:
    return {"token": _spell(text, token_id, ""), "bytes": list(text.token_bytes(token_id)), "logprob": _finite(logprob)}


def _spell(text: TargetText, token_id: int, prefix: str) -> str:
    """Return a token's text, or its bytes as escapes where they are no text of their own."""
    said = text.token_bytes(token_id)
    try:
        return said.decode()
    except UnicodeDecodeError:
        return prefix + "".join(f"\\x{byte:02x}" for byte in said)


def _finite(value: float) -> float:
    return max(value, _LOWEST)
