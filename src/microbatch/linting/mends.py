"""Ways to mend a fault, rule by rule. Each is a whole new text, made of the user's own lines; `fixes.py` proves it."""

from __future__ import annotations

import ast
from collections.abc import Callable, Iterator, Mapping

from microbatch.linting.draft import Draft
from microbatch.linting.guesses import kind_of_name
from microbatch.linting.mend_moves import (
    backward_always,
    clear_after,
    clear_once,
    clip_once,
    movable,
    once_a_window,
    step_once,
    unscale_first,
    widen_no_sync,
    without,
)
from microbatch.linting.scene import Scene
from microbatch.linting.syntax import dotted, last_name, text_of
from microbatch.linting.verdicts import Verdict

__all__ = ["MENDS", "loss_of"]

Mend = Callable[[Scene, Verdict], Iterator[str]]
_BY_ARGUMENT = frozenset({"accelerator", "fabric", "engine"})
"""Objects whose `backward` takes the loss as its argument."""


# ---- the loss


def loss_of(call: ast.Call) -> ast.expr | None:
    """Return the loss in a call of backward: `loss` of `scaler.scale(loss).backward()`."""
    if not isinstance(call.func, ast.Attribute):
        return None
    base = call.func.value
    if call.args and (call.func.attr == "manual_backward" or kind_of_name(dotted(base)) in _BY_ARGUMENT):
        return call.args[0]
    if isinstance(base, ast.Call) and last_name(base.func) == "scale" and len(base.args) == 1:
        return base.args[0]
    return base


def _divide(scene: Scene, verdict: Verdict) -> Iterator[str]:
    """MB101: divide where backward is called, so that numbers that are logged stay as they are."""
    loss = loss_of(scene.node) if isinstance(scene.node, ast.Call) else None
    if loss is None or not verdict.certain:
        return
    for n in scene.window_names():
        draft = Draft(scene.source)
        written = draft.text(loss)
        inside = isinstance(loss, ast.Name | ast.Attribute | ast.Call | ast.Subscript)
        is_base = isinstance(scene.module.parents.get(loss), ast.Attribute)
        draft.replace(
            loss, f"({written} / {n})" if inside and is_base else f"{written} / {n}" if inside else f"({written}) / {n}"
        )
        yield draft.result()


def _divide_once(scene: Scene, verdict: Verdict) -> Iterator[str]:
    """MB102: take out the division by the script."""
    if not verdict.certain:
        return
    lines = {backward.loss.divided for trace in scene.traces for backward in trace.backwards}
    for node in ast.walk(scene.scope):
        if getattr(node, "lineno", 0) in lines:
            yield from _without_division(scene, node)


def _without_division(scene: Scene, node: ast.AST) -> Iterator[str]:
    draft = Draft(scene.source)
    parent = scene.module.parents.get(node)
    if isinstance(node, ast.AugAssign) and isinstance(node.op, ast.Div):
        yield from without(scene, node)
    elif isinstance(node, ast.BinOp) and isinstance(node.op, ast.Div):
        if isinstance(parent, ast.Assign) and dotted(parent.targets[0]) == dotted(node.left) != "":
            yield from without(scene, parent)
        else:
            draft.replace(node, draft.text(node.left))
            yield draft.result()


# ---- the window


def _phase(scene: Scene, verdict: Verdict) -> Iterator[str]:  # noqa: ARG001 - as every mend
    """MB105: count from the other end, in the condition of the step, or in all conditions that are written like it."""
    tests = [each.test for each in scene.above(scene.node) if isinstance(each, ast.If)]
    moduli = [node for test in tests for node in scene.moduli(test)]
    if not moduli:  # behind a name, before a `continue`, or around the call of the function that steps
        names = {name for test in tests for name in scene.names_of(test)}
        moduli = [
            node
            for holder in ast.walk(scene.module.tree)
            for node in _conditions(scene, holder, names)
        ]  # fmt: skip
    for node in dict.fromkeys(moduli):
        yield from _shifted(scene, [node])
        alike = [each for each in scene.moduli(scene.scope_of(node)) if text_of(each) == text_of(node)]
        if len(alike) > 1:
            yield from _shifted(scene, alike)


def _conditions(scene: Scene, holder: ast.AST, names: set[str]) -> list[ast.BinOp]:
    if isinstance(holder, ast.Assign) and names & {dotted(target) for target in holder.targets}:
        return scene.moduli(holder.value)
    if isinstance(holder, ast.If) and (isinstance(holder.body[-1], ast.Continue) or not scene.above(scene.node)):
        return scene.moduli(holder.test)
    return []


