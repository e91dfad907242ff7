"""Findings as commands of GitHub Actions, which shows them beside the lines of a change."""

from __future__ import annotations

from collections.abc import Iterator

from microbatch.linting.report import Report

__all__ = ["github_form"]

_COMMANDS = {"error": "error", "warning": "warning", "note": "notice"}


def github_form(report: Report) -> Iterator[str]:
    """Write one workflow command for each finding.

    A notebook's file has other lines than its cells, so the place in the cell is in the title.

    Args:
        report: The findings.

    Yields:
        Lines without their ends, such as `::error file=train.py,line=9,col=5,title=MB105 (certain)::...`.
    """
    for finding in report.findings:
        title = f"{finding.rule} {report.name(finding)} [{finding.confidence}]"
        where = {"file": finding.path}
        if finding.cell is None:
            where |= {"line": str(finding.line), "col": str(finding.column)}
        else:
            title += f" cell {finding.cell}, line {finding.line}"
        properties = ",".join(f"{key}={_property(value)}" for key, value in {**where, "title": title}.items())
        parts = [finding.message, finding.happens, finding.how_much, finding.fix]
        if finding.needs:
            parts.append(f"Depends on: {'; '.join(finding.needs)}")
        text = "\n".join(part for part in parts if part)
        yield f"::{_COMMANDS[report.level(finding)]} {properties}::{_data(text)}"


def _data(text: str) -> str:
    return text.replace("%", "%25").replace("\r", "%0D").replace("\n", "%0A")


def _property(text: str) -> str:
    return _data(text).replace(":", "%3A").replace(",", "%2C")
