"""Compute rounds on a device: begin a step, and take in what came of it when the next one is under way.

Requests that decode with the draft model or plainly run here.  Everything else, which needs the host between
two stages (constraints, text matches, log-probs for a client, another draft version than the live one), runs through
`HostRounds` in the same step.  The text is the same either way.
"""

from __future__ import annotations

import time
from collections.abc import Sequence as SequenceOf

import numpy as np

from adapter.logs import get_logger
from serving.engine.control.base import Choice
from serving.engine.device.flight import FlightOnDevice
from serving.engine.device.graphs import Inbox, Outbox
from serving.engine.device.models import DeviceModels
from serving.engine.device.program import CATCH_UP, Known
from serving.engine.device.programs import Programs, Sizes
from serving.engine.device.wire import (
    BEFORE_LAST,
    CAPACITY,
    FRESH,
    GAMMA,
    LAST,
    LENGTH,
    LIMIT,
    SLOT,
    TABLE,
    TOP_K,
    sampling_columns,
)
from serving.engine.host_rounds import HostRounds
from serving.engine.proposers.draft import DraftProposer
from serving.engine.rounds import Ask
from serving.engine.runner import ModelRunner
from serving.engine.scheduler import Plan
from serving.engine.sequence import Sequence
from serving.engine.work import Work

log = get_logger(__name__)


