"""What this run was made on."""

from __future__ import annotations

from importlib.util import find_spec

import torch

from benchmarks.gpu.here import Here
from benchmarks.gpu.outcome import Numbers
from benchmarks.machine import hardware, versions


def facts(here: Here, _say: object) -> Numbers:
    """Return hardware, versions, and the rates of matrix products and of copies."""
    found: Numbers = {**hardware(here.device.type), **versions()}
    found["bf16 matmul, TFLOP/s"] = round(here.matmul_rate(torch.bfloat16) / 1e12, 1)
    found["fp32 matmul, TFLOP/s"] = round(here.matmul_rate(torch.float32) / 1e12, 1)
    found["greenlet"] = "installed" if find_spec("greenlet") else "not installed: exact BatchNorm takes threads"
    if not here.cuda:
        return found
    device = torch.cuda.get_device_properties(here.device)
    found["devices"] = torch.cuda.device_count()
    found["device memory, GiB"] = round(device.total_memory / 2**30, 1)
    found["capability"] = f"{device.major}.{device.minor}"
    found["cuda"] = torch.version.cuda or torch.version.hip
    there = torch.empty(2**28, dtype=torch.uint8, device=here.device)
    pinned = torch.empty(2**28, dtype=torch.uint8, pin_memory=True)
    found["pinned copy, GB/s"] = round(
        2**28 / min(here.seconds(lambda: there.copy_(pinned)) for _ in range(3)) / 1e9, 1
    )
    return found
