"""Runs as their files tell them: in progress or finished, of this machine or copied from another one."""

from __future__ import annotations

import asyncio
import threading
import time
import tomllib
from collections import Counter, deque
from collections.abc import AsyncIterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from microbatch.errors import ConfigError
from microbatch.guide.metrics_file import MetricsFile
from microbatch.guide.metrics_lines import printable, read_lines, read_setting, read_summary
from microbatch.guide.swept_runs import runs_in
from microbatch.guide.thinning import Thinned, passes
from microbatch.train.rundir import RunDirectory

EVERY = 0.5
"""Seconds between two looks at a file."""

SILENT = 60.0
"""Seconds without a line after which a run that has not ended is said to be silent: its process may be dead."""

MOST_RUNS = 6
"""Runs that are laid over each other; more could not be told apart."""

MOST_FRESH, MOST_FRESH_PASSES = 1000, 16_384
"""Newest lines that are kept as they are, and passes in all of them together. Whoever knows less gets a thinned run."""

SKETCHED = 4 << 20
"""Bytes from which on a file is first sampled, because reading all of it takes a while."""

SAMPLES = 500
"""Places of a sample."""

MOST_SMALL_FILE = 1 << 20
"""Bytes that are read of the settings and of the summary."""

_SHOWN = ("job", "batch_size", "microbatch_size", "memory", "steps", "learning_rate", "device", "autocast", "seed")

Events = list[dict[str, Any]]


@dataclass(slots=True)
class Viewer:
    """What one viewer has been told of a run.

    Attributes:
        reading: Number of the reading of the file that its picture is from; 0 before the first picture.
        line: Number of the last line that was told.
        fresh: Lines that were told since the last thinned run.
        percent: Of the file that was read when it was told last; below 100 the picture is a sample.
        standing: Summary, silence and trouble, as they were told last.
    """

    reading: int = 0
    line: int = 0
    fresh: int = 0
    percent: int = 0
    standing: dict[str, Any] = field(default_factory=dict[str, Any])


