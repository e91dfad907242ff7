"""What one rank of several has said, in the run directory."""

from __future__ import annotations

import io
import json
import os
import platform
import time
import traceback
from contextlib import ExitStack, redirect_stderr, redirect_stdout
from types import TracebackType
from typing import Self, TextIO

from torch.distributed.elastic.multiprocessing.errors import get_error_handler

from microbatch.cli.json_lines import JsonLines
from microbatch.train.launch import Launch
from microbatch.train.run_events import RunEvent, RunPlaced


class RankLog(io.TextIOBase):
    """Keep a rank's log: who it is, every event as a line of JSON, and what else it would have said.

    The file is ``logs/rank-3.log`` in the run directory, and goes on where an earlier launch of the same run ended. Of
    all ranks but the first, it also has what they, the job and Python print, which would otherwise come in between the
    first one's lines; the launcher's own ``--log-dir`` has what native code prints.

    Args:
        launch: Which rank it is.
    """

    def __init__(self, launch: Launch) -> None:
        self._launch = launch
        self._file: TextIO | None = None
        self._early: list[str] = []
        self._events = JsonLines(self)  # type: ignore[arg-type]
        self._around = ExitStack()

    def __enter__(self) -> Self:
        """Begin.

        Returns:
            Itself.
        """
        launch = self._launch
        started = time.strftime("%Y-%m-%d %H:%M:%S %z")
        said = {"event": "launch", "rank": launch.rank, "ranks": launch.ranks, "restarts": launch.restarts}
        self.write(json.dumps({**said, "host": platform.node(), "process": os.getpid(), "time": started}) + "\n")
        if not launch.speaks:
            self._around.enter_context(redirect_stdout(self))
            self._around.enter_context(redirect_stderr(self))
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Let the process print again; the file stays open for what went wrong."""
        self._around.close()

    def __call__(self, event: RunEvent) -> None:
        """Write one event.

        Args:
            event: What happened.
        """
        if isinstance(event, RunPlaced) and self._file is None:
            folder = event.path / "logs"
            folder.mkdir(parents=True, exist_ok=True)
            self._file = (folder / f"rank-{self._launch.rank}.log").open("a", encoding="utf-8")
            self._file.writelines(self._early)
        self._events(event)

    def write(self, text: str) -> int:
        """Write what would have been printed.

        Args:
            text: Any text.

        Returns:
            Its length.
        """
        if self._file is None:
            self._early.append(text)
        else:
            self._file.write(text)
            self._file.flush()
        return len(text)

    def failed(self, error: BaseException, message: str) -> None:
        """Write what went wrong, and tell the launcher, which shows it in its own report.

        Args:
            error: What was raised.
            message: What it means.
        """
        self.write("".join(traceback.format_exception(error)))
        self.write(json.dumps({"event": "error", "kind": type(error).__name__, "message": message}) + "\n")
        if "TORCHELASTIC_ERROR_FILE" in os.environ:
            get_error_handler().record_exception(error)
