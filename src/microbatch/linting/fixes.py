"""The edits of findings. An edit is offered only if the simulation of the edited file proves it."""

from __future__ import annotations

import ast
from collections import Counter
from dataclasses import replace
from pathlib import Path

from microbatch.linting.draft import edits_between
from microbatch.linting.edits import apply_edits, fitting
from microbatch.linting.finding import Edit, Finding
from microbatch.linting.imports import with_imports
from microbatch.linting.mends import MENDS
from microbatch.linting.module import Module
from microbatch.linting.runs import Outcome
from microbatch.linting.scene import Scene
from microbatch.linting.sources import Source
from microbatch.linting.verdicts import Reading, Verdict, read

__all__ = ["with_edits"]

DEAR = 80_000
"""Statements of a reading that is not repeated for each edit."""
CHECKS = 10
"""How many edited texts of one file are simulated; a file with more faults is edited in several rounds."""
_HIDDEN_BEFORE = frozenset({"MB110", "MB111", "MB112", "MB113", "MB114"})
"""Faults of the last, short window. They show only where the other windows are right: an edit may uncover them."""

_WINDOWS = frozenset({"MB104", "MB105", "MB106"})
"""Faults of the windows themselves: without them, every window has N microbatches."""


def with_edits(
    found: list[Finding], source: Source, *, module: Module, reading: Reading, folder: Path | None
) -> list[Finding]:
    """Add to findings the edits that mend them.

    Each edit is tried: the edited text is read and simulated like the file. It is offered only if the fault is gone
    there, no other fault came, and nothing more is hidden from the doctor. Edits of one file that can be applied
    together are tried together too.

    Args:
        found: The findings of the reading's verdicts, in their order.
        source: The source.
        module: What it holds.
        reading: What the simulation of it saw.
        folder: Where its imports are looked up.

    Returns:
        The findings, some of them with edits.
    """
    if not all(root.complete for root in reading.roots) or sum(root.spent for root in reading.roots) > DEAR:
        return found
    proof = _Proof(source, reading, folder)
    mended = list[Finding]()
    for finding, verdict in zip(found, reading.verdicts, strict=True):
        scene = Scene(verdict.fault.node, source=source, module=module, reading=reading)
        edits = _edits_for(verdict, scene, proof)
        new = replace(finding, edits=edits)
        if edits and len(fitting([*mended, new])) > 1 and not proof.holds_together([*mended, new]):
            new = finding
        mended.append(new)
    return mended


def _edits_for(verdict: Verdict, scene: Scene, proof: _Proof) -> tuple[Edit, ...]:
    """Return the edits of the first way to mend a fault that the simulation proves; none if there is no such way."""
    fault = verdict.fault
    mend = MENDS.get(fault.rule)
    if mend is None or scene.module.path_of(fault.node) is not None:
        return ()
    for text in mend(scene, verdict):
        if text != scene.source.text and proof.mends(text, fault.rule):
            return edits_between(scene.source.text, text)
    return ()


def _is_whole(outcome: Outcome) -> bool:
    """Return whether each step of a run that accumulates takes N microbatches."""
    sizes = {len(step.since) for step in outcome.trace.steps if step.since}
    return sizes <= {1} or sizes == {outcome.run.microbatches}


class _Proof:
    """Compares edited texts with the file."""

    def __init__(self, source: Source, reading: Reading, folder: Path | None) -> None:
        self._source, self._folder = source, folder
        self._before = _Standing(reading)
        self._left = CHECKS
        self._known: dict[str, _Standing | None] = {}

    def mends(self, text: str, *rules: str) -> bool:
        """Return whether the edited text has less of each of these faults, and nothing else that is new."""
        after = self._standing(text)
        return after is not None and after.is_better_than(self._before, rules)

    def holds_together(self, findings: list[Finding]) -> bool:
        """Return whether all edits that can be applied together mend their faults together."""
        chosen = fitting(findings)
        text = apply_edits(self._source.text, [edit for each in chosen for edit in each.edits])
        return self.mends(text, *(each.rule for each in chosen))

    def _standing(self, text: str) -> _Standing | None:
        if text not in self._known:
            if self._left <= 0:
                return None
            self._left -= 1
            self._known[text] = self._read(text)
        return self._known[text]

    def _read(self, text: str) -> _Standing | None:
        tree = Source(self._source.path, text).tree
        if not isinstance(tree, ast.Module):
            return None
        module = Module(tree)
        if self._folder is not None:
            with_imports(module, Path(self._source.path), self._folder)
        return _Standing(read(module))


class _Standing:
    """How many faults of each rule a text has, and what the doctor cannot see in it."""

    def __init__(self, reading: Reading) -> None:
        self.all = Counter(verdict.fault.rule for verdict in reading.verdicts)
        self.certain = Counter(verdict.fault.rule for verdict in reading.verdicts if verdict.certain)
        traces = [outcome.trace for root in reading.roots for outcome in root.outcomes]
        self.opaque = len({what for trace in traces for what in trace.opaque})
        self.accumulates = any(len(step.since) > 1 for trace in traces for step in trace.steps)
        self.whole = all(_is_whole(outcome) for root in reading.roots for outcome in root.outcomes if outcome.clean)
        self.complete = all(root.complete for root in reading.roots)

    def is_better_than(self, before: _Standing, rules: tuple[str, ...]) -> bool:
        """Return whether the faults of these rules are fewer, and nothing else is worse."""
        fewer = all(self.all[rule] <= before.all[rule] - count for rule, count in Counter(rules).items())
        worse = any(
            self.certain[rule] > before.certain[rule]
            or (self.all[rule] > before.all[rule] and rule not in _HIDDEN_BEFORE)
            for rule in self.all
        )
        if not self.whole and (before.whole or _WINDOWS.intersection(rules)):
            return False
        seen = self.accumulates and self.complete and self.opaque <= before.opaque
        return fewer and seen and not worse
