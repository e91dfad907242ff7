"""What became of each item, as lines of JSON that every process appends to one file."""

from __future__ import annotations

import json
import os
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeAlias

PASSED, FAILED, NOT_HERE, NOT_REACHED = "passed", "failed", "not here", "not reached"
Numbers: TypeAlias = dict[str, Any]


class NotHereError(Exception):
    """This device, or this build of PyTorch, does not have what an item is about."""


class NotHeldError(Exception):
    """What an item claims is not so."""


def require(held: object, words: str) -> None:
    """Raise an error unless a claim holds.

    Args:
        held: Whether it does.
        words: The claim, with the numbers that were found.

    Raises:
        NotHeldError: It does not.
    """
    if not held:
        raise NotHeldError(words)


@dataclass(frozen=True, slots=True)
class Log:
    """A file of JSON lines. Each line is written at once, so that several processes may write to it.

    Attributes:
        path: The file.
    """

    path: Path

    def write(self, **fields: Any) -> None:
        """Append one line."""
        line = json.dumps(fields, default=str) + "\n"
        where = os.open(self.path, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o644)
        try:
            os.write(where, line.encode())
        finally:
            os.close(where)

    def read(self) -> list[Numbers]:
        """Return all lines so far; a last line that is not whole is left out."""
        if not self.path.exists():
            return []
        whole, _, _ = self.path.read_text(encoding="utf-8", errors="replace").rpartition("\n")
        return [json.loads(line) for line in whole.splitlines()]


@dataclass(slots=True)
class Outcome:
    """What became of one item.

    Attributes:
        item: Its name.
        status: `PASSED`, `FAILED`, `NOT_HERE` or `NOT_REACHED`.
        seconds: How long it took.
        note: Why it failed, or is not here.
        numbers: What it returned.
        rows: What it reported on the way: rows of a table, or single tests.
        collected: Number of tests that pytest found.
    """

    item: str
    status: str = NOT_REACHED
    seconds: float = 0.0
    note: str = ""
    numbers: Numbers = field(default_factory=dict[str, Any])
    rows: list[Numbers] = field(default_factory=list[Numbers])
    collected: int = 0


def outcomes(lines: Iterable[Mapping[str, Any]], items: Iterable[str]) -> dict[str, Outcome]:
    """Return what became of each item; a row that failed makes its item fail.

    Args:
        lines: What `Log.read` returned.
        items: Names of all items, in order.

    Returns:
        Outcomes by name.

    Example:
        >>> lines = [
        ...     {"event": "row", "item": "a", "status": "failed"},
        ...     {"event": "end", "item": "a", "status": "passed"},
        ... ]
        >>> [each.status for each in outcomes(lines, ["a", "b"]).values()]
        ['failed', 'not reached']
    """
    found = {name: Outcome(name) for name in items}
    for line in lines:
        each = found.get(line.get("item", ""))
        if each is None:
            continue
        if line["event"] == "row":
            each.rows.append({name: value for name, value in line.items() if name not in {"event", "item"}})
        elif line["event"] == "collected":
            each.collected += line["collected"]
        elif line["event"] == "end":
            each.status, each.note = line["status"], line.get("note", "")
            each.seconds, each.numbers = line.get("seconds", 0.0), line.get("numbers") or {}
    for each in found.values():
        if any(row.get("status") == FAILED for row in each.rows):
            each.status = FAILED
    return found
