"""Ways to mend a fault by moving lines: from every microbatch to the place of the step, or the other way round."""

from __future__ import annotations

import ast
from collections.abc import Iterator

from microbatch.linting.draft import Draft, indented
from microbatch.linting.guesses import CLIP_CALLS, kind_of_name
from microbatch.linting.scene import Scene
from microbatch.linting.syntax import Loop, dotted, last_name
from microbatch.linting.verdicts import Verdict

__all__ = [
    "backward_always",
    "clear_after",
    "clear_once",
    "clip_once",
    "movable",
    "once_a_window",
    "step_once",
    "unscale_first",
    "unscale_lines",
    "widen_no_sync",
    "without",
]


def clear_once(scene: Scene, verdict: Verdict) -> Iterator[str]:
    """MB103: clear before the window's first backward, or after the step."""
    statement = movable(scene)
    if statement is None:
        return
    yield from _to_the_step(scene, verdict, before_a_loop=True)
    steps = {step.node for step in verdict.outcome.trace.steps} if verdict.outcome is not None else set[ast.AST]()
    beside = [each for node in steps if (step := scene.module.statement_of(node)) for each in scene.block(step)]
    if any(_is_call(each, "zero_grad") and each is not statement for each in beside):
        yield from without(scene, statement)  # the step clears already


def clear_after(scene: Scene, verdict: Verdict) -> Iterator[str]:
    """MB107: clear the gradients right after the step, and after the scaler's `update`."""
    statement, call = movable(scene), scene.node
    if statement is None or not isinstance(call, ast.Call) or not isinstance(call.func, ast.Attribute):
        return
    optimizer = call.args[0] if kind_of_name(dotted(call.func.value)) == "scaler" and call.args else call.func.value
    if not verdict.certain or not dotted(optimizer):
        return
    block = scene.block(statement)
    following = block[block.index(statement) + 1 :][:1]
    after = following[0] if following and _is_call(following[0], "update") else statement
    draft = Draft(scene.source)
    row = draft.rows(after)[1] + 1
    draft.replace_rows(row, row - 1, [f"{draft.indent(after)}{draft.text(optimizer)}.zero_grad()"])
    yield draft.result()


def once_a_window(scene: Scene, verdict: Verdict) -> Iterator[str]:
    """MB301 and MB303: move a line that runs after every microbatch behind the step."""
    if verdict.certain and verdict.fault.data.get("kind") != "length":
        yield from _to_the_step(scene, verdict)


def _to_the_step(scene: Scene, verdict: Verdict, *, before_a_loop: bool = False) -> Iterator[str]:  # noqa: ARG001
    """Move a line of its own behind the step, or, if wanted, to before the loop whose end the step stands behind."""
    statement = _moved_whole(scene)
    landing = scene.landing(statement) if statement is not None else None
    if statement is None or landing is None:
        return
    loop = next((each for each in scene.above(statement) if isinstance(each, Loop)), None)
    if before_a_loop and loop is not None and not any(each is loop for each in scene.above(landing)):
        draft = Draft(scene.source)
        draft.move(statement, draft.rows(loop, comments=True)[0], draft.indent(loop))
        yield draft.result()
        return
    block = scene.block(landing)
    after = landing
    for each in block[block.index(landing) + 1 :]:
        if not (
            isinstance(each, ast.Expr) and isinstance(each.value, ast.Call) and last_name(each.value.func) == "update"
        ):
            break
        after = each
    draft = Draft(scene.source)
    if draft.is_alone(after) or isinstance(after, ast.If | ast.With):
        draft.move(statement, draft.rows(after)[1] + 1, draft.indent(after))
        yield draft.result()


