"""Prediction of a window's peak memory at any microbatch size, from runs at a few sizes."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial

from torch import Tensor

from microbatch.errors import ConfigError
from microbatch.memory.allocator import Witnessed
from microbatch.memory.curves import Bounded, Curves, Fitted
from microbatch.memory.ledger import Timeline
from microbatch.memory.match_operators import align
from microbatch.memory.workspace import Hidden

WORKSPACES = "workspaces"
_ALIKE = 0.005  # part of the peak by which the live bytes of fake and real tensors may differ
_MOST = 1 << 24  # largest answer in rows, for a model whose memory does not grow with the rows


@dataclass(frozen=True, slots=True, kw_only=True)
class Prediction:
    """A prediction of peak memory by microbatch size.

    Attributes:
        sizes: Microbatch sizes that were run.
        exact: Whether all sizes ran the same operators with the same kernels, so that each operator's bytes are a known
            function of the size. If not, ``note`` describes the bound that is used instead.
        note: A description of the data behind the prediction.
        curves: Live bytes of tensors by microbatch size.
        hidden: Workspaces, which operators allocate internally, by microbatch size.
        measured: Peaks of the allocator in real runs, by microbatch size.
        metered: Peaks of a meter in the same runs, by microbatch size.
        beside: Bytes held outside of the run, by microbatch size and category.
    """

    sizes: Sequence[int]
    exact: bool
    note: str
    curves: Curves
    hidden: Hidden
    measured: Mapping[int, int]
    metered: Mapping[int, int]
    beside: Callable[[int], Mapping[str, int]]

    def peak_bytes(self, microbatch_size: int) -> int:
        """Predict the peak memory in use, including everything from before the window.

        The prediction is ``max_t (a_t + b_t m)`` over the operators ``t`` of a window. This maximum of straight lines
        is not a straight line itself, so a line through two peaks would be wrong.

        Args:
            microbatch_size: Rows; at least 1.

        Returns:
            Bytes.

        Raises:
            ConfigError: The size is below 1.

        Example:
            >>> def run(m):  # first a temporary as large as a weight, then one that grows with the microbatch
            ...     return Timeline(operators=["a", "b"], live=[1000, 100 * m], storages=[])
            >>> predict(run, sizes=(2, 4)).peak_bytes(16)  # both runs peaked at 1000
            1600
        """
        total = self.measured.get(microbatch_size)
        if total is None:
            total = round(float(self._total(microbatch_size).max()))
        return total + self._beside(microbatch_size)

    def metered_bytes(self, microbatch_size: int) -> int:
        """Predict the peak that a `MemoryMeter` counts, which is that of tensors alone.

        A meter does not see workspaces, which operators allocate internally. So compare a meter's peak with this
        number, and the available memory with `peak_bytes`.

        Args:
            microbatch_size: Rows; at least 1.

        Returns:
            Bytes; equal to `peak_bytes` if no real run was measured.

        Raises:
            ConfigError: The size is below 1.
        """
        total = self.metered.get(microbatch_size)
        if total is None:
            total = round(float(self._visible(microbatch_size).max()))
        return total + self._beside(microbatch_size)

    def doubt(self, microbatch_size: int, *, hidden: bool) -> float:
        """Return the relative uncertainty of the predicted peak: how much lower the true peak may be.

        Args:
            microbatch_size: Rows; at least 1.
            hidden: Whether to return the uncertainty of workspaces; otherwise that of tensors.

        Returns:
            A part of the predicted peak, from 0 to 1; 0 if upper and lower bound are equal.

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
        """Return the largest microbatch size that fits into a budget in bytes; 0 if not even one row does.

        Example:
            >>> def run(m):
            ...     return Timeline(operators=["a", "b"], live=[1000, 100 * m], storages=[])
            >>> prediction = predict(run, sizes=(2, 4))
            >>> prediction.largest(1600), prediction.largest(1599), prediction.largest(999)
            (16, 15, 0)
        """
        return largest_that_fits(lambda size: self.peak_bytes(size) <= budget)

    def parts(self, microbatch_size: int) -> dict[str, int]:
        """Split the predicted peak by category; ``"workspaces"`` are the operators' internal allocations."""
        found = self._split(microbatch_size, int(self._total(microbatch_size).argmax()))
        found[WORKSPACES] = self.peak_bytes(microbatch_size) - sum(found.values())
        return {name: size for name, size in found.items() if size}

    def predicted_run(self, microbatch_size: int) -> Witnessed:
        """Return the predicted memory of a run, operator by operator, in the form of a measured run."""
        live = self._visible(microbatch_size)
        beside = self._beside(microbatch_size)
        inside = self.hidden.levels(microbatch_size)
        levels = (
            [[round(low + more) + beside for more in each] for low, each in zip(live.tolist(), inside, strict=True)]
            if inside
            else []
        )
        if microbatch_size in self.measured and levels:
            # A single row uses other kernels, so its measured peak may be off the curves.
            shift = self.peak_bytes(microbatch_size) - max(max(each) for each in levels)
            levels = [[level + shift for level in each] for each in levels]
        return Witnessed(
            _PredictedTimeline(
                operators=self.curves.operators,
                live=[round(each) + beside for each in live.tolist()],
                storages=[],
                split=partial(self._split, microbatch_size),
            ),
            levels,
        )

    def _split(self, size: int, index: int) -> dict[str, int]:
        found = {name: round(each) for name, each in self.curves.parts(size, index).items()}
        return dict(Counter(found) + Counter(self.beside(size)))

    def _beside(self, size: int) -> int:
        return sum(self.beside(size).values())

    def _visible(self, size: int) -> Tensor:
        if size < 1:
            raise ConfigError(f"a microbatch size must be at least 1, not {size!r}")
        return self.curves.at(size)

    def _total(self, size: int) -> Tensor:
        return self._visible(size) + self.hidden.at(size)


