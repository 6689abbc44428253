"""Turn logits into a law (temperature, top-k, top-p) and draw from it with keyed noise.

Drawing is argmax(log p + Gumbel noise).  A token can win only if its log-probability is within
`MAX_GUMBEL` of the best score found so far, so noise is computed for those blocks only.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from kernels.noise import LANES, MAX_GUMBEL, Purpose, gumbel
from kernels.reference import exact_topk

_NUCLEUS = 512  # a nucleus larger than this falls back to sorting the row


@dataclass(frozen=True, slots=True)
class RowParams:
    """How each row of logits is sampled.

    Shapes: all [rows]; temperature, top_p float32; top_k, seeds, positions int64.
    temperature 0 is greedy, top_k 0 and top_p 1 are off.  `positions` is the absolute index of the
    token the row decides.
    """

    temperature: torch.Tensor
    top_p: torch.Tensor
    top_k: torch.Tensor
    seeds: torch.Tensor
    positions: torch.Tensor

    def rows(self, index: torch.Tensor) -> RowParams:
        """Return the parameters of some rows."""
        return RowParams(
            self.temperature[index], self.top_p[index], self.top_k[index], self.seeds[index], self.positions[index]
        )


def shape_logits(logits: torch.Tensor, params: RowParams) -> torch.Tensor:
    """Divide by the temperature and cut to top-k, then to the nucleus of what is left.

    Greedy rows come back unchanged.  Ties at the top-k border are all kept.
    Shapes: logits [rows, vocab] float32, not changed; result [rows, vocab], -inf where cut.
    """
    safe = torch.where(params.temperature > 0, params.temperature, torch.ones_like(params.temperature))
    scaled = logits / safe[:, None]
    sampled = params.temperature > 0
    for k in sorted({int(item) for item in params.top_k[sampled & (params.top_k > 0)]}):
        rows = torch.nonzero(sampled & (params.top_k == k)).squeeze(1)
        if k < scaled.shape[1]:
            border = exact_topk(scaled[rows], k)[0][:, -1:]
            scaled[rows] = scaled[rows].masked_fill(scaled[rows] < border, -torch.inf)
    rows = torch.nonzero(sampled & (params.top_p < 1)).squeeze(1)
    if len(rows):
        scaled[rows] = _cut_nucleus(scaled[rows], params.top_p[rows])
    return scaled


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


def draw(scaled: torch.Tensor, params: RowParams, purpose: Purpose = Purpose.SAMPLE) -> torch.Tensor:
    """Draw one token a row: argmax where greedy, argmax of log-probability plus noise elsewhere.

    Shapes: scaled [rows, vocab] as `shape_logits` returns it; result [rows] int64.
    """
    best = scaled.argmax(-1)
    sampled = torch.nonzero(params.temperature > 0).squeeze(1)
    if len(sampled):
        best[sampled] = _gumbel_argmax(scaled[sampled], best[sampled], params.rows(sampled), purpose)
    return best


def _gumbel_argmax(scaled: torch.Tensor, likeliest: torch.Tensor, params: RowParams, purpose: Purpose) -> torch.Tensor:
    rows, vocab = scaled.shape
    if vocab % LANES:
        scaled = torch.nn.functional.pad(scaled, (0, LANES - vocab % LANES), value=-torch.inf)
    blocks = scaled.view(rows, -1, LANES)
    seen = gumbel(params.seeds, likeliest // LANES, params.positions, purpose)
    noise = seen.gather(1, (likeliest % LANES)[:, None]).squeeze(1)
    reached = scaled.gather(1, likeliest[:, None]).squeeze(1).double() + noise
    row, block = torch.nonzero(blocks.amax(-1) >= (reached - MAX_GUMBEL)[:, None], as_tuple=True)
    scores = blocks[row, block].double() + gumbel(params.seeds[row], block, params.positions[row], purpose)
    top, lane = scores.max(-1)
    winner = torch.full((rows,), -torch.inf, dtype=torch.float64).scatter_reduce(0, row, top, "amax")
    hit = torch.nonzero(top == winner[row]).squeeze(1).flip(0)  # the lowest token id is written last
    chosen = likeliest.clone()
    chosen[row[hit]] = block[hit] * LANES + lane[hit]
    return chosen
