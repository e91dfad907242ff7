"""Runs as their files tell them: in progress or finished, of this machine or copied from another one."""

from __future__ import annotations

import asyncio
import time
import tomllib
from collections import Counter
from collections.abc import AsyncIterator, Sequence
from pathlib import Path
from typing import Any

from microbatch.errors import ConfigError
from microbatch.guide.metrics_lines import read_line, read_object
from microbatch.train.rundir import RunDirectory, jsonable

EVERY = 0.5
"""Seconds between two looks at a file."""

SILENT = 60.0
"""Seconds without a line after which a run that has not ended is said to be silent: its process may be dead."""

_MARK = 512
"""Bytes before the place that was read last, by which a file is known again: every line has times of its own."""

MOST_RUNS = 6
"""Runs that are laid over each other; more could not be told apart."""

_SHOWN = ("job", "batch_size", "microbatch_size", "memory", "steps", "learning_rate", "device", "autocast", "seed")


class WatchedRun:
    """Read a run's files as they grow.

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
        self.name = name or path.resolve().name
        if not path.is_dir():
            raise ConfigError(f"there is no run directory {path}; name one that `microbatch train` wrote")
        if not (self.files.metrics.is_file() or self.files.config.is_file()):
            raise ConfigError(f"{path} is no run directory: it has neither {self.files.metrics.name} nor config.toml")

    def described(self) -> dict[str, Any]:
        """Say what the run is and how it stands.

        Returns:
            Its name, what of its settings is worth showing, and its summary; `None` while it has none.
        """
        settings: dict[str, Any] = {}
        if self.files.config.is_file():
            try:
                settings = tomllib.loads(self.files.config.read_text(encoding="utf-8"))
            except (tomllib.TOMLDecodeError, UnicodeDecodeError, RecursionError):
                settings = {}
        # Numbers and texts alone: TOML has dates and infinities, which JSON cannot hold.
        told = {name: jsonable(settings[name]) for name in _SHOWN if isinstance(settings.get(name), str | int | float)}
        return {
            "name": self.name,
            "settings": {name: value for name, value in told.items() if value is not None},
            "summary": self._summary(),
        }

    async def since(self, last: int) -> AsyncIterator[list[dict[str, Any]]]:
        """Hand out the lines of the metrics, as they come; never ends, because a finished run may be resumed.

        A line has its number, from 1, as ``"id"``. Where the file was cut, as a resumed run cuts it, everything is
        handed out again, behind an event of the kind ``"reset"``. An event of the kind ``"summary"`` says that the run
        has ended, or, with a summary of `None`, that it goes on; one of the kind ``"silent"`` when its last line was
        written, where that is more than `SILENT` ago and nothing says that it has ended.

        Args:
            last: Lines that are known already.

        Yields:
            Lines, one or more at once.
        """
        known, place, mark = 0, 0, b""
        summary: dict[str, Any] | None = None
        silent: float | None = None
        while True:
            data = self._read(place, mark)
            if data is None:
                known, place, mark, last = 0, 0, b"", 0
                yield [{"id": 0, "kind": "reset"}]
                continue
            whole = data[: data.rfind(b"\n") + 1]
            place, mark = place + len(whole), (mark + whole)[-_MARK:]
            fresh: list[dict[str, Any]] = []
            for line in whole.splitlines():
                known += 1
                values = read_line(line)
                if known > last and values is not None:
                    fresh.append({**values, "id": known})
            before, summary = summary, self._summary()
            if summary != before:
                fresh.append({"kind": "summary", "summary": summary, "id": max(known, last)})
            before, silent = silent, self._silent_since() if summary is None else None
            if silent is not None and silent != before:
                fresh.append({"kind": "silent", "since": silent, "id": max(known, last)})
            if fresh:
                yield fresh
            await asyncio.sleep(EVERY)

    def _summary(self) -> dict[str, Any] | None:
        return read_object(self.files.summary.read_bytes()) if self.files.summary.is_file() else None

    def _silent_since(self) -> float | None:
        """Return when the last line was written, in seconds since 1970, if that is long ago."""
        written = self.files.metrics.stat().st_mtime if self.files.metrics.is_file() else None
        return written if written is not None and time.time() - written > SILENT else None

    def _read(self, place: int, mark: bytes) -> bytes | None:
        """Read from a place on; `None` where what is before it is not what it was."""
        if not self.files.metrics.is_file():
            return None if mark else b""
        with self.files.metrics.open("rb") as file:
            file.seek(place - len(mark))
            if file.read(len(mark)) != mark:
                return None
            return file.read()


def open_runs(paths: Sequence[Path]) -> list[WatchedRun]:
    """Open run directories.

    Args:
        paths: None, or up to `MOST_RUNS`.

    Returns:
        The runs.

    Raises:
        ConfigError: One is no run directory, or there are too many.
    """
    # A run that is named twice is one run.
    whole = list(dict.fromkeys(path.resolve() for path in paths))
    if len(whole) > MOST_RUNS:
        raise ConfigError(f"{len(whole)} runs are more than can be told apart; name at most {MOST_RUNS}")
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
