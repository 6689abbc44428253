"""The memory plan: its terms against the real tensors, what it gives the cache, and how it refuses."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from tiny_pair import ENGINE, pair_settings

from adapter.contracts import SettingsError
from adapter.database import migrate, open_database
from adapter.hotswap import MERGED_SLOTS
from adapter.models import DTYPES, load_draft, load_target, prepare_pair
from adapter.sections import EngineSettings
from serving.engine.attention import KVPool
from serving.engine.build import build_engine
from serving.engine.memory import SHARE, Sizes, available_bytes, measure_pair, plan_memory, tokens_of_one_request

GIB = 2**30
SIZES = Sizes(
    target_weights=4 * GIB, draft_weights=GIB, draft_slots=GIB, logits=GIB // 2, target_kv=3 << 15, draft_kv=1 << 15
)
AUTOMATIC = EngineSettings(max_batch=4, max_model_len=1000, gamma_max=8, block_tokens=16, kv_tokens=0)


def _bytes(*models: Any) -> int:
    """Bytes of all parameters, each storage once."""
    tensors = [item for model in models for item in model.parameters()]
    return sum({item.data_ptr(): item.untyped_storage().nbytes() for item in tensors}.values())


@pytest.mark.parametrize(
    ("dtype", "draft_dtype"), [("float32", torch.float32), ("float32", torch.bfloat16), ("bfloat16", torch.bfloat16)]
)
@pytest.mark.parametrize("kind", ["pruned", "model"])
def test_the_terms_are_what_the_tensors_take(folder, tmp_path, dtype, draft_dtype, kind):
    """Weights and KV bytes worked out from the configurations equal those of the loaded models."""
    draft = None if kind == "pruned" else str(folder / "tiny-target")
    pair = prepare_pair(pair_settings(folder, tmp_path, draft=draft, dtype=dtype))
    assert pair.draft_kind == kind
    sizes = measure_pair(pair, ENGINE, draft_dtype=draft_dtype, packs=False)
    target = load_target(pair)
    base = load_draft(pair, draft_dtype, shared=target if DTYPES[dtype] == draft_dtype else None)
    assert sizes.target_weights == _bytes(target)
    assert sizes.draft_weights == _bytes(target, base) - _bytes(target)
    linear = sum(base.get_submodule(name).weight.nbytes for name in pair.lora_shapes)
    slots = 1 + MERGED_SLOTS + ENGINE.alternates  # and the pristine weights
    assert sizes.draft_slots == slots * linear
    for model, token in ((target, sizes.target_kv), (base, sizes.draft_kv)):
        pool = KVPool(model.config, 3, 8, model.dtype)
        assert sum(item.nbytes for item in (*pool.keys, *pool.values)) == 24 * token


def test_without_a_draft_nothing_is_set_aside_for_one(folder, tmp_path):
    """`--draft none`, and a draft that no proposer uses, cost nothing."""
    plain = prepare_pair(pair_settings(folder, tmp_path, draft="none"))
    unused = prepare_pair(pair_settings(folder, tmp_path))
    for pair, engine in ((plain, ENGINE), (unused, ENGINE.model_copy(update={"proposers": ("ngram",)}))):
        sizes = measure_pair(pair, engine, draft_dtype=torch.float32, packs=False)
        assert (sizes.draft_weights, sizes.draft_slots, sizes.draft_kv) == (0, 0, 0)


def test_the_cache_gets_what_is_left_up_to_what_a_full_batch_can_use():
    """Plenty of memory stops at the batch; less gives whole blocks up to the budget; a set number stays."""
    most = 4 * 64 * 16  # 1009 tokens of a request and its lookahead, in whole blocks
    assert plan_memory(AUTOMATIC, SIZES, 64 * GIB).kv_tokens == most
    tight = plan_memory(AUTOMATIC, SIZES, int((SIZES.fixed + 2000.9 * SIZES.token) / SHARE))
    assert tight.kv_tokens == 2000
    assert tight.terms()["sum"] <= tight.terms()["budget"]
    limited = AUTOMATIC.model_copy(update={"memory_gib": 6.7})
    assert plan_memory(limited, SIZES, 64 * GIB).kv_tokens == (int(6.7 * GIB) - SIZES.fixed) // SIZES.token // 16 * 16
    asked = AUTOMATIC.model_copy(update={"kv_tokens": 5000})
    assert plan_memory(asked, SIZES, 64 * GIB).kv_tokens == 5000
    assert plan_memory(asked, SIZES, SIZES.fixed + 5000 * SIZES.token).kv_tokens == 5000


@pytest.mark.parametrize(
    ("engine", "available", "origin"),
    [
        ({}, 8 * GIB, "80% of the 8.00 GiB available now"),
        ({"memory_gib": 6.5}, 64 * GIB, "engine.memory_gib = 6.5"),
        ({"kv_tokens": 16384}, 8 * GIB, "all memory that is available now"),
    ],
)
def test_a_pair_that_does_not_fit_is_refused_with_the_whole_sum(engine, available, origin):
    """Every term, the sum, the budget and where it comes from, and what to change."""
    asked = AUTOMATIC.model_copy(update=engine)
    with pytest.raises(SettingsError) as raised:
        plan_memory(asked, SIZES, available)
    said = str(raised.value)
    tokens = asked.kv_tokens or tokens_of_one_request(asked)
    for words in (
        "4.000 GiB  target weights", "1.000 GiB  draft weights", "1.000 GiB  resident draft versions",
        "0.500 GiB  logits", f"KV cache of {tokens} tokens", "98304 + 32768 bytes a token",
        f"{6.5 + tokens * SIZES.token / GIB:.3f} GiB  sum", f"budget ({origin})", "lower engine.max_model_len",
        "raise engine.memory_gib",
    ):  # fmt: skip
        assert words in said


def test_refused_before_any_weights_are_read(folder, tmp_path):
    """The plan needs no weight file: without one, the sum is still the first thing to fail."""
    settings = pair_settings(folder, tmp_path, engine={"memory_gib": 1e-4, "kv_tokens": 0})
    pair = prepare_pair(settings)
    database = open_database(settings.database)
    migrate(database)
    weights = folder / "tiny-target" / "model.safetensors"
    hidden = weights.rename(tmp_path / "elsewhere.safetensors")
    try:
        with pytest.raises(SettingsError, match="does not fit into memory"):
            build_engine(settings, pair, database)
    finally:
        hidden.rename(weights)


def test_a_container_counts_when_it_has_less_than_the_machine(tmp_path):
    """Memory of a container is its limit less what it uses for good; without a limit it is the machine's."""
    machine = available_bytes(tmp_path)
    assert machine > 0
    (tmp_path / "memory.current").write_text("3000000\n")
    (tmp_path / "memory.stat").write_text("anon 1000000\ninactive_file 500000\n")
    (tmp_path / "memory.max").write_text("max\n")
    assert available_bytes(tmp_path) > 10_000_000
    (tmp_path / "memory.max").write_text("10000000\n")
    assert available_bytes(tmp_path) == 7_500_000
