"""Write docs/benchmarks.md from the kept results; where one is missing, say which command makes it.

Pure: results in, text out.  Called by docs/generate.py.
"""

from __future__ import annotations

import statistics
from collections.abc import Iterable
from typing import Any

from bench.runs import merge

ENGINE_COMMAND = "python -m bench.engine --json bench/results/engine.json"
RECORD_COMMAND = "python -m bench.record --json bench/results/record.json"
LOAD_COMMAND = "python -m bench.load --guidellm $(GUIDELLM) --json bench/results/load.json"
PLOT_COMMAND = "python -m bench.plot"
PICTURE = "docs/img/speedup.svg"

_ARMS = ("none", "fixed-1", "fixed-3", "fixed-5", "adaptive", "hf_generate", "hf_assisted", "vllm", "vllm-ngram")
_PROMISES: dict[str, tuple[str, float | None]] = {  # ratio -> what it is, and what it should be
    "adaptive_vs_best": ("adaptive against the better of no speculation and the best fixed length, worst row", 0.97),
    "adaptive_vs_none": ("adaptive against no speculation, batch 1, `high`, target widened 2x", 1.5),
    "none_vs_hf_generate": ("no speculation against transformers' `generate`, batch 1, worst row", 1.3),
    "none_8": ("no speculation at batch 8 against `generate` one request after another, worst row", 3.0),
    "fixed3_vs_hf_assisted": ("three drafted tokens against transformers' assisted generation, worst row", 1.3),
    "prefix_cache": ("prefix cache on against off, shared passages, worst row", 2.0),
    "adaptive_vs_vllm": ("adaptive against the faster of vLLM plain and vLLM with n-gram speculation, worst row", None),
    "none_vs_vllm": ("no speculation against vLLM plain, worst row", None),
}
_INTRO = """
# Benchmarks
Speed is that of all requests together, in tokens a second, while the whole batch decodes; prompts are read before
the clock starts, except in the set with shared passages, where reading is the point. A row is the median over
repeats; ± is half the range over repeats. Arms follow each other in every repeat, and ratios are taken repeat by
repeat, so that a slow minute of the machine hits both sides. Where the rival is the best of several arms, each repeat's
is the one that was fastest in the other repeats: luck must not choose it. Measure on an idle machine.

`high` copies and lists, `low` is free prose, `mixed` deals both in turn. `none` is no speculation, `fixed-3` three
drafted tokens of the draft model a round, `adaptive` what the server does by itself, matches in a request's own text
included: most of its lead on `high` and `mixed` comes from those. A target widened n times says the same words at
about n² times the cost of a forward, so it stands in for a larger model with an acceptance that is real. Text is
greedy unless a temperature is given. Prompts are made up from a seed; `--data FOLDER` takes your own.

`vllm` and `vllm-ngram` are vLLM's CPU build on the same target, prompts and cores, from an environment of its own
(`--vllm-python`): plain, and with its n-gram speculation as its manual shows it. Its threads wait as it likes.

Our arms read weights in the shortest form that says them exactly ([0010](adr/0010-compiled-cpu-kernels.md)). The
checkpoint of the default target is blocks of 4 and 8 bits, 96 MB a step; the others read it expanded to their dtype.
"""


def page(
    engine: list[dict[str, Any]], record: dict[str, Any] | None, load: dict[str, Any] | None, *, picture: bool
) -> str:
    """Return the page.

    Args:
        engine: runs of `bench.engine`, as `bench.runs.kept` finds them.
        picture: whether docs/img/speedup.svg is there.
    """
    parts = [_INTRO]
    if not engine:
        parts.append(f"## The engine\nNot measured yet: `{ENGINE_COMMAND}` (`make bench`) writes the figures.\n")
    else:
        result = merge(engine)
        parts += [_promises(result), _plot(picture), *_tables(result)]
    parts += [_record(record), _load(load)]
    return "\n".join(parts)


def _promises(result: dict[str, Any]) -> str:
    runs = "\n".join(f"{_where(run)}\n" for run in result["runs"])
    several = "Of a group that several runs measured, the figures are those of the one with most arms, then repeats."
    lines = ["## What is promised, and what was measured", runs, *([f"{several}\n"] if len(result["runs"]) > 1 else []),
             "| ratio | promised | measured [range over repeats] | row |", "|---|---|---|---|"]  # fmt: skip
    for name, (words, least) in _PROMISES.items():
        item = _worst(name, result["ratios"])
        promised = "" if least is None else f"≥ {least:g}"
        if item is None:
            lines.append(f"| {words} | {promised} | not measured | |")
            continue
        about = f"`{item['workload']}`, batch {item['batch']}, widened {item['widen']}x, against {item['against']}"
        lines.append(f"| {words} | {promised} | {item['ratio']:.2f} {_range(item)} | {about} |")
        if name in ("adaptive_vs_best", "adaptive_vs_vllm"):
            lines += _means(result["ratios"][name])
        if name == "adaptive_vs_best" and least is not None:
            lines.append(_below(result["ratios"][name], least))
    return "\n".join(lines) + "\n"


