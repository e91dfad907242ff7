"""The window: cut the batch, add every microbatch's gradient, divide once, step; or restore everything on an error."""

from __future__ import annotations

import time
from collections.abc import Sequence
from contextlib import ExitStack
from functools import partial
from types import TracebackType
from typing import Any, Self

import torch
from torch import Tensor

from microbatch.batch.batch_tree import rows_of
from microbatch.batch.batches import parts_of
from microbatch.errors import (
    EmptyBatchError,
    EmptyWindowError,
    WindowClosedError,
    WindowOpenError,
)
from microbatch.failed_layer import explain_missing_kernel
from microbatch.gradients.autograd_engine import run_backward
from microbatch.loss.loss import LossLike, Share, check_number, shares_of, value_of
from microbatch.step.cutting import Cutting, cut_up
from microbatch.step.denominator import Counts, Denominator
from microbatch.step.events import Event, MicrobatchDone, StepDone
from microbatch.step.own_loop import OwnLoop
from microbatch.step.part import Begin, Function, Pass, Run
from microbatch.step.record import Step
from microbatch.step.setup import Attempt, Setup
from microbatch.step.undo import Undo
from microbatch.step.user_errors import backward_once

_IN_FULL = 2  # windows whose gradients are watched in full


class Window(OwnLoop):
    """Run one optimizer step in a hand-written loop: gradients add up inside the block, and leaving it takes the step.

    `Accumulator.window` and `Accumulator.windows` create windows. The gradient is the whole batch's: the window divides
    the summed losses once, by the count of all microbatches. If the block raises, the window takes no step, and
    restores gradients, random state and buffers.

    Example:
        >>> import microbatch as mb
        >>> model = torch.nn.Linear(2, 1, bias=False)
        >>> accumulator = mb.Accumulator(model, torch.optim.SGD(model.parameters(), lr=0.1), microbatch_size=2)
        >>> with accumulator.window() as window:
        ...     for microbatch in window.split({"x": torch.ones(5, 2)}):
        ...         window.backward(model(microbatch["x"]).mean())
        >>> window.step.microbatches, window.step.samples
        (3, 5)
    """

    def __init__(
        self, setup: Setup, *, attempt: Attempt, counts: Counts | None = None, source: Sequence[Any] = ()
    ) -> None:
        self.setup, self.attempt, self.source = setup, attempt, source
        self.options, self.peers, self.passes = setup.options, setup.peers, setup.passes
        self.model, self.device = setup.options.bare_model, setup.options.device
        self.denominator = Denominator(counts, estimate=setup.history.count or None)
        self.keeps_graphs = setup.passes.keeps
        self.done, self.planned, self._events = [], len(source) or None, []
        self.now = self.rows = self.order = self.function = self.coupled = self.record = None
        self.stepping = self.stepped = self.dropped = False
        self.outer, self._inner, self.undo = ExitStack(), ExitStack(), Undo()
        self._around: ExitStack | None = None
        self._state = "new"

    def __enter__(self) -> Self:
        """Open the window: set gradients aside, and save the state that an error would restore."""
        if self._state != "new":
            raise WindowClosedError("a window is used once; ask the accumulator for another one")
        try:
            self.undo.begin(self)
            self.setup.history.claim(self)
            self._state = "open"
            self._open()
            self.undo.opened()
            return self  # noqa: TRY300 - an interrupt here closes the window
        except BaseException as error:
            self._fail(error)
            raise

    def _open(self) -> None:
        history, options = self.setup.history, self.options
        self.attempt.started = self.attempt.started or time.perf_counter()
        history.seed = torch.initial_seed() if history.seed is None else history.seed
        self.peers.prepare(self)
        self.undo.waited_for = True
        self.undo.save(self)
        self.gradients = self.setup.sums(self.peers.index)
        self.undo.steps.append(self.gradients.put_back)
        self.gradients.open(self.setup.trainable(options.model, options.optimizers, self.undo.snapshot.modules))
        for optimizer in options.optimizers:
            self.undo.hooks.append(optimizer.register_step_pre_hook(self._guard))
        for part in self.setup.having("open"):
            part.open(self, self._inner)
        self._young = history.here < _IN_FULL
        self._run: Run = run_backward
        for part in reversed(self.setup.having("backward")):
            self._run = part.backward(self, self._run)

    # -- cut -----------------------------------------------------------------------------------------------------------

    def cut(self, batch: object) -> Begin:
        """Cut this rank's share of the batch into microbatches, and prepare all parts for the microbatches."""
        rows = rows_of(batch)
        if not rows and self.peers.size == 1:
            raise EmptyBatchError("the batch has 0 rows; skip empty batches before they reach the training step")
        sizing = self.setup.sizing(rows)
        return self.begin(batch, cut_up(batch, rows, lengths=self.options.lengths, sizing=sizing, device=self.device))

    def begin(self, batch: object, cutting: Cutting) -> Begin:
        """Prepare the denominator, the other ranks and all parts for the microbatches of a batch."""
        parts = parts_of(batch)
        self.denominator.expect(parts, cutting.rows, begun=bool(self.done), total=partial(self.peers.total, self))
        self.planned, self.order = len(self.done) + cutting.microbatches, cutting.order
        self.peers.agree_on(self, cutting, batch)
        for part in self.setup.having("cut"):
            part.cut(self, batch, cutting)
        return cutting.begin

    def called(self, function: Function) -> Function:
        """Wrap a loss function or an encoder in all parts."""
        for part in reversed(self.setup.having("call")):
            function = part.call(self, function)
        self.function = function
        return function

    def go(self, p: Pass | None) -> None:
        """Leave the previous pass, and enter the next one; `None` after the last."""
        if self.undo.interrupts.waiting:
            self.undo.interrupts.deliver()
        if self._around is not None:
            self._around.close()
            self._around = None
        self.now, self.rows = p, p and p.rows
        for part in self.setup.having("around") if p else ():
            if (context := part.around(self, p)) is not None:
                self._around = self._around or ExitStack()
                self._around.enter_context(context)

    # -- forward and backward ------------------------------------------------------------------------------------------

    def backward(self, loss: LossLike, *, count: float | None = None) -> None:
        """Run one microbatch's backward, and add its gradients to the window's sum.

        Args:
            loss: The mean over the microbatch's samples (a tensor of shape ``()``), a `Loss`, a dict of these for
                several terms, or `None` for a microbatch that contributes nothing.
            count: Samples in the microbatch, at least 0. Needed only if the loss is a plain mean and this window did
                not hand out the microbatch.

        Raises:
            WindowError: The window is not open, or ``Ranks(overlap=True)`` has had its last microbatch.
            LossError: The loss cannot be used; the subclass tells why.
            GradientsTouchedError: Other code wrote to the gradients since the last backward.

        Cost:
            One backward, without host synchronisation. It communicates only with ``Ranks(overlap=True)``.
        """
        self.check_open("backward in")
        (self.take if self.coupled is None else self.coupled.take)(loss, count)

    def take(self, loss: LossLike, count: float | None) -> None:
        """Run the backward of one microbatch's loss, now or together with the other microbatches."""
        self.rows = self.rows if count is None else check_number(count, "count")
        shares, filler = shares_of(loss, rows=self.rows), self.now is not None and self.now.filler
        if self.denominator.declares:
            self.denominator.need(alone=self.peers.size == 1)
        counts = shares and not filler
        start = self.seeds(shares, len(self.done) + self.passes.waiting) if counts else self.peers.silence(loss)
        if filler:
            self.run(*start)
        else:
            self.passes.start(self, self.rows, *start)
        self.rows = None  # a second loss of the same microbatch needs its own count

    def seeds(self, shares: Sequence[Share], microbatch: int | None) -> tuple[list[Tensor], list[Tensor]]:
        """Count a loss, and return its roots for backward with their first gradients, ``weight / expected``."""
        seeds, scaler = self.denominator.seeds(shares), self.options.grad_scaler
        self.denominator.add(shares, microbatch)
        return list(map(value_of, shares)), list(map(scaler.scale, seeds)) if scaler else seeds

    def run(self, tensors: Sequence[Any], seeds: Sequence[Tensor]) -> None:
        """Run a backward, and check that no other code wrote to the gradients since the last one."""
        gradients = self.gradients
        gradients.check_untouched()
        if tensors:
            if gradients.is_folded:
                ranks = 1 if self.coupled else self.peers.size
                gradients.begin(partial(self.denominator.estimated_factor, ranks=ranks))
            backward_once(self._run, tensors, seeds)
        gradients.mark(some=not self._young)  # code that writes to gradients does so in every window

    def went(self, rows: float | None) -> None:
        """Count a microbatch whose backward has run."""
        if self.options.listeners:
            step, index = self.setup.history.windows, len(self.done)
            self.options.emit(MicrobatchDone(step=step, index=index, microbatches=self.planned, rows=rows))
        self.done.append(rows or 0)

    def later(self, event: Event) -> None:
        """Emit an event at the end of the window, after `StepDone`."""
        self._events.append(event)

    # -- close ---------------------------------------------------------------------------------------------------------

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        """Close the window: take the step, or restore everything if the block raised."""
        if self._state != "open":
            return
        self.undo.interrupts.held = True
        if error is not None:
            self._fail(error)
            return
        try:
            self._finish()
        except BaseException as failure:
            self._fail(failure)
            raise
        self.options.emit_after(StepDone(step=self.step), *self._events)

    def _finish(self) -> None:
        history, largest = self.setup.history, max(self.done, default=0)
        self.go(None)
        self._inner.close()
        self.gradients.check_untouched()
        if not self.done and self.peers.size == 1 and not self.coupled:
            raise EmptyWindowError("the window was left without one backward, so there is no gradient")
        if self.coupled is not None:
            self.coupled.check()
        for part in self.setup.having("check"):
            part.check(self)
        found = self.setup.finish(self)
        for part in self.setup.having("figures"):
            found |= part.figures(self)
        if self.dropped:
            self.undo.snapshot.restore_buffers()
            history.skipped += 1
        step = Step(
            index=history.windows,
            microbatches=len(self.done),
            microbatch_size=int(largest) if float(largest).is_integer() else largest,
            retries=self.attempt.retries,
            seconds=time.perf_counter() - (self.attempt.started or 0.0),
            **found,
        )
        history.count, history.windows, self.record = step.count, history.windows + 1, step
        self._close()
        try:
            for part in self.setup.having("done"):
                part.done(self, step)
            self.coupled = self.function = None  # they refer back to the window, too
        finally:
            self._release()

    def _fail(self, error: BaseException) -> None:
        """End the window after an error; signals already wait."""
        try:
            if self._state == "open":
                self._put_back(error)
        finally:
            self._release()

    def _put_back(self, error: BaseException) -> None:
        """Restore the state from before the window, and notify the other ranks, which would wait otherwise."""
        explain_missing_kernel(error, self.model, autocast=self.options.autocast)
        for part in reversed(self.setup.having("failed")):
            part.failed(self, error)
        if self._around is not None:
            self._around.__exit__(type(error), error, error.__traceback__)
        self._inner.close()
        self.undo.restore_or_complete(self, error)
        self._close()
        for part in self.setup.having("put_back"):
            part.put_back(self, error)
        again = self.attempt.failed(self, error)
        if self.undo.waited_for and not self.peers.fail(self, error, again=again):
            self.attempt.give_up()

    def _close(self) -> None:
        self.outer.close()
        self._state, self.source = "closed", ()
        self.undo.close(self)

    def _release(self) -> None:
        self._run = run_backward  # what parts wrapped around it refers back to the window
        self.undo.close(self)
        self.undo.end(self)

    def _guard(self, *_: object) -> None:
        if not self.stepping:
            raise WindowOpenError("optimizer.step() was called inside a window; leaving the window takes the step")
        self.stepped = True
