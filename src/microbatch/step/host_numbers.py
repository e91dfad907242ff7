"""Read numbers from the device, all with one host synchronisation."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from microbatch.loss.loss import wide_dtype

_PART = 1 << 24  # float32 holds all whole numbers up to it


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
    if device.type == "cpu" or not any(isinstance(each, Tensor) for each in found):
        return [float(each) for each in found]
    dtype = wide_dtype(device)
    tensors = [each for each in found if isinstance(each, Tensor)]
    split = [dtype is torch.float32 and is_whole(each) for each in tensors]
    # A device without float64 would round whole numbers from 2**24 on, so they are read in two parts.
    lows = [each.remainder(_PART) if is_split else each for each, is_split in zip(tensors, split, strict=True)]
    highs = [each.div(_PART, rounding_mode="floor") for each, is_split in zip(tensors, split, strict=True) if is_split]
    values = torch.stack([each.to(dtype) for each in (*lows, *highs)]).tolist()
    high = iter(values[len(lows) :])
    read = iter([low + (next(high) * _PART if is_split else 0) for low, is_split in zip(values, split, strict=False)])
    return [next(read) if isinstance(each, Tensor) else float(each) for each in found]


def is_whole(number: Tensor | float) -> bool:
    """Return whether a number is whole: for a tensor, as far as its dtype tells, so that no value is read."""
    if not isinstance(number, Tensor):
        return float(number).is_integer()
    return not (number.is_floating_point() or number.is_complex() or number.dtype is torch.bool)
