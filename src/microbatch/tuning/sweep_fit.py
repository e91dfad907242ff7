"""Read steps and samples to a target off curves, and fit the critical batch size to them."""

from __future__ import annotations

import math
import random
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from microbatch.gradients.noise_estimate import student

_FAR = 30.0
"""Times beyond the batch sizes that were tried, where the data says nothing any more."""

_LAWFUL = 0.2
"""Part of the samples by which they may miss the law."""

_DRAWS, _GRID = 200, 48


@dataclass(frozen=True, slots=True, kw_only=True)
class CriticalBatch:
    """Hold the fit of steps and samples to the target over the batch size.

    The law is ``(S / S_min - 1) (E / E_min - 1) = 1`` for ``S`` steps and ``E`` samples. With ``E = B S`` it says
    ``E = E_min (1 + B / B_crit)`` and ``S = S_min (1 + B_crit / B)``, where ``B_crit = E_min / S_min``.

    Attributes:
        batch_size: The critical batch size ``B_crit``, in samples.
        low: Lower end of its 95 % interval; `None` where the data sets none.
        high: Upper end of its 95 % interval; `None` where the data sets none.
        steps: ``S_min``: steps to the target with an endless batch.
        samples: ``E_min``: samples to the target with the smallest batch.
        misfit: How far the measured samples lie from the law, as a part of themselves (root mean square).
        scatter: Standard deviation of a run's logarithm of samples, without what the runs of a seed have in common;
            `None` with one seed.
        seeds: Fewest seeds of a batch size. With one seed no interval can be given.
        sizes: Batch sizes that the fit rests on; with two of them the law cannot be checked.
        inside: Whether the critical batch size lies within a factor of 30 of the sizes that were tried; if not, the
            data does not tell it.
    """

    batch_size: float
    low: float | None
    high: float | None
    steps: float
    samples: float
    misfit: float
    scatter: float | None
    seeds: int
    sizes: int
    inside: bool

    @property
    def found(self) -> bool:
        """Whether the law holds, and both ends of the interval are known and less than a factor of 16 apart."""
        return self.lawful and self.low is not None and self.high is not None and self.high <= 16 * self.low

    @property
    def lawful(self) -> bool:
        """Whether the measured samples lie within 20 % of the law."""
        return self.misfit <= _LAWFUL

    def expected_samples(self, batch_size: float) -> float:
        """Compute the samples to the target by the law.

        Args:
            batch_size: Effective batch, in samples.

        Returns:
            The expected samples.
        """
        return self.samples * (1 + batch_size / self.batch_size)


def harmless_size(critical: float, smallest: float, *, more: float = 0.1) -> float:
    """Compute the batch size up to which hardly any sample is lost.

    Args:
        critical: The critical batch size, in samples.
        smallest: The batch size to compare with.
        more: The part by which the samples may grow.

    Returns:
        The batch size, in samples: ``(1 + more) (critical + smallest) - critical``.

    Example:
        >>> round(harmless_size(1000.0, 64.0))
        170
    """
    return (1 + more) * (critical + smallest) - critical


def crossing(losses: Sequence[float], at: Sequence[float], target: float) -> float | None:
    """Find where a curve first reaches a target, on a straight line between its points over the logarithm of the place.

    Args:
        losses: The loss at each point.
        at: Where each point lies, in steps or samples; above 0 and rising.
        target: The loss to reach.

    Returns:
        The place; `None` if the curve never comes down to the target.

    Example:
        >>> crossing([4.0, 2.0, 1.0], [10, 40, 80], 3.0)
        20.0
    """
    for index, (loss, place) in enumerate(zip(losses, at, strict=True)):
        if not loss <= target:
            continue
        if index == 0 or not math.isfinite(losses[index - 1]):
            return float(place)
        before, start = losses[index - 1], at[index - 1]
        return start * (place / start) ** ((before - target) / (before - loss))
    return None


