"""Offload the tensors that a waiting microbatch holds, until its next turn."""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterable
from typing import Any, TypeAlias

import torch
from torch import Tensor, UntypedStorage
from torch.utils.weak import TensorWeakRef

TryOffload: TypeAlias = Callable[[Tensor], Callable[[], Tensor] | None]
"""Offloads a tensor, and returns a function that loads it; returns `None` if the tensor stays in memory."""


class WaitingTensors:
    """Free the memory of a microbatch's intermediate tensors while the other microbatches run.

    A frame of the forward pass may hold a tensor, such as the input of a residual block. The tensor itself cannot be
    removed, but the memory of its storage can be freed while nobody reads it. Only tensors that the microbatch computed
    for its own graph are offloaded. A use by another microbatch is refused, see `has_offloaded`.

    Args:
        try_offload: Offloads a tensor, or returns `None` and leaves it.
        on_resize: Called with every storage whose memory was freed or allocated again.
    """

    def __init__(self, try_offload: TryOffload, on_resize: Callable[[UntypedStorage], None]) -> None:
        self._try_offload, self._on_resize = try_offload, on_resize
        self._tracked: list[TensorWeakRef] = []
        self._offloaded: list[tuple[weakref.ref[UntypedStorage], int, Callable[[], Tensor]]] = []

    def track(self, out: object) -> None:
        """Record a result of this microbatch, if it may be offloaded later."""
        if type(out) is Tensor and out.grad_fn is not None and _owns_storage(out):
            self._tracked.append(TensorWeakRef(out))

    @torch.no_grad()
    def offload(self) -> None:
        """Offload the recorded tensors that are still alive, and free their memory."""
        alive = [(ref, tensor) for ref in self._tracked if (tensor := ref()) is not None]
        self._tracked = [ref for ref, _ in alive]
        for _, tensor in alive:
            storage = tensor.untyped_storage()
            load = self._try_offload(tensor) if storage.nbytes() else None
            if load is not None:
                self._offloaded.append((weakref.ref(storage), storage.nbytes(), load))
                storage.resize_(0)
                self._on_resize(storage)

    @torch.no_grad()
    def restore(self) -> None:
        """Allocate the memory of the offloaded tensors again, and load their values."""
        offloaded, self._offloaded = self._offloaded, []
        for ref, size, load in offloaded:
            storage = ref()
            if storage is None:
                continue
            # Loaded first, because a storage with a size is taken for the original values.
            loaded = load()
            storage.resize_(size)
            self._on_resize(storage)
            target = torch.empty(0, dtype=loaded.dtype, device=loaded.device)
            target.set_(storage, 0, loaded.shape, loaded.stride()).copy_(loaded)


def has_offloaded(arguments: Iterable[Any]) -> bool:
    """Return whether one of a call's arguments is offloaded, so that its storage is empty.

    Args:
        arguments: The arguments; lists and tuples are searched too.

    Returns:
        True if a tensor with elements has a storage of 0 bytes.
    """
    for argument in arguments:
        if type(argument) is Tensor:
            if argument.numel() and argument.layout is torch.strided and not argument.untyped_storage().nbytes():
                return True
        elif isinstance(argument, list | tuple) and has_offloaded(argument):
            return True
    return False


def _owns_storage(tensor: Tensor) -> bool:
    """Return whether a tensor is on the host, unmodified, no view, and as large as its storage."""
    # Tensors of an accelerator are left out, because copies of them may still be running.
    return (
        tensor._base is None
        and tensor._version == 0
        and tensor.device.type == "cpu"
        and tensor.layout is torch.strided
        and tensor.numel() * tensor.itemsize == tensor.untyped_storage().nbytes()
    )
