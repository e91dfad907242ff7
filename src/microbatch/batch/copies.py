"""Copy the values of a microbatch, so that editing them in place does not edit the user's batch."""

from __future__ import annotations

import copy
from collections import UserList, deque
from collections.abc import Sequence
from typing import Any, cast

import torch
from torch import Tensor

from microbatch.arguments import attribute
from microbatch.batch.walk import children, held_in, is_array, map_leaves, slices_itself
from microbatch.errors import BatchError
from microbatch.kind_words import kind_of

_SMALL = 1 << 16  # elements: one operator is faster than two; above, `clone` is, which uses all threads
_IMMUTABLE = (type(None), str, bytes, int, float, complex)


class Copies:
    """Copy values that share memory with the user's batch, each of them once.

    Without copies, a loss function that edits its microbatch in place would edit the user's batch. A second pass over
    the same rows, after memory ran out or in the second encoding, would then see edited rows.

    Args:
        device: Device of the model. Tensors on other devices are not copied, because the move to this device does it.

    Source:
        Law E8.
    """

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self._made: dict[int, tuple[Any, Any]] = {}  # with the value itself, so that no other value gets its id

    def __call__(self, value: Any) -> Any:
        """Copy a value and what it holds; a tensor that was copied before has one copy."""
        if isinstance(value, _IMMUTABLE):
            return value
        made = self._made.get(id(value))
        if made is None:
            made = self._made[id(value)] = value, self._copy(value)
        return made[1]

    def _leaf(self, value: Any, _: str) -> Any:
        return self(value)

    def _copy(self, value: Any) -> Any:
        if isinstance(value, Tensor):
            return value.clone() if value.device == self.device else value
        if children(value) is not None:
            return map_leaves(self._leaf, value)
        if type(value) in {list, UserList, deque}:
            return type(value)([self(each) for each in cast("Sequence[Any]", value)])
        if is_array(value):
            return value.copy() if callable(attribute(value, "copy")) else value
        if slices_itself(value):
            make = attribute(value, "clone") or attribute(value, "copy")
            return make() if callable(make) else self._deep(value)
        return copy.copy(value) if type(value) in {set, bytearray} else value

    def _deep(self, value: Any) -> Any:
        """Copy an object that cannot copy itself, with the tensors and arrays in it."""
        # Copied beforehand, because a deep copy of a view copies the memory of the whole batch.
        found = [each for each in held_in(value) if isinstance(each, Tensor) or is_array(each)]
        try:
            return copy.deepcopy(value, {id(each): self(each) for each in found})
        except Exception as error:
            raise BatchError(
                f"{kind_of(value)} in the batch cannot be copied ({type(error).__name__}: {error!s:.200}), and a loss "
                "function that edits its microbatch would edit the batch. Give the class a method clone()"
            ) from error


def rows_copied(tensor: Tensor, start: int, stop: int, *, device: torch.device | None) -> Tensor:
    """Take consecutive rows of a tensor, and copy them.

    Args:
        tensor: Shape ``(rows, ...)``.
        start: First row.
        stop: One past the last row.
        device: Tensors on other devices are not copied; `None` copies none.

    Returns:
        The rows, in the memory format of the tensor.
    """
    if tensor.device != device:
        return tensor[start:stop]
    small = tensor.numel() < _SMALL and tensor.ndim < 4  # images may be contiguous in two memory formats
    if small and type(tensor) is Tensor and tensor.is_cpu and tensor.is_contiguous():
        return tensor.narrow_copy(0, start, stop - start)
    return tensor[start:stop].clone()
