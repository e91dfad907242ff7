"""Programs in processes forked from one that has imported torch, which is most of what their starts would take.

`Forked` and `completed` are what tests use. As a script, this file is the place that forks: lines on the standard input
are programs, one after the other; for each, two lines come back, the number of its process and its exit status.
"""

import atexit
import importlib
import json
import os
import runpy
import select
import signal
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

# What ranks and runs import, and what takes long.
IMPORTED = (
    "torch._dynamo",
    "torch.distributed.checkpoint",
    "torch.distributed.fsdp",
    "microbatch.cli.train_command",
)


class Forked:
    """Run a Python program as ``Popen([sys.executable, *command])`` does, its output in files.

    A program has a place of its own while it runs. So two ranks differ in what a process begins with, such as the order
    of a set of texts.

    Args:
        command: A script or ``-m`` and a module, and the arguments.
        out: The file, or terminal, that the standard output is written to; a file for `communicate` if it is left out.
        err: The same for the standard error.
        cwd: The folder in which it runs.
        env: The whole environment.
    """

    places: list[Any] = []  # noqa: RUF012 - of all

    def __init__(
        self,
        command: list[str],
        *,
        out: Path | None = None,
        err: Path | None = None,
        cwd: Path | None = None,
        env: dict[str, str] | None = None,
    ) -> None:
        self.command = command
        self.out, self.err = (each or Path(tempfile.mkstemp()[1]) for each in (out, err))
        free = (each for each in self.places if not each.busy)
        self.place = next(free, None) or self.start_place()
        self.place.busy = True
        job = {"command": command, "out": str(self.out), "err": str(self.err), "cwd": str(cwd or Path.cwd())}
        self.place.stdin.write(json.dumps({**job, "env": env or dict(os.environ)}).encode() + b"\n")
        self.returncode: int | None = None
        self._pid: int | None = None

    @classmethod
    def start_place(cls) -> Any:
        pipe, environment = subprocess.PIPE, {**os.environ, "OMP_NUM_THREADS": "1"}
        place: Any = subprocess.Popen([sys.executable, __file__], stdin=pipe, stdout=pipe, bufsize=0, env=environment)
        cls.places.append(place)
        return place

    @property
    def pid(self) -> int:
        """Wait for its start."""
        if self._pid is None:
            self._pid = int(self.place.stdout.readline())
        return self._pid

    def poll(self) -> int | None:
        """Return the exit status, negative if a signal ended it, or `None` while it runs."""
        return self.wait(timeout=0)

    def wait(self, timeout: float | None = None) -> int | None:
        """Wait for the end, and return as `poll`."""
        if self.returncode is None and self.pid and select.select([self.place.stdout], [], [], timeout)[0]:
            self.returncode = int(self.place.stdout.readline())
            self.place.busy = False
        return self.returncode

    def communicate(self, timeout: float) -> tuple[str, str]:
        """Wait for the end, and return what was written; the files are removed."""
        if self.wait(timeout) is None:
            self.kill()
            self.wait()
            raise subprocess.TimeoutExpired(self.command, timeout)
        texts = self.out.read_text(), self.err.read_text()
        self.out.unlink()
        self.err.unlink()
        return texts

    def send_signal(self, number: int) -> None:
        if self.poll() is None:
            os.kill(self.pid, number)

    def kill(self) -> None:
        self.send_signal(signal.SIGKILL)


def completed(command: list[str], **how: Any) -> subprocess.CompletedProcess[str]:
    """Run a program to its end, as ``subprocess.run([sys.executable, *command])`` does."""
    process = Forked(command, **how)
    out, err = process.communicate(timeout=120)
    assert process.returncode is not None
    return subprocess.CompletedProcess(command, process.returncode, out, err)


@atexit.register
def close_places() -> None:
    """End the places: their input has come to an end."""
    for place in Forked.places:
        place.communicate()


def run(job: dict[str, Any]) -> None:
    """Do what Python does when it is started with the command."""
    os.chdir(job["cwd"])
    writes = os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_APPEND | os.O_NOCTTY
    for file, stream in ((os.open(os.devnull, os.O_RDONLY), 0), (os.open(job["out"], writes), 1)):
        os.dup2(file, stream)
    os.dup2(1 if job["err"] == job["out"] else os.open(job["err"], writes), 2)
    for text in (sys.stdout, sys.stderr):
        text.reconfigure(line_buffering=text.isatty() or text is sys.stderr)  # pyright: ignore[reportAttributeAccessIssue]
    os.environ.clear()
    os.environ.update(job["env"])
    program, *arguments = job["command"]
    if program == "-m":
        sys.path.insert(0, job["cwd"])
        sys.argv = arguments
        runpy.run_module(arguments[0], run_name="__main__", alter_sys=True)
    else:
        sys.path.insert(0, str(Path(program).parent))
        sys.argv = [program, *arguments]
        runpy.run_path(program, run_name="__main__")
    sys.exit()


def tell(number: int) -> None:
    sys.stdout.write(f"{number}\n")
    sys.stdout.flush()


def serve() -> None:
    del sys.path[0]  # where this file is
    for name in IMPORTED:
        importlib.import_module(name)
    package: Any = importlib.import_module("microbatch")
    for name in package.__all__:  # each is imported when it is first asked for
        getattr(package, name)
    for line in sys.stdin:
        process = os.fork()
        if not process:
            run(json.loads(line))
        tell(process)
        tell(os.waitstatus_to_exitcode(os.waitpid(process, 0)[1]))


if __name__ == "__main__":
    serve()
