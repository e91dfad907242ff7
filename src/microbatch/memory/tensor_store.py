"""A store that moves tensors off the device, to a file or to pinned host memory, and brings them back."""

from __future__ import annotations

import tempfile
import threading
import weakref
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from pathlib import Path

import torch
from torch import Tensor, UntypedStorage, nn
from torch.utils.weak import TensorWeakRef

from microbatch.devices.copy_streams import has_streams
from microbatch.memory.offload_targets import File, Piece, Pinned
from microbatch.memory.storage_copy import StorageCopy, StorageWatch, byte_range, bytes_of, root_of

# Copies that stay on the device for a moment after they were fetched: the next node may need another view of them.
_RECENT = 2


class Handle(ABC):
    """A reference to a tensor that `Store.put` has moved off the device, or left where it was.

    The stored bytes live as long as the handle. Keep the handle for as long as you may need the tensor, and no longer.

    Attributes:
        moved: Whether the tensor was moved off the device.
    """

    moved = True

    @abstractmethod
    def get(self) -> Tensor:
        """Bring the tensor back to its device.

        Returns:
            The same shape, strides, dtype, device and values, without a graph. The result is a view of the original
            storage if that is alive. Otherwise it is a view of a copy, which handles of the same storage may share.

        Raises:
            RuntimeError: The original was written to in place after it was stored; autograd refuses this too.
            SpillError: The file cannot be read.

        Cost:
            On the CPU a read of the copied range; on an accelerator a copy that the current stream waits for. Nothing
            if the original is alive.
        """


class Store:
    """Move tensors off the device and back: CPU tensors to a file, an accelerator's to pinned host memory.

    The bytes of a storage are copied once, even if several tensors view them. If a tensor spans at least half of its
    storage, the whole storage is copied, so that its other views find their bytes there. Otherwise, only the spanned
    bytes are copied. A copy is freed together with the last handle that needs it.

    Tensors on other devices, tensor subclasses, and tensors that are not dense and strided stay where they are: their
    handles hold the tensors themselves.

    Args:
        directory: Where the file is created; `None` for `tempfile.gettempdir`. This directory may be in memory: see
            `Spill`.

    Attributes:
        bytes_spilled: Total bytes moved off the device so far.

    Cost:
        About 15 microseconds a tensor, plus one copy of its bytes if they are not stored already.

    Example:
        >>> store = Store()
        >>> x = torch.arange(6.0).view(2, 3)
        >>> rows, columns = store.put(x), store.put(x.T)
        >>> store.bytes_held  # both view the same 24 bytes
        24
        >>> del x
        >>> columns.get()
        tensor([[0., 3.],
                [1., 4.],
                [2., 5.]])
    """

    def __init__(self, *, directory: str | Path | None = None) -> None:
        self._directory = directory
        self._places: dict[torch.device, File | Pinned] = {}
        self._copies: weakref.WeakKeyDictionary[UntypedStorage, list[weakref.ref[StorageCopy]]] = (
            weakref.WeakKeyDictionary()
        )
        self._lock = threading.RLock()  # guards the byte counts and the creation of places
        self._pieces: weakref.WeakSet[Piece] = weakref.WeakSet()
        self._last: Callable[[], StorageCopy | None] = lambda: None
        self._recent: list[weakref.ref[StorageCopy]] = []
        self.bytes_spilled = 0

    @property
    def bytes_held(self) -> int:
        """Bytes that are off the device now."""
        with self._lock:
            return sum(piece.nbytes for piece in self._pieces)

    @property
    def file_bytes(self) -> int:
        """Size of the file in bytes; the file never shrinks, and freed parts of it are reused."""
        return sum(place.size for place in self._places.values() if isinstance(place, File))

    def put(self, tensor: Tensor) -> Handle:
        """Move a tensor off the device; its memory is freed once nothing else refers to it.

        Args:
            tensor: Any tensor. If you write to it in place afterwards, it cannot be brought back. On an accelerator,
                where the copy is asynchronous, drop the tensor after this call, and do not resize its storage.

        Returns:
            A handle that brings the tensor back.

        Raises:
            SpillError: The disk is full, or the file cannot be created or written.

        Cost:
            One copy of the bytes, unless they are stored already. On an accelerator the copy runs on its own stream.
        """
        if not is_movable(tensor):
            return KeptHandle(tensor)
        storage = tensor.untyped_storage()
        low, high = byte_range(tensor, storage.nbytes())
        copies = [copy for each in self._copies.get(storage, ()) if (copy := each()) is not None]
        root, live = root_of(tensor), StorageWatch(tensor)
        copy = next((each for each in copies if each.has(low, high, root)), None)
        if copy is None:
            place = self._place(tensor.device)
            piece = place.put(bytes_of(storage, low, high))
            copy = StorageCopy(piece, live, bounds=(low, high), root=TensorWeakRef(root), before=self._last)
            self._copies[storage] = [weakref.ref(each) for each in (*copies, copy)]
            self._last = weakref.ref(copy)
            with self._lock:
                self._pieces.add(piece)
                self.bytes_spilled += piece.nbytes
        return _MovedHandle(tensor, self, copy=copy, live=live)

    def fetch(self, copy: StorageCopy) -> tuple[StorageWatch, Tensor]:
        """Bring a copy back, and prefetch the copies that were stored just before it: backward needs those next."""
        found = copy.fetch()
        copy.piece.wait(found[1])
        wanted = [copy]
        while len(wanted) <= copy.piece.ahead and (earlier := wanted[-1].before()) is not None:
            wanted.append(earlier)
        for each in wanted[1:]:
            if each.live.storage() is None:
                each.fetch()
        recent = [each for ref in self._recent if (each := ref()) is not None and each not in wanted] + wanted
        most = _RECENT + copy.piece.ahead
        for each in recent[:-most]:
            each.release()
        self._recent = [weakref.ref(each) for each in recent[-most:]]
        return found

    def _place(self, device: torch.device) -> File | Pinned:
        with self._lock:
            if device not in self._places:
                on_host = device.type == "cpu"
                self._places[device] = File(self._directory or tempfile.gettempdir()) if on_host else Pinned(device)
            return self._places[device]


