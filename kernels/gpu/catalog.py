"""Every specialisation that the shapes we serve use, of every kernel: what is compiled to know that all of it does."""

from __future__ import annotations

from collections.abc import Iterator
from importlib import import_module

from kernels.gpu.aot import Case

MODULES = ("activation", "attention", "cuts", "lora_merge", "norm", "rope_cache", "sampler", "sparse_loss")


def cases() -> Iterator[tuple[str, Case]]:
    """Yield each case with the name of its module."""
    for name in MODULES:
        for case in import_module(f"kernels.gpu.{name}").cases():
            yield name, case
