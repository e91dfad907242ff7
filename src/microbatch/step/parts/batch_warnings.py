"""Warnings about the batch of a window: a doubtful layout, and a loop over microbatches that was left early."""

from __future__ import annotations

from microbatch.batch.batches import parts_of
from microbatch.batch.layouts import doubtful_numbers, modules_with_time_first, other_layout
from microbatch.step.cutting import Cutting
from microbatch.step.part import OpenWindow, Part

LAYOUT = "layout"
NUMBERS = "numbers"


class BatchWarnings(Part):
    """Warn once where the rows of a batch could be in another dimension, and once after a ``break``.

    Numbers in lists that could be those of the rows, or a value of the whole batch, are named once too.

    Source:
        Laws E1, E9 and S10.
    """

    _time_first: list[str] | None = None

    def cut(self, window: OpenWindow, batch: object, cutting: Cutting) -> None:
        """Warn if a batch that is cut could be read in another way."""
        if cutting.cut is None:
            return
        if not window.setup.warn.has(NUMBERS):
            for text in filter(None, map(doubtful_numbers, parts_of(batch))):
                window.setup.warn(NUMBERS, text)
        if window.setup.warn.has(LAYOUT):
            return
        if self._time_first is None:
            self._time_first = modules_with_time_first(window.model)
        for part in parts_of(batch):
            text = other_layout(part, time_first=self._time_first)
            if text:
                window.setup.warn(LAYOUT, text)

    def check(self, window: OpenWindow) -> None:
        """Warn if a loop over microbatches was left before its end."""
        if window.left:
            window.warn_left("the step is that of the microbatches so far")
