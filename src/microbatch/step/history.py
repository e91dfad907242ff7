"""Counts and settings that a window passes on to the next one."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(slots=True)
class History:
    """Counts and settings that a window passes on to the next one.

    Attributes:
        windows: Number of windows that have ended, with or without a step.
        skipped: Number of windows dropped because their gradient was not finite.
        count: Count of the last window, the estimate for the next one. It is only a scale and never changes a result.
        seed: Seed of random masks: the process's seed when the first window opens.
        open: Whether a window is open now.
    """

    windows: int = 0
    skipped: int = 0
    count: float = 0.0
    seed: int | None = None
    open: bool = False
