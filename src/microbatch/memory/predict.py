"""How much memory a window takes, as a function of the microbatch size, from runs at a few sizes."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial

from torch import Tensor

from microbatch.errors import ConfigError
from microbatch.memory.allocator import Witnessed
from microbatch.memory.curves import Bounded, Curves, Fitted
from microbatch.memory.ledger import INPUTS, Timeline
from microbatch.memory.match_operators import align
from microbatch.memory.workspace import Hidden

WORKSPACES = "workspaces"
_ALIKE = 0.005  # of the peak, what fake and real tensors may differ by
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
        metered: Of the same runs the peaks that a meter has counted.
        beside: Bytes that are held beside what was run, by microbatch size.
    """

    sizes: Sequence[int]
    exact: bool
    note: str
    curves: Curves
    hidden: Hidden
    measured: Mapping[int, int]
    metered: Mapping[int, int]
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

    def metered_bytes(self, microbatch_size: int) -> int:
        """Predict the most bytes that a `MemoryMeter` will count: those of tensors alone.

        What operators allocate inside themselves no meter sees, so where one measures, this is what is to be compared,
        and `peak_bytes` what has to fit.

        Args:
            microbatch_size: Rows; at least 1.

        Returns:
            Bytes; `peak_bytes` where nothing was witnessed.

        Raises:
            ConfigError: The size is below 1.
        """
        total = self.metered.get(microbatch_size)
        if total is None:
            total = round(float(self._visible(microbatch_size).max()))
        return total + self.beside(microbatch_size)

    def doubt(self, microbatch_size: int, *, hidden: bool) -> float:
        """Say by which part of itself the peak may be less than what is predicted.

        Args:
            microbatch_size: Rows; at least 1.
            hidden: Whether to doubt what operators allocate inside themselves, or what tensors take.

        Returns:
            0 where every operator keeps to its curve.

        Raises:
            ConfigError: The size is below 1.
        """
        visible = self._visible(microbatch_size)
        if hidden:
            most = self._total(microbatch_size)
            least = visible + self.hidden.least(microbatch_size)
        else:
            most, least = visible, self.curves.least(microbatch_size)
        return 1 - float(least.max()) / max(1.0, float(most.max()))

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
        return largest_that_fits(lambda size: self.peak_bytes(size) <= budget)

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
        found = self._split(microbatch_size, int(self._total(microbatch_size).argmax()))
        found[WORKSPACES] = self.peak_bytes(microbatch_size) - sum(found.values())
        return {name: size for name, size in found.items() if size}

    def foretell(self, microbatch_size: int) -> Witnessed:
        """Write down what a run of so many rows would be seen to take, operator by operator.

        Args:
            microbatch_size: Rows; at least 1.

        Returns:
            A run as if it had been witnessed; without levels where nothing was.

        Raises:
            ConfigError: The size is below 1.
        """
        beside = self.beside(microbatch_size)
        live = self._visible(microbatch_size)
        inside = self.hidden.levels(microbatch_size)
        levels = (
            [[round(low + more) + beside for more in each] for low, each in zip(live.tolist(), inside, strict=True)]
            if inside
            else []
        )
        if microbatch_size in self.measured and levels:
            # One row takes kernels of its own.
            shift = self.peak_bytes(microbatch_size) - max(map(max, levels))
            levels = [[level + shift for level in each] for each in levels]
        return Witnessed(
            _Foretold(
                operators=self.curves.operators,
                live=[round(each) + beside for each in live.tolist()],
                storages=[],
                split=partial(self._split, microbatch_size),
            ),
            levels,
        )

    def _split(self, size: int, index: int) -> dict[str, int]:
        found = {name: round(each) for name, each in self.curves.parts(size, index).items()}
        return {**found, INPUTS: found.get(INPUTS, 0) + self.beside(size)}

    def _visible(self, size: int) -> Tensor:
        if size < 1:
            raise ConfigError(f"a microbatch size must be at least 1, not {size!r}")
        return self.curves.at(size)

    def _total(self, size: int) -> Tensor:
        return self._visible(size) + self.hidden.at(size)


