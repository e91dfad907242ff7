"""Hold a window under its budget: the meter does on the CPU, the allocator's own limit on CUDA."""

from __future__ import annotations

import os
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass

import torch
from torch._subclasses import FakeTensor

from microbatch.batch.batch_tree import leaves
from microbatch.memory.budget import available_bytes
from microbatch.memory.meter import MemoryMeter
from microbatch.step.force_eager import uncompiled
from microbatch.step.settings import Settings, Watched


@dataclass(frozen=True, slots=True)
class Extent:
    """How large a window's microbatches are.

    Attributes:
        row_bytes: Bytes of a row, at the width of the whole batch.
        bytes: Bytes of the largest microbatch.
    """

    row_bytes: float
    bytes: float


class Watch:
    """Watch one window's memory.

    A budget that the user gave is held in every window. What the device really has needs no watching on CUDA, whose
    allocator refuses by itself. On the CPU the system would end the process instead, so the meter is on where memory
    can change: in the first two windows, in the first with the optimizer's state, and in every later one whose
    microbatches are larger, or of longer rows, than those that went well before. In between it costs nothing.

    Args:
        settings: The accumulator's.
        watched: What has been watched so far.
        stack: Where what is switched on is put, to be switched off at the window's end.
    """

    def __init__(self, settings: Settings, watched: Watched, stack: ExitStack) -> None:
        self._settings = settings
        self._watched = watched
        self._stack = stack
        self._device = settings.device
        self._meter: MemoryMeter | None = None
        self._extent: Extent | None = None
        self._budget: int | None = None
        self._beside = False
        self._retries = 0

    def open(self) -> None:
        """Begin, before anything is known of the batch."""
        budget = self._settings.memory_budget
        has_state = all(optimizer.state for optimizer in self._settings.optimizers)
        if self._device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(self._device)
            self._retries = _allocation_retries(self._device)
            if isinstance(budget, int):
                self._budget = budget
                self._stack.callback(_limit_cuda(self._device, budget))
        elif isinstance(budget, int):
            self._meter_on(budget, beside_what_is_there=False)
        elif self._watched.windows < 2 or (has_state and self._watched.stateless):
            self._meter_by_default()
        self._watched.stateless = not has_state

    def expect(self, extent: Extent, batch: object) -> None:
        """Learn how large the microbatches will be, before the first of them.

        Args:
            extent: Their size.
            batch: What they are cut from.
        """
        self._extent = extent
        if extent.row_bytes > self._watched.row_bytes or extent.bytes > self._watched.bytes:
            self._meter_by_default()
        if self._meter is not None:
            self._track(self._meter, [leaf for _, leaf in leaves(batch)])

    def only_count(self) -> None:
        """Go on without refusing: activations are gone by now, and weights must not be left half updated."""
        if self._meter is not None:
            self._meter.budget = None

    def went_well(self) -> None:
        """Remember what fitted."""
        self._watched.windows += 1
        if self._meter is not None and self._extent is not None:
            self._watched.row_bytes = max(self._watched.row_bytes, self._extent.row_bytes)
            self._watched.bytes = max(self._watched.bytes, self._extent.bytes)

    @property
    def budget(self) -> int | None:
        """Bytes that the window may use; `None` where nobody counts them."""
        return self._budget

    @property
    def peak_bytes(self) -> int | None:
        """Most bytes in use so far, by the allocator's count or the meter's; `None` where neither counts."""
        if self._device.type == "cuda":
            return torch.cuda.max_memory_allocated(self._device)
        return None if self._meter is None else self._meter.peak_bytes

    @property
    def live_bytes(self) -> int | None:
        """Bytes in use now; `None` where nobody counts."""
        if self._device.type == "cuda":
            return torch.cuda.memory_allocated(self._device)
        return None if self._meter is None else self._meter.live_bytes

    @property
    def passing(self) -> bool:
        """Whether a meter is on that most windows go without."""
        return self._meter is not None and self._beside

    @property
    def allocation_retries(self) -> int:
        """Times that the allocator had to empty its cache and ask the device again, in this window."""
        return _allocation_retries(self._device) - self._retries if self._device.type == "cuda" else 0

    def _meter_by_default(self) -> None:
        if self._meter is not None or self._device.type != "cpu" or self._settings.memory_budget is not None:
            return
        # The compiler leaves alone what runs under a meter; and fake tensors are as large as one likes.
        if self._settings.compile or _is_fake(self._settings):
            return
        available = available_bytes(self._device)
        if available is not None:
            # Each process of this machine takes the same.
            share = available // max(1, int(os.environ.get("LOCAL_WORLD_SIZE", "1")))
            self._meter_on(share, beside_what_is_there=True)

    def _meter_on(self, budget: int, *, beside_what_is_there: bool) -> None:
        meter = self._meter = MemoryMeter()
        self._budget, self._beside = budget, beside_what_is_there
        self._track(meter, self._settings.model, *self._settings.optimizers)
        # What is compiled would be tried under the meter, fail, and stay uncompiled for good.
        self._stack.enter_context(uncompiled())
        self._stack.enter_context(meter)

    def _track(self, meter: MemoryMeter, *things: object) -> None:
        """Count what is there already; what the device has left is left beside it."""
        before = meter.live_bytes
        meter.track(*things)
        if self._budget is not None:
            self._budget += meter.live_bytes - before if self._beside else 0
            meter.budget = self._budget


def _is_fake(settings: Settings) -> bool:
    return any(isinstance(parameter, FakeTensor) for parameter in settings.model.parameters())


def _allocation_retries(device: torch.device) -> int:
    return int(torch.cuda.memory_stats(device).get("num_alloc_retries", 0))


def _limit_cuda(device: torch.device, budget: int) -> Callable[[], None]:
    total = torch.cuda.get_device_properties(device).total_memory
    before = torch.cuda.get_per_process_memory_fraction(device)
    torch.cuda.set_per_process_memory_fraction(min(1.0, budget / total), device)
    return lambda: torch.cuda.set_per_process_memory_fraction(before, device)
