"""The text of one answer, read token by token, and where a stop string ends it.

Tokens come in rounds of any size, but they are taken in one at a time, so what a client reads and
where its answer ends never depend on how many tokens a round committed.  Knows nothing of HTTP.
"""

from __future__ import annotations

from collections.abc import Sequence

from serving.api.text import TargetText

_PARTIAL = "�"  # what an incomplete UTF-8 sequence decodes to
_CONTEXT = 5  # tokens of the prompt the answer is read behind; decoders look at one or two
_INSIDE = 3  # bytes of a character after its first at most, so tokens


class AnswerText:
    """Turn tokens into text, holding back what may still become a stop string.

    The text is what decoding the answer behind its prompt adds to the decoded prompt: decoders that
    drop a text's first space drop none of the answer's.

    Args:
        prompt: the tokens the answer continues.
        min_tokens: stop strings that are complete within so many tokens are plain text.
        keep_stop: leave the stop string in the text.
    """

    def __init__(
        self,
        text: TargetText,
        stops: list[str],
        *,
        prompt: Sequence[int] = (),
        min_tokens: int = 0,
        keep_stop: bool = False,
        skip_special: bool = True,
    ) -> None:
        self._text = text
        self._stops = stops
        self._min_tokens = min_tokens
        self._keep_stop = keep_stop
        self._skip_special = skip_special
        self._ids = self._end_of(prompt)
        self._read = len(self._ids)  # tokens whose text was produced, or is the prompt's
        self._context = 0  # a few tokens before, since a token's text depends on its neighbours
        self._held = ""
        self._too_early = 0  # characters of what is held in which no stop string may end
        self.num_tokens = 0
        self.num_characters = 0  # of all text produced, held back or not
        self.stop: str | None = None

    @property
    def stopped(self) -> bool:
        """Whether a stop string is complete; later tokens are ignored."""
        return self.stop is not None

    def push(self, token_id: int) -> str:
        """Take one token and return the text that is safe to send."""
        if self.stopped:
            return ""
        self.num_tokens += 1
        if self._left_out(token_id):
            return ""  # wherever it stands, so nothing later depends on it
        self._ids.append(token_id)
        before, after = self._around()
        if after == before and before and not after.endswith(_PARTIAL):
            self._ids.pop()  # it says nothing, and a run of such would be decoded over and over
            return ""
        if after.endswith(_PARTIAL) or before.startswith(after):
            return ""
        fresh = self._fresh(before, after)
        self._context, self._read = self._read, len(self._ids)
        return self._take(fresh, final=False)

    def push_end(self) -> str:
        """Count an end token, which is a token of the answer and no text."""
        if not self.stopped:
            self.num_tokens += 1
        return ""

    def finish(self) -> str:
        """Return what was held back; an incomplete character at the very end included."""
        if self.stopped:
            return ""
        rest = self._fresh(*self._around())
        self._read = len(self._ids)
        return self._take(rest, final=True)

    def _end_of(self, prompt: Sequence[int]) -> list[int]:
        """Return the prompt's last tokens that are text, from the beginning of a character on."""
        ids: list[int] = []
        for token in reversed(prompt):
            if self._left_out(token):
                continue
            ids.append(token)
            inside = 0x80 <= (self._text.token_bytes(token) or b" ")[0] < 0xC0
            if len(ids) >= _CONTEXT + _INSIDE * inside:
                break
        return ids[::-1]

    def _left_out(self, token_id: int) -> bool:
        """Say whether decoding leaves this token out: a special one, or an id without a token."""
        return (self._skip_special and token_id in self._text.special_ids) or not self._text.token_text(token_id)

    def _around(self) -> tuple[str, str]:
        """Return the context's text, without and with the tokens that are still to be read."""
        return self._decode(self._ids[self._context : self._read]), self._decode(self._ids[self._context :])

    def _fresh(self, before: str, after: str) -> str:
        """Return what the tokens behind the context add to its text."""
        while before.endswith(_PARTIAL) and not after.startswith(before):
            self._read -= 1  # the answer completes a character that the prompt broke off
            before = self._decode(self._ids[self._context : self._read])
        if after.startswith(before):
            return after[len(before) :]
        # Byte fallback: one broken byte turns its neighbours into replacement characters, those sent before too.
        return self._decode(self._ids[self._read :])

    def _decode(self, token_ids: list[int]) -> str:
        return self._text.decode(token_ids, skip_special=self._skip_special)

    def _take(self, fresh: str, *, final: bool) -> str:
        self._held += fresh
        self.num_characters += len(fresh)
        if self.num_tokens <= self._min_tokens:
            self._too_early = len(self._held)
        elif found := self._first_stop():
            end, start, self.stop = found
            return self._held[: end if self._keep_stop else start]
        keep = 0 if final else max((_overlap(self._held, stop) for stop in self._stops), default=0)
        cut = len(self._held) - keep
        out, self._held = self._held[:cut], self._held[cut:]
        self._too_early = max(0, self._too_early - cut)
        return out

    def _first_stop(self) -> tuple[int, int, str] | None:
        """Find the stop string that is complete first: where it ends, where it begins, and what it is."""
        found = []
        for stop in self._stops:
            start = self._held.find(stop, max(0, self._too_early - len(stop) + 1))
            if start >= 0:
                found.append((start + len(stop), start, stop))
        return min(found, default=None)


def _overlap(text: str, stop: str) -> int:
    """Length of the longest end of `text` that begins `stop`."""
    return next((size for size in range(min(len(text), len(stop) - 1), 0, -1) if stop.startswith(text[-size:])), 0)
