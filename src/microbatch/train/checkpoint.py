"""Write checkpoints whole or not at all, and read them after a check of their hashes, without running code."""

from __future__ import annotations

import json
import os
import re
import shutil
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, TypeVar

from safetensors.torch import save_file
from torch import Tensor

from microbatch.errors import CheckpointError
from microbatch.ranks.process_group import RankGroup
from microbatch.train.atomic_files import replace_folder
from microbatch.train.checkpoint_copy import Copied, copied
from microbatch.train.checkpoint_manifest import (
    FORMAT,
    FORMAT_OF_PARTS,
    checkpoint_name,
    verify,
    write_manifest,
)
from microbatch.train.checkpoint_shape import read_document
from microbatch.train.encode import decode
from microbatch.train.first_rank import by_the_first
from microbatch.train.place import STAGES
from microbatch.train.sharded_tensors import load_parts

Result = TypeVar("Result")
_NAME = re.compile(r"step-(\d{6,})")


@dataclass(frozen=True, slots=True)
class Checkpoint:
    """Hold the contents of one checkpoint.

    Attributes:
        path: The checkpoint's folder.
        step: Optimizer steps taken before it.
        weights: Parameters and buffers by name, on the host; a tied tensor is under each of its names.
        state: Everything else that a run needs to continue.
    """

    path: Path
    step: int
    weights: dict[str, Tensor]
    state: dict[str, Any]


def write_checkpoint(
    folder: Path, *, step: int, weights: Mapping[str, Tensor], state: Mapping[str, Any], keep: int
) -> Path:
    """Write one checkpoint of a single process; a crash at any moment leaves either the whole checkpoint or none.

    Args:
        folder: Folder of the run's checkpoints; created if missing, in a folder that exists.
        step: Optimizer steps taken; the checkpoint is named after this number.
        weights: Parameters and buffers by name; tensors that share memory are stored once.
        state: Nested plain values and tensors, as `microbatch.train.encode.encode` takes them.
        keep: Number of newest checkpoints that stay; at least 1. Older ones are removed once the new one is safe.

    Returns:
        The checkpoint's folder, ``step-000123``.

    Raises:
        CheckpointError: The state holds a value that is not plain data, or the disk could not be written.

    Cost:
        Copies the weights and the state to host memory, hashes the files, and waits for the disk.
    """
    return store(folder, copied(step=step, weights=weights, state=state), keep=keep)


def store(folder: Path, what: Copied, *, keep: int, best: int | None = None, ranks: RankGroup | None = None) -> Path:
    """Write a copied checkpoint; a crash of any rank at any moment leaves either the whole checkpoint or none.

    All files are written to a temporary folder and flushed to the disk, the manifest with their hashes last. Then one
    rename makes the folder a checkpoint. With several ranks, all of them call this function. Each rank writes the
    tensors that it alone holds. Rank 0 writes the tensors that all ranks hold and the manifest, and renames the folder.

    Args:
        folder: Folder of the run's checkpoints, which all ranks can read; created if missing, in a
            folder that exists.
        what: The copy.
        keep: Number of newest checkpoints that stay; at least 1. Older ones are removed once the new one is safe.
        best: The step whose checkpoint stays, however old; `None` for none.
        ranks: The ranks; `None` for a single process.

    Returns:
        The checkpoint's folder.

    Raises:
        CheckpointError: The disk could not be written, on any rank.

    Cost:
        Hashes the files and waits for the disk; with several ranks about five small messages.
    """
    final = folder / checkpoint_name(what.step)
    if ranks is not None and STAGES in what.plain:
        what = _of_all_stages(what, ranks)

    def begin() -> str:
        temporary = folder / f".writing-{final.name}-{os.getpid()}"
        folder.mkdir(exist_ok=True)  # without its parents: a run directory that is gone is not made again
        shutil.rmtree(temporary, ignore_errors=True)
        temporary.mkdir()
        return temporary.name

    def seal() -> str:
        document = json.dumps({"tied": what.tied, "state": what.plain})
        (temporary / "state.json").write_text(document, encoding="utf-8")
        write_manifest(temporary, what.step, version=FORMAT_OF_PARTS if what.in_parts else FORMAT)
        replace_folder(temporary, final)
        for step, old in _listed(folder)[keep:]:
            if step != best:
                shutil.rmtree(old)
        return final.name

    temporary = folder / by_the_first(ranks, lambda: _written(begin, final))
    tied = json.dumps(what.tied)
    if ranks is None:
        _written(lambda: _save_alone(temporary, what, tied), final)
    else:
        from microbatch.train.distributed_checkpoint import save_parts  # this import takes half a second

        save_parts(temporary, {"weights": what.weights, "state": what.tensors}, tied=tied, ranks=ranks)
    return folder / by_the_first(ranks, lambda: _written(seal, final))


