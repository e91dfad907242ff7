"""Saved activations moved off the device between forward and backward."""

from __future__ import annotations

import tempfile
import threading
import weakref
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import torch
from torch import Tensor, UntypedStorage, nn
from torch.autograd.graph import saved_tensors_hooks
from torch.utils._pytree import tree_leaves
from torch.utils.weak import TensorWeakRef

from microbatch.memory.offload_targets import File, Piece, Pinned, Place

# A copy starts where vectors do, as its original did: what is computed from it is then the same to the last bit.
_ALIGNMENT = 64
# Copies that are kept for a moment after they came back: the next node may want another view of the same bytes.
_RECENT = 2


class Handle(ABC):
    """A tensor that was put away, or left where it was; made by `Store.put`.

    What it holds is given up with it, so keep it as long as the tensor may be asked for, and no longer.

    Attributes:
        moved: Whether the tensor was put away.
    """

    moved = True

    @abstractmethod
    def get(self) -> Tensor:
        """Bring the tensor back.

        Returns:
            The same shape, strides, dtype, device and values, without a graph. Where the original's storage is still
            alive it is a view of that, or else of a copy, which other handles of the same storage may share.

        Raises:
            RuntimeError: The original was written to in place since it was put away, which autograd refuses too.
            SpillError: The file cannot be read.

        Cost:
            On the CPU a read of the copied range; on CUDA a copy that the current stream waits for. Nothing if the
            original is alive.
        """


class Store:
    """Put tensors away, and bring them back: CPU tensors to and from a file, CUDA tensors to and from pinned memory.

    Bytes are stored once, however many tensors view them. A tensor that spans at least half of its storage brings the
    whole of it, so that its other views find theirs; a smaller one brings what it spans. A copy is given up when the
    last handle that needs it is.

    Tensors of other devices, subclasses, and whatever is not dense and strided are left where they are: their handles
    hold them.

    Args:
        directory: Where the file lies; `None` for `tempfile.gettempdir`. It may be memory: see `Spill`.

    Attributes:
        bytes_spilled: Bytes put away so far, all together.

    Cost:
        About 15 microseconds a tensor, and the copy of its bytes, if they were not stored yet.

    Example:
        >>> store = Store()
        >>> x = torch.arange(6.0).view(2, 3)
        >>> rows, columns = store.put(x), store.put(x.T)
        >>> store.bytes_held  # both of the same 24 bytes
        24
        >>> del x
        >>> columns.get()
        tensor([[0., 3.],
                [1., 4.],
                [2., 5.]])
    """

    def __init__(self, *, directory: str | Path | None = None) -> None:
        self._directory = directory
        self._places: dict[torch.device, Place] = {}
        self._copies: weakref.WeakKeyDictionary[UntypedStorage, list[weakref.ref[_Copy]]] = weakref.WeakKeyDictionary()
        self._lock = threading.Lock()  # of what is counted, and of making a place
        self._pieces: weakref.WeakSet[Piece] = weakref.WeakSet()
        self._last: Callable[[], _Copy | None] = _nothing
        self._recent: list[weakref.ref[_Copy]] = []
        self.bytes_spilled = 0

    @property
    def bytes_held(self) -> int:
        """Bytes that are put away now."""
        with self._lock:
            return sum(piece.nbytes for piece in self._pieces)

    @property
    def file_bytes(self) -> int:
        """Bytes of the file; it keeps its size, and is used again."""
        return sum(place.size for place in self._places.values() if isinstance(place, File))

    def put(self, tensor: Tensor) -> Handle:
        """Put a tensor away; its memory comes back when nothing else refers to it.

        Args:
            tensor: Any tensor. Written to in place afterwards, it cannot be brought back; on CUDA, where the copy takes
                its time, it is to be dropped, and its storage not resized.

        Returns:
            What brings it back.

        Raises:
            SpillError: The disk is full, or the file cannot be made or written.

        Cost:
            A copy of the range of bytes, unless it was stored already. On CUDA it runs on a stream of its own.
        """
        if not is_movable(tensor):
            return _Left(tensor)
        storage = tensor.untyped_storage()
        low, high = _range_of(tensor, storage.nbytes())
        copies = [copy for each in self._copies.get(storage, ()) if (copy := each()) is not None]
        root, live = _root(tensor), _Watch(tensor)
        copy = next((each for each in copies if each.has(low, high, root)), None)
        if copy is None:
            place = self._place(tensor.device)
            piece = place.put(_bytes_of(storage, low, high))
            copy = _Copy(piece, live, bounds=(low, high), root=TensorWeakRef(root), before=self._last)
            self._copies[storage] = [weakref.ref(each) for each in (*copies, copy)]
            self._last = weakref.ref(copy)
            with self._lock:
                self._pieces.add(piece)
                self.bytes_spilled += piece.nbytes
        return _Away(tensor, self, copy=copy, live=live)

    def bring(self, copy: _Copy) -> tuple[_Watch, Tensor]:
        """Bring a copy back, and begin with those that were put away before it: backward will ask for them next.

        Args:
            copy: What is needed now.

        Returns:
            What watches the bytes, and the bytes: uint8, shape ``(bytes,)``.
        """
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
            each.let_go()
        self._recent = [weakref.ref(each) for each in recent[-most:]]
        return found

    def _place(self, device: torch.device) -> Place:
        with self._lock:
            if device not in self._places:
                cuda = device.type == "cuda"
                self._places[device] = Pinned(device) if cuda else File(self._directory or tempfile.gettempdir())
            return self._places[device]


