"""Claim a run directory for one process, so that two runs never write to one directory."""

from __future__ import annotations

import contextlib
import itertools
import json
import os
import platform
import time
import weakref
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any, cast

from microbatch.errors import ConfigError

try:
    import fcntl
except ImportError:  # Windows
    fcntl = None

LOCK = "run.lock"
"""File in a run directory that names the process that trains in it; there is none when nothing trains there."""

_WRITTEN_WITHIN = 0.5
"""Seconds in which a process that has taken the lock has certainly written its name into the file."""

_TRIES = 100


class Claim:
    """Hold a run directory, so that no other process trains in it.

    The operating system holds the lock (``flock``) and drops it when the process ends, however it ends. The file also
    names process and host, because a lock may not be seen from another host. A forked child does not hold the lock.
    """

    def __init__(self) -> None:
        """Hold nothing yet."""
        self._made: list[Path] = []
        self._left_by = ""
        self._end: Callable[[], object] | None = None

    def take_new(self, names: Iterable[Path]) -> Path:
        """Make the first directory that does not exist yet, and hold it; of two processes, only one can make it.

        Args:
            names: Paths to try.

        Returns:
            The directory.

        Raises:
            ConfigError: No directory can be made, or all of these exist.
        """
        tries = itertools.count()
        for path in names:
            missing = _missing(path)
            try:
                path.parent.mkdir(parents=True, exist_ok=True)
                path.mkdir()
            except FileExistsError:
                continue
            except OSError as error:
                # A run that was refused at this moment may have removed the parent that both found missing.
                if isinstance(error, FileNotFoundError) and next(tries) < _TRIES:
                    continue
                raise ConfigError(f"the run directory {path} cannot be made: {error}") from error
            self._made = missing
            self.take(path)
            return path
        raise ConfigError("every name for a run directory is taken; name one with --run")

    def take(self, folder: Path, *, restarted: bool = False) -> None:
        """Hold a directory, which is made if it is missing.

        Args:
            folder: The run directory.
            restarted: Whether a launcher has ended this run's earlier processes itself, on all hosts.

        Raises:
            ConfigError: Another process holds the directory, or may hold it, or it cannot be written.
        """
        self._made = self._made or _missing(folder)
        file = folder / LOCK
        try:
            folder.mkdir(parents=True, exist_ok=True)
            descriptor, self._left_by = _taken(file, restarted=restarted)
        except OSError as error:
            raise ConfigError(f"the run directory {folder} cannot be written: {error}") from error
        # Also at the end of the process, and when nobody has the claim any more.
        self._end = weakref.finalize(self, _release, file, descriptor, os.getpid())
        if hasattr(os, "register_at_fork"):
            _not_in_children(self._end, descriptor)

    def notices(self) -> list[str]:
        """Say whose hold has been taken over.

        Returns:
            One sentence if a process died while it held the directory, else none.
        """
        if not self._left_by:
            return []
        return [f"{self._left_by}, was training in this directory and has ended without a word: its lock is taken over"]

    def release(self) -> None:
        """Let others have the directory; a second call does nothing."""
        if self._end is not None:
            self._end()

    def give_up(self) -> None:
        """Release the directory, and remove it if this claim has made it and it is empty."""
        self.release()
        with contextlib.suppress(OSError):
            for folder in self._made:
                folder.rmdir()


def _missing(path: Path) -> list[Path]:
    """List the directories that have to be made for a path, the innermost first."""
    return list(itertools.takewhile(lambda each: not each.exists(), (path, *path.parents)))


def _taken(file: Path, *, restarted: bool) -> tuple[int, str]:
    """Open and lock the file, and write this process's name into it."""
    while True:
        descriptor, new = _opened(file)
        try:
            left_by = _checked(file, descriptor, new=new, restarted=restarted)
            if left_by is not None:
                os.ftruncate(descriptor, 0)
                started = time.strftime("%Y-%m-%d %H:%M:%S %z")
                own = {"process": os.getpid(), "host": platform.node(), "started": started}
                os.pwrite(descriptor, json.dumps(own).encode(), 0)
                return descriptor, left_by
        except BaseException:
            os.close(descriptor)
            raise
        os.close(descriptor)  # its holder has just removed the file: the next one is another file


def _opened(file: Path) -> tuple[int, bool]:
    """Open the file, and return whether this call made it."""
    while True:
        try:
            return os.open(file, os.O_RDWR | os.O_CREAT | os.O_EXCL, 0o666), True
        except FileExistsError:
            with contextlib.suppress(FileNotFoundError):  # removed in between
                return os.open(file, os.O_RDWR), False


def _checked(file: Path, descriptor: int, *, new: bool, restarted: bool) -> str | None:
    """Lock the open file, and name who left it; `None` if it is no longer the file of this name."""
    locked = _locked(descriptor)
    if locked is False:
        holder = _holder(descriptor, within=_WRITTEN_WITHIN)
        raise ConfigError(
            f"{file.parent} is in use by {_words(holder)}; wait until that run has ended, or name another directory "
            "with --run"
        )
    if not _is_still(descriptor, file):
        return None
    # Without locks on this file system, only who made the file knows that nobody else holds it.
    holder = _holder(descriptor) if locked or new else _holder(descriptor, within=_WRITTEN_WITHIN)
    if holder is None:
        if locked or new:
            return ""
    elif restarted or (locked and holder.get("host") == platform.node()):
        return _words(holder)
    raise ConfigError(
        f"{file.parent} is held by {_words(holder)}, and from {platform.node()} it cannot be seen whether that process "
        f"still runs; if it has ended, remove {file} and start again"
    )


def _locked(descriptor: int) -> bool | None:
    """Lock an open file; `None` if this system, or this file system, has no locks."""
    if fcntl is None:
        return None
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    except OSError:
        return None
    return True


def _holder(descriptor: int, *, within: float = 0.0) -> Mapping[str, Any] | None:
    """Read who holds the file; `None` if it is empty, and stays so."""
    end = time.monotonic() + within
    while not (text := os.pread(descriptor, 10_000, 0)):
        if time.monotonic() >= end:
            return None
        time.sleep(0.01)
    try:
        found = json.loads(text)
    except (ValueError, RecursionError):
        return {}
    return cast("Mapping[str, Any]", found) if isinstance(found, dict) else {}


def _words(holder: Mapping[str, Any] | None) -> str:
    holder = holder or {}
    if not isinstance(holder.get("process"), int):
        return "another process"
    return f"process {holder['process']} on host {holder.get('host')}, which started at {holder.get('started')}"


def _is_still(descriptor: int, file: Path) -> bool:
    try:
        return os.path.samestat(os.fstat(descriptor), file.stat())
    except FileNotFoundError:
        return False


def _release(file: Path, descriptor: int, process: int) -> None:
    if process == os.getpid():
        with contextlib.suppress(OSError):  # the directory may be gone
            if _is_still(descriptor, file):
                file.unlink()  # while it is locked, so that nobody locks a file that is about to go
        os.close(descriptor)


def _not_in_children(end: Any, descriptor: int) -> None:
    """Close the file in forked children: a child that outlives the run must not hold the directory."""

    def forget() -> None:
        if end.alive:
            end.detach()
            os.close(descriptor)

    os.register_at_fork(after_in_child=forget)
