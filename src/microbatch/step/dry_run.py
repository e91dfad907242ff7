"""Rehearse a window on copies, fake ones where that is possible, to learn what it will take."""

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
from torch._subclasses.fake_tensor import FakeTensor
from torch.utils._python_dispatch import TorchDispatchMode

from microbatch.batch.batch_tree import map_tensors, rows_of
from microbatch.errors import ConfigError
from microbatch.gradients.parameters import trainable
from microbatch.loss.loss import shares_of
from microbatch.loss.tally import Tally
from microbatch.memory.allocator import AllocatorMeter, Witnessed
from microbatch.memory.ledger import GRADIENTS, INPUTS, Timeline
from microbatch.memory.meter import READ, MemoryMeter
from microbatch.memory.predict import Prediction, predict
from microbatch.memory.recompute import checkpointed
from microbatch.memory.scratch import Scratch, learn_to_count
from microbatch.memory.spill import Spill
from microbatch.memory.uncertainty import between, doubtful, enough_of
from microbatch.step.dry_run_copies import Cast, Faked, Fakes, LossFunction, Scene, copies_of, some_rows
from microbatch.step.fake_offload import Inside, absent
from microbatch.step.force_eager import uncompiled
from microbatch.step.fusing import fuse_for
from microbatch.step.saved_state import Snapshot
from microbatch.step.settings import Settings
from microbatch.step.sums import sums_for

_LARGEST, _LOOKS = 64, 3  # rows of a fake window; real windows more, where the prediction is in doubt


def rehearse(
    settings: Settings,
    loss_fn: LossFunction,
    *,
    batch: object,
    sizes: Sequence[int] | None = None,
    witness: Sequence[int] = (1, 2, 4, 8, 16),
) -> Prediction:
    """Predict the peak memory of an accumulator's windows by rehearsing them at a few microbatch sizes.

    A rehearsal is two windows of two microbatches, so that the second microbatch meets the first one's gradients, and
    the second window the optimizer's state. It runs on fake copies, which take no memory; a few small microbatches run
    on real copies, to learn what operators allocate inside themselves. Nothing of the user's is changed.

    Args:
        settings: The accumulator's.
        loss_fn: As for `Accumulator.step`.
        batch: Rows to rehearse with, repeated where there are too few; the memory of the whole batch counts where it
            lives on the model's device.
        sizes: Microbatch sizes for the fake windows; two or more, ascending. By default a few small ones and, since
            large tensors may be treated otherwise, the batch whole, or 64 rows of it.
        witness: Microbatch sizes for the real ones, ascending; none to leave them out, which saves time and a real copy
            of model and optimizer.

    Returns:
        The prediction; its note says what could not be done.

    Raises:
        ConfigError: Model, optimizer or loss function cannot be copied.

    Cost:
        Some 0.1 milliseconds an operator of a fake window; a few times a step's time and memory for the real ones.
    """
    rows = min(rows_of(batch), _LARGEST)
    sizes = [2, 4, 8, *([rows] if rows > 8 else [])] if sizes is None else sizes
    with _undisturbed(settings) as gradients:
        scene = Scene(settings, loss_fn, batch, gradients)
        notes: list[str] = []
        fake, enough = _faked(scene, sizes, notes=notes)
        seen = _witness(scene, sizes=witness, notes=notes)
        more = between([(size, each.timeline) for size, each in seen if size > 1])
        seen = sorted([*seen, *_witness(scene, sizes=more, notes=notes)], key=operator.itemgetter(0))
        if fake is None and sum(size > 1 for size, _ in seen) < 2:
            seen = [(size, _real(scene, size)) for size in (2, 4, 8)]
        told = partial(predict, fake, sizes=enough, beside=scene.beside)
        found = told(witnessed=seen)
        # Halve the gaps in which a padding or another kernel decides the peak.
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
    """Return what runs fake windows, and at which sizes; nothing where fake tensors cannot run them."""
    fake = cache(partial(_fake, scene))
    try:
        return fake, enough_of(fake, sizes)
    except ConfigError:
        raise
    except Exception as error:  # noqa: BLE001 - whatever a model or a loss does that fake tensors cannot do
        notes.append(f"fake tensors cannot run it ({type(error).__name__}), so real ones did")
        return None, sizes


