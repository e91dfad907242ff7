"""What the doctor finds in loops that a reader has labelled: recall of certain faults, and false alarms.

The labels are lines of JSON: `faults` (`kind`, `line`, `certain`) and `silent` (kinds that a loop must not be blamed
for). The sources lie beside them, one folder for each line: `01/`, `02/`, ...; they are not part of this project.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from benchmarks.machine import versions
from microbatch.linting.doctor import doctor
from microbatch.linting.finding import Finding
from microbatch.linting.rules.table import BY_NAME

OUT = Path(__file__).parent / "results" / "labelled-loops.json"
# The words of the labels are names of rules, but for these.
RULE_OF = {name: rule.code for name, rule in BY_NAME.items()} | {
    "first-window-short": "MB105",
    "schedule-length": "MB301",
    "scheduler-every-microbatch": "MB301",
    "ddp-sync": "MB501",
    "logged-last-microbatch": "MB702",
    "unparsable": "MB000",
}
# Speed and logging: they do not change what is trained.
_LIGHT = frozenset({"MB501", "MB502", "MB601", "MB602", "MB603", "MB701", "MB702"})


def judge_loops(labels: Path) -> dict[str, Any]:
    """Read every labelled loop and compare.

    Args:
        labels: The file of labels; the sources stand beside it.

    Returns:
        Counts: `certain` faults that change the training, how many of them were found at all and as certain, and false
        alarms (certain findings of a kind for which the loop is right), with each miss and false alarm by name.
    """
    counts = {"loops": 0, "certain": 0, "found": 0, "found_as_certain": 0, "false_certain": 0}
    missed = list[str]()
    alarms = list[str]()
    for number, line in enumerate(labels.read_text(encoding="utf-8").splitlines(), start=1):
        label = json.loads(line)
        folder = labels.parent / f"{label.get('n', number):02d}"
        files = [file for file in sorted(folder.glob("*")) if file.suffix in {".py", ".ipynb"}]
        if not files or label.get("extra"):
            continue
        counts["loops"] += 1
        findings = doctor(files[0])
        for fault in label["faults"]:
            rule = RULE_OF.get(fault["kind"])
            if rule is None or rule in _LIGHT or not fault["certain"]:
                continue
            found = [each for each in findings if _names(each, fault["kind"])]
            counts["certain"] += 1
            counts["found"] += bool(found)
            counts["found_as_certain"] += any(each.confidence != "depends" for each in found)
            if not found:
                missed.append(f"{folder.name}: {fault['kind']} (line {fault['line']})")
        for kind in label["silent"]:
            for each in findings:
                if each.confidence == "certain" and _names(each, kind):
                    counts["false_certain"] += 1
                    alarms.append(f"{folder.name}: {kind} (line {each.line})")
    return {**counts, "missed": missed, "false_alarms": alarms}


def _names(finding: Finding, kind: str) -> bool:
    """Return whether a finding is of the kind of a label; two kinds share the rule of schedules."""
    if finding.rule != RULE_OF.get(kind):
        return kind == "scheduler-every-microbatch" and finding.rule == "MB302"
    if kind in {"schedule-length", "scheduler-every-microbatch"}:
        return (kind == "schedule-length") == ("length" in finding.message)
    return kind != "first-window-short" or "first" in finding.message


def main(arguments: Sequence[str] | None = None) -> int:
    """Compare, print and write.

    Args:
        arguments: Of the command line; `None` for this process's own.

    Returns:
        0.
    """
    parser = argparse.ArgumentParser(prog="python -m benchmarks.labelled_loops", description=__doc__)
    parser.add_argument("labels", type=Path, nargs="+", help="files of labels, with the sources beside them")
    parser.add_argument("--out", type=Path, default=OUT)
    flags = parser.parse_args(arguments)
    found = {f"{each.parent.name}/{each.name}": judge_loops(each) for each in flags.labels}
    for name, counts in found.items():
        print(
            f"{name}: {counts['loops']} loops, {counts['found']} of {counts['certain']} certain faults found "
            f"({counts['found_as_certain']} as certain), {counts['false_certain']} false alarms"
        )
    flags.out.parent.mkdir(parents=True, exist_ok=True)
    flags.out.write_text(json.dumps({"versions": versions(), "labels": found}, indent=1) + "\n", encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
