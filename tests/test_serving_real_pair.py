"""The default pair by real processes: greedy text is transformers' own, sampled text that of plain decoding.

Texts come over HTTP and are compared as tokens.  Where one differs, the target itself says by how much
its choice led there: under 10⁻³ it is a tie, which is counted apart and reported.
"""

from __future__ import annotations

import asyncio
import json
import random
import time
import warnings
from collections import defaultdict
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import openai
import pytest
import torch
from conftest import poll_until
from deployment import ROOT, Deployment, client_of
from processes import short_folder
from tiny_pair import random_factors, store_artifact
from transformers import AutoModelForCausalLM, AutoTokenizer

from adapter.database import open_database
from adapter.facts import SWAPS, Facts
from adapter.pairs import pair_from_facts
from adapter.registry import Registry
from serving.demo import reference
from serving.demo.exactness import Exactness, compare_greedy, differing_tokens, first_lead, load_tokenizer
from serving.demo.traffic import Ask, Reply, Traffic

pytestmark = pytest.mark.slow

MODEL = "smollm2-135m-instruct"
COLLECTION = ROOT.parent / "shared" / "data" / "spec_bench" / "prompts.jsonl"
TOKENS = 40
PROMPTS = 24
OWN = (
    "Why is the sky blue?", "Write a haiku about rivers.", "List three uses of a paper clip.", "What is 17 times 6?",
    "Explain recursion to a child.", "Translate 'good morning' into French.", "Name the planets in order.",
    "Give me a recipe for pancakes.", "Write a Python function that reverses a string.", "Who wrote Hamlet?",
    "Summarise the water cycle in two sentences.", "Tell me a joke about computers.",
)  # fmt: skip
WAYS = ((0.3, 1.0, 0), (0.7, 0.9, 0), (1.0, 1.0, 0), (1.0, 1.0, 20), (1.3, 0.95, 50), (0.7, 0.8, 5))


@dataclass(frozen=True, slots=True, kw_only=True)
class Drafted(Ask):
    """A request that says how many tokens a round drafts, and how many candidates sampling keeps."""

    gamma: int = 3
    top_k: int = 0

    def body(self, model: str) -> dict[str, Any]:
        body = Ask.body(self, model)
        speculative = {"enabled": True, "gamma": self.gamma} if self.speculate else {"enabled": False}
        return body | {"top_k": self.top_k, "speculative": speculative}


def collected_prompts() -> list[str]:
    """The shortest prompts of every kind in the collection where it lies beside the checkout, else our own."""
    if not COLLECTION.exists():
        return list(OWN)
    by_kind: dict[str, list[str]] = defaultdict(list)
    for line in COLLECTION.read_text().splitlines():
        row = json.loads(line)
        by_kind[row["segment"]].append(row["prompt"])
    share = -(-PROMPTS // len(by_kind))
    chosen = [prompt for kind in sorted(by_kind) for prompt in sorted(by_kind[kind], key=len)[:share]]
    random.Random(0).shuffle(chosen)
    return chosen[:PROMPTS]


@pytest.fixture(scope="module")
def served() -> Iterator[Deployment]:
    """`draftsmith serve` with the default target and its shipped draft, in float32."""
    with short_folder() as folder:
        made = Deployment(
            folder / "data", ["--dtype", "float32"], {"engine": {"threads": 2, "swap_poll_s": 0.05}}, command="serve"
        )
        try:
            made.start()
            yield made
        finally:
            made.close()


@dataclass
class Target:
    """The target by itself, in this process."""

    model: Any
    tokenizer: Any
    path: str

    def greedy(self, prompt: str) -> dict[str, Any]:
        with torch.inference_mode():
            return reference.greedy(self.model, self.tokenizer, prompt, TOKENS)


@pytest.fixture(scope="module")
def target(served: Deployment) -> Iterator[Target]:
    path, threads = served.status()["target_path"], torch.get_num_threads()
    torch.set_num_threads(2)
    model = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32).eval()
    yield Target(model, AutoTokenizer.from_pretrained(path), path)
    torch.set_num_threads(threads)


