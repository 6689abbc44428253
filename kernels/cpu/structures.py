"""What the C kernels are given, as ctypes structures: linear.h, llama.h and draft.c field by field."""

from __future__ import annotations

import ctypes
from collections.abc import Sequence

import torch

from kernels.cpu.packing import Format, PackedWeight

POINTER, INT, FLOAT = ctypes.c_void_p, ctypes.c_int32, ctypes.c_float


class MatrixStruct(ctypes.Structure):
    """A packed weight."""

    _fields_ = [("panels", POINTER), ("bias", POINTER), ("outputs", INT), ("inputs", INT), ("format", INT)]


class LayerStruct(ctypes.Structure):
    """One layer."""

    _fields_ = [
        ("qkv", MatrixStruct), ("output", MatrixStruct), ("gate_up", MatrixStruct), ("down", MatrixStruct),
        ("input_norm", POINTER), ("mlp_norm", POINTER), ("head_norm", POINTER),
        ("input_epsilon", FLOAT), ("head_epsilon", FLOAT), ("mlp_epsilon", FLOAT), ("scaling", FLOAT),
    ]  # fmt: skip


class ModelStruct(ctypes.Structure):
    """All layers of a model."""

    _fields_ = [
        ("layers", POINTER), ("norm", POINTER), ("epsilon", FLOAT), ("num_layers", INT), ("hidden", INT),
        ("heads", INT), ("kv_heads", INT), ("dim", INT), ("ffn", INT),
    ]  # fmt: skip


class BatchStruct(ctypes.Structure):
    """The new tokens of a forward."""

    _fields_ = [
        ("positions", POINTER), ("slots", POINTER), ("requests", POINTER), ("tables", POINTER),
        ("wanted", POINTER), ("cos", POINTER), ("sin", POINTER), ("keys", POINTER), ("values", POINTER),
        ("tokens", INT), ("width", INT), ("num_wanted", INT), ("longest", INT), ("block_tokens", INT),
        ("cache_format", INT),
    ]  # fmt: skip


class ScorerStruct(ctypes.Structure):
    """Embedding and head of a draft model."""

    _fields_ = [
        ("head", MatrixStruct), ("embedding", POINTER), ("token_ids", POINTER), ("embedding_format", INT),
        ("columns", INT), ("vocabulary", INT),
    ]  # fmt: skip


class DraftingStruct(ctypes.Structure):
    """What a round reads and drafts."""

    _fields_ = [
        ("tokens", POINTER), ("starts", POINTER), ("reads", POINTER), ("gammas", POINTER), ("tables", POINTER),
        ("temperatures", POINTER), ("seeds", POINTER), ("cos", POINTER), ("sin", POINTER), ("keys", POINTER),
        ("values", POINTER), ("drafted", POINTER), ("log_probs", POINTER), ("totals", POINTER),
        ("requests", INT), ("width", INT), ("most", INT), ("read", INT), ("longest", INT), ("blocks", INT),
        ("block_tokens", INT), ("cache_format", INT), ("purpose", INT),
    ]  # fmt: skip


def matrix_of(weight: PackedWeight) -> MatrixStruct:
    """Point to a packed weight."""
    bias = None if weight.bias is None else weight.bias.data_ptr()
    return MatrixStruct(weight.panels.data_ptr(), bias, weight.outputs, weight.inputs, weight.format)


def pointers(tensors: Sequence[torch.Tensor]) -> ctypes.Array[ctypes.c_void_p]:
    """Point to each tensor's memory."""
    return (POINTER * len(tensors))(*[item.data_ptr() for item in tensors])


def format_of(stored: torch.Tensor) -> Format:
    """How a float32 or bfloat16 tensor's numbers are stored."""
    return Format.BFLOAT16 if stored.dtype == torch.bfloat16 else Format.FLOAT32
