"""Text to token ids and back, with the target's own tokenizer and chat template.  No torch.

Answers come back token by token, so that what a client reads and where a stop string ends never
depend on how many tokens a round committed.
"""

from __future__ import annotations

import json
from datetime import datetime
from pathlib import Path
from typing import Any

from jinja2 import TemplateError
from jinja2.ext import loopcontrols
from jinja2.sandbox import ImmutableSandboxedEnvironment
from tokenizers import Tokenizer

from adapter.contracts import SettingsError
from serving.api.errors import ApiError

_PARTIAL = "�"  # what an incomplete UTF-8 sequence decodes to


class TargetText:
    """The target's tokenizer and chat template, read from its folder."""

    def __init__(self, folder: Path) -> None:
        path = folder / "tokenizer.json"
        if not path.exists():
            raise SettingsError(f"{folder} holds no tokenizer.json; a target is served with its own tokenizer")
        self._tokenizer = Tokenizer.from_file(str(path))
        self._config = _read_json(folder / "tokenizer_config.json")
        self._template = self._load_template(folder)
        self.end_tokens = self._find_end_tokens(folder)

    def encode(self, text: str) -> list[int]:
        """Encode a plain prompt, with the special tokens the tokenizer adds by itself.

        Raises:
            ApiError: 400 when the text cannot be encoded.
        """
        return self._encode(text, "prompt", special=True)

    def encode_chat(self, messages: list[dict[str, str]]) -> list[int]:
        """Render messages with the target's chat template and encode the result.

        Raises:
            ApiError: 400 when the target has no template, or its template refuses the messages.
        """
        if self._template is None:
            raise ApiError(400, "this model has no chat template; use /v1/completions", param="messages")
        special = {name: self._token(name) for name in ("bos_token", "eos_token", "pad_token", "unk_token")}
        try:
            text = self._template.render(messages=messages, add_generation_prompt=True, **special)
        except TemplateError as error:
            raise ApiError(
                400, f"the model's chat template refuses these messages: {error}", param="messages"
            ) from None
        return self._encode(text, "messages", special=False)

    def _encode(self, text: str, param: str, *, special: bool) -> list[int]:
        try:
            text.encode()
        except UnicodeEncodeError as error:
            raise ApiError(
                400, f"'{param}' holds a lone surrogate, which is no text: {error.reason}", param=param
            ) from None
        return list(self._tokenizer.encode(text, add_special_tokens=special).ids)

    def decode(self, token_ids: list[int]) -> str:
        """Decode tokens, without special ones."""
        return str(self._tokenizer.decode(token_ids, skip_special_tokens=True))

    @property
    def vocab_size(self) -> int:
        """Number of token ids, special ones included."""
        return int(self._tokenizer.get_vocab_size(with_added_tokens=True))

    def _token(self, name: str) -> str:
        value = self._config.get(name)
        return str(value["content"] if isinstance(value, dict) else value or "")

    def _load_template(self, folder: Path) -> Any:
        path = folder / "chat_template.jinja"
        source = path.read_text() if path.exists() else self._config.get("chat_template")
        if not isinstance(source, str):
            return None
        environment = ImmutableSandboxedEnvironment(trim_blocks=True, lstrip_blocks=True, extensions=[loopcontrols])
        environment.globals["raise_exception"] = _raise
        environment.globals["strftime_now"] = lambda form: datetime.now().strftime(form)
        return environment.from_string(source)

    def _find_end_tokens(self, folder: Path) -> list[int]:
        """End tokens as transformers' generate sees them: generation config first, then the model's."""
        for name in ("generation_config.json", "config.json"):
            value = _read_json(folder / name).get("eos_token_id")
            if value is not None:
                return [int(item) for item in value] if isinstance(value, list) else [int(value)]
        return []


class AnswerText:
    """Turn the tokens of one answer into text, holding back what may still become a stop string."""

    def __init__(self, text: TargetText, stops: list[str]) -> None:
        self._text = text
        self._stops = stops
        self._ids: list[int] = []
        self._read = 0  # tokens whose text was produced
        self._context = 0  # a few tokens before, since a token's text depends on its neighbours
        self._held = ""
        self.num_tokens = 0
        self.stopped = False

    def push(self, token_id: int) -> str:
        """Take one token and return the text that is safe to send.

        After a stop string is complete `stopped` is true, the text before it has been returned and
        later tokens are ignored.
        """
        if self.stopped:
            return ""
        self.num_tokens += 1
        self._ids.append(token_id)
        before = self._text.decode(self._ids[self._context : self._read])
        after = self._text.decode(self._ids[self._context :])
        if after.endswith(_PARTIAL) or len(after) <= len(before):
            return ""
        self._context, self._read = self._read, len(self._ids)
        self._held += after[len(before) :]
        return self._release(final=False)

    def finish(self) -> str:
        """Return what was held back; an incomplete character at the very end included."""
        if self.stopped:
            return ""
        before = self._text.decode(self._ids[self._context : self._read])
        self._held += self._text.decode(self._ids[self._context :])[len(before) :]
        self._read = len(self._ids)
        return self._release(final=True)

    def _release(self, *, final: bool) -> str:
        places = [(self._held.find(stop), stop) for stop in self._stops]
        found = [(index + len(stop), index) for index, stop in places if index >= 0]
        if found:  # the one that is complete first wins, however the text was cut into tokens
            self.stopped = True
            return self._held[: min(found)[1]]
        keep = 0 if final else max((_overlap(self._held, stop) for stop in self._stops), default=0)
        cut = len(self._held) - keep
        out, self._held = self._held[:cut], self._held[cut:]
        return out


def _overlap(text: str, stop: str) -> int:
    """Length of the longest end of `text` that begins `stop`."""
    return next((size for size in range(min(len(text), len(stop) - 1), 0, -1) if stop.startswith(text[-size:])), 0)


def _read_json(path: Path) -> dict[str, Any]:
    return dict(json.loads(path.read_text())) if path.exists() else {}


def _raise(message: str) -> None:
    raise TemplateError(message)
