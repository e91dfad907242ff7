"""Compute each channel's mean and sum of squares, merge them over microbatches, and update running statistics."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TypeAlias

import torch
from torch import Tensor

from microbatch.loss.loss import wide_dtype

_LONG_CHANNEL = 64  # elements of one row and channel from which sums are faster than the kernel
Moments: TypeAlias = tuple[float, Tensor, Tensor]
"""Number of elements of each channel, their mean, and their sum of squares around the mean."""


@dataclass(frozen=True, slots=True)
class KernelStats:
    """The statistics that a batch norm kernel takes, in the dtype that it takes them in.

    Attributes:
        mean: Mean of each channel; shape ``(channels,)``.
        variance: Biased variance of each channel; shape ``(channels,)``.
        inverse: ``1 / sqrt(variance + eps)``; shape ``(channels,)``.
        eps: The number that is added to the variance.
    """

    mean: Tensor
    variance: Tensor
    inverse: Tensor
    eps: float


class BatchStats:
    """Statistics in the widest dtype, converted once for all microbatches that need the same dtype."""

    def __init__(self, mean: Tensor, variance: Tensor) -> None:
        self._mean, self._variance = mean.detach(), variance.detach()
        self._converted: dict[tuple[torch.dtype, float], KernelStats] = {}

    def to(self, dtype: torch.dtype, eps: float) -> KernelStats:
        """Convert the statistics to the dtype of a kernel.

        Args:
            dtype: Dtype of the result.
            eps: The number that is added to the variance.

        Returns:
            The converted statistics; the same object for the same arguments.
        """
        key = dtype, eps
        if key not in self._converted:
            inverse = (self._variance + eps).rsqrt()
            self._converted[key] = KernelStats(self._mean.to(dtype), self._variance.to(dtype), inverse.to(dtype), eps)
        return self._converted[key]


def moments_of(x: Tensor) -> tuple[Tensor, Tensor]:
    """Compute mean and sum of squares of each channel of one microbatch.

    Args:
        x: Shape ``(rows, channels, ...)``; at least one element.

    Returns:
        The mean, and the sum of squares around it; each of shape ``(channels,)``, in the dtype of ``x``, at least
        float32.

    Cost:
        Three reads of ``x``. On the CPU, for contiguous channels, also temporary memory of the size of ``x``, which is
        no more than what the normalisation allocates afterwards.
    """
    dtype = torch.promote_types(x.dtype, torch.float32)
    if x.device.type == "cpu" and x.dim() > 2 and x.is_contiguous() and x[0, 0].numel() >= _LONG_CHANNEL:
        return _moments_by_sums(x, dtype)
    # The dtype of these buffers sets the dtype of the results; the running statistics written to them are not used.
    mean, variance = x.new_zeros(x.shape[1], dtype=dtype), x.new_zeros(x.shape[1], dtype=dtype)
    mean, variance = torch.batch_norm_update_stats(x, mean, variance, 1.0)
    return mean, variance.mul_(x.numel() // x.shape[1])


def _moments_by_sums(x: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Compute the moments by vectorised sums, where torch's own CPU kernel adds one number at a time."""
    dimensions = [0, *range(2, x.dim())]
    rough_mean = x.mean(dimensions, dtype=dtype)
    centred = x.to(dtype) - rough_mean.view(-1, *[1] * (x.dim() - 2))
    # The correction removes the rounding error of the mean, as a sum in a wider dtype would.
    correction = centred.mean(dimensions)
    return rough_mean + correction, centred.square_().sum(dimensions).sub_(
        correction.square(), alpha=x.numel() // x.shape[1]
    )


def merged(parts: Sequence[Moments]) -> Moments:
    """Merge the moments of parts into the moments of the whole, by Chan's formula.

    Args:
        parts: Count, mean, and sum of squares around the mean of each part; shapes ``(channels,)``. Parts with a count
            of 0 contribute nothing.

    Returns:
        Count, mean and sum of squares of the whole, in float64 (float32 on MPS).

    Example:
        >>> one, other = torch.tensor([1.0, 3.0]), torch.tensor([8.0])
        >>> count, mean, squares = merged(
        ...     [(len(x), x.mean()[None], (x - x.mean()).square().sum()[None]) for x in (one, other)]
        ... )
        >>> count, mean.item(), squares.item()  # 1, 3, 8: mean 4, squares 9 + 1 + 16
        (3, 4.0, 26.0)
    """
    parts = [part for part in parts if part[0]] or list(parts[:1])
    widest = wide_dtype(parts[0][1].device)
    if len(parts) == 1:
        total, mean, squares = parts[0]
        return total, mean.to(widest), squares.to(widest)
    total = sum(count for count, _, _ in parts)
    means, squares = (torch.stack(each).to(widest) for each in zip(*(part[1:] for part in parts), strict=True))
    counts = torch.tensor([count for count, _, _ in parts], dtype=means.dtype, device=means.device).unsqueeze(1)
    mean = (counts / total * means).sum(0)
    return total, mean, squares.sum(0) + (counts * (means - mean).square()).sum(0)


@dataclass(frozen=True, slots=True)
class RunningStats:
    """The running statistics of one layer.

    Attributes:
        mean: The layer's ``running_mean``; shape ``(channels,)``.
        variance: The layer's ``running_var``, unbiased; shape ``(channels,)``, or `None`.
        momentum: Weight of a new batch.
    """

    mean: Tensor
    variance: Tensor | None
    momentum: float

    @torch.no_grad()
    def update(self, mean: Tensor, variance: Tensor) -> None:
        """Update the running statistics, in place, with a batch's mean and unbiased variance."""
        for running, of_batch in ((self.mean, mean), (self.variance, variance)):
            if running is not None:
                running.mul_(1 - self.momentum).add_(of_batch.to(running.dtype), alpha=self.momentum)
