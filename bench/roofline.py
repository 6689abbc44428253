"""Write docs/roofline.md: what every kernel must read and write, the floor that sets, and what is measured of it.

Pure but for building the benchmark's subjects on a device without memory.  Called by docs/generate.py.
"""

from __future__ import annotations

from typing import Any

import torch

from bench.kernel_subjects import subjects
from bench.subject import Subject

# NVIDIA's data sheet of the H200 SXM: memory at 4.8 TB/s; bfloat16 at 1,979 TFLOP/s with sparsity, so 989 without.
PEAK_BYTES_PER_S, PEAK_FLOP_PER_S = 4.8e12, 989e12
# What a copy, and a product of two large matrices, are assumed to reach of these: nine tenths, and four fifths.
COPY_BYTES_PER_S = 4.3e12  # reads and writes counted
MATMUL_FLOP_PER_S = 790e12
GROUPS = ("sampler", "cuts", "attention", "layers", "loss", "merge")
COMPILE_COMMAND = "python -m bench.kernels --compile-only --json bench/results/compiled.json"
_INTRO = """
# Roofline of the GPU kernels
A kernel can be no faster than the slowest of three: its bytes at the bandwidth of memory, its operations at the
speed of the matrix units, its launches at what a launch costs. `python -m bench.kernels` measures these three and
every kernel in the same process, over as many copies of the inputs as it takes to leave the caches, and gives each
kernel's floor as a fraction of its time. `make bench-gpu` runs it together with the end-to-end benchmark.

What each kernel reads and writes, and how:
- **Verify sampler** (`kernels/gpu/sampler.py`, `stream.py`, `records.py`, `recovery.py`): every logit once. One pass
  finds, a range of the vocabulary at a time, the largest logit, the sum of exponentials, the token that wins with its
  noise, and the largest of every 128 neighbours; a second kernel adds the ranges up, walks each request's drafted
  tokens, and takes the recorded top tokens from the blocks with the largest maxima. Under the maximal coupling the
  draft's logits are read once as well, and the one rejected row of a request twice.
- **Cuts** (`kernels/gpu/cuts.py`): top-k, top-p and min-p are one number a row, the smallest logit that stays.
- **Attention** (`kernels/gpu/attention.py`): keys and values of a request once a key head, whatever the number of
  drafted tokens: all queries of a request that share a key are one tile. So verifying should cost what decoding does.
- **Layers** (`norm.py`, `activation.py`, `rope_cache.py`): a few kilobytes a token; at decoding sizes they cost their
  launch, and count by how many there are. A layer of a model has four: two norms, one rotation, one activation. Beside
  them it launches attention, one or two, and four products.
- **Sparse loss** (`sparse_loss.py`): logits of a chunk are written by one product, turned into their gradient in
  place, and read by the next; a full-width float32 buffer is never made.
- **LoRA merge** (`lora_merge.py`): the pristine weights once, the merged ones once.
"""

_COPIES = f"copies at {COPY_BYTES_PER_S / 1e12:g} TB/s ({COPY_BYTES_PER_S / PEAK_BYTES_PER_S:.0%} of the data sheet's "
_COPIES += f"{PEAK_BYTES_PER_S / 1e12:g})"
_PRODUCTS = f"products at {MATMUL_FLOP_PER_S / 1e12:.0f} TFLOP/s ({MATMUL_FLOP_PER_S / PEAK_FLOP_PER_S:.0%} of its "
_PRODUCTS += f"{PEAK_FLOP_PER_S / 1e12:.0f}, dense bfloat16)"
_UNMEASURED = f"""
**No GPU has been measured yet.** The kernels equal their references in Triton's interpreter and compile for Hopper
(below); what they take there, and which gates they pass, is open. Floors are computed, launches left out, from what
an H200 is **assumed to reach**: {_COPIES},
{_PRODUCTS}. No program reaches the data sheet; how near one comes is our
guess. A run on the device measures both and takes those instead. Source: NVIDIA's data sheet of the H200 SXM.
"""


