"""Run something that can stop in the middle, wait, and go on."""

from __future__ import annotations

import importlib.util
import threading
from abc import ABC, abstractmethod
from collections.abc import Callable
from contextvars import copy_context
from functools import cache, partial
from typing import Any

import torch

from microbatch.loss.thread_state import Carried, TakenOff


class Strand(ABC):
    """A task that runs only while the one who resumes it waits."""

    @abstractmethod
    def give(self, task: Callable[[], object]) -> None:
        """Give it the next task, when it has none.

        Args:
            task: Called with nothing, inside of the first `resume`; raises nothing.
        """

    @abstractmethod
    def resume(self) -> None:
        """Let it run until it pauses or its task is done."""

    @abstractmethod
    def pause(self) -> None:
        """Let the other one run; to be called inside of the task."""

    @abstractmethod
    def leave(self) -> None:
        """End it; it has no task now."""


def strand(device: torch.device) -> Strand:
    """Make a strand.

    Threads are what Python has. But each thread that has run an operator keeps OpenMP threads of its own, and as soon
    as all of these are more than the cores, they no longer spin but sleep at the end of every parallel operator: small
    operators then take twice as long. Greenlets, where that library is installed, take turns on one thread.

    Args:
        device: Where the model is.

    Returns:
        A strand without a task.

    Cost:
        Of a greenlet some 20 microseconds for each resume; of a thread 50, and what is said above.
    """
    return _Fibre(device) if _has_greenlet() else _Thread(device)


@cache
def _has_greenlet() -> bool:
    return importlib.util.find_spec("greenlet") is not None


class _Fibre(Strand):
    """On the same thread, so what torch keeps for a thread changes hands at every switch."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._fibre: Any = None
        self._other: Any = None
        self._mine: TakenOff | None = None

    def give(self, task: Callable[[], object]) -> None:
        import greenlet  # noqa: PLC0415 - optional

        self._fibre = greenlet.greenlet(partial(self._run, task))
        self._fibre.gr_context = copy_context()

    def resume(self) -> None:
        import greenlet  # noqa: PLC0415 - optional

        self._other = greenlet.getcurrent()
        theirs = TakenOff(self._device)
        # It begins with what there is, as a call does.
        (self._mine or theirs).put_on()
        self._mine = None
        self._fibre.switch()
        theirs.put_on()

    def pause(self) -> None:
        self._mine = TakenOff(self._device)
        self._other.switch()

    def leave(self) -> None:
        self._fibre = self._other = None

    def _run(self, task: Callable[[], object]) -> None:
        task()
        TakenOff(self._device)


class _Thread(Strand):
    """On a thread of its own.

    It stays for the next task, because a new one pays milliseconds for its first parallel operator.
    """

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._box = _Box()
        threading.Thread(target=_serve, args=(self._box,), name="microbatch", daemon=True).start()

    def give(self, task: Callable[[], object]) -> None:
        here = partial(_as_here, Carried(self._device), task)
        self._box.task = partial(copy_context().run, here)

    def resume(self) -> None:
        self._box.go.release()
        try:
            self._box.back.acquire()
        except KeyboardInterrupt:
            self._box.back.acquire()  # it runs on until it waits; only then is there one thread again
            raise

    def pause(self) -> None:
        self._box.back.release()
        self._box.go.acquire()

    def leave(self) -> None:
        self._box.go.release()


def _as_here(carried: Carried, task: Callable[[], object]) -> None:
    with carried.here():
        task()


class _Box:
    """What two threads pass to and fro: each waits for a lock that the other one opens."""

    def __init__(self) -> None:
        self.go, self.back = threading.Lock(), threading.Lock()
        self.go.acquire()
        self.back.acquire()
        self.task: Callable[[], object] | None = None


def _serve(box: _Box) -> None:
    while True:
        box.go.acquire()
        task, box.task = box.task, None
        if task is None:
            return
        task()
        del task
        box.back.release()