class WatchedRun:
    """Read a run's files as they grow, once for all viewers and in bounded memory.

    Attributes:
        files: Where they are.
        name: What it is called.
    """

    def __init__(self, path: Path, *, name: str | None = None) -> None:
        """Name the run.

        Args:
            path: Its directory.
            name: What it is called; by default as the directory is.

        Raises:
            ConfigError: It is no run directory.
        """
        self.files = RunDirectory(path)
        self.name = printable(name or path.resolve().name)
        if not path.is_dir():
            raise ConfigError(f"there is no run directory {path}; name one that `microbatch train` wrote")
        if not (self.files.metrics.is_file() or self.files.config.is_file()):
            raise ConfigError(f"{path} is no run directory: it has neither {self.files.metrics.name} nor config.toml")
        self._lock = threading.Lock()
        self._file = MetricsFile(self.files.metrics)
        self._reading = 0
        self._begin()

    def described(self) -> dict[str, Any]:
        """Say what the run is.

        Returns:
            Its name, what of its settings is worth showing, and what is wrong with its settings, or `None`.

        Cost:
            Reads a small file; not for an event loop.
        """
        settings: dict[str, Any] = {}
        trouble = None
        if self.files.config.is_file():
            try:
                settings = tomllib.loads(_read(self.files.config).decode())
            except (OSError, ValueError, RecursionError) as error:
                trouble = f"{self.files.config.name} cannot be read: {_why(error)}"
        told = {name: read_setting(settings.get(name)) for name in _SHOWN}
        shown = {name: value for name, value in told.items() if value is not None}
        return {"name": self.name, "settings": shown, "trouble": trouble}

    async def follow(self) -> AsyncIterator[Events]:
        """Tell a viewer about the run, as its files grow; never ends, because a finished run may be resumed.

        Files are read in a thread, a piece at a time, so that no other run and no other request waits for them.

        Yields:
            Events, one or more at once, each with an ``"id"``, the number of a line. Those without a ``"kind"`` are
            lines of metrics. An event of the kind ``"reset"`` begins the picture anew: all that follows is the thinned
            run, and then each line as it is written. Of a long file a sample comes first. The other kinds are
            ``"totals"``, of the whole run, with the ``"percent"`` of the file that has been read; ``"summary"``, which
            is `None` while the run goes on; ``"silent"``, with the time of the last line, where that is more than
            `SILENT` ago and no summary says that the run has ended; and ``"trouble"``: what cannot be read, and why.
        """
        viewer = Viewer()
        while True:
            events, behind = await asyncio.to_thread(self._look, viewer)
            if events:
                yield events
            if not behind:
                await asyncio.sleep(EVERY)

    def _begin(self) -> None:
        """Forget what was read."""
        self._reading += 1
        self._long = False
        self._sketch: Thinned | None = None
        self._thinned = Thinned()
        self._fresh: deque[dict[str, Any]] = deque()
        self._fresh_passes = 0
        self._before_fresh = 0  # number of the last line that is no longer among the fresh ones
        self._lines = 0
        self._percent = 0

    def _look(self, viewer: Viewer) -> tuple[Events, bool]:
        """Read the next piece; return what a viewer does not know yet, and whether more is waiting."""
        with self._lock:
            behind, troubles = False, list[str]()
            try:
                if self._sketch is None:
                    self._sketch = self._sampled()
                behind = self._advance()
            except OSError as error:
                troubles.append(f"{self.files.metrics.name} cannot be read: {_why(error)}")
            events = self._picture(viewer)
            return [*events, *self._standing(viewer, troubles)], behind

    def _sampled(self) -> Thinned:
        """Sketch a long file from some of its lines."""
        sketch = Thinned()
        self._long = self.files.metrics.is_file() and self.files.metrics.stat().st_size >= SKETCHED
        if self._long:
            for number, line in enumerate(read_lines(self._file.sample(SAMPLES)), start=1):
                if line is not None:
                    sketch.add({**line, "id": number})
        return sketch

    def _advance(self) -> bool:
        """Read the next piece; return whether more is waiting."""
        piece = self._file.read()
        if piece is None:
            self._begin()
            return False  # a file that is another one at every look is not read all the time
        for line in read_lines(piece.lines):
            self._lines += 1
            if line is None:
                self._thinned.add_unreadable(self._lines)
            else:
                line["id"] = self._lines
                self._thinned.add(line)
                self._keep(line)
        if not piece.behind or self._percent == 100:  # once at the end, it stays there
            self._percent = 100
        else:
            self._percent = min(99, int(100 * piece.share))
        return piece.behind

    def _keep(self, line: dict[str, Any]) -> None:
        """Keep a line as it is, among the newest."""
        self._fresh.append(line)
        self._fresh_passes += passes(line)
        while len(self._fresh) > MOST_FRESH or (self._fresh_passes > MOST_FRESH_PASSES and len(self._fresh) > 1):
            gone = self._fresh.popleft()
            self._fresh_passes -= passes(gone)
            self._before_fresh = gone["id"]

    def _picture(self, viewer: Viewer) -> Events:
        """Return the lines and totals that a viewer does not know yet."""
        whole = self._percent == 100
        totals = {
            "kind": "totals",
            "id": self._lines,
            "percent": self._percent,
            **(self._thinned.totals if whole else {}),
        }
        follows = viewer.reading == self._reading and (viewer.percent == 100) == whole
        if follows and (viewer.line, viewer.percent) == (self._lines if whole else 0, self._percent):
            return []
        if not whole:
            if self._sketch is None or not self._long:
                return []  # a short file is read at once
            lines = [] if follows else self._sketch.lines()
        elif follows and viewer.line >= self._before_fresh and viewer.fresh < MOST_FRESH:
            lines = [line for line in self._fresh if line["id"] > viewer.line]
            viewer.fresh += len(lines)
        else:
            follows, lines, viewer.fresh = False, self._thinned.lines(), 0
        viewer.reading, viewer.line, viewer.percent = self._reading, self._lines if whole else 0, self._percent
        if follows:
            return [*lines, totals]
        viewer.standing = {}
        return [{"kind": "reset", "id": self._lines}, *lines, totals]

    def _standing(self, viewer: Viewer, troubles: list[str]) -> Events:
        """Return what has changed of the run itself."""
        summary = None
        try:
            if self.files.summary.is_file():
                summary = read_summary(_read(self.files.summary))
                if summary is None:
                    troubles.append(f"{self.files.summary.name} is no summary of a run")
        except OSError as error:
            troubles.append(f"{self.files.summary.name} cannot be read: {_why(error)}")
        silent = self._silent_since() if summary is None else None
        now = {"summary": summary, "silent": silent, "trouble": "; ".join(troubles) or None}
        changed = [kind for kind, value in now.items() if value != viewer.standing.get(kind)]
        viewer.standing = now
        return [{"kind": kind, kind: now[kind], "id": self._lines} for kind in changed]

    def _silent_since(self) -> float | None:
        """Return when the last line was written, in seconds since 1970, if that is long ago."""
        try:
            written = self.files.metrics.stat().st_mtime
        except OSError:
            return None
        return written if time.time() - written > SILENT else None