def page(measured: list[dict[str, Any]], compiled: dict[str, Any] | None) -> str:
    """Return the page.

    Args:
        measured: results of `bench.kernels`, one a GPU.
        compiled: the result of its `--compile-only`.
    """
    parts = [_INTRO.lstrip()]
    if not measured:
        parts.append(_UNMEASURED)
        parts += ["\n## Floors\n", "![floors of the kernels](img/roofline.svg)\n\n", _floors()]
    for result in measured:
        picture = "![measured times over the floors](img/roofline.svg)\n\n" if result is measured[-1] else ""
        parts += [f"\n## {result['machine']['gpu']}\n", picture, _measured(result)]
    parts += ["\n## What the compiler makes of them\n", _compiled(compiled)]
    return "".join(parts)


def floor_us(subject: Subject) -> float:
    """The least microseconds an H200 is assumed to need, launches left out."""
    return 1e6 * max(subject.bytes / COPY_BYTES_PER_S, subject.flops / MATMUL_FLOP_PER_S)


def _floors() -> str:
    lines = ["| kernel | shape | megabytes | bound by | floor, µs |", "|---|---|--:|---|--:|"]
    for subject in subjects(GROUPS, torch.device("meta")):
        if subject.kernel == "verify sampler" and not subject.shape["top_k"]:
            continue  # the same bytes as with records
        bound = "memory" if subject.bytes / COPY_BYTES_PER_S > subject.flops / MATMUL_FLOP_PER_S else "matrix units"
        lines.append(
            f"| {subject.kernel} | {_shape(subject.shape)} | {subject.bytes / 1e6:.3g} | {bound} | "
            f"{floor_us(subject):.3g} |"
        )
    return "\n".join(lines) + "\n"


def _measured(result: dict[str, Any]) -> str:
    each = {name: _span(result["ceilings"], name) for name in ("copy_tb_per_s", "matmul_tflop_per_s", "launch_us")}
    lines = [
        f"`{result['command']}` at {result['commit']}: copies {each['copy_tb_per_s']} TB/s, products "
        f"{each['matmul_tflop_per_s']} TFLOP/s, a launch in a graph {each['launch_us']} µs. Each group of kernels runs "
        "in a process that measures these for itself.\n",
        "| kernel | shape | ms | floor, ms | of the floor | reference, ms | peers, ms | gate |",
        "|---|---|--:|--:|--:|--:|---|---|",
    ]
    for row in result["rows"]:
        peers = ", ".join(f"{name} {value}" for name, value in row["peers"].items() if isinstance(value, float))
        gate = row["gate"]
        verdict = "" if gate is None or gate["passed"] is None else ("✓ " if gate["passed"] else "✗ ") + gate["name"]
        lines.append(
            f"| {row['kernel']} | {_shape(row['shape'])} | {row['ms']} | {row['floor_ms']} | "
            f"{row['fraction_of_floor']:.0%} | {row['reference_ms'] or '–'} | {peers or '–'} | {verdict} |"
        )
    missing = [f"- {item['kernel']} {_shape(item['shape'])}: {item['reason']}" for item in result["left_out"]]
    return "\n".join([*lines, *(["\nNot measured:", *missing] if missing else [])]) + "\n"


def _span(ceilings: dict[str, dict[str, float]], name: str) -> str:
    """Return the smallest and the largest that the groups measured."""
    found = [item[name] for item in ceilings.values()]
    return f"{min(found)}" if min(found) == max(found) else f"{min(found)}–{max(found)}"


def _compiled(result: dict[str, Any] | None) -> str:
    if result is None:
        return f"Not kept yet: `{COMPILE_COMMAND}`.\n"
    lines = [
        f"`{COMPILE_COMMAND}` with Triton {result['versions'].get('triton')}, compute capability 9.0; the largest "
        "figure over each module's specialisations. A register that spills goes through memory and back.\n",
        "| module | specialisations | registers a thread | spilled bytes a thread | shared bytes a program |",
        "|---|--:|--:|--:|--:|",
    ]
    modules = sorted({row["module"] for row in result["rows"]})
    for module in modules:
        rows = [row for row in result["rows"] if row["module"] == module]
        most = {name: max(row[name] for row in rows) for name in ("registers", "spilled_bytes", "shared_bytes")}
        lines.append(
            f"| {module} | {len(rows)} | {most['registers']} | {most['spilled_bytes']} | {most['shared_bytes']} |"
        )
    return "\n".join(lines) + "\n"


def _shape(shape: dict[str, Any]) -> str:
    return ", ".join(f"{name} {value}" for name, value in shape.items())