class Spill:
    """Move what autograd saves off the device, from forward until backward asks for it.

    Under gradient accumulation a microbatch's activations are most of the memory, and each of them waits from its
    forward to its backward for one use. Inside the block they are written away as they are saved, CPU tensors to a file
    and CUDA tensors to pinned host memory, and come back, the same to the last bit, when their node runs. The gradient
    is the same to the last bit too. Leave the block before backward: what backward itself saves would follow.

    Left where they are: parameters, other leaves that require a gradient, and views of them; everything that is named
    here; small tensors, which cost more than they save; sparse, quantised and nested tensors, subclasses, and conjugate
    views. A tensor that is written to in place after it was saved makes backward raise, as it does without.

    One block may be entered by several threads, again and again: all of them share its store, and each has its own
    hooks.

    Args:
        stay: What is there until backward anyway, so that nothing is gained: modules (for their buffers), the batch,
            tensors, nested structures.
        directory: Where the file lies; default `tempfile.gettempdir`. **A tmpfs, which ``/tmp`` often is, is memory**:
            spilled there, nothing is saved, and a warning says so. Pass a place on a disk, for example ``/var/tmp``.
        smallest: Bytes of the smallest storage that is moved; at least 0.
        device: Move only what is on this kind of device. By default a GPU's tensors where anything named is on one,
            and otherwise both.

    Cost:
        CPU: bytes are written once and read once, or twice where two nodes that are far apart need them: measured 0.2
        to 0.6 ms a MiB together, and about 25 microseconds a tensor; 1.14 to 1.33 of a microbatch's time. The file
        lives in the system's cache, which gives memory back by writing to the disk. CUDA, not measured yet: the link's
        time, beside the computation as far as it fits; host memory in powers of two.

    Example:
        >>> model = nn.Sequential(nn.Linear(512, 512), nn.Tanh(), nn.Linear(512, 512), nn.Tanh())
        >>> x = torch.ones(256, 512)
        >>> with Spill(model, x) as spill:
        ...     loss = model(x).sum()
        >>> spill.bytes_held == 2 * 256 * 512 * 4  # both tanh; their inputs are not saved
        True
        >>> loss.backward()
        >>> spill.bytes_held
        0

    Source:
        `torch.autograd.graph.saved_tensors_hooks`; measured in ``benchmarks/spill.py``.
    """

    def __init__(
        self,
        *stay: object,
        directory: str | Path | None = None,
        smallest: int = 1 << 16,
        device: str | torch.device | None = None,
    ) -> None:
        self.store = Store(directory=directory)
        named = [tensor for thing in stay for tensor in _tensors(thing)]
        if device is not None:
            kinds = {torch.device(device).type}
        else:
            kinds = {"cuda"} if any(tensor.is_cuda for tensor in named) else {"cpu", "cuda"}
        self._rule = _Rule(self.store, weakref.WeakSet(), kinds, smallest, _Room())
        self.leave(named)
        # The graph holds these two, and not this object.
        self._hooks = saved_tensors_hooks(self._rule.pack, _unpack)

    def put(self, tensor: Tensor, *, briefly: bool = False) -> Handle:
        """Put a tensor away as if autograd had saved it.

        Args:
            tensor: Any tensor.
            briefly: Whether it is asked for again long before backward comes to it; such ones have the first claim to
                the `room`.

        Returns:
            What brings it back; what is left where it is, the handle holds.

        Raises:
            SpillError: The disk is full, or the file cannot be made or written.

        Cost:
            As for `Store.put`.
        """
        handle = self._rule.pack(tensor, briefly=briefly)
        if briefly and handle.moved:
            self._rule.room.missed(handle, tensor.untyped_storage().nbytes())
        return handle

    def spares(self, tensor: Tensor) -> bool:
        """Tell whether a tensor that was brought back may stay until it is asked for once more, which is soon.

        Args:
            tensor: As a handle returned it.

        Returns:
            Whether there is `room`, which it then has until it is gone.
        """
        return self._rule.room.takes(tensor.untyped_storage(), briefly=True)

    def __enter__(self) -> Self:
        """Begin to move what this thread's operators save.

        Returns:
            This.
        """
        self._hooks.__enter__()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        """Leave the rest where it is; what was moved comes back when backward asks for it."""
        self._hooks.__exit__(kind, error, traceback)

    def leave(self, *stay: object) -> None:
        """Leave more where it is, as what was named when this was made.

        Args:
            stay: What outlives the backwards to come: modules (for their buffers), tensors, nested structures. They are
                not held.
        """
        named = [tensor for thing in stay for tensor in _tensors(thing)]
        self._rule.stay.update(each.untyped_storage() for each in named if is_movable(each))

    @property
    def room(self) -> int:
        """Bytes that may stay on the device at once, all together, before anything is moved; 0 at first.

        What is put away briefly comes first: it frees its bytes for the next of its kind, where what waits for backward
        has them until then. How much that takes is seen between one setting and the next.
        """
        return self._rule.room.bytes

    @room.setter
    def room(self, size: int) -> None:
        self._rule.room.set(size)

    @property
    def bytes_spilled(self) -> int:
        """Bytes moved off the device so far, all together."""
        return self.store.bytes_spilled

    @property
    def bytes_held(self) -> int:
        """Bytes that are off the device now."""
        return self.store.bytes_held


