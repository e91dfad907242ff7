"""Errors that a signal handler of the user's raised, such as a time limit, which nothing may swallow."""

from __future__ import annotations

import signal
from collections.abc import Generator
from contextlib import contextmanager
from types import CodeType, TracebackType
from typing import Any


def is_from_signal(error: BaseException) -> bool:
    """Return whether an error, or one that it was raised from, was raised in a signal handler.

    A handler may raise anywhere, also in a dry run, whose own errors are not passed on.
    """
    codes: frozenset[CodeType] | None = None
    seen: set[int] = set()
    todo: list[BaseException | None] = [error]
    while todo:
        each = todo.pop()
        if each is None or id(each) in seen:
            continue
        seen.add(id(each))
        codes = _handlers() if codes is None else codes
        trace: TracebackType | None = each.__traceback__
        while trace is not None:
            if trace.tb_frame.f_code in codes:
                return True
            trace = trace.tb_next
        todo += [each.__cause__, each.__context__]
    return False


@contextmanager
def suppress_errors() -> Generator[None]:
    """Leave the block at any error, except at one that a signal handler raised."""
    try:
        yield
    except Exception as error:
        if is_from_signal(error):
            raise


def _handlers() -> frozenset[CodeType]:
    """Return the code of every signal handler that is a Python function."""
    found = (_code_of(signal.getsignal(each)) for each in signal.valid_signals())
    return frozenset(code for code in found if code is not None)


def _code_of(handler: Any) -> CodeType | None:
    while hasattr(handler, "func"):  # of functools.partial
        handler = handler.func
    handler = getattr(handler, "__func__", handler)
    code = getattr(handler, "__code__", None)
    if code is None and callable(handler):
        code = getattr(vars(type(handler)).get("__call__"), "__code__", None)
    return code if isinstance(code, CodeType) else None
