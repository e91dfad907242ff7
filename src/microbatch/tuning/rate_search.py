"""Search for a learning rate: choose the range, run the test at several seeds, and judge the curve."""

from __future__ import annotations

import math
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import cast

from microbatch.arguments import is_finite, listed_of, whole
from microbatch.errors import ConfigError, LossError
from microbatch.train.job import Job
from microbatch.train.run_config import RunConfig
from microbatch.tuning.learning_rate import LearningRate
from microbatch.tuning.range_curve import (
    FALLS_AT_ONCE,
    FALLS_TO_THE_END,
    GOOD,
    RISES,
    RateCurve,
    Reading,
    diverged,
    onset,
    read,
    smoothed,
    spaced,
)
from microbatch.tuning.range_test import RangeStep, RangeTest, range_test
from microbatch.tuning.range_words import words_for

BELOW, ABOVE = 1e-4, 1e4
"""The default range, as multiples of the optimizer's own rate."""

LOW, HIGH = 1e-7, 10.0
"""The default range where the optimizer's rate is 0."""

WIDER = 1e3
"""How much lower, or higher, the second range begins or ends where the first was too narrow."""

LEAST_FACTOR = 10.0
"""Between the ends of a range of which one is given."""

AROUND = 10**1.5
"""The finer range begins so many times below what the first one suggests, and ends as far above it: three decades."""

TRIES = 3
"""Ranges that are tried at most."""

LEAST_STEPS, MOST_STEPS, MOST_SEEDS = 20, 100_000, 100


def seeds_of(seeds: int | Sequence[int], *, first: int = 0) -> list[int]:
    """List the seeds of the runs.

    Args:
        seeds: How many runs, or their seeds.
        first: The first seed of a number.

    Returns:
        The seeds.

    Raises:
        ConfigError: It is neither a number from 1 to 100 nor a list of seeds.

    Example:
        >>> seeds_of(3), seeds_of([7])
        ([0, 1, 2], [7])
    """
    runs = whole(seeds)
    chosen = (listed_of(seeds) or []) if runs is None else [first + index for index in range(min(runs, MOST_SEEDS + 1))]
    found = [number for each in chosen if (number := whole(each, least=0)) is not None and number < 1 << 63]
    if not 1 <= len(chosen) <= MOST_SEEDS or len(found) < len(chosen):
        raise ConfigError(f"seeds must be 1 to {MOST_SEEDS} runs, or as many seeds of at least 0, not {seeds!r}")
    return found


def rate_for(
    job: Job,
    config: RunConfig,
    *,
    low: float | None,
    high: float | None,
    seeds: Sequence[int],
    progress: Callable[[RangeStep], object] | None = None,
) -> LearningRate:
    """Find a learning rate for a job under a configuration; see `find_learning_rate`.

    Args:
        job: The job.
        config: What `resolve` returned for it; its steps are those of one run.
        low: The first rate, or `None`.
        high: The last rate, or `None`.
        seeds: Seeds of the runs.
        progress: Called after every step.

    Returns:
        The result.

    Raises:
        ConfigError: A value cannot work.
    """
    check_range(low, high, steps=config.steps)
    started = time.perf_counter()
    with range_test(job, config, progress=progress) as (test, groups):
        trial = _Trial(test, steps=config.steps, seeds=seeds)
        reading = trial.search(_Scale.of(groups.given, low=low, high=high))
    good = reading.verdict == GOOD
    result = LearningRate(
        suggested=reading.suggested,
        steepest=reading.steepest if good else None,
        valley=reading.valley if good else None,
        minimum_tenth=reading.minimum / 10 if good else None,
        diverged_at=trial.diverged_at,
        given=groups.given,
        curve=trial.curve(),
        batch_size=config.batch_size,
        microbatch_size=test.microbatch_size,
        steps=trial.taken,
        seconds=time.perf_counter() - started,
    )
    words = words_for(result, reading, alone=trial.alone(), diverged=trial.diverged)
    return replace(result, words=words)


def check_range(low: float | None, high: float | None, *, steps: int) -> None:
    """Check the range and the length of a test, before anything is run.

    Args:
        low: The first rate, or `None`.
        high: The last rate, or `None`.
        steps: Steps of one run.

    Raises:
        ConfigError: A value cannot work.
    """
    for name, value in (("low", low), ("high", high)):
        if value is not None and not (is_finite(value) and value > 0):
            raise ConfigError(f"{name} must be a learning rate above 0, not {value!r}")
    if low is not None and high is not None and low >= high:
        raise ConfigError(f"low is {low:g} and high is {high:g}: the rate grows, so low must be below high")
    if not LEAST_STEPS <= steps <= MOST_STEPS:
        raise ConfigError(f"steps is {steps}: a run of the test has {LEAST_STEPS} to {MOST_STEPS:,} steps")


