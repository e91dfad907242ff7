"""Events that an accumulator emits to its listeners, such as progress bars, logs and live views."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import TypeAlias

from microbatch.step.record import Step


@dataclass(frozen=True, slots=True, kw_only=True)
class MicrobatchDone:
    """The forward and backward of a microbatch were launched; the device may still be running them.

    Attributes:
        step: Index of the window, from 0.
        index: Index of the microbatch in its window, from 0.
        microbatches: Number of microbatches in the window; `None` while it is not known.
        rows: Samples in the microbatch; `None` if they are not known.
    """

    step: int
    index: int
    microbatches: int | None
    rows: int | float | None


@dataclass(frozen=True, slots=True, kw_only=True)
class StepDone:
    """A window ended, with an optimizer step, or without one if ``step.applied`` is False.

    Attributes:
        step: The record of the window.
    """

    step: Step


@dataclass(frozen=True, slots=True, kw_only=True)
class Retry:
    """Memory ran out inside a window; everything was restored, and the same batch runs again in less memory.

    Attributes:
        step: Index of the window, from 0.
        index: Index of the microbatch that failed, from 0; the number of microbatches if the end of the window failed.
        before: Rows of a microbatch so far.
        after: Rows of a microbatch from now on.
        error: Message of the failure.
    """

    step: int
    index: int
    before: int
    after: int
    error: str


@dataclass(frozen=True, slots=True, kw_only=True)
class SizeChanged:
    """The microbatch size of the following windows changed; the effective batch stays the same.

    Attributes:
        step: Index of the window after which the size changed, from 0.
        before: Rows of a microbatch so far.
        after: Rows of a microbatch from now on.
        reason: The reason, in words.
    """

    step: int
    before: int
    after: int
    reason: str


@dataclass(frozen=True, slots=True, kw_only=True)
class BudgetPassed:
    """A window exceeded its memory budget where it could not be stopped, such as inside the optimizer.

    Attributes:
        step: Index of the window, from 0.
        peak_bytes: Peak memory of the window, in bytes.
        budget: The memory budget, in bytes.
    """

    step: int
    peak_bytes: int
    budget: int


@dataclass(frozen=True, slots=True, kw_only=True)
class PlanChosen:
    """``microbatch_size="auto"`` has chosen the size for the following windows.

    Attributes:
        step: Index of the window after which the size was chosen, from 0.
        microbatch_size: Rows of a microbatch from now on.
        decided: Whether speed was measured exactly; if not, the size is a default, or a choice from noisy times.
        why: The reason, in words.
        seconds: Measured seconds per row, by size.
        predicted_bytes: Predicted peak memory at the size; `None` if it was not predicted.
        peak_bytes: Measured peak memory at the size; `None` if it was not measured.
        microbatch_tokens: With ``lengths=``, tokens of a microbatch from now on: ``microbatch_size`` times the longest
            row of the first batch. Otherwise `None`.
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
        """Relative error of the predicted peak; positive if the prediction was too high."""
        if self.predicted_bytes is None or not self.peak_bytes:
            return None
        return self.predicted_bytes / self.peak_bytes - 1


@dataclass(frozen=True, slots=True, kw_only=True)
class SyncChosen:
    """``Ranks(sync="auto")`` has chosen, or changed, when the gradients of a fully sharded model are reduced.

    Attributes:
        step: Index of the first window with this choice, from 0.
        sync: ``"lean"`` (after every microbatch) or ``"fast"`` (once a window).
        why: The reason, in words.
    """

    step: int
    sync: str
    why: str


Event: TypeAlias = MicrobatchDone | StepDone | Retry | SizeChanged | BudgetPassed | PlanChosen | SyncChosen
Listener: TypeAlias = Callable[[Event], object]
