"""Output for machines: one JSON object a line."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping
from types import TracebackType
from typing import Any, Self, TextIO

from microbatch.step.events import BudgetPassed, PlanChosen, Retry, SizeChanged, SyncChosen
from microbatch.train.run_events import (
    CheckpointWritten,
    Notice,
    RunEnded,
    RunEvent,
    RunPlanned,
    StepLogged,
    Stopping,
)
from microbatch.train.rundir import jsonable


class JsonLines:
    """Write the plan, every step and the summary as JSON, each with the key ``"event"``.

    Use it as a context manager, so that it and `microbatch.cli.progress.Screen` are exchangeable.
    """

    def __init__(self, stream: TextIO) -> None:
        """Write to a stream.

        Args:
            stream: Usually standard output.
        """
        self._stream = stream

    def __enter__(self) -> Self:
        """Start.

        Returns:
            Itself.
        """
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """End; every line has been flushed."""

    def __call__(self, event: RunEvent) -> None:
        """Write one event; those that only a screen needs are left out.

        Args:
            event: What happened.
        """
        match event:
            case RunPlanned():
                self._write("plan", {**_plan(event), "run": event.path, "step": event.step})
            case StepLogged():
                self._write("step", event.metrics)
            case Retry():
                self._write("retry", dataclasses.asdict(event))
            case SizeChanged():
                self._write("size", dataclasses.asdict(event))
            case PlanChosen():
                self._write("plan chosen", {**dataclasses.asdict(event), "error": event.error})
            case SyncChosen():
                self._write("sync chosen", dataclasses.asdict(event))
            case BudgetPassed():
                self._write("budget passed", dataclasses.asdict(event))
            case CheckpointWritten():
                self._write("checkpoint", {"step": event.step, "path": event.path})
            case Notice():
                self._write("notice", {"text": event.text})
            case Stopping():
                self._write("stopping", {"signal": event.signal})
            case RunEnded():
                self._write("summary", event.summary)
            case _:
                pass

    def _write(self, name: str, values: Mapping[str, Any]) -> None:
        self._stream.write(json.dumps({"event": name, **jsonable(values)}, ensure_ascii=False) + "\n")
        self._stream.flush()


def _plan(event: RunPlanned) -> dict[str, Any]:
    config = event.config
    values = {field.name: getattr(config, field.name) for field in dataclasses.fields(config)}
    del values["notices"]
    autocast = None if config.autocast is None else str(config.autocast).removeprefix("torch.")
    return {**values, "device": str(config.device), "autocast": autocast, "microbatches": config.microbatches}
