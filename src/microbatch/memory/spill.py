"""Activation offloading: move what autograd saves in forward off the device until backward needs it."""

from __future__ import annotations

import weakref
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import torch
from torch import Tensor, UntypedStorage, nn
from torch.autograd.graph import saved_tensors_hooks
from torch.utils._pytree import tree_leaves

from microbatch.arguments import check_whole
from microbatch.errors import ConfigError
from microbatch.memory.storage_copy import root_of
from microbatch.memory.tensor_store import Handle, KeptHandle, Store, can_offload, is_movable
from microbatch.warned import warn


class Spill:
    """Offload the tensors that autograd saves, from forward until backward asks for them.

    Under gradient accumulation, a microbatch's activations take most of the memory. Each activation waits from its
    forward to its backward for one use. Inside the ``with`` block, activations are copied out as autograd saves them:
    CPU tensors to a file, an accelerator's to pinned host memory. They come back when their node runs, bitwise equal,
    so the gradient is bitwise the same too. Leave the block before backward, or the tensors that backward saves are
    offloaded as well.

    Parameters, other leaves that require a gradient, and views of them stay on the device. So does everything passed as
    ``stay``, and small tensors, whose copy costs more than it saves. Sparse, quantised and nested tensors, tensor
    subclasses and conjugate views stay too. If a tensor is written to in place after it was saved, backward raises, as
    it does without this class.

    Several threads may enter one block, and a thread may enter it again. All threads share the store; each thread has
    its own hooks.

    Args:
        stay: Things that are in memory until backward anyway, so that offloading them frees nothing: modules (for their
            buffers), the batch, tensors, nested structures.
        directory: Where the file is created; default `tempfile.gettempdir`. **A tmpfs is memory, and /tmp often is
            one**: offloading to it saves nothing, and a warning says so. Pass a directory on a disk, such as
            ``/var/tmp``.
        smallest: Size in bytes of the smallest storage that is offloaded; at least 0.
        device: Offload only tensors on this type of device. By default, an accelerator's tensors if anything in
            ``stay`` is on one, otherwise all tensors. An accelerator without streams, such as MPS, keeps its tensors.

    Cost:
        CPU: bytes are written once and read once, or twice if two nodes far apart in the graph need them. Measured: 0.2
        to 0.6 ms a MiB for both, and about 25 microseconds a tensor; 1.14 to 1.33 of a microbatch's time. The file lies
        in the system's page cache, which frees memory by writing to the disk. CUDA, not measured yet: the transfer
        time of the host link, overlapped with computation as far as possible; host memory in powers of two.

    Example:
        >>> model = nn.Sequential(nn.Linear(512, 512), nn.Tanh(), nn.Linear(512, 512), nn.Tanh())
        >>> x = torch.ones(256, 512)
        >>> with Spill(model, x) as spill:
        ...     loss = model(x).sum()
        >>> spill.bytes_held == 2 * 256 * 512 * 4  # the outputs of both tanh; autograd does not save their inputs
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
        least = check_whole("Spill: smallest", smallest, least=0)
        if directory is not None and not isinstance(directory, str | Path):
            raise ConfigError(f"Spill: directory must be a path or None, not {directory!r}")
        self.store = Store(directory=directory)
        named = [tensor for thing in stay for tensor in _tensors(thing)]
        if device is not None:
            kinds: set[str] | None = {_device_of(device).type}
        else:
            kinds = {tensor.device.type for tensor in named} - {"cpu"} or None
        if stuck := sorted(
            {tensor.device.type for tensor in named if not can_offload(tensor.device)} & (kinds or set())
        ):
            warn(
                f"tensors on {', '.join(stuck)} stay there, and offloading frees nothing: PyTorch has no streams for "
                "that device; use a smaller microbatch, or activation checkpointing"
            )
        self._rule = _Rule(self.store, weakref.WeakSet(), kinds, least, _Room())
        self.leave(named)
        # The graph holds these two functions, but not this object.
        self._hooks = saved_tensors_hooks(self._rule.pack, _unpack)

    def put(self, tensor: Tensor, *, briefly: bool = False) -> Handle:
        """Offload a tensor under the rules for tensors that autograd saves.

        Args:
            tensor: Any tensor.
            briefly: Whether the tensor is needed again long before its backward. Such tensors are the first to use the
                `room`.

        Returns:
            A handle that brings the tensor back, or that holds it if it stays on the device.

        Raises:
            SpillError: The disk is full, or the file cannot be created or written.

        Cost:
            As for `Store.put`.
        """
        handle = self._rule.pack(tensor, briefly=briefly)
        if briefly and handle.moved:
            self._rule.room.missed(handle, tensor.untyped_storage().nbytes())
        return handle

    def spares(self, tensor: Tensor) -> bool:
        """Return whether a tensor that was brought back can stay on the device until its next use, which is soon.

        Args:
            tensor: A tensor that `Handle.get` returned.

        Returns:
            Whether it fits into the `room`. If so, its bytes count against the room until it is freed.
        """
        return self._rule.room.takes(tensor.untyped_storage(), briefly=True)

    def __enter__(self) -> Self:
        """Start to offload what operators on this thread save for backward.

        Returns:
            This object.
        """
        self._hooks.__enter__()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        """Stop offloading; offloaded tensors still come back when backward needs them."""
        self._hooks.__exit__(kind, error, traceback)

    def leave(self, *stay: object) -> None:
        """Keep more things on the device, as ``stay`` does in the constructor.

        Args:
            stay: Things that outlive the coming backward passes: modules (for their buffers), tensors, nested
                structures. This object holds only weak references to them.
        """
        named = [tensor for thing in stay for tensor in _tensors(thing)]
        self._rule.stay.update(each.untyped_storage() for each in named if is_movable(each))

    @property
    def room(self) -> int:
        """Total bytes that may stay on the device before anything is offloaded; 0 at first.

        Tensors that are put briefly come first, because each frees its bytes for the next one. Tensors that wait for
        backward keep their bytes until then. How many bytes the brief ones need is measured from one assignment of
        `room` to the next.
        """
        return self._rule.room.bytes

    @room.setter
    def room(self, size: int) -> None:
        self._rule.room.set(size)

    @property
    def bytes_spilled(self) -> int:
        """Total bytes moved off the device so far."""
        return self.store.bytes_spilled

    @property
    def bytes_held(self) -> int:
        """Bytes that are off the device now."""
        return self.store.bytes_held


@dataclass(frozen=True, slots=True)
class _Rule:
    """Decides which saved tensors are offloaded."""

    store: Store
    stay: weakref.WeakSet[UntypedStorage]
    kinds: set[str] | None  # types of devices; `None` for all
    smallest: int
    room: _Room

    def pack(self, tensor: Tensor, *, briefly: bool = False) -> Handle:
        root = root_of(tensor)
        if (root.is_leaf and root.requires_grad) or not self._is_meant(tensor):
            return KeptHandle(tensor)
        storage = tensor.untyped_storage()
        # The check for frozen parameters comes last, because it is slow.
        if storage.nbytes() < self.smallest or storage in self.stay or isinstance(root, nn.Parameter):
            return KeptHandle(tensor)
        return KeptHandle(tensor) if self.room.takes(storage, briefly=briefly) else self.store.put(tensor)

    def _is_meant(self, tensor: Tensor) -> bool:
        return (self.kinds is None or tensor.device.type in self.kinds) and is_movable(tensor)


def _device_of(device: object) -> torch.device:
    try:
        return torch.device(device)  # pyright: ignore[reportArgumentType]
    except (RuntimeError, TypeError, ValueError):
        raise ConfigError(f'Spill: device must be a device, such as "cuda", not {device!r}') from None


class _Room:
    """A byte budget for storages that stay on the device although they could be offloaded.

    Attributes:
        bytes: The budget.
    """

    def __init__(self) -> None:
        self.bytes = 0
        # Storages that wait for backward may use only what the brief ones did not need.
        self._for_long = self._most = 0
        self._long, self._brief, self._missed = _AliveBytes(), _AliveBytes(), _AliveBytes()

    def set(self, size: int) -> None:
        """Set the budget, and divide it by the brief storages' peak since the last call."""
        self.bytes = size
        self._for_long = size - self._most
        self._most = self._brief.bytes

    def takes(self, storage: UntypedStorage, *, briefly: bool = False) -> bool:
        """Return whether a storage fits into the budget, and count it if it does."""
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
        """Count a brief storage that did not fit, for as long as its handle lives."""
        self._missed.add(handle, size)
        self._note()

    def _note(self) -> None:
        self._most = max(self._most, self._brief.bytes + self._missed.bytes)


class _AliveBytes:
    """The total size of the added objects that are still alive."""

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


def _tensors(thing: object) -> list[Tensor]:
    if isinstance(thing, nn.Module):
        return [*thing.parameters(), *thing.buffers()]
    return [leaf for leaf in tree_leaves(thing) if isinstance(leaf, Tensor)]
