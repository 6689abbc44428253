"""Run a controller against a machine made of numbers: forwards cost what a table says, drafts are kept by a coin.

No model, no clock.  What a step brings is counted as its expectation given the choices, so that luck
with the coins is not taken for a good choice; the controller sees only the coins.
"""

from __future__ import annotations

import math
import random
from collections.abc import Callable
from dataclasses import dataclass, field

import numpy as np

from adapter.contracts import Sampling
from serving.engine.control.adaptive import AdaptiveController, adaptive
from serving.engine.control.base import Choice, RoundReport, StepReport, StepShape
from serving.engine.control.cost_model import CostModel
from serving.engine.control.cost_table import CostTable, Curve
from serving.engine.proposers.base import Offer
from serving.engine.sequence import Sequence

GAMMA_MAX = 8
ROWS = [1, 2, 3, 4, 6, 8, 12, 16, 24, 32, 48, 64, 96, 128, 192, 256, 384, 576]


def gpu_table() -> CostTable:
    """An 8B target on an H100 with a small draft, from the constants SpecDecode-Bench fitted to vLLM."""
    target = Curve(ROWS, [5.886e-3 + 21.0e-6 * rows for rows in ROWS], 39.3e-9)
    return CostTable("gpu", target, Curve(ROWS, [0.71e-3 + 2e-6 * rows for rows in ROWS], 0.0), 2e-6, 0.0, 0.0)


def cpu_table() -> CostTable:
    """A 135M target on two cores with a four-layer draft: verifying is nearly free at first, drafting never is."""
    seconds = np.interp(ROWS, [1, 2, 6, 8, 16, 32, 576], [0.041, 0.043, 0.045, 0.049, 0.061, 0.085, 1.00])
    draft = [0.0075 + 0.0006 * rows for rows in ROWS]
    return CostTable(
        "cpu", Curve(ROWS, [float(item) for item in seconds], 2e-6), Curve(ROWS, draft, 1e-6), 1e-4, 0.0, 0.0
    )


OVERHEAD_S = {"gpu": 1.207e-3, "cpu": 3e-3}


def scaled(table: CostTable, target: float, draft: float) -> CostTable:
    """The same table with every target and draft time multiplied."""
    curves = [(table.target, target), (table.draft, draft)]
    new = [Curve(c.rows, [item * by for item in c.seconds], c.context_s * by) if c else None for c, by in curves]
    assert new[0] is not None
    return CostTable(table.fingerprint, new[0], new[1], table.read_s * draft, 0.0, 0.0)


def controller(table: CostTable, *, seed: int = 0, **settings: float) -> AdaptiveController:
    """An adaptive controller as the engine builds it; windows off unless asked for."""
    shares = {"switchback_share": 0.0, "explore_share": 0.01, "hysteresis": 0.03} | settings
    return adaptive(CostModel(table), gamma_max=GAMMA_MAX, seed=seed, **shares)


def request(name: str, prompt_tokens: int = 100, max_tokens: int = 10**6, gamma: int | None = None) -> Sequence:
    """A request that both models have read."""
    made = Sequence(
        request_id=name, tokens=[0] * prompt_tokens, prompt_tokens=prompt_tokens, max_tokens=max_tokens,
        sampling=Sampling(), end_tokens=frozenset(), segment="test", gamma=gamma, arrived_s=0.0,
    )  # fmt: skip
    made.num_draft_kv = prompt_tokens - 1
    return made


