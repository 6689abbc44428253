"""Turn logits into a law (temperature, top-k, top-p, min-p) and draw from it with keyed noise.

Drawing is argmax(log p + Gumbel noise).  A token can win only if its log-probability is within
`MAX_GUMBEL` of the best score found so far, so noise is computed for those blocks only.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch

from kernels.dispatch import largest
from kernels.noise import LANES, MAX_GUMBEL, Purpose, gumbel
from kernels.reference.rows import exact_topk

_NUCLEUS = 512  # a nucleus larger than this falls back to sorting the row


@dataclass(frozen=True, slots=True)
class RowParams:
    """How each row of logits is sampled.

    Shapes: all [rows]; temperature, top_p, min_p float32; top_k, seeds, positions int64.
    temperature 0 is greedy, top_k 0, top_p 1 and min_p 0 are off; min_p None is off for every row.
    `positions` is the absolute index of the token the row decides.
    """

    temperature: torch.Tensor
    top_p: torch.Tensor
    top_k: torch.Tensor
    seeds: torch.Tensor
    positions: torch.Tensor
    min_p: torch.Tensor | None = None

    def rows(self, index: torch.Tensor) -> RowParams:
        """Return the parameters of some rows."""
        return RowParams(
            self.temperature[index], self.top_p[index], self.top_k[index], self.seeds[index], self.positions[index],
            None if self.min_p is None else self.min_p[index],
        )  # fmt: skip


def shape_logits(logits: torch.Tensor, params: RowParams) -> torch.Tensor:
    """Divide by the temperature and cut to top-k, then to the nucleus of what is left, then to min-p.

    min-p keeps tokens at least min_p times as likely as the likeliest.  It looks at a ratio, so it
    does not matter to it what was cut before; transformers has this order too.  Greedy rows come
    back unchanged, and the very tensor comes back when no row needs anything.  Ties at the border
    of top-k, of the nucleus and of min-p are all kept.
    Shapes: logits [rows, vocab] float32, not changed; result [rows, vocab], -inf where cut.
    """
    sampled = params.temperature > 0
    top_k, top_p, min_p = params.top_k, params.top_p, params.min_p
    shaping = (params.temperature != 1) | (top_k > 0) | (top_p < 1)
    if min_p is not None:
        shaping = shaping | (min_p > 0)
    if not bool((sampled & shaping).any()):
        return logits
    scaled = logits / torch.where(sampled, params.temperature, 1.0)[:, None]
    cut = sampled & (top_k > 0) & (top_k < scaled.shape[1])
    scaled = _on_rows(scaled, cut, lambda part, rows: _cut_topk(part, top_k[rows]))
    scaled = _on_rows(scaled, sampled & (top_p < 1), lambda part, rows: _cut_nucleus(part, top_p[rows]))
    if min_p is not None:
        scaled = _on_rows(scaled, sampled & (min_p > 0), lambda part, rows: _cut_min_p(part, min_p[rows]))
    return scaled


def _on_rows(
    scaled: torch.Tensor, wanted: torch.Tensor, cut: Callable[[torch.Tensor, torch.Tensor], torch.Tensor]
) -> torch.Tensor:
    """Cut the wanted rows; gather and write back only where they are not all there are."""
    rows = torch.nonzero(wanted).squeeze(1)
    if len(rows) == len(scaled):
        return cut(scaled, rows)
    if len(rows):
        scaled[rows] = cut(scaled[rows], rows)
    return scaled


def _cut_topk(scaled: torch.Tensor, top_k: torch.Tensor) -> torch.Tensor:
    """Keep each row's own number of likeliest tokens, and ties with the last of them."""
    values, _ = exact_topk(scaled, int(top_k.max()))
    border = values.gather(1, top_k[:, None] - 1)
    return scaled.masked_fill(scaled < border, -torch.inf)


def _cut_min_p(scaled: torch.Tensor, min_p: torch.Tensor) -> torch.Tensor:
    """Keep tokens at least min_p times as likely as the likeliest."""
    border = scaled.amax(-1, keepdim=True) + torch.log(min_p)[:, None]
    return scaled.masked_fill(scaled < border, -torch.inf)


