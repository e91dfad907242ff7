"""Which microbatches enter which step, and with which weight: MB101 to MB114."""

import ast
from collections.abc import Iterator
from dataclasses import dataclass
from fractions import Fraction
from itertools import pairwise
from typing import TypeAlias

from microbatch.linting.faults import Fault, View, fraction
from microbatch.linting.guesses import names_window
from microbatch.linting.syntax import dotted, last_name
from microbatch.linting.trace import Backward, StepTaken

__all__ = ["judge_weights"]


def judge_weights(view: View) -> Iterator[Fault]:
    """The faults of windows and weights that one run shows."""
    if not view.accumulates and view.outcome.used_window and not view.blocked:
        yield from _thrown_away(view)
    if not view.accumulates or view.blocked or "cached" in view.trace.settings:
        return
    if view.module.caches_outputs and any(b.loss.coupled for b in view.trace.backwards):
        return  # outputs are cached: each backward is one part of one loss
    if "deepspeed" in view.trace.frameworks:
        yield from _engine(view)
        return
    for steps, sites, apart in view.own_steps:
        sure = apart or not view.many_optimizers
        yield from _weights(view, steps, sites, sure=sure)
        yield from _cleared(view, steps, sure=sure)
        if view.many_optimizers:
            continue  # a loss may belong to one of them alone
        if not view.managed:
            yield from _phase(view, steps)
            yield from _tails(view, steps)
    yield from _every_microbatch(view)


def _engine(view: View) -> Iterator[Fault]:
    """DeepSpeed divides by the steps of its configuration."""
    for b in view.trace.backwards:
        if b.loss.divided:
            yield Fault(
                "MB102",
                b.node,
                "the loss is divided by N here, and DeepSpeed's engine divides it again",
                certain=False,
                needs=("`gradient_accumulation_steps` of the DeepSpeed configuration",),
            )
            return


_SHARED_STEP = "which optimizer each of the losses is for"


def _weights(view: View, steps: list[StepTaken], sites: set[ast.AST], *, sure: bool = True) -> Iterator[Fault]:
    """MB101 and MB102: the sum of the weights of a full window is not 1."""
    full = [s for s in steps if len(s.since) == view.n > 1 and s.weights]
    if not full or not view.outcome.used_window:
        return
    ran = [b for b in view.trace.backwards if b.node in sites and b.tick in full[0].since]
    divides = any(b.loss.divided for b in ran)
    for line in {b.node: b for b in ran}.values():
        values = {w for s in full for (m, site), w in s.sites.items() if m in s.since and site is line.node}
        if len(values) == 1:
            yield from _weight(view, line, values.pop(), window=_Window(sure=sure, divides=divides))


@dataclass(frozen=True, slots=True)
class _Window:
    """What else is known of a window: whether its optimizer is alone, and whether some loss is divided by N."""

    sure: bool
    divides: bool


def _weight(view: View, line: Backward, weight: Fraction, *, window: _Window) -> Iterator[Fault]:
    """MB101 and MB102 of one call of backward."""
    loss = line.loss
    if loss.mixed:
        yield Fault(
            "MB101",
            next((n for n in view.module.nodes if getattr(n, "lineno", 0) == loss.mixed), line.node),
            f"one term of the loss is divided by N and another is not: of that one, {view.n} microbatches are added",
            certain=window.sure and not loss.opaque,
            needs=(f"what {loss.opaque[0]} means",) if loss.opaque else (),
        )
    elif weight == 1 and not loss.divided:
        unknown = [o for o in loss.opaque if o.startswith(("divided", "multiplied"))]
        if unknown or loss.reduction == "sum":
            return
        sure = loss.reduction == "mean" and not loss.opaque and window.sure
        needs = () if sure else (f"whether the loss is a mean{_made_in(loss.opaque)}",)
        if not window.sure:
            needs = (*needs, _SHARED_STEP) if loss.reduction != "mean" else (_SHARED_STEP,)
        if "small rate" in view.trace.settings:
            sure, needs = False, ("whether the learning rate, which is divided by N, makes up for the sum",)
        yield Fault(
            "MB101",
            line.node,
            f"{view.n} microbatches are added and not divided: a step takes {view.n} times the mean gradient"
            + (" of this loss; another one is divided" if window.divides else ""),
            certain=sure,
            needs=needs,
        )
    elif weight == Fraction(1, view.n**2):
        yield Fault(
            "MB102",
            line.node,
            f"each microbatch enters with weight 1/{view.n**2}: the loss is divided by N twice",
            certain=window.sure,
            needs=() if window.sure else (_SHARED_STEP,),
        )


