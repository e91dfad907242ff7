"""What the numbers were measured on: hardware and versions, nothing that names the machine or its owner."""

from __future__ import annotations

import importlib.metadata
import os
import platform
import re
import statistics
import time
from collections.abc import Mapping
from pathlib import Path

import torch

VERSIONED = ("torch", "microbatch", "accelerate", "lightning-fabric", "transformers")

KEPT_HEAP = {"MALLOC_MMAP_THRESHOLD_": str(2**31 - 1), "MALLOC_TRIM_THRESHOLD_": str(2**31 - 1)}
"""Makes glibc keep freed memory for the next allocation, as a caching allocator does. Read when a process starts."""


def heap(*, kept: bool) -> str:
    """Return what the C library does with freed memory, in words."""
    if preloaded := os.environ.get("LD_PRELOAD"):
        return f"that of {Path(preloaded).name}, preloaded"
    return "kept (glibc returns no memory to the system)" if kept else "the C library's default"


def in_words(*found: Mapping[str, object]) -> str:
    """Write names and values, such as those of `hardware` and `versions`, in one line."""
    return ", ".join(f"{name} {value}" for each in found for name, value in each.items())


def hardware(device: str) -> dict[str, str | int]:
    """Describe the processor, its memory and the device.

    Args:
        device: ``"cpu"`` or ``"cuda"``.

    Returns:
        Names and numbers of the hardware.
    """
    found: dict[str, str | int] = {
        "cpu": _cpu_model(),
        "architecture": platform.machine(),
        "cores": os.cpu_count() or 1,
        "system": platform.system(),
    }
    if hasattr(os, "sysconf"):
        found["memory_bytes"] = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    if device == "cuda":
        found["gpu"] = torch.cuda.get_device_name()
    return found


def versions() -> dict[str, str]:
    """Return the version of Python and of everything that takes part, as far as it is installed."""
    found = {"python": platform.python_version()}
    for package in VERSIONED:
        try:
            found[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            continue
    found["torch"] = torch.__version__
    return found


def matmul_flops_per_second(device: torch.device, precision: torch.dtype) -> float:
    """Return the speed of one large matrix product here and now: the median of seven.

    Args:
        device: Where it is made.
        precision: Dtype of its factors.
    """
    side, taken = 2048, list[float]()
    left, right = (torch.randn(side, side, device=device).to(precision) for _ in range(2))
    for _try in range(7):
        _wait_for(device)
        started = time.perf_counter()
        torch.mm(left, right)
        _wait_for(device)
        taken.append(time.perf_counter() - started)
    return 2 * side**3 / statistics.median(taken)


def busy_seconds() -> float | None:
    """Return how long this machine's cores have been busy since it started, all together; `None` off Linux.

    Less the measured processes' own time, it says directly whether another job was running.
    """
    try:
        first = Path("/proc/stat").read_text(encoding="ascii").split("\n", 1)[0]
    except OSError:
        return None
    user, nice, system, _idle, _wait, irq, softirq, steal = (int(each) for each in first.split()[1:9])
    return (user + nice + system + irq + softirq + steal) / os.sysconf("SC_CLK_TCK")


def _wait_for(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def _cpu_model() -> str:
    try:
        listed = Path("/proc/cpuinfo").read_text(encoding="utf-8")
    except OSError:
        return platform.processor() or "unknown"
    named = re.search(r"^model name\s*:\s*(.+)$", listed, re.MULTILINE)
    return named[1] if named else platform.machine()
