"""``microbatch_size="auto"``: run the first windows at different sizes, time them, and choose the fastest.

Every cut gives the same gradient, so each probe is a real training step. It costs only the time by which it is slower.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from microbatch.memory.predict import Prediction
from microbatch.step.events import PlanChosen
from microbatch.step.size.search import (
    AGREED,
    Found,
    fastest,
    largest_between,
    next_size,
    pace,
    sizes_for,
    spread,
    undecided,
    undisturbed,
)
from microbatch.step.size.sizing import Sizing

MOST_PROBES = 5
SAFE = 0.97
"""Share of the budget that a predicted peak may take, because the meter does not see workspaces inside operators."""
_FIRST_ROWS = 4
"""Rows of the first microbatches without a prediction; their peak bounds the peak of larger ones."""
_PATIENCE = 3
"""Windows at a size with a meter on that are not timed."""
_GROUPS = 6
"""Most groups into which the microbatches of a window are put, to see a disturbance of some of them."""
_TURNS = 4
"""Most windows of one size whose times are used."""
_CLOSE = 1.7
"""Sizes up to this many times slower than the fastest are timed again, in case another job slowed them down."""
_ONLY = "no other size fits"


@dataclass(frozen=True, slots=True, kw_only=True)
class Played:
    """Measurements of a window without an error.

    Attributes:
        step: Index of the window.
        rows: Rows of its batch.
        largest: Rows of its largest microbatch.
        laps: Seconds and rows of each microbatch.
        peak_bytes: Peak memory in bytes, if it was measured.
        budget: Bytes that the window may use, if they are known.
        watched: Whether the meter was on, although most windows run without it.
        tokens: With ``lengths``, tokens of the batch without padding.
    """

    step: int
    rows: float
    largest: int
    laps: list[tuple[float, float]]
    peak_bytes: int | None
    budget: int | None
    watched: bool
    tokens: int | None = None


@dataclass(slots=True)
class Tuning:
    """Run the search for the fastest microbatch size, and hold its measurements.

    Each size has a first window for warm-up and memory, and a second one that is timed. Then sizes close to the fastest
    take turns, one window each. A size has enough turns when its two fastest windows agree, or when even its fastest
    one is slower than both of the fastest size. So on a quiet machine each close size is timed twice.

    Attributes:
        sizes: Sizes that may fit, ascending.
        sizing: The current size, which the search sets.
        predicted: Predicted peaks, by size; empty without a prediction.
        ragged: Whether rows have different lengths, so that only the times of whole windows can be compared.
        hindrance: Why speed cannot be compared, in words; `None` if it can.
        verdict: The chosen size; `None` while the search runs.
        peaks: Measured peak memory, by size.
        windows: Number of windows at the current size.
        bound: Rows that certainly fit, without a prediction; `None` before a peak is known.
        feeling: Whether the current size is tried only for its peak memory.
        rehearsed: Whether a prediction was made already.
        times: Seconds per row of whole windows, by size.
        density: With ragged rows, mean tokens of a row in the first batch that was timed.
    """

    sizes: list[int]
    sizing: Sizing
    predicted: dict[int, int] = field(default_factory=dict[int, int])
    ragged: bool = False
    hindrance: str | None = None
    verdict: Found | None = None
    peaks: dict[int, int] = field(default_factory=dict[int, int])
    windows: int = 0
    bound: int | None = None
    feeling: bool = False
    rehearsed: bool = False
    times: dict[int, list[float]] = field(default_factory=dict[int, list[float]])
    density: float | None = None

    @classmethod
    def begin(cls, sizing: Sizing, *, rows: int, ragged: bool, hindrance: str | None = None, least: int = 1) -> Tuning:
        """Start a search without a prediction.

        Args:
            sizing: The current size, which the search sets.
            rows: Rows of the batch; at least 1.
            ragged: Whether rows have different lengths.
            hindrance: Why speed cannot be compared, in words; `None` if it can.
            least: Rows of the smallest microbatch to try.

        Returns:
            The search.
        """
        sizes = sizes_for(rows)
        worth = [size for size in sizes if size >= least] or sizes
        found = cls(worth, sizing, ragged=ragged, hindrance=hindrance)
        if hindrance is not None:
            found._decide(undecided(found.sizes, {}, why=hindrance))
        else:
            found.feeling = True
            found._try(max((size for size in found.sizes if size <= _FIRST_ROWS), default=found.sizes[0]))
        return found

    def foresee(self, prediction: Prediction, *, budget: int | None) -> None:
        """Remove the sizes that do not fit by prediction, and add the largest one that does.

        Args:
            prediction: Peaks by size.
            budget: Bytes that may be in use; `None` for no limit.
        """
        most = math.inf if budget is None else SAFE * budget
        peaks = {size: prediction.peak_bytes(size) for size in self.sizes}
        fit = [size for size, peak in peaks.items() if peak <= most]
        if fit and len(fit) < len(peaks):
            rows, high = self.sizes[-1], self.sizes[len(fit)]
            between = largest_between(rows, lambda size: prediction.peak_bytes(size) <= most, low=fit[-1], high=high)
            if between is not None:
                peaks[between] = prediction.peak_bytes(between)
                fit.append(between)
        self.predicted, self.sizes = peaks, fit or self.sizes[:1]
        self.feeling = False
        if self.hindrance is not None:
            self._decide(undecided(self.sizes, {}, why=self.hindrance))
        else:
            self._move()

    def after(self, played: Played) -> PlanChosen | None:
        """Add the measurements of a window, and set the size of the next one.

        Args:
            played: The measurements.

        Returns:
            The event for listeners if a size has been chosen; otherwise `None`.
        """
        size = self.sizing.most
        if self.sizing.halvings:
            # It ran out of memory.
            self.sizes = [each for each in self.sizes if each < size] or [min(size, played.largest)]
            self.feeling = False
            self._move()
        elif self.verdict is None and played.rows >= size:
            self._learn(size, played)
        if played.peak_bytes is not None and self.sizing.most == size:
            self.peaks[size] = max(played.peak_bytes, self.peaks.get(size, 0))
        found = self.verdict
        if found is None:
            return None
        chosen = found.microbatch_size
        return PlanChosen(
            step=played.step,
            microbatch_size=chosen,
            decided=found.decided,
            why=found.why,
            seconds=found.seconds,
            predicted_bytes=self.predicted.get(chosen),
            peak_bytes=self.peaks.get(chosen),
            microbatch_tokens=self.sizing.tokens,
        )

    @property
    def unsure(self) -> bool:
        """Whether a prediction is needed to know if the larger sizes fit."""
        if self.bound is None or self.feeling or self.rehearsed or self.verdict is not None:
            return False
        return self.sizes[-1] > self.bound

    @property
    def seconds(self) -> dict[int, float]:
        """Measured seconds per row, by size."""
        return {size: pace(times) for size, times in self.times.items()}

    @property
    def warming(self) -> bool:
        """Whether the next window is the first at its size."""
        return self.windows == 0

    def state(self) -> dict[str, Any]:
        """Return the state that a resumed run needs, as plain numbers; the current size is timed again."""
        return {
            "sizes": list(self.sizes),
            "predicted": [list(pair) for pair in self.predicted.items()],
            "peaks": [list(pair) for pair in self.peaks.items()],
            "ragged": self.ragged,
            "bound": self.bound,
            "feeling": self.feeling,
            "rehearsed": self.rehearsed,
            "times": [[size, list(times)] for size, times in self.times.items()],
            "density": self.density,
        }

    @classmethod
    def restored(cls, state: Mapping[str, Any], sizing: Sizing) -> Tuning:
        """Continue the search from a state.

        Args:
            state: The result of `state`.
            sizing: The restored size, which the search sets.

        Returns:
            The search.
        """
        found = cls(list(state["sizes"]), sizing)
        found.predicted, found.peaks = dict(state["predicted"]), dict(state["peaks"])
        found.ragged, found.bound, found.feeling = state["ragged"], state["bound"], state["feeling"]
        found.rehearsed, found.density = state["rehearsed"], state["density"]
        # States of earlier versions have one time of each size.
        once = {size: [seconds] for size, seconds in state.get("seconds", ())}
        found.times = once or {size: list(times) for size, times in state["times"]}
        return found

    def _learn(self, size: int, played: Played) -> None:
        self.windows += 1
        if played.peak_bytes is not None and played.budget is not None and not self.predicted:
            # Twice the rows take at most twice the bytes, weights included.
            self.bound = max(self.bound or size, size * played.budget // max(1, played.peak_bytes))
        if self.feeling:
            self.feeling = False
            self._move()
            # If the search begins with the same size, this window was its warm-up.
            self.windows = int(self.verdict is None and self.sizing.most == size)
        elif self.windows > 1 and not (played.watched and self.windows <= 1 + _PATIENCE):
            self._sample(size, played)

    def _sample(self, size: int, played: Played) -> None:
        whole = sum(seconds for seconds, _ in played.laps) / played.rows
        if self.ragged and played.tokens:
            # Batches have different lengths, so times per token are compared, scaled to a row of the first batch.
            self.density = self.density or played.tokens / played.rows
            whole *= self.density * played.rows / played.tokens
        elif not self.ragged:
            whole = undisturbed(whole, _groups(played, size))
        self.times.setdefault(size, []).append(whole)
        self._move()

    @property
    def _fitting(self) -> list[int]:
        return [size for size in self.sizes if self.bound is None or size <= self.bound] or self.sizes[:1]

    def _move(self) -> None:
        """Try the next size, or choose one."""
        fitting, seconds = self._fitting, self.seconds
        following = next_size(fitting, seconds) if len(seconds) < MOST_PROBES else None
        times = {size: self.times[size] for size in fitting if size in seconds}
        if len(fitting) > 1 and following is not None:
            self._try(following)
        elif (again := _open_question(times)) is not None:
            self._try(again, timed=True)
        elif times:
            self._decide(fastest(times))
        else:
            self._decide(Found(microbatch_size=fitting[0], decided=True, why=_ONLY, seconds={}))

    def _try(self, size: int, *, timed: bool = False) -> None:
        # A size that was timed before needs no warm-up window.
        self.windows = int(timed)
        self.sizing.choose(size)

    def _decide(self, found: Found) -> None:
        self.verdict = found
        self.sizing.choose(found.microbatch_size)


def _open_question(times: Mapping[int, Sequence[float]]) -> int | None:
    """Return the size to time again; `None` if it is clear which one is the fastest."""
    if len(times) < 2:
        return None
    best = min(times.values(), key=pace)
    # The first turn is for all close sizes; the others are for sizes that may be faster than the fastest.
    close, faster = _CLOSE * pace(best), max(sorted(best)[:2])
    unsure = [
        size
        for size, each in times.items()
        if spread(each) > AGREED and len(each) < _TURNS and min(each) <= (close if len(each) == 1 else faster)
    ]
    return min(unsure, key=lambda size: (len(times[size]), pace(times[size])), default=None)


def _groups(played: Played, size: int) -> list[float]:
    """Return seconds per row of groups of full microbatches; a shorter last microbatch is ignored."""
    whole = [lap for lap in played.laps if lap[1] >= size]
    # Microbatches are grouped, so that a short disturbance of one of them is not taken for another job.
    together = -(-len(whole) // _GROUPS) or 1
    groups = (whole[start : start + together] for start in range(0, len(whole), together))
    return [sum(seconds for seconds, _ in each) / sum(rows for _, rows in each) for each in groups]