@dataclass(frozen=True, slots=True, kw_only=True)
class _PredictedTimeline(Timeline):
    """The timeline of a predicted run, which has bytes by category but no storages."""

    split: Callable[[int], dict[str, int]]

    def parts(self, index: int) -> dict[str, int]:
        return self.split(index)


def largest_that_fits(fits: Callable[[int], bool]) -> int:
    """Return the largest number up to 2^24 that fits, by bisection: every smaller one must fit; 0 if none does.

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
    beside: Callable[[int], Mapping[str, int]] = lambda _: {},
) -> Prediction:
    """Predict the peak memory at every microbatch size from the timelines of a few sizes.

    The live bytes after each operator are fitted separately, by a straight line through two sizes or a parabola through
    three. Losses over pairs of rows need the parabola. The predicted peak is the maximum over all operators. A fit of
    the peaks alone would miss operators that dominate only at larger sizes. Sequence lengths are fitted in the same
    way, through three lengths.

    If loops have different numbers of iterations, only the operators that all runs have in common are fitted. Each of
    them stands for the maximum of the live bytes until the next one. If the operators differ too much, the peak is
    bounded instead.

    Args:
        run: Runs the computation with microbatches of the given number of rows, and returns its timeline; may be called
            several times with one size. `None` to use the timelines of ``witnessed``.
        sizes: Microbatch sizes to run; two or more, ascending. Avoid 1, which uses other kernels.
        witnessed: Measured runs with the allocator's bytes in each operator, by size, ascending. Their difference to
            the timelines of ``run`` is added to the prediction.
        beside: Returns the bytes held outside of the run, from a microbatch size, by category.

    Returns:
        The prediction.

    Raises:
        ConfigError: There are fewer than two sizes, or they do not ascend from 1.

    Cost:
        That of the runs.
    """
    # A single row uses other kernels, so it is no evidence for larger sizes.
    several = [(size, each) for size, each in witnessed if size > 1]
    real = {size: each.timeline for size, each in several}
    if run is None:
        sizes = list(real)
    if len(sizes) < 2 or list(sizes) != sorted(set(sizes)) or sizes[0] < 1:
        raise ConfigError(f"sizes must be two or more microbatch sizes, ascending, for example (2, 4), not {sizes!r}")
    runs = [(run or real.__getitem__)(size) for size in sizes]
    if any(list(each.operators) != list(runs[0].operators) for each in runs) and run is not None:
        # Curves are inexact if loops differ. The real runs' sizes are run too, so that this error is not taken for
        # workspaces.
        sizes = sorted({*sizes, *real})
        runs = [run(size) for size in sizes]
    alike = all(_alike(each, real.get(size, each)) for size, each in zip(sizes, runs, strict=True))
    stands_in = run is None or (not alike and len(real) > 1)
    if stands_in:
        # The real runs took another path through the program than the runs with fake tensors.
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
    """Return the measured levels less the predicted live bytes of tensors."""
    found: list[list[list[float]]] = []
    for index, (size, each) in enumerate(several):
        levels = [[each.peak_bytes]] if places is None else each.levels_at(places[index])
        expected: list[float] = curves.at(size).tolist()
        found.append([[level - e for level in held] for held, e in zip(levels, expected, strict=True)])
    return found


def _alike(run: Timeline, real: Timeline) -> bool:
    """Return whether two runs have the same operators and nearly the same live bytes."""
    if list(run.operators) != list(real.operators):
        return False
    off = max(abs(one - other) for one, other in zip(run.live, real.live, strict=True))
    return off <= _ALIKE * real.peak_bytes


def _change(between: tuple[int, int]) -> str:
    return f"between {between[0]} and {between[1]} rows some operators change kernels, so their memory is bounded there"


def _note(sizes: Sequence[int], runs: Sequence[Timeline], curves: Curves) -> str:
    at = f"microbatches of {', '.join(map(str, sizes))} rows"
    if not isinstance(curves, Fitted):
        return f"{at} run different operators, so peaks are bounded by chords, and in proportion beyond the largest"
    if len({len(run.live) for run in runs}) == 1 and len(curves.moments[0]) == len(runs[0].live):
        return f"{len(runs[0].live):,} operators fitted on {at}"
    counts = ", ".join(f"{len(run.live):,}" for run in runs)
    return f"{at} run {counts} operators; the {len(curves.moments[0]):,} that all sizes have in common are fitted"