def is_movable(tensor: Tensor) -> bool:
    """Tell whether a tensor is plain bytes that can come back as they were.

    Args:
        tensor: Any tensor.

    Returns:
        Whether `Store.put` moves it.
    """
    return (
        type(tensor) in {Tensor, nn.Parameter}
        and tensor.layout is torch.strided
        and tensor.device.type in {"cpu", "cuda"}
        and tensor.numel() > 0
        and not (tensor.is_quantized or tensor.is_nested or tensor.is_conj() or tensor.is_neg())
        and not tensor.is_inference()
    )


@dataclass(frozen=True, slots=True)
class _Rule:
    """What is moved of what autograd saves."""

    store: Store
    stay: weakref.WeakSet[UntypedStorage]
    kinds: set[str]
    smallest: int
    room: _Room

    def pack(self, tensor: Tensor, *, briefly: bool = False) -> Handle:
        root = _root(tensor)
        if (root.is_leaf and root.requires_grad) or tensor.device.type not in self.kinds or not is_movable(tensor):
            return _Left(tensor)
        storage = tensor.untyped_storage()
        # Frozen parameters are asked for last, because that question is slow.
        if storage.nbytes() < self.smallest or storage in self.stay or isinstance(root, nn.Parameter):
            return _Left(tensor)
        return _Left(tensor) if self.room.takes(storage, briefly=briefly) else self.store.put(tensor)


