"""Amounts of memory: parsing, formatting, and the bytes that a device has available."""

from __future__ import annotations

import os
import re
from collections.abc import Iterator
from pathlib import Path, PurePosixPath

import torch

from microbatch.errors import ConfigError

_DECIMAL = {"B": 1, "KB": 1000, "MB": 1000**2, "GB": 1000**3, "TB": 1000**4}
_BINARY = {"KiB": 1024, "MiB": 1024**2, "GiB": 1024**3, "TiB": 1024**4}
# Reserved for other processes, and for memory that the meter does not see.
_MARGIN_BYTES, _MARGIN_SHARE = 256 * 1024**2, 0.05
_UNITS = _DECIMAL | {name.upper(): size for name, size in _BINARY.items()}


def parse_bytes(amount: int | str) -> int:
    """Parse an amount of memory.

    Args:
        amount: Bytes, or a text such as ``"6 GiB"``, ``"512MiB"``, ``"1.5 GB"``.

    Returns:
        Bytes; at least 1.

    Raises:
        ConfigError: The amount cannot be parsed, or is below 1 byte.

    Example:
        >>> parse_bytes("1.5 GiB"), parse_bytes("2 GB"), parse_bytes(4096)
        (1610612736, 2000000000, 4096)
    """
    if isinstance(amount, int) and not isinstance(amount, bool):
        size = amount
    else:
        match = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([a-z]+)?\s*", str(amount), re.IGNORECASE)
        unit = (match[2] or "B").upper() if match else ""
        if match is None or unit not in _UNITS:
            raise ConfigError(
                f'{amount!r} is not an amount of memory; pass bytes, or a text such as "6 GiB" or "512 MiB"'
            )
        size = int(float(match[1]) * _UNITS[unit])
    if size >= 1 << 63:
        raise ConfigError(f"{str(amount)[:30]!r} is more memory than any device has")
    if size < 1:
        raise ConfigError(f"an amount of memory must be at least 1 byte, not {amount!r}")
    return size


def format_bytes(size: float) -> str:
    """Format an amount of memory as text.

    Args:
        size: Bytes.

    Returns:
        The amount in the largest binary unit in which it is at least 1.

    Example:
        >>> format_bytes(1610612736), format_bytes(900)
        ('1.50 GiB', '900 B')
    """
    for unit, unit_bytes in reversed(_BINARY.items()):
        number = size / unit_bytes
        if number >= 1:
            return f"{number:.{max(0, 3 - len(str(int(number))))}f} {unit}"
    return f"{size:.0f} B"


def available_bytes(device: torch.device, *, root: Path = Path("/")) -> int | None:
    """Return how much more memory this process can allocate on a device.

    On CUDA: the device's free memory plus the cached memory of this process's allocator. On the CPU: the machine's
    available memory, or what the process's control groups still allow if that is less. A margin of 256 MiB or 5 %,
    whichever is more, is subtracted. File caches count as available, because the system frees them on demand.

    Args:
        device: The device.
        root: Root of the system's files; for tests.

    Returns:
        Bytes; `None` if unknown: on a CPU without ``/proc`` and ``os.sysconf``, as on Windows, and on other devices,
        whose allocators refuse by themselves.

    Cost:
        Reads a few small files, or calls CUDA; about half a millisecond.
    """
    if device.type == "cuda":
        free, _ = torch.cuda.mem_get_info(device)
        return int(free) + torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
    if device.type != "cpu":
        return None
    limits = [size for size in (_machine_bytes(root), *_group_bytes(root)) if size is not None]
    if not limits:
        return None
    least = max(0, min(limits))
    return least - min(least // 2, max(_MARGIN_BYTES, int(least * _MARGIN_SHARE)))


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
