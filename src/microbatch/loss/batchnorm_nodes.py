"""Define the autograd functions that normalise one microbatch by the statistics of all microbatches."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from microbatch.loss.channel_stats import KernelStats, moments_of
from microbatch.loss.one_row_norm import needs_contiguous
from microbatch.loss.round_robin import Puts


class LayerCall:
    """Hold the tensors that the two autograd functions of one microbatch and layer share.

    These are the layer's input, and the gradient of its output. Both are offloaded while they wait for backward.

    Args:
        x: The layer's input.
        puts: Functions that offload tensors.

    Attributes:
        dtype: Dtype of the statistics: the input's dtype, at least float32.
        needs_input: Whether the input needs a gradient.
        x: Loads the input; `None` before it is offloaded.
        dy: Loads the gradient of the output; `None` before it is offloaded.
        scale: Derivative of the output by the input at fixed statistics, for each channel; `None` before backward.
    """

    def __init__(self, x: Tensor, puts: Puts) -> None:
        self._puts = puts
        self.dtype = torch.promote_types(x.dtype, torch.float32)
        self.needs_input = x.requires_grad and torch.is_grad_enabled()
        self.x: Callable[[], Tensor] | None = None
        self.dy: Callable[[], Tensor] | None = None
        self.scale: Tensor | None = None

    def offload_input(self, x: Tensor) -> None:
        """Offload the input, unless it is offloaded already."""
        if self.x is None:
            self.x = self._puts.away(x)

    def load_input_for_sums(self) -> Tensor:
        """Load the input for the first of its two uses in backward."""
        assert self.x is not None  # noqa: S101 - as forward left it
        x = self.x()
        if self.needs_input and self._puts.spares(x):
            self.x = lambda: x
        return x

    def offload_output_gradient(self, dy: Tensor, scale: Tensor) -> None:
        """Offload the output's gradient until backward computes the input's gradient.

        Args:
            dy: Gradient of the output.
            scale: Derivative of the output by the input at fixed statistics; shape ``(channels,)``.
        """
        self.dy, self.scale = self._puts.aside(dy), scale


class MeasureMoments(torch.autograd.Function):
    """Compute each channel's mean over one microbatch, and its sum of squares around this mean."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, layer_call: LayerCall) -> tuple[Tensor, Tensor]:
        """Compute the moments, and offload the input.

        Args:
            ctx: Autograd's context.
            x: Shape ``(rows, channels, ...)``.
            layer_call: Keeps the offloaded input.

        Returns:
            Mean and sum of squares, each of shape ``(channels,)`` and dtype ``layer_call.dtype``; zeros for 0 rows.
        """
        if not x.numel():
            zeros = x.new_zeros(x.shape[1], dtype=layer_call.dtype)
            return zeros, zeros.clone()
        mean, squares = moments_of(x)
        if layer_call.needs_input:
            layer_call.offload_input(x)
        # The mean is detached, because a node that holds its own output is a reference cycle and is never freed.
        ctx.layer_call, ctx.mean, ctx.count = layer_call, mean.detach(), x.numel() // x.shape[1]
        return mean, squares

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        """Return the complete gradient of the input: through the statistics, and at fixed statistics."""
        layer_call: LayerCall = ctx.layer_call
        d_mean, d_squares = grads
        assert layer_call.x is not None  # noqa: S101 - as forward left it
        x, layer_call.x = layer_call.x(), None
        # The batch norm kernel computes d_mean / n + 2 (x - mean) d_squares in one pass.
        slope, shift = 2 * d_squares, d_mean / ctx.count
        ones = torch.ones_like(slope)
        wide = x.to(layer_call.dtype)
        dx = torch.batch_norm(wide, slope, shift, ctx.mean, ones, False, 0.0, 0.0, False)
        if layer_call.dy is not None and layer_call.scale is not None:
            dy, layer_call.dy = layer_call.dy(), None
            dx.addcmul_(dy.to(layer_call.dtype), layer_call.scale.view(-1, *[1] * (dx.dim() - 2)))
        return dx.to(x.dtype), None


class Normalize(torch.autograd.Function):
    """Normalise one microbatch by the statistics of all microbatches, and return the statistics' gradients in backward.

    This function returns no gradient for its input. The gradient of the output waits in `LayerCall` until the gradients
    of the statistics are known. `MeasureMoments` then computes the complete gradient of the input.
    """

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        mean: Tensor,
        variance: Tensor,
        kernel_stats: KernelStats,
        weight: Tensor | None,
        bias: Tensor | None,
        layer_call: LayerCall,
    ) -> Tensor:
        """Normalise the input.

        Args:
            ctx: Autograd's context.
            x: Shape ``(rows, channels, ...)``, detached.
            mean: Mean over all microbatches; shape ``(channels,)``. Its values are not read: it is an argument so that
                it gets a gradient.
            variance: Biased variance over all microbatches; as ``mean``.
            kernel_stats: The same statistics in the kernel's dtype, from which the output is computed.
            weight: Weight of the layer, shape ``(channels,)``, or `None`.
            bias: Bias of the layer, shape ``(channels,)``, or `None`.
            layer_call: Keeps the offloaded input, and later the output's gradient.

        Returns:
            The normalised input; shape and dtype of ``x``.
        """
        del mean, variance
        dtype = layer_call.dtype
        if any(ctx.needs_input_grad):
            layer_call.offload_input(x)
        ctx.layer_call, ctx.kernel_stats = layer_call, kernel_stats
        ctx.save_for_backward(weight)
        scale = None if weight is None else weight.to(dtype)
        shift = None if bias is None else bias.to(dtype)
        return torch.batch_norm(
            x,
            scale,
            shift,
            kernel_stats.mean,
            kernel_stats.variance,
            False,
            0.0,
            kernel_stats.eps,
            torch.backends.cudnn.enabled,
        )

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        """Return the gradients of mean, variance, weight and bias, and offload the gradient of the output."""
        layer_call: LayerCall = ctx.layer_call
        (dy,) = grads
        (weight,) = ctx.saved_tensors
        x, inverse = layer_call.load_input_for_sums(), ctx.kernel_stats.inverse
        weight_gradient, bias_gradient = _channel_sums(dy, x, ctx.kernel_stats.mean, inverse)
        scale = inverse if weight is None else inverse * weight.to(inverse.dtype)
        if layer_call.needs_input:
            layer_call.offload_output_gradient(dy, scale)
        needs = ctx.needs_input_grad
        return (
            None,
            (scale * bias_gradient).neg_() if needs[1] else None,
            (scale * weight_gradient).mul_(inverse).mul_(-0.5) if needs[2] else None,
            None,
            weight_gradient if needs[4] else None,
            bias_gradient if needs[5] else None,
            None,
        )


def _channel_sums(dy: Tensor, x: Tensor, mean: Tensor, inverse: Tensor) -> tuple[Tensor, Tensor]:
    """Sum ``dy (x - mean) inverse`` and ``dy`` over each channel, in one pass of torch's kernel."""
    if needs_contiguous(x):
        dy, x = dy.contiguous(), x.contiguous()
    _, weight_gradient, bias_gradient = torch.ops.aten.native_batch_norm_backward(
        dy, x, None, None, None, mean, inverse, True, 0.0, [False, True, True]
    )
    return weight_gradient, bias_gradient