class _Room:
    """Storages that stay although they could be moved, as long as they are few.

    Attributes:
        bytes: That they may have.
    """

    def __init__(self) -> None:
        self.bytes = 0
        # Of those, what stays for long may have no more than what stays briefly has not asked for.
        self._for_long = self._most = 0
        self._long, self._brief, self._missed = _Stay(), _Stay(), _Stay()

    def set(self, size: int) -> None:
        """Change it, by what was asked for since the last time."""
        self.bytes = size
        self._for_long = size - self._most
        self._most = self._brief.bytes

    def takes(self, storage: UntypedStorage, *, briefly: bool = False) -> bool:
        """Tell whether a storage may stay."""
        if storage in self._brief.here:
            return briefly
        if storage in self._long.here:
            return True
        size = storage.nbytes()
        fits = self._long.bytes + self._brief.bytes + size <= self.bytes
        if not briefly:
            fits = fits and self._long.bytes + size <= self._for_long
        if fits:
            (self._brief if briefly else self._long).add(storage, size)
            self._note()
        return fits

    def missed(self, handle: Handle, size: int) -> None:
        """Learn of one that would have stayed briefly, and for as long as its handle."""
        self._missed.add(handle, size)
        self._note()

    def _note(self) -> None:
        self._most = max(self._most, self._brief.bytes + self._missed.bytes)


class _Stay:
    """Things with bytes, for as long as they are there."""

    def __init__(self) -> None:
        self.bytes = 0
        self.here: weakref.WeakSet[Any] = weakref.WeakSet()

    def add(self, thing: Any, size: int) -> None:
        self.bytes += size
        self.here.add(thing)
        weakref.finalize(thing, self._gone, size).atexit = False

    def _gone(self, size: int) -> None:
        self.bytes -= size


def _unpack(handle: Handle) -> Tensor:
    return handle.get()


class _Watch:
    """A storage that may die, and the count of writes to it, which does not.

    A tensor shares that count with whatever it is detached to. Its ghost is such a one, without a body: it keeps the
    count, and not the memory. Given a body, it is a tensor again, and what is written to that is counted with the rest.
    """

    __slots__ = ("_bytes", "_ghost", "_storage", "_version")

    def __init__(self, tensor: Tensor) -> None:
        storage = tensor.untyped_storage()
        self._storage, self._bytes = weakref.ref(storage), storage.nbytes()
        self._ghost = tensor.detach()
        self._ghost.data = torch.empty(0, device=tensor.device)
        self._version = self._ghost._version

    def writes(self) -> int:
        """Count what was written in place since the tensor was seen."""
        return self._ghost._version - self._version

    def storage(self) -> UntypedStorage | None:
        """Return the storage, if it is still there and has its bytes."""
        storage = self._storage()
        return None if storage is None or storage.nbytes() != self._bytes else storage

    def embody(self, body: Tensor) -> Tensor:
        """Make a tensor whose writes count with the others."""
        tensor = self._ghost.detach()
        tensor.data = body
        return tensor