def rehearse_once(
    settings: Settings,
    loss_fn: LossFunction,
    *,
    batch: object,
    size: int,
    watch: Callable[[nn.Module, MemoryMeter], AbstractContextManager[object]] | None = None,
) -> int:
    """Rehearse a window on fake copies at one size alone.

    Args:
        settings: The accumulator's.
        loss_fn: As for `Accumulator.step`.
        batch: As for `rehearse`.
        size: Rows of a microbatch; at least 1.
        watch: Given the fake model and the meter, what is entered around the window; `None` for nothing.

    Returns:
        Its peak in bytes, without what operators allocate inside themselves.

    Raises:
        ConfigError: Model, optimizer or loss function cannot be copied.

    Cost:
        Some 0.1 milliseconds an operator.
    """
    with _undisturbed(settings) as gradients:
        scene = Scene(settings, loss_fn, batch, gradients)
        return _fake(scene, size, watch=watch).peak_bytes + scene.beside(size)


def _fake(
    scene: Scene,
    size: int,
    *,
    watch: Callable[[nn.Module, MemoryMeter], AbstractContextManager[object]] | None = None,
) -> Timeline:
    mode = Fakes(allow_non_fake_inputs=True)
    cast = copies_of(scene, how=Faked(mode))
    if scene.settings.offload is not None:
        cast = replace(cast, loss_fn=Inside(cast.loss_fn, absent()))
    meter = MemoryMeter(timeline=True)
    # What fails here is run for real, and needs no traceback in anybody's log.
    log = logging.getLogger("torch._subclasses.fake_tensor")
    level = log.level
    log.setLevel(logging.CRITICAL + 1)
    try:
        with mode, nullcontext() if watch is None else watch(cast.settings.bare_model, meter):
            _play(cast, size, meter)
    finally:
        log.setLevel(level)
    return meter.timeline


def _real(scene: Scene, size: int) -> Witnessed:
    budget = scene.settings.memory_budget
    meter = AllocatorMeter(scene.settings.device, budget=budget if isinstance(budget, int) else None)
    cast = copies_of(scene, how=None)
    if (offload := scene.settings.offload) is not None:
        spill = offload if isinstance(offload, Spill) else Spill(cast.settings.bare_model)
        cast = replace(cast, loss_fn=Inside(cast.loss_fn, spill))
    _play(cast, size, meter)
    return meter.witnessed()


def _witness(scene: Scene, *, sizes: Sequence[int], notes: list[str]) -> list[tuple[int, Witnessed]]:
    """Run for real what can be run, and note what cannot."""
    seen: list[tuple[int, Witnessed]] = []
    for size in sizes:
        try:
            seen.append((size, _real(scene, size)))
        except ConfigError:
            raise
        except Exception as error:  # noqa: BLE001 - one row may be too few, eight too many, the profiler taken
            reason = "out of memory" if isinstance(error, torch.OutOfMemoryError | MemoryError) else repr(error)
            notes.append(f"workspaces were not measured on {size} rows ({reason[:200]})")
    return seen


# -- the play ---------------------------------------------------------------------------------------------------------


def _play(cast: Cast, size: int, meter: MemoryMeter) -> None:
    """Run windows until the optimizer has its state and the forward pass has met it."""
    settings = cast.settings
    meter.track(settings.model, *settings.optimizers)
    first = some_rows(cast.batch, size)
    # From the host microbatches come as copies, the next one while this one runs; else they are views of the batch.
    second = first if cast.device.type == "cpu" else map_tensors(torch.clone, first)
    meter.track(first, second, category=INPUTS)
    learn_to_count(type(torch.empty(0, device="cpu")))
    with meter:
        for _ in range(1 if all(each.state for each in settings.optimizers) else 2):
            _window(cast, [first, second], meter)


