"""From a source to its findings: the loops run in a simulation, and each verdict gets its words and its place."""

from __future__ import annotations

import ast
from dataclasses import dataclass
from pathlib import Path

from microbatch.linting.drawing import draw
from microbatch.linting.finding import Finding
from microbatch.linting.fixes import with_edits
from microbatch.linting.imports import with_imports
from microbatch.linting.module import Module
from microbatch.linting.rules.how_much import how_much_for
from microbatch.linting.rules.table import RULES
from microbatch.linting.sources import Source
from microbatch.linting.syntax import text_of
from microbatch.linting.verdicts import Reading, Verdict, read

__all__ = ["judge_source"]


def judge_source(source: Source, folder: Path | None = None) -> list[Finding]:
    """Find the faults of a source that parses; lines are those of its text."""
    tree = source.tree
    if not isinstance(tree, ast.Module):
        return [tree]
    module = Module(tree)
    if folder is not None:
        with_imports(module, Path(source.path), folder)
    reading = read(module)
    file = _File(source, module, reading)
    found = [_finding(file, verdict) for verdict in reading.verdicts]
    found = with_edits(found, source, module=module, reading=reading, folder=folder)
    return found + _not_judged(file, found)


@dataclass(frozen=True, slots=True)
class _File:
    """A source with what the doctor read in it."""

    source: Source
    module: Module
    reading: Reading


def _finding(file: _File, verdict: Verdict) -> Finding:
    fault = verdict.fault
    rule = RULES[fault.rule]
    outcome = verdict.outcome
    path, line, column = _place(file, fault.node)
    return Finding(
        rule=fault.rule,
        path=path,
        line=line,
        column=column,
        confidence="certain" if verdict.certain else "depends",
        message=fault.message,
        happens=rule.happens,
        how_much=how_much_for(rule, file.reading.optimizer, clipped=file.reading.clipped),
        fix=rule.fix,
        needs=() if verdict.certain else verdict.needs,
        window=draw(outcome) if outcome is not None else "",
        function=file.module.function_of(fault.node),
        microbatches=outcome.run.microbatches if outcome is not None else 0,
    )


def _place(file: _File, node: ast.AST) -> tuple[str, int, int]:
    """The file, line and column of a node, which may stand in a file that this one imports."""
    line = getattr(node, "lineno", 1)
    path = file.module.path_of(node)
    if path is not None:
        return path, line, getattr(node, "col_offset", 0) + 1
    return file.source.path, line, file.source.column(line, getattr(node, "col_offset", 0))


def _not_judged(file: _File, found: list[Finding]) -> list[Finding]:
    """MB001 where there is no loop, MB002 where something on the way to the step could not be read."""
    roots = file.reading.roots
    outcomes = [outcome for root in roots for outcome in root.outcomes]
    if not any(o.used_window or any(len(s.since) > 1 for s in o.trace.steps) for o in outcomes):
        if found:
            return []
        hint = file.module.hints_at_accumulation
        if hint is None:
            return [_note(file, "MB001", None, message="no loop that accumulates gradients")]
        what = f"`{text_of(hint)}` is about accumulation, and the backward of its loop is not in this file"
        return [_note(file, "MB002", hint, message=what)]
    opaque = {what: node for o in outcomes for what, node in o.trace.opaque.items()}
    unseen = "and the doctor cannot see what it does to the gradients"
    notes = [_note(file, "MB002", node, message=f"{what}, {unseen}") for what, node in opaque.items()]
    if not all(root.complete for root in roots):
        message = "there are more settings than the doctor tries; it judged the first of them"
        notes.append(_note(file, "MB002", None, message=message))
    return notes


def _note(file: _File, code: str, node: ast.AST | None, *, message: str) -> Finding:
    path, line, column = (file.source.path, 1, 1) if node is None else _place(file, node)
    rule = RULES[code]
    return Finding(
        rule=code,
        path=path,
        line=line,
        column=column,
        confidence="note",
        message=message,
        happens=rule.happens,
        fix=rule.fix,
        function="" if node is None else file.module.function_of(node),
    )
