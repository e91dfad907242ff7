"""Runs as their files tell them: in progress or finished, of this machine or copied from another one."""

from __future__ import annotations

import asyncio
import json
import tomllib
from collections.abc import AsyncIterator, Sequence
from pathlib import Path
from typing import Any

from microbatch.errors import ConfigError
from microbatch.train.rundir import RunDirectory

EVERY = 0.5
"""Seconds between two looks at a file."""

_MARK = 512
"""Bytes before the place that was read last, by which a file is known again: every line has times of its own."""

MOST_RUNS = 6
"""Runs that are laid over each other; more could not be told apart."""

_SHOWN = ("job", "batch_size", "microbatch_size", "memory", "steps", "learning_rate", "device", "autocast", "seed")


class WatchedRun:
    """Read a run's files as they grow.

    Attributes:
        files: Where they are.
    """

    def __init__(self, path: Path) -> None:
        """Name the run.

        Args:
            path: Its directory.

        Raises:
            ConfigError: It is no run directory.
        """
        self.files = RunDirectory(path)
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
            except (tomllib.TOMLDecodeError, UnicodeDecodeError):
                settings = {}
        return {
            "name": self.files.path.resolve().name,
            "settings": {name: settings[name] for name in _SHOWN if name in settings},
            "summary": self._summary(),
        }

    async def since(self, last: int) -> AsyncIterator[list[dict[str, Any]]]:
        """Hand out the lines of the metrics, as they come; never ends, because a finished run may be resumed.

        A line has its number, from 1, as ``"id"``. Where the file was cut, as a resumed run cuts it, everything is
        handed out again, behind an event of the kind ``"reset"``. An event of the kind ``"summary"`` says that the run
        has ended, or, with a summary of `None`, that it goes on.

        Args:
            last: Lines that are known already.

        Yields:
            Lines, one or more at once.
        """
        known, place, mark = 0, 0, b""
        summary: dict[str, Any] | None = None
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
                values = _object(line)
                if known > last and values is not None:
                    fresh.append({**values, "id": known})
            before, summary = summary, self._summary()
            if summary != before:
                fresh.append({"kind": "summary", "summary": summary, "id": max(known, last)})
            if fresh:
                yield fresh
            await asyncio.sleep(EVERY)

    def _summary(self) -> dict[str, Any] | None:
        return _object(self.files.summary.read_bytes()) if self.files.summary.is_file() else None

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
    if len(paths) > MOST_RUNS:
        raise ConfigError(f"{len(paths)} runs are more than can be told apart; name at most {MOST_RUNS}")
    return [WatchedRun(path) for path in paths]


def _object(text: bytes) -> dict[str, Any] | None:
    """Read an object; `None` for what is none, such as a line that was torn."""
    try:
        value = json.loads(text)
    except ValueError:
        return None
    return value if isinstance(value, dict) else None
