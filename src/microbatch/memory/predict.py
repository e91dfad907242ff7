"""How much memory a window takes, as a function of the microbatch size, from runs at a few sizes."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

from torch import Tensor

from microbatch.errors import ConfigError
from microbatch.memory.align import align
from microbatch.memory.allocator import Witnessed
from microbatch.memory.curves import Bounded, Curves, Fitted
from microbatch.memory.hidden import Hidden
from microbatch.memory.ledger import INPUTS, Timeline

WORKSPACES = "workspaces"
_MOST = 1 << 24  # rows, for a model that takes no more memory for more of them


@dataclass(frozen=True, slots=True, kw_only=True)
class Prediction:
    """Peak memory by microbatch size.

    Attributes:
        sizes: Microbatch sizes that were run.
        exact: Whether every size ran the same operators, and these the same kernels, so that each one's bytes are known
            as a function of the size; if not, ``note`` says what stands in for that.
        note: What the prediction rests on, in words.
        curves: Live bytes by microbatch size.
        hidden: What operators allocate inside themselves, likewise.
        measured: Peaks that the allocator has seen, by microbatch size.
        beside: Bytes that are held beside what was run, by microbatch size.
    """

    sizes: Sequence[int]
    exact: bool
    note: str
    curves: Curves
    hidden: Hidden
    measured: Mapping[int, int]
    beside: Callable[[int], int]

    def peak_bytes(self, microbatch_size: int) -> int:
        """Predict the most bytes in use at once, everything that was there before the window included.

        ``max_t (a_t + b_t m)`` over the operators ``t`` of a window: the maximum of straight lines, which no line
        through two peaks is.

        Args:
            microbatch_size: Rows; at least 1.

        Returns:
            Bytes.

        Raises:
            ConfigError: The size is below 1.

        Example:
            >>> def run(m):  # first a temporary of the weight's size, then one of the microbatch's
            ...     return Timeline(operators=["a", "b"], live=[1000, 100 * m], storages=[])
            >>> predict(run, sizes=(2, 4)).peak_bytes(16)  # both runs peaked at 1000
            1600
        """
        total = self.measured.get(microbatch_size)
        if total is None:
            total = round(float(self._total(microbatch_size).max()))
        return total + self.beside(microbatch_size)

    def largest(self, budget: int) -> int:
        """Find the largest microbatch size that fits.

        Args:
            budget: Bytes that may be in use.

        Returns:
            Rows; 0 if not even one fits, and at most 2^24.

        Example:
            >>> def run(m):
            ...     return Timeline(operators=["a", "b"], live=[1000, 100 * m], storages=[])
            >>> prediction = predict(run, sizes=(2, 4))
            >>> prediction.largest(1600), prediction.largest(1599), prediction.largest(999)
            (16, 15, 0)
        """
        fits, fails = 0, 1
        while fails < _MOST and self.peak_bytes(fails) <= budget:
            fits, fails = fails, 2 * fails
        if fails >= _MOST:
            return _MOST
        while fails - fits > 1:
            middle = (fits + fails) // 2
            fits, fails = (middle, fails) if self.peak_bytes(middle) <= budget else (fits, middle)
        return fits

    def parts(self, microbatch_size: int) -> dict[str, int]:
        """Split the predicted peak by category.

        Args:
            microbatch_size: Rows; at least 1.

        Returns:
            Bytes by category, which add up to ``peak_bytes``; ``"workspaces"`` are what operators allocate inside
            themselves.

        Raises:
            ConfigError: The size is below 1.
        """
        at = int(self._total(microbatch_size).argmax())
        exact = self.curves.parts(microbatch_size, at)
        found = {name: round(size) for name, size in exact.items()}
        found[INPUTS] = found.get(INPUTS, 0) + self.beside(microbatch_size)
        found[WORKSPACES] = self.peak_bytes(microbatch_size) - sum(found.values())
        return {name: size for name, size in found.items() if size}

    def _total(self, size: int) -> Tensor:
        if size < 1:
            raise ConfigError(f"a microbatch size must be at least 1, not {size!r}")
        return self.curves.at(size) + self.hidden.at(size)


def predict(
    run: Callable[[int], Timeline],
    *,
    sizes: Sequence[int] = (2, 4),
    witnessed: Sequence[tuple[int, Witnessed]] = (),
    beside: Callable[[int], int] = lambda _: 0,
) -> Prediction:
    """Predict the peak at every microbatch size from the timelines of a few.

    Each operator's live bytes are fitted on their own, by a straight line through two sizes or a parabola through
    three, which losses over pairs of rows need; the peak is the maximum over all operators. A fit of the peaks would
    miss every operator that only peaks at larger sizes. Lengths of a sequence are fitted likewise, through three.

    Where runs go through loops of different lengths, the operators that all of them have are fitted, each with the most
    that was alive until the next. Where the operators differ altogether, the peak is bounded instead.

    Args:
        run: Runs what is to be predicted with microbatches of so many rows, and returns its timeline.
        sizes: Microbatch sizes to run; two or more, ascending. 1 is not a good one: it takes other kernels.
        witnessed: Real runs with what the allocator saw in each operator, by size, ascending. What it held above or
            below what ``run`` tells is added.
        beside: Bytes held beside what is run, by microbatch size.

    Returns:
        The prediction.

    Raises:
        ConfigError: Fewer than two sizes, or sizes that do not ascend from 1.

    Cost:
        The runs.
    """
    if len(sizes) < 2 or list(sizes) != sorted(set(sizes)) or sizes[0] < 1:
        raise ConfigError(f"sizes must be two or more microbatch sizes, ascending, for example (2, 4), not {sizes!r}")
    runs = [run(size) for size in sizes]
    # One row takes kernels of its own, so it says nothing of the others.
    several = [(size, each) for size, each in witnessed if size > 1]
    seen = [each for _, each in several]
    real = {size: each.timeline for size, each in several}
    alike = all(
        list(run.operators) == list(real.get(size, run).operators) for size, run in zip(sizes, runs, strict=True)
    )
    stand_in = alike or len(seen) < 2
    if not stand_in:
        # What was really run goes another way than what was to stand for it.
        sizes, runs = list(real), list(real.values())
    places = align([each.operators for each in (*runs, *real.values())])
    curves: Curves = (
        Bounded(sizes, runs)
        if places is None
        else Fitted.through(
            sizes,
            runs,
            places[: len(runs)],
            bent=stand_in,  # kernels that pad rows would bend real ones
        )
    )
    inside: list[list[list[float]]] = []
    for index, (size, each) in enumerate(several):
        expected: list[float] = curves.at(size).tolist()
        levels = [[each.peak_bytes]] if places is None else each.levels_at(places[len(runs) + index])
        inside.append([[level - e for level in held] for held, e in zip(levels, expected, strict=True)])
    hidden = Hidden.through([size for size, _ in several], inside)
    return Prediction(
        sizes=list(sizes),
        exact=all(list(each.operators) == list(runs[0].operators) for each in runs) and not hidden.changes,
        note="; ".join([_note(sizes, runs, curves), *map(_change, hidden.changes)]),
        curves=curves,
        hidden=hidden,
        measured={size: each.peak_bytes for size, each in witnessed},
        beside=beside,
    )


def _change(between: tuple[int, int]) -> str:
    return f"between {between[0]} and {between[1]} rows some operators take other kernels, and are bounded there"


def _note(sizes: Sequence[int], runs: Sequence[Timeline], curves: Curves) -> str:
    at = f"microbatches of {', '.join(map(str, sizes))} rows"
    if not isinstance(curves, Fitted):
        return f"{at} run different operators; peaks are bounded by chords, and beyond the largest in proportion"
    if len({len(run.live) for run in runs}) == 1 and len(curves.moments[0]) == len(runs[0].live):
        return f"{len(runs[0].live):,} operators fitted on {at}"
    counts = ", ".join(f"{len(run.live):,}" for run in runs)
    return f"{at} run {counts} operators; the {len(curves.moments[0]):,} that all of them run are fitted"
