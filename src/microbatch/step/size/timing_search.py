"""``microbatch_size="auto"``: run the first windows at different sizes, time them, and choose the fastest.

Every cut gives the same gradient, so each probe is a real training step. It costs only the time by which it is slower.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from statistics import median
from typing import Any

from microbatch.memory.predict import Prediction
from microbatch.step.events import PlanChosen
from microbatch.step.size.search import (
    NOISE,
    SAMPLES,
    Found,
    busiest_choice,
    fastest,
    largest_between,
    next_size,
    noise,
    settled,
    sizes_for,
    too_noisy,
    undecided,
)
from microbatch.step.size.sizing import Sizing

MOST_PROBES = 5
SAFE = 0.97
"""Share of the budget that a predicted peak may take, because the meter does not see workspaces inside operators."""
_FIRST_ROWS = 4
"""Rows of the first microbatches without a prediction; their peak bounds the peak of larger ones."""
_PATIENCE = 3
"""Windows at a size before its times count as noisy; also the windows with a meter on that are not timed."""
_TURNS = 3
"""How often the sizes take turns at the end, one window each, if times are noisy."""
_CLOSE = 1.7
"""Sizes up to this many times slower than the fastest are timed once more, in case another job slowed them down."""
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

    Each size has a first window for warm-up and memory, then as many windows as give three samples. At the end, sizes
    close to the fastest are timed once more, and the lower time counts. This corrects for another job that ran during
    all earlier windows of a size.

    If another job runs all the time, samples of one size do not agree. Then all sizes take turns, so that the other
    job slows them all, and medians are compared. Of sizes that are equal within the noise, the largest is chosen.

    Attributes:
        sizes: Sizes that may fit, ascending.
        sizing: The current size, which the search sets.
        predicted: Predicted peaks, by size; empty without a prediction.
        ragged: Whether rows have different lengths, so that only the times of whole windows can be compared.
        hindrance: Why speed cannot be compared, in words; `None` if it can.
        verdict: The chosen size; `None` while the search runs.
        seconds: Measured seconds per row, by size.
        peaks: Measured peak memory, by size.
        samples: Seconds per row of parts of a window at the current size; their spread shows the noise.
        wholes: Seconds per row of whole windows at the current size, which are compared between sizes.
        windows: Number of windows at the current size.
        bound: Rows that certainly fit, without a prediction; `None` before a peak is known.
        feeling: Whether the current size is tried only for its peak memory.
        rehearsed: Whether a prediction was made already.
        again: Sizes to time once more; `None` before they are chosen.
        rerun: Whether the current size is timed once more.
        noisy: Why times cannot be compared exactly, in words; `None` if they can.
        turns: How often the sizes have taken turns.
        times: Seconds per row of whole windows, by size.
        density: With ragged rows, mean tokens of a row in the first batch that was timed.
    """

    sizes: list[int]
    sizing: Sizing
    predicted: dict[int, int] = field(default_factory=dict[int, int])
    ragged: bool = False
    hindrance: str | None = None
    verdict: Found | None = None
    seconds: dict[int, float] = field(default_factory=dict[int, float])
    peaks: dict[int, int] = field(default_factory=dict[int, int])
    samples: list[float] = field(default_factory=list[float])
    wholes: list[float] = field(default_factory=list[float])
    windows: int = 0
    bound: int | None = None
    feeling: bool = False
    rehearsed: bool = False
    again: list[int] | None = None
    rerun: bool = False
    noisy: str | None = None
    turns: int = 0
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
    def warming(self) -> bool:
        """Whether the next window is the first at its size."""
        return self.windows == 0

    def state(self) -> dict[str, Any]:
        """Return the state that a resumed run needs, as plain numbers; the current size is timed again."""
        return {
            "sizes": list(self.sizes),
            "predicted": [list(pair) for pair in self.predicted.items()],
            "seconds": [list(pair) for pair in self.seconds.items()],
            "peaks": [list(pair) for pair in self.peaks.items()],
            "ragged": self.ragged,
            "bound": self.bound,
            "feeling": self.feeling,
            "rehearsed": self.rehearsed,
            "again": self.again,
            "noisy": self.noisy,
            "turns": self.turns,
            "times": [list(pair) for pair in self.times.items()],
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
        found.predicted, found.seconds, found.peaks = (dict(state[name]) for name in ("predicted", "seconds", "peaks"))
        found.ragged, found.bound, found.feeling = state["ragged"], state["bound"], state["feeling"]
        found.rehearsed = state["rehearsed"]
        found.again, found.density = state["again"], state["density"]
        found.noisy, found.turns, found.times = state.get("noisy"), state.get("turns", 0), dict(state.get("times", ()))
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
        self.wholes.append(whole)
        self.times.setdefault(size, []).append(whole)
        self.samples += [whole] if self.ragged else _samples(played, size)
        if self.rerun:
            self.seconds[size] = median(self.times[size]) if self.noisy else min(self.seconds[size], whole)
            self._move()
        elif len(self.samples) >= SAMPLES:
            taken = settled(self.samples)
            if taken is not None:
                self.seconds[size] = median(self.wholes) if noise(self.samples) <= NOISE else taken
                self._move()
            elif self.windows > _PATIENCE:
                self.noisy = self.noisy or too_noisy(size, self.samples)
                self.seconds[size] = median(self.wholes)
                self._move()

    @property
    def _fitting(self) -> list[int]:
        return [size for size in self.sizes if self.bound is None or size <= self.bound] or self.sizes[:1]

    def _move(self) -> None:
        """Try the next size, or choose one."""
        fitting = self._fitting
        following = next_size(fitting, self.seconds) if len(self.seconds) < MOST_PROBES else None
        timed = [size for size in fitting if size in self.seconds]
        if len(fitting) > 1 and following is not None:
            self._try(following)
        elif again := self._once_more(timed):
            self._try(again.pop(), rerun=True)
        elif timed and self.noisy and len(fitting) > 1:
            self._decide(busiest_choice(fitting, self.seconds, why=self.noisy))
        elif timed:
            self._decide(fastest(fitting, self.seconds))
        else:
            self._decide(Found(microbatch_size=fitting[0], decided=True, why=_ONLY, seconds={}))

    def _once_more(self, timed: list[int]) -> list[int]:
        """Return the sizes to time once more, the fastest last; with noisy times, all of them in turns."""
        turn = self.again is None or (self.noisy is not None and not self.again and self.turns < _TURNS)
        if turn and len(timed) > 1:
            self.turns += 1
            seconds = self.seconds
            most = math.inf if self.noisy else _CLOSE * min(seconds[size] for size in timed)
            self.again = sorted((size for size in timed if seconds[size] < most), key=seconds.__getitem__, reverse=True)
        if self.again is None:
            return []
        self.again = [size for size in self.again if size in timed]
        return self.again

    def _try(self, size: int, *, rerun: bool = False) -> None:
        # A size that is timed once more needs no warm-up window.
        self.samples, self.wholes, self.windows, self.rerun = [], [], int(rerun), rerun
        self.sizing.choose(size)

    def _decide(self, found: Found) -> None:
        self.verdict = found
        self.sizing.choose(found.microbatch_size)


def _samples(played: Played, size: int) -> list[float]:
    """Return seconds per row of groups of full microbatches; a shorter last microbatch is ignored."""
    whole = [lap for lap in played.laps if lap[1] >= size]
    # Microbatches are grouped, so that a short disturbance of one of them is not taken for another job.
    together = -(-len(whole) // (2 * SAMPLES)) or 1
    groups = (whole[start : start + together] for start in range(0, len(whole), together))
    return [sum(seconds for seconds, _ in each) / sum(rows for _, rows in each) for each in groups]
