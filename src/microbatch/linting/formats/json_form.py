"""Findings for programs: one JSON object, or one object a line."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import asdict
from typing import Any

from microbatch.linting.finding import Finding
from microbatch.linting.report import Report

__all__ = ["SCHEMA", "json_form", "json_lines_form"]

SCHEMA = 1
"""Grows when a key is renamed or removed, or changes its meaning; new keys leave it as it is."""


def json_form(report: Report) -> Iterator[str]:
    """Write all findings as one JSON object.

    Its keys are `schema`, `files`, `summary` (counts) and `findings`.

    Args:
        report: The findings.

    Yields:
        The object's text.
    """
    whole = {
        "schema": SCHEMA,
        "files": report.files,
        "summary": report.counts(),
        "findings": [_object(report, finding) for finding in report.findings],
    }
    yield json.dumps(whole, indent=2)


def json_lines_form(report: Report) -> Iterator[str]:
    """Write one JSON object a line: the findings, each with `"event": "finding"`, and the counts.

    Args:
        report: The findings.

    Yields:
        Lines without their ends.
    """
    for finding in report.findings:
        yield json.dumps({"event": "finding", "schema": SCHEMA, **_object(report, finding)})
    yield json.dumps({"event": "summary", "schema": SCHEMA, "files": report.files, **report.counts()})


def _object(report: Report, finding: Finding) -> dict[str, Any]:
    named = {"rule": finding.rule, "name": report.name(finding), "severity": report.severity(finding)}
    return {**named, **asdict(finding)}