def _of_all_stages(what: Copied, ranks: RankGroup) -> Copied:
    """Gather the tied names and the plain state of all stages; each rank still writes its own tensors."""
    told = ranks.tell((what.tied, what.plain[STAGES]))
    # Ranks with the same stages send the same values.
    tied = {name: first for each, _ in told for name, first in each.items()}
    stages = {stage: said for _, each in told for stage, said in each.items()}
    return replace(what, tied=tied, plain={**what.plain, STAGES: stages})


def _save_alone(folder: Path, what: Copied, tied: str) -> str:
    """Write the tensors of a single process."""
    save_file(what.weights, folder / "weights.safetensors", metadata={"tied": tied})
    save_file(what.tensors, folder / "state.safetensors")
    return folder.name


def _written(work: Callable[[], str], final: Path) -> str:
    """Run a function that writes, and convert an error of the disk to a `CheckpointError`."""
    try:
        return work()
    except OSError as error:
        run = final.parent.parent
        why = f"the run directory {run} is gone, removed or renamed while the run was training"
        raise CheckpointError(
            f"the checkpoint {final} could not be written: {error if run.is_dir() else why}"
        ) from error


def read_newest(
    folder: Path,
    *,
    notice: Callable[[str], object],
    ranks: RankGroup | None = None,
    check: Callable[[Mapping[str, Any]], object] | None = None,
) -> Checkpoint:
    """Read the newest checkpoint that is whole.

    A damaged checkpoint is reported and renamed, and the checkpoint before it is read.

    Args:
        folder: Folder of the run's checkpoints.
        notice: Called with one text for each damaged checkpoint.
        ranks: The ranks that read it, of which rank 0 chooses and checks the checkpoint; `None` for a single process.
        check: Called with the state of a checkpoint, and raises `CheckpointError` if it is malformed; `None` takes any.

    Returns:
        The checkpoint.

    Raises:
        CheckpointError: There is no checkpoint, or every checkpoint is damaged.
    """
    found: list[Checkpoint] = []

    def choose() -> str:
        found.append(_newest(folder, notice, check))
        return found[0].path.name

    name = by_the_first(ranks, choose)
    return found[0] if found else _read(folder / name)


def _newest(
    folder: Path, notice: Callable[[str], object], check: Callable[[Mapping[str, Any]], object] | None
) -> Checkpoint:
    found = _listed(folder)
    if not found:
        raise CheckpointError(
            f"{folder.parent} holds no checkpoint to resume from; start the run again without --resume"
        )
    damaged: list[str] = []
    for _, path in found:
        try:
            checkpoint = read_checkpoint(path)
            if check is not None:
                _checked(path, lambda state=checkpoint.state: check(state))
        except CheckpointError as error:
            damaged.append(str(error))
            continue
        for text in damaged:
            notice(f"{text}; going on from {checkpoint.path.name}")
        _set_aside(folder, newer_than=checkpoint.step)
        return checkpoint
    raise CheckpointError("every checkpoint of this run is damaged:\n" + "\n".join(damaged))


def read_checkpoint(path: Path) -> Checkpoint:
    """Read one checkpoint, after a check of every file against the manifest.

    Args:
        path: The checkpoint's folder.

    Returns:
        The checkpoint, with every tensor on the host.

    Raises:
        CheckpointError: A file is missing or has changed, or this version does not read the format.

    Cost:
        Reads every file twice, once to hash it.
    """
    verify(path)
    return _read(path)


def _read(path: Path) -> Checkpoint:
    return _checked(path, lambda: _read_files(path))


def _read_files(path: Path) -> Checkpoint:
    weights = load_parts(path, "weights")
    document = read_document(path / "state.json")
    state = decode(document["state"], load_parts(path, "state"))
    for alias, name in document["tied"].items():
        weights[alias] = weights[name]
    return Checkpoint(path=path, step=int(path.name.removeprefix("step-")), weights=weights, state=state)


def _checked(path: Path, read: Callable[[], Result]) -> Result:
    """Read from a checkpoint, and convert every error to one that names the checkpoint."""
    try:
        return read()
    except CheckpointError as error:
        raise CheckpointError(f"the checkpoint {path.name} is damaged: {error}") from error
    except MemoryError:
        raise
    except Exception as error:  # no code of the user's runs here, so what was read is at fault
        raise CheckpointError(f"the checkpoint {path.name} cannot be read: {error!a}") from error


def _listed(folder: Path) -> list[tuple[int, Path]]:
    """List the checkpoints, newest first."""
    if not folder.is_dir():
        return []
    found = [(int(match[1]), entry) for entry in folder.iterdir() if (match := _NAME.fullmatch(entry.name))]
    return sorted(found, reverse=True)


def _set_aside(folder: Path, *, newer_than: int) -> None:
    """Rename damaged checkpoints, so that they are not counted or found again."""
    for step, path in _listed(folder):
        if step > newer_than:
            aside = path.with_name(f"{path.name}.damaged")
            shutil.rmtree(aside, ignore_errors=True)
            path.rename(aside)
