"""As many passes on every rank: what a fully sharded model needs of a window, because its passes communicate."""

from __future__ import annotations

from collections.abc import Callable, Generator, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any, TypeAlias

import torch
from torch import Tensor

from microbatch.batch.batch_tree import rows_of
from microbatch.batch.prefetch import feed
from microbatch.errors import LossError, WindowError
from microbatch.loss.loss import Loss
from microbatch.memory.budget import format_bytes
from microbatch.ranks.agreement import attend
from microbatch.ranks.fsdp import narrowest, unshared_bytes
from microbatch.ranks.fsdp_passes import Sharded
from microbatch.ranks.process_group import Ranks
from microbatch.ranks.unsharded import hold_whole, let_go, scatter_whole
from microbatch.step.events import SyncChosen
from microbatch.step.foresee import room_for
from microbatch.step.lend import few_of, lend
from microbatch.step.saved_state import Snapshot
from microbatch.step.settings import EXACT, Memory, Settings

Piece: TypeAlias = tuple[int, Any]
Backward: TypeAlias = Callable[[list[Any], list[Tensor]], object]
_SAFE = 0.9  # of the memory that there is


@dataclass(frozen=True, slots=True)
class Plan:
    """What a rank will run.

    Attributes:
        microbatches: How many.
        rows: Rows of all of them.
        batch: What they are cut from: a batch, or, from a loader, the first of them.
    """

    microbatches: int
    rows: float
    batch: Any


