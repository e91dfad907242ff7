"""Count, mean and sum of squares of each channel: of one microbatch, merged, and the running statistics they move."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TypeAlias

import torch
from torch import Tensor

Moments: TypeAlias = tuple[float, Tensor, Tensor]
"""Elements of each channel, their mean, and the sum of squares around it."""


def moments_of(x: Tensor) -> tuple[Tensor, Tensor]:
    """Measure each channel of one microbatch.

    Args:
        x: Shape ``(rows, channels, ...)``; at least one element.

    Returns:
        Mean and variance, the squares divided by their number; shapes ``(channels,)``, at least float32.
    """
    dtype = torch.promote_types(x.dtype, torch.float32)
    # Buffers of the dtype that the results are to have; what is written to them is not needed.
    mean, variance = x.new_zeros(x.shape[1], dtype=dtype), x.new_zeros(x.shape[1], dtype=dtype)
    return torch.batch_norm_update_stats(x, mean, variance, 1.0)


def merged(parts: Sequence[Moments]) -> Moments:
    """Merge the moments of parts into those of the whole, by Chan's formula.

    Args:
        parts: Of each the count, the mean and the sum of squares around it; shapes ``(channels,)``. Empty ones add
            nothing.

    Returns:
        The same of all.

    Example:
        >>> one, other = torch.tensor([1.0, 3.0]), torch.tensor([8.0])
        >>> count, mean, squares = merged(
        ...     [(len(x), x.mean()[None], (x - x.mean()).square().sum()[None]) for x in (one, other)]
        ... )
        >>> count, mean.item(), squares.item()  # 1, 3, 8: mean 4, squares 9 + 1 + 16
        (3, 4.0, 26.0)
    """
    parts = [part for part in parts if part[0]] or list(parts[:1])
    if len(parts) == 1:
        return parts[0]
    total = sum(count for count, _, _ in parts)
    means, squares = torch.stack([mean for _, mean, _ in parts]), torch.stack([each for _, _, each in parts])
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
