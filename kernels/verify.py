"""Judge drafted tokens against the target: which are kept, and what the target says instead.

`gumbel`: draft and target perturb their laws with the same noise, so the target's token is a
function of (context, seed, position) alone and a drafted token is kept while it equals it.  Source:
arXiv 2408.07978.  `maximal`: the classical rule; keep x with probability min(1, p(x)/q(x)), draw
from the normalised positive part of p - q at the first rejection.  Source: arXiv 2211.17192,
Algorithm 1.  p is the target's law, q the draft's, both after temperature, top-k and top-p.
"""

from __future__ import annotations

import torch

from kernels.noise import Purpose, uniform
from kernels.sampling import RowParams, draw


def verify_gumbel(scaled: torch.Tensor, params: RowParams, drafts: list[list[int]]) -> list[tuple[int, int]]:
    """Return (num_accepted, next_token) of each request.

    Shapes: scaled [rows, vocab] with len(drafts[i]) + 1 consecutive rows for request i, the last
    one deciding the bonus token.
    """
    tokens = draw(scaled, params).tolist()
    results, start = [], 0
    for drafted in drafts:
        said = tokens[start : start + len(drafted) + 1]
        kept = 0
        while kept < len(drafted) and drafted[kept] == said[kept]:
            kept += 1
        results.append((kept, said[kept]))
        start += len(drafted) + 1
    return results


def verify_maximal(
    scaled: torch.Tensor, params: RowParams, drafts: list[list[int]], draft_scaled: list[torch.Tensor]
) -> list[tuple[int, int]]:
    """Return (num_accepted, next_token) of each request under the classical rule.

    Shapes: scaled as in `verify_gumbel`; draft_scaled[i] [len(drafts[i]), vocab] are the very
    logits, shaped, from which the tokens of drafts[i] were drawn.
    """
    results, start = [], 0
    for drafted, q_scaled in zip(drafts, draft_scaled, strict=True):
        stop = start + len(drafted) + 1
        index = torch.arange(start, stop)
        results.append(_verify_one(scaled[start:stop], params.rows(index), drafted, q_scaled))
        start = stop
    return results


def _verify_one(scaled: torch.Tensor, params: RowParams, drafted: list[int], q_scaled: torch.Tensor) -> tuple[int, int]:
    if float(params.temperature[0]) == 0:
        return verify_gumbel(scaled, params, [drafted])[0]
    last = len(drafted)
    if not drafted:
        return 0, int(draw(scaled, params)[0])
    p = torch.softmax(scaled[:last].double(), dim=-1)
    q = torch.softmax(q_scaled.double(), dim=-1)
    column = torch.tensor(drafted)[:, None]
    ratio = (p.gather(1, column) / q.gather(1, column)).squeeze(1)
    lucky = uniform(params.seeds[:last], params.positions[:last], Purpose.ACCEPT) < ratio
    kept = int(lucky.long().cumprod(0).sum())
    if kept == last:
        return kept, int(draw(scaled[last:], params.rows(torch.tensor([last])))[0])
    residual = (p[kept] - q[kept]).clamp_min(0)
    # p == q leaves nothing over; rounding alone can then reject, and any token of p is exact.
    law = residual if float(residual.sum()) > 0 else p[kept]
    return kept, int(draw(torch.log(law)[None].float(), params.rows(torch.tensor([kept])), Purpose.RECOVER)[0])
