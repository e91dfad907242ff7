"""What the core tells: the only way out of it. Progress bars, logs and live views are listeners."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TypeAlias

from microbatch.step.record import Step


@dataclass(frozen=True, slots=True, kw_only=True)
class MicrobatchDone:
    """A microbatch went forward and backward; its work may still be running on the device.

    Attributes:
        step: Index of the window, from 0.
        index: Index of the microbatch in its window, from 0.
        microbatches: Microbatches in the window, or `None` while that is not known.
        rows: Samples in the microbatch, or `None` if nobody said.
    """

    step: int
    index: int
    microbatches: int | None
    rows: int | float | None


@dataclass(frozen=True, slots=True, kw_only=True)
class StepDone:
    """A window ended, with an optimizer step or (``step.applied`` is False) without one.

    Attributes:
        step: The record of it.
    """

    step: Step


Event: TypeAlias = MicrobatchDone | StepDone
Listener: TypeAlias = Callable[[Event], object]
