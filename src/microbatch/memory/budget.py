"""The bytes of memory that a device has available."""

from __future__ import annotations

import os
import re
from collections.abc import Iterator
from pathlib import Path, PurePosixPath

import torch

from microbatch.devices.device_memory import free_bytes
from microbatch.memory.byte_amounts import format_bytes, parse_bytes
from microbatch.memory.kept_heap import kept_bytes

__all__ = ["available_bytes", "format_bytes", "parse_bytes"]

# Reserved for other processes, and for memory that the meter does not see.
_MARGIN_BYTES, _MARGIN_SHARE = 256 * 1024**2, 0.05


def available_bytes(device: torch.device, *, root: Path = Path("/")) -> int | None:
    """Return how much more memory this process can allocate on a device.

    On an accelerator: the device's free memory plus the cached memory of this process's allocator. On the CPU: the
    machine's available memory, or what the process's control groups still allow if that is less, plus the free memory
    that `keep_heap` keeps. A margin of 256 MiB or 5 %, whichever is more, is subtracted. File caches count as
    available, because the system frees them on demand.

    Args:
        device: The device.
        root: Root of the system's files; for tests.

    Returns:
        Bytes; `None` if unknown: on a CPU without ``/proc`` and ``os.sysconf``, as on Windows, and on an accelerator
        whose backend does not report it.

    Cost:
        Reads a few small files, or asks the backend; about half a millisecond.
    """
    if device.type != "cpu":
        return free_bytes(device)
    limits = [size for size in (_machine_bytes(root), *_group_bytes(root)) if size is not None]
    if not limits:
        return None
    least = max(0, min(limits) + kept_bytes())
    return least - min(least // 2, max(_MARGIN_BYTES, int(least * _MARGIN_SHARE)))


def share_of(available: int) -> int:
    """Return this process's share of a host's free memory, which its processes of the job share equally."""
    return available // max(1, int(os.environ.get("LOCAL_WORLD_SIZE", "1")))


def _machine_bytes(root: Path) -> int | None:
    """Return the available memory of the machine."""
    found = re.search(r"^MemAvailable:\s+(\d+) kB$", _read(root / "proc/meminfo"), re.MULTILINE)
    if found:
        return int(found[1]) * 1024
    # On systems other than Linux: the free pages, or all pages if free ones are not counted.
    for name in ("SC_AVPHYS_PAGES", "SC_PHYS_PAGES"):
        if name in getattr(os, "sysconf_names", {}):
            return os.sysconf(name) * os.sysconf("SC_PAGE_SIZE")
    return None


def _group_bytes(root: Path) -> Iterator[int]:
    """Yield, for each of the process's control groups (version 1 or 2), its limit less its use."""
    for line in _read(root / "proc/self/cgroup").splitlines():
        number, controllers, path = line.split(":", 2)
        if "memory" in controllers.split(","):
            mounts, limit, usage, cache = ["memory"], "memory.limit_in_bytes", "memory.usage_in_bytes", "total_"
        elif number == "0":
            mounts, limit, usage, cache = ["", "unified"], "memory.max", "memory.current", ""
        else:
            continue
        # Inside a container, the group's folder is often the mount itself, so all parent folders are read too.
        own = PurePosixPath(path)
        for mount in mounts:
            for group in (own, *own.parents):
                folder = root / "sys/fs/cgroup" / mount / str(group).lstrip("/")
                most, used = _read(folder / limit).strip(), _read(folder / usage).strip()
                if most.isdigit() and used.isdigit():
                    idle = re.search(rf"^{cache}inactive_file (\d+)$", _read(folder / "memory.stat"), re.MULTILINE)
                    yield int(most) - int(used) + (int(idle[1]) if idle else 0)


def _read(file: Path) -> str:
    """Return the text of a system file; empty if it does not exist or cannot be read."""
    try:
        return file.read_text(encoding="ascii", errors="replace")
    except OSError:
        return ""
