"""The memory that a window may use."""

from __future__ import annotations

from microbatch.batch.batch_tree import contents
from microbatch.devices.device_memory import bytes_in_use
from microbatch.memory.budget import available_bytes, share_of
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
    return share_of(available) + meter.live_bytes
