"""Experiment trackers as listeners: Weights & Biases, MLflow, Trackio and TensorBoard.

``mb.Accumulator(..., listeners=[WandB(project="...")])`` sends the record of every step; ``microbatch train --tracker
wandb`` does the same with the run's metrics.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, cast

from microbatch.errors import ConfigError, MissingDependencyError
from microbatch.step.events import Event, StepDone
from microbatch.warned import warn


class Tracker:
    """Send the numbers of every step to a tracker; the base of those below.

    If the tracker raises, it gets nothing more, training goes on, and this is said once.

    Args:
        tell: Called with a sentence if the tracker fails; by default it becomes a `MicrobatchWarning`.

    Cost:
        As a listener: `Step.as_dict` for each step, which is one host synchronisation on CUDA.
    """

    def __init__(self, tell: Callable[[str], object] = warn) -> None:
        self.tell = tell
        self.failed = False

    @property
    def id(self) -> str | None:
        """The tracker's own name of the run, with which it can be continued; `None` if it has none."""
        return None

    def __call__(self, event: Event) -> None:
        """Send the record of a step, and ignore other events.

        Args:
            event: The event.
        """
        if isinstance(event, StepDone):
            self.send(event.step.as_dict(), step=event.step.index + 1)

    def send(self, numbers: Mapping[str, Any], *, step: int) -> None:
        """Send the numbers of a step.

        Args:
            numbers: Values by name; nested values get a slash in their names. Texts, lists and `None` are left out.
            step: Number of optimizer steps so far.
        """
        self._try(lambda: self._log(dict(_flat(numbers)), step), f"at step {step}")

    def finish(self) -> None:
        """End the run; nothing is sent afterwards."""
        self._try(self._finish, "at its end")
        self.failed = True

    def _try(self, work: Callable[[], object], when: str) -> None:
        if self.failed:
            return
        try:
            work()
        except Exception as error:  # noqa: BLE001 - a tracker may raise anything, and training must not end by it
            self.failed = True
            name, reason = type(self).__name__, f"{type(error).__name__}: {error}"
            self.tell(f"the tracker {name} failed {when} and gets nothing more; training goes on ({reason})")

    def _log(self, numbers: dict[str, float], step: int) -> None:
        raise NotImplementedError

    def _finish(self) -> None:
        pass


class WandB(Tracker):
    """Send every step to Weights & Biases.

    Args:
        tell: As for `Tracker`.
        init: Arguments of ``wandb.init``, such as ``project`` and ``mode="offline"``.

    Raises:
        MissingDependencyError: ``wandb`` is not installed.
        ConfigError: ``wandb.init`` failed.
    """

    package = "wandb"

    def __init__(self, *, tell: Callable[[str], object] = warn, **init: Any) -> None:
        super().__init__(tell)
        self._run = _started(self.package, "init", **init)

    @property
    def id(self) -> str | None:
        """The run's id."""
        return getattr(self._run, "id", None)

    def _log(self, numbers: dict[str, float], step: int) -> None:
        self._run.log(numbers, step=step)

    def _finish(self) -> None:
        self._run.finish()


class Trackio(WandB):
    """Send every step to Trackio, whose calls are those of Weights & Biases.

    Args:
        tell: As for `Tracker`.
        init: Arguments of ``trackio.init``, such as ``project``.

    Raises:
        MissingDependencyError: ``trackio`` is not installed.
        ConfigError: ``trackio.init`` failed.
    """

    package = "trackio"


class MLflow(Tracker):
    """Send every step to MLflow, as metrics of one run.

    Args:
        tell: As for `Tracker`.
        params: Parameters of the run, by name.
        start: Arguments of ``mlflow.start_run``, such as ``run_name``, or ``run_id`` to continue a run.

    Raises:
        MissingDependencyError: ``mlflow`` is not installed.
        ConfigError: ``mlflow.start_run`` failed.
    """

    def __init__(
        self, *, tell: Callable[[str], object] = warn, params: Mapping[str, Any] | None = None, **start: Any
    ) -> None:
        super().__init__(tell)
        self._mlflow = _package("mlflow")
        self._run = _started("mlflow", "start_run", **start)
        if params:
            self._try(lambda: self._mlflow.log_params(dict(params), run_id=self.id), "at its start")

    @property
    def id(self) -> str | None:
        """The run's id."""
        return self._run.info.run_id

    def _log(self, numbers: dict[str, float], step: int) -> None:
        self._mlflow.log_metrics(numbers, step=step, run_id=self.id)

    def _finish(self) -> None:
        self._mlflow.end_run()


class TensorBoard(Tracker):
    """Write every step to TensorBoard's event files, through ``torch.utils.tensorboard``.

    Args:
        folder: Where the files go.
        tell: As for `Tracker`.

    Raises:
        MissingDependencyError: ``tensorboard`` is not installed.
    """

    def __init__(self, folder: str | Path, *, tell: Callable[[str], object] = warn) -> None:
        super().__init__(tell)
        _package("tensorboard")
        self._writer = importlib.import_module("torch.utils.tensorboard").SummaryWriter(str(folder))

    def _log(self, numbers: dict[str, float], step: int) -> None:
        for name, value in numbers.items():
            self._writer.add_scalar(name, value, step)
        self._writer.flush()

    def _finish(self) -> None:
        self._writer.close()


def _flat(numbers: Mapping[str, Any], prefix: str = "") -> list[tuple[str, float]]:
    found: list[tuple[str, float]] = []
    for name, value in numbers.items():
        if isinstance(value, Mapping):
            found += _flat(cast("Mapping[str, Any]", value), f"{prefix}{name}/")
        elif isinstance(value, int | float):
            found.append((prefix + name, float(value)))
    return found


def _package(name: str) -> Any:
    try:
        return importlib.import_module(name)
    except ImportError as error:
        raise MissingDependencyError(f"the tracker {name} is not installed: pip install {name} ({error})") from None


def _started(package: str, function: str, **arguments: Any) -> Any:
    start = getattr(_package(package), function)
    try:
        return start(**arguments)
    except Exception as error:  # whatever the tracker raises
        raise ConfigError(
            f"{package}.{function}() failed, so no step was taken: {type(error).__name__}: {error}; mend it, or leave "
            "the tracker out"
        ) from error