def clip_once(scene: Scene, verdict: Verdict) -> Iterator[str]:  # noqa: ARG001
    """MB201 and MB203: clip, or unscale, once a window: right before the step; clipping with `unscale_` before it."""
    statement = _moved_whole(scene)
    landing = scene.landing(statement) if statement is not None else None
    if statement is None or landing is None or not _stays_known(scene, statement, landing):
        return
    block = scene.block(statement)
    before = block[block.index(statement) - 1 :][:1] if block.index(statement) else []
    scaled = any(v.fault.rule == "MB202" and v.fault.node is scene.node for v in scene.reading.verdicts)
    for together in ([], [each for each in before if _is_call(each, "unscale_")]):
        for unscale in (unscale_lines(scene, landing), []) if scaled else ([], unscale_lines(scene, landing)):
            draft = Draft(scene.source)
            clips = [
                each
                for each in scene.block(landing)
                if any(CLIP_CALLS.search(last_name(c.func)) for c in scene.calls(each))
            ]
            goal = clips[0] if clips and _is_call(statement, "unscale_") else landing
            row, indent = draft.rows(goal, comments=True)[0], draft.indent(goal)
            for each in together:
                if draft.is_alone(each):
                    draft.move(each, row, indent)
            draft.replace_rows(row, row - 1, unscale)
            draft.move(statement, row, indent)
            yield draft.result()


def unscale_first(scene: Scene, verdict: Verdict) -> Iterator[str]:  # noqa: ARG001
    """MB202: call `unscale_` right before clipping."""
    statement = movable(scene)
    lines = unscale_lines(scene, statement) if statement is not None else []
    if statement is not None and lines:
        draft = Draft(scene.source)
        row = draft.rows(statement, comments=True)[0]
        draft.replace_rows(row, row - 1, lines)
        yield draft.result()


def unscale_lines(scene: Scene, at: ast.stmt) -> list[str]:
    """Return `scaler.unscale_(optimizer)` with the names of the file, as it can stand before a statement.

    If the file takes the scaler's step under one more condition, the line stands under it too.
    """
    step = scene.scaler_step
    if step is None or not isinstance(step.func, ast.Attribute):
        return []
    if any(call is not scene.node and last_name(call.func) == "unscale_" for call in scene.calls()):
        return []  # on other paths it is there; a second one raises
    draft = Draft(scene.source)
    indent, line = draft.indent(at), f"{draft.text(step.func.value)}.unscale_({draft.text(step.args[0])})"
    around = [at, *scene.above(at)]
    more = [each for each in scene.above(step) if each not in around and not isinstance(each, Loop)]
    more = [each for each in more if not (isinstance(each, ast.If) and scene.moduli(each.test))]
    if not more and not any(isinstance(each, ast.If) and _in_orelse(step, each) for each in around):
        return [indent + line]
    plain = ast.Name | ast.Attribute | ast.Compare | ast.Constant | ast.boolop | ast.BoolOp | ast.unaryop | ast.UnaryOp
    plain |= ast.cmpop | ast.expr_context
    extra = more or [each for each in around if isinstance(each, ast.If)][:1]
    branch = extra[0]
    if len(extra) != 1 or not isinstance(branch, ast.If) or _in_orelse(step, branch):
        return []
    if not all(isinstance(node, plain) for node in ast.walk(branch.test)):
        return []
    unit = draft.indent(branch.body[0])[len(draft.indent(branch)) :] or "    "
    return [f"{indent}if {draft.text(branch.test)}:", f"{indent}{unit}{line}"]


def _in_orelse(node: ast.AST, branch: ast.If) -> bool:
    return any(each is node for other in branch.orelse for each in ast.walk(other))


def backward_always(scene: Scene, verdict: Verdict) -> Iterator[str]:  # noqa: ARG001
    """MB106: run backward before the condition of the step."""
    statement = movable(scene)
    guard = scene.above(scene.node)[0] if scene.above(scene.node) else None
    if statement is None or not isinstance(guard, ast.If) or guard.body[0] is not statement:
        return
    draft = Draft(scene.source)
    draft.move(statement, draft.rows(guard, comments=True)[0], draft.indent(guard))
    if len(guard.body) == 1:
        if guard.orelse:
            return
        draft.replace_rows(guard.lineno, draft.rows(statement, comments=True)[0] - 1, [])
    yield draft.result()


