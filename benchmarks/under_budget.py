"""Processes for `benchmarks.budget`: each trains in one way, a window whenever it is asked."""

from __future__ import annotations

import gc
import time
from concurrent.futures import ProcessPoolExecutor
from contextlib import nullcontext
from dataclasses import dataclass
from multiprocessing import get_context
from typing import Any

import torch
from torch import Tensor, nn

import microbatch as mb
from benchmarks.cases import IGNORED, loss_sum
from benchmarks.contenders import Subject, Window, loop, make_subject, trimmed_loop
from benchmarks.memory import Peak, warm_up_profiler

_MOST_STEPS = 80


@dataclass(frozen=True, slots=True, kw_only=True)
class Chosen:
    """What "auto" chose under a budget.

    Attributes:
        microbatch_size: Rows that go through the model at once; of ragged rows, of the longest length.
        decided: Whether speed was measured.
        why: In its words.
        steps: Steps until the choice.
        seconds: Of these steps.
    """

    microbatch_size: int
    decided: bool
    why: str
    steps: int
    seconds: float


class Contestant:
    """What a process trains: the loop at a size, or `microbatch` under a budget.

    Args:
        case: A key of `BUDGET_CASES`.
        size: Rows of the loop's microbatches; `None` for `microbatch`.
        budget: Bytes that `microbatch` may use.
        threads: Threads of torch's operators.
    """

    def __init__(self, case: str, *, size: int | None, budget: int | None, threads: int) -> None:
        torch.set_num_threads(threads)
        self.subject = make_subject(case, size or 1, device="cpu")
        self._listened: list[mb.PlanChosen] = []
        if size is None:
            self._window = self._auto(budget)
        else:
            self._window = (loop if self.subject.lengths is None else trimmed_loop)(self.subject)

    def window(self, around: Any = None) -> float:
        """Run one window, and return its seconds."""
        gc.collect()
        started = time.perf_counter()
        self._window(around or nullcontext())
        return time.perf_counter() - started

    def peaks(self) -> tuple[int, int]:
        """Return the most bytes that a window holds: of tensors, by the meter; and by the profiler."""
        meter = mb.MemoryMeter()
        meter.track(self.subject.model, self.subject.optimizer, self.subject.batch)
        self.window(meter)
        gc.collect()
        warm_up_profiler()
        allocated = Peak(self.subject)
        self.window(allocated)
        return meter.peak_bytes, allocated.bytes

    def choose(self) -> Chosen:
        """Train until "auto" has chosen.

        Raises:
            RuntimeError: It has not chosen within 80 steps.
        """
        seconds: list[float] = []
        while not self._listened:
            if len(seconds) == _MOST_STEPS:
                raise RuntimeError(f'"auto" has chosen no size in {_MOST_STEPS} steps')
            seconds.append(self.window())
        found = self._listened[0]
        return Chosen(
            microbatch_size=found.microbatch_size,
            decided=found.decided,
            why=found.why,
            steps=len(seconds),
            seconds=sum(seconds),
        )

    def _auto(self, budget: int | None) -> Window:
        subject = self.subject
        accumulator = mb.Accumulator(
            subject.model,
            subject.optimizer,
            microbatch_size="auto",
            memory_budget=budget,
            lengths=subject.lengths,
            batch_norm="microbatch",
            listeners=[self._listen],
        )

        def window(around: Any) -> None:
            with around:
                accumulator.step(subject.batch, lambda model, piece: _loss(subject, model, piece))

        return window

    def _listen(self, event: object) -> None:
        if isinstance(event, mb.PlanChosen):
            self._listened.append(event)


def _loss(subject: Subject, model: nn.Module, piece: dict[str, Tensor]) -> mb.Loss:
    labels = piece["labels"]
    count = labels.numel() if subject.lengths is None else (labels != IGNORED).sum()
    return mb.Loss(sum=loss_sum(model, piece), count=count)


_HERE: list[Contestant] = []
"""Of the process that a contestant has for itself."""


def _start(case: str, settings: dict[str, Any]) -> None:
    _HERE.append(Contestant(case, **settings))


def _ask(what: str) -> Any:
    return getattr(_HERE[0], what)()


def _spent() -> float:
    return time.process_time()


class Handle:
    """A contestant in a process of its own, which works only while it is asked.

    Args:
        case: A key of `BUDGET_CASES`.
        size: Rows of the loop's microbatches; `None` for `microbatch`.
        budget: Bytes that `microbatch` may use.
        threads: Threads of torch's operators.
    """

    def __init__(self, case: str, *, size: int | None = None, budget: int | None = None, threads: int) -> None:
        # Forked from a server that has imported everything and computed nothing: a fresh heap, without a new import.
        self._pool = ProcessPoolExecutor(1, mp_context=get_context("forkserver"))
        self._pool.submit(_start, case, {"size": size, "budget": budget, "threads": threads}).result()

    def ask(self, what: str) -> Any:
        """Call a method of the contestant without arguments."""
        return self._pool.submit(_ask, what).result()

    def spent(self) -> float:
        """Return the CPU seconds of the process so far."""
        return self._pool.submit(_spent).result()

    def close(self) -> None:
        """End the process."""
        self._pool.shutdown()
