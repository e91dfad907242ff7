"""Gradients that are not cleared after a step, so that the next step takes them again: MB107."""

import ast
from collections.abc import Iterator

from microbatch.linting.clearing import calls_that_may_clear, places_of_clearing
from microbatch.linting.faults import Fault, View
from microbatch.linting.trace import StepTaken

__all__ = ["judge_stale"]


def judge_stale(view: View) -> Iterator[Fault]:
    """The fault that every step takes the gradients of the steps before it as well."""
    trace = view.trace
    if view.blocked or view.managed or "cached" in trace.settings or len(trace.steps) < 2:
        return
    cleared = [mark.name for mark in view.marks("zero")]
    if not set(cleared) <= {step.optimizer for step in trace.steps}:
        return  # under another name, it may be the optimizer that steps
    several = len({step.optimizer for step in trace.steps if step.since}) > 1
    for steps, sites, _ in view.own_steps:
        stale = [step for step in steps if _before(step, sites if several else None)]
        few = 2 * len(stale) < len(steps) or not any(s.node is stale[0].node for s in steps if s not in stale)
        if not stale or (few and view.clean):
            continue
        elsewhere: set[ast.AST] = {*places_of_clearing(view.module) - trace.cleared, *calls_that_may_clear(view.module)}
        elsewhere |= view.module.once("left out", lambda: set(_left_out(view)))
        yield Fault(
            "MB107",
            stale[0].node,
            _message(stale[0], several=several),
            certain=not elsewhere and not few,
            needs=("the number of microbatches in an epoch, modulo N",) if few else _unsure(elsewhere),
        )
        return


def _left_out(view: View) -> Iterator[ast.AST]:
    """The places in loops where an example leaves out code: `...`."""
    for node in view.module.nodes:
        left_out = isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant) and node.value.value is Ellipsis
        if left_out and view.module.is_inside_loop(node):
            yield node


def _unsure(elsewhere: set[ast.AST]) -> tuple[str, ...]:
    """What decides where the file clears gradients at a place that no run comes to, or may do so."""
    lines = sorted(getattr(node, "lineno", 0) for node in elsewhere)
    return (f"whether line {lines[0]} clears them",) if lines else ()


def _before(step: StepTaken, sites: set[ast.AST] | None) -> list[int]:
    """The microbatches of earlier steps that are still in the gradient of this one."""
    return sorted({tick for tick, site in step.stale if sites is None or site in sites})


def _message(step: StepTaken, *, several: bool) -> str:
    what = f"the gradients of `{step.optimizer}`" if several else "gradients"
    old = len({tick for tick, _ in step.stale})
    counted = "1 microbatch" if old == 1 else f"{old} microbatches"
    return (
        f"{what} are not cleared between two steps: this one takes {counted} of earlier steps once more, beside its "
        f"own {len(step.since)}"
    )
