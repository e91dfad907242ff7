"""What the core tells: the only way out of it. Progress bars, logs and live views are listeners."""

from __future__ import annotations

from collections.abc import Callable, Mapping
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


@dataclass(frozen=True, slots=True, kw_only=True)
class Retry:
    """Memory ran out inside a window, everything was put back, and the same batch starts again, cut smaller.

    Attributes:
        step: Index of the window, from 0.
        index: Index of the microbatch where it happened, from 0; one more than the last at the window's end.
        before: Rows of a microbatch so far.
        after: Rows of a microbatch from now on.
        error: What the failure said.
    """

    step: int
    index: int
    before: int
    after: int
    error: str


@dataclass(frozen=True, slots=True, kw_only=True)
class SizeChanged:
    """The following windows will be cut into larger or smaller microbatches; the effective batch stays.

    Attributes:
        step: Index of the window after which it changed, from 0.
        before: Rows of a microbatch so far.
        after: Rows of a microbatch from now on.
        reason: Why, in words.
    """

    step: int
    before: int
    after: int
    reason: str


@dataclass(frozen=True, slots=True, kw_only=True)
class BudgetPassed:
    """A window used more than its memory budget where nothing could be refused, as inside the optimizer.

    Attributes:
        step: Index of the window, from 0.
        peak_bytes: What it used.
        budget: What it was allowed.
    """

    step: int
    peak_bytes: int
    budget: int


@dataclass(frozen=True, slots=True, kw_only=True)
class PlanChosen:
    """``microbatch_size="auto"`` has found its size; the following windows are cut by it.

    Attributes:
        step: Index of the window after which it was chosen, from 0.
        microbatch_size: Rows of a microbatch from now on.
        decided: Whether speed was measured; if not, the size is a default.
        why: Why this size, in words.
        seconds: What was measured, in seconds per row, by size.
        predicted_bytes: Peak that was predicted for the size; `None` where nothing could be, or had to be.
        peak_bytes: Peak that was measured at the size; `None` where nobody counted.
        microbatch_tokens: Tokens of a microbatch from now on, where rows are ragged: as many as that many rows of the
            first batch's longest; else `None`.
    """

    step: int
    microbatch_size: int
    decided: bool
    why: str
    seconds: Mapping[int, float]
    predicted_bytes: int | None
    peak_bytes: int | None
    microbatch_tokens: int | None = None

    @property
    def error(self) -> float | None:
        """By which part of the measured peak the prediction is above it (or, negative, below it)."""
        if self.predicted_bytes is None or not self.peak_bytes:
            return None
        return self.predicted_bytes / self.peak_bytes - 1


@dataclass(frozen=True, slots=True, kw_only=True)
class SyncChosen:
    """``sync="auto"`` has chosen when a fully sharded model's gradients meet, or has changed its mind.

    Attributes:
        step: Index of the first window that it is for, from 0.
        sync: ``"lean"``, after every microbatch, or ``"fast"``, once a window.
        why: Why, in words.
    """

    step: int
    sync: str
    why: str


Event: TypeAlias = MicrobatchDone | StepDone | Retry | SizeChanged | BudgetPassed | PlanChosen | SyncChosen
Listener: TypeAlias = Callable[[Event], object]
