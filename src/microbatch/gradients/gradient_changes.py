"""Detection of gradients that something other than the window has changed."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import TypeAlias

from torch import Tensor

from microbatch.errors import GradientsTouchedError
from microbatch.gradients.parameters import Named

Sums: TypeAlias = Callable[[Iterable[int]], list[Tensor | None]]

_SOME = 8  # gradients that are checked after a backward in the middle of a window


class GradientChanges:
    """Record the identity and version of gradients after a backward, and compare them before the next one.

    `zero_grad`, `clip_grad_norm_` and a second `loss.backward` replace a gradient tensor or raise its version counter.
    """

    def __init__(self) -> None:
        self._named: Sequence[Named] = ()
        self._watched: Sequence[int] = ()
        self._turn = 0
        self._mark: list[Tensor | None] = []
        self._versions: list[int] = []

    def open(self, named: Sequence[Named]) -> None:
        """Start a window in which no parameter has a gradient."""
        self._named = named
        self._watched = range(len(named))
        self._mark = [None] * len(named)
        self._versions = []

    def mark(self, sums: Sums, *, some: bool = False) -> None:
        """Record the gradients as they are now.

        Args:
            sums: Returns the accumulated gradient of each parameter, given the parameters' indices.
            some: Record only 8 parameters, different ones each time.
        """
        number = len(self._named)
        first, self._turn = self._turn, self._turn + _SOME
        self._watched = [(first + i) % number for i in range(_SOME)] if some and number > _SOME else range(number)
        # Held until the next check and no longer: a fused backward returns the sum to autograd, which copies a tensor
        # that something else holds.
        self._mark = sums(self._watched)
        self._versions = [gradient._version for gradient in self._mark if gradient is not None]

    def check(self, sums: Sums) -> None:
        """Refuse gradients that changed since `mark`, or since `open`."""
        now, versions = sums(self._watched), iter(self._versions)
        for index, total, marked in zip(self._watched, now, self._mark, strict=True):
            if total is not marked or (total is not None and total._version != next(versions)):
                raise GradientsTouchedError(
                    f"the gradient of {self._named[index].name!r} was changed inside the window by something other "
                    "than window.backward. Do not call zero_grad(), clip_grad_norm_() or loss.backward() inside a "
                    "window, which zeroes, clips (max_grad_norm=) and adds up the gradients itself"
                )
        self.close()

    def close(self) -> None:
        """Release the recorded gradients."""
        self._watched, self._mark, self._versions = (), [], []
