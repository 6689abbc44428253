"""Draft tokens with a small model, for the whole batch at once, on its own KV pool."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch

from adapter.contracts import FLOOR_VERSION, Sampling
from adapter.logs import get_logger
from kernels.noise import Purpose
from kernels.sampling import draw, shape_logits
from serving.engine.parameters import row_params
from serving.engine.proposers.base import Offer, Proposal
from serving.engine.proposers.draft_loop import DraftLoop
from serving.engine.runner import ModelRunner
from serving.engine.sequence import Sequence
from serving.engine.work import Work

if TYPE_CHECKING:
    from serving.engine.draft_vocab import DraftVocab

log = get_logger(__name__)

_STEADY = 2  # tokens a request lacks after a round it drafted in, at most; reading them is no catching up
_GREEDY = Sampling(temperature=0.0)


class DraftProposer:
    """Propose with a draft model on its own KV pool.

    Args:
        keep_laws: keep the law each token was drawn from; the maximal coupling needs it.
        catch_up_tokens: most tokens of backlogs, over all requests, that are read in a round; the request that
            came first is read first, and rounds of those that are not read to their end run without speculation.
        vocab: width of the target's logits; models of one tokenizer may pad theirs differently.
        resident: finds the model of a draft version a request has to itself; None when it is gone.
        vocabulary: which tokens are scored; None scores all for good.
    """

    name = "draft"

    def __init__(
        self,
        runner: ModelRunner,
        *,
        keep_laws: bool,
        vocab: int,
        catch_up_tokens: int,
        resident: Callable[[int], Any | None] = lambda version: None,
        vocabulary: DraftVocab | None = None,
    ) -> None:
        self.runner = runner
        self.version = FLOOR_VERSION
        self.forwards: list[int] = []  # sizes, in tokens, of the forwards of the last `propose`
        self._positions = int(runner.model.config.max_position_embeddings)
        self._vocab = vocab
        self._catch_up_tokens = catch_up_tokens
        self._resident = resident
        self.vocabulary = vocabulary
        self._keep_laws = keep_laws
        self._purpose = Purpose.DRAFT if keep_laws else Purpose.SAMPLE
        self.num_not_finite = 0  # forwards that gave logits which are no numbers
        self._broken_versions: set[int] = set()
        self._poisoned: set[int] = set()  # blocks they may have left such numbers in
        self.loop: DraftLoop | None = None if keep_laws else DraftLoop(runner, vocab)  # None goes stage by stage

    def use(self, model: Any, version: int) -> None:
        """Draft with another model from now on; running requests keep their cache."""
        self.runner.use(model)
        self.version = version

    def follow(self) -> None:
        """Clean up after a broken draft, and take the vocabulary that is ready.  Called between two rounds."""
        if self._poisoned:  # a masked NaN is still a NaN: left there it would spoil every later draft
            self.runner.pool.scrub(sorted(self._poisoned))
            self._poisoned.clear()
        if self.vocabulary is not None and self.vocabulary.poll() is not None:
            self.runner.head = self.vocabulary.head

    def offer(self, request: Sequence, limit: int) -> Offer:
        """Offer what fits into the positions the draft knows; beyond them the request decodes plainly."""
        room = self._positions - len(request.tokens)
        backlog = len(request.tokens) - request.num_draft_kv
        return Offer(max(0, min(limit, room)), backlog_tokens=backlog, version=self.version_of(request))

    @torch.inference_mode()
    def propose(self, requests: list[Sequence], gammas: list[int]) -> list[Proposal]:
        """Draft gammas[i] tokens for requests[i]; 0 costs nothing and leaves the draft's cache behind."""
        self.forwards = []
        proposals = [Proposal() for _ in requests]
        groups: dict[int, tuple[Any, dict[int, int]]] = {}
        for i, num_read in self._reads(requests, gammas).items():
            version, model = self._drafter(requests[i])
            groups.setdefault(version, (model, {}))[1][i] = num_read
        for version, (model, reads) in groups.items():
            self._draft(model, version, reads, requests, gammas, proposals)
        return proposals

    def committed(self, request: Sequence, before: int, proposal: Proposal, num_accepted: int) -> None:
        """Note how much of the draft's cache is still true after a round.

        The draft has read every drafted token but the last, so after a full acceptance it lacks one
        more token than the target does; the next round's catch-up brings it.
        """
        if self.vocabulary is not None and request.learn:
            self.vocabulary.count(request.segment, request.tokens[before:])
        if proposal.tokens and proposal.proposer == self.name:
            read = before + min(num_accepted, len(proposal.tokens) - 1)
            request.num_draft_kv = min(read, len(request.tokens))  # a last round may have drafted beyond the end

    def ended(self, request: Sequence) -> None:
        """Keep nothing about requests."""

    def version_of(self, request: Sequence) -> int:
        """Return the version that would draft for a request now."""
        return self._drafter(request)[0]

    def _drafter(self, request: Sequence) -> tuple[int, Any]:
        """Return the version that drafts for a request now, and its model: its own while that is here, or live."""
        pinned = request.routed if request.version is None else request.version
        model = None if pinned is None or pinned == self.version else self._resident(pinned)
        return (self.version, self.runner.model) if pinned is None or model is None else (pinned, model)

    def _reads(self, requests: list[Sequence], gammas: list[int]) -> dict[int, int]:
        """Say how many missing tokens each request that is to draft reads now; who comes too late reads none."""
        left, reads = self._catch_up_tokens, {}
        for i in sorted((i for i, gamma in enumerate(gammas) if gamma > 0), key=lambda i: requests[i].arrived_s):
            missing = len(requests[i].tokens) - requests[i].num_draft_kv
            reads[i] = missing if missing <= _STEADY else min(missing, left)
            left -= reads[i] if missing > _STEADY else 0
        return {i: reads[i] for i in sorted(reads) if reads[i]}

    def _draft(
        self, model: Any, version: int, reads: dict[int, int], requests: list[Sequence], gammas: list[int],
        proposals: list[Proposal],
    ) -> None:  # fmt: skip
        """Read reads[i] missing tokens of requests[i], and draft for those that then lack none, all with one model."""
        work = {i: self._catch_up(requests[i], num_read) for i, num_read in reads.items()}
        active = [i for i in reads if requests[i].num_draft_kv == len(requests[i].tokens)]
        behind = [i for i in reads if i not in active]
        if self._draft_at_once(model, version, work, active, behind, requests, gammas, proposals):
            return
        logits = self._forward([work[i] for i in active + behind], model)
        self._check(torch.logsumexp(logits[len(active) :], dim=-1).tolist(), [requests[i] for i in behind], version)
        logits = logits[: len(active)]
        while active:
            done = self._draw(logits, requests, proposals, active, version)
            active = [i for i in active if i not in done and len(proposals[i].tokens) < gammas[i]]
            if active:
                logits = self._forward([self._next(requests[i], proposals[i]) for i in active], model)

    def _draft_at_once(
        self, model: Any, version: int, work: dict[int, Work], active: list[int], behind: list[int],
        requests: list[Sequence], gammas: list[int], proposals: list[Proposal],
    ) -> bool:  # fmt: skip
        """Do all of it in one call of compiled code; return whether that covers these requests."""
        if self.loop is None or any(requests[i].constraints is not None for i in active):
            return False
        order, depths = active + behind, [gammas[i] for i in active]
        samplings = [requests[i].sampling for i in active] + [_GREEDY] * len(behind)  # nothing is drawn for those
        drafted = self.loop.run([work[i] for i in order], depths + [0] * len(behind), samplings, model)
        if drafted is None:
            return False
        self._check([item.totals[0] for item in drafted[len(active) :]], [requests[i] for i in behind], version)
        self.forwards.append(sum(len(item.token_ids) for item in work.values()))
        for step in range(max(depths, default=0)):
            rows = [row for row, depth in enumerate(depths) if depth > step]
            self.forwards += [len(rows)] if step else []
            self._check([drafted[row].totals[step] for row in rows], [requests[active[row]] for row in rows], version)
        for i, item in zip(active, drafted, strict=False):
            proposals[i].tokens, proposals[i].logprobs = item.tokens, item.logprobs
            proposals[i].proposer, proposals[i].version = self.name, version
        return True

    @staticmethod
    def _next(request: Sequence, proposal: Proposal) -> Work:
        start = len(request.tokens) + len(proposal.tokens) - 1
        return Work(request.block_table, start, proposal.tokens[-1:], 1)

    def _check(self, totals: list[float], requests: list[Sequence], version: int) -> None:
        """Note whose rows are no numbers; what they wrote is cleaned up before the next round.

        Shapes: totals [requests], the logsumexp of their logits.
        """
        broken = [item for item, total in zip(requests, totals, strict=True) if not math.isfinite(total)]
        if broken:
            self.note_broken([block for item in broken for block in item.block_table], len(broken), version)

    def note_broken(self, blocks: list[int], requests: int, version: int) -> None:
        """Hear of rows of a draft that were no numbers; their blocks are cleaned up before the next round."""
        self._poisoned.update(blocks)
        self.num_not_finite += 1
        if version not in self._broken_versions:
            self._broken_versions.add(version)
            log.error("draft_not_finite", version=version, requests=requests)

    def _forward(self, work: list[Work], model: Any) -> torch.Tensor:
        self.forwards.append(sum(len(item.token_ids) for item in work))
        return self.runner.forward(work, model)

    def _fit(self, logits: torch.Tensor) -> torch.Tensor:
        """Cut or pad to the target's width: a token the target does not have must never be proposed."""
        wide = logits[:, : self._vocab]
        return torch.nn.functional.pad(wide, (0, self._vocab - wide.shape[1]), value=-torch.inf)

    def _catch_up(self, request: Sequence, num_read: int) -> Work:
        """Read missing tokens; the logits of the last one start the draft, or say at least that all is well."""
        start = request.num_draft_kv
        missing = request.tokens[start : start + num_read]
        known = self.runner.model.config.vocab_size
        if known < self._vocab:  # an id the draft has no row for: it may read anything there, but must not fail
            missing = [min(token, known - 1) for token in missing]
        request.num_draft_kv = start + len(missing)
        return Work(request.block_table, start, missing, 1)

    def _draw(
        self, logits: torch.Tensor, requests: list[Sequence], proposals: list[Proposal], active: list[int],
        version: int,
    ) -> set[int]:  # fmt: skip
        """Add a token to each active proposal; return those that ended, no token being allowed there.

        Log-probs are relative to what is scored: under a trimmed vocabulary they are the trimmed law's,
        which is the law the token was drawn from.
        """
        head = self.vocabulary.head if self.vocabulary is not None else None
        constrained = any(requests[i].constraints is not None for i in active)
        if head is None:
            logits = self._fit(logits)
        elif constrained:  # rules are written for full rows
            logits, head = head.widen(logits, self._vocab), None
        positions = [len(requests[i].tokens) + len(proposals[i].tokens) for i in active]
        params = row_params([requests[i].sampling for i in active], positions)
        scaled = shape_logits(self._constrained(logits, requests, proposals, active), params)
        columns = draw(scaled, params, self._purpose, None if head is None else head.columns)
        totals = torch.logsumexp(logits, dim=-1)
        self._check(totals.tolist(), [requests[i] for i in active], version)
        logprobs = logits.gather(1, columns[:, None]).squeeze(1) - totals
        void = [constrained and item == -math.inf for item in scaled.gather(1, columns[:, None]).squeeze(1).tolist()]
        if head is not None:
            columns = head.token_ids[columns]
            scaled = head.widen(scaled, self._vocab) if self._keep_laws else scaled
        for row, (i, token, logprob) in enumerate(zip(active, columns.tolist(), logprobs.tolist(), strict=True)):
            if void[row]:
                continue
            proposals[i].tokens.append(token)
            proposals[i].logprobs.append(logprob)
            proposals[i].proposer, proposals[i].version = self.name, version
            if self._keep_laws:
                proposals[i].scaled.append(scaled[row])
        return {i for i, gone in zip(active, void, strict=True) if gone}

    @staticmethod
    def _constrained(
        logits: torch.Tensor, requests: list[Sequence], proposals: list[Proposal], active: list[int]
    ) -> torch.Tensor:
        """Put the requests' own constraints on the draft too: what the target cannot say is not worth drafting."""
        rows = [row for row, i in enumerate(active) if requests[i].constraints is not None]
        if not rows:
            return logits
        shaped = logits.clone()
        for row in rows:
            constraints, drafted = requests[active[row]].constraints, proposals[active[row]].tokens
            if constraints is not None:
                constraints.apply(shaped[row : row + 1], drafted, first=len(drafted))
        return shaped