def _means(ratios: list[dict[str, Any]]) -> list[str]:
    """Rows of the promises' table with one figure a workload: a worst row is mostly chance where repeats are few."""
    lines = []
    for workload in dict.fromkeys(item["workload"] for item in ratios):
        values = [item["ratio"] for item in ratios if item["workload"] == workload]
        mean = statistics.geometric_mean(values)
        shown = f"{mean:.2f}, rows from {min(values):.2f} to {max(values):.2f}"
        lines.append(f"| the same, geometric mean of the rows of `{workload}` | | {shown} | {len(values)} rows |")
    return lines


def _below(ratios: list[dict[str, Any]], least: float) -> str:
    """A row of the promises' table with those that are too low whatever the repeat: too many to be chance."""
    repeated = [item for item in ratios if item["repeats"] > 1]
    low = [item for item in repeated if item["high"] < least]
    about = "; ".join(f"`{item['workload']}`, batch {item['batch']}, widened {item['widen']}x" for item in low)
    return f"| rows below {least:g} in every repeat | 0 | {len(low)} of {len(repeated)} | {about} |"


def _worst(name: str, ratios: dict[str, list[dict[str, Any]]]) -> dict[str, Any] | None:
    items: Iterable[dict[str, Any]] = ratios.get("none_vs_hf_generate" if name == "none_8" else name, [])
    if name == "adaptive_vs_none":
        items = [item for item in items if (item["widen"], item["batch"], item["workload"]) == (2, 1, "high")]
        items = [item for item in items if item["temperature"] == 0]
    if name in ("none_8", "none_vs_hf_generate"):
        items = [item for item in items if item["batch"] == (8 if name == "none_8" else 1)]
    return min(items, key=lambda item: float(item["ratio"]), default=None)


def _plot(picture: bool) -> str:
    if picture:
        return "![Speed-up over no speculation by batch size, one line an arm](img/speedup.svg)\n"
    return f"`{PLOT_COMMAND}` draws the speed-up against batch size.\n"


def _tables(result: dict[str, Any]) -> list[str]:
    rows = result["rows"]
    parts = []
    plain = [row for row in rows if row["temperature"] == 0 and row["workload"] != "rag"]
    for widen in sorted({row["widen"] for row in plain}):
        parts.append(_speeds(f"Tokens a second, target widened {widen}x", [r for r in plain if r["widen"] == widen]))
    parts.append(_details([row for row in rows if row["workload"] != "rag"]))
    if shared := [row for row in rows if row["workload"] == "rag"]:
        lines = [
            "## Shared passages",
            "| arm | batch | prefix cache | tokens/s | first token, ms |",
            "|---|---|---|---|---|",
        ]
        lines += [
            f"| {row['arm']} | {row['batch']} | {'on' if row['prefix_cache'] else 'off'} | {_speed(row)} | "
            f"{row['ttft_ms_p50']:.0f} |" for row in shared
        ]  # fmt: skip
        parts.append("\n".join(lines) + "\n")
    return parts


def _speeds(title: str, rows: list[dict[str, Any]]) -> str:
    arms = [arm for arm in _ARMS if any(row["arm"] == arm for row in rows)]
    lines = [f"## {title}", "| workload | batch | " + " | ".join(arms) + " |", "|---" * (len(arms) + 2) + "|"]
    table = {(row["workload"], row["batch"], row["arm"]): row for row in rows}
    for workload, batch in dict.fromkeys((row["workload"], row["batch"]) for row in rows):
        cells = [_speed(table[key]) if (key := (workload, batch, arm)) in table else "" for arm in arms]
        lines.append(f"| `{workload}` | {batch} | " + " | ".join(cells) + " |")
    return "\n".join(lines) + "\n"


