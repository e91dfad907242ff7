"""What ends a window as a whole: how to restore the state before it, or to complete a step that has begun to write."""

from __future__ import annotations

import threading
from collections.abc import Callable
from contextlib import ExitStack
from typing import Any

from torch.utils.hooks import RemovableHandle

from microbatch.errors import OutOfMemoryError, RankError, WindowError
from microbatch.interrupts import Interrupts, interrupts_here
from microbatch.memory.signal_errors import is_from_signal
from microbatch.step.optimizer_step import Versions
from microbatch.step.saved_state import Modes, Snapshot, Unscaled


class Undo:
    """Restore the state from before a window after an error, while signals wait; one thread uses the window.

    Attributes:
        steps: Functions that restore the state; the last one is called first.
        hooks: Hooks that are removed at the end of the window.
        snapshot: The random state and the buffers from before the window, once they are saved.
        versions: For each optimizer, the versions of its parameters and state before its step; empty before the step.
        waited_for: Whether other ranks may wait for this one.
        interrupts: Postpones signals, from `begin` on.
        ident: The thread that uses the window, from `begin` on.
    """

    steps: list[Callable[[], object]]
    hooks: list[RemovableHandle]
    versions: list[Versions]
    interrupts: Interrupts
    ident: int
    _modes: Modes
    _thread: threading.Thread

    def __init__(self) -> None:
        self.steps, self.hooks, self.versions, self.waited_for = [], [], [], False
        self._held: bool | None = None

    def begin(self, window: object) -> None:
        """Postpone signals while the window opens."""
        self.interrupts, self._thread = interrupts_here(), threading.current_thread()
        self.ident = threading.get_ident()
        self._held = self.interrupts.held_by_window
        self.interrupts.begin(window)
        self._modes = Modes()

    def opened(self) -> None:
        """Deliver the signals that came while the window opened."""
        self.interrupts.held = bool(self._held)
        self.interrupts.deliver()

    def save(self, window: Any) -> None:
        """Save random state, buffers and the scaler's record."""
        if window.options.grad_scaler is not None:
            unscaled = Unscaled(window.options.grad_scaler, window.options.optimizers)
            self.steps.append(unscaled.restore)
            unscaled.set_aside()
        self.snapshot = Snapshot(window.model, window.device)
        self.steps.append(self.snapshot.restore)

    def close(self, window: Any) -> None:
        """Remove the hooks, and let another window open."""
        while self.hooks:
            self.hooks.pop().remove()
        window.setup.history.release(window)

    def end(self, window: object) -> None:
        """Restore the signal handlers after the window."""
        held, self._held = self._held, None
        if held is not None:
            self.interrupts.end(window, held=held)

    def refuse_thread(self, verb: str) -> None:
        """Raise the error of a thread that did not open the window."""
        raise WindowError(
            f"cannot {verb} a window in thread {threading.current_thread().name!r} that thread "
            f"{self._thread.name!r} opened; create one accumulator, with its own model, for each thread"
        )

    def restore_or_complete(self, window: Any, error: BaseException) -> None:
        """Restore the state from before the window; or end the step, if weights were written already."""
        # Only a signal skips the end of a `with` block. After other errors the blocks still end, the user's too.
        if isinstance(error, KeyboardInterrupt) or is_from_signal(error):
            self._modes.restore()
        if all(each.untouched for each in self.versions):
            with ExitStack() as stack:  # runs all of them, also if one raises an error
                while self.steps:
                    stack.callback(self.steps.pop(0))
            return
        # Buffers stay, too: they had moved before the step began.
        if window.record is None:
            window.setup.history.windows += 1
        window.gradients.clear()
        for optimizer in window.options.optimizers:
            optimizer.zero_grad()
        if not isinstance(error, OutOfMemoryError | RankError):  # which tell it themselves
            error.add_note(
                "microbatch: the optimizer had begun to write, so the step is not undone: weights may be partly "
                "updated. Continue from a checkpoint unless the step is known to be complete"
            )
