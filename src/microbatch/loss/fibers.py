"""Run a task that can pause in the middle and continue later."""

from __future__ import annotations

import importlib.util
import threading
from abc import ABC, abstractmethod
from collections.abc import Callable
from contextvars import copy_context
from functools import cache, partial
from typing import Any

import torch

from microbatch.interrupts import unbroken
from microbatch.loss.thread_state import RemovedThreadState, ThreadState


class Fiber(ABC):
    """A task that can pause; it runs only while the caller of `resume` waits."""

    @abstractmethod
    def assign(self, task: Callable[[], object]) -> None:
        """Assign the next task, which must not raise; the fiber must have no unfinished task."""

    @abstractmethod
    def resume(self) -> None:
        """Run the task until it pauses or ends."""

    @abstractmethod
    def pause(self) -> None:
        """Return control to the caller of `resume`; to be called inside the task."""

    @abstractmethod
    def close(self) -> None:
        """End the fiber, which must have no unfinished task."""


def make_fiber(device: torch.device) -> Fiber:
    """Return a new fiber: a greenlet where the greenlet library is installed, else a thread.

    Greenlets take turns on one thread. With one thread per fiber, each thread that has run an operator keeps its own
    OpenMP threads. When there are more OpenMP threads than cores, they sleep instead of spinning at the end of each
    parallel operator. Small operators then take twice as long.

    Cost:
        About 20 microseconds per `resume` of a greenlet. About 50 per `resume` of a thread, and the slower operators.
    """
    return _GreenletFiber(device) if _has_greenlet() else _ThreadFiber(device)


@cache
def _has_greenlet() -> bool:
    return importlib.util.find_spec("greenlet") is not None


class _GreenletFiber(Fiber):
    """Run the task in a greenlet, on the caller's thread.

    Each switch therefore exchanges the state that torch keeps per thread.
    """

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._greenlet: Any = None
        self._resumer: Any = None
        self._own_state: RemovedThreadState | None = None

    def assign(self, task: Callable[[], object]) -> None:
        import greenlet  # noqa: PLC0415 - optional

        self._greenlet = greenlet.greenlet(partial(self._run, task))
        self._greenlet.gr_context = copy_context()

    @unbroken
    def resume(self) -> None:
        import greenlet  # noqa: PLC0415 - optional

        self._resumer = greenlet.getcurrent()
        resumer_state = RemovedThreadState(self._device)
        # The first time, the task starts with the caller's state, as a called function does.
        (self._own_state or resumer_state).restore()
        self._own_state = None
        try:
            self._greenlet.switch()
        finally:
            resumer_state.restore()

    @unbroken
    def pause(self) -> None:
        self._own_state = RemovedThreadState(self._device)
        self._resumer.switch()

    def close(self) -> None:
        self._greenlet = self._resumer = None

    def _run(self, task: Callable[[], object]) -> None:
        try:
            task()
        finally:
            RemovedThreadState(self._device)


class _ThreadFiber(Fiber):
    """Run the tasks on a thread of their own.

    The thread is kept for the next task, because the first parallel operator of a new thread takes milliseconds.
    """

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._handoff = _Handoff()
        threading.Thread(target=_run_tasks, args=(self._handoff,), name="microbatch", daemon=True).start()

    def assign(self, task: Callable[[], object]) -> None:
        run = partial(_run_with_state, ThreadState(self._device), task)
        self._handoff.task = partial(copy_context().run, run)

    def resume(self) -> None:
        self._handoff.may_run.release()
        try:
            self._handoff.has_paused.acquire()
        except KeyboardInterrupt:
            self._handoff.has_paused.acquire()  # the task runs until it pauses; only then may the caller go on
            raise

    def pause(self) -> None:
        self._handoff.has_paused.release()
        self._handoff.may_run.acquire()

    def close(self) -> None:
        self._handoff.may_run.release()


def _run_with_state(state: ThreadState, task: Callable[[], object]) -> None:
    with state.applied():
        task()


class _Handoff:
    """Two locks with which two threads hand over control: each waits for a lock that the other one releases."""

    def __init__(self) -> None:
        self.may_run, self.has_paused = threading.Lock(), threading.Lock()
        self.may_run.acquire()
        self.has_paused.acquire()
        self.task: Callable[[], object] | None = None


def _run_tasks(handoff: _Handoff) -> None:
    """Run the tasks that arrive through ``handoff``, until there is none."""
    while True:
        handoff.may_run.acquire()
        task, handoff.task = handoff.task, None
        if task is None:
            return
        task()
        del task
        handoff.has_paused.release()
