"""Call the C kernels on torch's memory: one product, or all layers of a model.

Nothing here copies a tensor; what a structure points into is kept alive by the object that holds it.
"""

from __future__ import annotations

import ctypes
from dataclasses import dataclass

import torch

from kernels.cpu.library import load
from kernels.cpu.packing import PackedWeight
from kernels.cpu.structures import BatchStruct, LayerStruct, ModelStruct, format_of, matrix_of, pointers

_ALONE_MACS = 1 << 20  # products below which a second thread does not pay: about 30 microseconds
HEAD_DIMS = (16, 32, 64, 96, 128, 256)


@dataclass(frozen=True, slots=True)
class Norm:
    """Root mean square norm: weight [dim] float32 and epsilon."""

    weight: torch.Tensor
    epsilon: float


@dataclass(frozen=True, slots=True)
class Layer:
    """Parts of one layer; head_norm's weight is [heads + kv_heads, dim]."""

    input_norm: Norm
    qkv: PackedWeight
    head_norm: Norm | None
    output: PackedWeight
    mlp_norm: Norm
    gate_up: PackedWeight
    down: PackedWeight
    scaling: float


@dataclass(frozen=True, slots=True)
class Batch:
    """New tokens of several requests, and where their caches lie.

    Shapes: positions, slots [tokens] int64; requests [tokens] int32, rows of tables [requests, width] int32;
    wanted [rows] int64 indices of tokens; keys and values one tensor [slots, kv_heads, dim] a layer.
    """

    positions: torch.Tensor
    slots: torch.Tensor
    requests: torch.Tensor
    tables: torch.Tensor
    wanted: torch.Tensor
    keys: list[torch.Tensor]
    values: list[torch.Tensor]
    block_tokens: int
    longest: int  # largest position + 1


def linear(x: torch.Tensor, weight: PackedWeight) -> torch.Tensor:
    """Return x Wᵀ + b.  Shapes: x [..., inputs]; result [..., outputs] in x's dtype, summed in float32."""
    rows = x.float().reshape(-1, weight.inputs).contiguous()
    out = torch.empty(len(rows), weight.outputs, dtype=torch.float32)
    matrix = matrix_of(weight)
    threads = threads_for(len(rows) * weight.outputs * weight.inputs)
    load().linear(ctypes.byref(matrix), rows.data_ptr(), out.data_ptr(), len(rows), threads)
    return out.to(x.dtype).view(*x.shape[:-1], weight.outputs)