def _made_in(opaque: tuple[str, ...]) -> str:
    """Where a loss comes from that the file does not show, as a remark in brackets."""
    return f" (it comes out of {opaque[0]}, which this file does not show)" if opaque else ""


def _cleared(view: View, steps: list[StepTaken], *, sure: bool = True) -> Iterator[Fault]:
    """MB103: gradients are cleared between two backwards of one window."""
    epochs = view.trace.epoch_of
    for step in steps:
        lost = [m for m in step.lost if epochs.get(m) == step.epoch and m != step.tick]
        sleeps = "accumulate" in view.trace.frameworks and "prepare" in view.trace.settings
        if lost and (step.weights or not view.module.handles_gradients) and (sleeps or not view.managed):
            zeros = [m for m in view.marks("zero") if m.name in ("", step.optimizer)]
            zero = next((m for m in zeros if m.tick > min(lost) and m.tick <= step.tick), None)
            if zero is None:
                zero = next((m for m in zeros if m.tick == min(lost)), None)
            if zero is None:
                continue
            kept = [m for m in step.since if m in step.weights]
            if len(kept) == view.n and view.contributes != {b.node for b in view.trace.backwards}:
                continue  # gradients that no step is to take, as those for a measure of curvature
            in_turn = _alternates(view, step)
            yield Fault(
                "MB103",
                zero.node,
                f"gradients are cleared inside the window: a step keeps {len(kept)} of {len(step.since)} microbatches",
                certain=sure and not in_turn,
                needs=(f"whether `{step.optimizer}` is meant to leave out microbatches",)
                if in_turn
                else ()
                if sure
                else (_SHARED_STEP,),
            )
            return


def _alternates(view: View, step: StepTaken) -> bool:
    """Whether another optimizer steps after every microbatch, and nothing is called N: one of them waits by design."""
    others = {s.tick for s in view.trace.steps if s.optimizer != step.optimizer and s.loop is step.loop}
    return not view.module.windows[0] and not view.divides and others >= set(step.since)


def _phase(view: View, steps: list[StepTaken]) -> Iterator[Fault]:
    """MB105: a window that is no tail has another length than N."""
    if not view.clean or view.n == 1 or len(steps) < 2 or "assumed" in view.trace.settings:
        return
    if any(set(before.since) & set(step.since) for before, step in pairwise(steps)):
        return  # a tensor that was kept carries a microbatch on: that says nothing of the counter
    sizes = [len(s.since) for s in steps]
    if view.n not in sizes and (len(set(sizes)) != 1 or abs(sizes[0] - view.n) != 1):
        return
    wrong = next((i for i, size in enumerate(sizes) if size != view.n), None)
    if wrong is None or set(sizes) == {1}:
        return
    step = steps[wrong]
    total = sum(step.weights.get(m, Fraction(0)) for m in step.since)
    if total == 1 and len(set(step.weights.values())) == 1 and view.divides:
        return  # the script divides by what is really in the window
    first = "the first window" if wrong == 0 else f"window {wrong + 1}"
    weight = fraction(next(iter(step.weights.values()), Fraction(0)))
    if wrong != 0 and step.since and view.trace.epoch_of[step.since[0]] != view.trace.epoch_of[step.since[-1]]:
        return
    origin = view.trace.settings.get("origin")
    yield Fault(
        "MB105",
        step.node,
        f"{first} has {len(step.since)} microbatch{'es' if len(step.since) > 1 else ''} instead of {view.n} "
        f"(each with weight {weight})",
        certain=not view.many_optimizers and origin is None,
        needs=() if origin is None else (f"where the counter begins: `{origin}`",),
        data={"size": len(step.since), "first": wrong == 0},
    )


