"""What the next windows learn from one that went well."""

from __future__ import annotations

import warnings

from microbatch.memory.budget import format_bytes
from microbatch.step.events import BudgetPassed, Event, PlanChosen, SizeChanged
from microbatch.step.foresee import room_for, watched_once
from microbatch.step.pace import Pace
from microbatch.step.record import Step
from microbatch.step.recovery import Cut, shrink
from microbatch.step.settings import Memory, Settings
from microbatch.step.sizing import Sizing
from microbatch.step.tune import Played
from microbatch.step.watch import Watch


def look_back(
    settings: Settings,
    memory: Memory,
    *,
    watch: Watch,
    cut: Cut | None,
    step: Step,
    laps: list[tuple[float, float]] | None,
) -> list[Event]:
    """Learn from a window that went well.

    Args:
        settings: The accumulator's.
        memory: The accumulator's; remembers what was learned.
        watch: What counted the window's bytes.
        cut: How its batch was cut.
        step: Its record.
        laps: Seconds and rows of its microbatches, where they were timed.

    Returns:
        What there is to tell of it.
    """
    watched = memory.watched
    watch.went_well()
    told = adapt(memory.sizing, cut, step=step.index, allocation_retries=watch.allocation_retries)
    chosen = _tune(settings, memory, watch=watch, cut=cut, step=step, laps=laps)
    peak, budget = step.peak_bytes, settings.memory_budget
    if peak is not None and isinstance(budget, int) and peak - budget > watched.told:
        watched.told = peak - budget
        told.append(BudgetPassed(step=step.index, peak_bytes=peak, budget=budget))
        if not settings.listeners:
            warnings.warn(
                f"a window took {format_bytes(peak)}, more than its memory_budget of {format_bytes(budget)}, where "
                "nothing could be refused without leaving half a step behind, as inside the optimizer",
                stacklevel=4,
            )
    return told if chosen is None else [*told, chosen]


def adapt(sizing: Sizing, cut: Cut | None, *, step: int, allocation_retries: int) -> list[Event]:
    """Adapt the size after a window that went well.

    Args:
        sizing: The size.
        cut: How the window's batch was cut.
        step: Index of the window.
        allocation_retries: Times that CUDA's allocator had to empty its cache and ask again in it: a window that only
            just fits, and waits for the device each time.

    Returns:
        What to tell listeners.
    """
    if allocation_retries:
        changed = shrink(sizing, cut)
        reason = f"the allocator had to empty its cache {allocation_retries} times inside the window: too tight"
    else:
        before, halvings = (sizing.rows if sizing.halvings else 0), sizing.halvings
        sizing.settle()
        changed = None if sizing.halvings == halvings else (before, sizing.rows)
        reason = "memory has been enough for a while"
    return [] if changed is None else [SizeChanged(step=step, before=changed[0], after=changed[1], reason=reason)]


def _tune(
    settings: Settings,
    memory: Memory,
    *,
    watch: Watch,
    cut: Cut | None,
    step: Step,
    laps: list[tuple[float, float]] | None,
) -> PlanChosen | None:
    """Learn how fast the window's size is."""
    tuning = memory.tuning
    if tuning is None and memory.pace is not None and cut is not None:
        _keep_pace(memory, memory.pace, cut=cut, step=step, metered=watch.passing)
    if tuning is None or laps is None:
        return None
    played = Played(
        step=step.index,
        rows=sum(rows for _, rows in laps),
        largest=0 if cut is None else cut.used,
        laps=laps,
        peak_bytes=step.peak_bytes,
        # On CUDA nobody holds a budget that nobody gave, and the allocator counts all the same.
        budget=room_for(settings, ()) if watch.budget is None and step.peak_bytes is not None else watch.budget,
        watched=watch.passing,
        tokens=None if cut is None else cut.tokens,
    )
    chosen = tuning.after(played)
    if chosen is not None:
        memory.tuning = None
        if memory.pace is None and settings.look_again:
            memory.pace = Pace(tuning)
    elif tuning.warming:
        memory.watched = watched_once(memory.watched)
    return chosen


def _keep_pace(memory: Memory, pace: Pace, *, cut: Cut, step: Step, metered: bool) -> None:
    """Look again where steps have become markedly faster or slower, for another reason than their size."""
    amount = float(step.samples) if cut.tokens is None else float(cut.tokens)
    if metered or memory.sizing.halvings or step.retries or not amount:
        return
    if pace.changed(step.seconds / amount):
        memory.tuning = pace.look(memory.sizing)
