"""Run all microbatches of a window in lockstep, so that batch statistics are those of the effective batch."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from functools import partial
from typing import Any

import torch
from torch import Tensor, UntypedStorage, nn
from torch.utils._python_dispatch import (
    _get_current_dispatch_mode_stack,  # pyright: ignore[reportPrivateUsage]
)

from microbatch.errors import BatchStatisticsError, RankAgainError
from microbatch.loss.batch_reductions import sharing_rules
from microbatch.loss.batchnorm import ExactBatchNorm, OneOfMany
from microbatch.loss.module_replicas import Replicas
from microbatch.loss.rank_stats import Across
from microbatch.loss.round_robin import Call, Lockstep, Puts, Rule, Seat
from microbatch.memory.meter import MemoryMeter
from microbatch.memory.out_of_memory import is_out_of_memory
from microbatch.memory.spill import Spill
from microbatch.step.cutting import Cutting
from microbatch.step.part import Begin, Function, OpenWindow, Pass, Passes
from microbatch.step.record import Step
from microbatch.step.size.room import room_for

_MARGIN = 0.97  # of a budget, because workspaces inside operators are not measured


class InLockstep(Passes):
    """Run the forward passes of all microbatches in lockstep, and one backward for all of them.

    Each microbatch has a replica of the model that shares its parameters and buffers. Each replica stops at a batch
    statistic until every microbatch has added its part. Activations are offloaded, because they wait for the forward
    passes of the other microbatches.

    Args:
        spill: Moves activations off the device.

    Cost:
        About 0.1 milliseconds for each microbatch at each statistic, and the cost of `Spill`. With several ranks, two
        small all-reduces for each statistic in forward, and two in backward.

    Source:
        Laws C4, N6.
    """

    keeps = True

    def __init__(self, spill: Spill) -> None:
        self._spill, self._lockstep = spill, Lockstep()
        self._most: int | None = None
        self._least = 0
        self._before = 0
        self._batch: object = None
        self._rows: list[float | None] = []
        self._roots: tuple[list[Any], list[Tensor]] = [], []
        self._norm: ExactBatchNorm | None = None
        self._across: Across | None = None

    @property
    def waiting(self) -> int:
        """Number of microbatches that wait for the joint backward."""
        return len(self._rows)

    def open(self, window: OpenWindow, stack: ExitStack) -> None:
        """Reset the state of the previous window."""
        self._before, self._rows, self._roots = self._spill.bytes_spilled, [], ([], [])
        self._norm = self._across = None

    def cut(self, window: OpenWindow, batch: object, cutting: Cutting) -> None:
        """Store the batch, whose memory counts if it is on the device."""
        self._batch = batch

    def values(self, window: OpenWindow, begin: Begin, function: Function) -> Iterator[tuple[Pass, Any]]:
        """Run all forward passes, then yield each pass with the function's result."""
        self._across = across = window.peers.across()
        self._spill.leave(window.peers.hold(window))
        handed = list(begin())
        values = self._run(window, function, handed)
        whole = float(sum(rows or 0 for rows, _ in handed))
        if across is not None:
            whole = sum(across.agree("the end of the forward pass", number=whole))
            if window.coupled is None:
                window.denominator.share(whole)
        for index, (rows, microbatch) in enumerate(handed):
            window.now, window.rows = Pass(rows, microbatch, index), rows
            yield window.now, values[index]
            values[index] = None
        window.now = window.rows = None

    def start(self, window: OpenWindow, rows: float | None, tensors: Sequence[Any], seeds: Sequence[Tensor]) -> None:
        """Store the roots of a microbatch for the joint backward."""
        self._rows.append(rows)
        self._roots[0].extend(tensors)
        self._roots[1].extend(seeds)

    def finish(self, window: OpenWindow) -> None:
        """Run one backward for all microbatches."""
        norm, across = self._norm, self._across
        assert norm is not None  # noqa: S101 - `values` comes before
        window.peers.speak(across)
        norm.look_away()
        anchors = [] if across is None else [across.anchor]
        tensors, seeds = self._roots
        window.run([*anchors, *tensors], [*(torch.zeros_like(each) for each in anchors), *seeds])
        del tensors, seeds
        rows, self._rows, self._roots = self._rows, [], ([], [])
        norm.check()
        if across is not None:
            across.end("the end of the backward pass")
        window.peers.scatter(window)
        window.gradients.mark(some=False)
        for each in rows:
            window.went(each)

    def figures(self, window: OpenWindow) -> Mapping[str, Any]:
        """Return the number of bytes offloaded in this window."""
        return {"spilled_bytes": self._spill.bytes_spilled - self._before}

    def done(self, window: OpenWindow, step: Step) -> None:
        """Offload less in the next window, if this one left memory unused."""
        allowed, self._batch = room_for(window.options, self._batch), None
        if step.peak_bytes is not None and allowed is not None:
            # Tensors that stay on the device raise the peak by at most their size.
            self._least = max(self._least, step.peak_bytes - self._spill.room)
            room = max(0, int(_MARGIN * allowed) - self._least)
            self._spill.room = room if self._most is None else min(room, self._most)

    def put_back(self, window: OpenWindow, error: BaseException) -> None:
        """Release the graphs; after memory ran out, offload everything once, and keep less in later windows."""
        self._rows, self._roots, self._norm, self._across, self._batch = [], ([], []), None, None, None
        if self._spill.room and (is_out_of_memory(error) or isinstance(error, RankAgainError)):
            self._most, self._spill.room = self._spill.room // 2, 0

    def _run(self, window: OpenWindow, function: Function, handed: Sequence[tuple[Any, Any]]) -> list[Any]:
        model = window.model
        self._spill.leave([microbatch for _, microbatch in handed])
        self._norm = norm = ExactBatchNorm(model, self._across)
        replicas = Replicas(model, kinds={nn.SyncBatchNorm: OneOfMany})
        models = replicas.make(len(handed), window.gradients.stand_in)
        tasks = [partial(function, each, microbatch) for each, (_, microbatch) in zip(models, handed, strict=True)]
        try:
            values = self._lockstep.run(
                tasks,
                device=window.device,
                rules={**norm.rules(), **sharing_rules([rows for rows, _ in handed], self._across), **_REFUSED},
                around=lambda: self._spill,
                puts=Puts(self._away, self._aside, self._spill.spares, self._park, _resized),
            )
            replicas.put_back()
        except BaseException:
            replicas.drop()
            raise
        norm.check()
        return values

    def _away(self, tensor: Tensor) -> Callable[[], Tensor]:
        return self._spill.put(tensor).get

    def _aside(self, tensor: Tensor) -> Callable[[], Tensor]:
        return self._spill.put(tensor, briefly=True).get

    def _park(self, tensor: Tensor) -> Callable[[], Tensor] | None:
        handle = self._spill.put(tensor, briefly=True)
        return handle.get if handle.moved else None


def _resized(storage: UntypedStorage) -> None:
    for mode in _get_current_dispatch_mode_stack():
        if isinstance(mode, MemoryMeter):
            mode.resized(storage)


def _refuse(seat: Seat, call: Call) -> None:
    raise BatchStatisticsError(
        f"{call.func.__name__}() was called in the forward pass of microbatch {seat.index}: with "
        'batch_norm="exact" the gradient of a statistic needs every microbatch, and the others wait; only the '
        "accumulator can run backward"
    )


_REFUSED: dict[Any, Rule] = dict.fromkeys((torch.autograd.grad, torch.autograd.backward, Tensor.backward), _refuse)
