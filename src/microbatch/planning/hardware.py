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
    """

    name: str
    memory_bytes: int
    reserved_bytes: int
    source: str

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
DEVICES = {
    name: Device(name=name, memory_bytes=int(told * _GIB), reserved_bytes=RESERVED_BYTES, source=source)
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