async def follow_runs(runs: Sequence[WatchedRun]) -> AsyncIterator[Events]:
    """Tell a viewer about several runs, on one stream: a browser opens only six connections to one server.

    Args:
        runs: Each is read in its own task, so that none waits for another one's disk.

    Yields:
        One event with the number of the run, ``"run"``, and the run's own ``"events"``. A run whose reading fails in a
        way that nobody foresaw says so, and the others go on.
    """
    queue: asyncio.Queue[dict[str, Any]] = asyncio.Queue(maxsize=1)

    async def pass_on(number: int, run: WatchedRun) -> None:
        events: Events = []
        try:
            async for events in run.follow():
                await queue.put({"id": events[-1]["id"], "run": number, "events": events})
        except Exception as error:  # noqa: BLE001 -- whatever one run's files do must not end the others' stream
            events = [{"kind": "trouble", "trouble": f"the run cannot be followed: {_why(error)}", "id": 0}]
            await queue.put({"id": 0, "run": number, "events": events})

    tasks = [asyncio.create_task(pass_on(number, run)) for number, run in enumerate(runs)]
    try:
        while True:
            yield [await queue.get()]
    finally:
        for task in tasks:
            task.cancel()


def open_runs(paths: Sequence[Path]) -> list[WatchedRun]:
    """Open run directories.

    Of a sweep's folder, one run of each batch size is opened.

    Args:
        paths: None, or up to `MOST_RUNS`.

    Returns:
        The runs.

    Raises:
        ConfigError: One is no run directory, or there are too many.
    """
    # A run that is named twice is one run.
    whole = list(dict.fromkeys(run.resolve() for path in paths for run in runs_in(path)))
    if len(whole) > MOST_RUNS:
        raise ConfigError(f"{len(whole)} runs are too many for one picture; name at most {MOST_RUNS}")
    return [WatchedRun(path, name=name) for path, name in zip(whole, _names(whole), strict=True)]


def _names(paths: Sequence[Path]) -> list[str]:
    """Name every directory by as little of its path as tells it from the others."""
    names = [path.name for path in paths]
    for parts in range(2, max((len(path.parts) for path in paths), default=0) + 1):
        seen = Counter(names)
        names = [
            str(Path(*path.parts[-parts:])) if seen[name] > 1 else name for path, name in zip(paths, names, strict=True)
        ]
    return names


def _read(path: Path) -> bytes:
    """Read a small file, of which a longer one is cut off."""
    with path.open("rb") as file:
        return file.read(MOST_SMALL_FILE)


def _why(error: Exception) -> str:
    """Say in a few words why a file cannot be read."""
    words = error.strerror if isinstance(error, OSError) and error.strerror else str(error)
    return printable(words or type(error).__name__)
