"""Findings as text: one line each in the shape of ruff, the lines of the source, and what to know about the fault."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import groupby

from microbatch.linting.edits import fragment
from microbatch.linting.finding import Finding
from microbatch.linting.report import Report
from microbatch.linting.sources import Source
from microbatch.pages import page

__all__ = ["clean", "place", "text_form"]

_WIDTH = 100
_SETTLE = (
    "put the loop into loop(model, optimizer, batch) beside a job ({1}); then `microbatch check {0}:job "
    "--loop {0}:loop` runs it on your own model"
)


def text_form(report: Report) -> Iterator[str]:
    """Write findings for people.

    The speed notes of one loop are one line. What is said of a finding is not said again of the next one. Characters
    that would move a terminal's cursor are written as escapes.

    Args:
        report: The findings.

    Yields:
        Lines without their ends, of ASCII alone where the source has no other characters.
    """
    said = set[tuple[str, ...]]()
    quick = [finding for finding in report.findings if report.severity(finding) == "speed"]
    for finding in report.findings:
        if finding not in quick:
            yield from (clean(line) for line in _one(report, finding, said))
            yield ""
    notes = 0
    for _, group in groupby(quick, key=lambda each: (each.path, each.cell, each.function)):
        notes += 1
        yield clean(_speed(report, list(group)))
    if notes:
        yield ""
    yield report.summary()


def place(finding: Finding) -> str:
    """Return where a finding is: `train.py:12:5`, or `train.ipynb:cell 3:12:5`."""
    cell = "" if finding.cell is None else f"cell {finding.cell}:"
    return f"{finding.path}:{cell}{finding.line}:{finding.column}"


def clean(text: str) -> str:
    """Write what is not printable as escapes, and keep spaces and tabs."""
    if text.isprintable():
        return text
    return "".join(
        each if each.isprintable() or each == "\t" else each.encode("unicode_escape").decode() for each in text
    )


def _one(report: Report, finding: Finding, said: set[tuple[str, ...]]) -> Iterator[str]:
    """Yield the lines of a finding, without the texts that were said of the same rule in the same file."""

    def is_new(*texts: str) -> bool:
        key = (finding.path, finding.rule, *texts)
        return key not in said and not said.add(key)

    how = "error" if finding.rule == "MB000" else finding.confidence  # the exit status is that of an error, too
    yield f"{place(finding)}: {finding.rule} [{how}] {finding.message}"
    source = report.sources.get(finding.path)
    if source is not None and finding.rule != "MB001":  # of the whole file
        yield from _excerpt(source, finding)
    for title, text in (("what happens", finding.happens), ("how much", finding.how_much), ("fix", finding.fix)):
        if text and is_new(title, text):
            yield from _titled(title, text)
    if source is not None and finding.edits:
        yield from (f"    {line}" for line in fragment(source, finding))
    if finding.needs:
        yield from _titled("depends on", "; ".join(finding.needs))
    if finding.confidence == "depends" and is_new("settle it"):
        file = finding.path if finding.path.endswith(".py") else "job.py"
        yield from _titled("settle it", _SETTLE.format(file, page("check")))
    if report.show_window and finding.window and is_new("window", finding.window):
        yield "  the window:"
        yield from (f"    {line}" for line in finding.window.split("\n"))


def _excerpt(source: Source, finding: Finding) -> Iterator[str]:
    line = source.line_of(finding.cell, finding.line)
    if not 1 <= line <= len(source.lines):
        return
    text = source.lines[line - 1]
    begin = max(finding.column - _WIDTH // 2, 0) if len(text) > _WIDTH else 0
    shown = text[begin : begin + _WIDTH]
    before = "".join(each if each == "\t" else " " for each in shown[: max(finding.column - 1 - begin, 0)])
    number = str(finding.line)
    if shown.strip():
        yield f"  {number} | {shown}"
        yield f"  {' ' * len(number)} | {before}^"


def _titled(title: str, text: str) -> Iterator[str]:
    """Yield a text under its title, in lines that a terminal shows whole."""
    line = f"  {title}:"
    for word in text.split():
        if len(line) + 1 + len(word) > _WIDTH and line.strip():
            yield line
            line = "   "
        line += f" {word}"
    yield line


def _speed(report: Report, group: list[Finding]) -> str:
    lines: dict[str, list[str]] = {}
    for finding in group:
        lines.setdefault(f"{finding.rule} {report.name(finding)}", []).append(str(finding.line))
    what = "; ".join(f"{name} (line{'s' * (len(at) > 1)} {', '.join(at)})" for name, at in lines.items())
    return f"{place(group[0])}: [speed] {what}"