def _details(rows: list[dict[str, Any]]) -> str:
    """Latency and what speculation did, for no speculation and the adaptive arm."""
    head = "workload | T | coupling | widened | batch | arm | ms a token, p50 / p99 | acceptance | tokens a round | γ"
    lines = ["## Latency and acceptance", f"| {head} |", "|---" * (head.count("|") + 1) + "|"]
    for row in rows:
        if row["arm"] not in ("none", "adaptive", "fixed-3"):
            continue
        acceptance = "–" if row["acceptance"] is None else f"{row['acceptance']:.2f}"
        lines.append(
            f"| `{row['workload']}` | {row['temperature']:g} | {row['coupling']} | {row['widen']}x | {row['batch']} | "
            f"{row['arm']} | {row['tpot_ms_p50']:.1f} / {row['tpot_ms_p99']:.1f} | {acceptance} | "
            f"{row['tokens_per_round']:.2f} | {row['gamma_mean']:.2f} |"
        )
    return "\n".join(lines) + "\n"


def _record(result: dict[str, Any] | None) -> str:
    if result is None:
        return f"## Logging\nNot measured yet: `{RECORD_COMMAND}` (`make bench-record`) writes the figures.\n"
    lines = [
        "## Logging", "What the same steps cost more with the log on, written to a Valkey on the same machine.\n"
        f"Promised is at most 1 %.\n{_where(result)}\n",
        "| batch | cost by steps [90 %] | cost by whole windows [90 %] | windows |", "|---|---|---|---|",
    ]  # fmt: skip
    for row in result["rows"]:
        cells = [
            f"{row[p + 'cost']:+.2%} [{row[p + 'low']:+.2%}, {row[p + 'high']:+.2%}]" if p + "cost" in row else "–"
            for p in ("", "windows_")
        ]
        lines.append(f"| {row['batch']} | {cells[0]} | {cells[1]} | {row['pairs']} on, {row['pairs']} off |")
    return "\n".join(lines) + "\n"


def _load(result: dict[str, Any] | None) -> str:
    if result is None:
        return "## An independent load generator\nNot run yet: `make bench-load GUIDELLM=PATH` compares token counts.\n"
    lines = [
        "## An independent load generator",
        f"guidellm {result['rows'][0]['guidellm']}, unmodified and in an environment of its own, {result['streams']} "
        f"requests at once with random words; its counts beside the server's own.\n{_where(result)}\n",
        "| endpoint | requests | failed | prompt tokens | answer tokens | equal | tokens/s | first token, ms | "
        "between tokens, ms |", "|---" * 9 + "|",
    ]  # fmt: skip
    for row in result["rows"]:
        counts = [f"{row[p]['guidellm']} / {row[p]['server']}" for p in ("prompt_tokens", "output_tokens")]
        lines.append(
            f"| `{row['endpoint']}` | {row['requests']['guidellm']} / {row['requests']['server']} | {row['failed']} | "
            f"{counts[0]} | {counts[1]} | {'yes' if row['equal'] else '**no**'} | {row['output_tokens_per_s']:.1f} | "
            f"{row['ttft_ms_p50']:.0f} | {row['itl_ms_p50']:.1f} |"
        )
    return "\n".join(lines) + "\n"


def _dtypes(result: dict[str, Any]) -> str:
    rivals = result.get("rivals_dtype", result["dtype"])
    return result["dtype"] if rivals == result["dtype"] else f"{result['dtype']} (hf and vLLM {rivals})"


def _where(result: dict[str, Any]) -> str:
    machine, versions = result["machine"], result["versions"]
    vllm = f"vLLM {versions['vllm']}, " if "vllm" in versions else ""
    reduced = [f"{name}: {phase['reduced']}" for name, phase in result.get("phases", {}).items() if "reduced" in phase]
    return (
        f"`{result['command']}` on {machine['cpu']}, {machine['cores']} cores, {machine['memory_gib']:g} GiB, "
        f"{machine.get('gpu') or 'no GPU'}; "
        f"{result['target']}, {_dtypes(result)}, torch {versions['torch']}, transformers {versions['transformers']}, "
        f"{vllm}commit {(result['commit'] or 'unknown')[:7]}." + "".join(f" {line}." for line in reduced)
    )


def _speed(row: dict[str, Any]) -> str:
    if row["repeats"] == 1:
        return f"{row['tokens_per_s']:.1f}"
    half = row["tokens_per_s"] * row["repeat_spread"] / 2
    return f"{row['tokens_per_s']:.1f} ± {half:.1f}"


def _range(item: dict[str, Any]) -> str:
    return "(one repeat)" if item["repeats"] == 1 else f"[{item['low']:.2f}, {item['high']:.2f}]"
