"""The live view beside a training: a process of its own, so that looking on never holds up a step."""

from __future__ import annotations

import subprocess
import sys
from contextlib import ExitStack, suppress
from pathlib import Path

from microbatch.errors import MissingDependencyError
from microbatch.train.run_events import RunEvent, RunPlanned


class Watch:
    """Open the live view when a run begins, and close it when the run is over; a listener of the run.

    Args:
        beside: What is left when the run is over.

    Raises:
        MissingDependencyError: The packages of the guide are not installed.
    """

    def __init__(self, beside: ExitStack) -> None:
        try:
            import starlette
            import uvicorn
        except ImportError as error:
            raise MissingDependencyError(
                f'--watch needs the package "{error.name}"; install it with: pip install "microbatch[guide]"'
            ) from error
        del starlette, uvicorn
        self._beside = beside

    def __call__(self, event: RunEvent) -> None:
        """Open the view when the run begins.

        Args:
            event: What happened.
        """
        if isinstance(event, RunPlanned):
            self._open(event.path)

    def _open(self, run: Path) -> None:
        # Its address goes to standard error: standard output may be for machines. Ctrl-C ends it as well.
        command = [sys.executable, "-m", "microbatch", "guide", str(run)]
        process = subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=sys.stderr)  # noqa: S603 -- our own
        self._beside.callback(_end, process)


def _end(process: subprocess.Popen[bytes]) -> None:
    process.terminate()
    with suppress(subprocess.TimeoutExpired):
        process.wait(5)
        return
    process.kill()
    process.wait()
