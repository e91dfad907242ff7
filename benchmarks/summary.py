"""Numbers from repeated measurements: quartiles, paired ratios, and whether they can be trusted."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from dataclasses import dataclass

# Interquartile range over the median, or the cores' share that other jobs took: above this, something else was running,
# and 3 % cannot be told from nothing.
NOISY = 0.05


@dataclass(frozen=True, slots=True)
class Summary:
    """The middle and the spread of some measurements.

    Attributes:
        median: Half of them are above.
        lower: First quartile.
        upper: Third quartile.
        repeats: How many there were.
    """

    median: float
    lower: float
    upper: float
    repeats: int

    @property
    def spread(self) -> float:
        """The interquartile range over the median."""
        return (self.upper - self.lower) / self.median

    @property
    def noisy(self) -> bool:
        """Whether the spread says that another job was running."""
        return self.spread > NOISY


def summarize(measurements: Sequence[float]) -> Summary:
    """Return the quartiles of measurements, interpolated between the nearest two.

    Args:
        measurements: Positive numbers; at least 1.

    Returns:
        Their summary; of a single measurement, without spread.

    Example:
        >>> summarize([4.0, 1.0, 3.0, 2.0, 5.0])
        Summary(median=3.0, lower=2.0, upper=4.0, repeats=5)
    """
    if len(measurements) == 1:
        return Summary(measurements[0], measurements[0], measurements[0], 1)
    lower, median, upper = statistics.quantiles(measurements, n=4, method="inclusive")
    return Summary(median, lower, upper, len(measurements))


def summarize_ratio(measurements: Sequence[float], reference: Sequence[float]) -> Summary:
    """Return the quartiles of measurements over those of the same round.

    A machine that is slower for a minute is slower for both, so what is left in the ratio of a round is the difference
    between the two, where the ratio of two medians would hold some of the minute as well.

    Args:
        measurements: One for each round.
        reference: One for each round, in the same order.

    Returns:
        The summary of the ratios.

    Example:
        >>> summarize_ratio([2.0, 4.0, 6.0], [1.0, 2.0, 2.0]).median
        2.0
    """
    return summarize([mine / theirs for mine, theirs in zip(measurements, reference, strict=True)])


def order_of_round(contenders: Sequence[str], index: int) -> list[str]:
    """Return who goes when in a round: everyone once, in every place equally often, and after different neighbours.

    Args:
        contenders: Names.
        index: The round, from 0.

    Returns:
        The same names; each round begins one name further on, and every other pass of rounds runs backwards.

    Example:
        >>> [order_of_round("abc", index) for index in (0, 1, 3)]
        [['a', 'b', 'c'], ['b', 'c', 'a'], ['c', 'b', 'a']]
    """
    names = list(contenders)
    passes, start = divmod(index, len(names))
    if passes % 2:
        names.reverse()
    return names[start:] + names[:start]
