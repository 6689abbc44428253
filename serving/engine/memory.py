"""Plan the engine's memory before any weights are loaded, from the models' configurations alone.

Weights, resident drafts, logits and KV are summed against one budget; what the rest leaves becomes
KV cache.  Knows tensors by their sizes only.  Called once, by `serving.engine.build`.
"""

from __future__ import annotations

from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil
import torch
from transformers import AutoConfig, AutoModelForCausalLM

from adapter.contracts import SettingsError
from adapter.hotswap import MERGED_SLOTS
from adapter.models import DTYPES, empty_draft
from adapter.pairs import Pair, load_draft_manifest
from adapter.sections import EngineSettings
from kernels.packed_linear import can_pack
from serving.engine.attention import KVPool

SHARE = 0.8  # of the memory available at the start; the rest is for the other processes and for activations
_GIB = 2**30
_LOGITS_BYTES = 24  # an entry: raw and shaped float32, sorted values and their int64 indices, a softmax
_CGROUP = Path("/sys/fs/cgroup")


@dataclass(frozen=True, slots=True)
class Sizes:
    """Bytes a pair takes, and KV bytes a cached token takes."""

    target_weights: int
    draft_weights: int
    draft_slots: int
    logits: int
    target_kv: int
    draft_kv: int

    @property
    def fixed(self) -> int:
        """Everything but the KV cache."""
        return self.target_weights + self.draft_weights + self.draft_slots + self.logits

    @property
    def token(self) -> int:
        """KV bytes of one token, target and draft together."""
        return self.target_kv + self.draft_kv


@dataclass(frozen=True, slots=True)
class MemoryPlan:
    """How many tokens the KV cache holds, and the sum that says so."""

    kv_tokens: int
    sizes: Sizes
    budget: int

    def terms(self) -> dict[str, float]:
        """Return every term of the sum, the sum and the budget, in GiB."""
        sizes, kv = self.sizes, self.kv_tokens * self.sizes.token
        terms = {
            "target_weights": sizes.target_weights, "draft_weights": sizes.draft_weights,
            "draft_slots": sizes.draft_slots, "logits": sizes.logits, "kv_cache": kv, "sum": sizes.fixed + kv,
            "budget": self.budget,
        }  # fmt: skip
        return {name: round(value / _GIB, 3) for name, value in terms.items()}


def plan_memory(engine: EngineSettings, sizes: Sizes, available: int) -> MemoryPlan:
    """Fix the size of the KV cache.

    `available` is the memory, in bytes, that is free before the models are loaded.  A size the
    operator set is refused only when it passes the budget they set, or all there is.

    Raises:
        SettingsError: the pair does not fit, with every term of the sum.
    """
    if engine.memory_gib:
        budget, origin = int(engine.memory_gib * _GIB), f"engine.memory_gib = {engine.memory_gib:g}"
    elif engine.kv_tokens:
        budget, origin = available, "all memory that is available now"
    else:
        budget, origin = int(SHARE * available), f"{SHARE:.0%} of the {available / _GIB:.2f} GiB available now"
    least = tokens_of_one_request(engine)
    fits = (budget - sizes.fixed) // sizes.token // engine.block_tokens * engine.block_tokens
    kv_tokens = engine.kv_tokens or max(least, min(fits, _most_tokens(engine)))
    plan = MemoryPlan(kv_tokens, sizes, budget)
    if sizes.fixed + kv_tokens * sizes.token > budget:
        raise SettingsError(_too_much(plan, engine, origin))
    return plan


def tokens_of_one_request(engine: EngineSettings) -> int:
    """Return the cached tokens without which not even one request of full length could run."""
    return engine.max_model_len + engine.gamma_max + engine.block_tokens


