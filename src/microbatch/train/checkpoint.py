"""Checkpoints: written whole or not at all, checked before they are believed, read without running code."""

from __future__ import annotations

import hashlib
import json
import os
import re
import shutil
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, cast

import torch
from safetensors.torch import save_file
from torch import Tensor

from microbatch.errors import CheckpointError
from microbatch.ranks.process_group import Ranks
from microbatch.shards import is_shard, local_of
from microbatch.train.encode import decode, encode, own
from microbatch.train.first_rank import by_the_first
from microbatch.train.place import STAGES
from microbatch.train.sharded_tensors import load_parts

FORMAT, FORMAT_OF_PARTS = 1, 2
"""The second one has tensors in parts, which a version that knows the first alone would take for wholes."""
_NAME = re.compile(r"step-(\d{6,})")
_MANIFEST = "manifest.json"


@dataclass(frozen=True, slots=True)
class Checkpoint:
    """Hold what was read from one checkpoint.

    Attributes:
        path: Its folder.
        step: Optimizer steps that had been taken.
        weights: Parameters and buffers by name, on the host; tied ones under each of their names.
        state: Everything else that a run needs to go on.
    """

    path: Path
    step: int
    weights: dict[str, Tensor]
    state: dict[str, Any]


@dataclass(frozen=True, slots=True)
class Copied:
    """Hold what a checkpoint will be, in memory of its own, so that training can go on while it is written.

    Attributes:
        step: Optimizer steps taken.
        weights: Parameters and buffers by name, each memory once.
        tied: Further names of those, with the first name of each.
        plain: The state's JSON.
        tensors: The state's tensors, by path.
    """

    step: int
    weights: dict[str, Tensor]
    tied: dict[str, str]
    plain: Any
    tensors: dict[str, Tensor]

    @property
    def in_parts(self) -> bool:
        """Whether a tensor is spread over the ranks, or they have tensors of their own, as stages have."""
        return STAGES in self.plain or any(
            is_shard(tensor) for tensor in (*self.weights.values(), *self.tensors.values())
        )


def copied(*, step: int, weights: Mapping[str, Tensor], state: Mapping[str, Any]) -> Copied:
    """Copy what a checkpoint will be to the host.

    Args:
        step: Optimizer steps taken.
        weights: Parameters and buffers by name; tensors that share memory are copied once.
        state: Nested plain values and tensors, as `microbatch.train.encode.encode` takes them.

    Returns:
        The copy.

    Raises:
        CheckpointError: The state holds something that is not plain data.
    """
    plain, tensors = encode(state)
    distinct, tied = _distinct(weights)
    return Copied(step=step, weights=distinct, tied=tied, plain=plain, tensors=tensors)


def write_checkpoint(
    folder: Path, *, step: int, weights: Mapping[str, Tensor], state: Mapping[str, Any], keep: int
) -> Path:
    """Write one checkpoint so that a crash at any moment leaves either all of it or none.

    Args:
        folder: Where the run keeps its checkpoints; made if missing.
        step: Optimizer steps taken; names the checkpoint.
        weights: Parameters and buffers by name; tensors that share memory are stored once.
        state: Nested plain values and tensors, as `microbatch.train.encode.encode` takes them.
        keep: Newest checkpoints that stay; at least 1. Older ones are removed after the new one is safe.

    Returns:
        The checkpoint's folder, ``step-000123``.

    Raises:
        CheckpointError: The state holds something that is not plain data, or the disk refused.

    Cost:
        Copies the weights and the state to host memory, hashes them, and waits for the disk.
    """
    return store(folder, copied(step=step, weights=weights, state=state), keep=keep)