class Layers:
    """All layers of a Llama-shaped model, ready to be called; several threads may do so at once.

    `structure` is what the C code reads, `macs` the multiplications that a token costs.

    Args:
        norm: the final one.
        heads: of queries.
        kv_heads: of keys and values.
        dim: of a head, one of `HEAD_DIMS`.
    """

    def __init__(self, layers: list[Layer], norm: Norm, *, heads: int, kv_heads: int, dim: int) -> None:
        hidden, ffn = len(norm.weight), layers[0].down.inputs
        _check_layers(layers, hidden, ffn, heads, kv_heads, dim)
        self._kept = (layers, norm)  # what the structures below point into
        self.macs = sum(
            part.outputs * part.inputs for item in layers for part in (item.qkv, item.output, item.gate_up, item.down)
        )
        self._array = (LayerStruct * len(layers))(*[_layer(item) for item in layers])
        self.structure = ModelStruct(
            ctypes.addressof(self._array), norm.weight.data_ptr(), norm.epsilon, len(layers), hidden, heads, kv_heads,
            dim, ffn,
        )  # fmt: skip
        self._library = load()

    def states(self, x: torch.Tensor, batch: Batch, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
        """Write the caches of the new tokens and return the normed states of the wanted ones.

        Shapes: x [tokens, hidden] float32, overwritten; cos and sin [positions, dim] float32, the sines' first
        half negated; result [wanted, hidden].
        """
        _check_step(self.structure, x, batch, cos, sin)
        keys, values = pointers(batch.keys), pointers(batch.values)
        arguments = BatchStruct(
            batch.positions.data_ptr(), batch.slots.data_ptr(), batch.requests.data_ptr(), batch.tables.data_ptr(),
            batch.wanted.data_ptr(), cos.data_ptr(), sin.data_ptr(), ctypes.addressof(keys), ctypes.addressof(values),
            len(x), batch.tables.shape[1], len(batch.wanted), batch.longest, batch.block_tokens,
            format_of(batch.keys[0]),
        )  # fmt: skip
        threads = threads_for(len(x) * self.macs)
        model, given = ctypes.byref(self.structure), ctypes.byref(arguments)
        scratch = torch.empty(self._library.llama_scratch(model, given, threads), dtype=torch.float32)
        self._library.llama_states(model, given, x.data_ptr(), scratch.data_ptr(), threads)
        return x[: len(batch.wanted)]


def threads_for(macs: int) -> int:
    """How many threads to compute with: one where waking the others takes longer."""
    return torch.get_num_threads() if macs >= _ALONE_MACS else 1


def _check_layers(layers: list[Layer], hidden: int, ffn: int, heads: int, kv_heads: int, dim: int) -> None:
    """Refuse what the C code would read as something else."""
    shapes = {"qkv": ((heads + 2 * kv_heads) * dim, hidden), "output": (hidden, heads * dim)}
    shapes |= {"gate_up": (2 * ffn, hidden), "down": (hidden, ffn)}
    for layer in layers:
        for name, shape in shapes.items():
            weight: PackedWeight = getattr(layer, name)
            if (weight.outputs, weight.inputs) != shape:
                raise ValueError(f"{name} is [{weight.outputs}, {weight.inputs}]; this model's are {list(shape)}")
        for norm in (layer.input_norm, layer.mlp_norm, layer.head_norm):
            if norm is not None and (norm.weight.dtype != torch.float32 or not norm.weight.is_contiguous()):
                raise ValueError("weights of norms must be contiguous float32")
    if dim not in HEAD_DIMS or heads % kv_heads:
        raise ValueError(f"{heads} heads of {dim} over {kv_heads}: heads of {HEAD_DIMS} that divide evenly are known")


def _check_step(model: ModelStruct, x: torch.Tensor, batch: Batch, cos: torch.Tensor, sin: torch.Tensor) -> None:
    """Refuse what the C code would read as something else."""
    tokens, dim = len(x), model.dim
    long, short = (batch.positions, batch.slots, batch.wanted), (batch.requests, batch.tables)
    caches = (batch.keys[0], batch.values[0], batch.keys[-1], batch.values[-1])
    kind = caches[0].dtype
    if not (
        all(item.dtype == torch.int64 and item.is_contiguous() for item in long)
        and all(item.dtype == torch.int32 and item.is_contiguous() for item in short)
        and len(batch.positions) == len(batch.slots) == len(batch.requests) == tokens >= len(batch.wanted)
        and x.dtype == cos.dtype == sin.dtype == torch.float32
        and x.is_contiguous() and cos.is_contiguous() and sin.is_contiguous()
        and x.shape[1] == model.hidden and cos.shape[1] == sin.shape[1] == dim
        and len(cos) >= batch.longest and len(sin) >= batch.longest
        and len(batch.keys) == len(batch.values) == model.num_layers and kind in (torch.float32, torch.bfloat16)
        and all(item.dtype == kind and item.shape[1:] == (model.kv_heads, dim) for item in caches)
    ):  # fmt: skip
        raise ValueError("a step's tensors do not have the shapes and types that Batch and Layers.states document")


def _layer(layer: Layer) -> LayerStruct:
    head = layer.head_norm
    return LayerStruct(
        matrix_of(layer.qkv), matrix_of(layer.output), matrix_of(layer.gate_up), matrix_of(layer.down),
        layer.input_norm.weight.data_ptr(), layer.mlp_norm.weight.data_ptr(),
        None if head is None else head.weight.data_ptr(), layer.input_norm.epsilon,
        0.0 if head is None else head.epsilon, layer.mlp_norm.epsilon, layer.scaling,
    )  # fmt: skip
