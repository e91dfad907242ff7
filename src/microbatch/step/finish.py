"""The end of a window: divide, check, clip and step; or leave the finished gradient in `.grad`."""

from __future__ import annotations

import math
from functools import partial
from typing import Any

import torch
from torch import Tensor

from microbatch.errors import EmptyWindowError, NonfiniteError
from microbatch.gradients.clipping import clip_factor, first_nonfinite
from microbatch.step.met import Met
from microbatch.step.optimizer_step import Versions, apply, zero_grad
from microbatch.step.part import OpenWindow

_LARGEST = torch.finfo(torch.float32).max


def take_step(window: OpenWindow) -> dict[str, Any]:
    """Finish the gradients of a window, take the optimizers' step, and zero the gradients.

    Args:
        window: The window, after its last backward.

    Returns:
        Fields of the `Step` record.

    Raises:
        EmptyWindowError: No microbatch contributed.
        NonfiniteError: The loss or the gradient is not finite, and ``nonfinite="raise"``.
        OutOfMemoryError: Memory ran out inside the optimizer.
        RankError: Another rank failed.

    Cost:
        One read and one write of the gradients, and one host synchronisation. With several ranks: two host
        synchronisations, one small all-reduce, and one all-reduce for each bucket of gradients. A step that updates a
        parameter for the first time has a second small all-reduce.
    """
    options = window.options
    met = window.peers.meet(window)
    with window.peers.stepping(window, met):
        found = _finished(window, met)
        if window.dropped:
            window.gradients.put_states_back()
        else:
            _step(window)
    if options.grad_scaler is not None and any(met.counts.values()):
        options.grad_scaler.update()
    window.gradients.clear()
    for optimizer in options.optimizers:
        zero_grad(optimizer)
    return found | {"applied": not window.dropped}


def leave_gradient(window: OpenWindow) -> dict[str, Any]:
    """Leave the finished gradient in the parameters' `.grad`, each in its parameter's dtype; take no step.

    Args:
        window: The window, after its last backward.

    Returns:
        Fields of the `Step` record.

    Raises:
        EmptyWindowError: No microbatch contributed.
        NonfiniteError: The loss or the gradient is not finite, and ``nonfinite="raise"``.
        RankError: Another rank failed.

    Cost:
        As `take_step`, without the step.
    """
    met = window.peers.meet(window)
    found = _finished(window, met)
    # A scaler must see infinite gradients, to skip the step and lower its scale.
    if window.dropped and window.options.grad_scaler is None:
        window.gradients.clear()
    else:
        window.gradients.hand_over()
        window.gradients.leave()
    return found | {"applied": False}


def _finished(window: OpenWindow, met: Met) -> dict[str, Any]:
    """Divide and clip the gradient, and set whether the window is dropped."""
    options, contributed = window.options, any(met.counts.values())
    factor = window.denominator.factor(met.counts) if contributed and not met.normalized else 1.0
    if contributed:
        if not met.normalized:
            window.gradients.settle(factor)
        for part in window.setup.having("reduced"):
            part.reduced(window, met, factor)
        factor = 1.0 if met.normalized else factor
    window.dropped = not (contributed and met.finite)
    if not window.dropped:
        window.gradients.scale_(factor * clip_factor(met.host_norm * factor, options.max_grad_norm))
    elif options.nonfinite == "raise":
        _refuse(window, contributed=contributed)
    return record_of(met, math.nan if window.gradients.is_folded else factor)


def _refuse(window: OpenWindow, *, contributed: bool) -> None:
    """Raise the error of a window that cannot be applied."""
    if not contributed:
        raise EmptyWindowError(
            "no microbatch of this window contributed to the loss (every count was 0), so its mean does not exist; "
            'pass nonfinite="skip" to drop such windows'
        )
    if window.options.grad_scaler is None:  # a scaler lowers its scale after an overflow
        raise NonfiniteError(
            microbatch=window.denominator.first_nonfinite(), parameter=first_nonfinite(window.gradients.held())
        )


def _step(window: OpenWindow) -> None:
    scaler, gradients = window.options.grad_scaler, window.gradients
    gradients.hand_over()
    window.undo.versions = [Versions(optimizer) for optimizer in window.options.optimizers]
    window.stepping = True
    for before in window.undo.versions:
        optimizer = before.optimizer
        step = optimizer.step if scaler is None else partial(scaler.step, optimizer)
        apply(before, partial(gradients.step, optimizer, step), device=window.device)


def record_of(met: Met, factor: float = 1.0) -> dict[str, Any]:
    """Return the fields of the `Step` record for the loss, its counts and the gradient's norm.

    Args:
        met: Results of the window over all ranks.
        factor: The factor that turns the accumulated gradient into the mean's gradient.

    Returns:
        The fields.
    """
    pairs = zip(met.sums, met.counts.values(), strict=True)
    means = [total / count if count > 0 else 0.0 for total, count in pairs]
    as_tensor = partial(_scalar, dtype=met.dtype, device=met.norm.device)
    whole = {name: int(count) if count.is_integer() else count for name, count in met.counts.items()}
    several = list(met.names) != ["loss"]
    return {
        "loss": as_tensor(sum(means)),
        "metrics": dict(met.metrics),
        "terms": dict(zip(met.names, map(as_tensor, means), strict=True)) if several else {},
        "grad_norm": met.norm if factor == 1.0 else met.norm * factor,
        "count": next(iter(whole.values()), 0),
        "counts": whole if several else {},
        "samples": int(met.samples) if float(met.samples).is_integer() else met.samples,
    }


def _scalar(number: float, dtype: torch.dtype, device: torch.device) -> Tensor:
    if dtype is torch.float32 and abs(number) > _LARGEST:  # `torch.full` would refuse it
        number = math.copysign(math.inf, number)
    return torch.full((), number, dtype=dtype, device=device)
