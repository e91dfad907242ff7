"""Keep freed CPU memory in the process, so that the next large tensor does not fetch it from the system again."""

from __future__ import annotations

import ctypes
import platform
from typing import Any

# Of <malloc.h>: the size from which a block gets a mapping of its own, and the free memory at which the heap shrinks.
_MMAP_THRESHOLD, _TRIM_THRESHOLD = -3, -1
_LARGEST = 2**31 - 1
_COUNTS = "arena ordblks smblks hblks hblkhd usmblks fsmblks uordblks fordblks keepcost"
_done: list[bool] = []


class _Info(ctypes.Structure):
    """``struct mallinfo2`` of glibc."""

    _fields_ = [(name, ctypes.c_size_t) for name in _COUNTS.split()]


def keep_heap() -> bool:
    """Keep freed CPU memory in this process, instead of returning it to the system.

    By default, glibc returns a large block to the system when it is freed. When a program asks for a large block again,
    the system clears every page of it. A training loop allocates the same large tensors in every step, so a part of its
    time goes there. Call this function once, before the first step. It helps hand-written loops as much.

    Returns:
        Whether freed memory is kept from now on. `False` where the allocator is not glibc's, as on macOS, Windows and
        Alpine Linux: nothing has changed.

    Cost:
        The process keeps the largest amount of memory that it ever used, and some more, because kept blocks do not
        always fit. Memory budgets count the free part as available.

    Example:
        >>> kept = keep_heap()  # once, before the first step
        >>> keep_heap() == kept
        True
    """
    if not _done:
        library = _glibc()
        accepted = [library.mallopt(each, _LARGEST) for each in (_MMAP_THRESHOLD, _TRIM_THRESHOLD) if library]
        _done.append(bool(accepted) and all(accepted))
    return _done[0]


def heap_is_kept() -> bool:
    """Return whether `keep_heap` has taken effect in this process."""
    return any(_done)


def heap_could_be_kept() -> bool:
    """Return whether `keep_heap` would have an effect, and has not been called."""
    return not heap_is_kept() and _glibc() is not None


def kept_bytes() -> int:
    """Return the free bytes that the heap keeps for later use; 0 unless `keep_heap` is on."""
    library = _glibc() if heap_is_kept() else None
    if library is None or not hasattr(library, "mallinfo2"):  # glibc 2.33 brought it
        return 0
    library.mallinfo2.restype = _Info
    return int(library.mallinfo2().fordblks)


def _glibc() -> Any:
    """Return the C library of this process; `None` if it is not glibc."""
    return ctypes.CDLL(None) if platform.libc_ver()[0] == "glibc" else None
