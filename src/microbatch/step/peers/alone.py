"""A single process: no communication, and one host synchronisation for the whole window."""

from __future__ import annotations

from contextlib import ExitStack

import torch
from torch import Tensor
from torch.nn.parallel import DistributedDataParallel

from microbatch.gradients.clipping import gradient_norm
from microbatch.ranks.fsdp import reshard
from microbatch.step.host_numbers import numbers_of
from microbatch.step.met import Met
from microbatch.step.part import OpenWindow, Peers


class Alone(Peers):
    """The peers of a single process."""

    def prepare(self, window: OpenWindow) -> None:
        """Free the gathered weights of a model that is fully sharded over one rank."""
        reshard(window.options.model)

    def open(self, window: OpenWindow, stack: ExitStack) -> None:
        """Turn off the gradient reductions of a DistributedDataParallel wrapper."""
        enter_no_sync(window, stack)

    def meet(self, window: OpenWindow) -> Met:
        """Return the sums, counts and norm of this process."""
        denominator, device = window.denominator, window.device
        totals = denominator.totals(device)
        window.gradients.drop_untouched()
        norm = unscaled_norm(window)
        # The only host synchronisation of the window.
        *flat, host_norm = numbers_of([*(number for pair in totals for number in pair), norm], device)
        return Met(
            names=denominator.names,
            sums=flat[0::2],
            counts=dict(zip(denominator.names, flat[1::2], strict=True)),
            samples=sum(window.done),
            dtype=denominator.dtype,
            norm=norm,
            host_norm=host_norm,
            normalized=False,
            present=[],
            metrics=denominator.metrics,
        )


def enter_no_sync(window: OpenWindow, stack: ExitStack) -> None:
    """Turn off the gradient reductions of a DistributedDataParallel wrapper; the window reduces once, at its end."""
    model = window.options.model
    if isinstance(model, DistributedDataParallel):
        stack.enter_context(model.no_sync())


def unscaled_norm(window: OpenWindow) -> Tensor:
    """Unscale the gradients of a window, and return their norm.

    Args:
        window: The window, after its last backward.

    Returns:
        The Euclidean norm of the gradients of all parameters that an optimizer steps; shape ``()``, on the device.
        Infinite or NaN if any of them is.
    """
    gradients, scaler = window.gradients, window.options.grad_scaler
    gradients.coalesce()
    if scaler is not None:
        scaler.scale(torch.zeros((), device=window.device))  # makes its scale, where no microbatch has had a loss
        for optimizer in window.options.optimizers:
            scaler.unscale_(optimizer)
    return gradient_norm(gradients.held_sums(), window.device)