def measure_pair(
    pair: Pair, engine: EngineSettings, *, draft_dtype: torch.dtype, packs: bool, fixed_place: bool = False
) -> Sizes:  # fmt: skip
    """Work out what a pair takes, without loading it.

    `packs`: linear layers of a dtype that packs here keep a packed copy of their weights beside them.
    `fixed_place`: the draft in force is copied to where a device's programs read it.
    """
    config = AutoConfig.from_pretrained(pair.target_path)
    dtype = DTYPES[pair.dtype]
    with torch.device("meta"):
        target = AutoModelForCausalLM.from_config(config, dtype=dtype)
    logits = engine.max_batch * (engine.gamma_max + 1) * config.vocab_size * _LOGITS_BYTES
    target_kv = KVPool.bytes_per_token(config, dtype)
    compiled = engine.compiled and engine.lean
    weights = _bytes(target, packs, compiled=compiled)
    if pair.draft_kind == "none" or "draft" not in engine.proposers:
        return Sizes(weights, 0, 0, logits, target_kv, 0)
    draft = _empty_draft(pair, draft_dtype)
    linear = sum(rows * columns for rows, columns in pair.lora_shapes.values()) * draft_dtype.itemsize
    # Plain, packed, and half as much again in int8.
    halves = 5 if packs and can_pack(draft_dtype, compiled=compiled) else 2
    borrowed = _borrowed_bytes(pair, draft, same_dtype=draft_dtype == dtype)
    return Sizes(
        target_weights=weights, draft_weights=_bytes(draft, packs, compiled=compiled) - borrowed,
        # the pristine weights they are merged from, too
        draft_slots=linear * (2 if fixed_place else 1) + (MERGED_SLOTS + engine.alternates) * halves * linear // 2,
        logits=logits, target_kv=target_kv, draft_kv=KVPool.bytes_per_token(draft.config, draft_dtype),
    )  # fmt: skip


def available_bytes(cgroup: Path = _CGROUP, device: torch.device | None = None) -> int:
    """Return the memory this process can still get: a GPU's, the machine's, or its container's where that is less."""
    if device is not None and device.type == "cuda":
        return int(torch.cuda.mem_get_info(device)[0])
    free = int(psutil.virtual_memory().available)
    with suppress(OSError, ValueError):  # no container, or one without a limit
        limit = int((cgroup / "memory.max").read_text())
        used = int((cgroup / "memory.current").read_text())
        cached = dict(line.split() for line in (cgroup / "memory.stat").read_text().splitlines())
        free = min(free, limit - used + int(cached.get("inactive_file", 0)))
    return max(0, free)


def _most_tokens(engine: EngineSettings) -> int:
    """Return what a full batch of the longest requests can use; the prefix cache lives in what they do not."""
    longest = engine.max_model_len + engine.gamma_max + 1
    blocks = engine.max_batch * -(-longest // engine.block_tokens)
    return max(tokens_of_one_request(engine), blocks * engine.block_tokens)


def _empty_draft(pair: Pair, dtype: torch.dtype) -> Any:
    path = Path(pair.draft_path or "")
    if pair.draft_kind == "pruned":
        return empty_draft(Path(pair.target_path), len(load_draft_manifest(path).layers), dtype)
    with torch.device("meta"):
        return AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(path), dtype=dtype)


def _bytes(model: Any, packs: bool, *, compiled: bool) -> int:
    total = sum(item.numel() * item.element_size() for item in model.parameters())
    if packs:
        linears = [item.weight for item in model.modules() if isinstance(item, torch.nn.Linear)]
        total += sum(item.numel() * item.element_size() for item in linears if can_pack(item.dtype, compiled=compiled))
    return int(total)


def _borrowed_bytes(pair: Pair, draft: Any, *, same_dtype: bool) -> int:
    """Return the bytes of embedding and head that are the target's; negative where tied ones become two copies."""
    if pair.draft_kind != "pruned":
        return 0
    embedding, head = draft.get_input_embeddings().weight, draft.get_output_embeddings().weight
    size = int(embedding.numel() * embedding.element_size())
    if not same_dtype:
        return -size if head is embedding else 0
    return size if head is embedding else 2 * size


def _too_much(plan: MemoryPlan, engine: EngineSettings, origin: str) -> str:
    terms, sizes = plan.terms(), plan.sizes
    asked = "engine.kv_tokens" if engine.kv_tokens else "one request of engine.max_model_len"
    per_token = f"{sizes.target_kv} + {sizes.draft_kv} bytes a token"
    rows = {
        "target weights": terms["target_weights"], "draft weights": terms["draft_weights"],
        "resident draft versions": terms["draft_slots"], "logits of a full batch": terms["logits"],
        f"KV cache of {plan.kv_tokens} tokens ({asked}) at {per_token}": terms["kv_cache"],
        "sum": terms["sum"], f"budget ({origin})": terms["budget"],
    }  # fmt: skip
    lines = "".join(f"\n  {value:9.3f} GiB  {name}" for name, value in rows.items())
    return (
        f"the pair does not fit into memory:{lines}\nlower engine.max_model_len, engine.max_batch or "
        "engine.kv_tokens, use dtype bfloat16, serve a smaller target or draft, or raise engine.memory_gib"
    )
