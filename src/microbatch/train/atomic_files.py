"""Write files and folders so that a crash leaves either the old one or the new one, and never a half."""

from __future__ import annotations

import os
import shutil
from pathlib import Path


def write_text(path: Path, text: str) -> None:
    """Write a small text file whole or not at all.

    Args:
        path: Path of the file; an existing file is replaced.
        text: The text, which is encoded as UTF-8.
    """
    temporary = path.with_name(f".writing-{path.name}-{os.getpid()}")
    with temporary.open("w", encoding="utf-8") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())
    temporary.replace(path)
    sync_folder(path.parent)


def replace_folder(temporary: Path, final: Path) -> None:
    """Rename a finished folder to its final name, and remove the folder that had this name.

    Args:
        temporary: The finished folder, with every file on the disk.
        final: The final name, on the same file system.
    """
    if final.exists():
        # A folder cannot be renamed over another one. The existing folder is older or damaged.
        old = final.with_name(f".writing-old-{final.name}-{os.getpid()}")
        final.rename(old)
        temporary.rename(final)
        shutil.rmtree(old)
    else:
        temporary.rename(final)
    sync_folder(final.parent)


def sync_folder(folder: Path) -> None:
    """Flush a folder's entries to the disk, so that a power cut does not undo a rename in it.

    Args:
        folder: The folder.
    """
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def clear_unfinished(folder: Path) -> None:
    """Remove the unfinished checkpoints of killed processes.

    Args:
        folder: Folder of the run's checkpoints; it may be missing.
    """
    for left in folder.glob(".writing-*"):
        shutil.rmtree(left, ignore_errors=True)
