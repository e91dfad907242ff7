"""Which microbatch size is fastest: at most five probes, and a refusal where the machine is too busy to tell."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from statistics import median, quantiles

from microbatch.errors import ConfigError

MOST_SIZES = 12
"""Sizes among which five probes find the fastest: one less than the Fibonacci number of five steps."""

NOISE = 0.2
"""Interquartile range over the median above which another job is running, and the median says nothing."""

AGREED = 0.05
"""By which part the two fastest samples may be apart where the others say nothing: both were left in peace."""

SAMPLES = 3
"""Fewest samples of a probe: their interquartile range leaves out one that was disturbed."""

_MIDDLE = 16
"""Rows that were never far from the best on the models of the benchmarks, where nothing can be measured."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Found:
    """Say which microbatch size to take, and what that rests on.

    Attributes:
        microbatch_size: Rows that go through the model at once.
        decided: Whether speed was measured; if not, the size is a default, and ``why`` says what was in the way.
        why: Why this size, in words.
        seconds: What was measured, in seconds per row, by size.
    """

    microbatch_size: int
    decided: bool
    why: str
    seconds: Mapping[int, float]


def sizes_for(rows: int, *, largest: int | None = None) -> list[int]:
    """List the sizes worth trying: a batch cut into 1, 2, 4, 8, ... microbatches as even as can be.

    Args:
        rows: Rows of the batch; at least 1.
        largest: Rows of the largest microbatch that fits; `None` if that is not known. Where not even one row fits,
            one is what is left to try.

    Returns:
        Rows, ascending; at most 12 of them, the largest.

    Raises:
        ConfigError: The batch has no rows.

    Example:
        >>> sizes_for(48), sizes_for(33, largest=20), sizes_for(5, largest=0)
        ([1, 2, 3, 6, 12, 24, 48], [1, 2, 3, 5, 9, 17], [1])
    """
    if rows < 1:
        raise ConfigError(f"a batch to plan for needs at least 1 row, not {rows!r}")
    most = rows if largest is None else max(1, min(rows, largest))
    cuts = (1 << power for power in range(rows.bit_length() + 1))
    return sorted({size for cut in cuts if (size := -(-rows // cut)) <= most})[-MOST_SIZES:]


def next_size(sizes: Sequence[int], seconds: Mapping[int, float]) -> int | None:
    """Say which size to probe next, from what has been measured.

    A Fibonacci search on the logarithm of the size: speed rises to its best and falls beyond, so the best lies between
    the two neighbours of the fastest size so far, and each probe makes that interval smaller.

    Args:
        sizes: Sizes to choose from, ascending.
        seconds: Seconds per row, by size; other sizes in it are passed over.

    Returns:
        A size of ``sizes`` that has not been measured, or `None` if the fastest is known.

    Example:
        >>> next_size([1, 2, 4, 8, 16, 32], {}), next_size([1, 2, 4], {1: 3.0, 2: 2.0, 4: 2.5})
        (4, None)
    """
    seen = {index: seconds[size] for index, size in enumerate(sizes) if size in seconds}
    length = _fibonacci_above(len(sizes))
    if not seen:
        # Of the two that are as good, the one that needs less memory.
        return sizes[min(length - _fibonacci_above(length // 2) - 1, len(sizes) - 1)] if sizes else None
    best = min(seen, key=seen.__getitem__)
    low = max((index for index in seen if index < best), default=-1)
    high = min((index for index in seen if index > best), default=length - 1)
    between = [index for index in range(low + 1, min(high, len(sizes))) if index != best]
    if not between:
        return None
    # As far from one end of the interval as the best is from the other.
    mirrored = low + high - best
    return sizes[min(between, key=lambda index: (abs(index - mirrored), index))]


def noise(samples: Sequence[float]) -> float:
    """Say how far samples of the same thing are apart.

    Args:
        samples: At least one.

    Returns:
        Their interquartile range over their median; 0 for a single one.

    Example:
        >>> noise([1.0, 1.0, 1.0, 9.0]), noise([1.0, 2.0, 3.0])
        (2.0, 0.5)
    """
    if len(samples) < 2:
        return 0.0
    low, middle, high = quantiles(samples, n=4, method="inclusive")
    return (high - low) / middle if middle else 0.0


def middle_size(sizes: Sequence[int]) -> int:
    """Take a size without having measured any: the largest of at most 16 rows.

    Args:
        sizes: Sizes to choose from, ascending; at least one.

    Returns:
        One of them.

    Example:
        >>> middle_size([1, 2, 4, 8, 16, 32]), middle_size([20, 40])
        (16, 20)
    """
    return max((size for size in sizes if size <= _MIDDLE), default=sizes[0])


def fastest(sizes: Sequence[int], seconds: Mapping[int, float]) -> Found:
    """Decide on what has been measured.

    Args:
        sizes: Sizes to choose from, ascending.
        seconds: Seconds per row, by size; at least one of ``sizes`` among them.

    Returns:
        The fastest of those that were measured.
    """
    measured = {size: seconds[size] for size in sizes if size in seconds}
    best = min(measured, key=measured.__getitem__)
    others = [size for size in measured if size != best]
    if not others:
        return Found(microbatch_size=best, decided=True, why="no other size fits this batch", seconds=measured)
    near = min(others, key=measured.__getitem__)
    gain = measured[near] / measured[best]
    why = f"fastest of {len(measured)} sizes that were timed on real steps: {gain:.2f} times as fast as {near}"
    return Found(microbatch_size=best, decided=True, why=why, seconds=measured)


def undecided(sizes: Sequence[int], seconds: Mapping[int, float], *, why: str, default: int | None = None) -> Found:
    """Fall back to a default, and say why.

    Args:
        sizes: Sizes to choose from, ascending; at least one.
        seconds: What could be measured, in seconds per row, by size.
        why: What was in the way of more.
        default: The size to fall back to; `None` for `middle_size`.

    Returns:
        The record.
    """
    size = middle_size(sizes) if default is None else default
    return Found(microbatch_size=size, decided=False, why=f"{why}; {size} is a default", seconds=dict(seconds))


def settled(samples: Sequence[float]) -> float | None:
    """Take the time that samples agree on.

    Another job can only make a sample slower. So where the middle half of them lies apart, but the two fastest agree,
    these were left in peace, and tell the time.

    Args:
        samples: Seconds per row; at least one.

    Returns:
        Their median, or the mean of the two fastest; `None` where they say nothing.

    Example:
        >>> settled([1.0, 1.1, 1.2]), settled([2.5, 1.0, 1.0, 2.6]), settled([1.0, 1.4, 2.5, 2.6])
        (1.1, 1.0, None)

    Source:
        A simulated rival that comes and goes: ``tests/laws/test_rival.py``.
    """
    if noise(samples) <= NOISE:
        return median(samples)
    fast = sorted(samples)[:2]
    return sum(fast) / 2 if len(samples) >= 2 * len(fast) and fast[1] <= (1 + AGREED) * fast[0] else None


def too_noisy(size: int, samples: Sequence[float]) -> str:
    """Say what is wrong with samples that nothing can be decided on.

    Args:
        size: The microbatch size that they were taken at.
        samples: Seconds per row; at least one.

    Returns:
        Words.
    """
    return (
        f"steps in microbatches of {size} differ by {noise(samples):.0%} of their median time (interquartile range), "
        "as when another job is running, so speeds were not compared"
    )


def search(measure: Callable[[int], Sequence[float]], sizes: Sequence[int]) -> Found:
    """Find the fastest microbatch size by timing at most five of them.

    Args:
        measure: Runs real microbatches of so many rows and returns samples of the time they take, in seconds per row.
        sizes: Sizes that fit, ascending; at most 12, as `sizes_for` gives.

    Returns:
        The size, and why. Where samples are too far apart, no speed is believed and a default is returned.

    Raises:
        ConfigError: There is no size to choose from.

    Cost:
        At most five calls of ``measure``.

    Example:
        >>> speed = {1: 0.78, 2: 0.88, 4: 1.0, 8: 0.84, 16: 0.71, 32: 0.56}
        >>> search(lambda size: [1 / speed[size]] * 3, list(speed)).microbatch_size
        4
    """
    if not sizes:
        raise ConfigError("there is no microbatch size to choose from")
    seconds: dict[int, float] = {}
    while (size := next_size(sizes, seconds)) is not None:
        samples = measure(size)
        if (taken := settled(samples)) is None:
            return undecided(sizes, seconds, why=too_noisy(size, samples))
        seconds[size] = taken
    return fastest(sizes, seconds)


def _fibonacci_above(number: int) -> int:
    """Return the smallest Fibonacci number above ``number``."""
    before, after = 1, 2
    while after <= number:
        before, after = after, before + after
    return after
