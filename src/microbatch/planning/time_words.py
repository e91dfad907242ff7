"""Write times for people."""

from __future__ import annotations

_PARTS = (("ms", 1e-3), ("us", 1e-6), ("ns", 1e-9))
_UNITS = (("d", 86_400), ("h", 3600), ("min", 60))


def format_time(seconds: float) -> str:
    """Format a time with 3 significant digits, in the largest unit of which there are two.

    Args:
        seconds: Finite, at least 0.

    Returns:
        The time in ns, us, ms, s, min, h or d.

    Example:
        >>> (
        ...     format_time(1.2e-7),
        ...     format_time(0.0123),
        ...     format_time(95),
        ...     format_time(150),
        ...     format_time(8000),
        ...     format_time(400_000),
        ... )
        ('120 ns', '12.3 ms', '95.0 s', '2.50 min', '2.22 h', '4.63 d')
    """
    if seconds < 1:
        unit, length = next(((unit, length) for unit, length in _PARTS if seconds >= length), ("ms", 1e-3))
        return f"{seconds / length:.3g} {unit}"
    unit, length = next(((unit, length) for unit, length in _UNITS if seconds >= 2 * length), ("s", 1))
    amount = seconds / length
    return f"{amount:,.0f} {unit}" if amount >= 99.95 else f"{amount:#.3g} {unit}"
