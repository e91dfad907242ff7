"""What is run in a window: microbatches with a loss each, or a batch that is encoded for one loss of the whole."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeAlias

from torch import nn

from microbatch.batch.batch_tree import rows_of
from microbatch.loss.loss import LossLike
from microbatch.loss.representations import stand_in
from microbatch.step.compiled import LossFunction
from microbatch.step.coupled_way import Went
from microbatch.step.coupling import Encode
from microbatch.step.foresee import room_for
from microbatch.step.settings import EXACT, Memory, Settings
from microbatch.step.window import Window

Call: TypeAlias = Callable[..., Any]
"""``call(function, microbatch)`` calls a function with the model, compiled and spilled where that was asked for; with
``spill=True`` also where it was not."""


class Plain:
    """Run a batch in microbatches, each with its own part of the loss.

    Args:
        batch: The batch.
        loss_fn: As for `Accumulator.step`.
        call: Calls it.
        in_turns: Whether the window runs all microbatches together.
        piped: Whether a schedule runs them, through the stages of a pipeline.

    Attributes:
        alone: What a microbatch goes through.
    """

    def __init__(self, batch: object, loss_fn: LossFunction, *, call: Call, in_turns: bool, piped: bool) -> None:
        self.batch, self.alone, self._call, self._in_turns, self._piped = batch, loss_fn, call, in_turns, piped

    def run(self, window: Window) -> None:
        """Do what the window is for.

        Args:
            window: Open.
        """
        if self._piped:
            window.backward_by_schedule(self.batch, self.alone)
            return
        if self._in_turns:
            window.backward_together(self.batch, self.alone)
            return
        for microbatch in window.split(self.batch):
            window.backward(self._call(self.alone, microbatch))


class Coupled:
    """Encode a batch in microbatches, for one loss of the whole of it.

    Args:
        batch: The batch.
        loss_fn: As for `Accumulator.step`.
        encode: Likewise.
        settings: The accumulator's.
        memory: The accumulator's; it is told what the way of encoding costs.
        call: Calls a function with a microbatch.
    """

    def __init__(
        self,
        batch: object,
        loss_fn: LossFunction,
        *,
        encode: Encode,
        settings: Settings,
        memory: Memory,
        call: Call,
    ) -> None:
        self.batch, self._loss_fn, self._encode = batch, loss_fn, encode
        self._settings, self._memory, self._call = settings, memory, call
        self._way = "twice"

    def alone(self, model: nn.Module, microbatch: Any) -> LossLike:
        """Put a microbatch through the encoder alone, to learn what that takes.

        Args:
            model: What it is called with.
            microbatch: Likewise.

        Returns:
            Some loss.
        """
        return stand_in(self._encode(model, microbatch))

    def run(self, window: Window) -> None:
        """Do what the window is for.

        Args:
            window: Open.
        """
        memory, settings = self._memory, self._settings
        # While sizes are tried, they are compared by what is the same for all of them.
        trying = memory.sizing.open or memory.tuning is not None
        self._way = memory.ways.next(0 if trying else rows_of(self.batch))
        encode = self._encode if settings.batch_norm == EXACT else self._encoded
        representations = window.encode(self.batch, encode, keep=self._way != "twice")
        window.backward(self._loss_fn(settings.bare_model, representations))

    def learn(self, window: Window) -> None:
        """Learn what the way of encoding took.

        Args:
            window: Closed, with a step.
        """
        memory, step, coupling = self._memory, window.step, window.coupling
        if coupling is None or memory.tuning is not None or memory.ways.settled:
            return
        settings = self._settings
        if settings.batch_norm == EXACT:  # there is one way
            return
        went = Went(
            way="twice" if not coupling.keeps else self._way,
            rows=coupling.own,
            microbatches=step.microbatches,
            seconds=step.seconds,
            graph_bytes=coupling.graph_bytes,
            peak_bytes=step.peak_bytes,
            room=None if coupling.graph_bytes is None else room_for(settings, self.batch),
            passing=settings.device.type == "cpu" and settings.memory_budget is None and step.peak_bytes is not None,
        )
        memory.ways.learn(went)

    def _encoded(self, model: nn.Module, microbatch: Any) -> Any:
        del model  # which is the accumulator's own
        return self._call(self._encode, microbatch, spill=self._way == "spill")
