"""Devices that one may not have, and the memory that a program finds on them."""

from __future__ import annotations

from dataclasses import dataclass

from microbatch.errors import ConfigError
from microbatch.memory.budget import format_bytes, parse_bytes

_GIB = 1024**3
# The CUDA context, the libraries' workspaces and the buffers of communication.
RESERVED_BYTES = _GIB


@dataclass(frozen=True, slots=True, kw_only=True)
class Device:
    """A device and its memory.

    Attributes:
        name: What it is called.
        memory_bytes: What PyTorch finds on it, which is less than the number on the box.
        reserved_bytes: What is gone before the first tensor is there.
        source: Where the number comes from.
        half_flops: Most floating-point operations a second in bfloat16 (float16 where it has none), dense, summed in
            float32; `None` where nobody said.
        single_flops: Likewise in float32, without TF32.
        link: What joins it to others of a machine, and bytes a second that leave by it, one way; `None` likewise.
    """

    name: str
    memory_bytes: int
    reserved_bytes: int
    source: str
    half_flops: float | None = None
    single_flops: float | None = None
    link: tuple[str, float] | None = None

    @property
    def usable_bytes(self) -> int:
        """Bytes for tensors."""
        return self.memory_bytes - self.reserved_bytes

    @property
    def words(self) -> str:
        """The device in words."""
        return f"{self.name} ({format_bytes(self.usable_bytes)} usable)"


# GiB that PyTorch finds, in ``torch.cuda.get_device_properties(...).total_memory`` and in its out-of-memory messages
# ("GPU 0 has a total capacity of ..."), which differ by 1 % between drivers: the least of those seen. The others are
# a little below what their data sheets say, and were not seen on a device.
_SEEN = {"a100-40gb": 39.3, "a100-80gb": 79.1, "h200-141gb": 139.0, "rtx-4090-24gb": 23.5}
_STATED = {
    "a10g-24gb": 22.0,
    "b200-180gb": 177.0,
    "h100-80gb": 79.0,
    "l4-24gb": 22.0,
    "l40s-48gb": 44.0,
    "rtx-3090-24gb": 23.5,
    "rtx-5090-32gb": 31.3,
    "rtx-a6000-48gb": 47.0,
    "t4-16gb": 14.5,
    "v100-16gb": 15.7,
    "v100-32gb": 31.7,
}
_PCIE3, _PCIE4, _PCIE5 = ("PCIe 3 x16", 15.75e9), ("PCIe 4 x16", 31.5e9), ("PCIe 5 x16", 63e9)
# From data sheets: 10^12 operations a second in 16 bits, without sparsity, and in float32; and half of what a link is
# said to carry in both directions together. Of devices sold with several links, the one with the fastest (SXM).
_SPEEDS: dict[str, tuple[float, float, tuple[str, float]]] = {
    "a100": (312, 19.5, ("NVLink 3", 300e9)),
    "a10g": (70, 31.2, _PCIE4),
    "b200": (2250, 80, ("NVLink 5", 900e9)),
    "h100": (989, 67, ("NVLink 4", 450e9)),
    "h200": (989, 67, ("NVLink 4", 450e9)),
    "l4": (121, 30.3, _PCIE4),
    "l40s": (362, 91.6, _PCIE4),
    "rtx-3090": (71, 35.6, _PCIE4),
    "rtx-4090": (165, 82.6, _PCIE4),
    "rtx-5090": (209, 104.8, _PCIE5),
    "rtx-a6000": (155, 38.7, _PCIE4),
    "t4": (65, 8.1, _PCIE3),
    "v100": (125, 15.7, ("NVLink 2", 150e9)),
}


def _device(name: str, told: float, source: str) -> Device:
    half, single, link = _SPEEDS[name.rpartition("-")[0]]
    return Device(
        name=name,
        memory_bytes=int(told * _GIB),
        reserved_bytes=RESERVED_BYTES,
        source=source,
        half_flops=half * 1e12,
        single_flops=single * 1e12,
        link=link,
    )


DEVICES = {
    name: _device(name, told, source)
    for table, source in ((_SEEN, "PyTorch's own messages"), (_STATED, "data sheet, rounded down"))
    for name, told in table.items()
}


def is_hardware(text: str) -> bool:
    """Tell whether a text names hardware, rather than a device of this machine such as ``"cuda:1"``.

    Args:
        text: What a user wrote.

    Returns:
        Whether `find_device` finds it.

    Example:
        >>> is_hardware("a100-40gb"), is_hardware("24 GiB"), is_hardware("cuda:0"), is_hardware("cpu")
        (True, True, False, False)
    """
    try:
        find_device(text)
    except ConfigError:
        return False
    return True


def find_device(text: str) -> Device:
    """Find a device by name, or make one of a size.

    Args:
        text: A name, which may be shortened as far as one device has it (``"h100"``), or an amount of memory with a
            unit (``"24 GiB"``), from which nothing is reserved.

    Returns:
        The device.

    Raises:
        ConfigError: No device, or several, have the name, and it is no amount.

    Example:
        >>> find_device("H100").name, find_device("24 GiB").usable_bytes == 24 * 1024**3
        ('h100-80gb', True)
    """
    name = text.strip().lower().replace("_", "-").replace(" ", "-")
    found = [DEVICES[name]] if name in DEVICES else [DEVICES[each] for each in DEVICES if each.startswith(f"{name}-")]
    if len(found) == 1:
        return found[0]
    if not found and name[:1].isdigit() and name[-1].isalpha():
        return Device(name=text.strip(), memory_bytes=parse_bytes(text), reserved_bytes=0, source="as given")
    several = ", ".join(each.name for each in found) or ", ".join(DEVICES)
    raise ConfigError(f'{text!r} is not one device; write one of {several}, or an amount such as "24 GiB"')