def _cut_nucleus(scaled: torch.Tensor, top_p: torch.Tensor) -> torch.Tensor:
    """Keep the smallest set of tokens whose mass reaches top_p; always at least one."""
    total = torch.logsumexp(scaled, dim=-1, keepdim=True)
    values, _ = exact_topk(scaled, min(_NUCLEUS, scaled.shape[1]))
    mass = torch.exp(values - total)
    if bool((mass.sum(-1) < top_p).any()):
        values = torch.sort(scaled, dim=-1, descending=True).values
        mass = torch.exp(values - total)
    needed = (mass.cumsum(-1) - mass < top_p[:, None]).sum(-1, keepdim=True)
    border = values.gather(1, (needed - 1).clamp_min(0))
    return scaled.masked_fill(scaled < border, -torch.inf)


@dataclass(frozen=True, slots=True)
class Columns:
    """Which tokens the columns of a row are, where it holds only some of the vocabulary.

    Noise is made for blocks of neighbouring tokens, so the blocks that occur are laid out once.
    Shapes: token_ids [n] int64, ascending; block_ids [blocks]; places [blocks, LANES], n where a token is missing.
    """

    token_ids: torch.Tensor
    block_ids: torch.Tensor
    places: torch.Tensor

    @classmethod
    def of(cls, token_ids: torch.Tensor) -> Columns:
        """Lay out the columns of these tokens."""
        block_ids, block = torch.unique_consecutive(token_ids // LANES, return_inverse=True)
        places = torch.full((len(block_ids), LANES), len(token_ids), device=token_ids.device)
        places[block, token_ids % LANES] = torch.arange(len(token_ids), device=token_ids.device)
        return cls(token_ids, block_ids, places)


def draw(
    scaled: torch.Tensor, params: RowParams, purpose: Purpose = Purpose.SAMPLE, columns: Columns | None = None
) -> torch.Tensor:
    """Draw one column a row: argmax where greedy, argmax of log-probability plus noise elsewhere.

    Shapes: scaled [rows, vocab] as `shape_logits` returns it; result [rows] int64.  With `columns` a row
    holds only some tokens; noise belongs to tokens, so the draw is the one that a full row with -inf
    everywhere else would give, and the result is an index into `columns.token_ids`.
    """
    _, best = largest(scaled)
    sampled = torch.nonzero(params.temperature > 0).squeeze(1)
    if len(sampled):
        best[sampled] = _gumbel_argmax(scaled[sampled], best[sampled], params.rows(sampled), purpose, columns)
    return best


def _gumbel_argmax(
    scaled: torch.Tensor, likeliest: torch.Tensor, params: RowParams, purpose: Purpose, columns: Columns | None
) -> torch.Tensor:
    rows, width = scaled.shape
    reached = scaled.gather(1, likeliest[:, None]).squeeze(1).double()
    if columns is None:
        if width % LANES:
            scaled = torch.nn.functional.pad(scaled, (0, LANES - width % LANES), value=-torch.inf)
        blocks = scaled.view(rows, -1, LANES)
        token = likeliest
    else:
        blocks = torch.nn.functional.pad(scaled, (0, 1), value=-torch.inf)[:, columns.places]
        token = columns.token_ids[likeliest]
    seen = gumbel(params.seeds, token // LANES, params.positions, purpose)
    reached += seen.gather(1, (token % LANES)[:, None]).squeeze(1)
    row, block = torch.nonzero(blocks.amax(-1) >= (reached - MAX_GUMBEL)[:, None], as_tuple=True)
    block_ids = block if columns is None else columns.block_ids[block]
    scores = blocks[row, block].double() + gumbel(params.seeds[row], block_ids, params.positions[row], purpose)
    top, lane = scores.max(-1)
    winner = torch.full((rows,), -torch.inf, dtype=torch.float64).scatter_reduce(0, row, top, "amax")
    wins = (top == winner[row]) & (top > -torch.inf)  # where nothing can win, the likeliest stays
    hit = torch.nonzero(wins).squeeze(1).flip(0)  # the lowest token id is written last
    chosen = likeliest.clone()
    chosen[row[hit]] = block[hit] * LANES + lane[hit] if columns is None else columns.places[block[hit], lane[hit]]
    return chosen
