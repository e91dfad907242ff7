"""The microbatch size of an accumulator: given or chosen, halved when memory runs out, doubled again later."""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import ExitStack
from typing import Any

from torch.nn.modules.batchnorm import _BatchNorm  # pyright: ignore[reportPrivateUsage] - the one base of all of them

from microbatch.batch.batch_tree import rows_of
from microbatch.errors import BatchError
from microbatch.memory.signal_errors import is_from_signal
from microbatch.step.cutting import Cut, Cutting
from microbatch.step.events import Event, SizeChanged
from microbatch.step.options import EXACT, Options
from microbatch.step.part import Function, OpenWindow, Part
from microbatch.step.parts.memory_budget import MemoryBudget, is_fake
from microbatch.step.record import Step
from microbatch.step.size.room import room_for
from microbatch.step.size.sizing import Sizing
from microbatch.step.size.stopwatch import Stopwatch
from microbatch.step.size.timing_search import Played, Tuning

_COPIES, _SMALL = 4, 0.1
"""Copies of a weight: itself, its gradient, two of the optimizer; and the share of memory that a small model takes."""


class MicrobatchSize(Part):
    """Hold the microbatch size, and search for it with ``microbatch_size="auto"``.

    Args:
        options: The options of the accumulator.
        meter: Measures the memory of windows.
        stopwatch: Times the passes of windows.

    Attributes:
        sizing: The size.
        tuning: Results of the search while it runs; `None` before and after.
        cut_of: How the window's batch was cut; `None` before it is cut.

    Source:
        Laws M1, M6.
    """

    def __init__(self, options: Options, meter: MemoryBudget, stopwatch: Stopwatch) -> None:
        self._options, self._meter, self._stopwatch = options, meter, stopwatch
        self.sizing = Sizing(asked=options.microbatch_size)
        self.tuning: Tuning | None = None
        self.cut_of: Cut | None = None

    # -- before and inside of a window ---------------------------------------------------------------------------------

    def before(self, batch: object, loss_fn: Function, *, settled: Options) -> None:
        """Predict which sizes fit, if the first windows have not shown it.

        A small model has a first window of a few rows, whose peak shows which sizes fit. Usually all of them do, so no
        prediction is needed. For a large model, dry runs predict the peak before the first window.

        Cost:
            For dry runs, about 0.1 milliseconds for each operator at each of four sizes or more.
        """
        try:
            rows = rows_of(batch)
        except BatchError:
            return  # the window raises this error, and notifies the other ranks
        if not rows:
            return
        if self.tuning is None:
            self._begin(rows)
            if self._is_small(room_for(self._options, batch)):
                return
        tuning = self.tuning
        if tuning is None:
            return
        tuning.rehearsed = True
        try:
            prediction = _predicted(settled, loss_fn, batch)
        except Exception as error:
            if is_from_signal(error):
                raise
            return  # then sizes are tried instead, and the real step raises the error
        tuning.foresee(prediction, budget=room_for(self._options, batch))

    @property
    def unsure(self) -> bool:
        """Whether a prediction of what fits may be needed."""
        return self.sizing.open or (self.tuning is not None and self.tuning.unsure)

    @property
    def is_settled(self) -> bool:
        """Whether no search for the size is under way."""
        return self.tuning is None and not self.sizing.open

    def for_rows(self, rows: int) -> Sizing:
        """Return the size to cut a batch by, and start the search if there is none."""
        if rows and self.sizing.open:
            self._begin(rows)
        self._stopwatch.on = self.tuning is not None
        return self.sizing

    def open(self, window: OpenWindow, stack: ExitStack) -> None:
        """Forget how the last window's batch was cut."""
        self.cut_of = None

    def cut(self, window: OpenWindow, batch: object, cutting: Cutting) -> None:
        """Store how the batch was cut."""
        self.cut_of = cutting.cut or self.cut_of

    # -- after a window ------------------------------------------------------------------------------------------------

    def done(self, window: OpenWindow, step: Step) -> None:
        """Update the size from the window's memory and time."""
        for event in adapt(self.sizing, self.cut_of, step=step.index, retries=self._meter.allocation_retries):
            window.later(event)
        laps, tuning = self._stopwatch.laps, self.tuning
        if tuning is None or laps is None:
            return
        cut, budget = self.cut_of, self._meter.budget
        if budget is None and step.peak_bytes is not None:
            # On an accelerator the allocator measures without a budget, so the limit is the device's memory.
            budget = room_for(self._options, ())
        chosen = tuning.after(
            Played(
                step=step.index,
                rows=sum(rows for _, rows in laps),
                largest=0 if cut is None else cut.used,
                laps=laps,
                peak_bytes=step.peak_bytes,
                budget=budget,
                watched=self._meter.passing,
                tokens=None if cut is None else cut.tokens,
            )
        )
        if chosen is not None:
            self.tuning = None
            window.later(chosen)
        elif tuning.warming:
            self._meter.watch_next()

    def shrink(self, cut: Cut | None) -> tuple[int, int] | None:
        """Halve the microbatch size, if it is above one row."""
        return halve(self.sizing, cut)

    def saved(self) -> tuple[Sizing, Tuning | None]:
        """Return a copy of the current size, for `restore`."""
        return self.sizing.copy(), self.tuning

    def restore(self, saved: tuple[Sizing, Tuning | None]) -> None:
        """Restore a size that `saved` returned, after an error that tells nothing about the next batch."""
        self.sizing, self.tuning = saved
        if self.tuning is not None:
            self.tuning.sizing = self.sizing

    def state(self) -> dict[str, Any]:
        """Return the size, and the state of the search."""
        return {"sizing": self.sizing.state(), "tuning": None if self.tuning is None else self.tuning.state()}

    def load(self, state: Mapping[str, Any]) -> None:
        """Continue from the result of `state`, unless ``microbatch_size`` has changed since."""
        self.sizing = Sizing(asked=self._options.microbatch_size).restored(state["sizing"])
        tuning = state.get("tuning") if self.sizing.asked == "auto" else None
        self.tuning = None if tuning is None else Tuning.restored(tuning, self.sizing)

    # -- how -----------------------------------------------------------------------------------------------------------

    def _begin(self, rows: int) -> None:
        options = self._options
        hindrance = None
        if options.compile:
            hindrance = "each size would have to be compiled before it could be timed"
        elif options.batch_norm == EXACT:
            hindrance = "microbatches run in lockstep, so the time of a single microbatch is not known"
        elif is_fake(options):
            hindrance = "fake tensors take no time"
        elif options.lengths is not None and options.lengths.microbatch_tokens is not None:
            hindrance = "microbatch_tokens sets the size of microbatches"
        # One row has no variance for batch normalisation.
        norms = any(isinstance(module, _BatchNorm) and module.training for module in options.model.modules())
        ragged, least = options.lengths is not None, 2 if norms else 1
        self.tuning = Tuning.begin(self.sizing, rows=rows, ragged=ragged, hindrance=hindrance, least=least)
        self._meter.skip_first()

    def _is_small(self, room: int | None) -> bool:
        """Return whether weights, gradients and optimizer state take a small part of the memory."""
        weights = sum(each.numel() * each.element_size() for each in self._options.model.parameters())
        return room is None or _COPIES * weights <= _SMALL * room


