"""The nodes of one microbatch in a normalisation by statistics that are not its own."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor

from microbatch.loss.channel_stats import Narrow, moments_of
from microbatch.loss.round_robin import Puts


class Visit:
    """What two nodes of one microbatch and layer tell each other: the input, and the gradient of the output."""

    def __init__(self, x: Tensor, puts: Puts) -> None:
        self._puts = puts
        self.dtype = torch.promote_types(x.dtype, torch.float32)
        self.needs_input = x.requires_grad and torch.is_grad_enabled()
        self.x: Callable[[], Tensor] | None = None
        self.dy: Callable[[], Tensor] | None = None
        self.scale: Tensor | None = None

    def keep_input(self, x: Tensor) -> None:
        """Put the input away, once.

        Args:
            x: The input.
        """
        if self.x is None:
            self.x = self._puts.away(x)

    def input_for_sums(self) -> Tensor:
        """Bring the input back, for the first of two times.

        Returns:
            The input.
        """
        assert self.x is not None  # noqa: S101 - as forward left it
        x = self.x()
        if self.needs_input and self._puts.spares(x):
            self.x = partial(_same, x)
        return x

    def keep_gradient(self, dy: Tensor, scale: Tensor) -> None:
        """Put the gradient of the output away, until that of the input can be made.

        Args:
            dy: The gradient of the output.
            scale: What the input was multiplied with, for each channel.
        """
        self.dy, self.scale = self._puts.aside(dy), scale


class Measure(torch.autograd.Function):
    """The mean of each channel of one microbatch, and the sum of squares around it."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, visit: Visit) -> tuple[Tensor, Tensor]:
        """Measure.

        Args:
            ctx: Autograd's.
            x: Shape ``(rows, channels, ...)``.
            visit: Where the input is kept.

        Returns:
            Mean and sum of squares, shapes ``(channels,)``; zeros of no rows.
        """
        if not x.numel():
            zeros = x.new_zeros(x.shape[1], dtype=visit.dtype)
            return zeros, zeros.clone()
        mean, squares = moments_of(x)
        if visit.needs_input:
            visit.keep_input(x)
        # Detached, because a node that holds its own output is never given up.
        ctx.visit, ctx.mean, ctx.count = visit, mean.detach(), x.numel() // x.shape[1]
        return mean, squares

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        """Return the gradient of the input, also the part that went around the statistics.

        Args:
            ctx: Autograd's.
            grads: Of the mean and of the sum of squares.

        Returns:
            For each argument of forward.
        """
        visit: Visit = ctx.visit
        d_mean, d_squares = grads
        assert visit.x is not None  # noqa: S101 - as forward left it
        x, visit.x = visit.x(), None
        # d_mean / n + 2 (x - mean) d_squares, as one pass of the kernel that normalises.
        slope, shift = 2 * d_squares, d_mean / ctx.count
        ones = torch.ones_like(slope)
        wide = x.to(visit.dtype)
        dx = torch.batch_norm(wide, slope, shift, ctx.mean, ones, False, 0.0, 0.0, False)
        if visit.dy is not None and visit.scale is not None:
            dy, visit.dy = visit.dy(), None
            dx.addcmul_(dy.to(visit.dtype), _over_channels(visit.scale, dx))
        return dx.to(x.dtype), None


class Normalise(torch.autograd.Function):
    """Normalise one microbatch by statistics of all, and give back what they are to be told.

    The gradient of the input is not given here: it waits in the visit until the statistics' own is known, and leaves
    as one with it.
    """

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        mean: Tensor,
        variance: Tensor,
        narrow: Narrow,
        weight: Tensor | None,
        bias: Tensor | None,
        visit: Visit,
    ) -> Tensor:
        """Normalise.

        Args:
            ctx: Autograd's.
            x: Shape ``(rows, channels, ...)``, detached.
            mean: Of all microbatches; shape ``(channels,)``, as of all that follow. It is here for its gradient.
            variance: Likewise.
            narrow: What the kernel takes of them.
            weight: Of the layer, or `None`.
            bias: Of the layer, or `None`.
            visit: Where the input is kept, and the gradient of the output will be.

        Returns:
            Shape and dtype of ``x``.
        """
        del mean, variance
        dtype = visit.dtype
        if any(ctx.needs_input_grad):
            visit.keep_input(x)
        ctx.visit, ctx.narrow = visit, narrow
        ctx.save_for_backward(weight)
        scale = None if weight is None else weight.to(dtype)
        shift = None if bias is None else bias.to(dtype)
        return torch.batch_norm(
            x, scale, shift, narrow.mean, narrow.variance, False, 0.0, narrow.eps, torch.backends.cudnn.enabled
        )

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        """Return the gradients of mean, variance, weight and bias, and put that of the output away.

        Args:
            ctx: Autograd's.
            grads: Of the output.

        Returns:
            For each argument of forward.
        """
        visit: Visit = ctx.visit
        (dy,) = grads
        (weight,) = ctx.saved_tensors
        x, inverse = visit.input_for_sums(), ctx.narrow.inverse
        slope, shift = _sums(dy, x, ctx.narrow.mean, inverse)
        scale = inverse if weight is None else inverse * weight.to(inverse.dtype)
        if visit.needs_input:
            visit.keep_gradient(dy, scale)
        needs = ctx.needs_input_grad
        return (
            None,
            (scale * shift).neg_() if needs[1] else None,
            (scale * slope).mul_(inverse).mul_(-0.5) if needs[2] else None,
            None,
            slope if needs[4] else None,
            shift if needs[5] else None,
            None,
        )


def _sums(dy: Tensor, x: Tensor, mean: Tensor, inverse: Tensor) -> tuple[Tensor, Tensor]:
    """Return, for each channel, the sums of ``dy (x - mean) inverse`` and of ``dy``, in one pass of torch's kernel."""
    _, slope, shift = torch.ops.aten.native_batch_norm_backward(
        dy, x, None, None, None, mean, inverse, True, 0.0, [False, True, True]
    )
    return slope, shift


def _same(x: Tensor) -> Tensor:
    return x


def _over_channels(vector: Tensor, like: Tensor) -> Tensor:
    return vector.view(-1, *[1] * (like.dim() - 2))
