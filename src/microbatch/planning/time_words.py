"""Write times for people."""

from __future__ import annotations

_UNITS = (("d", 86_400), ("h", 3600), ("min", 60))


def format_time(seconds: float) -> str:
    """Format a time with 3 significant digits, in the largest unit of which there are two.

    Args:
        seconds: Finite, at least 0.

    Returns:
        The time in ms, s, min, h or d.

    Example:
        >>> format_time(0.0123), format_time(95), format_time(150), format_time(8000), format_time(400_000)
        ('12.3 ms', '95.0 s', '2.50 min', '2.22 h', '4.63 d')
    """
    if seconds < 1:
        return f"{1000 * seconds:.3g} ms"
    unit, length = next(((unit, length) for unit, length in _UNITS if seconds >= 2 * length), ("s", 1))
    amount = seconds / length
    return f"{amount:,.0f} {unit}" if amount >= 99.95 else f"{amount:#.3g} {unit}"
