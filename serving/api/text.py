"""Text to token ids and back, with the target's own tokenizer and chat template.  No torch.

Knows nothing of requests and streams; `AnswerText` turns the tokens of one answer into text.
"""

from __future__ import annotations

import json
import math
import re
from pathlib import Path
from typing import Any

from tokenizers import Tokenizer

from adapter.contracts import SettingsError
from serving.api.errors import ApiError, check_text
from serving.api.template import TOOL_CALL, ChatTemplate

_BYTE_TOKEN = re.compile(r"<0x([0-9A-F]{2})>")


class TargetText:
    """The target's tokenizer and chat template, read from its folder."""

    def __init__(self, folder: Path) -> None:
        path = folder / "tokenizer.json"
        if not path.exists():
            raise SettingsError(f"{folder} holds no tokenizer.json; a target is served with its own tokenizer")
        self._tokenizer = Tokenizer.from_file(str(path))
        self._config = _read_json(folder / "tokenizer_config.json")
        self.template = self._load_template(folder)
        self.end_tokens = self._find_end_tokens(folder)
        added = self._tokenizer.get_added_tokens_decoder()
        self._added = {number: str(token.content) for number, token in added.items()}
        self._special = {str(token.content) for token in added.values() if token.special}
        self.special_ids = frozenset(number for number, token in added.items() if token.special)
        spelled = json.loads(path.read_text())
        self._byte_form = _byte_form(spelled.get("decoder") or {})
        self.longest_token = _longest_token(spelled)

    def encode(self, text: str, *, special: bool = True, param: str = "prompt") -> list[int]:
        """Encode a plain prompt, with the special tokens the tokenizer adds by itself if `special`.

        Raises:
            ApiError: 400 when the text cannot be encoded.
        """
        check_text(text, param)
        # A batch of one, because only batches let other threads run meanwhile.
        return list(self._tokenizer.encode_batch_fast([text], add_special_tokens=special)[0].ids)

    def check_length(self, text: str, max_tokens: int, param: str = "prompt") -> None:
        """Refuse text that is certainly longer than `max_tokens`, without the work of encoding it.

        Raises:
            ApiError: 400, with the sizes.
        """
        if self.longest_token is not None and len(text) > max_tokens * self.longest_token:
            raise ApiError(
                400, f"the prompt has {len(text)} characters; this model's context holds {max_tokens} tokens of at "
                f"most {self.longest_token} characters each, so at most {max_tokens * self.longest_token} characters",
                param=param, code="context_length_exceeded",
            )  # fmt: skip

    def encode_chat(
        self,
        messages: list[dict[str, Any]],
        tools: list[dict[str, Any]] | None = None,
        *,
        add_generation_prompt: bool = True,
        max_tokens: int | None = None,
    ) -> list[int]:
        """Render messages with the target's chat template and encode the result, `max_tokens` at most if given.

        Raises:
            ApiError: 400 when the target has no template, its template refuses the messages, or they are
                certainly longer than `max_tokens`.
        """
        if self.template is None:
            raise ApiError(400, "this model has no chat template; use /v1/completions", param="messages")
        text = self.template.render(messages, tools, add_generation_prompt=add_generation_prompt)
        if max_tokens is not None:
            self.check_length(text, max_tokens, "messages")
        return self.encode(text, special=False, param="messages")

    def decode(self, token_ids: list[int], *, skip_special: bool = True) -> str:
        """Decode tokens, without special ones unless told otherwise."""
        return str(self._tokenizer.decode(token_ids, skip_special_tokens=skip_special))

    def token_text(self, token_id: int) -> str:
        """Return the tokenizer's own name of a token."""
        return self._tokenizer.id_to_token(token_id) or ""

    def token_bytes(self, token_id: int) -> bytes:
        """Return the bytes a token stands for, which need not be whole characters."""
        if token_id in self._added:
            return self._added[token_id].encode()
        name = self.token_text(token_id)
        if self._byte_form == "byte_level":
            return bytes(_BYTES[char] for char in name if char in _BYTES)
        if self._byte_form == "byte_fallback":
            found = _BYTE_TOKEN.fullmatch(name)
            return bytes([int(found[1], 16)]) if found else name.replace("▁", " ").encode()
        if self._byte_form == "metaspace":
            return name.replace("▁", " ").encode()
        return self.decode([token_id], skip_special=False).encode()

    @property
    def vocab_size(self) -> int:
        """Number of token ids, special ones included."""
        return int(self._tokenizer.get_vocab_size(with_added_tokens=True))

    @property
    def calls_are_special(self) -> bool:
        """Whether the tokens around a tool call are special, so that text without special tokens lacks them."""
        return TOOL_CALL in self._special

    def _token(self, name: str) -> str:
        value = self._config.get(name)
        return str(value["content"] if isinstance(value, dict) else value or "")

    def _load_template(self, folder: Path) -> ChatTemplate | None:
        path = folder / "chat_template.jinja"
        source = path.read_text() if path.exists() else self._config.get("chat_template")
        if not isinstance(source, str):
            return None
        special = {name: self._token(name) for name in ("bos_token", "eos_token", "pad_token", "unk_token")}
        return ChatTemplate(source, special)

    def _find_end_tokens(self, folder: Path) -> list[int]:
        """End tokens as transformers' generate sees them: generation config first, then the model's."""
        for name in ("generation_config.json", "config.json"):
            value = _read_json(folder / name).get("eos_token_id")
            if value is not None:
                return [int(item) for item in value] if isinstance(value, list) else [int(value)]
        return []


