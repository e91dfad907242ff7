"""Counts and settings that a window passes on to the next one."""

from __future__ import annotations

import threading
from dataclasses import dataclass, field

from torch import nn

from microbatch.errors import WindowOpenError


@dataclass(slots=True)
class History:
    """Counts and settings that a window passes on to the next one.

    Attributes:
        windows: Number of windows that have ended, with or without a step.
        skipped: Number of windows dropped because their gradient was not finite.
        count: Count of the last window, the estimate for the next one. It is only a scale and never changes a result.
        seed: Seed of random masks: the process's seed when the first window opens.
        moving: Parameters without ``requires_grad`` that forward passes were seen to move: module and name.
        resumed: Number of windows that had ended before the state was loaded.
    """

    windows: int = 0
    skipped: int = 0
    count: float = 0.0
    seed: int | None = None
    moving: set[tuple[nn.Module, str]] = field(default_factory=set[tuple[nn.Module, str]], repr=False)
    resumed: int = 0
    # The open window and the name of its thread. A dict, because `setdefault` is indivisible between threads.
    _open: dict[str, tuple[object, str]] = field(default_factory=dict[str, tuple[object, str]], init=False, repr=False)

    @property
    def here(self) -> int:
        """Number of windows that have ended in this process."""
        return self.windows - self.resumed

    def claim(self, window: object) -> None:
        """Open a window, unless another one is open; `WindowOpenError` then names its thread."""
        self._refuse(self._open.setdefault("window", (window, threading.current_thread().name)), unless=window)

    def check_free(self) -> None:
        """Raise `WindowOpenError` if a window is open."""
        self._refuse(self._open.get("window"))

    def release(self, window: object) -> None:
        """Close a window, if it is the open one."""
        if self._open.get("window", (None, ""))[0] is window:
            self._open.clear()

    @staticmethod
    def _refuse(found: tuple[object, str] | None, *, unless: object = None) -> None:
        if found is None or found[0] is unless:
            return
        here, there = threading.current_thread().name, found[1]
        raise WindowOpenError(
            "another window of this accumulator is open; leave it before opening the next one"
            if here == there
            else f"another window of this accumulator is open in thread {there!r}, and this is thread {here!r}; create "
            "one accumulator, with its own model, for each thread"
        )
