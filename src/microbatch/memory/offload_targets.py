"""Storage for offloaded bytes: a temporary file for CPU tensors, pinned host memory for tensors of an accelerator."""

from __future__ import annotations

import ctypes
import os
import tempfile
import threading
import weakref
from abc import ABC, abstractmethod
from collections import deque
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from microbatch.devices.copy_streams import current_stream, empty_on_host, new_event, new_stream, on_stream
from microbatch.errors import SpillError
from microbatch.interrupts import unbroken
from microbatch.memory.budget import format_bytes
from microbatch.warned import warn

# Extents are aligned to pages, so that no write has to read the rest of a page first.
_PAGE = 4096
# The file grows in steps of this size, because one fallocate costs as much as writing a few hundred KiB.
_GROWTH = 16 << 20
_IN_MEMORY = {"tmpfs", "ramfs"}
# Maximum number of copies to the host in flight, and number of pieces that are prefetched from there.
_IN_FLIGHT = 4


class Piece(ABC):
    """Offloaded bytes, which are freed together with this object.

    Attributes:
        nbytes: Number of bytes.
        ahead: Number of pieces of this kind that are worth prefetching.
    """

    nbytes: int
    ahead: int

    @abstractmethod
    def fetch(self) -> Tensor:
        """Start to copy the bytes back to their device, as uint8; call `wait` before you use the copy."""

    @abstractmethod
    def wait(self, data: Tensor) -> None:
        """Make the current stream wait until the copy, the result of the last `fetch`, is complete."""


