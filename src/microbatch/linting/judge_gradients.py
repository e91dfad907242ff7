"""What is done to the gradients between backward and step, and how schedules and averages count: MB201 to MB305."""

import ast
from collections.abc import Iterator

from microbatch.linting.faults import Fault, View
from microbatch.linting.guesses import names_window
from microbatch.linting.judge_counters import loaders_give_windows, mixed_units, units_of_lengths
from microbatch.linting.schedule_units import WINDOWS, chosen_by, counts, made_in_rows, schedule_units
from microbatch.linting.syntax import dotted, last_name, text_of
from microbatch.linting.trace import Mark

__all__ = ["judge_gradients"]


def judge_gradients(view: View) -> Iterator[Fault]:
    """The faults of clipping, loss scaling, schedules and averages that one run shows."""
    if not view.accumulates and not view.managed:
        return
    yield from _clips(view)
    yield from _scaler(view)
    yield from _schedules(view)
    yield from _averages(view)
    yield from _recreated(view)
    yield from view.module.once("MB304", lambda: _counters(view))


def _counters(view: View) -> list[Fault]:
    """MB304: by the ways in which a run is often resumed, or else by what the numbers count."""
    return [*_skipped_units(view), *_replayed(view)] or mixed_units(view.module)


def _clips(view: View) -> Iterator[Fault]:
    """MB201 and MB202: partial or scaled gradients are clipped."""
    said: set[tuple[str, ast.AST]] = set()
    for mark in view.marks("clip"):
        if not mark.detail:
            continue
        if mark.value and ("MB202", mark.node) not in said:
            said.add(("MB202", mark.node))
            yield Fault("MB202", mark.node, f"`{mark.name}` sees gradients that are still multiplied by the loss scale")
        if ("MB201", mark.node) not in said and _is_partial(view, mark):
            said.add(("MB201", mark.node))
            yield Fault(
                "MB201",
                mark.node,
                f"gradients are clipped after every microbatch: partial sums of 1 to {view.n} microbatches are clipped",
            )


def _is_partial(view: View, mark: Mark) -> bool:
    """Whether another microbatch is added after this clipping and before the step."""
    step = next((s for s in view.trace.steps if s.tick >= mark.tick and s.since), None)
    if step is None or step.tick == mark.tick or mark.tick not in step.weights:
        return False
    return any(mark.tick < b.tick <= step.tick for b in view.trace.backwards)


def _scaler(view: View) -> Iterator[Fault]:
    """MB203 and MB204: the calls of the gradient scaler are too many, too few or in the wrong order."""
    again = next((m for m in view.marks("unscale") if m.detail), None)
    if again is not None:
        yield Fault(
            "MB203", again.node, "`unscale_` runs twice before `update`: a RuntimeError in the second microbatch"
        )
    updates = view.marks("update")
    steps = view.marks("scaler step")
    if steps and not updates and not view.blocked:
        yield Fault(
            "MB204",
            steps[0].node,
            "`scaler.update` is never called: the loss scale never moves, and a step after a skipped one fails",
        )
    elif steps and updates:
        early = next((u for u in updates if u.tick not in {s.tick for s in steps}), None)
        if early is not None and len(updates) > len(steps) and not view.managed:
            yield Fault(
                "MB204", early.node, "`scaler.update` runs after every microbatch: the loss scale moves inside a window"
            )
        order = [m for m in view.trace.marks if m.kind in ("scaler step", "update") and m.tick == steps[0].tick]
        if order and order[0].kind == "update" and early is None:
            yield Fault(
                "MB204",
                order[0].node,
                "`scaler.update` runs before `scaler.step`: the step uses another scale than its gradients have",
            )


