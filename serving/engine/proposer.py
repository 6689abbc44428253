"""Draft tokens with a small model, for the whole batch at once.

The interface is `propose(requests, gammas)`; other ways to draft can stand behind it.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Any

import torch

from kernels.noise import Purpose
from kernels.sampling import draw, shape_logits
from serving.engine.parameters import row_params
from serving.engine.runner import ModelRunner, Work
from serving.engine.sequence import Sequence


@dataclass(slots=True)
class Proposal:
    """Drafted tokens of one request, with the log-prob of each under the draft at temperature 1.

    `scaled` [gamma, vocab] are the shaped logits each token was drawn from; kept only where the
    acceptance rule needs them.
    """

    tokens: list[int] = field(default_factory=list)
    logprobs: list[float] = field(default_factory=list)
    scaled: list[torch.Tensor] = field(default_factory=list)


class DraftProposer:
    """Propose with a draft model on its own KV pool.

    Args:
        keep_laws: keep the law each token was drawn from; the maximal coupling needs it.
        catch_up_tokens: most tokens of one request the draft reads in a round before it drafts; a longer
            backlog takes several rounds, which run without speculation.
        vocab: width of the target's logits; models of one tokenizer may pad theirs differently.
    """

    def __init__(self, runner: ModelRunner, *, keep_laws: bool, vocab: int, catch_up_tokens: int) -> None:
        self.runner = runner
        self._vocab = vocab
        self._catch_up_tokens = catch_up_tokens
        self._keep_laws = keep_laws
        self._purpose = Purpose.DRAFT if keep_laws else Purpose.SAMPLE
        self._poisoned = False

    def use(self, model: Any) -> None:
        """Draft with another model from now on; running requests keep their cache."""
        if self._poisoned:  # a masked NaN is still a NaN: left there it would spoil every later draft
            self.runner.pool.scrub()
            self._poisoned = False
        self.runner.use(model)

    @torch.inference_mode()
    def propose(self, requests: list[Sequence], gammas: list[int]) -> list[Proposal]:
        """Draft gammas[i] tokens for requests[i]; 0 costs nothing and leaves the draft's cache behind."""
        proposals = [Proposal() for _ in requests]
        active = [i for i, gamma in enumerate(gammas) if gamma > 0]
        behind = [i for i in active if len(requests[i].tokens) - requests[i].num_draft_kv > self._catch_up_tokens]
        active = [i for i in active if i not in behind]
        work = [self._catch_up(requests[i]) for i in active] + [self._catch_up(requests[i]) for i in behind]
        if behind and not active:
            self.runner.forward(work)
        while active:
            logits = self._fit(self.runner.forward(work))
            self._draw(logits, requests, proposals, active)
            active = [i for i in active if len(proposals[i].tokens) < gammas[i]]
            work = [
                Work(
                    requests[i].block_table,
                    len(requests[i].tokens) + len(proposals[i].tokens) - 1,
                    proposals[i].tokens[-1:],
                    1,
                )
                for i in active
            ]
        return proposals

    def _fit(self, logits: torch.Tensor) -> torch.Tensor:
        """Cut or pad to the target's width: a token the target does not have must never be proposed."""
        wide = logits[:, : self._vocab]
        return torch.nn.functional.pad(wide, (0, self._vocab - wide.shape[1]), value=-torch.inf)

    def _catch_up(self, request: Sequence) -> Work:
        start = request.num_draft_kv
        missing = request.tokens[start : start + self._catch_up_tokens]
        known = self.runner.model.config.vocab_size
        if known < self._vocab:  # an id the draft has no row for: it may read anything there, but must not fail
            missing = [min(token, known - 1) for token in missing]
        request.num_draft_kv = start + len(missing)
        return Work(request.block_table, start, missing, int(request.num_draft_kv == len(request.tokens)))

    def _draw(
        self, logits: torch.Tensor, requests: list[Sequence], proposals: list[Proposal], active: list[int]
    ) -> None:
        positions = [len(requests[i].tokens) + len(proposals[i].tokens) for i in active]
        params = row_params([requests[i].sampling for i in active], positions)
        scaled = shape_logits(logits, params)
        drawn = draw(scaled, params, self._purpose)
        logprobs = logits.gather(1, drawn[:, None]).squeeze(1) - torch.logsumexp(logits, dim=-1)
        self._poisoned = self._poisoned or not math.isfinite(float(logprobs.sum()))
        for row, (i, token, logprob) in enumerate(zip(active, drawn.tolist(), logprobs.tolist(), strict=True)):
            proposals[i].tokens.append(token)
            proposals[i].logprobs.append(logprob)
            if self._keep_laws:
                proposals[i].scaled.append(scaled[row])

    @staticmethod
    def commit(request: Sequence, before: int, num_drafted: int, num_accepted: int) -> None:
        """Say how much of the draft's cache is still true after a round.

        The draft has read every drafted token but the last, so after a full acceptance it lacks one
        more token than the target does; the next round's catch-up brings it.
        """
        if num_drafted:
            request.num_draft_kv = before + min(num_accepted, num_drafted - 1)
