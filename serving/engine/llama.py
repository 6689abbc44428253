"""A lean forward for the Llama family over the paged cache: the model's own weights, few operations.

Query, key and value projections are one product, gate and up another; the parameters of the
transformers model become views of the fused weights, so writing to them in place is all an update of
the weights takes, apart from `LeanLlama.pack`.  `lean_reason` says which models it cannot run; those
stay with transformers.  Knows nothing about requests.  Called by `serving.engine.runner`.

Sources: the Llama, Qwen2, Qwen3 and Mistral architectures as transformers implements them.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import Any

import torch
from torch.nn.functional import embedding, silu

from kernels.cpu import forward as compiled_forward
from kernels.packed_linear import PackedLinear, can_pack, can_quantize, from_weight
from serving.engine.attention import KVPool, Layout, Row, attend, build_layout
from serving.engine.compiled import CompiledLlama, rotary_tables

FAMILY = ("llama", "mistral", "qwen2", "qwen3")
ONLY_LEAN = "a GPU runs what the lean forward runs; set engine.device = cpu, or serve another model"
_FIXED_ROPE = ("default", "linear", "llama3", "yarn")  # frequencies that do not depend on the length
_PROJECTIONS = ("q_proj", "k_proj", "v_proj", "o_proj")
_MLP = ("gate_proj", "up_proj", "down_proj")


def lean_reason(model: Any) -> str | None:
    """Say why a transformers model cannot run lean; None when it can."""
    config = model.config
    if config.model_type not in FAMILY:
        return f"architecture {config.model_type!r} is not one of {', '.join(FAMILY)}"
    if any(kind != "full_attention" for kind in getattr(config, "layer_types", None) or ()):
        return "some layers do not attend to everything"
    if getattr(config, "sliding_window", None) is not None and getattr(config, "use_sliding_window", True):
        return "it attends through a sliding window"
    if config.hidden_act not in ("silu", "swish"):
        return f"its activation is {config.hidden_act}"
    if model.model.rotary_emb.rope_type not in _FIXED_ROPE:
        return f"its rotary frequencies are {model.model.rotary_emb.rope_type!r}"
    if model.dtype not in (torch.float32, torch.bfloat16):
        return f"its dtype is {model.dtype}"
    linears = [part for layer in model.model.layers for part in _linears(layer)]
    if not all(type(part) in (torch.nn.Linear, PackedLinear) and part.weight.dtype == model.dtype for part in linears):
        return "some of its projections are not plain linear layers"
    return None


def _linears(layer: Any) -> list[Any]:
    attention, mlp = layer.self_attn, layer.mlp
    parts = [(attention, name) for name in _PROJECTIONS] + [(mlp, name) for name in _MLP]
    return [getattr(owner, name, None) for owner, name in parts]


@dataclass(frozen=True, slots=True)
class _Norm:
    """Root mean square norm; weight [..., dim], epsilon a scalar tensor."""

    weight: torch.Tensor
    epsilon: torch.Tensor
    eps: float

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        """Normalise over the last dimension, in float32."""
        length = torch.linalg.vector_norm(x, dim=-1, keepdim=True, dtype=torch.float32)
        factor = torch.addcmul(self.epsilon, length, length, value=1 / x.shape[-1]).rsqrt_()
        scaled = x * factor  # float32, because `factor` is
        return (scaled if x.dtype == torch.float32 else scaled.to(x.dtype)).mul_(self.weight)

    def compiled(self) -> compiled_forward.Norm:
        """The same norm for the compiled layers, with its weight as it is now."""
        return compiled_forward.Norm(self.weight.detach().float().contiguous(), self.eps)


@dataclass(frozen=True, slots=True)
class _Layer:
    """Parts of one layer; head_norm, one row a head, is None where queries and keys are not normalised."""

    input_norm: _Norm
    qkv: PackedLinear
    head_norm: _Norm | None
    output: PackedLinear
    mlp_norm: _Norm
    gate_up: PackedLinear
    down: PackedLinear
    scaling: float
    head_norms: tuple[torch.Tensor, torch.Tensor, float] | None  # weights [dim] of queries and keys, and epsilon

    def compiled(self) -> compiled_forward.Layer:
        """The same layer for the compiled forward, with its weights as they were packed."""
        panels = [part.panels for part in (self.qkv, self.output, self.gate_up, self.down)]
        qkv, output, gate_up, down = (part for part in panels if part is not None)
        head_norm = None if self.head_norm is None else self.head_norm.compiled()
        return compiled_forward.Layer(
            self.input_norm.compiled(), qkv, head_norm, output, self.mlp_norm.compiled(), gate_up, down, self.scaling
        )


class LeanLlama:
    """The layers of one model, run over a ragged batch.

    Building it moves the model's weights into fused ones; the model itself goes on working.
    """

    def __init__(self, model: Any) -> None:
        config, inner = model.config, model.model
        self.heads: int = config.num_attention_heads
        self.kv_heads: int = config.num_key_value_heads
        self._dim: int = inner.layers[0].self_attn.head_dim
        self.embedding: torch.Tensor = inner.embed_tokens.weight
        self.layers = [_fuse_layer(layer, self.heads, self.kv_heads) for layer in inner.layers]
        self.norm = _norm(inner.norm)
        self._rotary = inner.rotary_emb
        self._cos = self._sin = torch.empty(0)
        self._compiled: CompiledLlama | None = None

    def pack(self, *, int8: bool = False, compiled: bool = False) -> None:
        """Pack the weights as they are now, where that is faster; `int8` lets bfloat16 ones be inexact.

        `compiled` packs for our own kernels and runs all layers there.  oneDNN does not pack `down` in
        float32: its inputs hold single values in the thousands, and the packed product, which adds them
        up in one go, is several times less exact there and hardly faster.
        """
        compiled = compiled and self._dim in compiled_forward.HEAD_DIMS
        self._compiled = None  # lets go of what is packed now, before there is a second copy
        for layer in self.layers:
            for linear in (layer.qkv, layer.output, layer.gate_up, layer.down):
                stays_plain = linear is layer.down and linear.weight.dtype == torch.float32
                linear.int8, linear.compiled = int8 and (compiled or can_quantize()), compiled
                if compiled or (can_pack(linear.weight.dtype) and not stays_plain):
                    linear.pack()
        self._compiled = self._compile() if compiled else None

    @property
    def compiled(self) -> CompiledLlama | None:
        """The compiled layers; None where torch computes."""
        return self._compiled

    def run(self, tokens: torch.Tensor, pool: KVPool, rows: list[Row], wanted: torch.Tensor | None) -> torch.Tensor:
        """Process the tokens of a step, short rows first; arguments and result as those of `states`."""
        if self._compiled is not None:
            return self._compiled.states(embedding(tokens, self.embedding), pool, rows, wanted)
        return self.states(tokens, pool, build_layout(rows, pool.block_tokens, pool.dtype, pool.shared), wanted)

    def states(self, tokens: torch.Tensor, pool: KVPool, layout: Layout, wanted: torch.Tensor | None) -> torch.Tensor:
        """Process the tokens of a step and return the normed states of the wanted rows; None wants all.

        Shapes: tokens [tokens] int64; wanted [rows] indices into them; result [rows, hidden_size].
        """
        x = embedding(tokens, self.embedding)
        if layout.end > len(self._cos):
            self._extend_tables(layout.end, x)
        cos = self._cos.index_select(0, layout.positions)[:, None]
        sin = self._sin.index_select(0, layout.positions)[:, None]
        last = len(self.layers) - 1
        for number, layer in enumerate(self.layers):
            query, key, value = self._project(layer, x, cos, sin)
            attended = attend(pool, layout, number, query, key, value, layer.scaling).flatten(1)
            if number == last and wanted is not None:
                x, attended = x.index_select(0, wanted), attended.index_select(0, wanted)
            x += layer.output.forward(attended)
            gate_up = layer.gate_up.forward(layer.mlp_norm(x))
            gate, up = gate_up.chunk(2, dim=-1)
            x += layer.down.forward(silu(gate).mul_(up))
        return self.norm(x)

    def _project(
        self, layer: _Layer, x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Return queries, keys, both rotated, and values; each [tokens, its heads, dim]."""
        qkv = layer.qkv.forward(layer.input_norm(x)).view(len(x), -1, self._dim)
        rotating = self.heads + self.kv_heads
        turned = qkv[:, :rotating]
        if layer.head_norm is not None:
            turned = layer.head_norm(turned)
        # The halves change places and the table of sines holds the sign, so nothing is negated.
        turned = torch.addcmul(turned * cos, turned.roll(self._dim // 2, -1), sin)
        return turned[:, : self.heads], turned[:, self.heads :], qkv[:, rotating:]

    def _compile(self) -> CompiledLlama:
        layers = [layer.compiled() for layer in self.layers]
        parts = compiled_forward.Layers(
            layers, self.norm.compiled(), heads=self.heads, kv_heads=self.kv_heads, dim=self._dim
        )
        return CompiledLlama(parts, self._rotary)

    def rotary_tables(self, end: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Return cosines, and sines whose first half is negated, of `end` positions.  Shapes: [positions, dim]."""
        return rotary_tables(self._rotary, end, self.embedding)

    def _extend_tables(self, end: int, like: torch.Tensor) -> None:
        self._cos, self._sin = rotary_tables(self._rotary, end, like)


def _norm(module: Any) -> _Norm:
    epsilon = float(module.variance_epsilon)
    return _Norm(module.weight, torch.tensor(epsilon, dtype=torch.float32, device=module.weight.device), epsilon)


def _fuse_layer(layer: Any, heads: int, kv_heads: int) -> _Layer:
    attention, mlp = layer.self_attn, layer.mlp
    head_norm = head_norms = None
    if hasattr(attention, "q_norm"):
        query, key = attention.q_norm, attention.k_norm
        weights = [query.weight.expand(heads, -1), key.weight.expand(kv_heads, -1)]
        head_norm = dataclasses.replace(_norm(query), weight=torch.cat(weights))
        head_norms = (query.weight, key.weight, float(query.variance_epsilon))
    return _Layer(
        input_norm=_norm(layer.input_layernorm), qkv=_fuse(attention.q_proj, attention.k_proj, attention.v_proj),
        head_norm=head_norm, output=_fuse(attention.o_proj), mlp_norm=_norm(layer.post_attention_layernorm),
        gate_up=_fuse(mlp.gate_proj, mlp.up_proj), down=_fuse(mlp.down_proj), scaling=attention.scaling,
        head_norms=head_norms,
    )  # fmt: skip


@torch.no_grad()
def _fuse(*linears: torch.nn.Linear) -> PackedLinear:
    """Stack linear layers of one input; their weights become views of the stack.

    The stack lies input first in float32: a product with few rows reads it faster that way.
    """
    stacked = torch.cat([linear.weight for linear in linears])
    if stacked.dtype == torch.float32:
        stacked = stacked.t().contiguous().t()
    first = 0
    for linear in linears:
        rows = linear.weight.shape[0]
        linear.weight = torch.nn.Parameter(stacked[first : first + rows], requires_grad=False)
        first += rows
    biases = [linear.bias for linear in linears if linear.bias is not None]
    bias = torch.nn.Parameter(torch.cat(biases), requires_grad=False) if biases else None
    return from_weight(torch.nn.Parameter(stacked, requires_grad=False), bias)
