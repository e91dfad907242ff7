"""Report how far a check is."""

from __future__ import annotations

from collections.abc import Callable

_COMPARED, _SEARCHED = 6, 24
"""Passes over the batch that a check usually takes: one that finds no difference, and one that looks for causes."""


class CheckProgress:
    """Count the passes over the batch, and report each of them.

    Args:
        listener: Called with what is being done, and the share of it that is done; `None` for nobody.
    """

    def __init__(self, listener: Callable[[str, float], object] | None) -> None:
        self._listener, self._passes = listener, 0
        self._doing, self._usual = "comparing the two gradients", _COMPARED

    def search(self) -> None:
        """Change over to the search for causes, which takes more passes."""
        self._doing, self._usual = "looking for what makes the difference", _SEARCHED

    def __call__(self) -> None:
        """Report that one more pass begins; how many follow is an estimate."""
        if self._listener is not None:
            self._listener(self._doing, min(0.95, self._passes / self._usual))
            self._passes += 1
