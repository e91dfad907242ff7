"""Keep a window within its memory budget: by the meter on the CPU, by the allocator's limit on an accelerator."""

from __future__ import annotations

import sys
from collections.abc import Mapping
from contextlib import ExitStack, suppress
from typing import Any

import torch

from microbatch.batch.batch_tree import contents
from microbatch.devices.device_memory import Allocator, allocator_of
from microbatch.errors import ConfigError
from microbatch.memory.budget import available_bytes, format_bytes, share_of
from microbatch.memory.least_memory import least_memory
from microbatch.memory.meter import MemoryMeter
from microbatch.memory.out_of_memory import is_out_of_memory
from microbatch.step.cutting import Cut, Cutting
from microbatch.step.events import BudgetPassed
from microbatch.step.force_eager import force_eager
from microbatch.step.options import Options
from microbatch.step.part import OpenWindow, Part
from microbatch.step.record import Step
from microbatch.warned import warn

_CHECK_EVERY = 16  # windows


class MemoryBudget(Part):
    """Measure the memory of windows, and raise an error for an allocation beyond the budget.

    On an accelerator, the allocator holds a budget from the user in every window, and fails by itself at the end of
    memory. On the CPU, and on an accelerator whose allocator cannot, a meter does both. It costs time in every
    operator, so it is on where memory may grow. These are the first two windows, the first window with optimizer state,
    and windows with larger rows or microbatches than before. With a budget from the user, these are also windows with
    more rows, and every 16th window. If sizes are not known, or if what is kept in memory depends on the memory that is
    left, these are all windows.

    Attributes:
        budget: Bytes that the window may use; `None` if they are not measured.
        passing: Whether the meter is on in this window, although most windows run without it.
        allocation_retries: How often the device's allocator emptied its cache in the last window and asked the device
            again. Each time, it waits for the device.
    """

    def __init__(self) -> None:
        self.budget: int | None = None
        self.passing = self._of_free = False
        self.allocation_retries = 0
        self._meter: MemoryMeter | None = None
        self._cut: Cut | None = None
        self._retries, self._by_device = 0, False
        self._allocator: Allocator | None = None
        # Windows that succeeded, their largest row and microbatch, the most bytes beyond a budget so far, and whether
        # the last window began before the optimizer had its state.
        self._windows, self._row_bytes, self._bytes, self._beyond, self._stateless = 0, 0.0, 0.0, 0, False
        self._rows, self._now_rows, self._steady = 0, 0, False

    def open(self, window: OpenWindow, stack: ExitStack) -> None:
        """Start to measure, before the batch is known."""
        options, device = window.options, window.device
        if self._windows == 0 and isinstance(options.memory_budget, int):
            _check_least(options, device)
        self.budget, self.passing, self._of_free, self._meter, self._cut = None, False, False, None, None
        has_state = all(optimizer.state for optimizer in options.optimizers)
        self._allocator = allocator_of(device)
        if self._allocator is not None:
            self._allocator.reset_peak()
            self._retries = self._allocator.retries
        self._by_device = self._is_held_by_device(window)
        if self._windows < 2 or (has_state and self._stateless) or self._is_check(options):
            self._watch(window)
        self._stateless = not has_state

    def cut(self, window: OpenWindow, batch: object, cutting: Cutting) -> None:
        """Turn the meter on for microbatches that are larger than earlier ones, and count the batch."""
        cut = cutting.cut
        if cut is None:
            return
        self._cut, self._now_rows = cut, cutting.rows or 0
        more = isinstance(window.options.memory_budget, int) and self._now_rows > self._rows
        if more or cut.row_bytes > self._row_bytes or cut.bytes > self._bytes:
            self._watch(window)
        if self._meter is not None:
            self._track(self._meter, contents(batch))

    def check(self, window: OpenWindow) -> None:
        """Measure without a limit from now on: an error inside the optimizer would leave a partial step."""
        if self._meter is not None:
            self._meter.budget = None

    def failed(self, window: OpenWindow, error: BaseException) -> None:
        """Measure without a limit, because other ranks may wait for dummy passes."""
        self.check(window)

    def figures(self, window: OpenWindow) -> Mapping[str, Any]:
        """Return the peak memory."""
        return {"peak_bytes": self.peak_bytes(window.device)}

    def done(self, window: OpenWindow, step: Step) -> None:
        """Store the sizes that fit, and report an exceeded budget."""
        self._windows += 1
        # Offloading and the choice of a coupled loss's way use the memory that is left, which only the meter knows.
        adapts = window.options.spill is not None or (window.coupled is not None and window.options.coupled == "auto")
        self._steady = self._cut is not None and not adapts
        if self._meter is not None and self._cut is not None:
            self._row_bytes = max(self._row_bytes, self._cut.row_bytes)
            self._bytes, self._rows = max(self._bytes, self._cut.bytes), max(self._rows, self._now_rows)
        if self._allocator is not None:
            self.allocation_retries = self._allocator.retries - self._retries
        peak, budget = step.peak_bytes, window.options.memory_budget
        if peak is not None and isinstance(budget, int) and peak - budget > self._beyond:
            self._beyond = peak - budget
            window.later(BudgetPassed(step=step.index, peak_bytes=peak, budget=budget))
            if not window.options.listeners:
                warn(
                    f"a window took {format_bytes(peak)}, more than its memory_budget of {format_bytes(budget)}, where "
                    "stopping would have left a partial step, such as inside the optimizer",
                )

    def put_back(self, window: OpenWindow, error: BaseException) -> None:
        """Forget the sizes that fit, after memory ran out."""
        if is_out_of_memory(error):
            self._forget(windows=0)
            if self.budget is not None and getattr(error, "budget", None) is None:
                with suppress(AttributeError, TypeError):
                    vars(error)["budget"] = self.budget

    def watch_next(self) -> None:
        """Measure the next window, and not the one after it."""
        self._forget(windows=1)

    def skip_first(self) -> None:
        """Count a first window as measured, because the search for a microbatch size measures windows itself."""
        self._windows = max(1, self._windows)

    def peak_bytes(self, device: torch.device) -> int | None:
        """Return the peak memory so far, from the allocator or the meter; `None` if neither measures."""
        if self._allocator is not None:
            return self._allocator.peak()
        return None if self._meter is None else self._meter.peak_bytes

    def live_bytes(self) -> int | None:
        """Return the bytes in use now; `None` if they are not measured."""
        if self._allocator is not None:
            return self._allocator.in_use()
        return None if self._meter is None else self._meter.live_bytes

    def _forget(self, *, windows: int) -> None:
        self._windows, self._row_bytes, self._bytes, self._rows, self._stateless = windows, 0.0, 0.0, 0, False

    def _is_held_by_device(self, window: OpenWindow) -> bool:
        """Return whether the device's allocator fails at the end of memory, after the user's budget is set as limit."""
        if self._allocator is None:
            return False
        budget = window.options.memory_budget
        if not isinstance(budget, int):
            return True
        release = self._allocator.limit(budget)
        if release is None:
            return False
        self.budget = budget
        window.outer.callback(release)
        return True

    def _is_check(self, options: Options) -> bool:
        """Return whether the meter is on to check a budget from the user, although nothing seems to have grown."""
        return isinstance(options.memory_budget, int) and (not self._steady or self._windows % _CHECK_EVERY == 0)

    def _watch(self, window: OpenWindow) -> None:
        """Turn the meter on, with the user's budget or with the machine's free memory as the limit."""
        options = window.options
        if self._meter is not None or self._by_device:
            return
        if isinstance(options.memory_budget, int):
            self.passing = self._steady
            self._meter_on(window, options.memory_budget)
        elif options.memory_budget is None:
            self._meter_by_default(window)

    def _meter_by_default(self, window: OpenWindow) -> None:
        options = window.options
        # The compiler does not compile under a meter, and fake tensors take no memory.
        if options.compile or is_fake(options):
            return
        available = available_bytes(window.device)
        if available is not None:
            self.passing = self._of_free = True
            self._meter_on(window, share_of(available))

    def _meter_on(self, window: OpenWindow, budget: int) -> None:
        meter = self._meter = MemoryMeter()
        self.budget = budget
        self._track(meter, window.options.model, *window.options.optimizers)
        # Under the meter, a compiled function would fail to compile, and stay uncompiled from then on.
        if "torch._dynamo" in sys.modules:
            window.outer.enter_context(force_eager())
        window.outer.enter_context(meter)

    def _track(self, meter: MemoryMeter, *things: object) -> None:
        """Count existing tensors; a budget of free memory is raised by their size."""
        before = meter.live_bytes
        meter.track(*things)
        if self.budget is not None:
            self.budget += meter.live_bytes - before if self._of_free else 0
            meter.budget = self.budget


def _check_least(options: Options, device: torch.device) -> None:
    """Refuse a budget that is below what every step holds, before windows are run that cannot succeed."""
    budget, kept = options.memory_budget, options.sums.buffer == "own"
    if isinstance(budget, int) and not is_fake(options):
        least = least_memory(options.model, options.optimizers, device=device, gradients=kept)
        if refusal := least.refusal(budget):
            raise ConfigError(f"memory_budget={budget}: {refusal}")


def is_fake(options: Options) -> bool:
    """Return whether any of the model's parameters is a fake tensor, which takes no memory."""
    fake: Any = sys.modules.get("torch._subclasses.fake_tensor")
    return fake is not None and any(isinstance(each, fake.FakeTensor) for each in options.model.parameters())