def _shifted(scene: Scene, moduli: list[ast.BinOp]) -> Iterator[str]:
    draft = Draft(scene.source)
    for node in moduli:
        n, counter = draft.text(node.right), node.left
        before = _one_less(counter)
        if before is not None:
            draft.replace(node, f"{draft.text(before)} % {n}")
        elif isinstance(counter, ast.Name | ast.Attribute):
            outer = _with_a_start(scene, node)
            new = f"({draft.text(counter)} + 1) % {n}"
            if outer is not None:  # `i > 0 and i % N == 0`
                draft.replace(outer, draft.text(outer.values[-1]).replace(draft.text(node), new, 1))
            else:
                draft.replace(node, new)
    if draft.changes:
        yield draft.result()


def _one_less(node: ast.expr) -> ast.expr | None:
    """Return `i` of `i + 1`."""
    if isinstance(node, ast.BinOp) and isinstance(node.op, ast.Add) and isinstance(node.right, ast.Constant):
        return node.left if node.right.value == 1 else None
    return None


def _with_a_start(scene: Scene, node: ast.BinOp) -> ast.BoolOp | None:
    """Return `i > 0 and i % N == 0` around its modulo: without the early step, the first half is not needed."""
    above = scene.module.above(node)
    outer = next((each for each in above if isinstance(each, ast.BoolOp)), None)
    if outer is None or not isinstance(outer.op, ast.And) or len(outer.values) != 2:
        return None
    first, second = outer.values
    if any(each is node for each in ast.walk(first)) or not any(each is node for each in ast.walk(second)):
        return None
    test = first.left if isinstance(first, ast.Compare) else first
    return outer if dotted(test) == dotted(node.left) else None


# ---- other lines


def _prepare(scene: Scene, verdict: Verdict) -> Iterator[str]:  # noqa: ARG001
    """MB302: give the scheduler to `prepare`, or prepare it where it is made."""
    if not isinstance(scene.node, ast.Call) or not isinstance(scene.node.func, ast.Attribute):
        return
    scheduler = Draft(scene.source).text(scene.node.func.value)
    made = [
        node for node in ast.walk(scene.module.tree)
        if isinstance(node, ast.Assign) and any(dotted(target) == scheduler for target in node.targets)
    ]  # fmt: skip
    for call in (node for node in ast.walk(scene.module.tree) if isinstance(node, ast.Call)):
        parent = scene.module.parents.get(call)
        if last_name(call.func) != "prepare" or not isinstance(parent, ast.Assign) or not call.args:
            continue
        target = parent.targets[0]
        early = all(each.lineno < parent.lineno and scene.scope_of(each) is scene.scope_of(parent) for each in made)
        if early and isinstance(target, ast.Tuple) and len(target.elts) == len(call.args) and not call.keywords:
            draft = Draft(scene.source)
            for last in (target.elts[-1], call.args[-1]):
                draft.replace(last, f"{draft.text(last)}, {scheduler}")
            yield draft.result()
        elif made and not early:
            draft = Draft(scene.source)
            if draft.is_alone(made[-1]):
                row, indent = draft.rows(made[-1])[1] + 1, draft.indent(made[-1])
                draft.replace_rows(row, row - 1, [f"{indent}{scheduler} = {draft.text(call.func)}({scheduler})"])
                yield draft.result()


def _log_whole(scene: Scene, verdict: Verdict) -> Iterator[str]:  # noqa: ARG001
    """MB701: report the loss without its division."""
    statement = scene.statement
    names = scene.window_names()
    if statement is None or not isinstance(scene.node, ast.Call):
        return
    for node in ast.walk(scene.node):
        draft = Draft(scene.source)
        if (
            isinstance(node, ast.BinOp)
            and isinstance(node.op, ast.Div)
            and text_of(node.right) in names
            and draft.is_exact(node)
        ):
            draft.replace(node, draft.text(node.left))
            yield draft.result()
    shown = [each for each in ast.walk(scene.node) if isinstance(each, ast.Call) and last_name(each.func) == "item"]
    shown += [each for each in scene.node.args if isinstance(each, ast.Name)]
    for node in shown:
        draft = Draft(scene.source)
        if draft.is_exact(node):
            for n in names:
                draft.replace(node, f"{draft.text(node)} * {n}")
                yield draft.result()
                draft.changes.clear()


def _take_out(scene: Scene, verdict: Verdict) -> Iterator[str]:  # noqa: ARG001
    """MB603: leave the line out."""
    statement = movable(scene)
    if statement is not None and isinstance(statement, ast.Expr) and statement.value is scene.node:
        yield from without(scene, statement)


MENDS: Mapping[str, Mend] = {
    "MB101": _divide,
    "MB102": _divide_once,
    "MB103": clear_once,
    "MB104": step_once,
    "MB105": _phase,
    "MB106": backward_always,
    "MB107": clear_after,
    "MB201": clip_once,
    "MB202": unscale_first,
    "MB203": clip_once,
    "MB301": once_a_window,
    "MB302": _prepare,
    "MB303": once_a_window,
    "MB502": widen_no_sync,
    "MB603": _take_out,
    "MB701": _log_whole,
}
