"""Draw, judge drafted tokens and record the target's law, in plain torch on any device.

The same tokens as `kernels.sampling` and `kernels.verify` give, but in and out are tensors: nothing is read back
to the host and no row is looped over (on a CPU, where reading back is free, noise is made for likely tokens only).
Sources of the two couplings: arXiv 2408.07978 and arXiv 2211.17192, Algorithm 1.

Shapes: logits [rows, vocab] in any float dtype; float64 is computed in float64, the rest in float32.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch

from kernels.noise import LANES, Purpose, gumbel, uniform
from kernels.verdicts import Draws, Verdicts

if TYPE_CHECKING:
    from kernels.sampling import RowParams

_BLOCK = 64


def draw(
    logits: torch.Tensor, params: RowParams, purpose: Purpose = Purpose.SAMPLE, *,
    borders: torch.Tensor | None = None, token_ids: torch.Tensor | None = None,
) -> Draws:  # fmt: skip
    """Draw one column of each row: argmax where greedy, argmax of log-probability plus noise elsewhere.

    Shapes: logits [rows, vocab]; borders [rows], the smallest raw logit that stays in a sampled row; token_ids
    [vocab] int64, ascending, which tokens the columns are (noise belongs to tokens).
    """
    raw = _working(logits)
    finite = torch.isfinite(raw.amax(-1))
    columns = torch.where(finite, _pick(processed(raw, params, borders), params, purpose, token_ids), 0)
    logprobs = raw.gather(1, columns[:, None]).squeeze(1) - torch.logsumexp(raw, -1)
    logprobs = torch.where(finite, logprobs, -torch.inf).float()
    return Draws(columns if token_ids is None else token_ids[columns], columns, logprobs, finite)


def verify(
    logits: torch.Tensor, params: RowParams, starts: torch.Tensor, drafted: torch.Tensor, *, coupling: str,
    borders: torch.Tensor | None = None, draft_logits: torch.Tensor | None = None,
    draft_borders: torch.Tensor | None = None, top_k: int = 0, with_residual: bool = True,
) -> Verdicts:  # fmt: skip
    """Judge every request's drafted tokens and record the target's law of every row.

    Shapes: logits [rows, vocab]; starts [requests + 1] int32, rising from 0: rows starts[i] to starts[i + 1] are
    request i's, the last of them decides the bonus token; drafted [rows] int32, -1 on bonus rows; draft_logits
    [rows, vocab], the logits the drafted tokens were drawn from, before temperature (bonus rows are never read);
    borders and draft_borders [rows], as in `draw`.  `with_residual` False saves the sweep for `residual`.

    Raises:
        ValueError: a coupling that is none, maximal without draft logits, or top_k outside 0..vocab.
    """
    check_request(logits, coupling, draft_logits, top_k)
    raw = _working(logits)
    shaped = processed(raw, params, borders)
    drawn = draw(logits, params, borders=borders)
    layout = _Layout.of(starts, len(raw))
    said = torch.where(layout.real, drawn.columns, -1)
    judged, greedy = layout.judged & (drafted >= 0), params.temperature <= 0
    kept = drafted == said
    laws = None
    if draft_logits is not None:
        laws = _Laws.of(shaped, processed(_working(draft_logits), params, draft_borders), judged)
    if coupling == "maximal":
        assert laws is not None
        lucky = uniform(params.seeds, params.positions, Purpose.ACCEPT) * laws.of_drafted(1, drafted)
        kept = torch.where(greedy, kept, (lucky < laws.of_drafted(0, drafted)) & ~laws.broken)
    accepted, stop = layout.chain(judged & kept)
    tokens = said[stop]
    if coupling == "maximal" and laws is not None:
        recovered = laws.recover(stop, params)
        tokens = torch.where((judged & ~greedy & drawn.finite)[stop] & ~kept[stop], recovered, tokens)
    residual = None
    if laws is not None and with_residual:
        rejected = torch.where(greedy, (drafted != said).float(), laws.residual())
        residual = torch.where(judged, rejected, 0.0)
    of_rows = torch.where(judged, drafted.long(), said).clamp(0, raw.shape[1] - 1)
    ids, logprobs, tail, named = _records(raw, drawn.finite, of_rows, top_k)
    return Verdicts(
        accepted, torch.where(layout.empty, -1, tokens), layout.all_of(drawn.finite), said,
        torch.where(layout.real, named, 0.0), ids, logprobs, tail, residual,
    )  # fmt: skip


def check_request(logits: torch.Tensor, coupling: str, draft_logits: torch.Tensor | None, top_k: int) -> None:
    """Refuse what `verify` cannot answer.

    Raises:
        ValueError: see `verify`.
    """
    if coupling not in ("gumbel", "maximal"):
        raise ValueError(f"coupling is {coupling!r}; it must be 'gumbel' or 'maximal'")
    if coupling == "maximal" and draft_logits is None:
        raise ValueError("the maximal coupling needs draft_logits, the logits the drafted tokens were drawn from")
    if draft_logits is not None and draft_logits.shape != logits.shape:
        raise ValueError(f"draft_logits has the shape {list(draft_logits.shape)}; logits has {list(logits.shape)}")
    if not 0 <= top_k <= logits.shape[1]:
        raise ValueError(f"top_k is {top_k}; it must be between 0 and the {logits.shape[1]} tokens of a row")


def processed(raw: torch.Tensor, params: RowParams, borders: torch.Tensor | None) -> torch.Tensor:
    """Divide sampled rows by their temperature and cut them at their borders; greedy rows stay as they are.

    Shapes: raw [rows, vocab] float32 or float64; borders [rows]; result [rows, vocab], -inf where cut.
    """
    sampled = params.temperature > 0
    scaled = raw / torch.where(sampled, params.temperature, 1.0)[:, None]
    if borders is not None:
        scaled = scaled.masked_fill((raw < borders[:, None]) & sampled[:, None], -torch.inf)
    return scaled


def _working(logits: torch.Tensor) -> torch.Tensor:
    return logits if logits.dtype == torch.float64 else logits.float()


def _pick(
    scaled: torch.Tensor, params: RowParams, purpose: Purpose, token_ids: torch.Tensor | None = None
) -> torch.Tensor:
    """Return the column each row draws; noise for every token where leaving some out would ask the device."""
    if scaled.is_cpu:
        from kernels.sampling import Columns  # it imports `kernels.dispatch`, which imports this module
        from kernels.sampling import draw as draw_likely

        return draw_likely(scaled, params, purpose, None if token_ids is None else Columns.of(token_ids))
    noise = dense_noise(params, scaled.shape[1], purpose, token_ids)
    return torch.where((params.temperature > 0)[:, None], scaled.double() + noise, scaled.double()).argmax(-1)


def dense_noise(params: RowParams, vocab: int, purpose: Purpose, token_ids: torch.Tensor | None = None) -> torch.Tensor:
    """Return the Gumbel noise of every column of every row.  Shapes: result [rows, vocab] float64."""
    rows, device = len(params.seeds), params.seeds.device
    blocks = torch.arange(-(-vocab // LANES), device=device) if token_ids is None else token_ids // LANES
    seeds, positions = (item[:, None].expand(rows, len(blocks)) for item in (params.seeds, params.positions))
    noise = gumbel(seeds, blocks.expand(rows, -1), positions, purpose)
    if token_ids is None:
        return noise.flatten(1)[:, :vocab]
    return noise.gather(2, (token_ids % LANES).expand(rows, -1)[:, :, None]).squeeze(2)


@dataclass(frozen=True, slots=True)
class _Layout:
    """Which request each row belongs to.

    Shapes: owner, real (of any request) and judged (not a bonus row) [rows]; first and last (row) and empty
    [requests].  Rows of no request belong to one past the last.
    """

    owner: torch.Tensor
    real: torch.Tensor
    judged: torch.Tensor
    first: torch.Tensor
    last: torch.Tensor
    empty: torch.Tensor

    @classmethod
    def of(cls, starts: torch.Tensor, rows: int) -> _Layout:
        """Lay out rows by the requests' first rows."""
        index = torch.arange(rows, device=starts.device)
        edges = starts.long()
        first, last = edges[:-1], edges[1:] - 1
        owner = torch.searchsorted(edges[1:].contiguous(), index, right=True)
        judged = index < torch.cat((last, last.new_zeros(1)))[owner]
        return cls(owner, owner < len(first), judged, first, last, last < first)

    def chain(self, kept: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Return how many drafted tokens each request keeps (int32), and the row whose token comes next (int64)."""
        index = torch.arange(len(kept), device=kept.device)
        ends = torch.cat((self.last, self.last.new_zeros(1)))
        halts = torch.where(kept, ends[self.owner], index)
        stop = ends.scatter_reduce(0, self.owner, halts, "amin")[:-1]
        return (stop - self.first).clamp_min(0).int(), stop.clamp_min(0)

    def all_of(self, rows: torch.Tensor) -> torch.Tensor:
        """Say of each request whether something holds in all of its rows."""
        held = torch.ones(len(self.first) + 1, dtype=torch.int32, device=rows.device)
        return held.scatter_reduce(0, self.owner, rows.int(), "amin")[:-1].bool()


@dataclass(frozen=True, slots=True)
class _Laws:
    """The processed laws of target and draft: log-weights and their log-sums.

    Shapes: shaped two of [rows, vocab]; totals two of [rows] float64; broken [rows]: the draft has no law there.
    """

    shaped: tuple[torch.Tensor, torch.Tensor]
    totals: tuple[torch.Tensor, torch.Tensor]
    broken: torch.Tensor

    @classmethod
    def of(cls, target: torch.Tensor, draft: torch.Tensor, judged: torch.Tensor) -> _Laws:
        """Sum both laws up; rows that are not judged need no draft."""
        total = torch.logsumexp(draft.double(), -1)
        broken = ~torch.isfinite(total) & judged
        return cls((target, draft), (torch.logsumexp(target.double(), -1), total), broken)

    def of_drafted(self, side: int, drafted: torch.Tensor) -> torch.Tensor:
        """Return the probability of each row's drafted token, float64; side 0 is the target's."""
        column = drafted.long().clamp(0, self.shaped[side].shape[1] - 1)[:, None]
        return torch.exp(self.shaped[side].gather(1, column).squeeze(1).double() - self.totals[side])

    def recover(self, rows: torch.Tensor, params: RowParams) -> torch.Tensor:
        """Draw from the normalised positive part of p - q of some rows, and from p where the draft is broken."""
        p, q = (
            torch.exp(shaped[rows].double() - total[rows, None])
            for shaped, total in zip(self.shaped, self.totals, strict=True)
        )
        left = (p - q.masked_fill(self.broken[rows, None], 0.0)).clamp_min(0.0)
        # p == q leaves nothing over; rounding alone can then reject, and any token of p is exact.
        law = torch.where(left.sum(-1, keepdim=True) > 0, left, p)
        return _pick(torch.log(law).float(), params.rows(rows), Purpose.RECOVER)

    def residual(self) -> torch.Tensor:
        """Return 1 - Σ min(p, q) of every row, float32; 1 where the draft is broken."""
        p, q = (
            torch.exp(shaped - total[:, None].to(shaped.dtype))
            for shaped, total in zip(self.shaped, self.totals, strict=True)
        )
        rejected = (1.0 - torch.minimum(p, q).sum(-1)).clamp(0.0, 1.0).float()
        return torch.where(self.broken, 1.0, rejected)


def _records(
    raw: torch.Tensor, finite: torch.Tensor, named: torch.Tensor, k: int
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """Return the k likeliest ids, their log-probs, what they leave over, and the log-prob of one named column."""
    total = torch.logsumexp(raw, -1)
    values, ids = ordered_topk(raw, k)
    logprobs = torch.where(finite[:, None], values - total[:, None], -torch.inf).float()
    tail = (1.0 - torch.exp(logprobs).sum(-1)).clamp_min(0.0)
    of_named = raw.gather(1, named[:, None]).squeeze(1) - total
    return ids.int(), logprobs.half(), tail, torch.where(finite, of_named, -torch.inf).float()


def ordered_topk(values: torch.Tensor, k: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the k largest of each row and their places; of equal ones the first come first.

    The k largest lie in the k blocks with the largest maxima, and of blocks with equal maxima in the first.
    Shapes: values [rows, width] float32 or float64; results [rows, k].
    """
    rows, width = values.shape
    values = torch.nan_to_num(values, nan=torch.inf, posinf=torch.inf, neginf=-torch.inf)
    if width <= 2 * k * _BLOCK:
        places = _first_largest(values, k)
        return values.gather(1, places), places
    if width % _BLOCK:
        values = torch.nn.functional.pad(values, (0, _BLOCK - width % _BLOCK), value=-torch.inf)
    blocks = values.view(rows, -1, _BLOCK)
    best = _first_largest(blocks.amax(-1), k).sort(-1).values
    candidates = blocks.gather(1, best[:, :, None].expand(-1, -1, _BLOCK)).reshape(rows, -1)
    found = _first_largest(candidates, k)
    return candidates.gather(1, found), best.gather(1, found // _BLOCK) * _BLOCK + found % _BLOCK


def _first_largest(values: torch.Tensor, k: int) -> torch.Tensor:
    """Return the places of the k largest of each row; of equal ones the first come first."""
    if values.dtype == torch.float64:
        return torch.sort(values, dim=-1, descending=True, stable=True).indices[:, :k]
    bits = (values + 0.0).view(torch.int32)  # -0.0 becomes 0.0
    order = (bits ^ ((bits >> 31) & 0x7FFFFFFF)).long() << 32
    return torch.topk(order - torch.arange(values.shape[1], device=values.device), k, dim=-1).indices