def can_offload(device: torch.device) -> bool:
    """Return whether tensors of a device can be offloaded: to a file from the CPU, beside the computation elsewhere."""
    return device.type == "cpu" or has_streams(device)


def is_movable(tensor: Tensor) -> bool:
    """Return whether a tensor is plain dense data that can be copied out and restored byte by byte."""
    return (
        type(tensor) in {Tensor, nn.Parameter}
        and tensor.layout is torch.strided
        and can_offload(tensor.device)
        and tensor.numel() > 0
        and not (tensor.is_quantized or tensor.is_nested or tensor.is_conj() or tensor.is_neg())
        and not tensor.is_inference()
    )


class KeptHandle(Handle):
    """A handle to a tensor that stays on its device, and that it holds without its graph."""

    moved = False

    def __init__(self, tensor: Tensor) -> None:
        # Detached, because a graph that holds its own outputs is never freed.
        self._tensor = tensor.detach() if tensor.requires_grad else tensor
        self._version = 0 if tensor.is_inference() else tensor._version

    def get(self) -> Tensor:
        """Return the tensor."""
        tensor = self._tensor
        if not tensor.is_inference() and tensor._version != self._version:
            shape = () if tensor.is_nested else tensor.shape
            raise _modified(tensor._version - self._version, tensor.dtype, shape)
        return tensor


class _MovedHandle(Handle):
    """A handle to a tensor whose bytes are off the device."""

    def __init__(self, tensor: Tensor, store: Store, *, copy: StorageCopy, live: StorageWatch) -> None:
        self._store, self._copy, self._live = store, copy, live
        self._dtype, self._device = tensor.dtype, tensor.device
        self._shape, self._stride, self._offset = tensor.shape, tensor.stride(), tensor.storage_offset()

    def get(self) -> Tensor:
        """Return a view of the original storage, or of the copy if the original was freed."""
        if writes := self._live.writes():
            raise _modified(writes, self._dtype, self._shape)
        watch, storage, offset = self._live, self._live.storage(), self._offset
        if storage is None:
            watch, data = self._store.fetch(self._copy)
            storage, offset = data.untyped_storage(), offset - self._copy.low // self._dtype.itemsize
        data = torch.empty(0, dtype=self._dtype, device=self._device)
        return watch.attach(data.set_(storage, offset, self._shape, self._stride))


def _modified(writes: int, dtype: torch.dtype, shape: Sequence[int]) -> RuntimeError:
    """Make the error that autograd raises for a saved tensor that was written to in place."""
    return RuntimeError(
        "one of the variables needed for gradient computation has been modified by an inplace operation: "
        f"[{dtype} {list(shape)}] was written to {writes} times after it was saved or offloaded"
    )
