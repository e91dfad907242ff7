"""Let signals wait while a window changes what must change together: Ctrl-C never leaves half a step."""

from __future__ import annotations

import _thread
import signal
import threading
from collections.abc import Callable, Sequence
from types import FrameType
from typing import Any

_EDGES = {"__enter__", "__exit__"}


class Interrupts:
    """Postpone signals, such as Ctrl-C, in the parts of a window that must not stop halfway.

    From `begin` to `end`, a handler stands in front of the user's. While `held` is set, it signals again at Python's
    next check, until the part is through. Everywhere else, it calls the user's handler at once. A context manager that
    is entered or left just then is never interrupted, because it would stay open.

    Only handlers in Python can raise an error in the middle of a step. Others are left alone.

    Args:
        signals: The signals to watch.

    Attributes:
        held: Whether signals wait now.
    """

    def __init__(self, signals: Sequence[int] = ()) -> None:
        self.held = False
        self._signals, self._windows = signals, 0
        self._handlers: dict[int, Callable[[int, FrameType | None], Any]] = {}

    def begin(self) -> bool:
        """Start to watch, with `held` set.

        Returns:
            Whether `held` was set before, for `end`.
        """
        held, self.held = self.held, True
        self._windows += 1
        for number in self._signals:
            handler: Any = signal.getsignal(number)
            if callable(handler) and handler != self._handle:
                self._handlers[number] = handler
                signal.signal(number, self._handle)
        return held

    def end(self, *, held: bool) -> None:
        """Restore the handlers after the last window; a signal that waited reaches its own handler now.

        Args:
            held: The result of `begin`.
        """
        self._windows -= 1
        try:
            if self._windows > 0 or threading.current_thread() is not threading.main_thread():
                return
            for number, handler in self._handlers.items():
                if signal.getsignal(number) == self._handle:
                    signal.signal(number, handler)
        finally:
            self.held = held

    def _handle(self, number: int, frame: FrameType | None) -> None:
        code = None if frame is None else frame.f_code
        leaving = code is not None and (code.co_name in _EDGES or code.co_filename.endswith("contextlib.py"))
        if self.held or leaving:
            _thread.interrupt_main(signal.Signals(number))
        else:
            self._handlers[number](number, frame)


def interrupts_here() -> Interrupts:
    """Return the interrupts of this thread: Python calls signal handlers in the main thread only."""
    return _MAIN if threading.current_thread() is threading.main_thread() else Interrupts()


# The last one is restored last: its handler usually raises.
_MAIN = Interrupts([signal.SIGTERM, signal.SIGINT])