def _byte_form(decoder: dict[str, Any]) -> str:
    """Say how token names spell bytes, from the decoder that undoes it."""
    kinds = {part.get("type") for part in [decoder, *decoder.get("decoders", [])]}
    if "ByteLevel" in kinds:
        return "byte_level"
    if "ByteFallback" in kinds:
        return "byte_fallback"
    return "metaspace" if "Metaspace" in kinds else "text"


def _longest_token(spelled: dict[str, Any]) -> int | None:
    """Return how many characters of a text one token can stand for at most; None where that is not known.

    It is known for tokenizers that spell every byte, so that nothing is dropped or joined as unknown.

    Args:
        spelled: what tokenizer.json holds.
    """
    vocab, added = spelled["model"].get("vocab"), spelled.get("added_tokens") or []
    form = _byte_form(spelled.get("decoder") or {})
    needed = {"byte_level": [*_BYTES], "byte_fallback": [f"<0x{byte:02X}>" for byte in range(256)]}.get(form)
    parts = [*_steps(spelled, "normalizer", "normalizers"), *_steps(spelled, "pre_tokenizer", "pretokenizers")]
    shrinks = [_shrink(part) for part in parts]
    takes_space = any(token.get("lstrip") or token.get("rstrip") for token in added)
    if not isinstance(vocab, dict) or needed is None or None in shrinks or takes_space or spelled.get("truncation"):
        return None
    if any(byte not in vocab for byte in needed):
        return None
    longest = max(len(name) for name in [*vocab, *(token["content"] for token in added)])
    return math.prod([longest, *(shrink for shrink in shrinks if shrink is not None)])


def _steps(spelled: dict[str, Any], name: str, inner: str) -> list[dict[str, Any]]:
    """Return the parts of a normalizer or pre-tokenizer, which may be none, one or a sequence."""
    whole = spelled.get(name)
    return [] if whole is None else list(whole.get(inner, [whole]))


def _shrink(step: dict[str, Any]) -> int | None:
    """Return how many characters this step may turn into one; None where it may drop any number of them."""
    kind = step["type"]
    if kind == "NFC":
        return 4  # the longest canonical decomposition of a character
    if kind == "Replace":
        old = step["pattern"].get("String")
        return 1 if old is not None and len(step["content"]) >= len(old) else None
    if kind in ("Split", "Punctuation"):
        return None if step.get("behavior") == "Removed" else 1
    return 1 if kind in ("Prepend", "ByteLevel", "Digits", "Metaspace") else None


def _byte_level_table() -> dict[str, int]:
    """Bytes by the printable character that byte-level BPE writes them as; the others start at U+0100."""
    shown = [*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1), *range(ord("®"), ord("ÿ") + 1)]
    hidden = [byte for byte in range(256) if byte not in shown]
    return {chr(byte): byte for byte in shown} | {chr(256 + place): byte for place, byte in enumerate(hidden)}


_BYTES = _byte_level_table()


def _read_json(path: Path) -> dict[str, Any]:
    return dict(json.loads(path.read_text())) if path.exists() else {}
