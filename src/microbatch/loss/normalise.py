"""The nodes of one microbatch in a normalisation by statistics that are not its own."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from microbatch.loss.lockstep import Away
from microbatch.loss.loss import wide_dtype
from microbatch.loss.moments import moments_of


class Visit:
    """What two nodes of one microbatch and layer tell each other: the input, and the gradient of the output."""

    def __init__(self, x: Tensor, away: Away) -> None:
        self._away = away
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
            self.x = self._away(x)

    def keep_gradient(self, dy: Tensor, scale: Tensor) -> None:
        """Put the gradient of the output away, until that of the input can be made.

        Args:
            dy: The gradient of the output.
            scale: What the input was multiplied with, for each channel.
        """
        self.dy, self.scale = self._away(dy), scale


class Measure(torch.autograd.Function):
    """The mean of each channel of one microbatch, and the sum of squares around it."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, visit: Visit) -> tuple[Tensor, Tensor]:
        """Measure, in the widest dtype.

        Args:
            ctx: Autograd's.
            x: Shape ``(rows, channels, ...)``.
            visit: Where the input is kept.

        Returns:
            Mean and sum of squares, shapes ``(channels,)``; zeros of no rows.
        """
        wide = wide_dtype(x.device)
        if not x.numel():
            zeros = x.new_zeros(x.shape[1], dtype=wide)
            return zeros, zeros.clone()
        mean, variance = moments_of(x)
        if visit.needs_input:
            visit.keep_input(x)
        ctx.visit, ctx.mean, ctx.count = visit, mean, x.numel() // x.shape[1]
        # A copy, because a node that holds its own output is never given up.
        return mean.to(wide, copy=True), variance.to(wide) * ctx.count

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
        slope, shift = (2 * d_squares).to(visit.dtype), (d_mean / ctx.count).to(visit.dtype)
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
        weight: Tensor | None,
        bias: Tensor | None,
        eps: float,
        visit: Visit,
    ) -> Tensor:
        """Normalise.

        Args:
            ctx: Autograd's.
            x: Shape ``(rows, channels, ...)``, detached.
            mean: Of all microbatches; shape ``(channels,)``, as all that follow but the last two.
            variance: Likewise.
            weight: Of the layer, or `None`.
            bias: Of the layer, or `None`.
            eps: Added to the variance.
            visit: Where the input is kept, and the gradient of the output will be.

        Returns:
            Shape and dtype of ``x``.
        """
        dtype = visit.dtype
        mean, inverse = mean.detach().to(dtype), (variance + eps).rsqrt().to(dtype)
        if any(ctx.needs_input_grad):
            visit.keep_input(x)
        ctx.visit, ctx.mean, ctx.inverse = visit, mean, inverse
        ctx.save_for_backward(weight)
        scale = None if weight is None else weight.to(dtype)
        shift = None if bias is None else bias.to(dtype)
        return torch.batch_norm(
            x, scale, shift, mean, variance.to(dtype), False, 0.0, eps, torch.backends.cudnn.enabled
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
        assert visit.x is not None  # noqa: S101 - as forward left it
        x, inverse = visit.x(), ctx.inverse
        slope, shift = _sums(dy, x, ctx.mean, inverse)
        scale = inverse if weight is None else inverse * weight.to(inverse.dtype)
        if visit.needs_input:
            visit.keep_gradient(dy, scale)
        wide = wide_dtype(dy.device)
        d_mean = -(scale.to(wide) * shift.to(wide))
        d_variance = -0.5 * (scale * inverse).to(wide) * slope.to(wide)
        needs = ctx.needs_input_grad
        return (
            None,
            d_mean if needs[1] else None,
            d_variance if needs[2] else None,
            slope if needs[3] else None,
            shift if needs[4] else None,
            None,
            None,
        )


def _sums(dy: Tensor, x: Tensor, mean: Tensor, inverse: Tensor) -> tuple[Tensor, Tensor]:
    """Return, for each channel, the sums of ``dy (x - mean) inverse`` and of ``dy``, in one pass of torch's kernel."""
    _, slope, shift = torch.ops.aten.native_batch_norm_backward(
        dy, x, None, None, None, mean, inverse, True, 0.0, [False, True, True]
    )
    return slope, shift


def _over_channels(vector: Tensor, like: Tensor) -> Tensor:
    return vector.view(-1, *[1] * (like.dim() - 2))
