"""Tensors of which every rank holds a part: `torch.distributed.tensor.DTensor`, where somebody has imported it."""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor


def is_shard(tensor: object) -> bool:
    """Tell whether a tensor is spread over ranks.

    Args:
        tensor: Any.

    Returns:
        Whether it is a `DTensor`.
    """
    # Importing it takes longer than all else here, and who has not imported it has none.
    found: Any = sys.modules.get("torch.distributed.tensor")
    return found is not None and isinstance(tensor, found.DTensor)


def local_of(tensor: Tensor) -> Tensor:
    """Return what this rank holds of a tensor.

    Args:
        tensor: Any; not one that a graph is to lead to.

    Returns:
        This rank's part, in the same memory; the tensor itself where it is all here.
    """
    part: Any = tensor
    return part._local_tensor if is_shard(tensor) else tensor


def norm_of(shards: Sequence[Tensor], *, norm: Callable[[Sequence[Tensor]], Tensor]) -> Tensor:
    """Return the Euclidean norm of tensors that are spread over ranks.

    Args:
        shards: Of any placements without pending sums; the same ones in the same order on every rank.
        norm: Norm of tensors that are here.

    Returns:
        The norm, the same on every rank; shape ``()``.

    Cost:
        One all-reduce of 8 bytes for each dimension of each mesh.
    """
    by_mesh: dict[Any, dict[int, list[Tensor]]] = {}
    for shard in shards:
        spread: Any = shard
        mesh, copies = spread.device_mesh, 1
        for dimension, placement in enumerate(spread.placements):
            copies *= mesh.size(dimension) if placement.is_replicate() else 1
        by_mesh.setdefault(mesh, {}).setdefault(copies, []).append(local_of(shard))
    squares: list[Tensor] = []
    dtype = torch.float32
    for mesh, by_copies in by_mesh.items():
        # What several ranks hold, each of them counts a part of.
        parts = [norm(found).double().square() / copies for copies, found in by_copies.items()]
        square = torch.stack(parts).sum()
        for dimension in range(mesh.ndim):
            dist.all_reduce(square, group=mesh.get_group(dimension))
        squares.append(square)
        dtype = max([dtype, *(each.dtype for found in by_copies.values() for each in found)], key=lambda d: d.itemsize)
    return torch.stack(squares).sum().sqrt().to(dtype)
