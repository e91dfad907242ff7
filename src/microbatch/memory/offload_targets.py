"""Where bytes lie while the device does without them: a file for the CPU's, pinned host memory for a GPU's."""

from __future__ import annotations

import ctypes
import os
import tempfile
import threading
import warnings
import weakref
from abc import ABC, abstractmethod
from collections import deque
from pathlib import Path

import torch
from torch import Tensor

from microbatch.errors import SpillError
from microbatch.memory.budget import format_bytes

# Extents begin at pages, so that no write has to read the rest of a page first.
_PAGE = 4096
# The file grows by so much at once: asking for room costs as much as writing a few hundred KiB.
_GROWTH = 16 << 20
_IN_MEMORY = {"tmpfs", "ramfs"}
# Pieces that may be on their way to the host at once, and that are fetched from there before they are asked for.
_IN_FLIGHT = 4


class Piece(ABC):
    """Bytes that were put away; they are given up when nothing refers to the piece any more.

    Attributes:
        nbytes: How many.
        ahead: Pieces of this kind that are worth fetching before they are asked for.
    """

    nbytes: int
    ahead: int

    @abstractmethod
    def fetch(self) -> Tensor:
        """Begin to bring a copy of the bytes back to their device.

        Returns:
            The bytes, uint8, shape ``(nbytes,)``; to be used after `wait`.
        """

    @abstractmethod
    def wait(self, data: Tensor) -> None:
        """Let what comes next on the current stream see the bytes.

        Args:
            data: What `fetch` returned last.
        """


class Place(ABC):
    """Somewhere to put bytes of one device."""

    @abstractmethod
    def put(self, data: Tensor) -> Piece:
        """Put bytes away.

        Args:
            data: uint8, shape ``(bytes,)``, contiguous, at least one; not written to until the current stream has
                passed this call.

        Returns:
            The piece that knows them.
        """


