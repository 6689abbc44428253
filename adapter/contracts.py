"""Every record that crosses a process border; `adapter.wire` writes them to bytes.

Frozen, tensor-free, readable with numpy alone.  Arrays travel as little-endian bytes.  A changed meaning
raises `SCHEMA_VERSION`; a reader refuses what it does not know.

DraftsmithError
├── WireError          an entry that cannot be read
├── ArtifactError      a draft artifact that must not be loaded
├── RegistryError      a state change that is not allowed
│   └── ConflictError  somebody moved the alias first
└── SettingsError      a setting that cannot work
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import IntEnum
from typing import Literal

import numpy as np
from numpy.typing import NDArray

SCHEMA_VERSION = 2
READABLE_SCHEMAS = (1, 2)  # in 1 every position was recorded and nobody was told apart
FLOOR_VERSION = 0  # the base draft itself: version 0 in every registry

Coupling = Literal["gumbel", "maximal"]
FinishReason = Literal["stop", "length", "cancelled", "error"]


class DraftsmithError(Exception):
    """Base of every error this project raises on purpose."""


class WireError(DraftsmithError):
    """Raised when an entry of a stream cannot be read; the message says why."""


class ArtifactError(DraftsmithError):
    """Raised when a draft artifact must not be loaded; the message names the defect."""


class RegistryError(DraftsmithError):
    """Raised when a version, alias or job change is not allowed."""


class ConflictError(RegistryError):
    """Raised when the generation moved since the caller looked; the message names who moved it."""


class SettingsError(DraftsmithError):
    """Raised when a setting cannot work; the message names it, its value and what is valid."""


class Verdict(IntEnum):
    """What verification said about one recorded position."""

    REJECTED = 0  # the first rejected draft token of its round; the committed token is recovered
    ACCEPTED = 1  # the draft token is the committed token
    UNDRAFTED = 2  # nothing was drafted here: a bonus token, or a round without speculation


@dataclass(frozen=True, slots=True, kw_only=True)
class Sampling:
    """How one request samples. `temperature` 0 is greedy; `top_k` 0, `top_p` 1 and `min_p` 0 are off.

    Presence and frequency penalties look at generated tokens, the repetition penalty at the prompt
    too; 0, 0 and 1 are off.  `logit_bias` is added to the logits of its tokens.  No end token may
    come before `min_tokens` were generated.
    """

    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = 0
    min_p: float = 0.0
    seed: int = 0
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    repetition_penalty: float = 1.0
    logit_bias: tuple[tuple[int, float], ...] = ()
    min_tokens: int = 0


@dataclass(frozen=True, slots=True, kw_only=True)
class Grammar:
    """What an answer must look like: any JSON object, or one that a JSON schema describes."""

    kind: Literal["json_object", "json_schema"]
    schema: str = ""  # JSON text of the schema


@dataclass(frozen=True, slots=True, kw_only=True)
class TokenLogprob:
    """What the target thought at one position: natural log-probs of the raw logits, most likely first."""

    logprob: float
    top_ids: tuple[int, ...] = ()
    top_logprobs: tuple[float, ...] = ()


@dataclass(frozen=True, slots=True)
class VersionSpan:
    """From token index `start` on, rounds were drafted by `version`."""

    start: int
    version: int


@dataclass(frozen=True, slots=True, kw_only=True)
class VerifiedBlock:
    """One stream entry: a stretch of one request with the target's verdicts and law.

    `token_ids` holds the context and the committed tokens; index i of it is absolute position
    `first_position + i` of the request.  Record r judges absolute position `positions[r]`, so its
    committed token is `token_ids[positions[r] - first_position]`.  Log-probs are natural and at
    temperature 1, before top-k and top-p; `tail_mass` is the probability outside the top-k.
    Positions after the first rejection of a round are off the committed path and never recorded.
    Every rejection is recorded; any other position with probability `keep_probability`, independently.
    `tenant` tells whose request it was without naming them; empty where nobody is told apart.

    Shapes (n records, k = top_k):
        token_ids: [t] uint32; positions, draft_ids: [n] uint32; verdicts: [n] uint8;
        draft_logprobs, tail_mass: [n] float32; topk_ids: [n, k] uint32; topk_logprobs: [n, k] float16.
        draft_ids and draft_logprobs mean nothing where the verdict is UNDRAFTED.
    """

    schema: int
    request_id: str
    segment: str
    target_fingerprint: str
    coupling: Coupling
    sampling: Sampling
    prompt_tokens: int
    first_position: int
    versions: tuple[VersionSpan, ...]
    top_k: int
    token_ids: bytes
    positions: bytes
    verdicts: bytes
    draft_ids: bytes
    draft_logprobs: bytes
    topk_ids: bytes
    topk_logprobs: bytes
    tail_mass: bytes
    logged_at_s: float
    tenant: str = ""
    keep_probability: float = 1.0

    def array(self, field: str) -> NDArray[np.generic]:
        """Open one of the array fields, shaped as the class docstring says."""
        flat = np.frombuffer(getattr(self, field), dtype=_DTYPES[field])
        return flat.reshape(-1, self.top_k) if field.startswith("topk") else flat

    @property
    def num_records(self) -> int:
        """How many positions this block judges."""
        return len(self.verdicts)

    def row_weights(self) -> NDArray[np.float64]:
        """Return for each record how many positions it stands for: one over the chance that it was kept.

        Shapes: result [n].  Sums weighted so are unbiased for all verified positions (Horvitz and Thompson, 1952).
        """
        rejected = self.array("verdicts") == Verdict.REJECTED
        return np.where(rejected, 1.0, 1.0 / self.keep_probability)


_DTYPES = {
    "token_ids": "<u4",
    "positions": "<u4",
    "verdicts": "u1",
    "draft_ids": "<u4",
    "draft_logprobs": "<f4",
    "topk_ids": "<u4",
    "topk_logprobs": "<f2",
    "tail_mass": "<f4",
}


@dataclass(frozen=True, slots=True, kw_only=True)
class Counts:
    """Raw counters of rounds; every rate is derived from them where it is shown."""

    num_rounds: int = 0
    num_drafted: int = 0
    num_examined: int = 0
    num_accepted: int = 0

    def __add__(self, other: Counts) -> Counts:
        return Counts(
            num_rounds=self.num_rounds + other.num_rounds,
            num_drafted=self.num_drafted + other.num_drafted,
            num_examined=self.num_examined + other.num_examined,
            num_accepted=self.num_accepted + other.num_accepted,
        )

    @property
    def acceptance(self) -> float | None:
        """Σ accepted / Σ examined, or None when nothing was examined."""
        return self.num_accepted / self.num_examined if self.num_examined else None

    @property
    def tokens_per_round(self) -> float | None:
        """1 + Σ accepted / rounds, or None when no round ran."""
        return 1 + self.num_accepted / self.num_rounds if self.num_rounds else None


@dataclass(frozen=True, slots=True, kw_only=True)
class VersionCounts:
    """What one draft version did for one request; rounds without speculation are not in it."""

    version: int
    counts: Counts


@dataclass(frozen=True, slots=True, kw_only=True)
class RequestOutcome:
    """What one finished request says about the drafts that served it.

    Durations are seconds on the engine's monotonic clock; `finished_at_s` is epoch seconds.
    `plain_rounds` counts rounds that ran without any drafted token.  `delivered_tokens` is what the
    client received, with one exception: the engine does not wait for the API, so a stop string in the
    last round or just before it may be found after the engine ended the answer by itself and wrote
    this.  Then the few tokens behind the stop string count too, and `finish_reason` is the engine's.
    """

    schema: int
    request_id: str
    segment: str
    finish_reason: FinishReason
    sampling: Sampling
    prompt_tokens: int
    delivered_tokens: int
    plain_rounds: int
    by_version: tuple[VersionCounts, ...]
    accepted_by_position: tuple[int, ...]
    unversioned: Counts = Counts()  # rounds of proposers without versions, n-gram matching for one
    learn: bool = True  # whether it may be learned from, and so was logged
    cached_tokens: int = 0  # prompt tokens whose keys and values were found in the prefix cache
    queue_s: float
    first_token_s: float
    total_s: float
    finished_at_s: float

    @property
    def counts(self) -> Counts:
        """The counters of all versions together."""
        return sum((item.counts for item in self.by_version), Counts())


Wire = VerifiedBlock | RequestOutcome