async def ask_all(url: str, asks: list[Drafted], concurrency: int) -> list[Reply]:
    traffic = Traffic(url, MODEL)
    try:
        return await traffic.ask_all(asks, concurrency)
    finally:
        await traffic.close()


def asked(url: str, asks: list[Drafted], concurrency: int) -> list[Reply]:
    """Send requests; each must be answered in full."""
    replies = asyncio.run(ask_all(url, asks, concurrency))
    assert [reply.error for reply in replies if reply.failed] == []
    assert [reply for reply in replies if reply.truncated] == []
    return replies


def assert_exact(totals: Exactness, what: str) -> None:
    """No token may differ except behind a tie; ties are reported."""
    if totals.ties:
        warnings.warn(f"{what}: {totals.ties} of {totals.prompts} answers part at a tie", UserWarning, stacklevel=2)
    assert totals.differing_tokens == 0, totals
    assert totals.ties <= totals.prompts // 8, totals


def swap_in_random_weights(served: Deployment) -> int:
    """Publish and promote a draft of random weights; return its version."""
    database = open_database(f"sqlite:///{served.data / 'draftsmith.db'}")
    pair, registry = pair_from_facts(Facts(database)), Registry(database)
    assert pair is not None
    manifest = store_artifact(served.data / "artifacts", pair, random_factors(pair, size=0.15))
    draft = registry.publish(
        parent=0, state="ready", artifact_sha256=manifest.sha256, artifact_bytes=manifest.size_bytes, trained_on={},
        gate={}, reason="random weights", job_id=None, actor="test",
    )  # fmt: skip
    registry.promote(draft.version, actor="test", reason="random weights")
    database.dispose()
    return draft.version


async def ask_across_a_swap(served: Deployment, url: str, asks: list[Drafted]) -> tuple[list[Reply], int]:
    """Send requests, eight at a time, and change the draft once some have been answered."""
    traffic = Traffic(url, MODEL)
    try:
        asking = asyncio.create_task(traffic.ask_all(asks, 8))
        while len(traffic.replies) < 4 and not asking.done():
            await asyncio.sleep(0.02)
        version = await asyncio.to_thread(swap_in_random_weights, served)
        return await asking, version
    finally:
        await traffic.close()


@pytest.mark.filterwarnings("default:.*part at a tie.*:UserWarning")
def test_greedy_text_is_that_of_transformers_across_gammas_batches_and_a_swap(
    served: Deployment, target: Target
) -> None:
    """Alone and eight at a time, γ 1, 3 and 5 from request to request, random draft weights from mid-way (I1)."""
    prompts, url = collected_prompts(), served.url
    asks = [
        Drafted(prompt=prompt, gamma=(1, 3, 5)[i % 3], max_tokens=TOKENS, stream=i % 2 == 1)
        for i, prompt in enumerate(prompts)
    ]
    alone = asked(url, asks[:6], 1)
    began = time.time()
    together, version = asyncio.run(ask_across_a_swap(served, url, asks))
    ended = time.time()
    assert [reply for reply in together if reply.failed or reply.truncated] == []
    with client_of(url) as client:
        poll_until(lambda: client.get("/debug/engine").json()["version"] == version)
    facts = Facts(open_database(f"sqlite:///{served.data / 'draftsmith.db'}"))
    swaps = [swap for swap in facts.get(SWAPS)["swaps"] if swap["version"] == version]
    assert [began < swap["at_s"] < ended for swap in swaps] == [True]
    spanning = [reply for reply in together if reply.started_s < swaps[0]["at_s"] < reply.finished_s]
    assert len(spanning) >= 4, "the swap did not come in the middle of decoding"

    totals, tokenizer = Exactness(), load_tokenizer(target.path)
    expected = [target.greedy(prompt) for prompt in prompts]
    compare_greedy(totals, tokenizer, [*alone, *together], [*expected[:6], *expected])
    assert totals.tokens > 20 * totals.prompts
    assert_exact(totals, "greedy")


