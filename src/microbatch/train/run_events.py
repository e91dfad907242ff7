"""What the training loop tells, beside the core's own events: screens and logs are listeners."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeAlias

from microbatch.step.events import BudgetPassed, MicrobatchDone, PlanChosen, Retry, SizeChanged, SyncChosen
from microbatch.train.run_config import RunConfig


@dataclass(frozen=True, slots=True)
class RunPlaced:
    """It is known where the run keeps its files.

    Attributes:
        path: Its run directory.
    """

    path: Path


@dataclass(frozen=True, slots=True)
class RunPlanned:
    """The run is about to start, and this is what it will do.

    Attributes:
        config: Every number of the run.
        path: Its run directory.
        step: Optimizer steps taken already; more than 0 when it was resumed.
    """

    config: RunConfig
    path: Path
    step: int


@dataclass(frozen=True, slots=True)
class StepLogged:
    """A step was taken and its line of metrics was written.

    Attributes:
        metrics: That line.
    """

    metrics: Mapping[str, Any]


@dataclass(frozen=True, slots=True)
class Validated:
    """The held-out set was evaluated.

    Attributes:
        step: Optimizer steps taken.
        values: Means over the whole set, by name.
    """

    step: int
    values: Mapping[str, float]


@dataclass(frozen=True, slots=True)
class CheckpointWritten:
    """A checkpoint is safe on the disk.

    Attributes:
        step: Optimizer steps taken.
        path: Its folder.
    """

    step: int
    path: Path


@dataclass(frozen=True, slots=True)
class Notice:
    """Something was decided in the user's place, or went wrong and was dealt with.

    Attributes:
        text: One sentence, without a full stop.
    """

    text: str


@dataclass(frozen=True, slots=True)
class Stopping:
    """Somebody asked the run to stop; it does so when the step's window has ended.

    Attributes:
        signal: Name of the signal, ``"SIGINT"`` or ``"SIGTERM"``.
    """

    signal: str


@dataclass(frozen=True, slots=True)
class Comparing:
    """The steps are done; the first batch is being measured against the full batch."""


@dataclass(frozen=True, slots=True)
class RunEnded:
    """The run is over, finished or stopped.

    Attributes:
        summary: What came of it, as in ``summary.json``.
    """

    summary: Mapping[str, Any]


RunEvent: TypeAlias = (
    RunPlaced
    | RunPlanned
    | MicrobatchDone
    | Retry
    | SizeChanged
    | BudgetPassed
    | PlanChosen
    | SyncChosen
    | StepLogged
    | Validated
    | CheckpointWritten
    | Notice
    | Stopping
    | Comparing
    | RunEnded
)
RunListener: TypeAlias = Callable[[RunEvent], object]
