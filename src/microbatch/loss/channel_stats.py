"""Count, mean and sum of squares of each channel: of one microbatch, merged, and the running statistics they move."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TypeAlias

import torch
from torch import Tensor

from microbatch.loss.loss import wide_dtype

_LONG = 64  # elements of a channel that lie side by side
Moments: TypeAlias = tuple[float, Tensor, Tensor]
"""Elements of each channel, their mean, and the sum of squares around it."""


@dataclass(frozen=True, slots=True)
class Narrow:
    """What a kernel that normalises takes of statistics.

    Attributes:
        mean: Of each channel.
        variance: Likewise.
        inverse: One over the root of variance and ``eps``.
        eps: Added to the variance.
    """

    mean: Tensor
    variance: Tensor
    inverse: Tensor
    eps: float


class Narrowed:
    """What a kernel takes of statistics that are kept in the widest dtype, made once for all that need it.

    Args:
        mean: Of each channel.
        variance: Likewise.
    """

    def __init__(self, mean: Tensor, variance: Tensor) -> None:
        self._mean, self._variance = mean.detach(), variance.detach()
        self._made: dict[tuple[torch.dtype, float], Narrow] = {}

    def to(self, dtype: torch.dtype, eps: float) -> Narrow:
        """Convert them.

        Args:
            dtype: To which.
            eps: Added to the variance.

        Returns:
            What is the same for all that ask for the same.
        """
        key = dtype, eps
        if key not in self._made:
            inverse = (self._variance + eps).rsqrt()
            self._made[key] = Narrow(self._mean.to(dtype), self._variance.to(dtype), inverse.to(dtype), eps)
        return self._made[key]


def moments_of(x: Tensor) -> tuple[Tensor, Tensor]:
    """Measure each channel of one microbatch.

    Args:
        x: Shape ``(rows, channels, ...)``; at least one element.

    Returns:
        Mean, and sum of squares around it; shapes ``(channels,)``, at least float32.

    Cost:
        Three reads of ``x``; on the CPU, where channels lie one after the other, memory of its size, for a time. That
        is what normalising it takes afterwards.
    """
    dtype = torch.promote_types(x.dtype, torch.float32)
    if x.device.type == "cpu" and x.dim() > 2 and x.is_contiguous() and x[0, 0].numel() >= _LONG:
        return _in_passes(x, dtype)
    # Buffers of the dtype that the results are to have; what is written to them is not needed.
    mean, variance = x.new_zeros(x.shape[1], dtype=dtype), x.new_zeros(x.shape[1], dtype=dtype)
    mean, variance = torch.batch_norm_update_stats(x, mean, variance, 1.0)
    return mean, variance.mul_(x.numel() // x.shape[1])


def _in_passes(x: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Measure by sums, which have vectors, where the kernel for it goes through each channel one number at a time."""
    over = [0, *range(2, x.dim())]
    guess = x.mean(over, dtype=dtype)
    away = x.to(dtype) - guess.view(-1, *[1] * (x.dim() - 2))
    # What rounding left of the mean, so that it is as good as one that was added up in more digits.
    rest = away.mean(over)
    return guess + rest, away.square_().sum(over).sub_(rest.square(), alpha=x.numel() // x.shape[1])


def merged(parts: Sequence[Moments]) -> Moments:
    """Merge the moments of parts into those of the whole, by Chan's formula.

    Args:
        parts: Of each the count, the mean and the sum of squares around it; shapes ``(channels,)``. Empty ones add
            nothing.

    Returns:
        The same of all, in the widest dtype.

    Example:
        >>> one, other = torch.tensor([1.0, 3.0]), torch.tensor([8.0])
        >>> count, mean, squares = merged(
        ...     [(len(x), x.mean()[None], (x - x.mean()).square().sum()[None]) for x in (one, other)]
        ... )
        >>> count, mean.item(), squares.item()  # 1, 3, 8: mean 4, squares 9 + 1 + 16
        (3, 4.0, 26.0)
    """
    parts = [part for part in parts if part[0]] or list(parts[:1])
    wide = wide_dtype(parts[0][1].device)
    if len(parts) == 1:
        total, mean, squares = parts[0]
        return total, mean.to(wide), squares.to(wide)
    total = sum(count for count, _, _ in parts)
    means, squares = (torch.stack(each).to(wide) for each in zip(*(part[1:] for part in parts), strict=True))
    counts = torch.tensor([count for count, _, _ in parts], dtype=means.dtype, device=means.device).unsqueeze(1)
    mean = (counts / total * means).sum(0)
    return total, mean, squares.sum(0) + (counts * (means - mean).square()).sum(0)


@dataclass(frozen=True, slots=True)
class Running:
    """A layer's running statistics.

    Attributes:
        mean: Of each channel.
        variance: Likewise, unbiased.
        momentum: What a new batch weighs.
    """

    mean: Tensor
    variance: Tensor | None
    momentum: float

    @torch.no_grad()
    def move(self, mean: Tensor, variance: Tensor) -> None:
        """Move them towards a batch's.

        Args:
            mean: The batch's.
            variance: The batch's, unbiased.
        """
        for total, new in ((self.mean, mean), (self.variance, variance)):
            if total is not None:
                total.mul_(1 - self.momentum).add_(new.to(total.dtype), alpha=self.momentum)