def store(folder: Path, what: Copied, *, keep: int, ranks: Ranks | None = None) -> Path:
    """Write what was copied, so that a crash of any rank at any moment leaves either all of it or none.

    Everything goes to a temporary folder, file by file to the disk's own memory, the manifest of hashes last; then one
    rename makes it a checkpoint. Over several ranks all of them call this: each writes what it alone holds, and the
    first what all have, the manifest and the name.

    Args:
        folder: Where the run keeps its checkpoints, which all ranks see; made if missing.
        what: The copy.
        keep: Newest checkpoints that stay; at least 1. Older ones are removed after the new one is safe.
        ranks: The ranks; `None` for a single process.

    Returns:
        The checkpoint's folder.

    Raises:
        CheckpointError: The disk refused, on any rank.

    Cost:
        Hashes what it writes, and waits for the disk; over several ranks some five small messages.
    """
    final = folder / _name(what.step)
    if ranks is not None and STAGES in what.plain:
        what = _of_all_stages(what, ranks)

    def begin() -> str:
        temporary = folder / f".writing-{final.name}-{os.getpid()}"
        folder.mkdir(parents=True, exist_ok=True)
        shutil.rmtree(temporary, ignore_errors=True)
        temporary.mkdir()
        return temporary.name

    def seal() -> str:
        document = json.dumps({"tied": what.tied, "state": what.plain})
        (temporary / "state.json").write_text(document, encoding="utf-8")
        _seal(temporary, what.step, version=FORMAT_OF_PARTS if what.in_parts else FORMAT)
        _replace(temporary, final)
        for _, old in _listed(folder)[keep:]:
            shutil.rmtree(old)
        return final.name

    temporary = folder / by_the_first(ranks, lambda: _written(begin, final))
    tied = json.dumps(what.tied)
    if ranks is None:
        _written(lambda: _save_alone(temporary, what, tied), final)
    else:
        from microbatch.train.distributed_checkpoint import save_parts  # which takes half a second to import

        save_parts(temporary, {"weights": what.weights, "state": what.tensors}, tied=tied, ranks=ranks)
    return folder / by_the_first(ranks, lambda: _written(seal, final))


def _of_all_stages(what: Copied, ranks: Ranks) -> Copied:
    """Bring together what each stage's rank says of its own tensors; the tensors are written where they are."""
    told = ranks.tell((what.tied, what.plain[STAGES]))
    # Ranks with the same stages have the same to say.
    tied = {name: first for each, _ in told for name, first in each.items()}
    stages = {stage: said for _, each in told for stage, said in each.items()}
    return replace(what, tied=tied, plain={**what.plain, STAGES: stages})


def _save_alone(folder: Path, what: Copied, tied: str) -> str:
    save_file(what.weights, folder / "weights.safetensors", metadata={"tied": tied})
    save_file(what.tensors, folder / "state.safetensors")
    return folder.name


def _written(work: Callable[[], str], final: Path) -> str:
    try:
        return work()
    except OSError as error:
        raise CheckpointError(f"the checkpoint {final} could not be written: {error}") from error


def read_newest(folder: Path, *, notice: Callable[[str], object], ranks: Ranks | None = None) -> Checkpoint:
    """Read the newest checkpoint that is whole.

    A damaged one is named, set aside under another name, and the one before it is read.

    Args:
        folder: Where the run keeps its checkpoints.
        notice: Called with one text for each checkpoint that is damaged.
        ranks: Who else reads it: the first one chooses and checks it for all of them; `None` for a single process.

    Returns:
        The checkpoint.

    Raises:
        CheckpointError: There is no checkpoint, or every one is damaged.
    """
    found: list[Checkpoint] = []

    def choose() -> str:
        found.append(_newest(folder, notice))
        return found[0].path.name

    name = by_the_first(ranks, choose)
    return found[0] if found else _read(folder / name)


def _newest(folder: Path, notice: Callable[[str], object]) -> Checkpoint:
    found = _listed(folder)
    if not found:
        raise CheckpointError(
            f"{folder.parent} holds no checkpoint to resume from; start the run again without --resume"
        )
    damaged: list[str] = []
    for _, path in found:
        try:
            checkpoint = read_checkpoint(path)
        except CheckpointError as error:
            damaged.append(str(error))
            continue
        for text in damaged:
            notice(f"{text}; going on from {checkpoint.path.name}")
        _set_aside(folder, newer_than=checkpoint.step)
        return checkpoint
    raise CheckpointError("every checkpoint of this run is damaged:\n" + "\n".join(damaged))


def read_checkpoint(path: Path) -> Checkpoint:
    """Read one checkpoint after comparing every file with its manifest.

    Args:
        path: Its folder.

    Returns:
        The checkpoint, with every tensor on the host.

    Raises:
        CheckpointError: A file is missing or differs from what was written, or the format is not this version's.

    Cost:
        Reads every file twice, once to hash it.
    """
    _verify(path)
    return _read(path)


def _read(path: Path) -> Checkpoint:
    try:
        weights = load_parts(path, "weights")
        document = json.loads((path / "state.json").read_text(encoding="utf-8"))
        manifest = json.loads((path / _MANIFEST).read_text(encoding="utf-8"))
        state = decode(document["state"], load_parts(path, "state"))
    except (OSError, ValueError, KeyError) as error:
        raise CheckpointError(f"the checkpoint {path.name} cannot be read: {error}") from error
    for alias, name in cast("dict[str, str]", document["tied"]).items():
        weights[alias] = weights[name]
    return Checkpoint(path=path, step=manifest["step"], weights=weights, state=state)


