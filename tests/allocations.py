"""What the host's allocator did while something ran, those inside of operators included, as the profiler tells it."""

import gc
from collections.abc import Callable
from itertools import accumulate
from typing import Any

from torch.profiler import ProfilerActivity, profile


def recorder() -> profile:
    """Make a profiler of allocations, to be entered, or started and stopped."""
    return profile(activities=[ProfilerActivity.CPU], profile_memory=True)


def changes(recorded: profile) -> list[int]:
    """List what a recorder saw, in order: the bytes of each allocation, and of each release below zero."""
    assert recorded.profiler is not None
    assert recorded.profiler.kineto_results is not None
    events: list[Any] = recorded.profiler.kineto_results.events()
    memory = sorted((event for event in events if event.name() == "[memory]"), key=lambda event: event.start_ns())
    assert memory, "the profiler saw no allocation"
    return [event.nbytes() for event in memory]


def allocated_peak(run: Callable[[], object]) -> int:
    """Run something and return the most bytes that it held at once beyond what was there before."""
    gc.collect()  # or cycles of earlier tests are released inside, and lower the peak
    with recorder() as recorded:
        run()
    return max(accumulate(changes(recorded), initial=0))