@dataclass(frozen=True, slots=True, kw_only=True)
class _Scale:
    """The range of the rates, and which of its ends may move."""

    low: float
    high: float
    may_fall: bool
    may_rise: bool

    @classmethod
    def of(cls, given: float, *, low: float | None, high: float | None) -> _Scale:
        below, above = (given * BELOW, given * ABOVE) if given else (LOW, HIGH)
        if low is not None and high is None:
            above = max(above, low * LEAST_FACTOR)
        if high is not None and low is None:
            below = min(below, high / LEAST_FACTOR)
        return cls(
            low=below if low is None else low,
            high=above if high is None else high,
            may_fall=low is None,
            may_rise=high is None,
        )

    def wider(self, verdict: str) -> _Scale | None:
        """Return a range that may show what this one does not; `None` if there is none, or no need of it."""
        if self.may_fall and verdict in {RISES, FALLS_AT_ONCE}:
            return replace(self, low=self.low / WIDER)
        if self.may_rise and verdict == FALLS_TO_THE_END:
            return replace(self, high=self.high * WIDER)
        return None

    def finer(self, suggested: float | None) -> _Scale | None:
        """Return a range around a suggestion; `None` without one, and where the user has chosen an end."""
        if suggested is None or not (self.may_fall and self.may_rise):
            return None
        return replace(self, low=suggested / AROUND, high=suggested * AROUND)


class _Trial:
    """Run the test at every seed, on one range after another."""

    def __init__(self, test: RangeTest, *, steps: int, seeds: Sequence[int]) -> None:
        self._test, self._steps, self._seeds = test, steps, seeds
        self.taken = 0
        self.rates, self.runs, self.ends = list[float](), list[list[float]](), list[int]()
        self.diverged_at, self.diverged = cast("float | None", None), 0

    @property
    def end(self) -> int | None:
        """The place in the losses at which the first run to diverge began to; `None` if none did."""
        return min(self.ends, default=None)

    def search(self, scale: _Scale) -> Reading:
        reading = self._run(scale)
        for _ in range(TRIES - 1):
            wider = scale.wider(reading.verdict)
            if wider is None:
                break
            scale, reading = wider, self._run(wider)
        finer = scale.finer(reading.suggested)
        return reading if finer is None else self._again(finer, reading)

    def _again(self, scale: _Scale, wide: Reading) -> Reading:
        """Read a finer range, which takes more steps at useful rates; if its curve shows nothing, keep the wide one."""
        kept, limit = (self.rates, self.runs, self.ends), (self.diverged_at, self.diverged)
        reading = self._run(scale)
        if reading.suggested is None:
            (self.rates, self.runs, self.ends), (self.diverged_at, self.diverged) = kept, limit
            return wide
        if self.diverged_at is None:
            self.diverged_at, self.diverged = limit
        return replace(reading, steepest=wide.steepest, valley=wide.valley, minimum=wide.minimum)

    def curve(self) -> RateCurve:
        common = self._common()
        count = len(common[0]) - 1
        each = [smoothed(run)[1:] for run in common]
        return RateCurve(
            rates=self.rates[:count],
            smoothed=smoothed([statistics.fmean(losses) for losses in zip(*common, strict=True)])[1:],
            spread=[statistics.stdev(losses) if len(losses) > 1 else 0.0 for losses in zip(*each, strict=True)],
            losses=self.runs,
        )

    def alone(self) -> list[float | None]:
        """Return what each run by itself suggests."""
        return [read(self.rates, [run], end=self.end).suggested for run in self._common()]

    def _run(self, scale: _Scale) -> Reading:
        self.rates, self.runs, self.ends = spaced(scale.low, scale.high, self._steps), [], []
        for index, seed in enumerate(self._seeds):
            losses = self._test.run(self.rates, seed=seed, sweep=index, sweeps=len(self._seeds))
            if not math.isfinite(losses[0]):
                raise LossError(
                    "the job's loss or its gradient is infinite or NaN before any step of the range test, so there is "
                    "no rate to find; check the data and the model's first weights"
                )
            self.taken += len(losses)
            self.runs.append(losses)
            if diverged(losses):
                self.ends.append(onset(losses))
        self.diverged_at = None if self.end is None else self.rates[max(0, self.end - 1)]
        self.diverged = len(self.ends)
        return read(self.rates, self._common(), end=self.end)

    def _common(self) -> list[list[float]]:
        """Return the losses of all runs as far as every run has them, and as they are finite."""
        lengths = [next((i for i, loss in enumerate(run) if not math.isfinite(loss)), len(run)) for run in self.runs]
        return [run[: min(lengths)] for run in self.runs]
