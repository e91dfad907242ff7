"""What costs time, and what is reported wrongly: MB501 to MB503, MB601 to MB603, MB701 and MB702."""

import ast
import re
from collections.abc import Iterator
from fractions import Fraction

from microbatch.linting.faults import Fault, View
from microbatch.linting.syntax import dotted
from microbatch.linting.trace import Mark

__all__ = ["judge_costs", "judge_survey"]

_HELD = re.compile(r"\b(no_sync|no_backward_sync|require_backward_grad_sync|require_forward_param_sync)\b")
_RANKS = re.compile(
    r"\b(all_reduce\w*|is_main_process|world_size|DistributedSampler|is_dist\w*|init_process_group|distributed)\b"
)


def judge_costs(view: View) -> Iterator[Fault]:
    """The faults of communication, and graphs that are kept."""
    if not view.accumulates:
        return
    backwards = view.trace.backwards
    if view.has_windows and not view.blocked:
        yield from _reduces(view)
        unsynced = [b for b in backwards if not b.synced]
        outside = next((b for b in unsynced if b.loss.forward_synced), None)
        if outside is not None:
            yield Fault(
                "MB502",
                outside.node,
                "`no_sync` holds the backward and not the forward: gradients are reduced in every microbatch all the "
                "same",
            )
        never = next((s for s in view.trace.steps if not s.reduced and s.since), None)
        if (
            never is not None
            and outside is None
            and not view.managed
            and all(b.loss.forward_synced is not True for b in unsynced)
        ):
            yield Fault(
                "MB503",
                never.node,
                "forward and backward of every microbatch run under `no_sync`: gradients are never reduced, and the "
                "ranks drift apart",
            )
    kept = next(iter(view.marks("retained")), None)
    if kept is not None and kept.value is not None and len(kept.value.weights) >= view.n:
        yield Fault(
            "MB602",
            kept.node,
            f"one backward runs through {len(kept.value.weights)} microbatches: their graphs are all kept, which is "
            "the memory of the whole batch",
        )


def _reduces(view: View) -> Iterator[Fault]:
    """MB501: nothing in the file holds the reduction back."""
    frameworks, words = view.trace.frameworks, view.module.names_text
    if frameworks & {"no_sync", "sync switch", "accumulate", "deepspeed"} or _HELD.search(words):
        return
    backward = view.trace.backwards[0].node
    if "ddp" in frameworks or view.module.wraps_ddp:
        yield Fault(
            "MB501",
            backward,
            f"DistributedDataParallel reduces all gradients in every microbatch: {view.n} times for each step",
        )
    elif _RANKS.search(words) or "accelerate" in frameworks or "lightning" in frameworks:
        yield Fault(
            "MB501",
            backward,
            "if the model is wrapped in DistributedDataParallel, all gradients are reduced in every microbatch: "
            f"{view.n} times for each step",
            certain=False,
            needs=("whether the model is wrapped in DistributedDataParallel",),
        )


def judge_survey(view: View) -> Iterator[Fault]:
    """What the run of all statements shows: waits for the device, and numbers that are logged."""
    if not view.accumulates and not view.managed:
        return
    ticks = len(view.ticks)
    by_node: dict[tuple[str, ast.AST], list[Mark]] = {}
    for mark in view.marks("sync", "empty_cache", "log", "sum"):
        by_node.setdefault((mark.kind, mark.node), []).append(mark)
    lines: set[int] = set()
    for (kind, node), marks in by_node.items():
        often = {m.tick for m in marks} & set(view.ticks)
        line = getattr(node, "lineno", 0)
        if kind == "log":
            yield from _logged(view, node, marks)
        elif kind == "sum":
            yield from _summed(view, node, marks)
        elif len(often) >= 0.9 * ticks and ticks > 2 and line not in lines:
            lines.add(line)
            if kind == "sync":
                yield Fault(
                    "MB601",
                    node,
                    f"`{marks[0].name}` waits for the device in every microbatch",
                    data={"what": marks[0].name},
                )
            else:
                yield Fault(
                    "MB603", node, "the memory cache is emptied in every microbatch: memory is asked for anew each time"
                )


def _in_stepping_loop(view: View, mark: Mark) -> bool:
    """Whether steps are taken after microbatches of the loop that a number comes from; a test may run backwards too."""
    loop = view.trace.loop_of.get(mark.tick)
    return any(step.loop is loop and step.tick >= mark.tick - view.n for step in view.trace.steps)


def _logged(view: View, node: ast.AST, marks: list[Mark]) -> Iterator[Fault]:
    """MB701 and MB702: the number that is logged is not the loss of the window."""
    values = [m for m in marks if m.value is not None and not m.value.blurred and m.value.weights]
    values = [m for m in values if _in_stepping_loop(view, m)]
    if not values or not view.has_windows:
        return
    scaled = Fraction(1, view.n)
    single = [m for m in values if len(m.value.weights) == 1]
    totals = {m.value.total() for m in values}
    if totals == {scaled} and view.n > 1 and not _rescaled(view, values[0].name.rpartition(".")[0]):
        yield Fault(
            "MB701", node, f"`{values[0].name}` gets the loss divided by N: what is reported is 1/{view.n} of the loss"
        )
        return
    boundary = all(m.tick in view.step_ticks or _is_outside(view, node) for m in values)
    if any(m.detail == "all" for m in values):
        return  # each microbatch is logged, and Lightning averages them
    if boundary and len(single) == len(values) and totals <= {scaled, Fraction(1)} and len(values) > 1:
        yield Fault("MB702", node, f"`{values[0].name}` gets the loss of the last microbatch alone, 1 of {view.n}")


def _rescaled(view: View, meter: str) -> bool:
    """Whether the file multiplies by N what a meter gives: `losses.avg * accum_steps`, or a name for it."""
    module = view.module

    def gives(node: ast.AST, names: set[str]) -> bool:
        held = (dotted(part.value) for part in ast.walk(node) if isinstance(part, ast.Attribute))
        return meter in held or any(isinstance(part, ast.Name) and part.id in names for part in ast.walk(node))

    if not meter:
        return False
    made = {dotted(n.targets[0]) for n in module.nodes if isinstance(n, ast.Assign) and gives(n.value, set())}
    products = (n for n in module.nodes if isinstance(n, ast.BinOp) and isinstance(n.op, ast.Mult))
    return any(
        (module.is_window(n.right) and gives(n.left, made)) or (module.is_window(n.left) and gives(n.right, made))
        for n in products
    )


def _summed(view: View, node: ast.AST, marks: list[Mark]) -> Iterator[Fault]:
    """MB702: a sum that takes the loss of the last microbatch of each window alone."""
    marks = [mark for mark in marks if _in_stepping_loop(view, mark)]
    if not view.has_windows or len(marks) < 2:
        return
    single = all(m.value.weights and len(m.value.weights) == 1 and set(m.value.weights) == {m.tick} for m in marks)
    if single and all(m.tick in view.step_ticks for m in marks) and len(marks) < len(view.ticks):
        yield Fault("MB702", node, f"`{marks[0].name}` adds the loss of the last microbatch alone, 1 of {view.n}")


def _is_outside(view: View, node: ast.AST) -> bool:
    """Whether a statement stands after the loop over microbatches of a window."""
    loops = view.module.loops_above(node)
    return not loops or not view.module.is_microbatch_loop(loops[0], view.module.owner_of(loops[0]))
