"""What is known of a batch's memory before ``microbatch_size="auto"`` runs it for the first time."""

from __future__ import annotations

import os
from dataclasses import replace

import torch
from torch._subclasses.fake_tensor import FakeTensor
from torch.nn.modules.batchnorm import _BatchNorm  # pyright: ignore[reportPrivateUsage] - the one base of all of them

from microbatch.batch.batch_tree import leaves, rows_of
from microbatch.memory.budget import available_bytes
from microbatch.memory.meter import MemoryMeter
from microbatch.memory.predict import Prediction
from microbatch.step.compiled import LossFunction
from microbatch.step.dry_run import rehearse
from microbatch.step.settings import EXACT, Memory, Settings, Watched
from microbatch.step.tune import Tuning

_COPIES, _LITTLE = 4, 0.1
"""Of each weight: itself, its gradient and two numbers of the optimizer; and what part of the memory is little."""


def begin_tuning(settings: Settings, memory: Memory, *, rows: int) -> None:
    """Begin to look for a microbatch size.

    Args:
        settings: The accumulator's.
        memory: The accumulator's; it is given the tuning and the first size.
        rows: Rows of the first batch; at least 1.
    """
    hindrance = None
    if settings.compile:
        hindrance = "each size would have to be compiled before it could be timed"
    elif settings.batch_norm == EXACT:
        hindrance = "microbatches run in turns, so that no microbatch has a time of its own"
    elif any(isinstance(parameter, FakeTensor) for parameter in settings.model.parameters()):
        hindrance = "fake tensors take no time"
    elif settings.lengths is not None and settings.lengths.microbatch_tokens is not None:
        hindrance = "microbatch_tokens says how large microbatches are"
    ragged = settings.lengths is not None
    # Of one row there is no variance.
    norms = any(isinstance(module, _BatchNorm) and module.training for module in settings.model.modules())
    least = 2 if norms else 1
    memory.tuning = Tuning.begin(memory.sizing, rows=rows, ragged=ragged, hindrance=hindrance, least=least)
    # In place: a window that is open already looks at it too.
    memory.watched.windows = max(1, memory.watched.windows)


def watched_once(watched: Watched) -> Watched:
    """Forget what has been watched, so that the next window is, and not the one after it.

    Args:
        watched: What has been.

    Returns:
        The record for the next window.
    """
    return Watched(windows=1, told=watched.told)


def foresee(settings: Settings, memory: Memory, *, batch: object, loss_fn: LossFunction) -> Prediction | None:
    """Begin to look for a microbatch size; or go on, where the first window has left open what fits.

    A model that is small beside the memory has a first window of a few rows, whose peak says what is sure to fit: for
    most that is everything, and a prediction would cost more than it tells. A large one is rehearsed at once.

    Args:
        settings: The accumulator's.
        memory: The accumulator's; it is given the tuning and the first size.
        batch: The batch.
        loss_fn: As for `Accumulator.step`.

    Returns:
        The prediction; `None` where none is needed, the model or the loss could not be rehearsed, or the batch has no
        rows.

    Cost:
        Where something is rehearsed, some 0.1 milliseconds an operator of a fake window, for each of four sizes or
        more.
    """
    rows = rows_of(batch)
    if not rows:
        return None
    if memory.tuning is None:
        begin_tuning(settings, memory, rows=rows)
        if _is_small(settings, room_for(settings, batch)):
            return None
    tuning = memory.tuning
    if tuning is None:
        return None
    tuning.rehearsed = True
    try:
        settled = replace(settings, checkpoint=memory.checkpoint)
        prediction = rehearse(settled, loss_fn, batch=batch, witness=())
    except Exception:  # noqa: BLE001 - then the sizes are felt for instead, and what is wrong shows in the real step
        return None
    tuning.foresee(prediction, budget=room_for(settings, batch))
    return prediction


def _is_small(settings: Settings, room: int | None) -> bool:
    """Tell whether weights, gradients and the optimizer's state are little beside what there is."""
    weights = sum(parameter.numel() * parameter.element_size() for parameter in settings.model.parameters())
    return room is None or _COPIES * weights <= _LITTLE * room


def room_for(settings: Settings, batch: object) -> int | None:
    """Say how many bytes a window may have in use, weights and all.

    Args:
        settings: The accumulator's.
        batch: The batch, which counts where it lives on the model's device.

    Returns:
        Bytes; `None` where there is no limit, or nothing tells.
    """
    budget, device = settings.memory_budget, settings.device
    if budget is not None:
        return budget if isinstance(budget, int) else None
    available = available_bytes(device)
    if available is None:
        return None
    if device.type == "cuda":
        return available + torch.cuda.memory_allocated(device)
    meter = MemoryMeter()
    meter.track(settings.model, *settings.optimizers, [leaf for _, leaf in leaves(batch)])
    return available // max(1, int(os.environ.get("LOCAL_WORLD_SIZE", "1"))) + meter.live_bytes
