"""A checkpoint that several ranks write together: PyTorch's distributed checkpoint, in files that run no code."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, cast

from safetensors.torch import save_file
from torch import Tensor
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.default_planner import DefaultSavePlanner
from torch.distributed.checkpoint.metadata import Metadata, StorageMeta
from torch.distributed.checkpoint.planner import SavePlan, SavePlanner, WriteItem, WriteItemType
from torch.distributed.checkpoint.state_dict_saver import save
from torch.distributed.checkpoint.storage import StorageWriter, WriteResult
from torch.futures import Future

from microbatch.errors import CheckpointError
from microbatch.ranks.process_group import RankGroup
from microbatch.train.sharded_tensors import PARTS


def save_parts(folder: Path, files: Mapping[str, Mapping[str, Tensor]], *, tied: str, ranks: RankGroup) -> None:
    """Write tensors, each once: what every rank has alike by the first, parts by whoever holds them.

    PyTorch's distributed checkpoint plans who writes what; the files are safetensors, as those of a single process, so
    that reading them runs no code: ``weights.safetensors`` of the first rank, ``weights-3.safetensors`` of another.

    Args:
        folder: Where; it exists.
        files: Tensors by name, by the stem of the file that they go to; the same stems on every rank. A name that
            several ranks have is one tensor.
        tied: Further names of the first file's tensors, as JSON.
        ranks: All of which call this.

    Raises:
        CheckpointError: A rank could not write.
    """
    tensors = {f"{stem}/{name}": tensor for stem, group in files.items() for name, tensor in group.items()}
    planner = DefaultSavePlanner(
        flatten_state_dict=False, flatten_sharded_tensors=False, dedup_save_to_lowest_rank=True
    )
    writer = _PartsWriter(folder, list(files), tied=tied, rank=ranks.index)
    try:
        save(tensors, storage_writer=writer, planner=planner, process_group=ranks.group)
    except CheckpointException as error:
        failed = "; ".join(f"rank {rank}: {failure[0]}" for rank, failure in error.failures.items())
        raise CheckpointError(f"the checkpoint in {folder} could not be written: {failed}") from error


class _PartsWriter(StorageWriter):
    """Write what the plan gives to this rank into one safetensors file of each stem."""

    def __init__(self, folder: Path, stems: Sequence[str], *, tied: str, rank: int) -> None:
        self._folder, self._stems, self._tied, self._rank = folder, stems, tied, rank

    def reset(self, checkpoint_id: object = None) -> None:
        """Begin; there is nothing to forget.

        Args:
            checkpoint_id: Torch's name of the checkpoint, of which the folder says as much.
        """

    def set_up_storage_writer(self, is_coordinator: bool, *_: Any, **__: Any) -> None:  # noqa: FBT001 - torch's
        """Begin; the folder is there.

        Args:
            is_coordinator: Whether this rank plans.
        """

    def prepare_local_plan(self, plan: SavePlan) -> SavePlan:
        """Take the plan as it is.

        Args:
            plan: What this rank could write.

        Returns:
            The same.
        """
        return plan

    def prepare_global_plan(self, plans: list[SavePlan]) -> list[SavePlan]:
        """Take the plans as they are.

        Args:
            plans: Of all ranks.

        Returns:
            The same.
        """
        return plans

    def write_data(self, plan: SavePlan, planner: SavePlanner) -> Future[list[WriteResult]]:
        """Write this rank's files.

        Args:
            plan: What it writes.
            planner: Who has the tensors.

        Returns:
            What was written.
        """
        results: list[WriteResult] = []
        for stem in self._stems:
            items = [item for item in plan.items if item.index.fqn.startswith(f"{stem}/")]
            # The first rank's files are always there: whoever reads a checkpoint knows them by name.
            if items or self._rank == 0:
                file = self._folder / (f"{stem}.safetensors" if self._rank == 0 else f"{stem}-{self._rank}.safetensors")
                self._write(file, items, planner, tied=self._tied if stem == self._stems[0] else None)
                results += [WriteResult(item.index, file.stat().st_size, file.name) for item in items]
        done: Future[list[WriteResult]] = Future()
        done.set_result(results)
        return done

    def finish(self, metadata: Metadata, results: list[list[WriteResult]]) -> None:
        """End; the manifest is written when all is on the disk.

        Args:
            metadata: What all ranks wrote; every file says it of itself.
            results: Likewise.
        """

    @classmethod
    def validate_checkpoint_id(cls, checkpoint_id: object) -> bool:
        """Take any name.

        Args:
            checkpoint_id: Torch's name of the checkpoint.

        Returns:
            True.
        """
        del checkpoint_id
        return True

    def storage_meta(self) -> StorageMeta | None:
        """Say nothing beside what the files say.

        Returns:
            `None`.
        """
        return None

    def _write(self, file: Path, items: Iterable[WriteItem], planner: SavePlanner, *, tied: str | None) -> None:
        tensors: dict[str, Tensor] = {}
        parts: dict[str, Any] = {}
        for item in items:
            name = item.index.fqn.partition("/")[2]
            tensor = cast("Tensor", planner.resolve_data(item))
            if item.type == WriteItemType.SHARD and item.tensor_data is not None:
                offsets = list(item.tensor_data.chunk.offsets)
                key = f"{name}@{','.join(map(str, offsets))}"
                parts[key] = {"name": name, "shape": list(item.tensor_data.size), "offsets": offsets}
                name = key
            tensors[name] = tensor.detach().to("cpu").contiguous()
        said = ({} if tied is None else {"tied": tied}) | ({PARTS: json.dumps(parts)} if parts else {})
        save_file(tensors, file, metadata=said or None)