def fit_critical(
    found: Mapping[int, Sequence[tuple[float, float]]],
) -> CriticalBatch | None:
    """Fit the law to what each batch size took to the target.

    Least squares on the logarithm of the samples. Steps carry no second equation, because ``E = B S``. The interval is
    a bootstrap over the seeds of each batch size, without what the runs of a seed have in common. It is widened
    for few seeds, by the degrees of freedom and by Student's t, and where the law itself is off.

    Args:
        found: Steps and samples to the target of every seed, in the same order of seeds, by batch size.

    Returns:
        The fit; `None` with fewer than two batch sizes.

    Source:
        McCandlish et al. 2018 (arXiv:1812.06162), equations 2.11 and 5.1.
    """
    sizes = sorted(size for size, seeds in found.items() if seeds)
    if len(sizes) < 2:
        return None
    # The last batch of an epoch is short, so the batch that really was taken is samples over steps.
    rows = [statistics.fmean(samples / steps for steps, samples in found[size]) for size in sizes]
    logs = [[math.log(samples) for _, samples in found[size]] for size in sizes]
    place, level, misfit = _least_squares(rows, [statistics.fmean(each) for each in logs])
    seeds = min(len(each) for each in logs)
    low = high = scatter = None
    if seeds > 1:
        left, freedom = _own_noise(logs)
        # What is left has lost some of its spread to the means that were taken off.
        lost = math.sqrt(sum(map(len, logs)) / freedom)
        scatter = lost * math.sqrt(statistics.fmean(each**2 for those in left for each in those))
        # Where the law itself is off by more than the seeds scatter, the interval is as much wider (Birge's ratio).
        law = misfit * math.sqrt(len(sizes) / max(1, len(sizes) - 2))
        off = max(1.0, law * math.sqrt(seeds) / scatter) if scatter and len(sizes) > 2 else 1.0
        width = student(freedom) * lost * off * _bootstrap(rows, logs, left)
        low, high = (math.exp(max(-700.0, min(700.0, place + side * width))) for side in (-1, 1))
        low = low if low > rows[0] / _FAR else None
        high = high if high < rows[-1] * _FAR else None
    critical = math.exp(place)
    return CriticalBatch(
        batch_size=critical,
        low=low,
        high=high,
        steps=math.exp(level),
        samples=math.exp(level) * critical,
        misfit=misfit,
        scatter=scatter,
        seeds=seeds,
        sizes=len(sizes),
        inside=rows[0] / _FAR < critical < rows[-1] * _FAR,
    )


def _least_squares(rows: Sequence[float], logs: Sequence[float]) -> tuple[float, float, float]:
    """Fit ``log E = log S_min + log(B + B_crit)``; return ``log B_crit``, ``log S_min`` and the misfit."""
    start, end = math.log(rows[0] / _FAR**2), math.log(rows[-1] * _FAR**2)
    places = [start + (end - start) * index / _GRID for index in range(_GRID + 1)]
    best = min(range(_GRID + 1), key=lambda index: _left(rows, logs, places[index])[1])
    low, high = places[max(0, best - 1)], places[min(_GRID, best + 1)]
    share = (math.sqrt(5) - 1) / 2
    for _ in range(30):  # golden section
        one, two = high - share * (high - low), low + share * (high - low)
        if _left(rows, logs, one)[1] <= _left(rows, logs, two)[1]:
            high = two
        else:
            low = one
    place = (low + high) / 2
    return place, *_left(rows, logs, place)


def _left(rows: Sequence[float], logs: Sequence[float], place: float) -> tuple[float, float]:
    """Return the level at a critical batch size, and the root mean square of what is left over."""
    critical = math.exp(place)
    left = [log - math.log(row + critical) for row, log in zip(rows, logs, strict=True)]
    level = sum(left) / len(left)
    return level, math.sqrt(sum((each - level) ** 2 for each in left) / len(left))


def _own_noise(logs: Sequence[Sequence[float]]) -> tuple[list[list[float]], int]:
    """Return what is left of each run without the means of its batch size and of its seed, and its degrees of freedom.

    The runs of one seed have the order of the data in common, and often the first weights. What they have in common
    moves all batch sizes alike, and the critical batch size not at all.
    """
    own = [statistics.fmean(each) for each in logs]
    left = [[value - mean for value in each] for each, mean in zip(logs, own, strict=True)]
    if len({len(each) for each in logs}) > 1:
        return left, sum(len(each) - 1 for each in logs)
    common = [statistics.fmean(values) for values in zip(*left, strict=True)]
    paired = [[value - shift for value, shift in zip(each, common, strict=True)] for each in left]
    return paired, (len(logs) - 1) * (len(common) - 1)


def _bootstrap(rows: Sequence[float], logs: Sequence[Sequence[float]], left: Sequence[Sequence[float]]) -> float:
    """Return the standard deviation of the logarithm of the critical batch size over draws of the seeds."""
    draw, own = random.Random(0), [sum(each) / len(each) for each in logs]  # noqa: S311 - no secret
    places: list[float] = []
    for _ in range(_DRAWS):
        drawn = [sum(draw.choices(each, k=len(each))) / len(each) for each in left]
        places.append(_least_squares(rows, [mean + shift for mean, shift in zip(own, drawn, strict=True)])[0])
    return statistics.pstdev(places)
