"""The demonstration, stage by stage, in the order in which they run.

Each stage reads what it needs from the service, adds its figures to the result and leaves when
every request of it has ended and is recorded.  Called by `serving.demo.__main__`.
"""

from __future__ import annotations

import asyncio
import time
from dataclasses import replace
from typing import Any

from adapter.contracts import FLOOR_VERSION
from adapter.jobs import OPEN_STATES, Job
from serving.demo import exactness, measure
from serving.demo.progress import Progress
from serving.demo.prompts import Deck, advice, tables
from serving.demo.report import describe_draft
from serving.demo.service import Service, training_of
from serving.demo.session import CLIENTS, LOOK_EVERY_S, SETTLE_S, DemoFailed, Session
from serving.demo.traffic import Traffic

TRAINING_CLIENTS = 1  # the trainer shares the cores; requests keep running, fewer at a time
PLAIN_REQUESTS, BEFORE_REQUESTS, AFTER_REQUESTS, BACK_REQUESTS = 16, 50, 48, 24
EXACT_PROMPTS = 4  # greedy ones of each kind; half as many sampled ones
SEED = 20261122
START_S, DRIFT_S, COLLECT_S, PROMOTE_S, ROLL_BACK_S = 900.0, 900.0, 300.0, 60.0, 30.0


