"""Apply the edits of findings to a source, and show them as a unified diff of the user's own lines."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import replace
from difflib import unified_diff

from microbatch.linting.finding import Edit, Finding
from microbatch.linting.sources import Source

__all__ = ["apply_edits", "file_diff", "fitting", "fragment"]


def fitting(findings: Iterable[Finding]) -> list[Finding]:
    """Return the findings whose edits can be applied together: all edits of one, or none. The first in line wins."""
    taken, chosen = list[Edit](), list[Finding]()
    for finding in findings:
        if finding.edits and not any(_overlap(new, old) for new in finding.edits for old in taken):
            taken += finding.edits
            chosen.append(finding)
    return chosen


def apply_edits(text: str, edits: Iterable[Edit]) -> str:
    """Apply edits that do not overlap.

    Args:
        text: The source.
        edits: Edits in lines of the text, in any order. Insertions before one line keep their order.

    Returns:
        The new source.
    """
    lines = text.split("\n")
    ordered = sorted(enumerate(edits), key=lambda pair: (pair[1].first, pair[1].last, pair[0]))
    for _, edit in reversed(ordered):
        new = edit.text.removesuffix("\n").split("\n") if edit.text else []
        lines[max(edit.first - 1, 0) : max(edit.last, edit.first - 1, 0)] = new
    return "\n".join(lines)


def fragment(source: Source, finding: Finding, *, context: int = 1) -> list[str]:
    """Show the edits of one finding as the lines of a unified diff, without its header.

    Args:
        source: The source.
        finding: The finding, whose edits are in lines of the source's text.
        context: Lines shown around each change.

    Returns:
        The lines; none where the finding has no edits.
    """
    old, new = source.lines, apply_edits(source.text, finding.edits).split("\n")
    return [line for line in list(unified_diff(old, new, lineterm="", n=context))[2:] if not line.startswith("@@")]


def file_diff(source: Source, edits: Iterable[Edit]) -> str:
    """Show edits as a unified diff that `patch` and `git apply` take; of a notebook, one for each cell.

    A notebook's file holds its cells as JSON, so its diffs are for reading: each names the cell.

    Args:
        source: The source.
        edits: Edits in lines of the source's text that do not overlap.

    Returns:
        The diff; empty where nothing changes.
    """
    edits = list(edits)
    if not source.cells:
        return "".join(_diff(source.text, apply_edits(source.text, edits), source.path, newline=source.newline))
    diffs = list[str]()
    ends = [*(cell.first - 1 for cell in source.cells[1:]), len(source.lines)]
    for cell, end in zip(source.cells, ends, strict=True):
        # A command of IPython is shown as it is written, not as what stands for it while the cell is read.
        old = "\n".join(source.lines[cell.first - 1 : end])
        old = cell.written if cell.written.count("\n") == old.count("\n") else old
        inside = [each for each in edits if cell.first <= each.first <= end]
        moved = [replace(each, first=each.first - cell.first + 1, last=each.last - cell.first + 1) for each in inside]
        diffs += _diff(old, apply_edits(old, moved), f"{source.path}:cell {cell.number}")
    return "".join(diffs)


def _diff(old: str, new: str, path: str, *, newline: str = "\n") -> Iterator[str]:
    if old == new:
        return
    names = f"a/{path}", f"b/{path}"
    header = {f"--- {names[0]}\n", f"+++ {names[1]}\n"}
    for line in unified_diff(_ended(old), _ended(new), *names):
        if not line.endswith("\n"):
            yield f"{line}\n\\ No newline at end of file\n"
        elif line in header or line.startswith("@@"):
            yield line
        else:
            yield line[:-1] + newline


def _ended(text: str) -> list[str]:
    lines = [f"{line}\n" for line in text.split("\n")]
    lines[-1] = lines[-1].removesuffix("\n")
    return lines if lines[-1] else lines[:-1]


def _overlap(one: Edit, other: Edit) -> bool:
    """Return whether two edits change one line; insertions at one place, or beside a change, do not overlap."""
    if one.last < one.first and other.last < other.first:
        return False
    if one.last < one.first:
        return other.first < one.first <= other.last
    if other.last < other.first:
        return one.first < other.first <= one.last
    return one.first <= other.last and other.first <= one.last
