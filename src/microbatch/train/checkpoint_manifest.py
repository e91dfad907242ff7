"""List the files of a checkpoint with their hashes, and compare a checkpoint with that list."""

from __future__ import annotations

import hashlib
import json
import os
from pathlib import Path
from typing import Any

import torch

from microbatch.errors import CheckpointError
from microbatch.train.atomic_files import write_text
from microbatch.train.checkpoint_shape import MANIFEST_SHAPE, check_shape, read_json

MANIFEST = "manifest.json"
FORMAT, FORMAT_OF_PARTS = 1, 2
"""In the second format tensors may be in parts; a version that knows only the first would read a part as a whole."""


def checkpoint_name(step: int) -> str:
    """Return the name of a step's checkpoint folder.

    Args:
        step: Optimizer steps taken.

    Returns:
        The name.

    Example:
        >>> checkpoint_name(123)
        'step-000123'
    """
    return f"step-{step:06d}"


def write_manifest(folder: Path, step: int, *, version: int) -> None:
    """Flush every file of a checkpoint to the disk, then write the manifest with their sizes and hashes.

    All files get the mode that the user's umask gives to a new file; safetensors makes its own unreadable for others.

    Args:
        folder: The checkpoint's folder, with all its other files.
        step: Optimizer steps taken.
        version: `FORMAT` or `FORMAT_OF_PARTS`.
    """
    files = {path.name: {"bytes": path.stat().st_size, "sha256": _hash(path)} for path in sorted(folder.iterdir())}
    for name in files:
        with (folder / name).open("rb") as file:
            os.fsync(file.fileno())
    manifest = {"format": version, "step": step, "torch": str(torch.__version__), "files": files}
    write_text(folder / MANIFEST, json.dumps({**manifest, "seal": _seal(manifest)}, indent=2) + "\n")
    mode = (folder / MANIFEST).stat().st_mode & 0o777
    for name in files:
        (folder / name).chmod(mode)


def verify(path: Path) -> None:
    """Compare every file of a checkpoint with its manifest.

    Args:
        path: The checkpoint's folder.

    Raises:
        CheckpointError: A file is missing or has changed, or this version does not read the format.
    """
    try:
        fault = _fault_of(path)
    except (CheckpointError, OSError) as error:
        fault = f"is damaged: {error}"
    if fault is not None:
        raise CheckpointError(f"the checkpoint {path.name} {fault}")


def _fault_of(path: Path) -> str | None:
    """Describe the first difference between a checkpoint and its manifest; `None` where there is none."""
    found = read_json(path / MANIFEST)
    version = found.get("format") if isinstance(found, dict) else None
    if type(version) is int and version not in {FORMAT, FORMAT_OF_PARTS}:
        return f"has format {version}, and this version reads {FORMAT} and {FORMAT_OF_PARTS}"
    manifest = check_shape(found, MANIFEST_SHAPE, name=MANIFEST)
    step, files, seal = manifest["step"], manifest["files"], manifest.get("seal")
    unknown = set(manifest) - {"format", "step", "torch", "files", "seal"}
    # Checkpoints of earlier versions have no seal.
    if unknown or (seal is not None and seal != _seal({key: manifest[key] for key in manifest if key != "seal"})):
        return f"is damaged: {MANIFEST} is not what was written"
    if path.name != checkpoint_name(step):
        return f"is damaged: {MANIFEST} has step {step}"
    if missing := {"weights.safetensors", "state.safetensors", "state.json"} - set(files):
        return f"is damaged: {MANIFEST} does not list {min(missing)}"
    for name, expected in files.items():
        file = path / name
        if not file.is_file():
            return f"is damaged: {name} is missing"
        if file.stat().st_size != expected["bytes"]:
            return f"is damaged: {name} has {file.stat().st_size} bytes instead of {expected['bytes']}"
        if _hash(file) != expected["sha256"]:
            return f"is damaged: {name} is not what was written (its SHA-256 differs)"
    return None


def _seal(manifest: dict[str, Any]) -> str:
    """Hash everything else that a manifest says, so that a change of any of it is seen."""
    return hashlib.sha256(json.dumps(manifest, sort_keys=True).encode()).hexdigest()


def _hash(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
