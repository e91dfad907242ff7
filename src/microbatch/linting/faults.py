"""Faults as one run shows them; `verdicts.py` puts the runs together."""

import ast
from dataclasses import dataclass, field, replace
from fractions import Fraction
from functools import cached_property
from itertools import pairwise
from typing import Any

from microbatch.linting.module import Module
from microbatch.linting.runs import Outcome
from microbatch.linting.syntax import Loop
from microbatch.linting.trace import Mark, StepTaken

__all__ = ["Fault", "View", "fraction"]


def fraction(value: Fraction) -> str:
    """A weight as it is written in a message: "1/4", "1"."""
    return str(value.numerator) if value.denominator == 1 else f"{value.numerator}/{value.denominator}"


@dataclass
class Fault:
    """One fault of one run.

    Attributes:
        rule: The rule's code.
        node: The statement at fault.
        message: What happens, with the numbers of this run.
        certain: Whether this run settles it; `False` where `needs` decides.
        needs: What decides.
        data: Numbers for the words: N, sizes, weights.
    """

    rule: str
    node: ast.AST
    message: str
    certain: bool = True
    needs: tuple[str, ...] = ()
    data: dict[str, Any] = field(default_factory=dict)


class View:
    """One run, with the questions that all judges ask."""

    def __init__(self, module: Module, outcome: Outcome) -> None:
        self.module = module
        self.outcome = outcome
        self.trace = outcome.trace
        self.n = outcome.run.microbatches
        self.clean = outcome.clean  # no remainder at the end of an epoch

    @cached_property
    def ticks(self) -> list[int]:
        """The microbatches that ran a backward, in order."""
        return list(dict.fromkeys(b.tick for b in self.trace.backwards))

    @cached_property
    def step_ticks(self) -> set[int]:
        """The microbatches after which an optimizer stepped."""
        return {s.tick for s in self.trace.steps}

    @cached_property
    def by_optimizer(self) -> dict[tuple[str, ast.AST | None], list[StepTaken]]:
        """The steps of each optimizer, in each loop, that took gradients."""
        found: dict[tuple[str, ast.AST | None], list[StepTaken]] = {}
        for step in self.trace.steps:
            if step.since:
                found.setdefault((step.optimizer, step.loop), []).append(step)
        return found

    @cached_property
    def own_steps(self) -> list[tuple[list[StepTaken], set[ast.AST], bool]]:
        """The steps of each optimizer in each loop, of several optimizers with the gradients alone that are for it.

        A backward is for the optimizer that steps first after it.

        Returns:
            Each time the steps, the calls of backward, and whether no other backward stands between them.
        """
        every = {b.node for b in self.trace.backwards}
        if len({step.optimizer for step in self.trace.steps if step.since}) < 2:
            return [(steps, every, True) for steps in self.by_optimizer.values()]
        nearest: dict[ast.AST, tuple[int, str]] = {}
        later = iter(self.trace.steps)
        step = next(later, None)
        for index, b in enumerate(self.trace.backwards):
            while step is not None and step.after <= index:
                step = next(later, None)
            if step is None:
                break
            if b.node not in nearest or step.after - index < nearest[b.node][0]:
                nearest[b.node] = (step.after - index, step.optimizer)
        found: list[tuple[list[StepTaken], set[ast.AST], bool]] = []
        for name in dict.fromkeys(name for _, name in nearest.values()):
            sites = {site for site, (_, owner) in nearest.items() if owner == name}
            steps, apart = self._only(name, sites)
            by_loop: dict[ast.AST | None, list[StepTaken]] = {}
            for taken in steps:
                by_loop.setdefault(taken.loop, []).append(taken)
            found += [(each, sites, apart) for each in by_loop.values()]
        return found

    def _only(self, optimizer: str, sites: set[ast.AST]) -> tuple[list[StepTaken], bool]:
        """The steps of one optimizer as if only these calls of backward had run."""
        steps: list[StepTaken] = []
        before, apart = 0, True
        for step in self.trace.steps:
            if step.optimizer != optimizer:
                continue
            between = self.trace.backwards[before : step.after]
            before = step.after
            own = [index for index, b in enumerate(between) if b.node in sites]
            if not own:
                continue
            apart = apart and all(b.node in sites for b in between[own[0] :])
            since = list(dict.fromkeys(between[index].tick for index in own))
            weights: dict[int, Fraction] = {}
            for (tick, site), weight in step.sites.items():
                if site in sites and tick in since:
                    weights[tick] = max(weight, weights.get(tick, Fraction(0)))
            lost = [m for m in since if m not in weights]
            steps.append(replace(step, since=since, weights=weights, lost=lost))
        return steps, apart

    @cached_property
    def many_optimizers(self) -> bool:
        """Whether several optimizers step at places of their own, so that a loss may belong to one of them alone."""
        loops: dict[ast.AST, set[str]] = {}
        for step in self.trace.steps:
            for loop in (step.loop, *(p for p in self.module.above(step.node) if isinstance(p, Loop))):
                if loop is not None and step.since:
                    loops.setdefault(loop, set()).add(step.optimizer)
        apart = len({s.node for s in self.trace.steps}) > 1 or self._step_in_turn
        return apart and any(len(names) > 1 for names in loops.values())

    @cached_property
    def _step_in_turn(self) -> bool:
        """Whether one helper takes the steps of several optimizers, each after a backward of its own."""
        return any(
            one.tick == other.tick and one.optimizer != other.optimizer and one.after != other.after
            for one, other in pairwise(self.trace.steps)
        )

    @cached_property
    def contributes(self) -> set[ast.AST]:
        """The calls of backward whose gradients some step takes; all of them, where none does."""
        found = {site for step in self.trace.steps for (_, site), weight in step.sites.items() if weight}
        return found or {b.node for b in self.trace.backwards}

    @cached_property
    def divides(self) -> bool:
        """Whether some loss was divided by N, by the script itself."""
        return any(b.loss.divided for b in self.trace.backwards)

    @cached_property
    def accumulates(self) -> bool:
        """Whether this is accumulation at all: a step takes several microbatches, or the script divides by N."""
        if self.many_optimizers and not self.outcome.used_window:
            return False  # one batch, several losses
        return self.has_windows or (self.divides and self.outcome.used_window)

    @cached_property
    def has_windows(self) -> bool:
        """Whether some step takes several microbatches."""
        return any(len(s.since) > 1 for s in self.trace.steps)

    @cached_property
    def managed(self) -> bool:
        """Whether a framework decides which microbatch steps: Accelerate's `accumulate()`, DeepSpeed's engine."""
        return bool(self.trace.frameworks & {"accumulate", "deepspeed"})

    @cached_property
    def blocked(self) -> tuple[str, ...]:
        """What on the way to the step could not be read."""
        return tuple(self.trace.opaque)

    def marks(self, *kinds: str) -> list[Mark]:
        """The events of these kinds, in order."""
        return [m for m in self.trace.marks if m.kind in kinds]

    def opaque_losses(self) -> tuple[str, ...]:
        """What on the way to the losses could not be read."""
        return tuple(dict.fromkeys(o for b in self.trace.backwards for o in b.loss.opaque))
