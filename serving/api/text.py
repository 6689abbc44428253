"""Text to token ids and back, with the target's own tokenizer and chat template.  No torch.

Knows nothing of requests and streams; `AnswerText` turns the tokens of one answer into text.
"""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

from tokenizers import Tokenizer

from adapter.contracts import SettingsError
from serving.api.errors import ApiError
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
        self._byte_form = _byte_form(json.loads(path.read_text()).get("decoder") or {})

    def encode(self, text: str, *, special: bool = True, param: str = "prompt") -> list[int]:
        """Encode a plain prompt, with the special tokens the tokenizer adds by itself if `special`.

        Raises:
            ApiError: 400 when the text cannot be encoded.
        """
        try:
            text.encode()
        except UnicodeEncodeError as error:
            raise ApiError(
                400, f"'{param}' holds a lone surrogate, which is no text: {error.reason}", param=param
            ) from None
        return list(self._tokenizer.encode(text, add_special_tokens=special).ids)

    def encode_chat(
        self,
        messages: list[dict[str, Any]],
        tools: list[dict[str, Any]] | None = None,
        *,
        add_generation_prompt: bool = True,
    ) -> list[int]:
        """Render messages with the target's chat template and encode the result.

        Raises:
            ApiError: 400 when the target has no template, or its template refuses the messages.
        """
        if self.template is None:
            raise ApiError(400, "this model has no chat template; use /v1/completions", param="messages")
        text = self.template.render(messages, tools, add_generation_prompt=add_generation_prompt)
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
    return "byte_fallback" if "ByteFallback" in kinds else "text"


def _byte_level_table() -> dict[str, int]:
    """Bytes by the printable character that byte-level BPE writes them as; the others start at U+0100."""
    shown = [*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1), *range(ord("®"), ord("ÿ") + 1)]
    hidden = [byte for byte in range(256) if byte not in shown]
    return {chr(byte): byte for byte in shown} | {chr(256 + place): byte for place, byte in enumerate(hidden)}


_BYTES = _byte_level_table()


def _read_json(path: Path) -> dict[str, Any]:
    return dict(json.loads(path.read_text())) if path.exists() else {}
