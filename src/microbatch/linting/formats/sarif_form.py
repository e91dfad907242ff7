"""Findings as SARIF 2.1.0, the format that code hosts and editors read."""

from __future__ import annotations

import hashlib
import json
from collections import Counter
from collections.abc import Iterator, Mapping
from pathlib import PurePosixPath
from typing import Any
from urllib.parse import quote

from microbatch.linting.finding import Finding
from microbatch.linting.report import Report
from microbatch.linting.rules.rule import Rule

__all__ = ["sarif_form"]

_SCHEMA = "https://docs.oasis-open.org/sarif/sarif/v2.1.0/errata01/os/schemas/sarif-schema-2.1.0.json"
_ROOT = "%SRCROOT%"
_LEVELS = {"error": "error", "warning": "warning"}


def sarif_form(report: Report) -> Iterator[str]:
    """Write all findings as one SARIF log.

    Its fingerprints are made of the rule, the file, the function and the text of the line, so they stay when lines are
    added above. A notebook's file has other lines than its cells, so its results have the cell as a logical location,
    and no region.

    Args:
        report: The findings.

    Yields:
        The log's text.
    """
    codes = sorted({*report.rules, *(finding.rule for finding in report.findings)})
    index = {code: number for number, code in enumerate(codes)}
    seen = Counter[str]()
    unread = any(finding.rule == "MB000" for finding in report.findings)
    run = {
        "tool": {
            "driver": {
                "name": "microbatch doctor",
                "version": _version(),
                "rules": [_rule(code, report.rules) for code in codes],
            }
        },
        "originalUriBaseIds": {_ROOT: {"description": {"text": "The folder in which the doctor was started."}}},
        "columnKind": "unicodeCodePoints",
        "invocations": [{"executionSuccessful": not unread}],
        "results": [{**_result(report, each, seen), "ruleIndex": index[each.rule]} for each in report.findings],
    }
    yield json.dumps({"$schema": _SCHEMA, "version": "2.1.0", "runs": [run]}, indent=2)


def _version() -> str:
    from importlib.metadata import PackageNotFoundError, version  # noqa: PLC0415 - slow, and for this format alone

    try:
        return version("microbatch")
    except PackageNotFoundError:
        return "0"


def _rule(code: str, rules: Mapping[str, Rule]) -> dict[str, Any]:
    rule = rules.get(code)
    if rule is None:
        return {"id": code}
    text = "\n\n".join(part for part in (rule.happens, rule.how_much, f"Fix: {rule.fix}" if rule.fix else "") if part)
    markdown = f"**{rule.summary}**\n\n{text}"
    if rule.right:
        markdown += f"\n\nWrong:\n\n```python\n{rule.wrong}```\n\nRight:\n\n```python\n{rule.right}```"
    return {
        "id": code,
        "name": "".join(word.capitalize() for word in rule.name.split("-")),
        "shortDescription": {"text": rule.summary},
        "fullDescription": {"text": rule.happens or rule.summary},
        "help": {"text": text or rule.summary, "markdown": markdown},
        "defaultConfiguration": {"level": _LEVELS.get(rule.severity, "note")},
        "properties": {"tags": ["gradient-accumulation", rule.severity]},
    }


def _result(report: Report, finding: Finding, seen: Counter[str]) -> dict[str, Any]:
    source = report.sources.get(finding.path)
    line = 0 if source is None else source.line_of(finding.cell, finding.line)
    text = source.lines[line - 1] if source is not None and 1 <= line <= len(source.lines) else ""
    key = "\0".join((finding.rule, finding.path, finding.function, " ".join(text.split())))
    seen[key] += 1
    print_of = hashlib.sha256(f"{key}\0{seen[key]}".encode("utf-8", "surrogatepass")).hexdigest()
    physical: dict[str, Any] = {"artifactLocation": _artifact(finding.path)}
    location: dict[str, Any] = {"physicalLocation": physical}
    logical = list[dict[str, Any]]()
    where = ""
    if finding.cell is None:
        region: dict[str, Any] = {"startLine": finding.line, "startColumn": finding.column}
        if text[finding.column - 1 :]:
            region["snippet"] = {"text": text[finding.column - 1 :]}
        physical["region"] = region
    else:
        where = f"Cell {finding.cell}, line {finding.line}: "
        logical.append({"name": f"cell {finding.cell}", "kind": "module"})
    if finding.function:
        logical.append({"name": finding.function, "kind": "function"})
    if logical:
        location["logicalLocations"] = logical
    parts = [where + finding.message, finding.happens, finding.how_much, finding.fix]
    return {
        "ruleId": finding.rule,
        "level": report.level(finding),
        "message": {"text": "\n".join(part for part in parts if part)},
        "locations": [location],
        "partialFingerprints": {"microbatchLoop/v1": print_of},
        "properties": {
            "confidence": finding.confidence,
            "needs": list(finding.needs),
            "microbatches": finding.microbatches,
        },
    }


def _artifact(path: str) -> dict[str, str]:
    if PurePosixPath(path).is_absolute():
        return {"uri": "file://" + quote(path, errors="surrogateescape")}
    if path[1:3] == ":/":  # on another drive
        return {"uri": "file://" + quote("/" + path, safe="/:", errors="surrogateescape")}
    if path.startswith("<"):  # standard input
        return {"uri": quote(path.strip("<>")), "uriBaseId": _ROOT}
    return {"uri": quote(path, errors="surrogateescape"), "uriBaseId": _ROOT}
