"""Curves of a loss over a growing learning rate: smooth them, find divergence, and read rates from them."""

from __future__ import annotations

import itertools
import math
import statistics
from collections.abc import Sequence
from dataclasses import dataclass

SMOOTHING = 0.9
"""What the smoothed loss keeps of itself at each step: an average over about the last ten losses."""

WIDTH = 0.04
"""Standard deviation of the smoothing without delay, as a part of the whole range."""

TIMES = 4.0
"""A loss above so many times the best smoothed one has diverged, as in fastai's learning-rate finder."""

FIRST = 5
"""Losses from which the level before any descent is taken."""

LEAST = 20
"""Losses that noise is estimated from, at least."""

CLEARLY = 5.0
"""Standard errors that a fall has to have, so that noise alone does not pass for one."""

RISE = 3.0
"""Standard errors that the rise after it has to have."""

ROUNDING = 1e-6
"""Part of the loss that rounding may move."""

EARLY = 8
"""The first of so many parts of a descent: a quarter of the fall there means that the rates began too high."""

GOOD, FLAT, RISES, FALLS_AT_ONCE, FALLS_TO_THE_END = "good", "flat", "rises", "falls at once", "falls to the end"


@dataclass(frozen=True, slots=True, kw_only=True)
class RateCurve:
    """Hold the loss at every rate.

    Attributes:
        rates: The rates, growing, as far as no run had diverged.
        smoothed: The loss after the step at each rate: averaged over the runs, then smoothed in time order.
        spread: Standard deviation over the runs of their own smoothed losses, at each rate.
        losses: The losses of each run as they were: that before the first step, then the one after the step at each
            rate. A run that diverged later has more of them.
    """

    rates: Sequence[float]
    smoothed: Sequence[float]
    spread: Sequence[float]
    losses: Sequence[Sequence[float]]


def spaced(low: float, high: float, steps: int) -> list[float]:
    """Space rates evenly on a logarithmic scale.

    Args:
        low: The first rate; above 0.
        high: The last rate; above ``low``.
        steps: How many; at least 2.

    Returns:
        The rates, each the same factor above the one before.

    Example:
        >>> [round(rate, 3) for rate in spaced(0.01, 1.0, 3)]
        [0.01, 0.1, 1.0]
    """
    factor = math.log(high / low) / (steps - 1)
    return [low * math.exp(index * factor) for index in range(steps - 1)] + [high]


def smoothed(losses: Sequence[float]) -> list[float]:
    """Average each loss with those before it, with weights that fall exponentially.

    The bias correction of Adam makes the weights add up to 1 from the first loss on.

    Args:
        losses: In time order.

    Returns:
        As many averages, each of them between the smallest and the largest loss so far.

    Example:
        >>> [round(value, 3) for value in smoothed([1.0, 1.0, 0.0])]
        [1.0, 1.0, 0.631]
    """
    average, result = 0.0, list[float]()
    for index, loss in enumerate(losses, start=1):
        average = SMOOTHING * average + (1 - SMOOTHING) * loss
        result.append(average / (1 - SMOOTHING**index))
    return result


def centred(losses: Sequence[float], *, width: float) -> list[float]:
    """Average each loss with its neighbours on both sides, with the weights of a Gaussian.

    Unlike `smoothed`, which looks back only, this does not delay the curve.

    Args:
        losses: In time order.
        width: Standard deviation of the Gaussian, in steps; above 0.

    Returns:
        As many averages, each of them between the smallest and the largest loss.

    Example:
        >>> [round(value, 2) for value in centred([0.0, 0.0, 1.0, 0.0, 0.0], width=0.5)]
        [0.0, 0.11, 0.79, 0.11, 0.0]
    """
    reach = math.ceil(4 * width)
    weights = [math.exp(-0.5 * (offset / width) ** 2) for offset in range(-reach, reach + 1)]
    result = list[float]()
    for index in range(len(losses)):
        near = range(max(0, index - reach), min(len(losses), index + reach + 1))
        shares = [weights[each - index + reach] for each in near]
        result.append(sum(share * losses[each] for share, each in zip(shares, near, strict=True)) / sum(shares))
    return result


