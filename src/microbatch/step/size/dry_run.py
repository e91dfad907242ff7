"""Predict the peak memory of a window by dry runs on copies, with fake tensors if possible."""

from __future__ import annotations

import logging
import operator
import sys
from collections.abc import Callable, Generator, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from dataclasses import replace
from functools import cache, partial
from typing import Any

import torch
from torch import Tensor, nn

from microbatch.batch.batch_tree import map_tensors, rows_of
from microbatch.batch.copies import Copies
from microbatch.devices.device_memory import allocator_of
from microbatch.errors import ConfigError
from microbatch.gradients.parameters import trainable
from microbatch.memory.allocator import AllocatorMeter, Witnessed
from microbatch.memory.ledger import INPUTS, Timeline
from microbatch.memory.meter import MemoryMeter
from microbatch.memory.predict import Prediction, predict
from microbatch.memory.scratch import learn_to_count
from microbatch.memory.signal_errors import is_from_signal
from microbatch.memory.spill import Spill
from microbatch.memory.uncertainty import between, doubtful, enough_of
from microbatch.step.force_eager import force_eager
from microbatch.step.options import Options
from microbatch.step.saved_state import Snapshot
from microbatch.step.size.dry_run_copies import Cast, Faked, Fakes, LossFunction, Scene, copies_of, some_rows
from microbatch.step.size.dry_run_window import run_window
from microbatch.step.size.fake_offload import Inside, absent

_LARGEST, _LOOKS = 64, 3  # maximum rows of a fake window; maximum rounds of more real windows


def dry_run(
    options: Options,
    loss_fn: LossFunction,
    *,
    batch: object,
    sizes: Sequence[int] | None = None,
    witness: Sequence[int] = (1, 2, 4, 8, 16),
) -> Prediction:
    """Predict the peak memory of an accumulator's windows from dry runs at a few microbatch sizes.

    A dry run has two windows of two microbatches. The second microbatch needs memory beside the first one's gradients,
    and the second window beside the optimizer's state. Dry runs use fake tensors, which take no memory. A few small
    ones run on real copies, to measure the workspaces inside operators. Model, optimizer and batch do not change.

    Args:
        options: The options of the accumulator.
        loss_fn: As for `Accumulator.step`.
        batch: Rows for the dry runs, repeated if there are too few. The memory of the whole batch counts if it is on
            the model's device.
        sizes: Microbatch sizes for fake windows; two or more, ascending. By default three small ones and the whole
            batch, or 64 rows of it, because operators may treat large tensors differently.
        witness: Microbatch sizes for real windows, ascending. An empty list saves time, and the memory for a copy of
            model and optimizer.

    Returns:
        The prediction; its note lists measurements that failed.

    Raises:
        ConfigError: The model, the optimizer or the loss function cannot be copied.

    Cost:
        About 0.1 milliseconds for each operator of a fake window; for real windows, the time and memory of a few steps.
    """
    rows = min(rows_of(batch), _LARGEST)
    sizes = [2, 4, 8, *([rows] if rows > 8 else [])] if sizes is None else sizes
    with _undisturbed(options) as gradients:
        scene = Scene(options, loss_fn, batch, gradients)
        notes: list[str] = []
        fake, enough = _faked(scene, sizes, notes=notes)
        seen = _witness(scene, sizes=witness, notes=notes)
        more = between([(size, each.timeline) for size, each in seen if size > 1])
        seen = sorted([*seen, *_witness(scene, sizes=more, notes=notes)], key=operator.itemgetter(0))
        if fake is None and sum(size > 1 for size, _ in seen) < 2:
            seen = [(size, _real(scene, size)) for size in (2, 4, 8)]
        told = partial(predict, fake, sizes=enough, beside=scene.beside)
        found = told(witnessed=seen)
        # Halve the gaps between sizes where padding or another kernel changes the peak.
        for _ in range(_LOOKS):
            where = doubtful(found.hidden.sizes, partial(found.doubt, hidden=True))
            more = _witness(scene, sizes=where, notes=notes)
            if not more:
                break
            seen = sorted([*seen, *more], key=operator.itemgetter(0))
            found = told(witnessed=seen)
    return replace(found, note="; ".join([found.note, *notes]))


def _faked(
    scene: Scene, sizes: Sequence[int], *, notes: list[str]
) -> tuple[Callable[[int], Timeline] | None, Sequence[int]]:
    """Return a function that runs fake windows, and the sizes to run; `None` if fake tensors cannot run them."""
    fake = cache(partial(_fake, scene))
    try:
        return fake, enough_of(fake, sizes)
    except ConfigError:
        raise
    except Exception as error:
        if is_from_signal(error):
            raise
        # A model or a loss may do anything that fake tensors do not support.
        notes.append(f"fake tensors cannot run it ({type(error).__name__}), so real ones did")
        return None, sizes


