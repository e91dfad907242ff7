"""Find the Python files and notebooks of a folder, without those that are not the user's own."""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator, Sequence
from fnmatch import fnmatch
from pathlib import Path

from microbatch.linting.finding import Finding
from microbatch.linting.sources import unreadable

__all__ = ["find_files", "shown"]

_SUFFIXES = (".py", ".ipynb")
_NOT_OURS = frozenset({"node_modules", "build", "__pycache__"})


def shown(file: Path) -> str:
    """Return the name that findings show for a file: relative to the current folder if it is inside, with slashes."""
    try:
        return Path(os.path.abspath(file)).relative_to(Path.cwd()).as_posix()  # noqa: PTH100 - links stay as they are
    except (ValueError, OSError):
        return file.as_posix()


def find_files(
    paths: Iterable[Path], *, exclude: Sequence[str] = (), base: Path | None = None
) -> Iterator[Path | Finding]:
    """Yield the files that paths name, in order, each once.

    A file is yielded whatever it is called. A folder is walked: its `.py` and `.ipynb` files are yielded. Hidden names,
    `node_modules`, `build`, `__pycache__` and virtual environments are left out. Links to folders are not followed.

    Args:
        paths: Files and folders.
        exclude: Patterns for what a walk leaves out: a name, or a path relative to `base`; `*` stands for any text.
        base: The folder that patterns are relative to; the current one where it is `None`.

    Yields:
        A file, or the finding MB000 for a path that does not exist or a folder that cannot be opened.
    """
    seen = set[str]()
    patterns = [pattern.strip("/").removeprefix("./") for pattern in exclude]
    base = Path.cwd() if base is None else base
    for path in paths:
        try:
            is_folder, exists = path.is_dir(), os.path.lexists(path)
        except (OSError, ValueError) as error:
            yield unreadable(shown(path), str(error))
            continue
        if not exists:
            yield unreadable(shown(path), "there is no such file or folder")
            continue
        for file in _walk(path, patterns, base) if is_folder else [path]:
            real = file.path if isinstance(file, Finding) else os.path.realpath(file)
            if real not in seen:
                seen.add(real)
                yield file


def _walk(folder: Path, patterns: Sequence[str], base: Path) -> Iterator[Path | Finding]:
    waiting = [folder]
    while waiting:
        here = waiting.pop()
        try:
            with os.scandir(here) as scanned:
                entries = sorted(scanned, key=lambda entry: entry.name)
        except OSError as error:
            yield unreadable(shown(here), error.strerror or str(error))
            continue
        inner = list[Path]()
        for entry in entries:
            path = Path(entry.path)
            if entry.name.startswith(".") or (patterns and _is_excluded(path, patterns, base)):
                continue
            if entry.is_dir(follow_symlinks=False):
                if entry.name not in _NOT_OURS and not (path / "pyvenv.cfg").exists():
                    inner.append(path)
            elif path.suffix in _SUFFIXES and not os.path.isdir(path):  # noqa: PTH112 - a link to itself is none
                yield path
        waiting += reversed(inner)


def _is_excluded(path: Path, patterns: Sequence[str], base: Path) -> bool:
    whole = os.path.relpath(path, base).replace(os.sep, "/")
    return any(fnmatch(path.name, pattern) or fnmatch(whole, pattern) for pattern in patterns)
