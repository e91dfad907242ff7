"""Tensors of which every rank holds a part: read as wholes, and dealt out again to any number of ranks."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any, cast

import torch
from safetensors import safe_open
from torch import Tensor

from microbatch.errors import CheckpointError
from microbatch.shards import is_shard, local_of
from microbatch.train.checkpoint_shape import read_parts

PARTS = "parts"
"""In a file's metadata: which of its tensors are parts, of what, and where they belong."""


def with_part(tensor: Tensor, part: Tensor) -> Tensor:
    """Make a tensor that is dealt out to the ranks as another one is.

    Args:
        tensor: The other one.
        part: What this rank holds of the new one.

    Returns:
        The new one; ``part`` itself where the other is not sharded.
    """
    if not is_shard(tensor):
        return part
    like = cast("Any", tensor)
    return sys.modules["torch.distributed.tensor"].DTensor.from_local(
        part, like.device_mesh, like.placements, run_check=False, shape=like.shape, stride=like.stride()
    )


def dealt(whole: Tensor, *, like: Tensor) -> Tensor:
    """Deal a whole tensor out to the ranks as another one is.

    Args:
        whole: The same on every rank.
        like: The other one.

    Returns:
        ``whole`` itself where the other is not sharded.

    Cost:
        No communication: every rank takes its part of what it has.
    """
    if not is_shard(like) or is_shard(whole):
        return whole
    other = cast("Any", like)
    local = whole.to(local_of(like).device)
    return sys.modules["torch.distributed.tensor"].distribute_tensor(
        local, other.device_mesh, other.placements, src_data_rank=None
    )


def load_parts(path: Path, stem: str) -> dict[str, Tensor]:
    """Read all files of one stem and put parts together.

    Args:
        path: The checkpoint's folder.
        stem: Such as ``"weights"``.

    Returns:
        Whole tensors by name, on the host.

    Raises:
        CheckpointError: A part is missing.
    """
    whole: dict[str, Tensor] = {}
    filled: dict[str, int] = {}
    for file in sorted(path.glob(f"{stem}*.safetensors")):
        with safe_open(file, framework="pt") as opened:
            reader = cast("Any", opened)
            parts = read_parts((reader.metadata() or {}).get(PARTS, "{}"), name=file.name)
            for key in reader.keys():  # noqa: SIM118 - it is no dict
                tensor = cast("Tensor", reader.get_tensor(key))
                if key not in parts:
                    whole[key] = tensor
                    continue
                name, shape, offsets = parts[key]["name"], parts[key]["shape"], parts[key]["offsets"]
                place = tuple(slice(o, o + n) for o, n in zip(offsets, tensor.shape, strict=True))
                whole.setdefault(name, torch.empty(shape, dtype=tensor.dtype))[place] = tensor
                filled[name] = filled.get(name, 0) + tensor.numel()
    for name, numbers in filled.items():
        if numbers != whole[name].numel():
            raise CheckpointError(f"{path.name} has {numbers} of the {whole[name].numel()} numbers of {name!r}")
    return whole
