"""One window of a dry run: a single process, and an end without reading values from the device."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from microbatch.loss.loss import Share
from microbatch.memory.ledger import GRADIENTS
from microbatch.memory.meter import READ, MemoryMeter
from microbatch.memory.recompute import named_blocks
from microbatch.step.denominator import Denominator
from microbatch.step.history import History
from microbatch.step.options import Options
from microbatch.step.part import Function, OpenWindow, Part, Passes, Peers, Run
from microbatch.step.parts.autocast import Autocast
from microbatch.step.parts.checkpointing import Checkpointing
from microbatch.step.parts.fused import Fused
from microbatch.step.setup import Attempt, Setup
from microbatch.step.sums import sums_for
from microbatch.step.window import Window


def run_window(options: Options, loss_fn: Function, microbatches: Iterable[Any], meter: MemoryMeter) -> Sequence[int]:
    """Run the parts of a window that take memory, and the optimizers' steps.

    Args:
        options: Options with copies of the model and the optimizers.
        loss_fn: As for `Accumulator.step`.
        microbatches: The microbatches. As in a real window, one is held until the next one is there.
        meter: Measures the memory, with gradients as a category.

    Returns:
        Bytes of each tensor that a window makes of one microbatch's loss, and keeps until its end.
    """
    parts: list[Part] = [_Gradients(meter)]
    if options.checkpoint is not None and options.checkpoint != "auto":
        parts.append(Checkpointing(named_blocks(options.bare_model, options.checkpoint)))
    if options.autocast is not None:
        parts.append(Autocast(options.autocast))
    parts.append(Fused(weights=options.sums.fuse))
    peers, passes = Peers(), Passes()
    setup = Setup(
        options=options,
        history=History(seed=0),
        parts=[peers, passes, *parts],
        peers=peers,
        passes=passes,
        sizing=_none,
        # A real window saves optimizer state off the device; a dry run never restores it.
        sums=lambda rank: sums_for(options, aside=lambda state: lambda: state, rank=rank),
        couple=_none,
        finish=_finish,
        live_bytes=_none,
    )
    window = Window(setup, attempt=Attempt())
    window.denominator = terms = _AnyTerms()
    with window:
        for microbatch in microbatches:
            window.backward(loss_fn(window.model, microbatch), count=1)
        microbatch = None  # no longer held when the optimizers step
    return terms.kept


class _AnyTerms(Denominator):
    """A denominator that accepts any terms; every count is 1."""

    kept: Sequence[int] = ()

    def seeds(self, shares: Sequence[Share]) -> list[Tensor]:
        if self.declared is None:
            self.declare(1.0, dict.fromkeys((share.name for share in shares), 1.0))
        counts = [each.count.nbytes for each in shares if isinstance(each.count, Tensor)]
        # The loss, and the divisor of a cross entropy in its graph.
        self.kept = [*counts, *(each.value.nbytes for each in shares for _ in range(2))]
        return super().seeds(shares)


class _Gradients(Part):
    """Marks gradients as a category for the meter."""

    def __init__(self, meter: MemoryMeter) -> None:
        self._meter = meter

    def backward(self, window: OpenWindow, run: Run) -> Run:
        return partial(self._tracked, window, run)

    # No function in a function: where annotations are checked, it would be in a reference cycle, and keep the window
    # and what it saved alive.
    def _tracked(self, window: OpenWindow, run: Run, tensors: Sequence[Any], seeds: Sequence[Tensor]) -> None:
        run(tensors, seeds)
        self._meter.track([total for _, total in window.gradients.gradients()], category=GRADIENTS)


def _finish(window: OpenWindow) -> dict[str, Any]:
    """Finish the window as usual, but without the gradient norm, which fake tensors compute by other operators."""
    gradients = window.gradients
    if window.denominator.names:
        window.denominator.totals(window.device)
    gradients.coalesce()
    gradients.scale_(0.5)
    gradients.hand_over()
    window.stepping = True
    with _FakeNumbers():
        for optimizer in window.options.optimizers:
            gradients.step(optimizer, optimizer.step)
    gradients.clear()
    for optimizer in window.options.optimizers:
        optimizer.zero_grad()
    nothing = torch.zeros(())
    record = {"loss": nothing, "grad_norm": nothing, "terms": {}, "counts": {}, "count": 0, "samples": 0}
    return record | {"applied": True}


class _FakeNumbers(TorchDispatchMode):
    """Returns 1 when an optimizer reads a number from a fake tensor, such as its step count."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Replace the value of a fake tensor by 1."""
        from torch._subclasses.fake_tensor import FakeTensor

        if func is READ and isinstance(args[0], FakeTensor):
            return torch.ones((), dtype=args[0].dtype, device="cpu") if args[0].is_complex() else 1
        return func(*args, **(kwargs or {}))


def _none(*_: object, **__: object) -> Any:
    """Return `None`, for functions that a dry run does not need."""
