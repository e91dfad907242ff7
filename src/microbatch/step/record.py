"""The record of one optimizer step."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from torch import Tensor


@dataclass(frozen=True, slots=True, kw_only=True)
class Step:
    """Say what one window was, over all ranks.

    Attributes:
        index: Windows ended before this one, from 0.
        loss: The effective batch's loss, whatever the cut; shape ``()``, on the device. With several terms, their sum.
        terms: The mean of each named term of the loss; empty when the loss function returned a single loss.
        grad_norm: Norm of the finished gradient, before clipping; shape ``()``, on the device. NaN with
            ``gradient_buffer="none"``, where the gradient is nowhere by itself.
        count: What the loss is a mean over; with several terms, the first one's.
        counts: The count of each named term; empty when the loss function returned a single loss.
        samples: Rows of the effective batch.
        microbatches: Microbatches that this rank ran.
        microbatch_size: Rows of the largest microbatch that this rank ran; 0 if it ran none.
        fused: Weights whose gradients were added inside the matrix product; see `Accumulator.fusion`.
        retries: Times that the window was started again at a smaller size after running out of memory.
        applied: Whether the optimizer stepped. False when the gradient was not finite and the window was dropped.
        seconds: Wall-clock time from opening the window to the optimizer step, which may still run on the device.
        peak_bytes: Most memory in use on the device inside the window, in bytes: the CUDA allocator's figure, or
            the meter's on the CPU; `None` in windows that nobody watched, see ``docs/out-of-memory.md``.
        comm_bytes: Bytes that left this rank for the other data-parallel ones in the window as it ended, by a ring's
            count: an all-reduce of ``n`` bytes over ``r`` ranks is ``2 n (r - 1) / r``, a gather or scatter half of it.
        comm_calls: Collectives that they went by.
        sync: How a fully sharded model's gradients met: ``"lean"``, scattered after every microbatch, or ``"fast"``,
            once; `None` for other models.
        spilled_bytes: Bytes that were moved off the device meanwhile, under ``offload=`` or ``batch_norm="exact"``.
    """

    index: int
    loss: Tensor
    terms: Mapping[str, Tensor]
    grad_norm: Tensor
    count: float
    counts: Mapping[str, float]
    samples: int | float
    microbatches: int
    microbatch_size: int | float
    fused: int
    retries: int
    applied: bool
    seconds: float
    peak_bytes: int | None
    spilled_bytes: int = 0
    comm_bytes: int = 0
    comm_calls: int = 0
    sync: str | None = None
