"""The run directory: configuration, metrics, checkpoints and summary of one run."""

from __future__ import annotations

import contextlib
import json
import math
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any, cast

from microbatch.errors import CheckpointError, ConfigError
from microbatch.train.atomic_files import clear_unfinished, write_text
from microbatch.train.run_lock import LOCK


class RunDirectory:
    """Know where a run keeps its files.

    Attributes:
        path: The directory.
        config: The resolved settings, ``config.toml``.
        metrics: One line of JSON for each optimizer step, ``metrics.jsonl``.
        checkpoints: Folder of checkpoints.
        summary: What came of the run, ``summary.json``.
        logs: Folder of what every rank of a distributed run has said.
    """

    def __init__(self, path: Path) -> None:
        """Name the files; touch nothing.

        Args:
            path: The run directory; need not exist.
        """
        self.path = path
        self.config = path / "config.toml"
        self.metrics = path / "metrics.jsonl"
        self.checkpoints = path / "checkpoints"
        self.summary = path / "summary.json"
        self.logs = path / "logs"

    @property
    def has_checkpoints(self) -> bool:
        """Whether there is anything to go on from."""
        return any(self.checkpoints.glob("step-*"))

    def check_new(self) -> None:
        """Refuse a directory that holds something already.

        Raises:
            ConfigError: It holds a run with checkpoints, or files that are no run's, or cannot be a directory.
        """
        if self.path.exists() and not self.path.is_dir():
            raise ConfigError(f"--run {self.path} is a file; name a directory")
        if self.has_checkpoints:
            raise ConfigError(f"{self.path} already holds a run; add --resume to go on with it, or name another --run")
        own = {self.logs, self.path / LOCK}
        if self.path.is_dir() and not self.config.exists() and any(each not in own for each in self.path.iterdir()):
            raise ConfigError(f"{self.path} is not empty and holds no run; name a new directory with --run")

    def check_resumable(self) -> None:
        """Refuse to resume what is not a run.

        Raises:
            CheckpointError: There is no such directory, no configuration in it, or no checkpoint.
        """
        if not self.path.is_dir():
            raise CheckpointError(f"there is no run directory {self.path} to resume; check --run")
        if not self.config.is_file():
            raise CheckpointError(f"{self.path} is not a run directory: it has no {self.config.name}")
        if not self.has_checkpoints:
            raise CheckpointError(f"{self.path} holds no checkpoint to resume from; start it again without --resume")

    def start(self, *, config: str, files: Mapping[str, str]) -> None:
        """Make the directory and store what the run is.

        Args:
            config: The resolved settings, as TOML.
            files: Names and texts that the job wants beside its checkpoints.

        Raises:
            ConfigError: A file's name leads out of the directory, or the disk refused.
        """
        try:
            self.path.mkdir(parents=True, exist_ok=True)
            clear_unfinished(self.checkpoints)
            write_text(self.config, config)
            for name, text in files.items():
                if Path(name).name != name or name in {self.config.name, self.metrics.name, self.summary.name, LOCK}:
                    raise ConfigError(f"the job's file {name!r} must be a plain name that the run does not use itself")
                write_text(self.path / name, text)
        except OSError as error:
            raise ConfigError(f"the run directory {self.path} cannot be written: {error}") from error

    def write_summary(self, text: str) -> None:
        """Write what came of the run.

        Args:
            text: JSON.

        Raises:
            CheckpointError: The disk refused, or the directory is gone.
        """
        try:
            write_text(self.summary, text)
        except OSError as error:
            raise CheckpointError(_refused(self.summary, error)) from error


class MetricsLog:
    """Append one line of JSON for each step, and take back those that a checkpoint does not know.

    Every line is handed to the operating system as soon as it is written, so a killed process loses none; `sync`
    brings them to the disk before a checkpoint counts on them. A log whose file is gone says so at the next line: what
    a process writes to a removed file, nobody reads.
    """

    def __init__(self, path: Path, *, after_step: int) -> None:
        """Open the log, and cut off every line of a later step, whole or torn.

        Args:
            path: The file; made if missing.
            after_step: The step that the run goes on from; 0 starts afresh.
        """
        self._path = path
        self._file = path.open("a+b")
        self._file.truncate(_bytes_up_to(path, after_step))

    def write(self, record: Mapping[str, Any]) -> None:
        """Append one line.

        Args:
            record: Plain values; numbers that are not finite become ``null``, which JSON can hold.

        Raises:
            CheckpointError: The file has been removed or renamed, or the disk refused.
        """
        try:
            there = os.path.samestat(os.fstat(self._file.fileno()), self._path.stat())
            self._file.write((json.dumps(jsonable(record), ensure_ascii=False) + "\n").encode())
            self._file.flush()
        except OSError as error:
            raise CheckpointError(_refused(self._path, error)) from error
        if not there:
            raise CheckpointError(_gone(self._path))

    def sync(self) -> None:
        """Wait until every line is on the disk.

        Raises:
            CheckpointError: The disk refused.
        """
        try:
            os.fsync(self._file.fileno())
        except OSError as error:
            raise CheckpointError(_refused(self._path, error)) from error

    def close(self) -> None:
        """Close the file; what the disk refused, `write` and `sync` have said."""
        with contextlib.suppress(OSError):
            self._file.close()


def _refused(file: Path, error: OSError) -> str:
    """Say why a file of the run cannot be written."""
    if isinstance(error, FileNotFoundError):
        return _gone(file)
    return f"{file} could not be written: {error.strerror or error}; see the disk, then go on with --resume"


def _gone(file: Path) -> str:
    return (
        f"{file} is gone: the run directory {file.parent}, or this file, was removed or renamed during the run, so the "
        "run can keep nothing. Put it back and continue from its newest checkpoint, or start a new run"
    )


def _bytes_up_to(path: Path, step: int) -> int:
    size = 0
    with path.open("rb") as file:
        for line in file:
            try:
                known = line.endswith(b"\n") and json.loads(line)["step"] <= step
            except (ValueError, KeyError, TypeError):
                known = False
            if not known:
                break
            size += len(line)
    return size


def jsonable(value: Any) -> Any:
    """Replace what strict JSON cannot hold.

    Args:
        value: Nested plain values.

    Returns:
        The same with infinities and NaN as `None`, and paths as texts.

    Example:
        >>> jsonable({"loss": float("nan"), "steps": [1, 2.5]})
        {'loss': None, 'steps': [1, 2.5]}
    """
    if isinstance(value, Mapping):
        return {str(key): jsonable(item) for key, item in cast("Mapping[Any, Any]", value).items()}
    if isinstance(value, list | tuple):
        return [jsonable(item) for item in cast("list[Any]", value)]
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    return str(value) if isinstance(value, Path) else value
