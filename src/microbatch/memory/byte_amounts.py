"""Amounts of memory as text: parsing and formatting, without torch."""

from __future__ import annotations

import re

from microbatch.arguments import whole
from microbatch.errors import ConfigError

_DECIMAL = {"B": 1, "KB": 1000, "MB": 1000**2, "GB": 1000**3, "TB": 1000**4}
_BINARY = {"KiB": 1024, "MiB": 1024**2, "GiB": 1024**3, "TiB": 1024**4}
_MOST = 1 << 62
_UNITS = _DECIMAL | {name.upper(): size for name, size in _BINARY.items()}


def parse_bytes(amount: int | str) -> int:
    """Parse an amount of memory.

    Args:
        amount: Bytes, or a text such as ``"6 GiB"``, ``"512MiB"``, ``"1.5 GB"``.

    Returns:
        Bytes; at least 1.

    Raises:
        ConfigError: The amount cannot be parsed, is below 1 byte, or is more than any machine has.

    Example:
        >>> parse_bytes("1.5 GiB"), parse_bytes("2 GB"), parse_bytes(4096)
        (1610612736, 2000000000, 4096)
    """
    size = whole(amount)
    if size is None:
        match = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([a-z]+)?\s*", str(amount), re.IGNORECASE)
        unit = (match[2] or "B").upper() if match else ""
        if match is None or unit not in _UNITS:
            raise ConfigError(
                f'{amount!r} is not an amount of memory; pass bytes, or a text such as "6 GiB" or "512 MiB"'
            )
        number = float(match[1]) * _UNITS[unit]
        size = int(min(number, _MOST))
    if size >= _MOST:
        raise ConfigError("that amount of memory is more than any machine has; leave it out for what there is")
    if size < 1:
        raise ConfigError(f"an amount of memory must be at least 1 byte, not {amount!r}")
    return size


def format_bytes(size: float) -> str:
    """Return bytes as text, in the largest binary unit in which they are at least 1.

    Example:
        >>> format_bytes(1610612736), format_bytes(900)
        ('1.50 GiB', '900 B')
    """
    for unit, unit_bytes in reversed(_BINARY.items()):
        number = size / unit_bytes
        if number >= 1:
            return f"{number:.{max(0, 3 - len(str(int(number))))}f} {unit}"
    return f"{size:.0f} B"