@dataclass
class Machine:
    """Steps of a batch whose costs and acceptances are known.

    `alpha` maps a step to the acceptance of every drafted token; `penalty_s` is time a drafting step
    takes that no part of it shows; `match` maps a request and a step to an offer of text matches.
    """

    truth: CostTable
    chooser: AdaptiveController | int  # or a fixed length
    alpha: Callable[[int], float]
    seed: int = 0
    noise: float = 0.02
    penalty_s: float = 0.0
    context_tokens: int = 500
    prefill_tokens: int = 0  # of others' prompts, read beside every step
    version: int = 1
    match: Callable[[str, int], tuple[Offer, float] | None] = lambda name, step: None
    ahead: bool = False  # the controller hears of a step only when it has chosen for the next one, as on a device
    requests: list[Sequence] = field(default_factory=list)
    gammas: list[list[int]] = field(default_factory=list)  # by step
    expected: list[float] = field(default_factory=list)  # tokens by step
    seconds: list[float] = field(default_factory=list)
    steps: int = 0

    def __post_init__(self) -> None:
        self._random = random.Random(self.seed)
        self._true = CostModel(self.truth)
        self._unheard: StepReport | None = None

    def batch(self, size: int, **more: int) -> Machine:
        """Change the batch; those that leave, leave for good."""
        while len(self.requests) > size:
            gone = self.requests.pop()
            if isinstance(self.chooser, AdaptiveController):
                self.chooser.forget(gone)
        while len(self.requests) < size:
            self.requests.append(request(f"r{self.steps}-{len(self.requests)}", **more))
        return self

    def run(self, steps: int) -> Machine:
        """Run steps."""
        for _ in range(steps):
            self._step()
        return self

    def rate(self, first: int = 0, last: int | None = None) -> float:
        """Expected tokens per second over steps [first, last)."""
        return sum(self.expected[first:last]) / sum(self.seconds[first:last])

    def _offers(self) -> list[dict[str, Offer]]:
        offers = []
        for item in self.requests:
            limit = item.gamma_limit(GAMMA_MAX)
            backlog = len(item.tokens) - item.num_draft_kv
            one = {"draft": Offer(limit, backlog_tokens=backlog, version=self.version)} if limit else {}
            found = self.match(item.request_id, self.steps)
            if found is not None and limit:
                one["ngram"] = found[0]
            offers.append(one)
        return offers

    def _choices(self, offers: list[dict[str, Offer]], shape: StepShape) -> list[Choice]:
        if isinstance(self.chooser, AdaptiveController):
            return self.chooser.choose(self.requests, offers, shape)
        return [Choice("draft", min(self.chooser, offer["draft"].num_tokens)) for offer in offers]

    def _step(self) -> None:
        batch = len(self.requests)
        shape = StepShape(self.prefill_tokens, self.context_tokens * batch, self.version)
        offers = self._offers()
        choices = self._choices(offers, shape)
        self._tell(self._unheard)
        rounds, expected = [], 0.0
        for item, choice in zip(self.requests, choices, strict=True):
            found = self.match(item.request_id, self.steps)
            alpha = found[1] if choice.proposer == "ngram" and found else self.alpha(self.steps)
            expected += sum(alpha**j for j in range(choice.gamma + 1))
            accepted = 0
            while accepted < choice.gamma and self._random.random() < alpha:
                accepted += 1
            proposer = choice.proposer if choice.gamma else None
            rounds.append(RoundReport(item, proposer, choice.gamma, accepted, accepted + 1, choice.tag))
        forwards = self._forwards(choices)
        propose_s, target_s = self._cost(forwards, batch, choices, shape)
        drafting = any(choice.gamma for choice in choices)
        step_s = propose_s + target_s + OVERHEAD_S[self.truth.fingerprint] + self.penalty_s * drafting
        rows = batch + self.prefill_tokens + sum(choice.gamma for choice in choices)
        report = StepReport(shape, rounds, rows, forwards, propose_s, target_s, step_s)
        for item, round_ in zip(self.requests, rounds, strict=True):
            before = len(item.tokens)
            item.tokens.extend([0] * (round_.num_accepted + 1))
            if round_.num_drafted and round_.proposer == "draft":
                item.num_draft_kv = before + min(round_.num_accepted, round_.num_drafted - 1)
        self._unheard = report if self.ahead else None
        self._tell(None if self.ahead else report)
        self.gammas.append([choice.gamma for choice in choices])
        self.expected.append(expected)
        self.seconds.append(step_s)
        self.steps += 1

    def _tell(self, report: StepReport | None) -> None:
        if report is not None and isinstance(self.chooser, AdaptiveController):
            self.chooser.observe(report)

    def _forwards(self, choices: list[Choice]) -> tuple[int, ...]:
        drafting = [(r, c.gamma) for r, c in zip(self.requests, choices, strict=True) if c.proposer == "draft"]
        drafting = [(item, gamma) for item, gamma in drafting if gamma]
        if not drafting:
            return ()
        first = sum(len(item.tokens) - item.num_draft_kv for item, _ in drafting)
        deepest = max(gamma for _, gamma in drafting)
        return (first, *(sum(gamma > depth for _, gamma in drafting) for depth in range(1, deepest)))

    def _cost(
        self, forwards: tuple[int, ...], batch: int, choices: list[Choice], shape: StepShape
    ) -> tuple[float, float]:
        share = sum(choice.proposer == "draft" and choice.gamma > 0 for choice in choices) / batch
        rows = batch + shape.prefill_tokens + sum(choice.gamma for choice in choices)
        drafting = round(share * batch)
        each = shape.context_tokens / batch
        draft = sum(
            self._true.draft_s(min(number, drafting), max(0, number - drafting), min(number, drafting) * each)
            for number in forwards
        )
        target = self._true.target_s(rows, shape.context_tokens)
        return draft * self._shake(), target * self._shake()

    def _shake(self) -> float:
        return math.exp(self._random.gauss(0.0, self.noise))


def fixed_rate(table: CostTable, gamma: int, batch: int, alpha: float, context_tokens: int = 500) -> float:
    """Tokens per second, exactly, of always drafting `gamma` tokens for everybody."""
    costs, context = CostModel(table), context_tokens * batch
    tokens = batch * sum(alpha**j for j in range(gamma + 1))
    verify = costs.target_s(batch * (gamma + 1), context)
    draft = gamma * costs.draft_s(batch, 0, context)
    draft += costs.read_s(1) * batch * alpha**gamma if gamma else 0.0  # a draft kept whole leaves one more to read
    return tokens / (verify + draft + OVERHEAD_S[table.fingerprint])


def best_rate(table: CostTable, batch: int, alpha: float) -> float:
    """The best of all fixed lengths, none included."""
    return max(fixed_rate(table, gamma, batch, alpha) for gamma in range(GAMMA_MAX + 1))
