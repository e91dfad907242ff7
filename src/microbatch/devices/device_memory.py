"""The memory of an accelerator: bytes in use, their peak, free bytes, and a limit."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from typing import Any

import torch

from microbatch.devices.backend import ask, function_of

_COUNTERS = ("memory_allocated", "max_memory_allocated", "reset_peak_memory_stats")
# The share of the memory that a process may use by default, where a backend does not report the present share.
_DEFAULT_SHARES = {"mps": 1.7}


@dataclass(frozen=True, slots=True)
class Allocator:
    """The counters of an accelerator's caching allocator.

    Attributes:
        device: The device.
        in_use: Returns the bytes of live tensors.
        peak: Returns the most bytes of live tensors since `reset_peak`.
        reset_peak: Makes the bytes in use now the peak.
    """

    device: torch.device
    in_use: Callable[[], int]
    peak: Callable[[], int]
    reset_peak: Callable[[], object]

    @property
    def retries(self) -> int:
        """How often the allocator emptied its cache and asked the device again; 0 if the backend does not count it."""
        return int(ask(self.device, "memory_stats", otherwise={}).get("num_alloc_retries", 0))

    def limit(self, budget: int) -> Callable[[], object] | None:
        """Make allocations beyond a budget fail.

        Args:
            budget: Bytes.

        Returns:
            A function that removes the limit; `None` if the backend has no limit.
        """
        total, limit = total_bytes(self.device), function_of(self.device, "set_per_process_memory_fraction")
        if limit is None or not total:
            return None
        usual = _DEFAULT_SHARES.get(self.device.type, 1.0)
        before = ask(self.device, "get_per_process_memory_fraction", otherwise=usual)
        limit(min(1.0, budget / total))
        return lambda: limit(before)


def allocator_of(device: torch.device) -> Allocator | None:
    """Return the counters of a device's allocator.

    Args:
        device: The device.

    Returns:
        The counters; `None` for the CPU and for a backend without a peak, where a `MemoryMeter` measures instead.
    """
    return None if device.type == "cpu" else _allocator(device)


def bytes_in_use(device: torch.device) -> int | None:
    """Return the bytes of live tensors on an accelerator.

    Args:
        device: The device.

    Returns:
        Bytes; `None` if the backend does not count them, and for the CPU.
    """
    return None if device.type == "cpu" else ask(device, "memory_allocated", "current_allocated_memory")


def block_bytes(device: torch.device) -> int:
    """Return the bytes that an allocator rounds every allocation up to, by one small allocation.

    Args:
        device: The device.

    Returns:
        512 on CUDA; 1 on the CPU, and where the allocator's bytes are not counted.
    """
    before = bytes_in_use(device)
    if before is None:
        return 1
    probe = torch.empty(1, dtype=torch.uint8, device=device)
    taken = (bytes_in_use(device) or 0) - before
    del probe
    return max(1, taken)


def free_bytes(device: torch.device) -> int | None:
    """Return how many more bytes this process can allocate on an accelerator.

    Args:
        device: The device.

    Returns:
        Bytes: the device's free memory and the cached memory of this process's allocator. `None` if unknown.
    """
    info, used = ask(device, "mem_get_info", "get_memory_info"), bytes_in_use(device)
    if info is not None:
        return int(info[0]) + (0 if used is None else ask(device, "memory_reserved", otherwise=used) - used)
    total = total_bytes(device)
    return None if total is None or used is None else max(0, total - used)


def total_bytes(device: torch.device) -> int | None:
    """Return the memory that a device has, or recommends to use at most.

    Args:
        device: The device.

    Returns:
        Bytes; `None` if unknown.
    """
    properties: Any = ask(device, "get_device_properties")
    total = getattr(properties, "total_memory", None)
    if total is None and (info := ask(device, "mem_get_info", "get_memory_info")) is not None:
        total = info[1]
    return ask(device, "recommended_max_memory") if total is None else int(total)


def empty_cache(device: torch.device) -> None:
    """Return an allocator's unused memory to the device.

    Args:
        device: The device; on the CPU there is no cache.
    """
    if device.type != "cpu":
        ask(device, "empty_cache")


@cache
def _allocator(device: torch.device) -> Allocator | None:
    found = [function_of(device, name) for name in _COUNTERS]
    if None in found:
        return None
    in_use, peak, reset_peak = (each for each in found if each is not None)
    try:
        reset_peak()
        in_use()
        peak()
    except (RuntimeError, AttributeError):  # a backend may declare counters that it does not have
        return None
    return Allocator(device, in_use, peak, reset_peak)
