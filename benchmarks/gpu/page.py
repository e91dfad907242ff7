"""The page for people, and the last lines of the terminal."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from datetime import UTC, datetime
from typing import Any

from benchmarks.gpu.outcome import FAILED, NOT_HERE, NOT_REACHED, PASSED, Outcome
from benchmarks.gpu.schedule import MACHINE, PROOFS, SPEED, TESTS, Item

ORDER = (PASSED, FAILED, NOT_HERE, NOT_REACHED)
MOST_FAILURES = 100  # tests that are listed by name


def as_markdown(items: Sequence[Item], found: Mapping[str, Outcome], *, device: str) -> str:
    """Write the page.

    Args:
        items: Everything that was to run.
        found: What became of each, by name.
        device: ``"cuda"`` or ``"cpu"``.

    Returns:
        Markdown.
    """
    parts = {part: [found[each.name] for each in items if each.part == part] for part in (PROOFS, TESTS, SPEED)}
    lines = ["# On a GPU", ""]
    if device == "cpu":
        lines += ["**A dry run on the CPU, with tiny sizes: it proves and measures nothing about a GPU.**", ""]
    facts = found[items[0].name].numbers if items and items[0].part == MACHINE else {}
    lines += [f"{datetime.now(UTC).date().isoformat()}; " + "; ".join(f"{k} {v}" for k, v in facts.items()) + ".", ""]
    lines += ["| | " + " | ".join(ORDER) + " |", "|---|" + "---|" * len(ORDER)]
    for part, outcomes in parts.items():
        count = _test_counts(outcomes) if part == TESTS else Counter(each.status for each in outcomes)
        lines.append(f"| {part} | " + " | ".join(str(count[status]) for status in ORDER) + " |")
    if any(parts[PROOFS]):
        lines += ["", f"## {PROOFS}", "", "| what | status | seconds | found |", "|---|---|---|---|"]
        lines += [
            f"| {_cell(o.item)} | {o.status} | {o.seconds:.1f} | {_cell(o.note or _numbers(o))} |"
            for o in parts[PROOFS]
        ]
    for each in parts[PROOFS]:
        if each.status == FAILED and each.rows:
            lines += ["", f"{each.item}:", "", *(f"- {_cell(str(row))}" for row in each.rows)]
    lines += _tests(parts[TESTS])
    if parts[SPEED]:
        lines += ["", f"## {SPEED}", "", *_speed(parts[SPEED])]
    return "\n".join(lines) + "\n"


def summary_lines(found: Mapping[str, Outcome]) -> list[str]:
    """Return what passed, failed, is not here and was not reached, by name."""
    lines: list[str] = []
    for status in ORDER:
        names = [each.item for each in found.values() if each.status == status]
        if names:
            lines.append(f"{status}, {len(names)}: {', '.join(names)}")
    tests = Counter[str](row["status"] for each in found.values() for row in each.rows if "test" in row)
    if tests:
        lines.append("tests: " + ", ".join(f"{number} {status}" for status, number in tests.items()))
    goals = Counter(row["goal"].split(":")[0] for each in found.values() for row in each.rows if row.get("goal"))
    if goals:
        lines.append("goals of speed: " + ", ".join(f"{number} {verdict}" for verdict, number in goals.items()))
    return lines


def _test_counts(outcomes: Iterable[Outcome]) -> Counter[str]:
    count = Counter[str](row["status"] for each in outcomes for row in each.rows)
    for each in outcomes:
        count[NOT_REACHED] += max(0, each.collected - len(each.rows))
    return count


def _tests(outcomes: Sequence[Outcome]) -> list[str]:
    if not outcomes:
        return []
    lines = ["", f"## {TESTS}", ""]
    for each in outcomes:
        lines += [f"{each.status}, {each.seconds:.0f} s. {_cell(each.note or _numbers(each))}", ""]
        failures = [row for row in each.rows if row["status"] == FAILED]
        lines += [f"- `{row['test']}`: {_cell(row.get('note', ''))}" for row in failures[:MOST_FAILURES]]
        if len(failures) > MOST_FAILURES:
            lines.append(f"- and {len(failures) - MOST_FAILURES} more, in `gpu.jsonl`")
    return lines


def _speed(outcomes: Sequence[Outcome]) -> list[str]:
    lines: list[str] = []
    for each in outcomes:
        lines += [
            f"### {each.item}",
            "",
            f"{each.status}, {each.seconds:.0f} s. {_cell(each.note or _numbers(each))}",
            "",
        ]
        names = list(
            dict.fromkeys(name for row in each.rows for name in row if name not in {"status", "seconds_of_each"})
        )
        if names:
            lines += ["| " + " | ".join(names) + " |", "|" + "---|" * len(names)]
            lines += ["| " + " | ".join(_cell(_plain(row.get(name, ""))) for name in names) + " |" for row in each.rows]
            lines.append("")
    return lines


def _numbers(outcome: Outcome) -> str:
    return ", ".join(f"{name} {_plain(value)}" for name, value in outcome.numbers.items())


def _plain(value: Any) -> str:
    if isinstance(value, float):
        return f"{value:.3g}" if abs(value) < 1e-2 or abs(value) >= 1e4 else f"{value:.3f}"
    return f"{value:,}" if isinstance(value, int) and not isinstance(value, bool) else str(value)


def _cell(text: str) -> str:
    return " ".join(text.replace("|", "\\|").split())[:400]