def adapt(sizing: Sizing, cut: Cut | None, *, step: int, retries: int) -> list[Event]:
    """Adapt the size after a window without an error; ``retries`` counts how often the allocator was full."""
    if retries:
        changed = halve(sizing, cut)
        reason = f"the allocator had to empty its cache {retries} times inside the window: too tight"
    else:
        before, halvings = (sizing.rows if sizing.halvings else 0), sizing.halvings
        sizing.settle()
        changed = None if sizing.halvings == halvings else (before, sizing.rows)
        reason = "memory has been enough for a while"
    return [] if changed is None else [SizeChanged(step=step, before=changed[0], after=changed[1], reason=reason)]


def halve(sizing: Sizing, cut: Cut | None) -> tuple[int, int] | None:
    """Halve the microbatch size, and return the rows before and after; `None` if no smaller one can help."""
    if cut is None or cut.rows <= 1 or sizing.halved(cut.allowed) <= 1:
        return None
    before = sizing.rows
    sizing.shrink(cut.allowed, used=cut.used)
    return before, sizing.rows


def _predicted(options: Options, loss_fn: Function, batch: object) -> Any:
    # Imported here, because fake tensors take half a second to import.
    from microbatch.step.size.dry_run import dry_run

    return dry_run(options, loss_fn, batch=batch, witness=())
