"""Measurement of allocations inside operators, which the dispatcher does not see: workspaces, reordered weights."""

from __future__ import annotations

import gc
import os
import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate, pairwise
from types import TracebackType
from typing import Any, Self

import torch
from torch.profiler import ProfilerActivity, profile

from microbatch.devices.device_memory import allocator_of, block_bytes
from microbatch.memory.ledger import Timeline
from microbatch.memory.match_operators import spans
from microbatch.memory.meter import MemoryMeter, is_question

# Sizes of two allocations that mark the start of an operator among the profiler's events; each is freed at once.
_MARKS = (12_347, 54_323)


@dataclass(frozen=True, slots=True)
class Witnessed:
    """A real run, with the bytes that the allocator held while each operator ran.

    An accelerator's allocator rounds every allocation up to a block. The levels are without this rounding, which is no
    straight line in the microbatch size.

    Attributes:
        timeline: The live bytes of tensors, as the meter counted them.
        levels: For each operator, the allocated bytes after each of its allocations, including everything from before
            the run. One number if the operator allocated nothing, or if only the maximum is known.
    """

    timeline: Timeline
    levels: Sequence[Sequence[int]]

    @property
    def peak_bytes(self) -> int:
        """Peak of the allocated bytes."""
        return max(map(max, self.levels), default=0)

    def levels_at(self, places: Sequence[int]) -> list[Sequence[int]]:
        """Return the allocated bytes during groups of operators.

        Args:
            places: Index of the first operator of each group; a group ends where the next one starts.

        Returns:
            For each group, the levels of its operator, or only the maximum if it has several operators.
        """
        every = spans(places, len(self.levels))
        return [self.levels[each[0]] if len(each) == 1 else [max(max(self.levels[i]) for i in each)] for each in every]


class AllocatorMeter(MemoryMeter):
    """A memory meter that also records the allocator's peak within each operator.

    On the CPU, the profiler reports every allocation. On an accelerator, the allocator's own peak counter is read and
    reset around each operator.

    Args:
        device: The device whose allocator is read; the CPU, or an accelerator whose backend counts the peak.
        budget: As for `MemoryMeter`.

    Cost:
        That of the profiler: some 20 microseconds an operator. For a few small microbatches, not for training.
    """

    def __init__(self, device: torch.device, *, budget: int | None = None) -> None:
        super().__init__(budget=budget, timeline=True)
        self._counters = allocator_of(device)
        self._profile: Any = None
        self._highest: list[int] = []
        # Bytes by which the live storages are rounded up; now, and before each operator.
        self._rounded, self._roundings = 0, list[int]()
        self._base, self._allocated = 0, block_bytes(device)

    def __enter__(self) -> Self:
        """Start to count and to profile."""
        # Garbage from before would otherwise be freed in the middle of the run, and change its levels.
        gc.collect()
        self._base = self.live_bytes
        if self._counters is not None:
            self._base -= self._counters.in_use() - self._rounded
        else:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")  # warnings about builds without a GPU
                # The profiler's library would print a line to standard error at each start.
                os.environ.setdefault("KINETO_LOG_LEVEL", "99")
                self._profile = profile(activities=[ProfilerActivity.CPU], profile_memory=True)
                self._profile.__enter__()
        return super().__enter__()

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        """Stop counting and profiling."""
        super().__exit__(kind, error, traceback)
        if self._counters is not None:
            self._highest.append(self._counters.peak())
            self._roundings.append(self._rounded)
            return
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            self._profile.__exit__(kind, error, traceback)

    def __torch_dispatch__(  # noqa: PLR0917 - torch calls it by position
        self, func: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        """Mark the start of an operator, run it, and count its outputs."""
        if not is_question(func):
            self._mark()
        return super().__torch_dispatch__(func, types, args, kwargs)

    def witnessed(self) -> Witnessed:
        """Return the measured run, after the meter was left."""
        if self._counters is not None:
            # The first reading is from before the first operator.
            levels = [
                [highest - min(each)]
                for highest, each in zip(self._highest[1:], pairwise(self._roundings), strict=True)
            ]
        else:
            levels = _levels_between_marks(self._profile)
        return Witnessed(self.timeline, [[self._base + level for level in each] for each in levels])

    def _count(self, size: int, change: int) -> None:
        super()._count(size, change)
        self._rounded += change * (-size % self._allocated)

    def _mark(self) -> None:
        if self._counters is not None:
            self._highest.append(self._counters.peak())
            self._roundings.append(self._rounded)
            self._counters.reset_peak()
            return
        for size in _MARKS:
            torch.empty(size, dtype=torch.uint8, device="cpu")


def _levels_between_marks(profiled: Any) -> list[list[int]]:
    """Sum the profiler's allocations and releases, operator by operator."""
    events = [each for each in profiled.profiler.kineto_results.events() if each.name() == "[memory]"]
    events.sort(key=lambda each: each.start_ns())
    changes: list[int] = [each.nbytes() for each in events]
    first, second = _MARKS
    mark = [first, -first, second, -second]
    starts = [i for i, change in enumerate(changes) if change == first and changes[i : i + 4] == mark]
    levels: list[list[int]] = []
    for start, stop in pairwise([*starts, len(changes)]):
        # The meter did not count releases from before the first mark either.
        live = levels[-1][-1] if levels else sum(changes[:start])
        after = list(accumulate(changes[start + 4 : stop], initial=live))
        levels.append(after)
    return [_after_allocations(each) for each in levels]


def _after_allocations(levels: list[int]) -> list[int]:
    """Return the levels right after allocations, or the first level if nothing was allocated."""
    return [after for before, after in pairwise(levels) if after > before] or levels[:1]