def diverged(losses: Sequence[float]) -> bool:
    """Return whether the last loss shows divergence: it is not finite, or the smoothed loss is far above its best.

    Far above is four times the best. Of losses below 0, where this says nothing, it is three times the whole fall
    above the first.

    Args:
        losses: The losses so far, in time order; at least one.

    Returns:
        True if the run should stop.

    Example:
        >>> diverged([1.0, 0.5, 0.5]), diverged([1.0, 0.5, 30.0]), diverged([1.0, math.nan])
        (False, True, True)
    """
    if not math.isfinite(losses[-1]):
        return True
    curve = smoothed(losses)
    best = min(curve)
    if best > 0:
        return curve[-1] > TIMES * best
    return curve[-1] > curve[0] + (TIMES - 1) * (curve[0] - best) > curve[0]


def onset(losses: Sequence[float]) -> int:
    """Return where the last rise of a loss that diverged began.

    Args:
        losses: In time order; the last one showed divergence.

    Returns:
        Index of the first loss of the rise that ends with the last one.

    Example:
        >>> onset([1.0, 0.5, 0.2, 0.3, 0.9, 5.0])
        3
    """
    index = len(losses) - 1
    while index > 1 and math.isfinite(losses[index - 1]) and not losses[index - 1] <= losses[index - 2]:
        index -= 1
    return index


def noise(losses: Sequence[float]) -> float:
    """Estimate how much a loss differs from step to step by chance, from the differences of neighbours.

    The median of the differences is not moved by the few large ones of a descent or a divergence.

    Args:
        losses: In time order.

    Returns:
        The standard deviation of one loss; 0 for fewer than two.
    """
    differences = [abs(after - before) for before, after in itertools.pairwise(losses)]
    return 1.4826 * statistics.median(differences) / math.sqrt(2) if differences else 0.0


@dataclass(frozen=True, slots=True, kw_only=True)
class Reading:
    """Hold what a curve says.

    Attributes:
        verdict: ``"good"``; ``"flat"`` if the loss does not fall by more than noise; ``"rises"`` if it only
            rises, and soon; ``"falls at once"`` if it falls from the first rate on; ``"falls to the end"`` if it never
            rises.
        level: The loss before any step.
        best: The lowest loss, smoothed without delay.
        error: Standard error of their difference, from the noise between steps.
        minimum: Rate of the lowest smoothed loss.
        fastest: Rate at which the loss falls most for each factor in the rate, read without the delay of smoothing.
        lowest: Rate at which the loss is lowest, likewise.
        steepest: Rate at which the smoothed loss falls most for each factor in the rate; `None` if it never falls.
        valley: Rate in the middle of the longest descent; `None` if there is none.
    """

    verdict: str
    level: float
    best: float
    error: float
    minimum: float
    fastest: float
    lowest: float
    steepest: float | None
    valley: float | None

    @property
    def fall(self) -> float:
        """How much the loss falls."""
        return self.level - self.best

    @property
    def suggested(self) -> float | None:
        """The rate to use: halfway, by factors, from where the loss falls fastest to where it is lowest.

        `None` without a good curve. Why this one: ``docs/learning-rate.md``.
        """
        return math.sqrt(self.fastest * self.lowest) if self.verdict == GOOD else None


