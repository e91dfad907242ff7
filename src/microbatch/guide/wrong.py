"""The usual wrong denominators, on purpose: the guide shows what each of them does."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from microbatch.batch.batch_tree import rows_of
from microbatch.errors import ConfigError
from microbatch.loss.loss import Loss

DIVISIONS = ("right", "none", "means")


class Divide:
    """Wrap a loss function so that it adds up to what a hand-written loop would have added to the gradient.

    The accumulator divides by the counts that it is told, so telling it other counts gives what other loops give. With
    means ``m_i`` of ``n`` microbatches: no division is ``sum m_i``, with counts that add up to 1; the mean of means is
    ``sum m_i / n``, with a count of 1 each.

    Args:
        how: ``"right"``, ``"none"`` or ``"means"``.
        loss_fn: ``loss_fn(model, microbatch)`` returns the `Loss` as it should be.
        batch_size: Rows of the effective batch.

    Raises:
        ConfigError: There is no such denominator.

    Example:
        >>> means = Divide("means", lambda model, rows: Loss(sum=rows.sum(), count=len(rows)), batch_size=4)
        >>> long, short = torch.tensor([3.0, 2.0, 1.0]), torch.tensor([1.0])
        >>> float(means(None, long).sum), float(means(None, short).sum)  # their mean is 1.5
        (2.0, 1.0)
        >>> means.mean()  # and the batch's 7 / 4
        1.75
    """

    def __init__(self, how: str, loss_fn: Callable[[nn.Module, Any], Loss], *, batch_size: int) -> None:
        if how not in DIVISIONS:
            raise ConfigError(f"there is no division {how!r}; choose one of {', '.join(DIVISIONS)}")
        self._how, self._loss_fn, self._batch_size = how, loss_fn, batch_size
        self.begin()

    def begin(self) -> None:
        """Forget what was seen: a window begins."""
        self._sum = torch.zeros((), dtype=torch.float64)
        self._count = torch.zeros((), dtype=torch.float64)

    def __call__(self, model: Any, microbatch: Any) -> Loss:
        """Compute a microbatch's loss, with the count that is asked for.

        Args:
            model: Given to the loss function.
            microbatch: Likewise.

        Returns:
            What the accumulator is told.
        """
        loss = self._loss_fn(model, microbatch)
        count = torch.as_tensor(loss.count)
        self._sum += loss.sum.detach().double()
        self._count += count
        if self._how == "right":
            return loss
        mean: Tensor = loss.sum / count.clamp(min=1)
        return Loss(sum=mean, count=rows_of(microbatch) / self._batch_size if self._how == "none" else 1.0)

    def mean(self) -> float:
        """Read the batch's true mean loss so far."""
        return float(self._sum / self._count)