@pytest.mark.filterwarnings("default:.*part at a tie.*:UserWarning")
def test_sampled_text_is_that_of_plain_decoding(served: Deployment, target: Target) -> None:
    """Temperatures, top-p, top-k and seeds: the same tokens with speculation as without, at any γ."""
    prompts, url = collected_prompts()[:12], served.url
    asks = [
        Drafted(
            prompt=prompt, temperature=WAYS[i % len(WAYS)][0], top_p=WAYS[i % len(WAYS)][1],
            top_k=WAYS[i % len(WAYS)][2], seed=1000 + i, gamma=(1, 3, 5)[i % 3], max_tokens=TOKENS,
        )
        for i, prompt in enumerate(prompts)
    ]  # fmt: skip
    values = [{name: getattr(ask, name) for name in Drafted.__dataclass_fields__} for ask in asks]
    fast = asked(url, asks, 8)
    plain = asked(url, [Drafted(**(value | {"speculate": False})) for value in values], 3)
    totals, tokenizer = Exactness(), load_tokenizer(target.path)
    for ask, one, other in zip(asks, fast, plain, strict=True):
        differing = differing_tokens(tokenizer, one.text, other.text) or abs(
            (one.completion_tokens or 0) - (other.completion_tokens or 0)
        )
        totals.count(
            other.completion_tokens or 0, differing, _lead(target, tokenizer, ask, one, other) if differing else None
        )
    assert len({reply.text for reply in fast}) == len(fast)
    assert_exact(totals, "sampled")


def _lead(target: Target, tokenizer: Any, ask: Drafted, *replies: Reply) -> float | None:
    """By how much the target's choice led where the first of two sampled answers left it."""
    how = {"temperature": ask.temperature, "top_p": ask.top_p, "top_k": ask.top_k, "seed": ask.seed}
    with torch.inference_mode():
        expected = reference.sampled(target.model, target.tokenizer, ask.prompt, TOKENS, how)
    leads = [first_lead(tokenizer.decode, expected, reply.text) for reply in replies]
    return next((lead for lead in leads if lead is not None), None)


def test_the_official_client_reads_whole_and_streamed_answers(served: Deployment) -> None:
    """Chat and plain completions, streamed and not, give one text; usage counts what was delivered."""
    ask: dict[str, Any] = {
        "model": MODEL, "messages": [{"role": "user", "content": "Name three rivers."}], "max_tokens": 24,
        "temperature": 0.7, "seed": 3,
    }  # fmt: skip
    with openai.OpenAI(base_url=f"{served.url}/v1", api_key="none", max_retries=0) as client:
        assert [model.id for model in client.models.list()] == [MODEL]
        whole = client.chat.completions.create(**ask)
        chunks = list(client.chat.completions.create(**ask, stream=True, stream_options={"include_usage": True}))
        assert whole.choices[0].message.content
        assert whole.choices[0].finish_reason in ("stop", "length")
        streamed = "".join(chunk.choices[0].delta.content or "" for chunk in chunks if chunk.choices)
        assert streamed == whole.choices[0].message.content
        assert [c.choices[0].finish_reason for c in chunks if c.choices][-1] == whole.choices[0].finish_reason
        usage = chunks[-1].usage
        assert (usage.prompt_tokens, usage.completion_tokens) == (
            whole.usage.prompt_tokens, whole.usage.completion_tokens
        )  # fmt: skip
        assert usage.completion_tokens <= 24
        assert usage.prompt_tokens_details.cached_tokens % 16 == 0  # whole blocks
        assert 0 < usage.prompt_tokens_details.cached_tokens < usage.prompt_tokens  # the same prompt came before
        off = client.chat.completions.create(**ask, extra_body={"speculative": {"enabled": False}})
        assert off.choices[0].message.content == streamed

        plain = client.completions.create(model=MODEL, prompt="Once upon a time", max_tokens=16, temperature=0)
        parts = client.completions.create(
            model=MODEL, prompt="Once upon a time", max_tokens=16, temperature=0, stream=True
        )
        assert "".join(part.choices[0].text for part in parts if part.choices) == plain.choices[0].text
        two = client.chat.completions.create(**ask, n=2)
        assert [choice.index for choice in two.choices] == [0, 1]
        assert two.choices[0].message.content == streamed
        with pytest.raises(openai.BadRequestError, match="'suffix' is not supported"):
            client.completions.create(model=MODEL, prompt="Once", max_tokens=2, suffix="end")