class File(Place):
    """Bytes in one file that has no name: nothing of it stays behind, however the process ends.

    Plain reads and writes, not a mapping: the pages are the system's cache and not this process's memory, and a full
    disk is an error and not a signal. Freed extents are used again.

    Args:
        directory: Where the file lies.

    Attributes:
        size: Bytes of the file.

    Cost:
        Measured on two cores: 0.12 ms a MiB to write and as much to read while the file is in the system's cache, plus
        the page faults of fresh memory, which any other result of the same size has too.
    """

    def __init__(self, directory: str | Path) -> None:
        self._directory = Path(directory)
        if (kind := _filesystem(self._directory)) in _IN_MEMORY:
            warnings.warn(
                f"{self._directory} is a {kind}, which is memory: what is spilled there is not saved; pass directory= "
                "as a place on a disk, for example /var/tmp",
                stacklevel=2,
            )
        try:
            self._file = tempfile.TemporaryFile(dir=self._directory, buffering=0)  # noqa: SIM115 - lives as long as this
        except OSError as error:
            raise SpillError(f"no file for spilled tensors can be made in {self._directory}: {error}") from error
        weakref.finalize(self, self._file.close)
        # Of the file's position and the free extents.
        self._lock = threading.Lock()
        self._free: dict[int, int] = {}
        # A piece may die at any moment, inside the lock too: its extent waits here. Appending is atomic.
        self._returned: deque[tuple[int, int]] = deque()
        self.size = 0

    def put(self, data: Tensor) -> Piece:
        """Write bytes to the file.

        Args:
            data: uint8, shape ``(bytes,)``, contiguous, on the CPU.

        Returns:
            The piece that knows them.

        Raises:
            SpillError: The disk is full, or the file cannot be written.
        """
        piece = _OnDisk(self, self._take(data.numel()), data.numel())
        self.transfer(piece.at, data, write=True)
        return piece

    def transfer(self, at: int, data: Tensor, *, write: bool) -> None:
        """Write bytes to the file, or read them from it.

        Args:
            at: Where in the file they begin.
            data: uint8, shape ``(bytes,)``, contiguous, on the CPU.
            write: Which of the two.

        Raises:
            SpillError: The file cannot be written or read.
        """
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
            raise SpillError(
                f"{format_bytes(len(buffer))} cannot be {'written to' if write else 'read from'} the file for spilled "
                f"tensors in {self._directory}: {error or 'it ends'}"
            ) from error

    def give_back(self, at: int, size: int) -> None:
        """Let an extent be used again."""
        self._returned.append((at, size))

    def _take(self, nbytes: int) -> int:
        """Find room, in the smallest free extent that has it, or at the end."""
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
        """Make the file long enough for an extent at its end."""
        last = max(self._free, default=self.size)
        at = last if last + self._free.get(last, 0) == self.size else self.size
        more = -(-(at + size - self.size) // _GROWTH) * _GROWTH
        try:
            # Where the system can promise the room, a full disk is told before anything is written.
            if hasattr(os, "posix_fallocate"):
                os.posix_fallocate(self._file.fileno(), self.size, more)
        except OSError as error:
            raise SpillError(
                f"the file for spilled tensors in {self._directory} cannot grow from {format_bytes(self.size)} by "
                f"{format_bytes(more)}: {error}; pass directory= as a place with more room, or use a smaller microbatch"
            ) from error
        self.size += more
        self._free[at] = self.size - at
        return at

    def _collect(self) -> None:
        """Take the returned extents among the free ones, and join those that touch."""
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
    ahead = 0  # the processor would do the reading

    def __init__(self, file: File, at: int, nbytes: int) -> None:
        self._file, self.at, self.nbytes = file, at, nbytes

    def __del__(self) -> None:
        self._file.give_back(self.at, -(-self.nbytes // _PAGE) * _PAGE)

    def fetch(self) -> Tensor:
        data = torch.empty(self.nbytes, dtype=torch.uint8)
        self._file.transfer(self.at, data, write=False)
        return data

    def wait(self, data: Tensor) -> None:
        pass


class Pinned(Place):
    """Bytes of a GPU in pinned host memory, copied on two streams of its own, one for each way.

    Torch's own host allocator pools the pinned memory, in sizes that are powers of two, and knows which of it is still
    being copied.

    Args:
        device: The GPU.
    """

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.out, self.back = torch.cuda.Stream(device), torch.cuda.Stream(device)
        self._leaving: deque[weakref.ref[_OnHost]] = deque()

    def put(self, data: Tensor) -> Piece:
        """Begin to copy bytes to the host.

        The original is held until the current stream has been told to wait for the copy, which it is some pieces later:
        computation runs ahead of the link by no more than that, and its memory is used again in its own order.

        Args:
            data: uint8, shape ``(bytes,)``, contiguous, on the GPU.

        Returns:
            The piece that knows them.
        """
        host = torch.empty(data.numel(), dtype=torch.uint8, pin_memory=True)
        stream = torch.cuda.current_stream(self.device)
        self.out.wait_stream(stream)
        with torch.cuda.stream(self.out):
            host.copy_(data, non_blocking=True)
        piece = _OnHost(self, host, data=data, stream=stream)
        self._leaving.append(weakref.ref(piece))
        while len(self._leaving) > _IN_FLIGHT:
            if (oldest := self._leaving.popleft()()) is not None:
                oldest.leave()
        return piece


class _OnHost(Piece):
    ahead = _IN_FLIGHT

    def __init__(self, place: Pinned, host: Tensor, *, data: Tensor, stream: torch.cuda.Stream) -> None:
        self._place, self._host, self._stream = place, host, stream
        self._data: Tensor | None = data
        self._gone, self._there = torch.cuda.Event(), torch.cuda.Event()
        self._gone.record(place.out)
        self.nbytes = host.numel()

    def leave(self) -> None:
        """Let go of the original: what its stream does from now on comes after the copy."""
        if self._data is not None:
            self._stream.wait_event(self._gone)
            self._data = None

    def fetch(self) -> Tensor:
        place = self._place
        # The memory is the current stream's, and what that stream has yet to do may still be using it.
        self._stream = torch.cuda.current_stream(place.device)
        data = torch.empty(self.nbytes, dtype=torch.uint8, device=place.device)
        place.back.wait_stream(self._stream)
        place.back.wait_event(self._gone)
        with torch.cuda.stream(place.back):
            data.copy_(self._host, non_blocking=True)
        self._there.record(place.back)
        data.record_stream(place.back)
        return data

    def wait(self, data: Tensor) -> None:
        stream = torch.cuda.current_stream(self._place.device)
        stream.wait_event(self._there)
        if stream != self._stream:
            data.record_stream(stream)


def _filesystem(directory: Path) -> str:
    """Name the kind of file system that a directory lies on; empty where the system does not say."""
    try:
        mounts = Path("/proc/self/mounts").read_text(encoding="utf-8").splitlines()
    except OSError:
        return ""
    path = directory.resolve()
    found = [(Path(mount), kind) for _, mount, kind, *_ in (line.split() for line in mounts)]
    return max(((len(at.parts), kind) for at, kind in found if path.is_relative_to(at)), default=(0, ""))[1]
