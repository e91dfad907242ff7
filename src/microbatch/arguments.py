"""Checks of arguments that hold for values of any kind, also for those that cannot be compared or hashed."""

from __future__ import annotations

import math
from collections.abc import Sequence
from inspect import CO_VARARGS
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
    if arguments > 1 and getattr(value, "__module__", None) in _LOSSES:
        raise ConfigError(
            f"{name} is called as {call}, and {_described(value)} takes outputs and targets: pass a function that "
            "calls both the model and the loss, such as lambda model, batch: loss(model(batch[0]), batch[1])"
        )
    if not _takes(value, arguments):
        raise ConfigError(f"{name} is called as {call}, and {_described(value)} does not take these arguments")


def _described(value: object) -> str:
    name = getattr(value, "__qualname__", None)
    return kind_of(value) if name is None else f"the function {name!r}"


def _takes(value: object, arguments: int) -> bool:
    """Return whether a function takes this many arguments by position; True for what is not written in Python."""
    function: Any = value
    if not isinstance(value, FunctionType | MethodType):  # a module, or another object that is called
        function = getattr(value, "forward", None) or getattr(value, "__call__", None)  # noqa: B004 - the method itself
    bound = isinstance(function, MethodType)
    plain: Any = function.__func__ if isinstance(function, MethodType) else function
    if not isinstance(plain, FunctionType) or hasattr(plain, "__wrapped__"):
        return True
    code, given = plain.__code__, arguments + bound
    needed = code.co_kwonlyargcount - len(plain.__kwdefaults__ or ())
    least = code.co_argcount - len(plain.__defaults__ or ())
    return needed == 0 and least <= given and (given <= code.co_argcount or bool(code.co_flags & CO_VARARGS))


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
