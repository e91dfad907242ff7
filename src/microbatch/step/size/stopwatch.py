"""Time the microbatches of a window during the search for the fastest microbatch size."""

from __future__ import annotations

import time
from collections.abc import Callable, Generator
from contextlib import ExitStack, contextmanager

import torch

from microbatch.devices.backend import synchronize
from microbatch.step.cutting import Cutting
from microbatch.step.part import OpenWindow, Part, Pass


class Stopwatch(Part):
    """Time each pass, with a device synchronisation before each reading.

    Attributes:
        clock: Returns the current time in seconds.
        on: Whether windows are timed.
        laps: Seconds and rows of each microbatch of the last window; `None` if it was not timed.
    """

    def __init__(self) -> None:
        self.clock: Callable[[], float] = time.perf_counter
        self.on = False
        self.laps: list[tuple[float, float]] | None = None
        self._earlier: list[float] = []
        self._last = 0.0

    def open(self, window: OpenWindow, stack: ExitStack) -> None:
        """Reset the times of the last window."""
        self.laps = None

    def cut(self, window: OpenWindow, batch: object, cutting: Cutting) -> None:
        """Start the clock before the first pass."""
        self._earlier, self.laps = [], [] if self.on else None
        self._last = self._now(window.device) if self.on else 0.0

    @contextmanager
    def around(self, window: OpenWindow, p: Pass) -> Generator[None]:
        """Time a pass, from the end of the previous pass."""
        if self.laps is not None and p.again and p.index == 0:
            # The batch is encoded for the second time; both times are added up.
            self._earlier, self.laps = [seconds for seconds, _ in self.laps], []
            self._last = self._now(window.device)
        yield
        if self.laps is not None and not p.filler:
            now = self._now(window.device)
            earlier = self._earlier.pop(0) if self._earlier else 0.0
            self.laps.append((earlier + now - self._last, p.rows or 0))
            self._last = now

    def _now(self, device: torch.device) -> float:
        synchronize(device)
        return self.clock()
