"""What the allocator sees inside each operator, where no dispatcher looks: workspaces, reordered weights."""

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

from microbatch.memory.ledger import Timeline
from microbatch.memory.match_operators import spans
from microbatch.memory.meter import MemoryMeter, is_question

# Bytes of two allocations, each freed at once, that mark the beginning of an operator among the profiler's events.
_MARKS = (12_347, 54_323)


@dataclass(frozen=True, slots=True)
class Witnessed:
    """A real run with what the allocator held while each operator ran.

    Attributes:
        timeline: As the meter counted.
        levels: For each operator, the bytes that were held after each of its allocations, or all the while if it made
            none; everything that was there before included. Where only their highest is known, that one.
    """

    timeline: Timeline
    levels: Sequence[Sequence[int]]

    @property
    def peak_bytes(self) -> int:
        """Most bytes that the allocator held at once."""
        return max(map(max, self.levels), default=0)

    def levels_at(self, places: Sequence[int]) -> list[Sequence[int]]:
        """Say what was held while a few of the operators ran.

        Args:
            places: Operators, each with all that follow until the next.

        Returns:
            For each place the levels, or their highest where it stands for several operators.
        """
        every = spans(places, len(self.levels))
        return [self.levels[each[0]] if len(each) == 1 else [max(max(self.levels[i]) for i in each)] for each in every]


class AllocatorMeter(MemoryMeter):
    """A meter that also asks the allocator, before and after each operator, how much it held at most.

    On the CPU the profiler reports every allocation; on CUDA the allocator keeps its own highest figure, which is reset
    for each operator.

    Args:
        device: Whose allocator; of type ``"cpu"`` or ``"cuda"``.
        budget: As for `MemoryMeter`.

    Cost:
        The profiler's: some 20 microseconds an operator. For a few small microbatches, not for training.
    """

    def __init__(self, device: torch.device, *, budget: int | None = None) -> None:
        super().__init__(budget=budget, timeline=True)
        self._device = device
        self._profile: Any = None
        self._highest: list[int] = []
        self._base = 0

    def __enter__(self) -> Self:
        """Begin.

        Returns:
            The meter itself.

        Raises:
            RuntimeError: The profiler is in use already.
        """
        # What nobody holds any more would be released in the middle of the run, and counted against it.
        gc.collect()
        self._base = self.live_bytes
        if self._device.type == "cuda":
            self._base -= torch.cuda.memory_allocated(self._device)
        else:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")  # about builds without a GPU
                # The profiler's own library tells about each start on standard error, where nobody asked for it.
                os.environ.setdefault("KINETO_LOG_LEVEL", "99")
                self._profile = profile(activities=[ProfilerActivity.CPU], profile_memory=True)
                self._profile.__enter__()
        return super().__enter__()

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        """End."""
        super().__exit__(kind, error, traceback)
        if self._device.type == "cuda":
            self._highest.append(torch.cuda.max_memory_allocated(self._device))
            return
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            self._profile.__exit__(kind, error, traceback)

    def __torch_dispatch__(  # noqa: PLR0917 - torch calls it by position
        self, func: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        """Mark where an operator begins, run it, count what it made."""
        if not is_question(func):
            self._mark()
        return super().__torch_dispatch__(func, types, args, kwargs)

    def witnessed(self) -> Witnessed:
        """Return the run, once it is over."""
        if self._device.type == "cuda":
            levels = [[highest] for highest in self._highest[1:]]  # before the first operator there was none
        else:
            levels = _levels_between_marks(self._profile)
        return Witnessed(self.timeline, [[self._base + level for level in each] for each in levels])

    def _mark(self) -> None:
        if self._device.type == "cuda":
            self._highest.append(torch.cuda.max_memory_allocated(self._device))
            torch.cuda.reset_peak_memory_stats(self._device)
            return
        for size in _MARKS:
            torch.empty(size, dtype=torch.uint8, device="cpu")


def _levels_between_marks(profiled: Any) -> list[list[int]]:
    """Add up the profiler's allocations and releases, operator by operator."""
    events = [each for each in profiled.profiler.kineto_results.events() if each.name() == "[memory]"]
    events.sort(key=lambda each: each.start_ns())
    changes: list[int] = [each.nbytes() for each in events]
    first, second = _MARKS
    mark = [first, -first, second, -second]
    starts = [i for i, change in enumerate(changes) if change == first and changes[i : i + 4] == mark]
    levels: list[list[int]] = []
    for start, stop in pairwise([*starts, len(changes)]):
        # What was released before the first mark was not counted by the meter either.
        live = levels[-1][-1] if levels else sum(changes[:start])
        after = list(accumulate(changes[start + 4 : stop], initial=live))
        levels.append(after)
    return [_after_allocations(each) for each in levels]


def _after_allocations(levels: list[int]) -> list[int]:
    """Keep the levels that an allocation led to, or the first where there was none."""
    return [after for before, after in pairwise(levels) if after > before] or levels[:1]
