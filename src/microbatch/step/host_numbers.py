"""Read numbers from the device, all with one host synchronisation."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from microbatch.loss.loss import wide_dtype


def numbers_of(found: Sequence[Tensor | float], device: torch.device) -> list[float]:
    """Read several numbers.

    Args:
        found: 0-d tensors on ``device``, and numbers that are on the host already.
        device: The device.

    Returns:
        The values, in the same order.

    Cost:
        One copy, and so one host synchronisation, however many tensors there are.
    """
    if device.type == "cpu":
        return [float(each) for each in found]
    dtype = wide_dtype(device)
    read = iter(torch.stack([each.to(dtype) for each in found if isinstance(each, Tensor)]).tolist())
    return [next(read) if isinstance(each, Tensor) else float(each) for each in found]