class File:
    """Offloaded bytes in an unnamed temporary file, which the system deletes however the process ends.

    The file is read and written, not memory-mapped. So its pages belong to the system's page cache instead of this
    process, and a full disk raises an error instead of a signal. Freed extents are reused.

    Args:
        directory: Where the file is created.

    Attributes:
        size: Size of the file in bytes.

    Cost:
        Measured on two cores: 0.12 ms a MiB to write, and the same to read while the file is in the page cache. Page
        faults of newly allocated memory come on top, as for any result of that size.
    """

    def __init__(self, directory: str | Path) -> None:
        self._directory = Path(directory)
        if (kind := _filesystem(self._directory)) in _IN_MEMORY:
            warn(
                f"{self._directory} is a {kind}, which is memory, so offloading to it frees nothing; pass directory= "
                "on a disk, for example /var/tmp",
            )
        try:
            self._file = tempfile.TemporaryFile(dir=self._directory, buffering=0)  # noqa: SIM115 - closed with this object
        except OSError as error:
            raise SpillError(
                f"cannot create a file for offloaded tensors in {self._directory}: {error}; pass directory= as a "
                "directory that you can write to"
            ) from error
        weakref.finalize(self, self._file.close)
        # Guards the file's position and the free extents. Reentrant: an interrupt may leave it locked.
        self._lock = threading.RLock()
        self._free: dict[int, int] = {}
        # A piece may be freed at any moment, even while the lock is held, so its extent is queued here. Appending is
        # atomic.
        self._returned: deque[tuple[int, int]] = deque()
        self.size = 0

    @unbroken
    def put(self, data: Tensor) -> Piece:
        """Write bytes to the file."""
        piece = _OnDisk(self, self._take(data.numel()), data.numel())
        self.transfer(piece.at, data, write=True)
        return piece

    @unbroken
    def transfer(self, at: int, data: Tensor, *, write: bool) -> None:
        """Write bytes to the file, or overwrite ``data`` with the file's bytes."""
        buffer = memoryview((ctypes.c_char * data.numel()).from_address(data.data_ptr())).cast("B")
        move = self._file.write if write else self._file.readinto
        error: OSError | None = None
        try:
            with self._lock:
                self._file.seek(at)
                while buffer and (moved := move(buffer)):
                    buffer = buffer[moved:]
        except OSError as failure:
            error = failure
        if buffer:
            action = "write to" if write else "read from"
            raise SpillError(
                f"cannot {action} the file for offloaded tensors in {self._directory}, with "
                f"{format_bytes(len(buffer))} left: {error or 'end of file'}"
            ) from error

    def give_back(self, at: int, size: int) -> None:
        """Free an extent for reuse."""
        self._returned.append((at, size))

    def _take(self, nbytes: int) -> int:
        """Reserve an extent: the smallest free one that is large enough, or a new one at the end."""
        size = -(-nbytes // _PAGE) * _PAGE
        with self._lock:
            self._collect()
            at = min(
                (each for each in self._free if self._free[each] >= size), key=self._free.__getitem__, default=None
            )
            if at is None:
                at = self._grow(size)
            rest = self._free.pop(at) - size
            if rest:
                self._free[at + size] = rest
        return at

    def _grow(self, size: int) -> int:
        """Extend the file for a new extent at its end."""
        last = max(self._free, default=self.size)
        at = last if last + self._free.get(last, 0) == self.size else self.size
        more = -(-(at + size - self.size) // _GROWTH) * _GROWTH
        try:
            # If the system can reserve disk space, a full disk is reported before anything is written.
            if hasattr(os, "posix_fallocate"):
                os.posix_fallocate(self._file.fileno(), self.size, more)
        except OSError as error:
            raise SpillError(
                f"the file for offloaded tensors in {self._directory} cannot grow from {format_bytes(self.size)} by "
                f"{format_bytes(more)}: {error}. Pass directory= on a disk with more space, or use a smaller microbatch"
            ) from error
        self.size += more
        self._free[at] = self.size - at
        return at

    def _collect(self) -> None:
        """Add the queued extents to the free ones, and merge neighbours."""
        if not self._returned:
            return
        while self._returned:
            at, size = self._returned.popleft()
            self._free[at] = size
        joined: dict[int, int] = {}
        end = -1
        start = 0
        for at in sorted(self._free):
            if at != end:
                start = at
                joined[start] = 0
            joined[start] += self._free[at]
            end = at + self._free[at]
        self._free = joined


class _OnDisk(Piece):
    ahead = 0  # a prefetch would block the CPU

    def __init__(self, file: File, at: int, nbytes: int) -> None:
        self.at, self.nbytes, self._file = at, nbytes, file

    def __del__(self) -> None:
        if "_file" in self.__dict__:  # an interrupt may have ended the constructor
            self._file.give_back(self.at, -(-self.nbytes // _PAGE) * _PAGE)

    def fetch(self) -> Tensor:
        data = torch.empty(self.nbytes, dtype=torch.uint8)
        self._file.transfer(self.at, data, write=False)
        return data

    def wait(self, data: Tensor) -> None:
        pass


class Pinned:
    """Offloaded bytes of an accelerator in pinned host memory, copied on two extra streams, one for each direction.

    torch's caching host allocator pools the pinned memory in power-of-two sizes, and tracks which of it is still being
    copied.

    Args:
        device: The accelerator; one with streams.
    """

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.out, self.back = new_stream(device), new_stream(device)
        self._leaving: deque[weakref.ref[_OnHost]] = deque()

    def put(self, data: Tensor) -> Piece:
        """Start to copy bytes to the host.

        The piece holds the original until the current stream waits for the copy, which happens a few pieces later. So
        computation runs ahead of the copies by at most that number of pieces. The original's memory is reused in the
        order of the current stream.

        Args:
            data: uint8, shape ``(bytes,)``, contiguous, on the accelerator.

        Returns:
            The offloaded bytes.
        """
        host = empty_on_host(data.numel(), torch.uint8, self.device)
        stream = current_stream(self.device)
        self.out.wait_stream(stream)
        with on_stream(self.out):
            host.copy_(data, non_blocking=True)
        piece = _OnHost(self, host, data=data, stream=stream)
        self._leaving.append(weakref.ref(piece))
        while len(self._leaving) > _IN_FLIGHT:
            if (oldest := self._leaving.popleft()()) is not None:
                oldest.release()
        return piece


class _OnHost(Piece):
    ahead = _IN_FLIGHT

    def __init__(self, place: Pinned, host: Tensor, *, data: Tensor, stream: Any) -> None:
        self._place, self._host, self._stream = place, host, stream
        self._data: Tensor | None = data
        self._gone, self._there = new_event(place.device), new_event(place.device)
        self._gone.record(place.out)
        self.nbytes = host.numel()

    def release(self) -> None:
        """Make the original's stream wait for the copy, and free the original."""
        if self._data is not None:
            self._stream.wait_event(self._gone)
            self._data = None

    def fetch(self) -> Tensor:
        place = self._place
        # The current stream allocates the memory, and its earlier work may still use it.
        self._stream = current_stream(place.device)
        data = torch.empty(self.nbytes, dtype=torch.uint8, device=place.device)
        place.back.wait_stream(self._stream)
        place.back.wait_event(self._gone)
        with on_stream(place.back):
            data.copy_(self._host, non_blocking=True)
        self._there.record(place.back)
        data.record_stream(place.back)
        return data

    def wait(self, data: Tensor) -> None:
        stream = current_stream(self._place.device)
        stream.wait_event(self._there)
        if stream != self._stream:
            data.record_stream(stream)


def _filesystem(directory: Path) -> str:
    """Return the type of the file system of a directory; an empty string if unknown."""
    try:
        mounts = Path("/proc/self/mounts").read_text(encoding="utf-8").splitlines()
    except OSError:
        return ""
    path = directory.resolve()
    found = [(Path(mount), kind) for _, mount, kind, *_ in (line.split() for line in mounts)]
    return max(((len(at.parts), kind) for at, kind in found if path.is_relative_to(at)), default=(0, ""))[1]
