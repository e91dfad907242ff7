"""What a run of the doctor ends in: how heavy each finding is, how many there are, and the exit code."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Literal

from microbatch.linting.finding import Finding
from microbatch.linting.rules.rule import Rule, Severity
from microbatch.linting.sources import Source

__all__ = ["Level", "Report"]

Level = Literal["error", "warning", "note"]


@dataclass(frozen=True)
class Report:
    """The findings of all files that were read.

    Attributes:
        findings: In the order of the files and their lines.
        sources: The sources of the findings, by path; a file that could not be read has none.
        rules: All rules, by code.
        files: How many files were read.
        show_window: Whether texts show the simulated windows.
    """

    findings: Sequence[Finding]
    sources: Mapping[str, Source]
    rules: Mapping[str, Rule]
    files: int
    show_window: bool = field(default=False, kw_only=True)

    def severity(self, finding: Finding) -> Severity:
        """Return how heavy the rule of a finding is."""
        rule = self.rules.get(finding.rule)
        if rule is not None:
            return rule.severity
        return "input" if finding.rule.startswith("MB00") else "warning"

    def name(self, finding: Finding) -> str:
        """Return the name of a finding's rule."""
        rule = self.rules.get(finding.rule)
        return finding.rule if rule is None else rule.name

    def level(self, finding: Finding) -> Level:
        """Return the level that a screen shows: an error is certain and heavy, and what depends is one step lighter."""
        if finding.rule == "MB000":
            return "error"
        severity = self.severity(finding)
        if severity in {"error", "warning"} and finding.confidence != "note":
            return "error" if severity == "error" and finding.confidence == "certain" else "warning"
        return "note"

    def counts(self) -> dict[str, int]:
        """Count the findings: certain, depends, speed notes, files and loops not judged, and unused comments."""
        counts: dict[str, int] = dict.fromkeys(("certain", "depends", "speed", "not_judged", "unused_comments"), 0)
        for finding in self.findings:
            if finding.rule in {"MB000", "MB002"}:
                counts["not_judged"] += 1
            elif finding.rule == "MB003":
                counts["unused_comments"] += 1
            elif self.severity(finding) == "speed":
                counts["speed"] += 1
            elif finding.confidence in counts:
                counts[finding.confidence] += 1
        return counts

    def summary(self) -> str:
        """Return the counts as one line."""
        counts = self.counts()
        parts = [
            f"{counts['certain']} certain",
            f"{counts['depends']} depends",
            f"{_of(counts['speed'], 'speed note')}",
        ]
        if counts["unused_comments"]:
            parts.append(_of(counts["unused_comments"], "unused comment"))
        judged = f"; could not judge: {counts['not_judged']}" if counts["not_judged"] else ""
        return f"{', '.join(parts)}{judged} ({_of(self.files, 'file')} read)"

    def exit_code(self, *, strict: bool = False) -> int:
        """Return 2 where a file could not be read, 1 where a heavy fault is certain, and 0 otherwise.

        Args:
            strict: Whether a heavy fault that depends on something ends with 1 too.

        Returns:
            The exit code of the command.
        """
        if any(finding.rule == "MB000" for finding in self.findings):
            return 2
        heavy = [each.confidence for each in self.findings if self.severity(each) in {"error", "warning"}]
        return int("certain" in heavy or (strict and "depends" in heavy))


def _of(count: int, noun: str) -> str:
    return f"{count} {noun}" if count == 1 else f"{count} {noun}s"
