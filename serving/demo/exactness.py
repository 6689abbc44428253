"""Is the text the same with speculation as without?  Greedy against transformers, sampled against plain.

Answers come back as text, so tokens are compared by tokenising both texts; where a text differs,
the reference says by how much its choice led at the first different token.  A lead under 10⁻³ is a
tie: forwards of different row counts round differently, and either token is right.  No torch here;
`serving.demo.reference` is a process of its own.  Called by `serving.demo.stages`.
"""

from __future__ import annotations

import asyncio
import json
import os
import sys
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from itertools import zip_longest
from pathlib import Path
from typing import Any

from tokenizers import Tokenizer

from adapter.contracts import DraftsmithError
from serving.demo.traffic import MAX_TOKENS, Ask, Reply

TIE = 1e-3
SEGMENT = "exactness"  # apart from the traffic whose acceptance is watched
_PARTIAL = "\N{REPLACEMENT CHARACTER}"
_WAYS = ((0.3, 1.0), (0.7, 0.9), (1.0, 1.0), (0.7, 1.0), (1.0, 0.9), (1.3, 0.95))  # temperature, top_p


class ReferenceFailed(DraftsmithError):
    """Raised when transformers could not answer; the message is the end of what it said."""


@dataclass(slots=True)
class Exactness:
    """Totals of all comparisons so far."""

    prompts: int = 0
    tokens: int = 0
    differing_tokens: int = 0
    ties: int = 0

    def count(self, tokens: int, differing: int, lead: float | None) -> None:
        """Add one comparison; `lead` is the reference's lead at the first difference, if there is one."""
        self.prompts += 1
        self.tokens += tokens
        if differing and lead is not None and lead < TIE:
            self.ties += 1
        else:
            self.differing_tokens += differing

    def as_dict(self) -> dict[str, int]:
        """Return the totals under their names in the report."""
        return asdict(self)


def greedy_asks(prompts: Sequence[str]) -> list[Ask]:
    """Return one greedy request a prompt."""
    return [Ask(prompt=prompt, segment=SEGMENT) for prompt in prompts]


def sampled_asks(prompts: Sequence[str]) -> list[Ask]:
    """Return one sampled request a prompt, each with its own temperature, top_p and seed."""
    ways = [_WAYS[i % len(_WAYS)] for i in range(len(prompts))]
    return [
        Ask(prompt=prompt, temperature=temperature, top_p=top_p, seed=1000 + i, segment=SEGMENT)
        for i, (prompt, (temperature, top_p)) in enumerate(zip(prompts, ways, strict=True))
    ]


def load_tokenizer(target_path: str) -> Tokenizer:
    """Open the target's tokenizer."""
    return Tokenizer.from_file(str(Path(target_path) / "tokenizer.json"))


def differing_tokens(tokenizer: Tokenizer, one: str, other: str) -> int:
    """Count token positions at which two texts differ; 0 only for equal texts."""
    if one == other:
        return 0
    pairs = zip_longest(*(tokenizer.encode(text, add_special_tokens=False).ids for text in (one, other)))
    return max(1, sum(1 for a, b in pairs if a != b))


def first_lead(decode: Callable[[list[int]], str], reference: dict[str, Any], text: str) -> float | None:
    """Return the reference's lead at the first token of its answer that `text` does not follow."""
    ids: list[int] = reference["token_ids"]
    for index, lead in enumerate(reference["leads"]):
        so_far = decode(ids[: index + 1]).rstrip(_PARTIAL)
        if not text.lstrip().startswith(so_far.lstrip()):  # some decoders drop the space that a text begins with
            return float(lead)
    return None


def compare_greedy(
    totals: Exactness, tokenizer: Tokenizer, replies: Sequence[Reply], references: Sequence[dict[str, Any]]
) -> None:
    """Compare greedy replies with transformers' answers; one token more or less counts as well."""
    for reply, reference in zip(replies, references, strict=True):
        differing = differing_tokens(tokenizer, reply.text, reference["text"])
        length = len(reference["token_ids"])
        if not differing:
            differing = abs(length - (reply.completion_tokens or 0))
        totals.count(length, differing, first_lead(tokenizer.decode, reference, reply.text) if differing else None)


def compare_sampled(
    totals: Exactness, tokenizer: Tokenizer, pairs: Sequence[tuple[Reply, Reply]], leads: dict[int, dict[str, Any]]
) -> None:
    """Compare (speculating, plain) replies to the same request; `leads` has references of pairs that differ."""
    for index, (fast, plain) in enumerate(pairs):
        differing = differing_tokens(tokenizer, fast.text, plain.text)
        if not differing:
            differing = abs((fast.completion_tokens or 0) - (plain.completion_tokens or 0))
        lead = None
        if differing and index in leads:
            found = [first_lead(tokenizer.decode, leads[index], reply.text) for reply in (fast, plain)]
            lead = next((item for item in found if item is not None), None)
        totals.count(plain.completion_tokens or 0, differing, lead)


async def ask_reference(
    target_path: str, greedy: Sequence[str], sampled: Sequence[Ask], timeout_s: float = 600.0
) -> dict[str, Any]:
    """Have transformers answer, in another process.

    Raises:
        ReferenceFailed: it ended without an answer, or took too long.
    """
    job = {
        "target_path": target_path,
        "max_tokens": MAX_TOKENS,
        "greedy": list(greedy),
        "sampled": [
            {"prompt": ask.prompt, "temperature": ask.temperature, "top_p": ask.top_p, "seed": ask.seed}
            for ask in sampled
        ],
    }
    pipe = asyncio.subprocess.PIPE
    env = os.environ | {"OMP_WAIT_POLICY": "PASSIVE"}  # beside a running service, whose threads spin
    process = await asyncio.create_subprocess_exec(
        sys.executable, "-m", "serving.demo.reference", stdin=pipe, stdout=pipe, stderr=pipe, env=env
    )
    try:
        out, err = await asyncio.wait_for(process.communicate(json.dumps(job).encode()), timeout_s)
    except TimeoutError:
        raise ReferenceFailed(f"transformers did not answer {len(greedy)} prompts within {timeout_s:.0f} s") from None
    finally:
        if process.returncode is None:
            process.kill()
            await process.wait()
    if process.returncode:
        raise ReferenceFailed(f"the transformers process failed: {err.decode(errors='replace').strip()[-500:]}")
    return dict(json.loads(out))
