"""Refuse losses that the user's own `GradScaler` has scaled."""

from __future__ import annotations

import gc
from collections.abc import Iterator, Sequence
from functools import partial

import torch
from torch import Tensor
from torch.amp import GradScaler

from microbatch.errors import LossError
from microbatch.step.finish import take_step
from microbatch.step.part import OpenWindow, Part, Run
from microbatch.step.parts.loss_graph import nodes_of_loss
from microbatch.step.record import Step

_NODES = 8  # nodes of a graph that are looked at
_THROUGH = frozenset(  # what a user may do to a loss after it was scaled
    f"{name}Backward{number}"
    for name in ("Add", "Sub", "Mul", "Div", "Neg", "Sum", "Mean", "Stack", "ToCopy", "View", "Squeeze")
    for number in range(2)
)


class ScaledLoss(Part):
    """Refuse a loss that a `GradScaler` has scaled already, where nothing would unscale its gradient.

    `GradScaler.scale` multiplies the loss by the scaler's own tensor, and the loss's graph saves this very tensor. So a
    scaled loss is recognised for certain, and never mistaken for a loss with a weight. A list of losses is multiplied
    by a copy of this tensor: there, an equal number is only warned of.

    `Accumulator.gradient` without ``grad_scaler`` is left alone: its caller may unscale the gradient.

    Cost:
        In the first windows a few microseconds for each microbatch. If the loss is multiplied by a tensor of one
        number, one search of the process for scalers in each of these windows.
    """

    first_windows = 2

    def __init__(self) -> None:
        self._scales: list[Tensor] | None = None

    def backward(self, window: OpenWindow, run: Run) -> Run:
        """Read the factors of each loss before its backward."""
        self._scales = None
        unscales = window.setup.finish is not take_step and window.options.grad_scaler is None
        return run if unscales else partial(self._run, window, run)

    def done(self, window: OpenWindow, step: Step) -> None:
        """Forget the scales."""
        self._scales = None

    def _run(self, window: OpenWindow, run: Run, tensors: Sequence[Tensor], seeds: Sequence[Tensor]) -> object:
        for loss in tensors:
            for factor in _factors(loss):
                self._check(window, factor)
        return run(tensors, seeds)

    def _check(self, window: OpenWindow, factor: Tensor) -> None:
        if self._scales is None:
            self._scales = _live_scales()
        same = any(each is factor for each in self._scales)
        if not same and (not self._scales or float(factor) not in map(float, self._scales)):
            return
        given = window.options.grad_scaler is not None
        text = (
            f"scaler.scale(loss) multiplied it by {float(factor):g}, and the accumulator "
            f"{'multiplies it again' if given else 'does not divide the gradient by it'}. Return the loss without "
            "scaler.scale()"
            + ("" if given else ", and give the scaler to the accumulator: mb.Accumulator(..., grad_scaler=scaler)")
        )
        if same:
            raise LossError(f"the loss was scaled already: {text}")
        window.setup.warn("scaled loss", f"the loss was probably scaled already: {text}")  # a copy of the scale


def _factors(loss: Tensor) -> Iterator[Tensor]:
    """Yield the float32 tensors of one element that a loss was multiplied by."""
    for node in nodes_of_loss(loss, _THROUGH, most=_NODES):
        if type(node).__name__ not in _THROUGH:
            continue
        # The raw value, because unpacking could recompute a layer. A number of Python's is saved in 64 bits.
        factor = getattr(getattr(node, "_raw_saved_other", None), "data", None)
        if isinstance(factor, Tensor) and _may_be_a_scale(factor):
            yield factor


def _may_be_a_scale(factor: Tensor) -> bool:
    return factor.numel() == 1 and factor.dtype == torch.float32 and not factor.requires_grad


def _live_scales() -> list[Tensor]:
    """List the scales of the process's scalers: the garbage collector finds what refers to their class quickly."""
    kinds: list[type] = [GradScaler]
    for kind in kinds:  # grows in the loop
        kinds += type.__subclasses__(kind)
    scalers = [each for each in gc.get_referrers(*kinds) if issubclass(type(each), GradScaler)]
    scales = [getattr(each, "_scale", None) for each in scalers]  # private by name
    return [each for each in scales if isinstance(each, Tensor)]
