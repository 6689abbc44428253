"""Compile kernels for a GPU that is not here, and say what the compiler made of them.

A kernel that spills, or that takes more shared memory than there is, is found on any machine this way.
Triton must not have been imported with TRITON_INTERPRET=1.
"""

from __future__ import annotations

import re
import subprocess
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

HOPPER = 90  # compute capability 9.0, H100 and H200
_RESOURCE = re.compile(r"REG:(\d+) STACK:(\d+) SHARED:(\d+) LOCAL:(\d+)")


@dataclass(frozen=True, slots=True)
class Case:
    """One specialisation of a kernel.

    `types` maps the names of its run-time arguments to Triton's type names ("*bf16", "i32", "fp32");
    `constants` maps its compile-time arguments to their values; a None among them stands for an argument
    that is not given.  `aligned` names arguments known to be multiples of 16, as the launcher sees them.
    """

    name: str
    kernel: Any
    types: Mapping[str, str]
    constants: Mapping[str, Any]
    warps: int = 4
    stages: int = 2
    aligned: tuple[str, ...] = field(default=())


@dataclass(frozen=True, slots=True)
class Resources:
    """What one thread or one program takes: registers a thread, bytes spilled a thread, shared bytes a program."""

    registers: int
    spilled_bytes: int
    shared_bytes: int
    binary_bytes: int


def compile_case(case: Case, capability: int = HOPPER) -> Resources:
    """Compile one case down to machine code.

    Raises:
        triton.CompilationError: it does not compile.
    """
    names = list(case.kernel.arg_names)
    types = {name: case.types.get(name, "constexpr") for name in names}
    constants = {(names.index(name),): value for name, value in case.constants.items()}
    aligned = {(names.index(name),): [["tt.divisibility", 16]] for name in case.aligned}
    source = ASTSource(fn=case.kernel, signature=types, constexprs=constants, attrs=aligned)
    built = triton.compile(
        source, target=GPUTarget("cuda", capability, 32), options={"num_warps": case.warps, "num_stages": case.stages}
    )
    registers, local = _read_resources(built.asm["cubin"])
    return Resources(registers, local, built.metadata.shared, len(built.asm["cubin"]))


def _read_resources(binary: bytes) -> tuple[int, int]:
    """Return registers and bytes of local memory a thread, as the binary itself says."""
    tool = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(binary)
        file.flush()
        command = [str(tool), "--dump-resource-usage", file.name]
        text = subprocess.run(command, check=True, capture_output=True, text=True).stdout
    found = _RESOURCE.search(text)
    if found is None:
        raise RuntimeError(f"cuobjdump does not say what the kernel takes: {text[:500]!r}")
    return int(found[1]), int(found[2]) + int(found[4])
