"""What all runs of a file say together: which faults are certain, and what the others depend on."""

import ast
import re
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace

from microbatch.linting.doubts import doubt_of_gradients, doubt_of_weights
from microbatch.linting.faults import Fault, View
from microbatch.linting.judge_costs import judge_costs, judge_survey
from microbatch.linting.judge_gradients import judge_gradients
from microbatch.linting.judge_loss import judge_loss
from microbatch.linting.judge_options import ignored_option
from microbatch.linting.judge_stale import judge_stale
from microbatch.linting.judge_weights import judge_weights
from microbatch.linting.module import Module
from microbatch.linting.runs import Outcome, Root, simulate

__all__ = ["Reading", "Verdict", "read"]

# A setting that is about the machine, not about the method: what is wrong under it is wrong.
_PRECISION = re.compile(r"amp|fp16|half|autocast|scaler|mixed|bf16|precision", re.IGNORECASE)
_OF_SETTINGS = frozenset({"MB202", "MB502", "MB503"})
_JUDGES: tuple[Callable[[View], Iterator[Fault]], ...] = (
    judge_weights,
    judge_stale,
    judge_gradients,
    judge_loss,
    judge_costs,
)


@dataclass
class Verdict:
    """A fault with all runs taken together."""

    fault: Fault
    certain: bool
    needs: tuple[str, ...] = ()
    outcome: Outcome | None = None


@dataclass
class Reading:
    """What the doctor saw in a file.

    Attributes:
        verdicts: The faults, in the order of their lines.
        roots: What was run.
        optimizer: The class of the optimizer, where the file shows one alone.
        clipped: Whether gradients are clipped.
    """

    verdicts: list[Verdict]
    roots: list[Root]
    optimizer: str = ""
    clipped: bool | None = None


def read(module: Module) -> Reading:
    """Run a file and put its faults together."""
    found: dict[tuple[str, ast.AST], Verdict] = {}
    roots = simulate(module)
    for root in roots:
        for verdict in _of_root(module, root):
            key = (verdict.fault.rule, verdict.fault.node)
            if key not in found or (verdict.certain and not found[key].certain):
                found[key] = verdict
    for fault, outcome in ignored_option(module, roots):
        found.setdefault((fault.rule, fault.node), Verdict(fault, fault.certain, fault.needs, outcome))
    shifted = {node for (rule, node), verdict in found.items() if rule == "MB105" and verdict.certain}
    for node in shifted:
        found.pop(("MB111", node), None)  # what is left over follows from the shift
    for node in {node for rule, node in found if rule == "MB104"}:
        found.pop(("MB107", node), None)  # what is not cleared belongs to the same window
    ordered = sorted(found.values(), key=lambda v: (getattr(v.fault.node, "lineno", 0), v.fault.rule))
    traces = [outcome.trace for root in roots for outcome in root.outcomes]
    made = {name for trace in traces for name in trace.settings.get("optimizers", {})}
    clipped = any(mark.kind == "clip" for trace in traces for mark in trace.marks)
    return Reading(ordered, roots, made.pop() if len(made) == 1 else "", clipped if traces else None)


def _of_root(module: Module, root: Root) -> Iterator[Verdict]:
    """The verdicts of one root: each run is judged alone, and then the runs are compared."""
    shown: dict[tuple[str, ast.AST], list[tuple[Fault, Outcome]]] = {}
    for outcome in root.outcomes:
        view = View(module, outcome)
        for judge in _JUDGES:
            for fault in judge(view):
                shown.setdefault((fault.rule, fault.node), []).append((fault, outcome))
    for (_, node), faults in shown.items():
        verdict = _together(root, node, faults)
        doubt = _doubt(module, verdict.fault.rule) if verdict.certain else None
        if doubt is not None:
            verdict = replace(verdict, certain=False, needs=(doubt,))
        yield verdict
    yield from _steps_too_often(root)
    yield from _skips(root)
    if root.survey is not None:
        for fault in judge_survey(View(module, root.survey)):
            yield Verdict(fault, fault.certain, fault.needs, root.survey)


