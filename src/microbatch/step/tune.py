"""``microbatch_size="auto"``: the first windows are run at the sizes that the search asks for.

Every cut gives the same gradient, so a probe is a real training step, and costs what it is slower than the best.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from statistics import median
from typing import Any

import torch

from microbatch.memory.predict import Prediction
from microbatch.step.events import PlanChosen
from microbatch.step.search import (
    NOISE,
    SAMPLES,
    Found,
    fastest,
    next_size,
    noise,
    settled,
    sizes_for,
    too_noisy,
    undecided,
)
from microbatch.step.sizing import Sizing

MOST_PROBES = 5
SAFE = 0.97
"""Of the budget, what a predicted peak may take: the meter does not see what operators allocate inside themselves."""
_FEELER = 4
"""Rows of the first microbatches where nothing is predicted; from their peak follows what larger ones take at most."""
_PATIENCE = 3
"""Windows at a size before noise ends the search; and windows that a meter may spoil, which most go without."""
_CLOSE = 1.7
"""Times as slow as the fastest up to which a size is timed once more: another job seldom makes it slower than that."""
_ONLY = "no other size fits"


class Stopwatch:
    """Time the microbatches of one window, on the device's own time.

    Args:
        clock: Seconds since some moment.
        device: Waited for at each reading.

    Attributes:
        laps: Seconds and rows of each microbatch.
    """

    def __init__(self, clock: Callable[[], float], device: torch.device) -> None:
        self._clock = clock
        self._device = device
        self.laps: list[tuple[float, float]] = []
        self._earlier: list[float] = []
        self._last = self._now()

    def lap(self, rows: float) -> None:
        """End a microbatch, and begin the next.

        Args:
            rows: Rows of it.
        """
        now = self._now()
        earlier = self._earlier.pop(0) if self._earlier else 0.0
        self.laps.append((earlier + now - self._last, rows))
        self._last = now

    def again(self) -> None:
        """Begin with the microbatches from the first on again: the times of both passes are added."""
        self._earlier, self.laps = [seconds for seconds, _ in self.laps], []
        self._last = self._now()

    def _now(self) -> float:
        if self._device.type == "cuda":
            torch.cuda.synchronize(self._device)
        return self._clock()


@dataclass(frozen=True, slots=True, kw_only=True)
class Played:
    """What a window that went well tells of its size.

    Attributes:
        step: Index of the window.
        rows: Rows of its batch.
        largest: Rows of its largest microbatch.
        laps: Seconds and rows of each microbatch.
        peak_bytes: Most bytes in use, where somebody counted.
        budget: Bytes that it might use, where somebody counted.
        watched: Whether a meter was on that most windows go without.
        tokens: Tokens of its batch, padding left out, where rows are ragged.
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
    """Hold what is known of the sizes, until one of them is chosen.

    Each size has a first window, which is watched and warms up, and as many more as give three samples. In the end
    those that are not far from the fastest have one more, some time after their others, and the lower time counts: a
    job that ran beside all the windows of a size would not show in them.

    Attributes:
        sizes: Sizes that may fit, ascending.
        sizing: What every cut is made by.
        predicted: Predicted peaks, by size; empty where nothing could be predicted.
        ragged: Whether microbatches are of unlike rows, so that only whole windows compare.
        hindrance: Why speed cannot be compared, in words; `None` if it can.
        verdict: What was found, to be told at the window's end.
        seconds: What was measured, in seconds per row, by size.
        peaks: Peaks that were measured, by size.
        samples: Seconds per row of parts of a window, at the size that is being tried: they tell whether to believe.
        wholes: Seconds per row of its whole windows, which compare: the first microbatch of each has work of its own.
        windows: Windows at that size.
        bound: Rows that are sure to fit, where nothing is predicted; `None` while no peak is known.
        feeling: Whether the size is only tried for its peak.
        rehearsed: Whether a prediction was asked for, and is not to be asked for again.
        again: Sizes that are still to be timed once more; `None` before it is known which.
        rerun: Whether the size that is being tried is one of them.
        default: Size to keep where nothing can be decided; `None` for a size that is rarely far from the best.
        density: Tokens of a row, on average, of the first batch that was timed, where rows are ragged.
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
    default: int | None = None
    density: float | None = None

    @classmethod
    def begin(cls, sizing: Sizing, *, rows: int, ragged: bool, hindrance: str | None = None, least: int = 1) -> Tuning:
        """Begin with a batch of which nothing is predicted.

        Args:
            sizing: What every cut is made by; it is given the first size.
            rows: Rows of the batch; at least 1.
            ragged: Whether microbatches are of unlike rows.
            hindrance: Why speed cannot be compared, in words; `None` if it can.
            least: Rows of the smallest microbatch that is worth trying.

        Returns:
            The tuning.
        """
        sizes = sizes_for(rows)
        worth = [size for size in sizes if size >= least] or sizes
        found = cls(worth, sizing, ragged=ragged, hindrance=hindrance)
        if hindrance is not None:
            found._decide(undecided(found.sizes, {}, why=hindrance))
        else:
            found.feeling = True
            found._try(max((size for size in found.sizes if size <= _FEELER), default=found.sizes[0]))
        return found

    def foresee(self, prediction: Prediction, *, budget: int | None) -> None:
        """Leave out the sizes that will not fit.

        Args:
            prediction: Peaks by size.
            budget: Bytes that may be in use; `None` for no limit.
        """
        self.predicted = {size: prediction.peak_bytes(size) for size in self.sizes}
        fit = [size for size, peak in self.predicted.items() if budget is None or peak <= SAFE * budget]
        self.sizes = fit or self.sizes[:1]
        self.feeling = False
        if self.hindrance is not None:
            self._decide(undecided(self.sizes, {}, why=self.hindrance))
        else:
            self._move()

    def around(self, sizing: Sizing) -> Tuning:
        """Begin anew with the chosen size and its neighbours.

        Args:
            sizing: What every cut is made by.

        Returns:
            The tuning, which keeps the size where it cannot decide.
        """
        size = sizing.most
        known = sorted({*self.sizes, size})
        at = known.index(size)
        near = known[max(0, at - 1) : at + 2]
        made = Tuning(near, sizing, self.predicted, ragged=self.ragged, bound=self.bound, default=size)
        made.rehearsed = True
        made.density = self.density
        made._move()
        return made

    def after(self, played: Played) -> PlanChosen | None:
        """Learn from a window, and set the size of the next.

        Args:
            played: What it tells.

        Returns:
            What to tell listeners once a size has been chosen.
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
        """Whether only a prediction can tell if the larger sizes fit."""
        if self.bound is None or self.feeling or self.rehearsed or self.verdict is not None:
            return False
        return self.sizes[-1] > self.bound

    @property
    def warming(self) -> bool:
        """Whether the next window is the first at its size."""
        return self.windows == 0

    def state(self) -> dict[str, Any]:
        """Return what a resumed run needs to go on, as plain numbers; samples of an unfinished size are taken again."""
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
            "default": self.default,
            "density": self.density,
        }

    @classmethod
    def restored(cls, state: Mapping[str, Any], sizing: Sizing) -> Tuning:
        """Go on where `state` was taken.

        Args:
            state: What it returned.
            sizing: What every cut is made by, restored as well.

        Returns:
            The tuning.
        """
        found = cls(list(state["sizes"]), sizing)
        found.predicted, found.seconds, found.peaks = (dict(state[name]) for name in ("predicted", "seconds", "peaks"))
        found.ragged, found.bound, found.feeling = state["ragged"], state["bound"], state["feeling"]
        found.rehearsed = state["rehearsed"]
        found.again, found.default, found.density = state["again"], state["default"], state["density"]
        return found

    def _learn(self, size: int, played: Played) -> None:
        self.windows += 1
        if played.peak_bytes is not None and played.budget is not None and not self.predicted:
            # Twice the rows take at most twice the bytes, weights and all.
            self.bound = max(self.bound or size, size * played.budget // max(1, played.peak_bytes))
        if self.feeling:
            self.feeling = False
            self._move()
            # Where the search begins with the same size, it has warmed up.
            self.windows = int(self.verdict is None and self.sizing.most == size)
        elif self.windows > 1 and not (played.watched and self.windows <= 1 + _PATIENCE):
            self._sample(size, played)

    def _sample(self, size: int, played: Played) -> None:
        whole = sum(seconds for seconds, _ in played.laps) / played.rows
        if self.ragged and played.tokens:
            # Batches are of unlike lengths: what a token takes compares, and is told for a row of the first one.
            self.density = self.density or played.tokens / played.rows
            whole *= self.density * played.rows / played.tokens
        self.wholes.append(whole)
        self.samples += [whole] if self.ragged else _samples(played, size)
        if self.rerun:
            self.seconds[size] = min(self.seconds[size], whole)
            self._move()
        elif len(self.samples) >= SAMPLES:
            taken = settled(self.samples)
            if taken is not None:
                self.seconds[size] = median(self.wholes) if noise(self.samples) <= NOISE else taken
                self._move()
            elif self.windows > _PATIENCE:
                why = too_noisy(size, self.samples)
                self._decide(undecided(self._fitting, self.seconds, why=why, default=self.default))

    @property
    def _fitting(self) -> list[int]:
        return [size for size in self.sizes if self.bound is None or size <= self.bound] or self.sizes[:1]

    def _move(self) -> None:
        """Go on with the next probe, or decide."""
        fitting = self._fitting
        following = next_size(fitting, self.seconds) if len(self.seconds) < MOST_PROBES else None
        timed = [size for size in fitting if size in self.seconds]
        if len(fitting) > 1 and following is not None:
            self._try(following)
        elif again := self._once_more(timed):
            self._try(again.pop(), rerun=True)
        elif timed:
            self._decide(fastest(fitting, self.seconds))
        else:
            self._decide(Found(microbatch_size=fitting[0], decided=True, why=_ONLY, seconds={}))

    def _once_more(self, timed: list[int]) -> list[int]:
        """List the sizes that are still to be timed once more, the fastest last."""
        if self.again is None and len(timed) > 1:
            seconds = self.seconds
            most = _CLOSE * min(seconds[size] for size in timed)
            self.again = sorted((size for size in timed if seconds[size] < most), key=seconds.__getitem__, reverse=True)
        if self.again is None:
            return []
        self.again = [size for size in self.again if size in timed]
        return self.again

    def _try(self, size: int, *, rerun: bool = False) -> None:
        # Timed once more, a size needs no window to warm up: what that would cost is not taken.
        self.samples, self.wholes, self.windows, self.rerun = [], [], int(rerun), rerun
        self.sizing.choose(size)

    def _decide(self, found: Found) -> None:
        self.verdict = found
        self.sizing.choose(found.microbatch_size)


def _samples(played: Played, size: int) -> list[float]:
    """Turn laps into seconds per row; a shorter last microbatch says little of its size."""
    whole = [lap for lap in played.laps if lap[1] >= size]
    # Several short ones together: what disturbs a single one for a moment is not another job.
    together = -(-len(whole) // (2 * SAMPLES)) or 1
    groups = (whole[start : start + together] for start in range(0, len(whole), together))
    return [sum(seconds for seconds, _ in each) / sum(rows for _, rows in each) for each in groups]
