"""Copy the state of a run, so that training can continue while the copy is written."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from microbatch.errors import CheckpointError
from microbatch.shards import is_shard, local_of
from microbatch.train.encode import encode, own
from microbatch.train.place import STAGES


@dataclass(frozen=True, slots=True)
class Copied:
    """Hold a copy of the contents of a checkpoint, so that training can continue while the copy is written.

    Attributes:
        step: Optimizer steps taken.
        weights: Parameters and buffers by name; each tied tensor only once.
        tied: The other names of tied tensors, each with the first name.
        plain: The state as plain values, for JSON.
        tensors: The state's tensors, by path.
    """

    step: int
    weights: dict[str, Tensor]
    tied: dict[str, str]
    plain: Any
    tensors: dict[str, Tensor]

    @property
    def in_parts(self) -> bool:
        """Return whether a tensor is sharded over the ranks, or each rank has its own tensors, as in a pipeline."""
        return STAGES in self.plain or any(
            is_shard(tensor) for tensor in (*self.weights.values(), *self.tensors.values())
        )


def copied(*, step: int, weights: Mapping[str, Tensor], state: Mapping[str, Any]) -> Copied:
    """Copy the contents of a checkpoint to the host.

    Args:
        step: Optimizer steps taken.
        weights: Parameters and buffers by name; tensors that share memory are copied once.
        state: Nested plain values and tensors, as `microbatch.train.encode.encode` takes them.

    Returns:
        The copy.

    Raises:
        CheckpointError: The state holds a value that is not plain data, or a weight is not a dense tensor.
    """
    plain, tensors = encode(state)
    distinct, tied = _distinct(weights)
    return Copied(step=step, weights=distinct, tied=tied, plain=plain, tensors=tensors)


def _distinct(weights: Mapping[str, Tensor]) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Copy each tensor once, and list the other names of tied tensors."""
    first: dict[tuple[Any, ...], str] = {}
    distinct: dict[str, Tensor] = {}
    tied: dict[str, str] = {}
    for name, tensor in weights.items():
        if tensor.layout is not torch.strided:
            raise CheckpointError(f"the weight {name!r} is a {tensor.layout} tensor, which a checkpoint cannot hold")
        # The address of the storage object, not of the data: the data of every empty tensor is at address 0, and this
        # rank's part of a sharded tensor may be empty.
        part = local_of(tensor)
        place = part.untyped_storage()._cdata, part.storage_offset()  # pyright: ignore[reportPrivateUsage]
        key = (place, tensor.device, tensor.dtype, tensor.shape, tensor.stride())
        if key in first:
            tied[name] = first[key]
        else:
            first[key] = name
            distinct[name] = own(tensor)
    return distinct, tied