def dry_run_at(
    options: Options,
    loss_fn: LossFunction,
    *,
    batch: object,
    size: int,
    watch: Callable[[nn.Module, MemoryMeter], AbstractContextManager[object]] | None = None,
) -> int:
    """Run a window on fake tensors at one microbatch size, and return its peak memory.

    Args:
        options: The options of the accumulator.
        loss_fn: As for `Accumulator.step`.
        batch: As for `dry_run`.
        size: Rows of a microbatch; at least 1.
        watch: Returns a context manager around the window, from the fake model and the meter; `None` for none.

    Returns:
        The peak memory in bytes, without workspaces inside operators.

    Raises:
        ConfigError: The model, the optimizer or the loss function cannot be copied.

    Cost:
        About 0.1 milliseconds for each operator.
    """
    with _undisturbed(options) as gradients:
        scene = Scene(options, loss_fn, batch, gradients)
        peak = _fake(scene, size, watch=watch).peak_bytes
        return peak + sum(scene.beside(size).values())


def _fake(
    scene: Scene,
    size: int,
    *,
    watch: Callable[[nn.Module, MemoryMeter], AbstractContextManager[object]] | None = None,
) -> Timeline:
    mode = Fakes(allow_non_fake_inputs=True)
    cast = copies_of(scene, how=Faked(mode))
    if scene.options.offload is not None:
        cast = replace(cast, loss_fn=Inside(cast.loss_fn, absent()))
    meter = MemoryMeter(timeline=True)
    # If this fails, real tensors are used, so the fake tensors' traceback is not logged.
    log = logging.getLogger("torch._subclasses.fake_tensor")
    level = log.level
    log.setLevel(logging.CRITICAL + 1)
    try:
        with mode, nullcontext() if watch is None else watch(cast.options.bare_model, meter):
            scene.kept[:] = _run_windows(cast, size, meter)
    finally:
        log.setLevel(level)
    found = meter.timeline
    scene.storages.append(found.most_storages)
    return found


def _real(scene: Scene, size: int) -> Witnessed:
    budget = scene.options.memory_budget
    meter = AllocatorMeter(scene.options.device, budget=budget if isinstance(budget, int) else None)
    cast = copies_of(scene, how=None)
    if (offload := scene.options.offload) is not None:
        spill = offload if isinstance(offload, Spill) else Spill(cast.options.bare_model)
        cast = replace(cast, loss_fn=Inside(cast.loss_fn, spill))
    scene.kept[:] = _run_windows(cast, size, meter)
    found = meter.witnessed()
    scene.storages.append(found.timeline.most_storages)
    return found


def _witness(scene: Scene, *, sizes: Sequence[int], notes: list[str]) -> list[tuple[int, Witnessed]]:
    """Run real windows at some sizes, and add a note for each that fails."""
    seen: list[tuple[int, Witnessed]] = []
    device = scene.options.device
    if device.type != "cpu" and allocator_of(device) is None:
        notes.append(f"workspaces were not measured, because the backend of {device.type!r} counts no peak memory")
        return seen
    for size in sizes:
        try:
            seen.append((size, _real(scene, size)))
        except ConfigError:
            raise
        except Exception as error:
            if is_from_signal(error):
                raise
            # One row may be too few, eight too many, or the profiler in use.
            reason = "out of memory" if isinstance(error, torch.OutOfMemoryError | MemoryError) else repr(error)
            notes.append(f"workspaces were not measured on {size} rows ({reason[:200]})")
    return seen


# -- the windows ------------------------------------------------------------------------------------------------------


def _run_windows(cast: Cast, size: int, meter: MemoryMeter) -> Sequence[int]:
    """Run windows until one has had forward passes beside the optimizer's state; return what `run_window` does."""
    options = cast.options
    meter.track(options.model, *options.optimizers)
    held = [some_rows(cast.batch, size)]
    on_cpu = cast.device.type == "cpu"
    if not on_cpu:
        # On an accelerator, microbatches are copies of what the host has, and the next one is copied meanwhile.
        held.append(map_tensors(torch.clone, held[0]))
    meter.track(held, category=INPUTS)
    learn_to_count(type(torch.empty(0, device="cpu")))  # now, so that the meter does not count its tensors
    kept: Sequence[int] = ()
    with meter:
        for _ in range(1 if all(each.state for each in options.optimizers) else 2):
            kept = run_window(options, cast.loss_fn, _copied(held[0], meter) if on_cpu else held, meter)
    return kept


def _copied(rows: object, meter: MemoryMeter) -> Generator[Any]:
    """Yield two microbatches as a window does on the CPU: each is a copy beside the batch, made when its turn comes."""
    for _ in range(2):
        made = Copies(torch.device("cpu"))(rows)
        meter.track(made, category=INPUTS)
        yield made


@contextmanager
def _undisturbed(options: Options) -> Generator[list[tuple[Tensor, Tensor]]]:
    """Set gradients aside, and restore them with random state and buffers after the dry run."""
    snapshot = Snapshot(options.bare_model, options.device)
    parameters = [each.parameter for each in trainable(options.model, options.optimizers)]
    before = [parameter.grad for parameter in parameters]
    with ExitStack() as stack:
        if "torch._dynamo" in sys.modules:
            stack.enter_context(force_eager())
        try:
            for parameter in parameters:
                parameter.grad = None
            yield [(each, grad) for each, grad in zip(parameters, before, strict=True) if grad is not None]
        finally:
            snapshot.restore()
            for parameter, grad in zip(parameters, before, strict=True):
                parameter.grad = grad