def step_once(scene: Scene, verdict: Verdict) -> Iterator[str]:  # noqa: ARG001
    """MB104: move the step, and the calls that belong to it, from the end of the inner loop to behind it."""
    statement = movable(scene)
    block = scene.block(statement) if statement is not None else []
    loop = scene.module.parents.get(statement) if statement is not None else None
    run = list[ast.stmt]()
    while block and isinstance(block[-1 - len(run)], ast.Expr) and _belongs_to_the_step(block[-1 - len(run)]):
        run.insert(0, block[-1 - len(run)])
        if len(run) == len(block):
            return
    draft = Draft(scene.source)
    if statement in run and isinstance(loop, Loop) and not loop.orelse and all(draft.is_alone(each) for each in run):
        for each in run:
            draft.move(each, draft.rows(run[-1])[1] + 1, draft.indent(loop))
        yield draft.result()


def _belongs_to_the_step(statement: ast.stmt) -> bool:
    call = statement.value if isinstance(statement, ast.Expr) else None
    name = last_name(call.func) if isinstance(call, ast.Call) else ""
    return name in ("step", "zero_grad", "update", "unscale_") or CLIP_CALLS.search(name) is not None


def widen_no_sync(scene: Scene, verdict: Verdict) -> Iterator[str]:  # noqa: ARG001
    """MB502: begin the `with` block of `no_sync` before the forward pass."""
    holder = next((each for each in scene.above(scene.node) if isinstance(each, ast.With)), None)
    if holder is None:
        return
    block, draft = scene.block(holder), Draft(scene.source)
    models = {
        dotted(call.func.value)
        for call in scene.calls()
        if isinstance(call.func, ast.Attribute)
        and call.func.attr in ("no_sync", "no_backward_sync", "train", "parameters")
    }
    moved = block[: block.index(holder)]
    first = next((i for i, each in enumerate(moved) if any(dotted(c.func) in models for c in scene.calls(each))), None)
    if first is None or holder.body[0].lineno == holder.lineno:
        return
    moved = moved[first:]
    needs = {name for item in holder.items for name in scene.names_of(item.context_expr)}
    if needs & {name for each in moved for name in scene.stored(each)} or not all(
        draft.is_alone(each) for each in moved
    ):
        return
    old, new = draft.indent(holder), draft.indent(holder.body[0])
    begin, body = draft.rows(moved[0], comments=True)[0], draft.rows(holder.body[0], comments=True)[0]
    header = draft.lines(holder.lineno, body - 1)
    draft.replace_rows(begin, body - 1, header + indented(draft.lines(begin, holder.lineno - 1), old, new))
    yield draft.result()


def movable(scene: Scene) -> ast.stmt | None:
    """Return the statement of the node if it is a simple one with lines of its own."""
    statement = scene.statement
    is_simple = isinstance(statement, ast.Expr | ast.Assign | ast.AugAssign)
    return statement if is_simple and Draft(scene.source).is_alone(statement) else None


def _moved_whole(scene: Scene) -> ast.stmt | None:
    """Return what moves: the statement of the node, or the condition that holds it alone."""
    statement = movable(scene)
    whole = None if statement is None else scene.with_its_condition(statement)
    return whole if whole is not None and Draft(scene.source).is_alone(whole) else None


def without(scene: Scene, statement: ast.stmt) -> Iterator[str]:
    """Leave a statement out; with it a condition that holds nothing else."""
    while len(scene.block(statement)) == 1:
        parent = scene.module.parents.get(statement)
        if not isinstance(parent, ast.If) or parent.orelse:
            return
        statement = parent
    draft = Draft(scene.source)
    if draft.is_alone(statement) or isinstance(statement, ast.If):
        draft.replace_rows(*draft.rows(statement), [])
        yield draft.result()


def _stays_known(scene: Scene, statement: ast.stmt, landing: ast.stmt) -> bool:
    """Return whether what a statement binds is read where the statement goes, or nowhere."""
    bound, at = scene.stored(statement), scene.block(landing)
    inside = {id(node) for each in at for node in ast.walk(each)}
    for node in ast.walk(scene.scope):
        if (
            isinstance(node, ast.Name)
            and isinstance(node.ctx, ast.Load)
            and node.id in bound
            and id(node) not in inside
        ):
            return False
    return True


def _is_call(statement: ast.stmt, name: str) -> bool:
    call = statement.value if isinstance(statement, ast.Expr) else None
    return isinstance(call, ast.Call) and last_name(call.func) == name
