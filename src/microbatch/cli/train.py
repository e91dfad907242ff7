"""The command ``train``: what is printed when, and with which exit code it ends."""

from __future__ import annotations

import json
import signal
import sys
import traceback
from collections.abc import Mapping
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any

from rich.console import Console

from microbatch.cli.lines import JsonLines
from microbatch.cli.show import Screen
from microbatch.cli.views import resume_command
from microbatch.cli.watch import Watch
from microbatch.errors import MicrobatchError
from microbatch.train.events import RunListener
from microbatch.train.start import PreparedRun, prepare
from microbatch.train.tensorboard import EventFile

FAILED, BAD_INPUT = 1, 2


@dataclass(frozen=True, slots=True, kw_only=True)
class Output:
    """Say what of a run is shown, and how.

    Attributes:
        as_json: Whether standard output is for machines.
        color: Whether colours may be used; the variable ``NO_COLOR`` forbids them as well.
        watch: Whether the live view is opened beside it.
        tensorboard: Whether TensorBoard's event files are written.
    """

    as_json: bool
    color: bool
    watch: bool = False
    tensorboard: bool = False


def run_training(
    flags: Mapping[str, Any],
    *,
    file: Path | None,
    run: Path | None,
    resume: bool,
    output: Output,
) -> int:
    """Train, and say what happens.

    Args:
        flags: Settings given on the command line; `None` for those that were not.
        file: Configuration file, or `None`.
        run: Run directory, or `None`.
        resume: Whether to go on with a run.
        output: What is shown, and how.

    Returns:
        The exit code: 0 finished, 1 failed, 2 bad input, 130 stopped by Ctrl-C, 143 by SIGTERM.
    """
    as_json, no_color = output.as_json, None if output.color else True
    errors = Console(stderr=True, no_color=no_color, highlight=False, soft_wrap=True)
    shown = JsonLines(sys.stdout) if as_json else Screen(Console(no_color=no_color, highlight=False))
    listeners: list[RunListener] = [shown]
    if output.tensorboard:
        listeners.append(EventFile())

    def fail(message: str, *, kind: str, code: int) -> int:
        if as_json:
            sys.stdout.write(json.dumps({"event": "error", "kind": kind, "message": message}) + "\n")
        errors.print("error:", style="bold red", end=" ")
        errors.print(message, markup=False)
        return code

    prepared: PreparedRun | None = None
    try:
        with shown, ExitStack() as beside:
            if output.watch:
                listeners.append(Watch(beside))
            prepared = prepare(flags, file=file, run=run, resume=resume, listeners=tuple(listeners))
            summary = prepared.train()
    except MicrobatchError as error:
        hint = "" if prepared is None else _resume_hint(prepared)
        return fail(f"{error}{hint}", kind=type(error).__name__, code=BAD_INPUT if prepared is None else FAILED)
    except KeyboardInterrupt:
        hint = "" if prepared is None else f"; the window was dropped{_resume_hint(prepared)}"
        return fail(f"stopped at once{hint}", kind="KeyboardInterrupt", code=128 + signal.SIGINT)
    except Exception as error:  # noqa: BLE001 -- whatever the user's own code raises is shown as Python shows it
        traceback.print_exception(type(error), error, _of_the_user(error.__traceback__))
        hint = "" if prepared is None else _resume_hint(prepared)
        where = "the job's function" if prepared is None else "the run"
        return fail(
            f"{where} failed with the {type(error).__name__} above{hint}", kind=type(error).__name__, code=FAILED
        )
    stopped_by = summary["stopped_by"]
    return 0 if stopped_by is None else 128 + signal.Signals[stopped_by]


def _resume_hint(prepared: PreparedRun) -> str:
    saved = prepared.loop.saved_step
    if saved is None:
        return ""
    return f"\nThe checkpoint of step {saved} is safe. Go on from it with:\n  {resume_command(prepared.directory.path)}"


def _of_the_user(trace: TracebackType | None) -> TracebackType | None:
    """Drop the frames of the command line itself, which say nothing about what went wrong."""
    here = str(Path(__file__).parent)
    while trace is not None and trace.tb_next is not None and trace.tb_frame.f_code.co_filename.startswith(here):
        trace = trace.tb_next
    return trace