def _window(cast: Cast, microbatches: Sequence[Any], meter: MemoryMeter) -> None:
    """Do what a `Window` does, less everything that reads numbers back, which fake tensors have none of."""
    settings = cast.settings
    model = settings.bare_model
    named = trainable(model, settings.optimizers)
    snapshot = Snapshot(model, settings.device)
    # States are put aside in the real window, off the device; here nothing is ever put back.
    gradients = sums_for(settings, seed=0, aside=lambda state: lambda: state)
    gradients.open(named)
    scratch = Scratch()
    fuse = fuse_for(named if settings.fuse else [], gradients, scratch=scratch)
    tally: Tally | None = None
    with ExitStack() as inner:
        if settings.checkpoint is not None and settings.checkpoint != "auto":
            inner.enter_context(checkpointed(model, settings.checkpoint))
        if fuse.useful:
            inner.callback(fuse.forget)
            inner.callback(scratch.forget)
            inner.enter_context(fuse)
        if settings.autocast is not None:
            inner.enter_context(torch.autocast(settings.device.type, settings.autocast, cache_enabled=False))
        for index, microbatch in enumerate(microbatches):
            shares = shares_of(cast.loss_fn(model, microbatch), rows=1)
            gradients.check_untouched()  # which lets go of the sums, so that they are added to in place
            if not shares:
                continue
            # With every denominator declared, terms of any kind are let through.
            tally = tally or Tally(estimate=1.0, declared=dict.fromkeys((share.name for share in shares), 1.0))
            seeds = tally.seeds(shares)
            gradients.begin(1.0)
            tally.add(shares, microbatch=index)
            with torch.autocast(settings.device.type, enabled=False):
                fuse.run_backward([share.value for share in shares], seeds)
            scratch.keep()
            del shares, seeds
            gradients.mark()
            meter.track([total for _, total in gradients.gradients()], category=GRADIENTS)
    gradients.check_untouched()
    if tally is not None:
        tally.totals(settings.device)
    gradients.coalesce()
    # The norm is left out: a few numbers, which fake tensors find by other operators.
    gradients.scale_(0.5)
    gradients.hand_over()
    with _Guess():
        for optimizer in settings.optimizers:
            gradients.step(optimizer, optimizer.step)
    gradients.clear()
    for optimizer in settings.optimizers:
        optimizer.zero_grad()
    del snapshot


class _Guess(TorchDispatchMode):
    """Answer when an optimizer reads a number of its state, such as how many steps it took, that a fake one has not."""

    def __torch_dispatch__(  # noqa: PLR0917 - torch calls it by position
        self, func: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        """Take a fake tensor's number for 1."""
        if func is READ and isinstance(args[0], FakeTensor):
            return torch.ones((), dtype=args[0].dtype, device="cpu") if args[0].is_complex() else 1
        return func(*args, **(kwargs or {}))


@contextmanager
def _undisturbed(settings: Settings) -> Generator[list[tuple[Tensor, Tensor]]]:
    """Set gradients aside, and put back whatever a rehearsal may reach past the copies."""
    snapshot = Snapshot(settings.bare_model, settings.device)
    parameters = [each.parameter for each in trainable(settings.model, settings.optimizers)]
    before = [parameter.grad for parameter in parameters]
    with ExitStack() as stack:
        if "torch._dynamo" in sys.modules:
            stack.enter_context(uncompiled())
        try:
            for parameter in parameters:
                parameter.grad = None
            yield [(each, grad) for each, grad in zip(parameters, before, strict=True) if grad is not None]
        finally:
            snapshot.restore()
            for parameter, grad in zip(parameters, before, strict=True):
                parameter.grad = grad
