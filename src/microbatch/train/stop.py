"""Stop politely: the first signal ends the run after the window, the second one at once."""

from __future__ import annotations

import signal
import threading
from types import FrameType, TracebackType
from typing import Any, Self


class StopRequest:
    """Listen for Ctrl-C, SIGTERM and a lost terminal (SIGHUP) while the block runs.

    The handler only remembers the signal: printing from it could break into the middle of another print. A second
    Ctrl-C raises `KeyboardInterrupt` where the program stands. Outside the main thread, where Python allows no
    handlers, nothing is listened for. SIGHUP stays ignored where it is, as under ``nohup``.

    One of several ranks goes on to listen after an error: its launcher sends SIGTERM as soon as another rank has died,
    which would end this one before it has written to its log which rank it was.

    Attributes:
        signal: The first signal that came, or `None`.

    Example:
        >>> with StopRequest() as stop:
        ...     signal.raise_signal(signal.SIGTERM)
        ...     print(stop.signal.name)
        SIGTERM
    """

    def __init__(self, *, ranks: int = 1) -> None:
        """Listen for nothing yet.

        Args:
            ranks: Number of ranks. With several, a second Ctrl-C does not raise: a launcher sends the terminal's signal
                to each rank again.
        """
        self._alone = ranks == 1
        self.signal: signal.Signals | None = None
        self._previous: dict[signal.Signals, Any] = {}

    def __enter__(self) -> Self:
        """Start to listen.

        Returns:
            Itself.
        """
        if threading.current_thread() is threading.main_thread():
            numbers = [signal.SIGINT, signal.SIGTERM]
            hang_up = getattr(signal, "SIGHUP", None)  # Windows has none
            if hang_up is not None and signal.getsignal(hang_up) is not signal.SIG_IGN:
                numbers.append(hang_up)
            for number in numbers:
                self._previous[number] = signal.signal(number, self._handle)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Put the handlers back that were there before, except after an error of one of several ranks."""
        if error is not None and not self._alone:
            return
        for number, handler in self._previous.items():
            signal.signal(number, handler)
        self._previous.clear()

    def _handle(self, number: int, _frame: FrameType | None) -> None:
        if self.signal is None:
            self.signal = signal.Signals(number)
        elif number == signal.SIGINT and self._alone:
            # Schedulers repeat SIGTERM; only a person at the keyboard means "now" by asking twice.
            raise KeyboardInterrupt
