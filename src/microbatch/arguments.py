"""Checks of arguments that hold for values of any kind, also for those that cannot be compared or hashed."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TypeGuard

from microbatch.errors import ConfigError


def check_one_of(name: str, value: object, allowed: Sequence[object], *, also: str = "") -> None:
    """Refuse a value that is none of those allowed.

    Args:
        name: Name of the argument.
        value: The value.
        allowed: The values that are allowed.
        also: What else is allowed, for the message, such as ``"a Spill"``.

    Raises:
        ConfigError: It is none of them.
    """
    if not any(value is each or (type(value) is type(each) and value == each) for each in allowed):
        *others, last = [f'"{each}"' if isinstance(each, str) else str(each) for each in allowed]
        others += [also] if also else []
        raise ConfigError(f"{name} must be {', '.join(others)} or {last}, not {value!r}")


def check_callable(name: str, value: object, call: str) -> None:
    """Refuse a value that is not a function.

    Args:
        name: Name of the argument.
        value: The value.
        call: How it will be called, such as ``"loss_fn(model, microbatch)"``.

    Raises:
        ConfigError: It cannot be called.
    """
    if not callable(value):
        raise ConfigError(f"{name} must be a function that is called as {call}, not {value!r}")


def is_text(value: object, text: str) -> bool:
    """Return whether a value is this text."""
    return isinstance(value, str) and value == text


def is_finite(value: object) -> TypeGuard[int | float]:
    """Return whether a value is a finite number that a float can hold; a bool is none."""
    if isinstance(value, bool) or not isinstance(value, int | float):
        return False
    try:
        return math.isfinite(value)
    except OverflowError:
        return False
