"""Checks of arguments that hold for values of any kind, also for those that cannot be compared or hashed."""

from __future__ import annotations

import math
import operator
from collections.abc import Sequence
from inspect import CO_VARARGS
from numbers import Integral
from types import FunctionType, MethodType
from typing import Any, TypeGuard

from microbatch.errors import ConfigError
from microbatch.kind_words import kind_of

_LOSSES = ("torch.nn.functional", "torch.nn.modules.loss", "torch._C._nn")


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
    """Refuse a value that is not a function, or is a Python function of other arguments.

    Args:
        name: Name of the argument.
        value: The value.
        call: How it will be called, such as ``"loss_fn(model, microbatch)"``.

    Raises:
        ConfigError: It cannot be called so.
    """
    if not callable(value) or isinstance(value, type):
        raise ConfigError(f"{name} must be a function that is called as {call}, not {value!r}")
    arguments = call.count(",") + 1
    if arguments > 1 and attribute(value, "__module__") in _LOSSES:
        raise ConfigError(
            f"{name} is called as {call}, and {_described(value)} takes outputs and targets: pass a function that "
            "calls both the model and the loss, such as lambda model, batch: loss(model(batch[0]), batch[1])"
        )
    if not _takes(value, arguments):
        raise ConfigError(f"{name} is called as {call}, and {_described(value)} does not take these arguments")


def _described(value: object) -> str:
    name = attribute(value, "__qualname__")
    return kind_of(value) if name is None else f"the function {name!r}"


def _takes(value: object, arguments: int) -> bool:
    """Return whether a function takes this many arguments by position; True for what is not written in Python."""
    if type(value) is FunctionType and value.__code__.co_argcount == arguments and not value.__code__.co_kwonlyargcount:
        return True  # the usual case
    function: Any = value
    if not isinstance(value, FunctionType | MethodType):  # a module, or another object that is called
        function = attribute(value, "forward") or attribute(value, "__call__")  # the method itself
    bound = isinstance(function, MethodType)
    plain: Any = function.__func__ if isinstance(function, MethodType) else function
    if not isinstance(plain, FunctionType) or attribute(plain, "__wrapped__") is not None:
        return True
    code, given = plain.__code__, arguments + bound
    needed = code.co_kwonlyargcount - len(plain.__kwdefaults__ or ())
    least = code.co_argcount - len(plain.__defaults__ or ())
    return needed == 0 and least <= given and (given <= code.co_argcount or bool(code.co_flags & CO_VARARGS))


def whole(value: object, *, least: int | None = None) -> int | None:
    """Return a whole number of any library, such as one of NumPy, as an int.

    Args:
        value: The value.
        least: The smallest number that is allowed; `None` allows all.

    Returns:
        The number; `None` for a bool, for a smaller number, and for everything that is no whole number.

    Example:
        >>> whole(4, least=1), whole(0, least=1), whole(4.0), whole(True)
        (4, None, None, None)
    """
    if type(value) is int:
        number = value
    elif isinstance(value, bool) or not isinstance(value, Integral):  # a tensor is read from its device
        return None
    else:
        try:
            number = operator.index(value)
        except Exception:  # noqa: BLE001 - whatever the user's own object raises
            return None
    return number if least is None or number >= least else None


def check_whole(name: str, value: object, *, least: int) -> int:
    """Return a whole number of any library as an int, or refuse it.

    Args:
        name: Name of the argument.
        value: The value.
        least: The smallest number that is allowed.

    Returns:
        The number.

    Raises:
        ConfigError: It is no whole number, is smaller, or does not fit into 64 bits.
    """
    number = whole(value, least=least)
    if number is None:
        raise ConfigError(f"{name} must be a whole number of at least {least}, not {value!r}")
    if number >= 1 << 63:
        raise ConfigError(f"{name} must be below 2 to the power of 63")
    return number


def listed_of(value: Any) -> list[Any] | None:
    """Return what an object yields when it is iterated over.

    Args:
        value: Any object.

    Returns:
        The list; `None` for an object that cannot be iterated over, such as a 0-d array, which only looks iterable.
    """
    try:
        return list(value)
    except Exception:  # noqa: BLE001 - whatever the user's own object raises
        return None


def attribute(value: object, name: str, default: Any = None) -> Any:
    """Return an attribute of a user's object; the default if looking it up raises any error.

    A class such as ``class Batch(dict): __getattr__ = dict.__getitem__`` raises `KeyError` for an attribute that is not
    there, so that `hasattr` and `getattr` raise, too.

    Args:
        value: The object.
        name: Name of the attribute.
        default: Returned if there is none.

    Returns:
        The attribute, or the default.
    """
    try:
        return getattr(value, name, default)
    except Exception:  # noqa: BLE001 - whatever the user's own object raises
        return default


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
