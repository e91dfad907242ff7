"""Large uninitialised tensors on memory that this window has used before."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

# From here on the C library maps memory anew for every tensor, and each page of it faults when it is first written:
# a third of the time of a matrix product with few rows.
SMALLEST = 32 << 20

# How many hold a storage; private to torch, so that memory is not used again where it cannot be told.
_torch: Any = torch._C  # pyright: ignore[reportPrivateUsage]
_holders: Callable[[int], int] | None = getattr(_torch, "_storage_Use_Count", None)


class Scratch:
    """Make large tensors in memory that nobody holds any more, rather than in fresh pages.

    Each microbatch of a window makes the same few large tensors, such as the logits and their gradient. On the CPU
    their memory goes back to the system and is asked for again each time. Here the storage is kept, and used again
    once nothing else holds it: no tensor, view, graph or array.

    Nothing is kept during the first microbatch, when gradients come into being: later, what is kept was part of the
    peak anyway.

    Cost:
        Memory for what is kept, until `forget`.
    """

    def __init__(self) -> None:
        self._keeping = False
        self._kept: list[torch.UntypedStorage] = []

    def keep(self) -> None:
        """Keep the memory of what is made from now on."""
        self._keeping = _holders is not None

    def forget(self) -> None:
        """Let go of everything, and keep nothing any more."""
        self._keeping = False
        self._kept.clear()

    def empty(self, shape: Sequence[int], *, like: Tensor) -> Tensor:
        """Make an uninitialised, contiguous tensor.

        Args:
            shape: Its shape.
            like: Has its dtype and device.

        Returns:
            The tensor, which shares memory with nothing that is alive.
        """
        size = torch.Size(shape).numel() * like.itemsize
        if not self._keeping or size < SMALLEST or like.device.type != "cpu" or type(like) is not Tensor:
            return torch.empty(shape, dtype=like.dtype, device=like.device)
        free = [storage for storage in self._kept if _is_free(storage)]
        # Not much larger than needed: microbatches cut by length grow shorter.
        found = next((storage for storage in free if size <= storage.nbytes() <= 2 * size), None)
        if found is None:
            self._kept = [storage for storage in self._kept if not any(storage is each for each in free)]
            free.clear()
            made = torch.empty(shape, dtype=like.dtype)
            self._kept.append(made.untyped_storage())
            return made
        laid_out = torch.empty(shape, device="meta")
        return torch.empty(0, dtype=like.dtype).set_(found, 0, laid_out.shape, laid_out.stride())


def _is_free(storage: torch.UntypedStorage) -> bool:
    return _holders is not None and _holders(storage._cdata) <= _ALONE  # pyright: ignore[reportPrivateUsage]


def _count_alone() -> int:
    storage: Any = torch.UntypedStorage(1)
    return 0 if _holders is None else _holders(storage._cdata)


_ALONE = _count_alone()