def _tails(view: View, steps: list[StepTaken]) -> Iterator[Fault]:
    """MB110 to MB113, and MB105 after a forced step: what happens to the remainder of an epoch."""
    if view.clean or not view.trace.last_ticks or "bounds" in view.trace.settings:
        return
    full = [s for s in steps if len(s.since) == view.n]
    if not full and view.n > 1:
        return
    epochs = view.trace.epoch_of
    tails = [
        s
        for s in steps
        if s.tick in view.trace.last_ticks and 0 < len(s.since) < view.n and len({epochs[m] for m in s.since}) == 1
    ]
    found = (
        _leaks_or_drops(view, steps),
        _counter_not_reset(view, steps),
        _tail_weight(view, tails),
        _tail_step_differs(full, tails),
    )
    for fault in found:
        if fault is not None:
            rule, step, message = fault
            yield Fault(
                rule, step.node, message, certain=False, needs=("the number of microbatches in an epoch, modulo N",)
            )


_TailFault: TypeAlias = tuple[str, StepTaken, str]  # the rule, the step at fault, the message


def _leaks_or_drops(view: View, steps: list[StepTaken]) -> _TailFault | None:
    """MB110 and MB111: the remainder enters the next epoch's first step, or no step at all."""
    length, epochs = view.outcome.run.length, view.trace.epoch_of
    for step in steps:
        live = [m for m in step.since if m in step.weights]
        if len({epochs[m] for m in live}) > 1 and len(live) != view.n:
            old = [m for m in live if epochs[m] != step.epoch]
            message = (
                f"with {length} microbatches an epoch, {_many(len(old))} left at its end "
                f"{'enter' if len(old) > 1 else 'enters'} the first step of the next epoch"
            )
            return "MB110", step, message
        gone = [m for m in step.lost if epochs[m] != step.epoch]
        if gone:
            message = (
                f"with {length} microbatches an epoch, the last {_many(len(gone))} {'is' if len(gone) == 1 else 'are'} "
                "cleared at the start of the next epoch without a step"
            )
            return "MB111", step, message
    if any(len({epochs[m] for m in s.since}) > 1 for s in steps):
        return None  # windows run on over the end of an epoch, each with N microbatches
    last = steps[-1]
    left = [t for t in view.ticks if t > last.tick and view.trace.loop_of.get(t) is last.loop]
    remainder = length % view.n
    if (
        left
        and len(left) < view.n
        and not any(s.tick in view.trace.last_ticks and len(s.since) == remainder for s in steps)
    ):
        enter = "enters" if len(left) == 1 else "enter"
        return "MB111", last, f"with {length} microbatches an epoch, {_many(len(left))} at its end never {enter} a step"
    return None


def _counter_not_reset(view: View, steps: list[StepTaken]) -> _TailFault | None:
    """MB105: after the forced step at the end of an epoch, the counter goes on."""
    ends = view.trace.last_ticks
    for before, step in pairwise(steps):
        forced = before.tick in ends and len(before.since) < view.n
        if forced and 0 < len(step.since) < view.n and step.tick not in ends:
            message = (
                "the forced step at the end of an epoch does not reset the counter: the next window has "
                f"{_many(len(step.since))} instead of {view.n}"
            )
            return "MB105", step, message
    return None


