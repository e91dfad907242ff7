"""Activation offloading for loss functions and encoders."""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import ExitStack
from typing import Any

from microbatch.memory.spill import Spill
from microbatch.step.part import Function, OpenWindow, Part


class Offloading(Part):
    """Run loss functions and encoders under a `Spill`.

    Args:
        spill: Moves activations off the device until backward needs them.
        encoders_alone: Whether only encoders run under the spill, for ``coupled="spill"``.
    """

    def __init__(self, spill: Spill, *, encoders_alone: bool = False) -> None:
        self._spill, self._encoders_alone = spill, encoders_alone
        self._before = 0

    def open(self, window: OpenWindow, stack: ExitStack) -> None:
        """Store the number of bytes offloaded before this window."""
        self._before = self._spill.bytes_spilled

    def call(self, window: OpenWindow, function: Function) -> Function:
        """Run a function under the spill."""
        if self._encoders_alone and window.coupled is None:
            return function

        def spilled(model: Any, microbatch: Any) -> Any:
            with self._spill:
                return function(model, microbatch)

        return spilled

    def figures(self, window: OpenWindow) -> Mapping[str, Any]:
        """Return the number of bytes offloaded in this window."""
        return {"spilled_bytes": self._spill.bytes_spilled - self._before}
