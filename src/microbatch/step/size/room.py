"""The memory that a window may use."""

from __future__ import annotations

import os

from microbatch.batch.batch_tree import contents
from microbatch.devices.device_memory import bytes_in_use
from microbatch.memory.budget import available_bytes
from microbatch.memory.meter import MemoryMeter
from microbatch.step.options import Options


def room_for(options: Options, batch: object) -> int | None:
    """Return the bytes that a window may use, weights included; `None` if there is no known limit."""
    budget, device = options.memory_budget, options.device
    if budget is not None:
        return budget if isinstance(budget, int) else None
    available = available_bytes(device)
    if available is None:
        return None
    if device.type != "cpu":
        return available + (bytes_in_use(device) or 0)
    meter = MemoryMeter()
    meter.track(options.model, *options.optimizers, contents(batch))
    return available // max(1, int(os.environ.get("LOCAL_WORLD_SIZE", "1"))) + meter.live_bytes
