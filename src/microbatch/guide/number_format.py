"""How the guide writes numbers."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping

from microbatch.memory.byte_amounts import format_bytes

_RAISED = str.maketrans("-0123456789", "⁻⁰¹²³⁴⁵⁶⁷⁸⁹")


def power(value: float) -> str:
    """Write a small number by its power of ten.

    Args:
        value: At least 0.

    Returns:
        Two digits.

    Example:
        >>> power(1.26e-7), power(0.034), power(0)
        ('1.3 × 10⁻⁷', '0.034', '0')
    """
    if value == 0:
        return "0"
    exponent = math.floor(math.log10(value))
    if -3 < exponent < 4:
        return f"{value:.2g}"
    return f"{value / 10**exponent:.1f} × 10{str(exponent).translate(_RAISED)}"


def percent(share: float) -> str:
    """Write a share.

    Args:
        share: 1 for all of it.

    Returns:
        Whole percents from ten up, two digits below.

    Example:
        >>> percent(0.204), percent(0.034)
        ('20 %', '3.4 %')
    """
    value = 100 * share
    return f"{value:.0f} %" if value >= 9.95 else f"{value:.2g} %"


def times(value: float) -> str:
    """Write a ratio.

    Args:
        value: More than 0.

    Returns:
        One decimal.

    Example:
        >>> times(4.86)
        '4.9 times'
    """
    return f"{value:.1f} times"


FORMATS: Mapping[str, Callable[[float], str]] = {
    "power": lambda value: _whole(power(value)),
    "percent": lambda value: _whole(percent(value)),
    "times": lambda value: _whole(times(value)),
    "bytes": lambda value: _whole(format_bytes(value)),
    "whole": lambda value: f"{round(value):,}",
    "plain": lambda value: f"{value:,.6f}".rstrip("0").rstrip("."),
}
"""Ways to write a number, by the name that the text calls them by. No line ends inside a number."""


def _whole(number: str) -> str:
    return number.replace(" ", "\N{NO-BREAK SPACE}")