class Demo(Session):
    """The stages."""

    def __init__(self, service: Service, progress: Progress, result: dict[str, Any]) -> None:
        super().__init__(service, progress, result)
        self.first, self.second = Deck(advice(SEED)), Deck(tables(SEED))
        self._references: list[dict[str, Any]] = []
        self._exact_prompts: list[str] = []

    async def play(self) -> None:
        """Run every stage.

        Raises:
            DemoFailed: one of them did not end as it should.
        """
        try:
            await self.start()
            await self.check_exactness()
            await self.measure_without_speculation("no_speculation", self.first)
            await self.measure_before_shift()
            job = await self.shift_traffic()
            await self.train_and_swap(job)
            await self.measure_after_adaptation()
            await self.check_exactness_again()
            await self.roll_back()
            await self.measure_without_speculation("no_speculation_after", self.second)
        finally:
            await self._close()

    # -- the stages --------------------------------------------------------------------------

    async def start(self) -> None:
        """Start every process and wait until the API answers."""
        self.progress.begin("start", "starting API, engine, worker, watcher and Valkey")
        began = self._clock()
        self.service.start()
        await self._until(
            lambda: self.service.url and self.service.pair,
            START_S,
            lambda: "the engine loads its models",
            "the service did not start",
        )
        pair, url = self.service.pair, self.service.url
        assert pair is not None
        assert url is not None
        self._traffic = Traffic(url, self.service.settings.api.served_model_name or pair.target_name, clock=self._clock)
        self.replies = self._traffic.replies
        while (await self._snapshot()) is None:
            self._check_alive()
            if self._clock() - began > START_S:
                raise DemoFailed(f"the service did not start within {START_S:.0f} s")
            await asyncio.sleep(LOOK_EVERY_S)
        self.result.update(target=pair.target_name, draft=describe_draft(pair))
        self.progress.happened(f"serving {pair.target_name} in {self._clock() - began:.0f} s; {url}/v1")
        self.progress.note(f"dashboard: {self.service.dashboard_url}")

    async def check_exactness(self) -> None:
        """Compare greedy answers with transformers' own, and sampled ones with those of plain decoding."""
        pair, traffic = self.service.pair, self.traffic
        assert pair is not None
        self.progress.begin("exactness", "the same prompts with speculation and without")
        self._exact_prompts = [*self.first.take(EXACT_PROMPTS), *self.second.take(EXACT_PROMPTS)]
        sampled = exactness.sampled_asks([*self.first.take(EXACT_PROMPTS // 2), *self.second.take(EXACT_PROMPTS // 2)])
        plain = [replace(ask, speculate=False) for ask in sampled]
        greedy = await traffic.ask_all(exactness.greedy_asks(self._exact_prompts), CLIENTS)
        pairs = list(zip(await traffic.ask_all(sampled, CLIENTS), await traffic.ask_all(plain, CLIENTS), strict=True))
        self._refuse_failures()
        self.progress.waiting(f"transformers answers the same {len(greedy)} prompts in a process of its own")
        apart = [index for index, (fast, slow) in enumerate(pairs) if fast.text != slow.text]
        answers = await exactness.ask_reference(pair.target_path, self._exact_prompts, [sampled[i] for i in apart])
        self._references = answers["greedy"]
        tokenizer = exactness.load_tokenizer(pair.target_path)
        exactness.compare_greedy(self.exact, tokenizer, greedy, self._references)
        leads = dict(zip(apart, answers["sampled"], strict=True))
        exactness.compare_sampled(self.exact, tokenizer, pairs, leads)
        self._say_exactness("transformers' generate and plain decoding")

    async def measure_without_speculation(self, name: str, deck: Deck) -> None:
        """Measure the speed at which the target alone serves a kind of traffic."""
        about = f"{deck.family.about}, speculation off"
        replies = await self._phase(name, about, deck, PLAIN_REQUESTS, speculate=False)
        self._keep_speed(name, measure.throughput(replies))

    async def measure_before_shift(self) -> None:
        """Serve the first traffic with the base draft; the watcher learns what is normal."""
        since = self._boundary_s
        replies = await self._phase("before_shift", f"{self.first.family.about}, speculation on", self.first,
                                    BEFORE_REQUESTS)  # fmt: skip
        self._keep_speed("before_shift", measure.throughput(replies))
        self._keep_acceptance("before_shift", since, self._boundary_s, FLOOR_VERSION)

    async def shift_traffic(self) -> Job:
        """Change the traffic, and wait until the watcher calls it drift and asks for a training."""
        self.progress.begin("drift", f"traffic is {self.second.family.about} now; waiting until that is called drift")
        began = self._boundary_s
        self._mark("shift")
        async with self._load(self.second, CLIENTS):
            await self._until(lambda: self.service.drift().get("drifting") or self.service.job, DRIFT_S,
                              self._drift_words, "no drift was found")  # fmt: skip
            self._mark("drift")
            self.progress.happened(f"drift: {self._drift_words()}")
            self.progress.waiting("collecting requests to train on")
            await self._until(lambda: self.service.job, COLLECT_S, self.service.loop_sentence,
                              "drift was found but no training was asked for")  # fmt: skip
            job = self.service.job
            assert job is not None
        at_shift = [reply for reply in self.replies if began <= reply.started_s < job.created_at_s]
        self._keep_speed("at_shift", measure.throughput(at_shift, job.created_at_s))
        self._keep_acceptance("at_shift", began, job.created_at_s, FLOOR_VERSION)
        return job

    async def train_and_swap(self, job: Job) -> None:
        """Wait for training, gate, promotion and swap, while requests keep running."""
        self.progress.begin("training", "training a draft version on what was logged; requests keep running")
        async with self._load(self.second, TRAINING_CLIENTS):
            limit = 3 * self.service.settings.distill.max_seconds + 300
            await self._until(lambda: self.service.jobs.get(job.id).state not in OPEN_STATES, limit,
                              lambda: self._training_words(job.id), "the training did not end")  # fmt: skip
            done = self.service.jobs.get(job.id)
            self.result["training"] = training_of(done)
            if done.state != "done":
                raise DemoFailed(f"the training {done.state}: {done.error or 'no reason was given'}")
            verdict = str(done.result.get("verdict"))
            if done.result.get("state") != "ready":
                raise DemoFailed(f"the gate rejected the trained version: {verdict}")
            self.version = int(done.result["version"])
            self.progress.happened(f"trained and gated in {done.result['seconds']:.0f} s: {verdict}")
            self.progress.begin("swap", f"waiting for version {self.version} to be promoted and swapped in")
            await self._serving(self.version, PROMOTE_S)
        await self._until(lambda: self._swap_of(self.version), SETTLE_S, lambda: "the engine notes the swap",
                          "the engine did not note the swap")  # fmt: skip
        swap = self._swap_of(self.version) or {}
        self.result["marks"]["promotion"] = round(swap["at_s"] - self._began_s, 2)
        self.progress.happened(f"version {self.version} drafts now; the loop stood still for {swap['pause_ms']:.3f} ms")
        await self._settle()

    async def measure_after_adaptation(self) -> None:
        """Serve the second traffic with the new version."""
        since = self._boundary_s
        replies = await self._phase("after_adaptation", f"{self.second.family.about}, version {self.version}",
                                    self.second, AFTER_REQUESTS)  # fmt: skip
        if self.service.live != self.version:
            raise DemoFailed(f"version {self.version} was taken back: {self.service.loop_sentence()}")
        self._keep_speed("after_adaptation", measure.throughput(replies))
        self._keep_acceptance("after_adaptation", since, self._boundary_s, self.version)

    async def check_exactness_again(self) -> None:
        """Ask the greedy prompts again: another draft, the same text."""
        pair = self.service.pair
        assert pair is not None
        self.progress.begin("exactness", f"the same prompts once more, now drafted by version {self.version}")
        replies = await self.traffic.ask_all(exactness.greedy_asks(self._exact_prompts), CLIENTS)
        self._refuse_failures()
        exactness.compare_greedy(self.exact, exactness.load_tokenizer(pair.target_path), replies, self._references)
        self._say_exactness("transformers' generate, under both drafts")
        await self._settle()

    async def roll_back(self) -> None:
        """Undo the promotion as an operator would, under load, and measure once more."""
        self.progress.begin("roll back", "rolling back while requests run")
        async with self._load(self.second, CLIENTS) as begun:
            await begun.wait()
            began, called_s = time.monotonic(), self._clock()
            await asyncio.to_thread(self.service.registry.roll_back, actor="demo", reason="demonstration")
            await self._serving(FLOOR_VERSION, ROLL_BACK_S)
            self.result["rollback_s"] = round(time.monotonic() - began, 3)
            self._mark("rollback")
        self.progress.happened(
            f"the API reports version {FLOOR_VERSION} again {self.result['rollback_s']:.2f} s after the call"
        )
        await self._settle()
        swap = self._swap_of(FLOOR_VERSION)
        if swap is not None:  # the API hears of a swap with the engine's next heartbeat
            self.result["rollback_swap_s"] = round(swap["at_s"] - called_s, 3)
        since = self._boundary_s
        await self._phase("after_rollback", f"{self.second.family.about}, base draft again", self.second,
                          BACK_REQUESTS)  # fmt: skip
        self._keep_acceptance("after_rollback", since, self._boundary_s, FLOOR_VERSION)

    # -- words -------------------------------------------------------------------------------

    def _say_exactness(self, against: str) -> None:
        found = self.exact
        self.progress.happened(
            f"{found.differing_tokens} of {found.tokens} tokens differ from {against} ({found.prompts} answers, "
            f"{found.ties} ties)", good=not found.differing_tokens,
        )  # fmt: skip

    def _drift_words(self) -> str:
        seen = self.service.drift()
        if not seen.get("baseline"):
            return f"{seen.get('requests', 0)} requests of {seen.get('baseline_requests', '?')} for a baseline"
        mean = seen.get("recent_mean")
        now = "" if mean is None else f"acceptance {mean:.3f} against {seen['baseline']:.3f} before, "
        return f"{now}evidence 10^{seen['evidence']:.1f} of 10^{seen['needed']:.1f} after {seen['since']} requests"

    def _training_words(self, job_id: str) -> str:
        job = self.service.jobs.get(job_id)
        step, steps = job.progress.get("step"), job.progress.get("steps")
        if job.state == "queued" or step is None:
            return "the worker starts a trainer"
        best = job.progress.get("holdout_acceptance")
        reached = "" if best is None else f", acceptance {best:.3f} on held-out requests"
        return f"step {step} of at most {steps}{reached}; the gate comes after"
