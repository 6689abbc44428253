"""Everything that decides what `draftsmith bootstrap` makes."""

from __future__ import annotations

from dataclasses import dataclass

# How people begin.  Left alone, an instruct model begins its user turns in few ways.
OPENINGS = (
    "Write", "Explain", "What is", "What are", "How do", "How can", "Why", "Who", "When", "Translate", "Summarize",
    "Give me", "List", "Describe", "Compare", "Rewrite", "Create a", "Can you", "Calculate", "Solve", "If", "Imagine",
    "Classify", "Fix", "Act as", "Tell me", "I", "The", "Please", "Is",
)  # fmt: skip


@dataclass(frozen=True, slots=True)
class Recipe:
    """The recipe; a work folder belongs to one.

    `shards` of `rows` chats with `length` tokens are written, the last shard is held out; a share `openings` of
    them begins with a word of `OPENINGS`.  `steps` optimizer steps of `batch_rows` chats follow, over the `vocab_size`
    tokens such text uses most (0: all).  The loss goes from forward KL to -log(acceptance) as acceptance rises.
    `start` is the sha256 of the weights it begins with, empty where these are the target's own layers.
    """

    layers: int = 4
    shards: int = 14
    rows: int = 128
    length: int = 384
    top_k: int = 32
    openings: float = 0.5
    steps: int = 800
    batch_rows: int = 16
    vocab_size: int = 8192
    learning_rate: float = 1e-3
    warmup_steps: int = 20
    seed: int = 20261121
    start: str = ""
