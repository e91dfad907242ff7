"""Sharded tensors (`torch.distributed.tensor.DTensor`): detection, local shards and norms."""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

PLAIN = {Tensor, nn.Parameter}
"""The types whose values and memory can be read and compared."""


def is_shard(tensor: object) -> bool:
    """Return whether a tensor is sharded over ranks.

    Args:
        tensor: A tensor, or any other object.

    Returns:
        Whether it is a `DTensor`.
    """
    # The import is slow, and there is no DTensor before other code has imported the module.
    found: Any = sys.modules.get("torch.distributed.tensor")
    return found is not None and isinstance(tensor, found.DTensor)


def shards_among(tensors: Sequence[Tensor]) -> list[Tensor]:
    """Return the tensors that are sharded over ranks; without a look at each, if nothing has imported `DTensor`."""
    if "torch.distributed.tensor" not in sys.modules or PLAIN.issuperset(map(type, tensors)):
        return []
    return [tensor for tensor in tensors if is_shard(tensor)]


def local_of(tensor: Tensor) -> Tensor:
    """Return this rank's shard of a tensor.

    Args:
        tensor: A tensor, sharded or not. Autograd does not record this function.

    Returns:
        This rank's shard, in the same memory; the tensor itself if it is not sharded.
    """
    part: Any = tensor
    return part._local_tensor if is_shard(tensor) else tensor


def norm_of(shards: Sequence[Tensor], *, norm: Callable[[Sequence[Tensor]], Tensor]) -> Tensor:
    """Return the Euclidean norm of tensors that are sharded over ranks.

    Args:
        shards: Sharded tensors, in the same order on every rank; any placements except partial sums.
        norm: Returns the norm of local tensors.

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
        # If several ranks hold the same elements, each rank counts only its part of their squares.
        parts = [norm(found).double().square() / copies for copies, found in by_copies.items()]
        square = torch.stack(parts).sum()
        for dimension in range(mesh.ndim):
            dist.all_reduce(square, group=mesh.get_group(dimension))
        squares.append(square)
        dtype = max([dtype, *(each.dtype for found in by_copies.values() for each in found)], key=lambda d: d.itemsize)
    return torch.stack(squares).sum().sqrt().to(dtype)
