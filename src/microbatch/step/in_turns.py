"""All microbatches of a window in lockstep, so that what they normalise by is the effective batch's."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, UntypedStorage, nn
from torch.utils._python_dispatch import (
    _get_current_dispatch_mode_stack,  # pyright: ignore[reportPrivateUsage]
)

from microbatch.errors import BatchStatisticsError
from microbatch.gradients.gradient_sum import GradientSum
from microbatch.loss.batch_reductions import sharing_rules
from microbatch.loss.batchnorm import ExactBatchNorm, OneOfMany
from microbatch.loss.module_replicas import Replicas
from microbatch.loss.rank_stats import Across
from microbatch.loss.round_robin import Call, Lockstep, Puts, Rule, Seat
from microbatch.memory.meter import MemoryMeter
from microbatch.memory.spill import Spill
from microbatch.ranks.process_group import Ranks
from microbatch.step.settings import Settings

_MARGIN = 0.97  # of a budget: operators allocate inside themselves what nobody counts


@dataclass(frozen=True, slots=True)
class Pieces:
    """A window's microbatches.

    Attributes:
        microbatches: On the device.
        rows: Of each.
        gradients: Where their gradients add up.
        across: The other ranks, who hold a share of the batch; `None` if there are none.
    """

    microbatches: Sequence[Any]
    rows: Sequence[int]
    gradients: GradientSum
    across: Across | None


@dataclass(frozen=True, slots=True)
class Passed:
    """What the forward passes of a window leave.

    Attributes:
        values: What each microbatch returned.
        rows: Rows of each.
        whole: Rows of the batch, over all ranks.
        norm: What watched over the layers.
        across: The other ranks, if there are any.
    """

    values: list[Any]
    rows: Sequence[int]
    whole: float
    norm: ExactBatchNorm
    across: Across | None

    @property
    def anchors(self) -> list[Tensor]:
        """What backward has to start from beside what was returned, with a gradient of 0."""
        return [] if self.across is None else [self.across.anchor]

    def end(self) -> None:
        """Come to the end of backward.

        Raises:
            BatchStatisticsError: A layer ran again in backward.
            RankError: Another rank failed.
        """
        self.norm.check()
        if self.across is not None:
            self.across.end("the end of the backward pass")


class InTurns:
    """Run the forward passes of a window's microbatches in turns.

    Each microbatch has a thread, and a replica of the model that shares its parameters and buffers. What autograd saves
    is spilled, because it waits for the other microbatches' forward passes.

    Args:
        settings: The accumulator's.
        spill: Where what waits is put.
    """

    def __init__(self, settings: Settings, spill: Spill) -> None:
        self._settings = settings
        self._spill = spill
        self._lockstep = Lockstep()
        self._most: int | None = None
        self._least = 0

    def run(self, function: Callable[[nn.Module, Any], Any], pieces: Pieces) -> Passed:
        """Run all forward passes.

        Args:
            function: Called with a replica of the model and a microbatch.
            pieces: The microbatches.

        Returns:
            What they leave.

        Raises:
            BatchStatisticsError: The microbatches do not meet for the same statistics in the same order, or one of
                them could not be taken over the whole batch.
            RankError: Another rank failed, or met for something else.

        Cost:
            Every microbatch's forward; some 0.1 milliseconds for each of them at each statistic; what `Spill` costs.
            Over several ranks two small all-reduces for each statistic, and as many in backward.
        """
        model, across = self._settings.bare_model, pieces.across
        self._spill.leave(pieces.microbatches)
        norm = ExactBatchNorm(model, across)
        replicas = Replicas(model, kinds={nn.SyncBatchNorm: OneOfMany})
        models = [replicas.make(pieces.gradients.stand_in) for _ in pieces.microbatches]
        tasks = [partial(function, *each) for each in zip(models, pieces.microbatches, strict=True)]
        values = self._lockstep.run(
            tasks,
            device=self._settings.device,
            rules={**norm.rules(), **sharing_rules(pieces.rows, across), **_REFUSED},
            around=lambda: self._spill,
            puts=Puts(self._away, self._aside, self._spill.spares, self._park, self._resized),
        )
        replicas.put_back()
        norm.check()
        whole = sum(pieces.rows)
        if across is not None:
            whole = sum(across.agree("the end of the forward pass", number=whole))
        return Passed(values, pieces.rows, whole, norm, across)

    def learn(self, peak_bytes: int, allowed: int | None) -> None:
        """Spill less in the next window, if the last one left room.

        Args:
            peak_bytes: Most bytes in the last window.
            allowed: Bytes that a window may have in use; `None` where nothing limits them, and everything is spilled.
        """
        if allowed is not None:
            # What stays raises the peak by no more than itself.
            self._least = max(self._least, peak_bytes - self._spill.room)
            room = max(0, int(_MARGIN * allowed) - self._least)
            self._spill.room = room if self._most is None else min(room, self._most)

    def ran_out(self) -> None:
        """Spill everything in the next window, and leave less than this time in those that follow."""
        if self._spill.room:
            self._most, self._spill.room = self._spill.room // 2, 0

    def _away(self, tensor: Tensor) -> Callable[[], Tensor]:
        return self._spill.put(tensor).get

    def _aside(self, tensor: Tensor) -> Callable[[], Tensor]:
        return self._spill.put(tensor, briefly=True).get

    def _park(self, tensor: Tensor) -> Callable[[], Tensor] | None:
        handle = self._spill.put(tensor, briefly=True)
        return handle.get if handle.moved else None

    def _resized(self, storage: UntypedStorage) -> None:
        for mode in _get_current_dispatch_mode_stack():
            if isinstance(mode, MemoryMeter):
                mode.resized(storage)


def across_ranks(ranks: Ranks | None) -> Across | None:
    """Return what shares statistics with other ranks.

    Args:
        ranks: Who else holds a share of the batch; `None` if nobody does.

    Returns:
        It, for one window.
    """
    if ranks is None:
        return None
    return Across(size=ranks.size, index=ranks.index, device=ranks.device, add_=ranks.sum_)


def _refuse(seat: Seat, call: Call) -> None:
    raise BatchStatisticsError(
        f"{call.func.__name__}() was called in the forward pass of microbatch {seat.index}: with "
        'batch_norm="exact" the gradient of a statistic needs every microbatch, and the others wait; leave the '
        "gradients to the accumulator"
    )


_REFUSED: dict[Any, Rule] = dict.fromkeys((torch.autograd.grad, torch.autograd.backward, Tensor.backward), _refuse)
