"""Detection of gradients that something other than the window has changed."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import count
from operator import is_

from torch import Tensor

from microbatch.errors import GradientsTouchedError
from microbatch.gradients.parameters import Named

_ALL = slice(None)
_SOME = 2  # gradients that are checked after a backward, from the third window on
_TURNS = count()
_GOLDEN = (5**0.5 - 1) / 2  # its multiples fall evenly into an interval, and every n-th of them does so too


class WatchedSums:
    """Record the identity and version of gradients after a backward, and compare them before the next one.

    `zero_grad`, `clip_grad_norm_` and a second `loss.backward` replace a gradient tensor or raise its version counter.
    """

    def __init__(self) -> None:
        self._named: Sequence[Named] = ()
        self._watched = _ALL
        self._mark: Sequence[Tensor | None] | None = None
        self._versions: list[int] = []

    def _sums(self, some: slice) -> list[Tensor | None]:
        """Return the sums of some of the parameters."""
        raise NotImplementedError

    def mark(self, *, some: bool = False) -> None:
        """Record the sums after a backward, for `check_untouched`.

        Args:
            some: Record only 2 parameters, different ones each time, or all if these 2 have no gradient. `zero_grad()`
                and the like, which change every gradient, are still detected at once.

        Cost:
            A microsecond for each recorded parameter, because none of them is in the CPU's cache after a backward.
        """
        self._watched = _ALL
        if some:
            first = int(next(_TURNS) * _GOLDEN % 1 * len(self._named))
            self._watched = slice(first, first + _SOME)
        # Held until the next check and no longer: a fused backward returns the sum to autograd, which copies a tensor
        # that something else holds.
        self._mark = self._sums(self._watched)
        self._versions = [gradient._version for gradient in self._mark if gradient is not None]
        if some and not self._versions:
            self.mark()  # what zeroes every gradient changes none that is not there

    def check_untouched(self) -> None:
        """Refuse gradients that something else has changed since `mark`, or since the window opened.

        Raises:
            GradientsTouchedError: They were zeroed, clipped, or added to by another backward.
        """
        if self._mark is None:
            return
        now = self._sums(self._watched)
        if not all(map(is_, now, self._mark)) or [each._version for each in now if each is not None] != self._versions:
            self._refuse(now)
        self._mark = None

    def _refuse(self, now: Sequence[Tensor | None]) -> None:
        """Raise an error that names the first gradient that has changed."""
        versions = iter(self._versions)
        for each, total, marked in zip(self._named[self._watched], now, self._mark or (), strict=True):
            before = None if marked is None else next(versions)
            if total is not marked or (total is not None and total._version != before):
                raise GradientsTouchedError(
                    f"the gradient of {each.name!r} was changed inside the window by something other than "
                    "window.backward. Do not call zero_grad(), clip_grad_norm_() or loss.backward() inside a window, "
                    "which zeroes, clips (max_grad_norm=) and adds up the gradients itself"
                )
