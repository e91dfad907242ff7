"""A copy of a storage's bytes off the device, with the autograd version that it is valid for."""

from __future__ import annotations

import weakref
from collections.abc import Callable

import torch
from torch import Tensor, UntypedStorage
from torch.utils.weak import TensorWeakRef

from microbatch.memory.offload_targets import Piece

# A copy starts at an address as aligned as the original's, so that vectorized kernels give bitwise equal results.
_ALIGNMENT = 64


class StorageWatch:
    """A weak reference to a storage, and a strong one to the version counter of a tensor in it.

    A detached tensor shares its version counter with the original. The watch holds a detached tensor without data: the
    counter stays alive, and the storage can be freed. `attach` makes a tensor with data and the same counter, so that
    writes to that tensor are counted too.

    Args:
        tensor: A tensor in the storage; `writes` counts from its current version.
    """

    __slots__ = ("_bytes", "_counter", "_storage", "_version")

    def __init__(self, tensor: Tensor) -> None:
        storage = tensor.untyped_storage()
        self._storage, self._bytes = weakref.ref(storage), storage.nbytes()
        self._counter = tensor.detach()
        self._counter.data = torch.empty(0, device=tensor.device)
        self._version = self._counter._version

    def writes(self) -> int:
        """Count the in-place writes since the watch was made."""
        return self._counter._version - self._version

    def storage(self) -> UntypedStorage | None:
        """Return the storage, or `None` if it was freed or resized."""
        storage = self._storage()
        return None if storage is None or storage.nbytes() != self._bytes else storage

    def attach(self, data: Tensor) -> Tensor:
        """Make a tensor that shares the watch's version counter."""
        tensor = self._counter.detach()
        tensor.data = data
        return tensor


class StorageCopy:
    """A copy of a range of one storage's bytes, valid for one version of the storage.

    Args:
        piece: The copied bytes, off the device.
        live: Watches the original storage.
        bounds: First byte of the range, and the byte after its last.
        root: The tensor that the stored one is a view of, or the stored tensor itself.
        before: Returns the copy that was stored just before, or `None` if it is gone.
    """

    __slots__ = ("__weakref__", "_back", "_high", "_root", "before", "live", "low", "piece")

    def __init__(
        self,
        piece: Piece,
        live: StorageWatch,
        *,
        bounds: tuple[int, int],
        root: TensorWeakRef,
        before: Callable[[], StorageCopy | None],
    ) -> None:
        self.piece, self.live, self._root, self.before = piece, live, root, before
        self.low, self._high = bounds
        # The last bytes that were fetched: always their watch, and the bytes themselves until `release`.
        self._back: tuple[StorageWatch, Tensor | None] | None = None

    def has(self, low: int, high: int, root: Tensor) -> bool:
        """Return whether the copy holds a range of the storage, in its current version.

        Args:
            low: First byte of the range.
            high: The byte after its last.
            root: The tensor that the range's tensor is a view of.

        Returns:
            False if the storage was written to since the copy was made.
        """
        # Only views of one tensor surely share a version counter. The gates of an LSTM cell share a storage, but each
        # is written with a counter of its own.
        return self.low <= low and high <= self._high and self._root() is root and not self.live.writes()

    def fetch(self) -> tuple[StorageWatch, Tensor]:
        """Start to copy the bytes back to the device, and hold them until `release`.

        Returns:
            A watch of the fetched storage, and the bytes: uint8, shape ``(bytes,)``. Bytes that an earlier call fetched
            are returned again while they are alive and unchanged.
        """
        back, data = self._back or (None, None)
        if back is not None and data is None and (storage := back.storage()) is not None:
            data = back.attach(bytes_of(storage, 0, storage.nbytes()))
        # A node may have written in place to the fetched tensor; those bytes cannot be handed out again.
        if back is None or data is None or back.writes():
            data = self.piece.fetch()
            back = StorageWatch(data)
        self._back = back, data
        return back, data

    def release(self) -> None:
        """Drop the fetched bytes, unless a tensor still uses them."""
        if self._back is not None:
            self._back = self._back[0], None


def root_of(tensor: Tensor) -> Tensor:
    """Return the tensor that a view was made from, or the tensor itself if it is no view."""
    return tensor if tensor._base is None else tensor._base


def byte_range(tensor: Tensor, nbytes: int) -> tuple[int, int]:
    """Choose which bytes of a storage to copy for one of its tensors.

    Args:
        tensor: A strided tensor with at least one element.
        nbytes: Size of its storage.

    Returns:
        The first byte, and the byte after the last: what the tensor spans, or the whole storage if that is at least
        half of it.
    """
    first, size = int(tensor.storage_offset()), tensor.itemsize
    steps = sum((length - 1) * stride for length, stride in zip(tensor.shape, tensor.stride(), strict=True))
    low, high = first * size // _ALIGNMENT * _ALIGNMENT, (first + steps + 1) * size
    return (low, high) if 2 * (high - low) < nbytes else (0, nbytes)


def bytes_of(storage: UntypedStorage, low: int, high: int) -> Tensor:
    """View a range of a storage as bytes."""
    return torch.empty(0, dtype=torch.uint8, device=storage.device).set_(storage, low, (high - low,), (1,))