@dataclass(frozen=True, slots=True, kw_only=True)
class _Foretold(Timeline):
    """The timeline of a run that never was; its storages are known by category alone."""

    split: Callable[[int], dict[str, int]]

    def parts(self, index: int) -> dict[str, int]:
        return self.split(index)


def largest_that_fits(fits: Callable[[int], bool]) -> int:
    """Find the largest number that fits, where every smaller one does.

    Args:
        fits: Whether a number does.

    Returns:
        0 if not even 1 does, and at most 2^24.

    Example:
        >>> largest_that_fits(lambda rows: 100 * rows <= 1600)
        16
    """
    most, fails = 0, 1
    while fits(fails):
        if fails == _MOST:
            return _MOST
        most, fails = fails, min(2 * fails, _MOST)
    while fails - most > 1:
        middle = (most + fails) // 2
        most, fails = (middle, fails) if fits(middle) else (most, middle)
    return most


def predict(
    run: Callable[[int], Timeline] | None,
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
        run: Runs what is to be predicted with microbatches of so many rows, and returns its timeline, again if it is
            asked again; `None` to take the timelines of ``witnessed``.
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
    # One row takes kernels of its own, so it says nothing of the others.
    several = [(size, each) for size, each in witnessed if size > 1]
    real = {size: each.timeline for size, each in several}
    if run is None:
        sizes = list(real)
    if len(sizes) < 2 or list(sizes) != sorted(set(sizes)) or sizes[0] < 1:
        raise ConfigError(f"sizes must be two or more microbatch sizes, ascending, for example (2, 4), not {sizes!r}")
    runs = [(run or real.__getitem__)(size) for size in sizes]
    if any(list(each.operators) != list(runs[0].operators) for each in runs) and run is not None:
        # Curves are off where loops differ, and what they are off there is no workspace.
        sizes = sorted({*sizes, *real})
        runs = [run(size) for size in sizes]
    alike = all(_alike(each, real.get(size, each)) for size, each in zip(sizes, runs, strict=True))
    stands_in = run is None or (not alike and len(real) > 1)
    if stands_in:
        # What was really run goes another way than what was to stand for it.
        sizes, runs = list(real), list(real.values())
    places = align([each.operators for each in (*runs, *real.values())])
    if places is None:
        curves: Curves = Bounded(sizes, runs)
    else:
        curves = Fitted.through(sizes, runs, places[: len(runs)], real=stands_in)
    hidden = Hidden.through(list(real), _inside(several, curves, places=places and places[len(runs) :]))
    return Prediction(
        sizes=list(sizes),
        exact=all(list(each.operators) == list(runs[0].operators) for each in runs) and not hidden.changes,
        note="; ".join([_note(sizes, runs, curves), *map(_change, hidden.changes)]),
        curves=curves,
        hidden=hidden,
        measured={size: each.peak_bytes for size, each in witnessed},
        metered={size: each.timeline.peak_bytes for size, each in witnessed},
        beside=beside,
    )


def _inside(
    several: Sequence[tuple[int, Witnessed]], curves: Curves, *, places: Sequence[Sequence[int]] | None
) -> list[list[list[float]]]:
    """Subtract from what was witnessed what the curves tell."""
    found: list[list[list[float]]] = []
    for index, (size, each) in enumerate(several):
        levels = [[each.peak_bytes]] if places is None else each.levels_at(places[index])
        expected: list[float] = curves.at(size).tolist()
        found.append([[level - e for level in held] for held, e in zip(levels, expected, strict=True)])
    return found


def _alike(run: Timeline, real: Timeline) -> bool:
    """Tell whether the same operators ran, and left as much alive."""
    if list(run.operators) != list(real.operators):
        return False
    off = max(abs(one - other) for one, other in zip(run.live, real.live, strict=True))
    return off <= _ALIKE * real.peak_bytes


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