class Alike:
    """Let every rank make the same passes through a fully sharded model.

    The ranks agree beforehand on the largest number of microbatches. Who has fewer fills up with one that it had, or
    was lent, whose gradient is made zero; and random state and buffers are put back after it.

    Args:
        settings: The accumulator's.
        memory: The accumulator's.
        ranks: Who shares the model.

    Attributes:
        sharded: What is set in the model, and watched.
        aside: Around passes that come to nothing, for whoever measures what passes do.

    Source:
        Laws N3, N4, R2, R7.
    """

    def __init__(self, settings: Settings, memory: Memory, ranks: Ranks) -> None:
        self._settings, self._memory, self._ranks = settings, memory, ranks
        self.sharded = Sharded(settings.model, ranks)
        self._filling = self._agreed = False
        self._forward_only = self._between = False
        self.aside: Callable[[], AbstractContextManager[object]] = nullcontext
        self._few: Any = None
        self._lent: Any = None

    @property
    def sync(self) -> str:
        """How the window's gradients are scattered."""
        return "fast" if self.sharded.fast else "lean"

    @property
    def filling(self) -> bool:
        """Whether the microbatch of now counts for nothing."""
        return self._filling

    def expect(self, plan: Plan, *, parameters: int) -> float:
        """Agree with the other ranks on how many passes there will be, and how they communicate.

        Args:
            plan: What this rank will run.
            parameters: How many gradients the window has.

        Returns:
            Rows of all ranks.

        Raises:
            WindowError: The window has had a batch already.
            RankError: Another rank failed.

        Cost:
            Two small all-reduces; where a rank has no rows, some rows of another one are sent to all.
        """
        if self._agreed:
            raise WindowError(
                "a window over a fully sharded model has one batch: the ranks have agreed on its microbatches; open "
                "another window"
            )
        ranks = self._ranks
        fast, why = self._may_be_fast(plan)
        rows = attend(ranks, plan.rows, parameters=parameters)
        told = torch.zeros(2, ranks.size, dtype=torch.float64, device=ranks.device)
        told[0, ranks.index], told[1, ranks.index] = plan.microbatches, fast
        ranks.sum_(told)
        numbers, fasts = told.tolist()
        self._agreed = True
        self.sharded.expect(int(max(numbers)), fast=all(fasts))
        self._say(why if all(fasts) or not fast else "another rank cannot hold whole gradients")
        if plan.rows:
            self._few = few_of(plan.batch)
        if rows and not all(numbers):
            self._lent = lend(ranks, plan.batch, microbatches=numbers)
            self._few = self._lent if self._few is None else self._few
        return rows

    def hold_whole(self) -> list[Any]:
        """Gather all weights, for passes that are no longer one after the other.

        Returns:
            The weights.

        Cost:
            One all-gather a unit.
        """
        self._between, self.sharded.whole = True, True
        return hold_whole(self._settings.model)

    def scatter_whole(self) -> None:
        """Scatter what one backward of all passes has left.

        Cost:
            One reduce-scatter a unit.
        """
        self.sharded.begin()
        scatter_whole(self._settings.model)
        self.sharded.went()

    def begin_round(self, *, graph: bool) -> None:
        """Begin with the passes once more, of a window that makes them twice.

        Args:
            graph: Whether they go backward as well.
        """
        self.sharded.start_over()
        self._forward_only, self._between = not graph, False

    def end_round(self) -> None:
        """Let the loss of all representations be computed, with what it takes from the model's outermost units.

        Cost:
            One all-gather of these, where they are not there already.
        """
        self._between = True
        self.sharded.between()

    def fill_up(
        self,
        begin: Callable[[], Iterable[Piece]],
        shown: Callable[..., Iterable[Piece]],
        *,
        run: Callable[[Any], object],
        backward: Backward,
    ) -> None:
        """Make a pass that the other ranks make, and this one has no microbatch for.

        Args:
            begin: Begins to hand out this rank's microbatches.
            shown: Shows microbatches to whoever needs to know of them.
            run: Returns some loss of a microbatch.
            backward: Runs backward from tensors with their gradients.
        """
        with self._nothing():
            for _, microbatch in shown([self._filler(begin)]):
                self.sharded.begin()
                self._pass(run, microbatch, backward=backward)

    def check_agreed(self) -> None:
        """Refuse a microbatch that the window did not hand out.

        Raises:
            WindowError: The ranks have not agreed on how many there are.
        """
        if not self._agreed:
            raise WindowError(
                "a fully sharded model needs as many microbatches on every rank, which nobody has seen to: let "
                "window.split(batch) hand them out, or accumulator.windows(loader)"
            )

    def even(self, begin: Callable[[], Iterable[Piece]], shown: Callable[..., Iterable[Piece]]) -> Iterator[Piece]:
        """Hand out this rank's microbatches, and then as many more as the other ranks have.

        Args:
            begin: Begins to hand out microbatches, each with its rows.
            shown: Shows microbatches to whoever needs to know of them.

        Yields:
            Microbatches with their rows.

        Raises:
            WindowError: One of them had no backward.
        """
        for piece in shown(begin()):
            self.sharded.begin()
            yield piece
        while self.sharded.passes < self.sharded.planned:
            passes = self.sharded.passes
            with self._nothing():
                for piece in shown([self._filler(begin)]):
                    self.sharded.begin()
                    yield piece
            if self.sharded.passes == passes:
                raise WindowError(
                    "a microbatch of a fully sharded model had no backward, which the other ranks wait for: call "
                    "window.backward(loss) for every microbatch, with mb.Loss(sum=..., count=0) where nothing counts"
                )

    def silence(self, loss: object) -> tuple[list[Any], list[Tensor]]:
        """Say where the backward of a microbatch begins that counts for nothing, and yet communicates.

        Args:
            loss: What the loss function returned.

        Returns:
            Tensors, or nodes, and their gradients of zero; none where the model has not been called.

        Raises:
            LossError: It has, and there is nothing to run backward from.
        """
        found = _graphs(loss)
        if found:
            return list(found), [torch.zeros_like(each) for each in found]
        outputs = self.sharded.outputs
        if self.sharded.said and not outputs:
            raise LossError(
                "a microbatch that contributes nothing has no graph, and the other ranks wait for its backward through "
                "the fully sharded model: return mb.Loss(sum=..., count=0) for it"
            )
        return [node for node, _ in outputs], [zeros() for _, zeros in outputs]

    def keep_step(self, run: Callable[[Any], object]) -> None:
        """Make the passes that the other ranks wait for, in a window that has failed here.

        Args:
            run: Calls the loss function with a microbatch.

        Cost:
            The rest of the window's passes, or of one of its two rounds of them, with two rows.
        """
        sharded, failed = self.sharded, True
        while not self._between and self._few is not None and sharded.passes < sharded.planned:
            if failed:
                sharded.rejoin()
            else:
                sharded.begin()
            failed, sharded.silent = False, True
            for _, microbatch in feed([(0, self._few)], self._settings.device):
                self._pass(run, microbatch)

    def drop(self) -> None:
        """Leave nothing of a window that has failed."""
        if self.sharded.whole:
            let_go(self._settings.model)
        self.sharded.drop()

    def learn(self, peak_bytes: int | None) -> None:
        """Learn what a window took.

        Args:
            peak_bytes: Most bytes in use; `None` where nobody counted.
        """
        if peak_bytes is not None and not self.sharded.fast:
            self._memory.lean_bytes = max(peak_bytes, self._memory.lean_bytes or 0)

    def ran_out(self) -> bool:
        """Learn that memory ended.

        Returns:
            Whether there is another way to try, with microbatches as large as before.
        """
        given_up = self.sharded.fast and self._settings.sync == "auto" and self._settings.batch_norm != EXACT
        self._memory.too_fast = self._memory.too_fast or given_up
        return given_up

    def _may_be_fast(self, plan: Plan) -> tuple[bool, str]:
        """Say whether whole gradients may be kept on this rank, and why or why not."""
        settings, memory = self._settings, self._memory
        if settings.sync != "auto":
            return settings.sync == "fast", "it was asked for"
        if settings.batch_norm == EXACT:
            return True, 'batch_norm="exact" has one backward for all microbatches'
        if memory.too_fast:
            return False, "memory ended in a window that held whole gradients"
        dtype = narrowest(settings.model)
        if dtype is None or torch.promote_types(dtype, settings.accumulate_dtype) != dtype:
            return False, f"whole gradients would add up in {dtype}, as the model's MixedPrecisionPolicy says"
        room, whole = room_for(settings, plan.batch), unshared_bytes(settings.model)
        if room is None:
            return True, "nothing limits memory"
        if memory.lean_bytes is None:
            return False, "a first window measures what it takes"
        fits = memory.lean_bytes + whole <= _SAFE * room
        sizes = f"beside a peak of {format_bytes(memory.lean_bytes)} in {format_bytes(room)}"
        return fits, f"whole gradients, {format_bytes(whole)}, {'fit' if fits else 'do not fit'} {sizes}"

    def _say(self, why: str) -> None:
        memory, settings = self._memory, self._settings
        if settings.sync == "auto" and memory.sync != self.sync:
            memory.sync = self.sync
            settings.emit(SyncChosen(step=memory.windows, sync=self.sync, why=why))

    @contextmanager
    def _nothing(self) -> Generator[None]:
        """Let a pass leave nothing behind."""
        before = Snapshot(self._settings.model, self._settings.device)
        self._filling = self.sharded.silent = True
        with self.aside():
            yield
        # Not after an error, which puts back what was before the window.
        self._filling = self.sharded.silent = False
        before.restore()

    def _filler(self, begin: Callable[[], Iterable[Piece]]) -> Piece:
        """Return a microbatch of this rank's, or what it was lent."""
        if self._lent is None or self._lent is not self._few:
            return next(iter(begin()))
        return next(iter(feed([(rows_of(self._lent), self._lent)], self._settings.device)))

    def _pass(
        self, run: Callable[[Any], object], microbatch: Any, *, backward: Backward = torch.autograd.backward
    ) -> None:
        """Make a pass that counts for nothing."""
        if self._forward_only:
            with torch.no_grad():
                run(microbatch)
            self.sharded.went()
            return
        try:
            loss = run(microbatch)
        except Exception:
            # The loss function's own fault is none of the model's, whose forward has been.
            if not self.sharded.outputs:
                raise
            loss = None
        tensors, seeds = self.silence(loss)
        backward(tensors, seeds)
        self.sharded.went()


def _graphs(loss: object) -> Sequence[Tensor]:
    """List the tensors of a loss that have a graph."""
    if isinstance(loss, Mapping):
        return [each for part in loss.values() for each in _graphs(part)]
    value = loss.sum if isinstance(loss, Loss) else loss
    return [value] if isinstance(value, Tensor) and value.requires_grad else []