def _tail_weight(view: View, tails: list[StepTaken]) -> _TailFault | None:
    """MB112: the remainder is divided by N, not by its own length."""
    for step in tails:
        weights = {w for m, w in step.weights.items() if m in step.since}
        if weights == {Fraction(1, view.n)} and len(step.since) == view.outcome.run.length % view.n:
            message = (
                f"the last window has {_many(len(step.since))} and is still divided by {view.n}: its step takes "
                f"{len(step.since)}/{view.n} of the mean gradient"
            )
            return "MB112", step, message
    return None


def _tail_step_differs(full: list[StepTaken], tails: list[StepTaken]) -> _TailFault | None:
    """MB113: the step for the remainder leaves out what the main step does before."""
    words = {"clip": "clipping", "unscale": "`unscale_`"}
    for step in tails:
        main = next((s for s in full if s.node is not step.node), None)
        done = dict.fromkeys(main.prior) if main is not None else {}
        missing = [words[p] for p in done if p in words and p not in step.prior]
        if missing:
            message = f"the step for the remainder lacks the {' and the '.join(missing)} of the main step"
            return "MB113", step, message
    return None


def _many(count: int) -> str:
    return "1 microbatch" if count == 1 else f"{count} microbatches"


def _every_microbatch(view: View) -> Iterator[Fault]:
    """MB104 and MB106: every microbatch steps, or only the last one of a window runs a backward."""
    if view.managed or view.n == 1:
        return
    steps = [s for s in view.trace.steps if s.since]
    if not steps or any(len(s.since) > 1 for s in steps):
        return
    at = set(view.ticks)
    neighbours = sum(later - tick == 1 for tick, later in pairwise(view.ticks))
    if view.divides and view.step_ticks >= at and len(at) >= 2 * view.n and neighbours >= len(at) // 2:
        backward = view.trace.backwards[0]
        weight = fraction(next(iter(backward.loss.weights.values())))
        yield Fault(
            "MB104",
            steps[0].node,
            f"the loss is divided by N, and the optimizer steps after every microbatch: each step takes one "
            f"microbatch with weight {weight}",
            certain=not view.many_optimizers and not _counts_to_step(view, steps[0].node),
            needs=("whether the condition of the step holds in every microbatch",),
        )
    elif _only_last_runs(view):
        yield _only_last(view)


def _counts_to_step(view: View, node: ast.AST) -> bool:
    """Whether a condition around a step counts, although no run saw it be false."""
    tests = (parent.test for parent in view.module.above(node) if isinstance(parent, ast.If))
    return any(isinstance(part, ast.BinOp) and isinstance(part.op, ast.Mod) for t in tests for part in ast.walk(t))


def _thrown_away(view: View) -> Iterator[Fault]:
    """MB106 where nothing is divided: the loss of every microbatch is computed, and one of N runs its backward."""
    names = {last_name(n) for n in view.module.nodes if isinstance(n, ast.Name | ast.Attribute)}
    if view.many_optimizers or not any(names_window(name) for name in names) or not _only_last_runs(view):
        return
    loss = view.trace.backwards[0].node
    guard = next((p for p in view.module.above(loss) if isinstance(p, ast.If)), None)
    inside = {dotted(n) for n in ast.walk(guard) if isinstance(getattr(n, "ctx", None), ast.Store)} if guard else set()
    read = {dotted(n) for n in ast.walk(loss) if isinstance(n, ast.Name) and isinstance(n.ctx, ast.Load)}
    if guard is not None and not read & inside:
        yield _only_last(view)


def _only_last_runs(view: View) -> bool:
    """Whether one microbatch of N runs a backward, at the end of each window."""
    at = view.ticks
    return 1 < len(at) < view.trace.tick and all(b - a == view.n for a, b in pairwise(at)) and view.clean and view.n > 1


def _only_last(view: View) -> Fault:
    return Fault(
        "MB106",
        view.trace.backwards[0].node,
        f"only one of {view.n} microbatches runs a backward: the others are computed and thrown away",
    )
