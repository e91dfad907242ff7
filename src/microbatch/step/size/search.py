"""Find the fastest microbatch size with at most five probes, or a default if the machine is too busy to measure."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from statistics import fmean, quantiles

from microbatch.errors import ConfigError

MOST_SIZES = 12
"""Number of sizes among which five probes find the fastest: one less than a Fibonacci number."""

NOISE = 0.2
"""Relative spread of times above which another job is probably running."""

AGREED = 0.05
"""Largest relative difference of the two fastest times that counts as agreement."""

_MIDDLE = 16
"""Rows of the default size, which was never far from the best on the models of the benchmarks."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Found:
    """The chosen microbatch size, with the reason and the measurements.

    Attributes:
        microbatch_size: Rows that go through the model at once.
        decided: Whether speed was measured; if not, the size is a default, and ``why`` gives the reason.
        why: The reason for this size, in words.
        seconds: Measured seconds per row, by size.
    """

    microbatch_size: int
    decided: bool
    why: str
    seconds: Mapping[int, float]


def sizes_for(rows: int) -> list[int]:
    """List the sizes to try: those that cut a batch into 1, 2, 4, 8, ... microbatches as evenly as possible.

    Args:
        rows: Rows of the batch; at least 1.

    Returns:
        Sizes in rows, ascending; the 12 largest if there are more.

    Raises:
        ConfigError: The batch has no rows.

    Example:
        >>> sizes_for(48)
        [1, 2, 3, 6, 12, 24, 48]
    """
    if rows < 1:
        raise ConfigError(f"a batch to plan for needs at least 1 row, not {rows!r}")
    return sorted({-(-rows // (1 << power)) for power in range(rows.bit_length() + 1)})[-MOST_SIZES:]


def largest_between(rows: int, fits: Callable[[int], bool], *, low: int, high: int) -> int | None:
    """Find the largest size that fits between a size that fits and one that does not, for a batch cut evenly.

    Halving the number of microbatches doubles their size. So where memory is short, the next smaller size of
    `sizes_for` may use little more than half of it.

    Args:
        rows: Rows of the batch.
        fits: Whether a size fits; it must be true for all sizes below one that fits.
        low: A size that fits.
        high: A size that does not fit.

    Returns:
        The size; `None` if it is less than a fifth larger than ``low``.

    Example:
        >>> largest_between(96, lambda size: size <= 5, low=3, high=6)
        5
        >>> largest_between(96, lambda size: size <= 3, low=3, high=6) is None
        True
    """
    most, least = -(-rows // low), -(-rows // high)  # microbatches: with `most` of them it fits
    while most - least > 1:
        middle = (most + least) // 2
        most, least = (middle, least) if fits(-(-rows // middle)) else (most, middle)
    size = -(-rows // most)
    return size if 5 * size >= 6 * low else None


def next_size(sizes: Sequence[int], seconds: Mapping[int, float]) -> int | None:
    """Return the next size to time, by a Fibonacci search on the logarithm of the size.

    Speed rises up to the best size and falls beyond it. So the best size lies between the two measured neighbours of
    the fastest size so far, and each probe makes that interval smaller.

    Args:
        sizes: Sizes to choose from, ascending.
        seconds: Measured seconds per row, by size; sizes that are not in ``sizes`` are ignored.

    Returns:
        A size of ``sizes`` that has not been measured, or `None` if the fastest is known.

    Example:
        >>> next_size([1, 2, 4, 8, 16, 32], {}), next_size([1, 2, 4], {1: 3.0, 2: 2.0, 4: 2.5})
        (4, None)
    """
    seen = {index: seconds[size] for index, size in enumerate(sizes) if size in seconds}
    length = _fibonacci_above(len(sizes))
    if not seen:
        # Two sizes are equally good as a first probe; the smaller one needs less memory.
        return sizes[min(length - _fibonacci_above(length // 2) - 1, len(sizes) - 1)] if sizes else None
    best = min(seen, key=seen.__getitem__)
    low = max((index for index in seen if index < best), default=-1)
    high = min((index for index in seen if index > best), default=length - 1)
    between = [index for index in range(low + 1, min(high, len(sizes))) if index != best]
    if not between:
        return None
    # The mirror image of the best size in the interval.
    mirrored = low + high - best
    return sizes[min(between, key=lambda index: (abs(index - mirrored), index))]


def noise(samples: Sequence[float]) -> float:
    """Return the relative spread of samples: their interquartile range over their median; 0 for one sample.

    Example:
        >>> noise([1.0, 1.0, 1.0, 9.0]), noise([1.0, 2.0, 3.0])
        (2.0, 0.5)
    """
    if len(samples) < 2:
        return 0.0
    low, middle, high = quantiles(samples, n=4, method="inclusive")
    return (high - low) / middle if middle else 0.0


def middle_size(sizes: Sequence[int]) -> int:
    """Return the default size without a measurement: the largest of at most 16 rows, or the smallest of all.

    Example:
        >>> middle_size([1, 2, 4, 8, 16, 32]), middle_size([20, 40])
        (16, 20)
    """
    return max((size for size in sizes if size <= _MIDDLE), default=sizes[0])


def pace(times: Sequence[float]) -> float:
    """Return the time that counts: the mean of the two fastest, so that one lucky window is not believed.

    Example:
        >>> pace([3.0]), pace([9.0, 1.0, 2.0])
        (3.0, 1.5)
    """
    return fmean(sorted(times)[:2])


def spread(times: Sequence[float]) -> float:
    """Return the relative difference of the two fastest times; infinite for a single time.

    Example:
        >>> spread([1.0]), spread([9.0, 1.0, 1.5])
        (inf, 0.5)
    """
    low, high = [*sorted(times), math.inf][:2]
    return high / low - 1 if low else 0.0


def fastest(times: Mapping[int, Sequence[float]]) -> Found:
    """Choose a size: the largest of those that are as fast as the fastest, as far as its own times agree.

    Args:
        times: Seconds per row of one window or more, by size; at least one size.

    Returns:
        The size; not decided if the times of the fastest size do not agree.

    Example:
        >>> fastest({4: [1.0, 1.0], 8: [1.01, 1.01]}).microbatch_size
        4
        >>> fastest({4: [1.0, 1.04], 8: [1.03, 1.03], 16: [1.5, 1.5]}).microbatch_size
        8
    """
    seconds = {size: pace(each) for size, each in times.items()}
    best, *others = sorted(seconds, key=seconds.__getitem__)
    if not others:
        return Found(microbatch_size=best, decided=True, why="no other size fits this batch", seconds=seconds)
    apart, near = spread(times[best]), others[0]
    within = min(apart, NOISE)
    size = max(each for each in seconds if seconds[each] <= (1 + within) * seconds[best])
    if size == best:
        gain = seconds[near] / seconds[best]
        why = f"fastest of {len(seconds)} sizes that were timed on real steps: {gain:.2f} times as fast as {near}"
    else:
        why = f"largest of the sizes that took at most {within:.1%} more than {best}, whose own times differ as much"
    if apart > NOISE:
        why += f"; steps in microbatches of {best} differ by {apart:.0%}, as when another job is running"
    return Found(microbatch_size=size, decided=apart <= NOISE, why=why, seconds=seconds)


def undecided(sizes: Sequence[int], seconds: Mapping[int, float], *, why: str) -> Found:
    """Choose the default size.

    Args:
        sizes: Sizes to choose from, ascending; at least one.
        seconds: Measured seconds per row, by size.
        why: The reason why speed could not be compared.

    Returns:
        The default size.
    """
    size = middle_size(sizes)
    return Found(microbatch_size=size, decided=False, why=f"{why}; {size} is a default", seconds=dict(seconds))


def undisturbed(whole: float, parts: Sequence[float]) -> float:
    """Return the time per row of a window, without another job that disturbed some of its microbatches.

    Another job can only make a microbatch slower. So if the parts of a window are noisy but the two fastest agree,
    their mean is the time without the other job.

    Args:
        whole: Seconds per row of the whole window.
        parts: Seconds per row of its parts.

    Example:
        >>> (
        ...     undisturbed(1.1, [1.0, 1.1, 1.2]),
        ...     undisturbed(1.8, [2.5, 1.0, 1.0, 2.6]),
        ...     undisturbed(1.9, [1.0, 1.4, 2.5, 2.6]),
        ... )
        (1.1, 1.0, 1.9)

    Source:
        Tested with a simulated second job: ``tests/laws/test_rival.py``.
    """
    alike = len(parts) > 3 and noise(parts) > NOISE and spread(parts) <= AGREED
    return pace(parts) if alike else whole


def _fibonacci_above(number: int) -> int:
    """Return the smallest Fibonacci number above ``number``."""
    before, after = 1, 2
    while after <= number:
        before, after = after, before + after
    return after
