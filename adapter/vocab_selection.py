"""Choose which tokens a draft scores, from what was committed lately.

The rule, for a vocabulary of `size` tokens:
  1. every special and end token;
  2. three quarters of the rest go to the tokens committed most often, all segments together;
  3. the last quarter is dealt evenly to the segments, smallest first: each adds its own most frequent
     tokens that are not in yet and that it used at least twice, so a small one keeps its rare words;
  4. what is left is filled with the next most frequent tokens, then from a default ranking.
The default ranking is the one shipped for the target, which is the expected use of each token in
text the target wrote by itself; without one it is the order of ids, since byte-pair merges are
numbered from frequent to rare.  No torch; called by the engine and the command line.
"""

from __future__ import annotations

import json
import time
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from adapter.contracts import SettingsError
from adapter.draft_vocab import TokenIds, VocabManifest, store_vocab
from adapter.pairs import DRAFT_MANIFEST, SHIPPED, Pair, load_draft_manifest, read_config
from adapter.token_counts import CountSnapshot

RANKING = "token_ranking.bin"  # token ids, most used first, little-endian uint32
_MIN_USES = 2  # a word a segment said once is not its habit
_SEGMENT_SHARE = 4  # one place in so many is dealt to segments


def choose(snapshot: CountSnapshot, size: int, always: TokenIds, ranking: TokenIds) -> TokenIds:
    """Return `size` token ids, ascending, by the rule of this module.

    Shapes: always [n], ranking [vocab_size], every token once.

    Raises:
        SettingsError: `size` leaves no room beside the tokens that are always in.
    """
    if size <= len(always):
        raise SettingsError(
            f"a draft vocabulary of {size} tokens is too small: {len(always)} special and end tokens are always in; "
            "take a larger one, or 0 for the full vocabulary"
        )
    size = min(size, snapshot.vocab_size)
    inside = np.zeros(snapshot.vocab_size, bool)
    inside[always] = True
    total = snapshot.total
    popular = _by_count(total, ranking)
    reserve = (size - len(always)) // _SEGMENT_SHARE if len(snapshot.segments) > 1 else 0
    _fill(inside, popular[total[popular] > 0], size - reserve)
    for counts in sorted(snapshot.segments.values(), key=lambda item: int(item.sum())):
        own = _by_count(counts, ranking)
        room = min(size, int(inside.sum()) + reserve // len(snapshot.segments)) if reserve else 0
        _fill(inside, own[counts[own] >= _MIN_USES], room)
    _fill(inside, popular, size)
    return np.flatnonzero(inside).astype(np.uint32)


def coverage(snapshot: CountSnapshot, ids: TokenIds) -> float | None:
    """Return the share of the counted tokens that are among `ids`; None when nothing was counted."""
    total = snapshot.total
    counted = int(total.sum())
    return float(total[ids].sum() / counted) if counted else None


def special_tokens(target: Path, vocab_size: int) -> TokenIds:
    """Return the ids of a target's special and end tokens, ascending."""
    found: set[int] = set()
    tokenizer = target / "tokenizer.json"
    if tokenizer.exists():
        added = json.loads(tokenizer.read_text(encoding="utf-8")).get("added_tokens", [])
        found |= {int(token["id"]) for token in added if token.get("special")}
    generation = target / "generation_config.json"
    configs = [read_config(target)] + ([json.loads(generation.read_text())] if generation.exists() else [])
    for config in configs:
        ends = config.get("eos_token_id")
        found |= set(ends if isinstance(ends, list) else [] if ends is None else [ends])
    return np.array(sorted(item for item in found if 0 <= item < vocab_size), np.uint32)


def shipped_ranking(pair: Pair) -> TokenIds | None:
    """Return the ranking shipped for this very target, if there is one.  Shapes: [n], most used first."""
    folder = SHIPPED / pair.target_name
    if not (folder / RANKING).exists() or not (folder / DRAFT_MANIFEST).exists():
        return None
    if load_draft_manifest(folder).target_fingerprint != pair.target_fingerprint:
        return None
    return np.frombuffer((folder / RANKING).read_bytes(), "<u4")


def default_ranking(pair: Pair, vocab_size: int) -> TokenIds:
    """Return every token once: the shipped ranking where there is one, then what is left by id."""
    first = shipped_ranking(pair)
    if first is None:
        return np.arange(vocab_size, dtype=np.uint32)
    rest = np.setdiff1d(np.arange(vocab_size, dtype=np.uint32), first, assume_unique=True)
    return np.concatenate((first, rest))


def target_vocab_size(pair: Pair) -> int:
    """Return the width of the target's logits."""
    return int(read_config(pair.lender_path)["vocab_size"])


def build_vocab(
    root: Path, pair: Pair, snapshot: CountSnapshot | None, size: int, now_s: float | None = None
) -> VocabManifest:
    """Choose a vocabulary for a pair and store it.

    Raises:
        SettingsError: too small, not smaller than the full one, counted for another target, or there is
            nothing to choose from.
    """
    width = target_vocab_size(pair)
    if size >= width:
        raise SettingsError(f"a draft vocabulary of {size} tokens is not smaller than the full one of {width}")
    if snapshot is None or not snapshot.segments:
        if shipped_ranking(pair) is None:
            raise SettingsError(
                f"nothing was counted yet and no ranking is shipped for {pair.target_name}; serve some traffic, then "
                "publish"
            )
        snapshot = CountSnapshot(width, pair.target_fingerprint)
    if (snapshot.vocab_size, snapshot.target_fingerprint) != (width, pair.target_fingerprint):
        raise SettingsError("the token counts were made with another target; serve some traffic with this one first")
    ids = choose(snapshot, size, special_tokens(pair.lender_path, width), default_ranking(pair, width))
    counted = {
        "tokens": int(snapshot.total.sum()), "segments": {k: int(v.sum()) for k, v in snapshot.segments.items()},
        "ranking": "order of ids" if shipped_ranking(pair) is None else "shipped",
    }  # fmt: skip
    return store_vocab(
        root, ids, vocab_size=width, target_fingerprint=pair.target_fingerprint, coverage=coverage(snapshot, ids),
        counted=counted, created_at_s=time.time() if now_s is None else now_s,
    )  # fmt: skip


def _by_count(counts: NDArray[np.uint32], ranking: TokenIds) -> TokenIds:
    """All ids, most counted first; equal ones in the order of the ranking."""
    return ranking[np.argsort(-counts[ranking].astype(np.int64), kind="stable")]


def _fill(inside: NDArray[np.bool_], candidates: TokenIds, size: int) -> None:
    """Take candidates in order until `size` tokens are inside."""
    new = candidates[~inside[candidates]]
    inside[new[: max(0, size - int(inside.sum()))]] = True
