"""The doctor: reads a file, runs its loops in a simulation, and says what is wrong with them."""

from __future__ import annotations

import ast
from pathlib import Path

from microbatch.linting.drawing import draw
from microbatch.linting.examine import examine_path
from microbatch.linting.finding import Finding
from microbatch.linting.fixes import with_edits
from microbatch.linting.imports import with_imports
from microbatch.linting.module import Module
from microbatch.linting.rules.how_much import how_much_for
from microbatch.linting.rules.table import RULES
from microbatch.linting.sources import Source
from microbatch.linting.syntax import text_of
from microbatch.linting.verdicts import Reading, Verdict, read

__all__ = ["doctor", "judge"]


def doctor(source_or_path: str | Path, *, folder: str | Path | None = None) -> list[Finding]:
    """Find what is wrong with gradient accumulation loops, from their source, without running them.

    Args:
        source_or_path: Source text, or the path of a Python file, of a notebook or of a folder.
        folder: Where imports of the project itself are looked up. `None` for the folder of the file.

    Returns:
        The findings in the order of their lines. Of a file that cannot be read or parsed there is one, MB000; of a file without a loop that
        accumulates gradients there is one, MB001.

    Example:
        >>> for finding in mb.doctor("train.py"):
        ...     print(finding.rule, finding.line, finding.confidence, finding.message)
    """
    return examine_path(source_or_path, judge, folder=None if folder is None else Path(folder))


def judge(source: Source, folder: Path | None = None) -> list[Finding]:
    """Find the faults of a source that parses; lines are those of its text."""
    tree = source.tree
    if not isinstance(tree, ast.Module):
        return [tree]
    module = Module(tree)
    if folder is not None:
        with_imports(module, Path(source.path), folder)
    reading = read(module)
    found = [_finding(source, module, reading, verdict) for verdict in reading.verdicts]
    found = with_edits(found, source, module=module, reading=reading, folder=folder)
    return found + _not_judged(source, module, reading, found)


def _finding(source: Source, module: Module, reading: Reading, verdict: Verdict) -> Finding:
    fault = verdict.fault
    rule = RULES[fault.rule]
    outcome = verdict.outcome
    path, line, column = _place(source, module, fault.node)
    return Finding(
        rule=fault.rule,
        path=path,
        line=line,
        column=column,
        confidence="certain" if verdict.certain else "depends",
        message=fault.message,
        happens=rule.happens,
        how_much=how_much_for(rule, reading.optimizer, clipped=reading.clipped),
        fix=rule.fix,
        needs=() if verdict.certain else verdict.needs,
        window=draw(outcome) if outcome is not None else "",
        function=module.function_of(fault.node),
        microbatches=outcome.run.microbatches if outcome is not None else 0,
    )


def _place(source: Source, module: Module, node: ast.AST) -> tuple[str, int, int]:
    """The file, line and column of a node, which may stand in a file that this one imports."""
    line = getattr(node, "lineno", 1)
    path = module.path_of(node)
    if path is not None:
        return path, line, getattr(node, "col_offset", 0) + 1
    return source.path, line, source.column(line, getattr(node, "col_offset", 0))


def _not_judged(source: Source, module: Module, reading: Reading, found: list[Finding]) -> list[Finding]:
    """MB001 where there is no loop, MB002 where something on the way to the step could not be read."""
    outcomes = [outcome for root in reading.roots for outcome in root.outcomes]
    if not outcomes or not any(o.used_window or any(len(s.since) > 1 for s in o.trace.steps) for o in outcomes):
        if found or module.hints_at_accumulation:
            node = module.hints_at_accumulation
            if found or node is None:
                return []
            what = f"`{text_of(node)}` speaks of accumulation, and no backward of its loop stands in this file"
            return [_note(source, module, "MB002", node, what)]
        return [_note(source, module, "MB001", None, "no loop that accumulates gradients")]
    opaque = {what: node for o in outcomes for what, node in o.trace.opaque.items()}
    notes = [
        _note(source, module, "MB002", node, f"{what}, and the doctor cannot see what it does to the gradients")
        for what, node in opaque.items()
    ]
    if not all(root.complete for root in reading.roots):
        notes.append(
            _note(
                source,
                module,
                "MB002",
                None,
                "there are more settings than the doctor tries; it judged the first of them",
            )
        )
    return notes


def _note(source: Source, module: Module, code: str, node: ast.AST | None, message: str) -> Finding:
    path, line, column = (source.path, 1, 1) if node is None else _place(source, module, node)
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
        function="" if node is None else module.function_of(node),
    )