def _steps_too_often(root: Root) -> Iterator[Verdict]:
    """MB104 by comparison: with one setting windows are accumulated, and with another every microbatch steps."""
    clean = [o for o in root.outcomes if o.clean and not o.trace.opaque and "assumed" not in o.trace.settings]
    windows = [o for o in clean if o.used_window and any(len(s.since) > 1 for s in o.trace.steps)]
    for outcome in clean:
        steps = [s for s in outcome.trace.steps if s.since]
        ticks = {b.tick for b in outcome.trace.backwards}
        if not windows or len(steps) < 2 or any(len(s.since) != 1 for s in steps) or {s.tick for s in steps} != ticks:
            continue
        settings = [key for key, said in root.questions[outcome.fork].items() if said]
        if not any(w.run.microbatches == outcome.run.microbatches and w.fork != outcome.fork for w in windows):
            continue
        needs = tuple(f"`{key}`" for key in settings)
        setting = " and ".join(needs) or "the other setting"
        message = f"with {setting}, the optimizer steps after every microbatch and ignores N"
        yield Verdict(
            Fault("MB104", steps[0].node, message), any(_PRECISION.search(key) for key in settings), needs, outcome
        )
        return


def _skips(root: Root) -> Iterator[Verdict]:
    """MB114: a microbatch that is left out makes its window short."""
    for outcome in root.skips:
        trace = outcome.trace
        mark = next((m for m in trace.marks if m.kind == "skip"), None)
        if mark is None or trace.opaque:
            continue
        n = outcome.run.microbatches
        short = next(
            (s for s in trace.steps if s.tick >= mark.tick and 0 < len([m for m in s.since if m in s.weights]) < n),
            None,
        )
        if short is not None and sum(short.weights.values()) != 1 and any(len(s.since) == n for s in trace.steps):
            count = len([m for m in short.since if m in short.weights])
            message = (
                f"a microbatch that is left out here makes its window short: the step takes {count} of {n} "
                f"microbatches, each with weight 1/{n}"
            )
            yield Verdict(
                Fault("MB114", mark.node, message, certain=False),
                certain=False,
                needs=("whether a microbatch is ever left out",),
                outcome=outcome,
            )
            return


def _together(root: Root, node: ast.AST, faults: list[tuple[Fault, Outcome]]) -> Verdict:
    """One verdict from all runs: certain if every run that comes to the statement, with no remainder, shows it."""
    faults = [(fault, outcome) for fault, outcome in faults if outcome.clean] or faults
    first, outcome = faults[0]
    active = {
        (o.fork, o.run.microbatches) for o in root.outcomes if o.clean and node in o.seen and _matters(first.rule, o)
    }
    holds = {(o.fork, o.run.microbatches) for _, o in faults if o.clean}
    needs = list(dict.fromkeys(need for fault, _ in faults for need in fault.needs))
    certain = all(f.certain for f, _ in faults) and bool(holds) and holds >= active
    if not root.complete and first.rule in _OF_SETTINGS:
        certain = False  # a setting that was not tried may be the one that the loop is meant for
    assumed = outcome.trace.settings.get("assumed")
    if assumed and certain:
        certain, needs = False, [f"whether `{assumed}` counts microbatches"]
    if first.rule == "MB104" and any(o.clean and not o.trace.steps for o in root.outcomes):
        certain = False  # what decides about the step is not in the file
    if not certain and not needs:
        needs = _settings(root, holds, active)
    return Verdict(first, certain, tuple(needs), outcome)


def _doubt(root_module: Module, rule: str) -> str | None:
    """What else in the file decides about a fault of the weights."""
    if rule == "MB101":
        return doubt_of_weights(root_module)
    return doubt_of_gradients(root_module) if rule in ("MB103", "MB104", "MB107") else None


def _matters(rule: str, outcome: Outcome) -> bool:
    """Whether a run can have a fault at all: clipping scaled gradients needs a scaler, a short window needs windows."""
    if rule == "MB202":
        return any(b.loss.scaled for b in outcome.trace.backwards)
    if rule in ("MB502", "MB503"):
        return any(not b.synced for b in outcome.trace.backwards)
    steps = Counter(s.optimizer for s in outcome.trace.steps if s.since)
    if rule == "MB105" and (max(steps.values(), default=0) < 2 or "assumed" in outcome.trace.settings):
        return False  # one window shows no other length, and neither do those of a count that is not followed
    if rule == "MB105" and all(len(s.since) != outcome.run.microbatches for s in outcome.trace.steps):
        return False  # no window has N microbatches, so that nothing is said of the others
    return rule in ("MB104", "MB106", "MB107") or any(len(s.since) > 1 for s in outcome.trace.steps)


def _settings(root: Root, holds: set[tuple[int, int]], active: set[tuple[int, int]]) -> list[str]:
    """The settings by which runs with the fault differ from runs without it."""
    with_it = [root.questions[fork] for fork in {fork for fork, _ in holds}]
    without = [root.questions[fork] for fork in {fork for fork, _ in active - holds}]
    keys = {key for decisions in with_it for key in decisions} or {key for decisions in without for key in decisions}
    return [f"`{key}`" for key in sorted(keys)]
