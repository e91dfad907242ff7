"""The command ``train``: what is printed when, and with which exit code it ends."""

from __future__ import annotations

import json
import os
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

from microbatch.cli.error_report import print_error
from microbatch.cli.flag_words import in_flags
from microbatch.cli.json_lines import JsonLines
from microbatch.cli.live_view_process import Watch
from microbatch.cli.progress import Screen
from microbatch.cli.rank_log import RankLog
from microbatch.cli.run_views import resume_command
from microbatch.cli.safe_stream import safe
from microbatch.cli.waiting import Waiting
from microbatch.errors import MicrobatchError, RankError
from microbatch.ranks.lost_ranks import is_of_the_group
from microbatch.train.config import load_settings
from microbatch.train.launch import Launch, joined, launch_of
from microbatch.train.run_events import RunListener
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
    line: Waiting,
) -> int:
    """Train, and say what happens.

    Args:
        flags: Settings given on the command line; `None` for those that were not.
        file: Configuration file, or `None`.
        run: Run directory, or `None`.
        resume: Whether to go on with a run.
        output: What is shown, and how.
        line: What a terminal shows until the run begins.

    Returns:
        The exit code: 0 finished, 1 failed, 2 bad input, 130 stopped by Ctrl-C, 143 by SIGTERM, 129 by a lost
        terminal.
    """
    launch = None
    told = Told(output, line)
    try:
        with ExitStack() as around:
            launch = launch_of(os.environ)
            listeners = told.listeners(launch, around)
            patience = 0.0 if launch is None else load_settings(flags, file=file).rank_timeout
            around.enter_context(joined(launch, patience=patience))
            line("making the job and its data")
            told.prepared = prepare(flags, file=file, run=run, resume=resume, listeners=listeners, launch=launch)
            stopped_by = told.prepared.train()["stopped_by"]
        code = 0 if stopped_by is None else 128 + signal.Signals[stopped_by]
    except MicrobatchError as error:
        code = told.failed(error, in_flags(str(error)), code=BAD_INPUT if told.prepared is None else FAILED)
    except KeyboardInterrupt as error:
        dropped = "" if told.prepared is None else "; the window was dropped"
        code = told.failed(error, f"stopped at once{dropped}", code=128 + signal.SIGINT)
    except Exception as error:  # noqa: BLE001 -- whatever the user's own code raises is shown as Python shows it
        code = told.crashed(error)
    if launch is not None and launch.ranks > 1:
        # Past Python's own end: the threads of a process group are not always done by then, and abort the process,
        # which the launcher would take for a failure.
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)
    return code


class Told:
    """Know who is told what of a run: people or machines, the live view, TensorBoard; of several ranks, their logs.

    Args:
        output: What is shown, and how.
        line: What a terminal shows until the run begins.

    Attributes:
        prepared: The run, once there is one.
    """

    def __init__(self, output: Output, line: Waiting) -> None:
        self._output, self._line = output, line
        self._log: RankLog | None = None
        self._launch = Launch()
        self._stderr = safe(sys.stderr)
        self.prepared: PreparedRun | None = None

    def listeners(self, launch: Launch | None, around: ExitStack) -> tuple[RunListener, ...]:
        """Make everything that is told.

        Args:
            launch: Which of the ranks this is, if there are several.
            around: What ends with the run.

        Returns:
            The listeners.
        """
        output, self._launch = self._output, launch or Launch()
        made: list[RunListener] = []
        if launch is not None:
            self._log = around.enter_context(RankLog(launch))
            made.append(self._log)
        if not self._launch.speaks:
            return tuple(made)
        stream = safe(self._line.stdout)
        console = Console(file=stream, no_color=None if output.color else True, highlight=False)
        made.append(lambda _: self._line.end())
        made.append(around.enter_context(JsonLines(stream) if output.as_json else Screen(console)))
        if output.tensorboard:
            made.append(EventFile())
        if output.watch:
            made.append(Watch(around))
        return tuple(made)

    def failed(self, error: BaseException, message: str, *, code: int) -> int:
        """Say what went wrong, and how to go on.

        Args:
            error: What was raised.
            message: What it means.
            code: What the process ends with.

        Returns:
            The code.
        """
        kind, launch = type(error).__name__, self._launch
        self._line.end()
        if self.prepared is not None:
            message += _resume_hint(self.prepared)
        if self._log is not None:
            self._log.failed(error, message)
        # What all ranks meet with is said once, and so is that another one is missing.
        if not launch.speaks and (self.prepared is None or isinstance(error, RankError)):
            return code
        if self._output.as_json and launch.speaks:
            safe(sys.stdout).write(json.dumps({"event": "error", "kind": kind, "message": message}) + "\n")
        console = Console(file=self._stderr, no_color=None if self._output.color else True, highlight=False)
        console.soft_wrap = not console.is_terminal
        print_error(console, message, label="error:" if launch.ranks == 1 else f"error on rank {launch.rank}:")
        return code

    def crashed(self, error: Exception) -> int:
        """Say that the user's own code raised, or that another rank is not there any more.

        Args:
            error: What was raised.

        Returns:
            What the process ends with.
        """
        if self._launch.ranks > 1 and is_of_the_group(error):
            return self.failed(
                error, "another rank failed or died before the run began (its own error has the cause)", code=FAILED
            )
        self._line.end()
        if self._launch.speaks or self.prepared is not None:
            traceback.print_exception(type(error), error, _of_the_user(error.__traceback__), file=self._stderr)
        where = "the job's function" if self.prepared is None else "the run"
        return self.failed(error, f"{where} failed with the {type(error).__name__} above", code=FAILED)


def _resume_hint(prepared: PreparedRun) -> str:
    saved = prepared.loop.saved_step
    if saved is None or not prepared.directory.has_checkpoints:
        return ""
    return f"\nThe checkpoint of step {saved} is safe. Go on from it with:\n  {resume_command(prepared.directory.path)}"


def _of_the_user(trace: TracebackType | None) -> TracebackType | None:
    """Drop the library's frames before the user's own code; where no code of the user's ran, all of them stay."""
    ours, inner = (str(Path(__file__).parents[1]), "<frozen importlib"), trace
    while inner is not None and inner.tb_frame.f_code.co_filename.startswith(ours):
        inner = inner.tb_next
    return inner or trace
