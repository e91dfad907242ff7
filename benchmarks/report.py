"""Say what was measured: JSON for machines, a Markdown table for people, and whether the goals are met."""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from dataclasses import asdict
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from benchmarks.cases import CASES
from benchmarks.goals import agrees, verdicts
from benchmarks.machine import hardware, heap, in_words, versions
from benchmarks.measure import Entry, Plan

SCHEMA = 2
NAMES = {
    "full": "full batch",
    "loop": "hand-written loop",
    "trimmed": "loop that trims",
    "microbatch": "**microbatch**",
    "accelerate": "Accelerate",
    "fabric": "Lightning Fabric",
    "trainer": "Transformers Trainer",
}


def as_record(entries: Sequence[Entry], plan: Plan, *, missing: Iterable[str]) -> dict[str, Any]:
    """Return everything that was measured, and on what, as plain values.

    Args:
        entries: What was measured.
        plan: How.
        missing: Contenders that are not installed.

    Returns:
        What `write` writes as JSON.
    """
    return {
        "schema": SCHEMA,
        "date": datetime.now(UTC).date().isoformat(),
        "hardware": hardware(plan.device),
        "versions": versions(),
        "plan": asdict(plan),
        "not_installed": sorted(missing),
        "cases": {name: CASES[name].describe for name in dict.fromkeys(each.case for each in entries)},
        "entries": [asdict(each) for each in entries],
        "verdicts": [asdict(each) for each in verdicts(entries)],
    }


def as_markdown(entries: Sequence[Entry], record: dict[str, Any]) -> str:
    """Return the tables.

    Args:
        entries: What was measured.
        record: What `as_record` made of it.

    Returns:
        Markdown.
    """
    plan = record["plan"]
    machine = in_words(record["hardware"])
    lines = [
        "# Measured",
        "",
        f"{record['date']}; {machine}; {plan['threads']} threads on {plan['device']}.",
        f"Heap: {heap(kept=plan['kept_heap'])}. Processes of each contender: {plan['processes']}.",
        "; ".join(f"{name} {version}" for name, version in record["versions"].items()) + ".",
        "",
        "A `~` marks times during which another job was running, as their interquartile range or the machine says:",
        "they decide nothing.",
    ]
    for case, describe in record["cases"].items():
        mine = [each for each in entries if each.case == case]
        lines += ["", f"## {case}: {describe}; batch {mine[0].batch_size}", "", *_table(mine)]
    lines += ["", "## Goals", "", "| case | microbatch | goal | measured | |", "|---|---|---|---|---|"]
    lines += [
        f"| {each['case']} | {each['microbatch_size']} | {each['goal']} | {each['measured']} | {each['verdict']} |"
        for each in record["verdicts"]
    ]
    return "\n".join(lines) + "\n"


def write(record: dict[str, Any], markdown: str, out: Path) -> None:
    """Write both forms beside one another.

    Args:
        record: What was measured.
        markdown: The same, for people.
        out: Where, without suffix.
    """
    out.parent.mkdir(parents=True, exist_ok=True)
    out.with_suffix(".json").write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")
    out.with_suffix(".md").write_text(markdown, encoding="utf-8")


def line(entry: Entry) -> str:
    """Return one entry as a line for the terminal."""
    name = NAMES[entry.contender].strip("*")
    return f"{entry.case} {entry.microbatch_size:>3}  {name:<21}" + "  ".join(f"{cell:>12}" for cell in _cells(entry))


def _table(entries: Sequence[Entry]) -> list[str]:
    head = [
        "microbatch",
        "contender",
        "window",
        "against loop",
        "against full",
        "of matmul",
        "peak memory",
        "resident",
        "gradient",
    ]
    lines = [f"| {' | '.join(head)} |", "|" + "---|" * len(head)]
    for entry in entries:
        cells = [str(entry.microbatch_size), NAMES[entry.contender], *_cells(entry)]
        lines.append(f"| {' | '.join(cells)} |")
    return lines


def _cells(entry: Entry) -> list[str]:
    mark = "~" if entry.noisy else ""
    different = "" if agrees(entry) else " differs"
    full = f"{mark}{entry.against_full.median:.3f}" if entry.against_full else "-"
    return [
        f"{mark}{_seconds(entry.time.median)} ± {entry.time.spread / 2:.1%}",
        f"{mark}{entry.against_loop.median:.3f}",
        full,
        f"{mark}{entry.of_limit:.0%}",
        _mebibytes(entry.peak_bytes),
        _mebibytes(entry.rss_bytes),
        f"{entry.gradient_error:.0e}{different}",
    ]


def _seconds(seconds: float) -> str:
    return f"{seconds:.2f} s" if seconds >= 1 else f"{1000 * seconds:.1f} ms"


def _mebibytes(size: int | None) -> str:
    return "-" if size is None else f"{size / 2**20:.1f} MiB"
