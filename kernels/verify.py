"""Judge drafted tokens against the target: which are kept, and what the target says instead.

`gumbel`: draft and target perturb their laws with the same noise, so the target's token is a
function of (context, seed, position) alone and a drafted token is kept while it equals it.  Source:
arXiv 2408.07978.  `maximal`: the classical rule; keep x with probability min(1, p(x)/q(x)), draw
from the normalised positive part of p - q at the first rejection.  Source: arXiv 2211.17192,
Algorithm 1.  p is the target's law, q the draft's, both after temperature, top-k and top-p.
"""

from __future__ import annotations

from itertools import accumulate

import torch

from kernels.noise import Purpose, uniform
from kernels.sampling import RowParams, draw


def verify_greedy(said: list[int], drafts: list[list[int]]) -> list[tuple[int, int]]:
    """Return (num_accepted, next_token) of each request, where a drafted token is kept while it is what was said.

    Shapes: `said` has len(drafts[i]) + 1 consecutive tokens for request i, the last one the bonus token.
    """
    results, start = [], 0
    for drafted in drafts:
        kept = 0
        while kept < len(drafted) and drafted[kept] == said[start + kept]:
            kept += 1
        results.append((kept, said[start + kept]))
        start += len(drafted) + 1
    return results


def verify_gumbel(scaled: torch.Tensor, params: RowParams, drafts: list[list[int]]) -> list[tuple[int, int]]:
    """Return (num_accepted, next_token) of each request.

    Shapes: scaled [rows, vocab] with len(drafts[i]) + 1 consecutive rows for request i, the last
    one deciding the bonus token.
    """
    return verify_greedy(draw(scaled, params).tolist(), drafts)


def verify_maximal(
    scaled: torch.Tensor, params: RowParams, drafts: list[list[int]], draft_scaled: list[torch.Tensor]
) -> list[tuple[int, int]]:
    """Return (num_accepted, next_token) of each request under the classical rule.

    Shapes: scaled as in `verify_gumbel`; draft_scaled[i] [len(drafts[i]), vocab] are the very
    logits, shaped, from which the tokens of drafts[i] were drawn.
    """
    said = draw(scaled, params).tolist()
    ends = list(accumulate(len(drafted) + 1 for drafted in drafts))
    starts = [end - len(drafted) - 1 for end, drafted in zip(ends, drafts, strict=True)]
    judged = torch.tensor([row for start, end in zip(starts, ends, strict=True) for row in range(start, end - 1)])
    if not len(judged):
        return [(0, said[start]) for start in starts]
    p = torch.softmax(scaled[judged].double(), dim=-1)
    q = torch.softmax(torch.cat(draft_scaled).double(), dim=-1)
    lucky = _kept(p, q, params.rows(judged), drafts, [said[row] for row in judged.tolist()])
    results: list[tuple[int, int]] = []
    recover: list[tuple[int, int, int]] = []  # request, row of p, row of scaled
    first = 0
    for start, drafted in zip(starts, drafts, strict=True):
        flags = lucky[first : first + len(drafted)]
        kept = flags.index(False) if False in flags else len(drafted)
        if kept < len(drafted):
            recover.append((len(results), first + kept, start + kept))
        results.append((kept, said[start + kept]))
        first += len(drafted)
    if recover:
        _recover(results, recover, p, q, params)
    return results


def _kept(p: torch.Tensor, q: torch.Tensor, params: RowParams, drafts: list[list[int]], said: list[int]) -> list[bool]:
    """Say of each drafted token whether it passes, looked at alone."""
    tokens = torch.tensor([token for drafted in drafts for token in drafted])
    ratio = (p.gather(1, tokens[:, None]) / q.gather(1, tokens[:, None])).squeeze(1)
    lucky = uniform(params.seeds, params.positions, Purpose.ACCEPT) < ratio
    return torch.where(params.temperature > 0, lucky, tokens == torch.tensor(said)).tolist()


def _recover(
    results: list[tuple[int, int]], recover: list[tuple[int, int, int]], p: torch.Tensor, q: torch.Tensor,
    params: RowParams,
) -> None:  # fmt: skip
    """Replace the tokens at first rejections by draws from the residual; greedy ones stay."""
    of_p, of_scaled = torch.tensor([item[1] for item in recover]), torch.tensor([item[2] for item in recover])
    residual = (p[of_p] - q[of_p]).clamp_min(0)
    # p == q leaves nothing over; rounding alone can then reject, and any token of p is exact.
    law = torch.where(residual.sum(-1, keepdim=True) > 0, residual, p[of_p])
    rows = params.rows(of_scaled)
    drawn = draw(torch.log(law).float(), rows, Purpose.RECOVER).tolist()
    for (request, _, _), token, temperature in zip(recover, drawn, rows.temperature.tolist(), strict=True):
        if temperature > 0:
            results[request] = (results[request][0], token)
