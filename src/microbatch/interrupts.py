"""Postpone signals while a window changes what must change together: Ctrl-C never leaves half a step."""

from __future__ import annotations

import _signal  # pyright: ignore[reportMissingImports] - behind `signal`, which searches an enum at every call
import inspect
import signal
import threading
from collections.abc import Callable, Sequence
from pathlib import Path
from types import CodeType, FrameType
from typing import Any, TypeVar
from weakref import WeakSet

import torch

_F = TypeVar("_F", bound=Callable[..., Any])

# An error in the first two leaves a context open; Python swallows an error in the last one.
_NAMES = {"__enter__", "__exit__", "__del__"}
_STANDARD = ("/contextlib.py", "/weakref.py")
# Files of the package and of torch, and functions that beartype generated.
_OURS = (str(Path(__file__).parent), str(Path(torch.__file__).parent), "<@")
_UNBROKEN = set[CodeType]()


def unbroken(function: _F) -> _F:
    """Postpone signals until a function has returned, inside of windows.

    Args:
        function: A function that calls only functions of this package and of torch.

    Returns:
        The same function.
    """
    _UNBROKEN.add(function.__code__)
    return function


class Interrupts:
    """Postpone signals, such as Ctrl-C, in the parts of a window that must not stop halfway.

    From `begin` to `end`, a handler stands in front of the user's. It calls the user's handler at once, except while
    `held` is set, and inside of functions that must not stop halfway: those that enter or leave a context, finalizers,
    and functions under `unbroken`.

    Only handlers in Python can raise an error in the middle of a step. Others are left alone.

    Args:
        signals: The signals to watch.

    Attributes:
        held: Whether signals wait now.
        waiting: The signals that wait.
    """

    def __init__(self, signals: Sequence[int] = ()) -> None:
        self.held = False
        self._signals, self.waiting = signals, list[int]()
        self._windows = WeakSet[Any]()  # a window that was abandoned counts no longer
        self._handlers: dict[int, Callable[[int, FrameType | None], Any]] = {}

    @property
    def held_by_window(self) -> bool:
        """Whether `held` is set and a window is left; an error that was no signal may have left it set."""
        return self.held and bool(self._windows)

    def begin(self, window: object) -> None:
        """Start to watch, with `held` set.

        Args:
            window: The window.
        """
        self.held = True
        self._windows.add(window)
        for number in self._signals:
            handler: Any = _signal.getsignal(number)
            if callable(handler) and handler != self._handle:
                self._handlers[number] = handler
                _signal.signal(number, self._handle)

    def end(self, window: object, *, held: bool) -> None:
        """Restore the handlers after the last window, and deliver the signals that waited.

        Args:
            window: The window.
            held: Whether `held` was set before `begin`.
        """
        self._windows.discard(window)
        try:
            if not self._windows and threading.current_thread() is threading.main_thread():
                for number, handler in self._handlers.items():
                    if _signal.getsignal(number) == self._handle:
                        _signal.signal(number, handler)
        finally:
            self.held = held
            self.deliver()

    def deliver(self) -> None:
        """Deliver the signals that waited, unless they have to wait longer."""
        while self.waiting and not self.held:
            number = self.waiting.pop()
            self._handlers[number](number, inspect.currentframe())

    def _handle(self, number: int, frame: FrameType | None) -> None:
        if self.held or _must_return(frame):
            self.waiting.append(number)
        else:
            self._handlers[number](number, frame)


def _must_return(frame: FrameType | None) -> bool:
    """Return whether a function that must not stop halfway is running; functions of the user may stop."""
    while frame is not None:
        code = frame.f_code
        if code.co_name in _NAMES or code in _UNBROKEN or code.co_filename.endswith(_STANDARD):
            return True
        if not code.co_filename.startswith(_OURS):
            return False
        frame = frame.f_back
    return False


def interrupts_here() -> Interrupts:
    """Return the interrupts of this thread: Python calls signal handlers in the main thread only."""
    return _MAIN if threading.current_thread() is threading.main_thread() else Interrupts()


# The last one is restored last: its handler usually raises.
_MAIN = Interrupts([signal.SIGTERM, signal.SIGINT])
