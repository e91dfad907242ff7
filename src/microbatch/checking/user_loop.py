"""A loop of the user's own as what is checked, and the classic mistakes in it."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from statistics import mean

from microbatch.checking.accumulating import Term
from microbatch.checking.causes import Suspect
from microbatch.checking.check_report import Cause
from microbatch.checking.gradient import Gradient, combined, fit, norm, relative_error
from microbatch.checking.loop_recorder import Gap, Run, watch
from microbatch.checking.samples import TOLERANCE
from microbatch.checking.trial_runs import SWITCHES, Stage
from microbatch.errors import CheckError
from microbatch.memory.signal_errors import is_from_signal

STILL = SWITCHES
ZEROED, CLIPPED, STEPPED = "zeroed_inside", "clipped_inside", "stepped_inside"
SCALES = ("not_divided", "wrong_divisor")
"""Mistakes in what all microbatches are multiplied with; a loop makes one of them at most."""
SHAPES = ("last_window", "counts")
"""Mistakes in how much they weigh beside one another; likewise."""
_ACCUMULATOR = "accumulator.step(batch, loss_fn), or `with accumulator.window() as window`, does it right"

REMEDIES = {
    "not_divided": f"divide every microbatch's loss by the number of microbatches; {_ACCUMULATOR}",
    "wrong_divisor": f"divide by what is really in the window; {_ACCUMULATOR}",
    "last_window": "weigh every microbatch by its own rows, over the rows that are really in the window; "
    "accumulator.windows(loader, microbatches=N) does so",
    "counts": "divide summed losses by what is counted in the whole window: mb.Loss(sum=..., count=...)",
    ZEROED: f"call zero_grad once a window, after the optimizer's step; {_ACCUMULATOR}",
    CLIPPED: "clip once, when the gradient is finished: Accumulator(..., max_grad_norm=...)",
    STEPPED: f"call optimizer.step once a window; {_ACCUMULATOR}",
    "rows_left_out": "take every row of the batch: mb.cut(batch, microbatch_size) does, the short last microbatch too",
    "never_stepped": "take the step at the window's end, however many microbatches it had; "
    "accumulator.windows(loader, microbatches=N) does",
    "gradients_left": "call optimizer.zero_grad() once a window, after the step",
    "scheduler": "step the scheduler once per optimizer step",
    "graph_kept": "keep loss.detach(), not the loss: step.loss is the effective batch's, without its graph",
    "host_reads": "add up loss.detach() on the device and read it once: step.loss is that",
    "reductions": "run every backward but the last inside model.no_sync(); the accumulator reduces once, at the end",
}


class Looping:
    """Take the gradient that a loop of the user's own hands to the optimizer, with mistakes undone on paper.

    A window's gradient is ``e sum_k (prod_{j > k} s_j) h_k``: what each backward added, ``h_k``, times what the
    gradients were multiplied with afterwards: ``s_j`` before the j-th backward, 0 where they were zeroed, and ``e``
    before the step. Least squares say what each ``h_k`` should have been multiplied with, and a mistake is undone by
    its part of that.

    Args:
        stage: Where it can be told most precisely.
        rows: Rows of the batch.

    Attributes:
        size: Rows of a microbatch, as the loop cuts the batch.
        terms: Not used: a loop's counts are found by what it adds up.
        repairs: Whether causes in the loss can be switched off: not by another's loop.
        refused: Why its last window could not be looked at, if so.
    """

    repairs = False

    def __init__(self, stage: Stage, *, rows: int) -> None:
        self.terms: Mapping[str, Term] = {}
        self.refused: str | None = None
        self._stage, self._rows = stage, rows
        self._runs: dict[tuple[int, int, frozenset[str]], list[Run]] = {}
        self._still = self._run(stage, STILL)
        self._adds = _Adds.of(self._still, stage.whole(STILL))
        cut = Counter(self._still.rows).most_common(1)
        self.size = cut[0][0] if cut and 0 < cut[0][0] < rows else max(1, rows // max(2, len(self._still.parts)))

    def gradient(self, stage: Stage, off: frozenset[str] = frozenset()) -> Gradient:
        """Run the loop on copies.

        Args:
            stage: Where.
            off: Causes that are switched off, mistakes among them.

        Returns:
            The gradient that the optimizer was given, as if the loop had not made them. Where it was scaled down once
            before the step, as by clipping, what it was before that.
        """
        run = self._run(stage, off & STILL)
        if not off & {ZEROED, CLIPPED, STEPPED, *SCALES, *SHAPES}:
            return run.stepped_with if self._adds.divides else run.added
        factors = _factors(run, off)
        end = _end(run) if self._adds.divides else 1.0
        scale = self._adds.scale if off & set(SCALES) else 1.0
        shape = self._adds.shape if off & set(SHAPES) else [1.0] * len(factors)
        return combined(run.parts, [factor * end * scale * own for factor, own in zip(factors, shape, strict=True)])

    def suspects(self) -> list[Suspect]:
        """Find the mistakes that change the gradient of this batch.

        Returns:
            What was found.
        """
        run, found = self._still, list[Suspect]()
        inside = [gap.factor for gap in run.gaps[1:] if not gap.stepped]
        if 0.0 in inside:
            words = "gradients are zeroed inside the window, and what was added before is lost"
            found.append(_suspect(ZEROED, words))
        if scaled := [factor for factor in inside if factor not in {0.0, 1.0}]:
            words = f"gradients are multiplied inside the window, with {min(scaled):.2g} to {max(scaled):.2g}"
            found.append(_suspect(CLIPPED, f"{words}, as clipping does"))
        if len(run.steps) > 1:
            words = f"the optimizer stepped {len(run.steps)} times in one window of {len(run.parts)} backwards"
            found.append(_suspect(STEPPED, words))
        return [*found, *(_suspect(kind, words) for kind, words in self._adds.mistakes(run))]

    def others(self) -> list[Cause]:
        """Find the mistakes that another batch, the schedule, memory or time suffer from.

        Returns:
            What was found.
        """
        return [*self._habits(), *self._second_call(), *self._short_window()]

    # -- the window ---------------------------------------------------------------------------------------------------

    def _short_window(self) -> Iterator[Cause]:
        """Give the loop a batch of fewer microbatches, the last one short, as an epoch's last window is."""
        size, run = self.size, self._still
        microbatches = -(-self._rows // size)
        rows = size * max(1, microbatches - 2) + max(1, size // 2)
        if rows >= self._rows:
            rows -= size
        if rows < 2 or not run.rows:
            return
        chosen = list(range(rows))
        whole = self._stage.whole(STILL, rows=chosen)
        try:
            short = self._stage.play(watch, off=STILL, rows=chosen)[0]
        except Exception as error:
            if is_from_signal(error):
                raise
            # A loop may well refuse a batch of another size.
            self.refused = (
                f"the loop cannot run on {rows} rows ({type(error).__name__}), so its last window was not checked"
            )
            return
        if not short.steps:
            words = f"a window of {len(short.parts)} microbatches, the last one short, is never stepped"
            yield _cause("never_stepped", words, alone=1.0)
            return
        if sum(short.rows) < rows:
            words = f"of {rows} rows {rows - sum(short.rows)} went through the model in no microbatch"
            yield _cause("rows_left_out", words, alone=relative_error(short.stepped_with, whole))
            return
        adds = _Adds.of(short, whole)
        if not self._adds.mistakes(run) and self._adds.exact and (told := adds.mistakes(short)):
            words = f"a window of {len(short.parts)} microbatches, the last one short: {told[0][1]}"
            end = _end(short) if adds.divides else 1.0
            parts = [factor * end for factor in _factors(short, frozenset({ZEROED, CLIPPED, STEPPED}))]
            yield _cause("last_window", words, alone=relative_error(combined(short.parts, parts), whole))

    def _second_call(self) -> Iterator[Cause]:
        first, second = self._runs[id(self._stage), 0, STILL][:2]
        left = math.sqrt(second.gaps[0].now) if second.gaps else 0.0
        whole = norm(self._stage.whole(STILL))
        if first.parts and left > TOLERANCE * whole:
            words = "gradients of one window are still there when the next one begins"
            yield _cause("gradients_left", words, alone=left / whole)

    def _habits(self) -> Iterator[Cause]:
        run = self._still
        backwards = len(run.parts)
        if run.scheduled > 1:
            words = f"the scheduler stepped {run.scheduled} times for one window"
            yield _cause("scheduler", words, harm="schedule")
        kept = max(run.alive, run.left_alive)
        if kept > 1:
            words = f"the graphs of {kept} microbatches are alive at once, so memory grows with their number"
            yield _cause("graph_kept", words, harm="memory")
        if backwards > 1 and run.reads >= backwards:
            words = f"{run.reads} numbers are read back to the host in one window, and the device waits each time"
            yield _cause("host_reads", words, harm="time")
        if run.reductions is not None and run.reductions > 1:
            words = f"gradients are reduced over the ranks {run.reductions} times in one window"
            yield _cause("reductions", words, harm="time")

    # -- how ----------------------------------------------------------------------------------------------------------

    def _run(self, stage: Stage, off: frozenset[str]) -> Run:
        key = (id(stage), stage.draw, off)
        if key not in self._runs:
            twice = stage is self._stage and off == STILL  # where a second call is looked at
            self._runs[key] = stage.play(partial(watch, calls=2 if twice else 1), off=off)
        run = self._runs[key][0]
        if not run.steps:
            raise CheckError(
                "the loop took no optimizer step on the batch that it was given; a loop(model, optimizer, batch) cuts "
                "the batch, runs all of it, and steps the optimizer that it is given once"
            )
        if not run.parts:
            raise CheckError("the loop ran no backward through the model that it was given; use the one passed in")
        return run


@dataclass(frozen=True, slots=True)
class _Adds:
    """Say what each backward's part should have been multiplied with, over what it was.

    Attributes:
        exact: Whether any multiples of the parts add up to the whole batch's gradient.
        divides: Whether the division is done before the step; what is done there else is clipping, which is right.
        scale: What is common to all.
        shape: The rest, of mean 1.
    """

    exact: bool
    divides: bool
    scale: float
    shape: list[float]

    @classmethod
    def of(cls, run: Run, whole: Gradient) -> _Adds:
        found, end = fit(whole, run.parts), _end(run)
        exact = found.residual <= TOLERANCE
        if not exact:
            divides = relative_error(run.stepped_with, whole) <= relative_error(run.added, whole)
            return cls(exact, divides, 1.0, [1.0] * len(run.parts))
        divides = _close(end, mean(found.weights)) or (end < 1 and _close(1 / end, round(1 / end)))
        taken = [factor * (end if divides else 1.0) for factor in _factors(run, frozenset({ZEROED, CLIPPED, STEPPED}))]
        ratios = [weight / factor for weight, factor in zip(found.weights, taken, strict=True)]
        scale = mean(ratios)
        return cls(exact, divides, scale, [ratio / scale for ratio in ratios])

    def mistakes(self, run: Run) -> list[tuple[str, str]]:
        """Name the mistakes in what the parts are multiplied with.

        Args:
            run: Whose parts.

        Returns:
            Kinds and words.
        """
        told: list[tuple[str, str]] = []
        if not _close(self.scale, 1):
            nothing = len(run.parts) > 1 and _close(self.scale, 1 / len(run.parts))
            words = f"the gradient is {1 / self.scale:.3g} times the whole batch's"
            told.append((SCALES[0], f"{words}: nothing divides the losses") if nothing else (SCALES[1], words))
        if not all(_close(each, 1) for each in self.shape):
            by_rows = len(run.rows) == len(self.shape) and all(run.rows)
            ratios = [own / rows for own, rows in zip(self.shape, run.rows, strict=True)] if by_rows else []
            if ratios and all(_close(ratio, ratios[0]) for ratio in ratios):
                told.append((SHAPES[0], "the short last microbatch weighs as much as a whole one"))
            else:
                listed = ", ".join(f"{each:.3g}" for each in self.shape[:6])
                words = f"microbatches weigh the same whatever they count: each should weigh {listed} times as much"
                told.append((SHAPES[1], words))
        return told


def _close(one: float, other: float) -> bool:
    return math.isclose(one, other, rel_tol=1e-5)


def _factors(run: Run, off: frozenset[str]) -> list[float]:
    """Say what each backward's part was multiplied with until the last one, with some mistakes undone."""
    last = len(run.parts) if STEPPED in off else run.steps[0]
    return [
        math.prod(_factor(gap, off) for gap in run.gaps[place + 1 : last]) if place < last else 0.0
        for place in range(len(run.parts))
    ]


def _factor(gap: Gap, off: frozenset[str]) -> float:
    undone = STEPPED if gap.stepped else ZEROED if gap.factor == 0 else CLIPPED
    return 1.0 if undone in off else gap.factor


def _end(run: Run) -> float:
    """Say what the gradient was multiplied with between the last backward and the step."""
    product = sum(float((each * run.stepped_with[name]).sum()) for name, each in run.added.items())
    return Gap(last=norm(run.added) ** 2, now=norm(run.stepped_with) ** 2, product=product).factor


def _suspect(kind: str, words: str) -> Suspect:
    return Suspect(kind=kind, words=words, where=("the loop",), remedy=REMEDIES[kind])


def _cause(kind: str, words: str, *, alone: float | None = None, harm: str = "gradient") -> Cause:
    return Cause(kind=kind, words=words, where=("the loop",), alone=alone, harm=harm, remedy=REMEDIES[kind])