def write_text(path: Path, text: str) -> None:
    """Write a small file whole or not at all.

    Args:
        path: Where; an existing file is replaced.
        text: What, as UTF-8.
    """
    temporary = path.with_name(f".writing-{path.name}-{os.getpid()}")
    with temporary.open("w", encoding="utf-8") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())
    temporary.replace(path)
    _sync_folder(path.parent)


def clear_unfinished(folder: Path) -> None:
    """Remove what a killed process left half-written.

    Args:
        folder: Where the run keeps its checkpoints; may be missing.
    """
    for left in folder.glob(".writing-*"):
        shutil.rmtree(left, ignore_errors=True)


def _distinct(weights: Mapping[str, Tensor]) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Separate tensors from further names of the same memory, which are tied and stored once."""
    first: dict[tuple[Any, ...], str] = {}
    distinct: dict[str, Tensor] = {}
    tied: dict[str, str] = {}
    for name, tensor in weights.items():
        if tensor.layout is not torch.strided:
            raise CheckpointError(f"the weight {name!r} is a {tensor.layout} tensor, which a checkpoint cannot hold")
        # Empty tensors all have the address 0 without sharing anything, and the part of a tied one may be empty here.
        part = local_of(tensor)
        place = part.untyped_storage()._cdata, part.storage_offset()  # pyright: ignore[reportPrivateUsage]
        key = (place, tensor.device, tensor.dtype, tensor.shape, tensor.stride())
        if key in first:
            tied[name] = first[key]
        else:
            first[key] = name
            distinct[name] = own(tensor)
    return distinct, tied


def _seal(folder: Path, step: int, *, version: int) -> None:
    """Bring every file to the disk and write the manifest that says what they are."""
    files = {path.name: {"bytes": path.stat().st_size, "sha256": _hash(path)} for path in sorted(folder.iterdir())}
    for name in files:
        with (folder / name).open("rb") as file:
            os.fsync(file.fileno())
    manifest = {"format": version, "step": step, "torch": str(torch.__version__), "files": files}
    write_text(folder / _MANIFEST, json.dumps(manifest, indent=2) + "\n")


def _replace(temporary: Path, final: Path) -> None:
    if final.exists():
        # A folder cannot be renamed over another; what stands there is older or damaged.
        old = final.with_name(f".writing-old-{final.name}-{os.getpid()}")
        final.rename(old)
        temporary.rename(final)
        shutil.rmtree(old)
    else:
        temporary.rename(final)
    _sync_folder(final.parent)


def _verify(path: Path) -> None:
    def damaged(what: str) -> CheckpointError:
        return CheckpointError(f"the checkpoint {path.name} is damaged: {what}")

    try:
        manifest = json.loads((path / _MANIFEST).read_text(encoding="utf-8"))
        version, step, files = manifest["format"], manifest["step"], manifest["files"]
    except OSError as error:
        raise damaged(f"{_MANIFEST} cannot be read ({error.strerror})") from None
    except (ValueError, KeyError, TypeError):
        raise damaged(f"{_MANIFEST} is not a manifest") from None
    if version not in {FORMAT, FORMAT_OF_PARTS}:
        raise CheckpointError(
            f"the checkpoint {path.name} has format {version}, and this version reads {FORMAT} and {FORMAT_OF_PARTS}"
        )
    if path.name != _name(step):
        raise damaged(f"{_MANIFEST} says that it is step {step}")
    for name, expected in files.items():
        file = path / name
        if not file.is_file():
            raise damaged(f"{name} is missing")
        if file.stat().st_size != expected["bytes"]:
            raise damaged(f"{name} has {file.stat().st_size} bytes instead of {expected['bytes']}")
        if _hash(file) != expected["sha256"]:
            raise damaged(f"{name} is not what was written (its SHA-256 differs)")


def _name(step: int) -> str:
    return f"step-{step:06d}"


def _hash(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _listed(folder: Path) -> list[tuple[int, Path]]:
    """List the checkpoints, newest first."""
    if not folder.is_dir():
        return []
    found = [(int(match[1]), entry) for entry in folder.iterdir() if (match := _NAME.fullmatch(entry.name))]
    return sorted(found, reverse=True)


def _set_aside(folder: Path, *, newer_than: int) -> None:
    """Rename damaged checkpoints, so that they neither count as kept ones nor are found again."""
    for step, path in _listed(folder):
        if step > newer_than:
            aside = path.with_name(f"{path.name}.damaged")
            shutil.rmtree(aside, ignore_errors=True)
            path.rename(aside)


def _sync_folder(folder: Path) -> None:
    # Without this the rename itself may be lost in a power cut.
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
