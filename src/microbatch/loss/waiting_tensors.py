"""What a waiting microbatch holds, given up until its turn."""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterable
from typing import Any, TypeAlias

import torch
from torch import Tensor, UntypedStorage
from torch.utils.weak import TensorWeakRef

Park: TypeAlias = Callable[[Tensor], Callable[[], Tensor] | None]
"""Puts a tensor away and returns what brings it back; `None` where it stays."""


class Parking:
    """Give up the memory of what one microbatch has computed and still holds, while the others have their turns.

    A tensor that a frame of the forward pass holds, such as the way around a residual block, cannot be taken away; but
    its memory can, as long as nobody looks. Only what the microbatch itself made for its graph is taken: another one
    that uses it is refused.

    Args:
        park: Where to; `None` gives up nothing.
        resized: Called with every storage whose memory went or came back.
    """

    def __init__(self, park: Park | None, resized: Callable[[UntypedStorage], None]) -> None:
        self._park, self._resized = park, resized
        self._seen: list[TensorWeakRef] = []
        self._parked: list[tuple[weakref.ref[UntypedStorage], int, Callable[[], Tensor]]] = []

    def saw(self, out: object) -> None:
        """Remember what this microbatch has made.

        Args:
            out: What a function returned.
        """
        if self._park is not None and type(out) is Tensor and out.grad_fn is not None and _is_whole(out):
            self._seen.append(TensorWeakRef(out))

    @torch.no_grad()
    def leave(self) -> None:
        """Give up the memory of what is still alive."""
        if self._park is None:
            return
        alive = [(ref, tensor) for ref in self._seen if (tensor := ref()) is not None]
        self._seen = [ref for ref, _ in alive]
        for _, tensor in alive:
            storage = tensor.untyped_storage()
            back = self._park(tensor) if storage.nbytes() else None
            if back is not None:
                self._parked.append((weakref.ref(storage), storage.nbytes(), back))
                storage.resize_(0)
                self._resized(storage)

    @torch.no_grad()
    def come_back(self) -> None:
        """Bring the memory back."""
        parked, self._parked = self._parked, []
        for ref, size, back in parked:
            storage = ref()
            if storage is None:
                continue
            found = back()  # before the storage has a size again, and would be taken for the original
            storage.resize_(size)
            self._resized(storage)
            there = torch.empty(0, dtype=found.dtype, device=found.device)
            there.set_(storage, 0, found.shape, found.stride()).copy_(found)


def is_parked(given: Iterable[Any]) -> bool:
    """Tell whether one of a call's arguments has no memory now.

    Args:
        given: The arguments.

    Returns:
        Whether it is so; looks into lists and tuples.
    """
    for each in given:
        if type(each) is Tensor:
            if each.numel() and each.layout is torch.strided and not each.untyped_storage().nbytes():
                return True
        elif isinstance(each, list | tuple) and is_parked(each):
            return True
    return False


def _is_whole(tensor: Tensor) -> bool:
    """Tell whether a tensor is new, on the host, and all of its storage."""
    # Of CUDA's, copies may be on their way.
    return (
        tensor._base is None
        and tensor._version == 0
        and tensor.device.type == "cpu"
        and tensor.layout is torch.strided
        and tensor.numel() * tensor.itemsize == tensor.untyped_storage().nbytes()
    )
