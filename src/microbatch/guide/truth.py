"""What a gradient is held against: one backward over the whole batch, by plain PyTorch."""

from __future__ import annotations

import copy
import math
from collections.abc import Iterable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from microbatch.guide.lessons import Lesson
from microbatch.memory.meter import MemoryMeter

ROUNDING = {"float32": 2.0**-23, "autocast": 2.0**-8, "bfloat16": 2.0**-8, "bfloat16-sums": 2.0**-8}
"""One rounding unit of each precision's products."""


@dataclass(frozen=True, slots=True)
class Truth:
    """The whole batch's gradient.

    Attributes:
        gradient: In float64, every parameter's, one after another; 1-d.
        loss: The whole batch's mean loss, in float64.
        own_error: How far the whole batch's gradient, in the run's own precision, is from it, relatively.
        tolerance: Relative error that an exact cut may have: ``own_error`` and one rounding unit.
    """

    gradient: Tensor
    loss: float
    own_error: float
    tolerance: float


def truth_of(lesson: Lesson, batch: dict[str, Tensor], *, precision: str) -> Truth:
    """Run one backward over the whole batch, with the model's present weights, and leave the model alone.

    Args:
        lesson: Whose model it is.
        batch: The effective batch.
        precision: The run's; a key of `ROUNDING`.

    Returns:
        The gradient and how exact it can be.

    Cost:
        Two forwards and backwards of the whole batch, one of them in float64.
    """
    exact = copy.deepcopy(lesson.model).double()
    loss = lesson.mean_loss(exact, batch)
    loss.backward()
    gradient = gradient_of(exact.parameters())
    own = copy.deepcopy(lesson.model)
    with autocast_of(precision):
        mean = lesson.mean_loss(own, batch)
    mean.backward()
    error = relative_error(gradient_of(own.parameters()), gradient)
    return Truth(gradient, float(loss.detach()), error, error + ROUNDING[precision])


def gradient_of(parameters: Iterable[Tensor]) -> Tensor:
    """Put the gradients of parameters one after another.

    Args:
        parameters: With or without gradients.

    Returns:
        1-d, float64; zeros where a parameter has no gradient.
    """
    return flat([torch.zeros_like(each) if each.grad is None else each.grad for each in parameters])


def flat(gradients: Sequence[Tensor]) -> Tensor:
    """Put tensors one after another.

    Args:
        gradients: At least one.

    Returns:
        1-d, float64.
    """
    return torch.cat([each.detach().double().flatten() for each in gradients])


def relative_error(found: Tensor, truth: Tensor) -> float:
    """Compare two gradients.

    Args:
        found: Any.
        truth: Of the same shape.

    Returns:
        ``|found - truth| / |truth|``, Euclidean.

    Example:
        >>> relative_error(torch.tensor([2.0, 0.0]), torch.tensor([1.0, 0.0]))
        1.0
    """
    return float((found - truth).norm() / truth.norm())


def scale_of(found: Tensor, truth: Tensor) -> float:
    """Say how many times the one is the other, along the other.

    Args:
        found: Any.
        truth: Of the same shape.

    Returns:
        ``<found, truth> / <truth, truth>``: N for a gradient that was not divided by N microbatches.
    """
    return float(found @ truth / (truth @ truth))


def autocast_of(precision: str) -> AbstractContextManager[Any]:
    """Make the context that a precision's forward runs in.

    Args:
        precision: A key of `ROUNDING`.

    Returns:
        A context manager.
    """
    return torch.autocast("cpu", torch.bfloat16) if precision == "autocast" else nullcontext()


class WholeBatch:
    """Train a copy of a model on whole batches, by plain PyTorch: what a run is shown beside.

    Args:
        lesson: Whose loss it is.
        model: The copy.
        optimizer: Over its parameters.
        precision: Of the run.
    """

    def __init__(self, lesson: Lesson, model: nn.Module, *, optimizer: Optimizer, precision: str) -> None:
        self._lesson, self._model, self._optimizer, self._precision = lesson, model, optimizer, precision

    def step(self, batch: dict[str, Tensor]) -> dict[str, Any]:
        """Take one step on a whole batch.

        Args:
            batch: The effective batch.

        Returns:
            Its ``"loss"`` (`None` if it is not finite), ``"peak_bytes"``, and ``"memory"`` at the peak by category.
        """
        meter = MemoryMeter(detail=True)
        meter.track(self._model, self._optimizer, batch)
        with meter:
            with autocast_of(self._precision):
                loss = self._lesson.mean_loss(self._model, batch)
            loss.backward()
            self._optimizer.step()
            self._optimizer.zero_grad()
        report, mean = meter.report(), float(loss.detach())
        return {
            "loss": mean if math.isfinite(mean) else None,
            "peak_bytes": report.peak_bytes,
            "memory": dict(report.at_peak),
        }
