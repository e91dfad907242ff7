"""The gradient noise scale from the norms of microbatch gradients: the estimator and its confidence interval.

The noise scale is a number of samples. With a much smaller batch, a step is mostly noise. With a much larger batch,
the extra samples hardly change the step.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

from microbatch.arguments import whole
from microbatch.errors import ConfigError

_FEWEST = 4
"""Windows that an interval needs."""


@dataclass(frozen=True, slots=True)
class NoiseScale:
    """Choose how often the gradient noise scale is measured, and over how many windows it is averaged.

    ``Accumulator(noise_scale=mb.NoiseScale())`` measures how much the gradients of a window's microbatches differ. The
    result is ``step.noise_scale``, in samples, with a 95 % confidence interval in ``step.noise_interval``. It holds for
    rows in random order; rows grouped by length (``lengths=``) make it a little too large.

    Attributes:
        every: One window in this many is measured, first window ``every // 2``; at least 1.
        by_group: Whether ``step.noise_scale_by_group`` has the noise scale of each parameter group of the optimizers.
        microbatches: How many microbatches of a measured window are read, at most, on each rank; at least 2.
        windows: How many measured windows the estimate averages, the latest ones; at least 2.

    Raises:
        ConfigError: A value cannot work.

    Cost:
        In a measured window, the gradients of up to ``microbatches`` microbatches are read once more for their norms.
        There, weight gradients are not added inside the matrix product. The window ends with one more read of its
        gradient and one more host synchronisation; with several ranks, also with one more small all-reduce. Memory: one
        number for each parameter and microbatch that is read; where weights would be fused, also the gradient of one
        weight. Other microbatches and other windows cost nothing.

    Example:
        >>> [index for index in range(40) if NoiseScale(every=10).due(index)]
        [5, 15, 25, 35]

    Source:
        McCandlish et al. 2018 (arXiv:1812.06162), appendix A; ``docs/noise-scale.md``.
    """

    every: int = 10
    by_group: bool = field(default=False, kw_only=True)
    microbatches: int = field(default=4, kw_only=True)
    windows: int = field(default=32, kw_only=True)

    def __post_init__(self) -> None:
        """Check every value."""
        given = [("every", self.every, 1), ("microbatches", self.microbatches, 2), ("windows", self.windows, 2)]
        for name, value, least in given:
            number = whole(value, least=least)
            if number is None:
                raise ConfigError(f"NoiseScale: {name} must be a whole number of at least {least}, not {value!r}")
            object.__setattr__(self, name, number)  # as an int
        if not isinstance(self.by_group, bool):
            raise ConfigError(f"NoiseScale: by_group must be True or False, not {self.by_group!r}")

    def due(self, index: int) -> bool:
        """Return whether a window is measured.

        Args:
            index: Index of the window, from 0.

        Returns:
            True for one window in ``every``.
        """
        return index % self.every == self.every // 2

    def reads(self, index: int, *, microbatches: int | None, window: int) -> bool:
        """Return whether a microbatch of a measured window is read.

        The microbatches that are read lie evenly in the window, and other ones in the next measured window. So the
        choice does not depend on the data, and rows that are sorted within a window are met equally often.

        Args:
            index: Index of the microbatch on this rank, from 0.
            microbatches: Microbatches of this rank; `None` if they are not known, which reads the first ones.
            window: Index of the window.

        Returns:
            True for at most ``self.microbatches`` of them.

        Example:
            >>> noise = NoiseScale(every=10, microbatches=3)
            >>> [k for k in range(9) if noise.reads(k, microbatches=9, window=5)]
            [0, 3, 6]
            >>> [k for k in range(9) if noise.reads(k, microbatches=9, window=15)]
            [2, 5, 8]
        """
        if microbatches is None or microbatches <= self.microbatches:
            return index < self.microbatches
        return (index + window // self.every) * self.microbatches % microbatches < self.microbatches


class Measured(NamedTuple):
    """What one window, or several together, tells about the gradient.

    Attributes:
        noise: Trace of the covariance of one sample's gradient; times samples.
        signal: Squared norm of the true gradient.
    """

    noise: float
    signal: float


def measure(parts: float, whole: float, *, count: float, microbatches: float, read: float | None = None) -> Measured:
    """Estimate noise and signal from one window, both without bias.

    Microbatch ``i`` has ``n_i`` samples and the mean gradient ``g_i``; the window has ``N`` samples and the mean
    gradient ``g``. Of its microbatches, ``K`` are read, with ``n`` samples together. The expectation of
    ``n_i |g_i|^2`` is ``n_i |G|^2 + S``, and that of ``N |g|^2`` is ``N |G|^2 + S``. So
    ``S = (sum n_i |g_i|^2 - n |g|^2) / (K - n / N)`` over those that are read, and ``|G|^2 = |g|^2 - S / N``, whatever
    the ``n_i``.

    Args:
        parts: ``sum n_i |g_i|^2``, over the microbatches that are read.
        whole: ``|g|^2``.
        count: ``N``, above 0.
        microbatches: ``K``, at least 2.
        read: ``n``, above 0 and at most ``N``; `None` for ``N``: all microbatches are read.

    Returns:
        ``S`` and ``|G|^2``. Either may be negative by chance.

    Example:
        >>> measure(2 * 9.0 + 1 * 0.0, 4.0, count=3, microbatches=2)  # gradients 3, 3 and 0
        Measured(noise=6.0, signal=2.0)
        >>> measure(16.0 + 1.0, 4.0, count=4, microbatches=2, read=2)  # 4 and 1 are read, and 1 and 2 are not
        Measured(noise=6.0, signal=2.5)
    """
    read = count if read is None else read
    noise = (parts - read * whole) / (microbatches - read / count)
    return Measured(noise, whole - noise / count)


def scale_of(windows: Sequence[Measured]) -> float | None:
    """Return the noise scale ``S / |G|^2`` of several windows: both are averaged before the division.

    Args:
        windows: What each window told.

    Returns:
        The noise scale, at least 0, in the unit of ``S``; `None` without windows, and while the average of ``|G|^2`` is
        not above 0, because noise hides the gradient.

    Example:
        >>> scale_of([Measured(6.0, 2.0), Measured(2.0, -1.0)]), scale_of([Measured(2.0, -1.0)])
        (8.0, None)
    """
    signal = sum(each.signal for each in windows)
    return max(0.0, sum(each.noise for each in windows)) / signal if signal > 0 else None


def interval_of(windows: Sequence[Measured]) -> tuple[float, float] | None:
    """Return the 95 % confidence interval of the noise scale.

    It holds every ``B`` that the windows do not contradict: the mean of ``S - B |G|^2`` over the windows is within
    ``t`` standard errors of 0. The standard error comes from leaving out one window at a time (jackknife), which for a
    mean is the usual one. A quotient of two noisy means needs this form (Fieller 1954): its own spread says little
    where the divisor may be 0.

    Args:
        windows: What each window told.

    Returns:
        Lower and upper bound, at least 0; the upper bound is infinite if ``|G|^2`` may be 0. `None` for fewer than 4
        windows.

    Example:
        >>> low, high = interval_of([Measured(noise, 1.0) for noise in (3.0, 4.0, 4.0, 5.0)])
        >>> round(low, 2), round(high, 2)  # 4 +- 3.182 * 0.408
        (2.7, 5.3)
    """
    number = len(windows)
    if number < _FEWEST:
        return None
    noise, signal = (sum(each) / number for each in zip(*windows, strict=True))
    apart = [(each.noise - noise, each.signal - signal) for each in windows]
    squared = student(number - 1) ** 2 / (number * (number - 1))
    # (noise - B signal)^2 <= squared * sum (a - B b)^2 is a B^2 - 2 b B + c <= 0.
    a = signal**2 - squared * sum(b * b for _, b in apart)
    b = noise * signal - squared * sum(a * b for a, b in apart)
    c = noise**2 - squared * sum(a * a for a, _ in apart)
    root = math.sqrt(max(0.0, b * b - a * c))
    if a > 0 and signal > 0:
        return max(0.0, (b - root) / a), max(0.0, (b + root) / a)
    # The gradient may be 0: every scale above the lower bound is possible.
    lower = (b - root) / a if a < 0 and c > 0 else 0.0
    return max(0.0, lower), math.inf


def student(freedom: int) -> float:
    """Return the 97.5 % quantile of Student's t, by an expansion in one over the degrees of freedom.

    Args:
        freedom: Degrees of freedom, at least 1.

    Returns:
        The quantile; 3 % low at two degrees of freedom, and below 1 % from three on.

    Source:
        Abramowitz and Stegun, 26.7.5.
    """
    return 1.95996 + 2.37228 / freedom + 2.8225 / freedom**2 + 2.5556 / freedom**3 + 1.5895 / freedom**4