class DeviceRounds:
    """Rounds on one device.

    Args:
        host: runs what cannot run here, on the same caches.
        proposer: the draft model's, None where there is none.
        catch_up_tokens: most tokens of backlogs that draft models read in a step.
        synthetic: chance with which drafted tokens are accepted whatever the models say, for benchmarks of speed
            on models that say nothing; None asks the models.
    """

    def __init__(
        self, host: HostRounds, target: ModelRunner, proposer: DraftProposer | None, models: DeviceModels, sizes: Sizes,
        *, coupling: str, catch_up_tokens: int, synthetic: float | None = None,
    ) -> None:  # fmt: skip
        self.coupling = coupling
        self._host = host
        self._target = target
        self._proposer = proposer
        self.models = models
        self.sizes = sizes
        self._catch_up_tokens = catch_up_tokens
        self.waited_s = 0.0  # for steps to land
        positions = 0 if proposer is None else int(proposer.runner.model.config.max_position_embeddings)
        self._draft_limit = positions + 1  # as long as a full acceptance may make a request that the draft drafts for
        device = models.device
        self._device = device
        known = Known.empty(sizes.max_batch, device)
        self._outbox = Outbox((sizes.max_batch, TABLE + sizes.table_width), device)
        self._inbox = Inbox(device)
        self.programs = Programs(
            models, known, sizes, maximal=coupling == "maximal", synthetic=synthetic
        )  # fmt: skip
        self._slots: dict[str, int] = {}
        self._free = list(range(sizes.max_batch))[::-1]
        self._samplings: dict[str, np.ndarray] = {}
        self._begun: dict[str, int] = {}  # whose last round was begun here, and how much it drafted

    def under_way(self, request: Sequence) -> bool:
        """Whether this request's last round was begun here; one that the host ran needs the host to commit it."""
        return request.request_id in self._begun

    def may_run_ahead(self, request: Sequence, choice: Choice) -> bool:
        """Whether a next round can begin on what the device knows: nothing of it is for the host to do."""
        if not self.under_way(request) or not self._here(request, choice):
            return False
        rested = not self._begun[request.request_id]  # then the draft model lacks tokens which the host alone has
        return not (rested and choice.gamma)

    def launch(self, ask: Ask, ahead: frozenset[str] = frozenset()) -> FlightOnDevice:
        """Begin a step; prompts, and what only the host can run, are done when this returns."""
        choices = dict(zip((id(item) for item in ask.ready), ask.choices, strict=True))
        here = [plan for plan in ask.plans if plan.ready and self._here(plan.sequence, choices[id(plan.sequence)])]
        mine = {id(plan.sequence) for plan in here}
        flight = FlightOnDevice(ask, self._device, self._note_wait)
        self._begun = {}
        rest = [plan for plan in ask.plans if id(plan.sequence) not in mine]
        if rest:  # first: it waits for the device, and would wait for the others' rounds, too
            others = [choices[id(plan.sequence)] for plan in rest if plan.ready]
            flight.elsewhere = self._host.launch(Ask(rest, others, ask.shape, ask.top_k)).land()
        self._read_prompts([plan for plan in here if plan.num_new > 1])
        if here:
            wanted = [choices[id(plan.sequence)] for plan in here]
            self._begin(flight, [plan.sequence for plan in here], wanted, ahead, ask.top_k)
        return flight

    def warm(self, top_k: int, batches: SequenceOf[int] = ()) -> None:
        """Make the programs of these batch sizes, or of all, before anybody waits for them."""
        begin = time.perf_counter()
        self.models.follow()
        self.programs.warm(top_k, batches)
        log.info("graphs_captured", programs=len(self.programs), seconds=round(time.perf_counter() - begin, 1))

    def ended(self, request: Sequence) -> None:
        """Forget a request; its slot is written anew before anybody reads it again."""
        slot = self._slots.pop(request.request_id, None)
        self._samplings.pop(request.request_id, None)
        if slot is not None:
            self._free.append(slot)

    def _note_wait(self, seconds: float) -> None:
        self.waited_s += seconds

    # -- what can run here -------------------------------------------------------------------

    def _here(self, request: Sequence, choice: Choice) -> bool:
        return (
            choice.proposer in (None, DraftProposer.name)
            and request.constraints is None
            and request.logprobs is None
            and request.version is None
            and request.routed is None
            and len(request.tokens) >= CATCH_UP
        )

    def _read_prompts(self, plans: list[Plan]) -> None:
        """Bring the target's cache up to the last token, which the round itself reads."""
        if not plans:
            return
        work = []
        for plan in plans:
            request, start = plan.sequence, plan.sequence.num_target_kv
            end = start + plan.num_new - 1
            work.append(Work(request.block_table, start, request.tokens[start:end], 0))
            request.num_target_kv = end
        self._target.run(work)

    # -- a step ------------------------------------------------------------------------------

    def _begin(
        self, flight: FlightOnDevice, requests: list[Sequence], choices: list[Choice], ahead: frozenset[str], top_k: int
    ) -> None:
        """Send the batch's input and begin both halves of its round."""
        self.models.follow()
        gammas = [choice.gamma for choice in choices]
        if self._proposer is not None:
            reads, gammas = self._catch_up(requests, gammas, ahead)
            flight.draft_forwards.extend(reads)
        longest = max(gammas)
        flight.proposer = self._proposer
        captured = self.programs.get(len(requests), longest, top_k)
        draft = captured.draft(self.models.head_place, self.models.heads) if longest else None
        self._write(requests, gammas, ahead, len(captured.program.input))
        flight.begun.set()
        self._outbox.send(captured.program.input)
        flight.version = self._proposer.version if self._proposer is not None else None
        if draft is not None:
            draft()
            live = len(requests)
            flight.draft_forwards.extend([CATCH_UP * live] + [live] * (captured.program.sent.gamma - 1))
        flight.drafted.set()
        captured.verify()
        flight.verified.set()
        flight.requests, flight.sent = requests, captured.program.sent
        flight.tables = [list(request.block_table) for request in requests]
        flight.fetch = self._inbox.fetch(captured.program.output)
        self._begun = {item.request_id: gamma for item, gamma in zip(requests, gammas, strict=True)}

    def _catch_up(
        self, requests: list[Sequence], gammas: list[int], ahead: frozenset[str]
    ) -> tuple[list[int], list[int]]:
        """Let the draft model read what it lacks; who cannot be read to the end in this step does not draft.

        Returns the sizes, in tokens, of the forwards this took, and the draft lengths that are left.
        """
        left, work, gammas = self._catch_up_tokens, [], list(gammas)
        for i in sorted(range(len(requests)), key=lambda i: requests[i].arrived_s):
            request = requests[i]
            missing = len(request.tokens) - CATCH_UP - request.num_draft_kv
            if not gammas[i] or request.request_id in ahead or missing <= 0:
                continue
            count = min(missing, left)
            left -= count
            if count:
                work.append(self.models.backlog(request, count))
            if count < missing:
                gammas[i] = 0
        if not work:
            return [], gammas
        self.models.read_with_draft(work)
        return [sum(len(item.token_ids) for item in work)], gammas

    def _write(self, requests: list[Sequence], gammas: list[int], ahead: frozenset[str], size: int) -> None:
        """Write the input of a step: what the host knows of every request, and rows that pad the batch."""
        out = self._outbox.next()
        out[:size, :] = 0
        out[len(requests) : size, FRESH] = 1
        out[len(requests) : size, LENGTH] = CATCH_UP
        out[len(requests) : size, SLOT] = self.sizes.max_batch
        for row, request, gamma in zip(out, requests, gammas, strict=False):
            tokens, table = request.tokens, request.block_table
            row[FRESH] = request.request_id not in ahead
            row[LENGTH] = len(tokens)
            row[BEFORE_LAST], row[LAST] = tokens[-2], tokens[-1]
            row[CAPACITY] = len(table) * self.sizes.block_tokens
            row[LIMIT] = min(request.prompt_tokens + request.max_tokens, self._draft_limit)
            row[GAMMA] = gamma
            row[SLOT] = self._slot(request, requests)
            row[TOP_K:TABLE] = self._sampling(request)
            row[TABLE : TABLE + len(table)] = table

    def _slot(self, request: Sequence, requests: list[Sequence]) -> int:
        """Return where the device keeps what it knows of a request; who does not run now may have to give way."""
        if request.request_id not in self._slots:
            if not self._free:
                running = {item.request_id for item in requests}
                for name in [name for name in self._slots if name not in running]:
                    self._free.append(self._slots.pop(name))
            self._slots[request.request_id] = self._free.pop()
        return self._slots[request.request_id]

    def _sampling(self, request: Sequence) -> np.ndarray:
        if request.request_id not in self._samplings:
            self._samplings[request.request_id] = sampling_columns(request.sampling)
        return self._samplings[request.request_id]