def read(rates: Sequence[float], runs: Sequence[Sequence[float]], *, end: int | None = None) -> Reading:
    """Read a curve, the mean of several runs.

    Args:
        rates: The rates of the steps.
        runs: Of each run, the loss before the first step and that after the step of each rate; all of one length, at
            most one more than there are rates, and finite.
        end: Index of the rate at which divergence began; `None` if none did.

    Returns:
        The reading.
    """
    mean = [statistics.fmean(each) for each in zip(*runs, strict=True)]
    curve = smoothed(mean)
    if len(curve) < 3:
        return Reading(
            verdict=RISES,
            level=mean[0],
            best=mean[0],
            error=0.0,
            minimum=rates[0],
            fastest=rates[0],
            lowest=rates[0],
            steepest=None,
            valley=None,
        )
    # Where the last rise begins, the loss itself is lowest; smoothing, which lags behind, may still fall.
    turn = max(1, onset(mean) if end is None else min(onset(mean), end))
    width = max(1.0, len(rates) * WIDTH)
    prompt = centred(mean[: turn + 1], width=width)
    lowest = min(range(1, turn + 1), key=prompt.__getitem__)
    minimum = min(range(1, turn + 1), key=curve.__getitem__)
    first = min(len(mean), max(FIRST, lowest // 4))
    level = statistics.fmean(mean[:first])
    sigma = statistics.fmean(noise(run[: max(lowest, LEAST) + 1]) for run in runs) / math.sqrt(len(runs))
    error = sigma * math.sqrt(1 / first + 1 / (2 * math.sqrt(math.pi) * width))
    begin, stop = longest_descent(curve[: minimum + 1])
    # Not in what noise makes of the level before.
    begin = max([begin, *(index for index in range(stop) if curve[index] >= level - error)])
    steepest = _steepest(curve, range(min(begin, minimum - 1), minimum))
    return Reading(
        verdict=_verdict(mean, prompt, lowest=lowest, level=level, sigma=sigma, error=error, end=end),
        level=level,
        best=prompt[lowest],
        error=error,
        # A place in a curve is a loss after a step: that of the rate one place before.
        minimum=rates[minimum - 1],
        fastest=rates[_steepest(prompt, range(lowest))],
        lowest=rates[lowest - 1],
        steepest=rates[steepest] if curve[steepest + 1] < curve[steepest] else None,
        valley=rates[max(0, (begin + stop) // 2 - 1)] if stop > begin else None,
    )


def _steepest(curve: Sequence[float], places: Sequence[int]) -> int:
    return min(places, key=lambda index: curve[index + 1] - curve[index])


def longest_descent(curve: Sequence[float]) -> tuple[int, int]:
    """Find the longest descent of a curve, in which it may rise for a moment.

    It ends where the longest subsequence of falling values ends, and begins as many places before as it has values.

    Args:
        curve: Any values.

    Returns:
        Index of its begin and of its end; the same index if the curve never falls.

    Example:
        >>> longest_descent([1.0, 1.1, 0.9, 0.95, 0.7, 0.5, 0.8])
        (2, 5)
    """
    lengths = list[int]()
    for index, value in enumerate(curve):
        lengths.append(1 + max((lengths[each] for each in range(index) if curve[each] > value), default=0))
    end = max(range(len(lengths)), key=lengths.__getitem__)
    return end - lengths[end] + 1, end


def _verdict(
    mean: Sequence[float],
    prompt: Sequence[float],
    *,
    lowest: int,
    level: float,
    sigma: float,
    error: float,
    end: int | None,
) -> str:
    """Judge a curve: the mean loss, and its smoothed form up to where its last rise begins."""
    best = prompt[lowest]
    clear = max(CLEARLY * error, ROUNDING * abs(level))
    early = mean[0] - prompt[max(1, lowest // EARLY)]
    if early > max(clear, CLEARLY * sigma, (mean[0] - best) / 4):
        return FALLS_AT_ONCE
    # A last loss, the mean of all later ones, or the curve between them: any of them shows that there is a minimum.
    rise = max(*prompt[lowest:], mean[-1] - CLEARLY * sigma, statistics.fmean(mean[lowest:])) - best
    rises = end is not None or rise > max(RISE * error, (level - best) / 50)
    if level - best <= clear:
        return RISES if rises and lowest <= len(mean) // 4 else FLAT
    return GOOD if rises else FALLS_TO_THE_END