def _schedules(view: View) -> Iterator[Fault]:
    """MB301 and MB302: the learning rate schedule counts microbatches where it should count steps, or the reverse."""
    by_node: dict[ast.AST, list[Mark]] = {}
    for mark in view.marks("schedule"):
        by_node.setdefault(mark.node, []).append(mark)
    steps = [s for s in view.trace.steps if s.since]
    if not steps or all(len(s.since) == 1 for s in steps):
        return
    for node, marks in by_node.items():
        ticks = {m.tick for m in marks}
        inside = ticks - view.step_ticks
        units, unless = marks[0].value, tuple[str, ...]()
        if units == "microbatches" and view.module.once("windows", lambda: loaders_give_windows(view.module)):
            continue
        if not units:
            units = view.module.once("schedule", lambda: schedule_units(view.module))
            chosen = view.module.once("chosen schedule", lambda: chosen_by(view.module))
            unless = (f"`{chosen}`",) if chosen else ()
        if not units and not view.managed:  # a framework may advance a schedule once for each process
            units = view.module.once("lengths", lambda: units_of_lengths(view.module))
        if len(inside) >= len(view.ticks) // 2 and len(ticks) >= 0.9 * len(view.ticks):
            if view.managed and marks[0].detail == "unprepared":
                yield Fault(
                    "MB302",
                    node,
                    f"`{marks[0].name}` is not given to `prepare()`: it advances {view.n} times for each optimizer "
                    "step",
                    certain=units == "windows",
                    needs=("whether the schedule is meant in microbatches",),
                )
            elif units not in ("microbatches", "perhaps") and not view.managed:
                meant = () if units == "windows" else ("whether the schedule's length is meant in microbatches",)
                needs = (*meant, *unless)
                yield Fault(
                    "MB301",
                    node,
                    f"the schedule advances after every microbatch: {view.n} times for each optimizer step",
                    certain=not needs,
                    needs=needs,
                    data={"kind": "every"},
                )
        elif ticks <= view.step_ticks and len(ticks) >= len(view.step_ticks) - 1 and len(ticks) > 2:
            in_rows = view.module.once("schedule in rows", lambda: made_in_rows(view.module))
            if units not in ("microbatches", "perhaps") and in_rows is None:
                continue
            in_microbatches = units in ("microbatches", "perhaps")
            what = "microbatches" if in_microbatches else "rows"
            share = f"only 1/{view.n} of it is walked" if in_microbatches else "only a small part of it is walked"
            needs = ("whether the length is divided by the rows of a microbatch",) if units == "perhaps" else unless
            yield Fault(
                "MB301",
                (_constructor(view) if in_microbatches else in_rows) or node,
                f"the schedule's length counts {what} and it advances once a step: {share}",
                certain=not needs,
                needs=needs,
                data={"kind": "length"},
            )


def _constructor(view: View) -> ast.AST | None:
    """Where the file makes its schedule."""
    for node in view.module.nodes:
        if isinstance(node, ast.Call) and any("sched" in text_of(target).lower() for target in _targets(view, node)):
            return node
    return None


def _targets(view: View, node: ast.Call) -> list[ast.AST]:
    parent = view.module.parents.get(node)
    return list(parent.targets) if isinstance(parent, ast.Assign) else []


def _averages(view: View) -> Iterator[Fault]:
    """MB303: a moving average of the weights decays once a microbatch."""
    by_node: dict[ast.AST, list[Mark]] = {}
    for mark in view.marks("ema"):
        if not mark.detail:
            by_node.setdefault(mark.node, []).append(mark)
    if not view.has_windows:
        return
    for node, marks in by_node.items():
        ticks = {m.tick for m in marks}
        if len(ticks) >= 0.9 * len(view.ticks) and len(ticks - view.step_ticks) >= len(view.ticks) // 2:
            yield Fault(
                "MB303",
                node,
                f"the moving average is updated after every microbatch: it decays {view.n} times for each optimizer "
                "step",
            )


def _recreated(view: View) -> Iterator[Fault]:
    """MB305: the optimizer is made in the loop over epochs."""
    for mark in view.marks("optimizer"):
        loops = view.module.loops_above(mark.node)
        if (
            loops
            and isinstance(loops[0], ast.For)
            and "epoch" in text_of(loops[0].target).lower()
            and view.module.contains_backward(loops[0], None)
        ):
            yield Fault("MB305", mark.node, "the optimizer is made anew in every epoch: its moments are lost each time")
            return


