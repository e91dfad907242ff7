"""Send a run's metrics to an experiment tracker: ``--tracker``."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Mapping
from contextlib import suppress
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from microbatch.errors import MissingDependencyError
from microbatch.train.run_events import RunEvent, StepLogged
from microbatch.train.tensorboard import EventFile

RECORD = "tracker.json"
"""File of the run directory with the tracker's own name of the run, with which a resumed run continues it."""


class Tracked:
    """Send every step's metrics to a tracker; a listener of a run.

    Args:
        kind: ``"wandb"``, ``"mlflow"``, ``"trackio"`` or ``"tensorboard"``.
        tell: Called with a sentence if the tracker fails while the run goes on.

    Raises:
        MissingDependencyError: The tracker is not installed.
    """

    def __init__(self, kind: str, *, tell: Callable[[str], object]) -> None:
        self._kind, self._tell = kind, tell
        self._file = EventFile() if kind == "tensorboard" else None  # needs no package
        self._tracker: Any = None
        if self._file is None and find_spec(kind) is None:
            raise MissingDependencyError(
                f"the tracker {kind} is not installed: pip install {kind}, or leave out --tracker {kind}"
            )

    def begin(self, path: Path, config: Mapping[str, Any]) -> None:
        """Start the tracker's run, or continue the one that this run directory has had before.

        Args:
            path: The run directory.
            config: The settings of the run, which the tracker gets too.

        Raises:
            ConfigError: The tracker cannot start.
        """
        if self._file is not None:
            return
        record = path / RECORD
        before: dict[str, Any] = {}
        with suppress(OSError, ValueError):  # it is missing or damaged: the tracker gets a new run
            before = dict(json.loads(record.read_text(encoding="utf-8")))
        run_id = before.get("id") if before.get("tracker") == self._kind else None
        self._tracker = _start(self._kind, path, config=config, run_id=run_id, tell=self._tell)
        record.write_text(json.dumps({"tracker": self._kind, "id": self._tracker.id}) + "\n", encoding="utf-8")

    def __call__(self, event: RunEvent) -> None:
        """Send the metrics of a step.

        Args:
            event: What happened; only steps have metrics.
        """
        if self._file is not None:
            self._file(event)
        elif self._tracker is not None and isinstance(event, StepLogged):
            numbers = {name: value for name, value in event.metrics.items() if name != "step"}
            self._tracker.send(numbers, step=event.metrics["step"])

    def close(self) -> None:
        """End the tracker's run."""
        if self._tracker is not None:
            self._tracker.finish()


def _start(
    kind: str, path: Path, *, config: Mapping[str, Any], run_id: str | None, tell: Callable[[str], object]
) -> Any:
    from microbatch.integrations import trackers

    if kind == "mlflow":
        name = {"run_name": path.name} if run_id is None else {"run_id": run_id}
        # MLflow refuses a parameter that has changed, and a resumed run may change some.
        return trackers.MLflow(tell=tell, params=config if run_id is None else None, **name)
    init = {"project": "microbatch", "name": path.name, "config": dict(config), "resume": "allow"}
    if kind == "trackio":
        return trackers.Trackio(tell=tell, **init)
    if "WANDB_PROJECT" in os.environ:
        del init["project"]
    return trackers.WandB(tell=tell, dir=str(path), id=run_id, **init)
