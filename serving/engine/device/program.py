"""One round of a whole batch as a program over fixed buffers: nothing in it waits for, or asks, the host.

draft:   read the last two tokens of every request, then draft token by token, each drawn where it is scored.
verify:  read the last token and the drafts with the target, judge all rows, move every request forward.

A request's length and last tokens stay on the device, so the next round can begin before the host has heard
of this one; for the same reason a draft is cut to what a request may still become here.  A program is made for one
batch size and one draft length, its drafting half for one head of the draft; a request that drafts less than the
program stops being judged at its own length.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch.nn.functional import linear

from kernels import dispatch
from kernels.noise import Purpose, uniform
from kernels.sampling import RowParams
from serving.engine.device.llama import DeviceLlama, Places
from serving.engine.device.wire import TABLE, Received, Sent, receive

CATCH_UP = 2  # tokens the draft reads before it drafts: it lacks one after a rejection, two after a full acceptance


@dataclass(frozen=True, slots=True)
class Known:
    """What the device knows of requests, by slot; the last slot is for rows that pad a batch.

    Shapes: length [slots + 1] int64, committed tokens; last [slots + 1, 2] int64, the last two of them.
    """

    length: torch.Tensor
    last: torch.Tensor

    @classmethod
    def empty(cls, slots: int, device: torch.device) -> Known:
        """Know nothing yet."""
        length = torch.full((slots + 1,), CATCH_UP, dtype=torch.long, device=device)
        return cls(length, torch.zeros(slots + 1, 2, dtype=torch.long, device=device))


@dataclass(frozen=True, slots=True)
class Head:
    """An output head at a fixed address: all tokens, or those of a trimmed vocabulary.

    Shapes: weight [columns, hidden]; bias [columns], -inf where a column is unused, or None; token_ids [columns],
    ascending where columns are used, or None.
    """

    weight: torch.Tensor
    bias: torch.Tensor | None = None
    token_ids: torch.Tensor | None = None

    def __call__(self, states: torch.Tensor) -> torch.Tensor:
        """Score.  Shapes: states [rows, hidden]; result [rows, columns]."""
        return linear(states, self.weight, self.bias)


@dataclass(frozen=True, slots=True)
class Model:
    """A model on the device and the head that scores for it."""

    layers: DeviceLlama
    head: Head

    @property
    def rows(self) -> int:
        """How many tokens it can read."""
        return self.layers.rows


class RoundProgram:
    """The buffers and the two programs of a round.

    Args:
        batch: rows of the input, padding included.
        gamma: the longest draft; 0 decodes plainly and needs no draft model.
        vocab: width of the target's logits.
        top_k: tokens recorded a position; 0 none.
        maximal: use the maximal coupling; `laws` [rows, vocab], rows for all of the batch at least, keeps the logits
            that drafted tokens were drawn from.
        synthetic: accept drafted tokens with this chance instead of asking the models; for benchmarks.
    """

    def __init__(
        self, target: Model, draft: Model | None, known: Known, *,
        batch: int, gamma: int, width: int, block_tokens: int, vocab: int, top_k: int, maximal: bool,
        laws: torch.Tensor | None = None, synthetic: float | None = None,
    ) -> None:  # fmt: skip
        device = known.length.device
        self.sent = Sent(gamma, top_k)
        self.input = torch.zeros(batch, TABLE + width, dtype=torch.int32, device=device)
        self.output = torch.zeros(batch, self.sent.width, dtype=torch.int32, device=device)
        self._target, self._draft, self._known = target, draft, known
        self._batch, self._gamma, self._block_tokens = batch, gamma, block_tokens
        self._top_k, self._maximal, self._vocab = top_k, maximal, vocab
        self._synthetic = synthetic
        self._drafts = torch.zeros(batch, gamma, dtype=torch.long, device=device)
        self._logprobs = torch.zeros(batch, gamma, dtype=torch.float32, device=device)
        self._laws = None if laws is None else laws[: batch * (gamma + 1)].view(batch, gamma + 1, vocab)
        self._sound = torch.ones(batch, dtype=torch.bool, device=device)  # whose draft's logits are numbers
        self._starts = {
            rows: torch.arange(batch + 1, dtype=torch.int32, device=device) * rows for rows in (1, CATCH_UP, gamma + 1)
        }
        self._second = torch.arange(batch, device=device) * CATCH_UP + CATCH_UP - 1

    # -- drafting ----------------------------------------------------------------------------

    def draft(self, head: Head | None = None) -> None:
        """Fill in the drafts of the batch, scored by the draft model's own head or by another one for it."""
        if self._draft is None or not self._gamma:
            return
        head = self._draft.head if head is None else head
        got = self._received()
        self._sound.fill_(True)
        states = self._read(got.last.reshape(-1), self._places(got, got.length - CATCH_UP, CATCH_UP), self._second)
        for number in range(self._gamma):
            tokens = self._draw(head, states, got, number)
            if number + 1 < self._gamma:
                states = self._read(tokens, self._places(got, got.length + number, 1))

    def _read(self, tokens: torch.Tensor, places: Places, wanted: torch.Tensor | None = None) -> torch.Tensor:
        """Run the draft's layers; an id it has no row for is read as another, as it may be anything but missing."""
        if self._draft is None:
            raise RuntimeError("this round has no draft model")
        return self._draft.layers.states(tokens.clamp_max(self._draft.rows - 1), places, wanted)

    def _draw(self, head: Head, states: torch.Tensor, got: Received, number: int) -> torch.Tensor:
        """Draw the next token of every request and note it.  Shapes: states [batch, hidden]; result [batch]."""
        logits, ids = head(states), head.token_ids
        if ids is None:
            logits = _fit(logits, self._vocab)
        params = _params(got, got.length + number, 1)
        purpose = Purpose.DRAFT if self._maximal else Purpose.SAMPLE
        borders = dispatch.cut_borders(logits, params)
        drawn = dispatch.draw(logits, params, purpose, borders=borders, token_ids=ids)
        self._drafts[:, number] = drawn.tokens
        self._logprobs[:, number] = drawn.logprobs
        self._sound.logical_and_(drawn.finite | (got.length + number > got.capacity))  # what that read is not its own
        if self._laws is not None:
            if ids is None:
                self._laws[:, number] = logits
            else:  # unused columns carry -inf for a token that others score: they must not overwrite it
                self._laws[:, number].fill_(-torch.inf).scatter_reduce_(
                    1, ids.expand(len(logits), -1), logits, "amax", include_self=True
                )
        return drawn.tokens

    # -- verifying ---------------------------------------------------------------------------

    def verify(self) -> None:
        """Judge the drafts, move every request forward and pack what came of it."""
        got, rows = self._received(), self._gamma + 1
        tokens = torch.cat((got.last[:, 1:], self._drafts), dim=1)
        places = self._places(got, got.length - 1, rows)
        states = self._target.layers.states(tokens.reshape(-1), places)
        # Past its blocks a request reads what lies in others': no number there may be held against it.
        states = states.masked_fill((places.slots < 0)[:, None], 0.0)
        logits = _fit(self._target.head(states), self._vocab)
        params = _params(got, got.length, rows)
        number = torch.arange(rows, device=tokens.device)
        drafted = torch.full_like(tokens, -1)
        drafted[:, : self._gamma] = self._drafts
        drafted = drafted.masked_fill(number >= got.gamma[:, None], -1).reshape(-1).int()
        laws = None if self._laws is None else self._laws.view(-1, self._vocab)
        verdicts = dispatch.verify(
            logits, params, self._starts[rows], drafted, coupling="maximal" if laws is not None else "gumbel",
            borders=dispatch.cut_borders(logits, params), draft_logits=laws,
            draft_borders=None if laws is None else dispatch.cut_borders(laws, params), top_k=self._top_k,
            with_residual=False,  # the log has no place for it, and it takes another look at both laws
        )  # fmt: skip
        accepted = verdicts.accepted.long() if self._synthetic is None else self._drawn_lots(got)
        before = tokens.gather(1, accepted[:, None])
        self._known.length[got.slot] = got.length + accepted + 1
        self._known.last[got.slot] = torch.cat((before, verdicts.tokens[:, None]), dim=1)
        self.output.copy_(
            self.sent.pack(
                accepted, verdicts.tokens, verdicts.finite, self._sound, got.gamma, self._drafts, self._logprobs,
                verdicts.topk_ids, verdicts.topk_logprobs,
            )
        )  # fmt: skip

    def _drawn_lots(self, got: Received) -> torch.Tensor:
        """Accept each drafted token with a fixed chance; what follows is whatever the target said last."""
        rows = self._gamma + 1
        params = _params(got, got.length, rows)
        lots = uniform(params.seeds, params.positions, Purpose.ACCEPT).view(self._batch, rows)
        number = torch.arange(rows, device=lots.device)
        kept = (lots < self._synthetic) & (number < got.gamma[:, None])
        return kept.long().cumprod(dim=1).sum(dim=1)

    # -- shared ------------------------------------------------------------------------------

    def _received(self) -> Received:
        """Take the input apart; what the device knows better than the host comes from there."""
        got = receive(self.input)
        length = torch.where(got.fresh, got.length, self._known.length[got.slot])
        last = torch.where(got.fresh[:, None], got.last, self._known.last[got.slot])
        room = (got.limit - length - 1).clamp_min(0)
        return replace(got, length=length, last=last, gamma=torch.minimum(got.gamma, room).clamp_max(self._gamma))

    def _places(self, got: Received, first: torch.Tensor, rows: int) -> Places:
        """Lay out `rows` new tokens of every request from position `first`; those without a block are not written."""
        positions = first[:, None] + torch.arange(rows, device=first.device)
        blocks = (positions // self._block_tokens).clamp(0, got.tables.shape[1] - 1)
        slots = got.tables.gather(1, blocks).long() * self._block_tokens + positions % self._block_tokens
        slots = slots.masked_fill(positions >= got.capacity[:, None], -1)
        lengths = (first + rows).int()
        return Places(positions.reshape(-1), slots.reshape(-1), got.tables, self._starts[rows], lengths, rows)


def _params(got: Received, first: torch.Tensor, rows: int) -> RowParams:
    """Give every row its request's parameters; the rows of a request decide positions from `first` on."""

    def spread(item: torch.Tensor) -> torch.Tensor:
        return item.repeat_interleave(rows, output_size=len(item) * rows)

    positions = first[:, None] + torch.arange(rows, device=first.device)
    return RowParams(
        spread(got.temperature), spread(got.top_p), spread(got.top_k), spread(got.seeds), positions.reshape(-1),
        spread(got.min_p),
    )  # fmt: skip


def _fit(logits: torch.Tensor, vocab: int) -> torch.Tensor:
    """Cut or pad to the target's width: a token the target does not have must never be proposed."""
    wide = logits[:, :vocab]
    missing = vocab - wide.shape[1]
    return torch.nn.functional.pad(wide, (0, missing), value=-torch.inf) if missing else wide.contiguous()