def _skipped_units(view: View) -> Iterator[Fault]:
    """MB304: a resumed run skips as many microbatches as it took steps."""
    module = view.module
    in_steps = set(_names_of_steps(module.nodes))
    for node in module.nodes:
        if not isinstance(node, ast.If) or not isinstance(node.body[-1], ast.Continue):
            continue
        for test in (part for part in ast.walk(node.test) if isinstance(part, ast.Compare)):
            name, limit = dotted(test.left), dotted(test.comparators[0])
            counts_down = any(
                isinstance(s, ast.AugAssign) and isinstance(s.op, ast.Sub) and dotted(s.target) == name
                for s in node.body
            )
            if name in in_steps and counts_down:
                how = "one is taken off for each microbatch"
            elif limit and isinstance(test.ops[0], ast.Lt | ast.LtE) and _counts_microbatches(view, node, name):
                if limit not in in_steps and counts(module, limit) != WINDOWS:
                    continue
                name, how = limit, f"it is compared with `{name}`, which counts microbatches"
            else:
                continue
            yield Fault(
                "MB304",
                node,
                f"`{name}` counts optimizer steps, and {how}: "
                "a resumed run skips 1/N of the microbatches that it should skip",
            )
            return


def _names_of_steps(nodes: list[ast.AST]) -> Iterator[str]:
    """The names that are assigned a number of steps of an epoch: the rest of a division by `length // N`."""
    for node in nodes:
        if isinstance(node, ast.Assign) and len(node.targets) == 1:
            parts = [part for part in ast.walk(node.value) if isinstance(part, ast.BinOp)]
            back = any(
                isinstance(p.op, ast.Mult) and (names_window(last_name(p.left)) or names_window(last_name(p.right)))
                for p in parts
            )
            if not back and any(isinstance(p.op, ast.Mod) and _counts_steps(p.right) for p in parts):
                yield dotted(node.targets[0])


def _counts_microbatches(view: View, node: ast.AST, name: str) -> bool:
    """Whether a name is the number that a loop over microbatches gives to each of them."""
    loop = next(iter(view.module.loops_above(node)), None)
    if not isinstance(loop, ast.For) or not isinstance(loop.target, ast.Tuple) or not name:
        return False
    enumerates = any(isinstance(n, ast.Call) and last_name(n.func) == "enumerate" for n in ast.walk(loop.iter))
    micro = view.module.is_microbatch_loop(loop, view.module.owner_of(loop))
    return enumerates and micro and dotted(loop.target.elts[0]) == name


def _replayed(view: View) -> Iterator[Fault]:
    """MB304 once more: as many microbatches are drawn as steps were taken."""
    for node in view.module.nodes:
        if not (
            isinstance(node, ast.For)
            and isinstance(node.iter, ast.Call)
            and last_name(node.iter.func) == "range"
            and len(node.body) == 1
        ):
            continue
        body = node.body[0]
        draws = (
            isinstance(body, ast.Expr | ast.Assign)
            and isinstance(body.value, ast.Call)
            and last_name(body.value.func) == "next"
        )
        name = dotted(node.iter.args[-1]) if node.iter.args else ""
        if draws and name and _counted_in_steps(view, name):
            yield Fault(
                "MB304",
                node,
                f"`{name}` counts optimizer steps, and one microbatch is drawn for each: a resumed run skips 1/N of "
                "the microbatches that it should skip",
            )
            return


def _counted_in_steps(view: View, name: str) -> bool:
    """Whether a counter is raised once a step and not once a microbatch."""
    for node in view.module.nodes:
        if isinstance(node, ast.AugAssign) and dotted(node.target) == name and isinstance(node.op, ast.Add):
            owner = view.module.owner_of(node)
            loop = next(iter(view.module.loops_above(node)), None)
            if loop is None or not view.module.contains_backward(loop, owner):
                continue
            if not view.module.is_microbatch_loop(loop, owner):
                return True
    return False


def _counts_steps(node: ast.AST) -> bool:
    """Whether an expression is a number of steps of an epoch: a length divided by N."""
    return any(
        isinstance(n, ast.BinOp) and isinstance(n.op, ast.FloorDiv) and names_window(last_name(n.right))
        for n in ast.walk(node)
    )