class _Copy:
    """A range of one storage's bytes, as they were at one count of writes."""

    __slots__ = ("__weakref__", "_back", "_high", "_root", "before", "live", "low", "piece")

    def __init__(
        self,
        piece: Piece,
        live: _Watch,
        *,
        bounds: tuple[int, int],
        root: TensorWeakRef,
        before: Callable[[], _Copy | None],
    ) -> None:
        self.piece, self.live, self._root, self.before = piece, live, root, before
        self.low, self._high = bounds
        # What came back the last time, by what watches it; and the bytes too, while they are kept.
        self._back: tuple[_Watch, Tensor | None] | None = None

    def has(self, low: int, high: int, root: Tensor) -> bool:
        """Tell whether these bytes of the storage are here, as they are now."""
        # Only views of one tensor are known to share its count: the gates of an LSTM's cell share a storage, and are
        # written one after the other, each with a count of its own.
        return self.low <= low and high <= self._high and self._root() is root and not self.live.writes()

    def fetch(self) -> tuple[_Watch, Tensor]:
        """Begin to bring the bytes back, unless they are there from the last time, and keep them for now."""
        back, data = self._back or (None, None)
        if back is not None and data is None and (storage := back.storage()) is not None:
            data = back.embody(_bytes_of(storage, 0, storage.nbytes()))
        # A node may write over what it was given, and has then made it its own.
        if back is None or data is None or back.writes():
            data = self.piece.fetch()
            back = _Watch(data)
        self._back = back, data
        return back, data

    def let_go(self) -> None:
        """Keep the bytes no longer than somebody else does."""
        if self._back is not None:
            self._back = self._back[0], None


class _Left(Handle):
    """A tensor that was left where it is."""

    moved = False

    def __init__(self, tensor: Tensor) -> None:
        # Detached, because a graph must not hold its own outputs.
        self._tensor = tensor.detach() if tensor.requires_grad else tensor
        self._version = 0 if tensor.is_inference() else tensor._version

    def get(self) -> Tensor:
        """Return it."""
        tensor = self._tensor
        if not tensor.is_inference() and tensor._version != self._version:
            shape = () if tensor.is_nested else tensor.shape
            raise _modified(tensor._version - self._version, tensor.dtype, shape)
        return tensor


class _Away(Handle):
    """A tensor that was put away: a view of a copy."""

    def __init__(self, tensor: Tensor, store: Store, *, copy: _Copy, live: _Watch) -> None:
        self._store, self._copy, self._live = store, copy, live
        self._dtype, self._device = tensor.dtype, tensor.device
        self._shape, self._stride, self._offset = tensor.shape, tensor.stride(), tensor.storage_offset()

    def get(self) -> Tensor:
        """Bring it back."""
        if writes := self._live.writes():
            raise _modified(writes, self._dtype, self._shape)
        watch, storage, offset = self._live, self._live.storage(), self._offset
        if storage is None:
            watch, data = self._store.bring(self._copy)
            storage, offset = data.untyped_storage(), offset - self._copy.low // self._dtype.itemsize
        body = torch.empty(0, dtype=self._dtype, device=self._device)
        return watch.embody(body.set_(storage, offset, self._shape, self._stride))


def _modified(writes: int, dtype: torch.dtype, shape: Sequence[int]) -> RuntimeError:
    """Make the error that autograd would raise."""
    return RuntimeError(
        "one of the variables needed for gradient computation has been modified by an inplace operation: "
        f"[{dtype} {list(shape)}] was written to {writes} times after it was saved, or put away"
    )


def _root(tensor: Tensor) -> Tensor:
    """Return the tensor that it is a view of, or itself."""
    return tensor if tensor._base is None else tensor._base


def _range_of(tensor: Tensor, nbytes: int) -> tuple[int, int]:
    """Return the bytes of its storage to copy for a tensor: where they begin, and where they end."""
    first, size = int(tensor.storage_offset()), tensor.itemsize
    steps = sum((length - 1) * stride for length, stride in zip(tensor.shape, tensor.stride(), strict=True))
    low, high = first * size // _ALIGNMENT * _ALIGNMENT, (first + steps + 1) * size
    return (low, high) if 2 * (high - low) < nbytes else (0, nbytes)


def _bytes_of(storage: UntypedStorage, low: int, high: int) -> Tensor:
    return torch.empty(0, dtype=torch.uint8, device=storage.device).set_(storage, low, (high - low,), (1,))


def _tensors(thing: object) -> list[Tensor]:
    if isinstance(thing, nn.Module):
        return [*thing.parameters(), *thing.buffers()]
    return [leaf for leaf in tree_leaves(thing) if isinstance(leaf, Tensor)]


def _nothing() -> None:
    return None
