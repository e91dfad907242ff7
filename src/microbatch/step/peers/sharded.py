"""Fully sharded models: every rank makes the same number of passes, because each pass communicates."""

from __future__ import annotations

from collections.abc import Generator, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor

from microbatch.batch.batch_tree import rows_of
from microbatch.batch.prefetch import feed
from microbatch.errors import LossError, RankError, WindowError
from microbatch.gradients.clipping import scale_
from microbatch.loss.loss import Loss
from microbatch.memory.budget import format_bytes
from microbatch.memory.out_of_memory import is_out_of_memory, let_go_of_locals
from microbatch.ranks.agreement import Message, agree, attend
from microbatch.ranks.fsdp import narrowest, reshard, unshared_bytes
from microbatch.ranks.fsdp_passes import Sharded
from microbatch.ranks.lost_ranks import is_of_the_group
from microbatch.ranks.unsharded import hold_whole, let_go, scatter_whole
from microbatch.step.cutting import Cutting
from microbatch.step.events import SyncChosen
from microbatch.step.options import EXACT
from microbatch.step.part import Begin, OpenWindow, Pass, Run
from microbatch.step.peers.borrow_rows import borrow_rows, few_of
from microbatch.step.peers.data_parallel import DataParallel
from microbatch.step.record import Step
from microbatch.step.size.room import room_for

_SAFE = 0.9  # share of the memory that unsharded gradients may fill


class ShardedPeers(DataParallel):
    """Ranks that share the weights of a fully sharded model.

    The ranks agree beforehand on the largest number of passes. A rank with fewer microbatches makes filler passes with
    its own or borrowed rows. Fillers have a gradient of zero, and restore random state and buffers. A rank that fails
    makes its remaining passes with two rows, so that the collectives of the other ranks complete.

    Source:
        Laws N3, N4, R2, R6, R7.
    """

    passes_together = True
    _fsdp: Sharded

    def __init__(self) -> None:
        super().__init__()
        self._lean_bytes: int | None = None  # peak memory of windows that reduced after every microbatch
        self._too_fast = False  # whether memory ran out in a window that reduced once
        self._sync: str | None = None  # the last choice that was emitted to listeners
        self._few: Any = None
        self._borrowed: Any = None
        self._agreed = self._forward_only = self._between = self._ran = False

    def prepare(self, window: OpenWindow) -> None:
        """Free gathered weights, find the ranks, and reset the agreement."""
        reshard(window.options.model)
        super().prepare(window)
        assert self.ranks is not None  # noqa: S101 - a sharded model has several
        self._fsdp = Sharded(window.options.model, self.ranks)
        self._few = self._borrowed = None
        self._agreed = self._forward_only = self._between = self._ran = False
        self._chooses = window.options.ranks.sync == "auto" and window.options.batch_norm != EXACT

    def open(self, window: OpenWindow, stack: ExitStack) -> None:
        """Control the flags of the FSDP units until the step has been taken."""
        super().open(window, stack)
        window.outer.callback(self._fsdp.close)
        self._fsdp.open()

    # -- passes --------------------------------------------------------------------------------------------------------

    def agree_on(self, window: OpenWindow, cutting: Cutting, batch: object) -> None:
        """Agree on the number of passes and on when gradients are reduced; send rows to ranks without any."""
        ranks = self.ranks
        assert ranks is not None  # noqa: S101 - a sharded model has several
        if self._agreed:
            raise WindowError(
                "a window over a fully sharded model has one batch: the ranks have agreed on its microbatches; open "
                "another window"
            )
        fast, why = self._may_be_fast(window, batch)
        whole = attend(ranks, cutting.rows or cutting.microbatches, parameters=self.setup.room(window))
        numbers, fasts = zip(*ranks.share([cutting.microbatches, fast]), strict=True)
        self._agreed = True
        self._fsdp.expect(int(max(numbers)), fast=all(fasts))
        self._announce(window, why if all(fasts) or not fast else "another rank cannot hold unsharded gradients")
        if cutting.microbatches:
            self._few = few_of(batch)
        if whole and not all(numbers):
            self._borrowed = borrow_rows(ranks, batch, microbatches=numbers)
            self._few = self._borrowed if self._few is None else self._few
        window.denominator.share(whole)

    def passes(self, window: OpenWindow, begin: Begin, *, again: bool, graph: bool) -> Iterator[Pass]:
        """Yield this rank's passes, then filler passes until every rank has made as many."""
        fsdp = self._fsdp
        if window.coupled is not None:
            fsdp.start_over()
            self._forward_only, self._between = not graph, False
        yield from super().passes(window, begin, again=again, graph=graph)
        while fsdp.passes < fsdp.planned:
            made, p = fsdp.passes, Pass(*self._filler(window, begin), again=again, filler=True)
            if window.coupled is None:
                yield p
            else:
                window.go(p)
                self._dummy_pass(window, p.microbatch, run=window.run)
                window.go(None)
            if fsdp.passes == made:
                raise WindowError(
                    "a microbatch of a fully sharded model had no backward, which the other ranks wait for: call "
                    "window.backward(loss) for every microbatch, with mb.Loss(sum=..., count=0) where nothing counts"
                )

    @contextmanager
    def around(self, window: OpenWindow, p: Pass) -> Generator[None]:
        """Set the flags of a pass, and restore random state and buffers after a filler."""
        before = window.undo.snapshot.again() if p.filler else None
        self._ran, self._fsdp.silent = False, p.filler
        self._fsdp.begin()
        yield
        if window.coupled is not None and not p.filler and not self._ran:
            self._fsdp.went()
        self._fsdp.silent = False
        if before is not None:
            before.restore()

    def backward(self, window: OpenWindow, run: Run) -> Run:
        """Count the pass of every backward."""

        def counted(tensors: Sequence[Any], seeds: Sequence[Tensor]) -> None:
            if not self._agreed:
                raise WindowError(
                    "a fully sharded model needs the same number of passes on every rank: take the microbatches from "
                    "window.split(batch) or accumulator.windows(loader), which make the number equal"
                )
            self._fsdp.went_forward()
            run(tensors, seeds)
            if window.now is not None:
                self._fsdp.went()
                self._ran, self._fsdp.silent = True, window.now.filler

        return counted

    def silence(self, loss: object) -> tuple[list[Any], list[Tensor]]:
        """Return a loss or the model's outputs with zero gradients, so that collectives run and add nothing."""
        self._fsdp.silent = True
        found = _with_graph(loss)
        if found:
            return list(found), [torch.zeros_like(each) for each in found]
        outputs = self._fsdp.outputs
        if self._fsdp.said and not outputs:
            raise LossError(
                "a microbatch that contributes nothing has no graph, and the other ranks wait for its backward through "
                "the fully sharded model: return mb.Loss(sum=..., count=0) for it"
            )
        return [node for node, _ in outputs], [zeros() for _, zeros in outputs]

    def encoded(self, window: OpenWindow) -> None:
        """Gather the weights of the outermost FSDP units for the loss of all representations."""
        self._between = True
        self._fsdp.between()

    def hold(self, window: OpenWindow) -> Sequence[Any]:
        """Gather all weights for passes in lockstep, and return them."""
        self._between = self._fsdp.whole = True
        held = hold_whole(window.options.model)
        self._fsdp.went_forward()
        return held

    def scatter(self, window: OpenWindow) -> None:
        """Reduce-scatter the gradients of one backward of all passes."""
        self._fsdp.begin()
        scatter_whole(window.options.model)
        self._fsdp.went()

    # -- the end -------------------------------------------------------------------------------------------------------

    def check(self, window: OpenWindow) -> None:
        """Free gathered weights, so that the model has the parameters of its optimizer again."""
        super().check(window)
        reshard(window.options.model)

    def present(self, window: OpenWindow) -> list[bool]:
        """Return for each parameter whether this rank used it or has a gradient; a shard sums over all ranks."""
        held, pairs = self.held(), zip(window.gradients.named, super().present(window), strict=True)
        return [self._fsdp.used(each.parameter) if id(each.parameter) in held else has for each, has in pairs]

    def held(self) -> set[int]:
        """Return the ids of the parameters whose gradients the model reduces itself."""
        return self._fsdp.held

    def reduce(self, window: OpenWindow, agreed: Message, factor: float) -> None:
        """Divide the sharded gradients, and reduce the others."""
        gradients, held = window.gradients, self.held()
        gradients.leave_out(agreed.present)
        scale_([total for each, total in gradients.gradients() if id(each.parameter) in held], factor)
        super().reduce(window, agreed, factor)

    def done(self, window: OpenWindow, step: Step) -> None:
        """Store the peak memory of a window that reduced after every microbatch."""
        super().done(window, step)
        if step.peak_bytes is not None and not self._fsdp.fast:
            self._lean_bytes = max(step.peak_bytes, self._lean_bytes or 0)

    def figures(self, window: OpenWindow) -> dict[str, Any]:
        """Return the bytes that this rank sent, and when gradients were reduced."""
        return super().figures(window) | {"sync": self._sync_now}

    # -- failures ------------------------------------------------------------------------------------------------------

    def failed(self, window: OpenWindow, error: BaseException) -> None:
        """Run dummy passes after a failure, so that the other ranks' collectives complete."""
        if is_out_of_memory(error):
            let_go_of_locals(error, window.options.model)
        if not window.undo.waited_for:  # the ranks have not begun this window: nothing is gathered
            return
        ours = isinstance(error, Exception) and not isinstance(error, RankError) and not is_of_the_group(error)
        if self.waited(window) and ours:
            try:
                self._run_dummy_passes(window)
            except Exception:  # noqa: BLE001 - this rank's own error is the one to raise
                # The others wait inside a pass that this rank cannot make, and not for its message.
                self._waited = False
        if self._fsdp.whole:
            let_go(window.options.model)
        self._fsdp.drop()

    def relieve(self) -> bool:
        """Reduce after every microbatch from now on, and return whether that takes less memory than before."""
        given_up = self._fsdp.fast and self._chooses
        self._too_fast = self._too_fast or given_up
        return given_up

    def tell_failure(self, window: OpenWindow, *, again: bool) -> bool:
        """Notify the ranks that wait at the end of the window; all of them have to run the batch again."""
        assert self.ranks is not None  # noqa: S101 - a sharded model has several
        agree(self.ranks, None, parameters=self.setup.room(window), again=again)
        return again

    def state(self) -> dict[str, Any]:
        """Return the known memory use of both choices of ``sync``."""
        return {"lean_bytes": self._lean_bytes, "too_fast": self._too_fast}

    def load(self, state: Mapping[str, Any]) -> None:
        """Continue from the result of `state`."""
        self._lean_bytes, self._too_fast = state.get("lean_bytes"), state.get("too_fast", False)

    def _run_dummy_passes(self, window: OpenWindow) -> None:
        fsdp, first = self._fsdp, True
        while (
            window.function is not None and not self._between and self._few is not None and fsdp.passes < fsdp.planned
        ):
            if first:
                fsdp.rejoin()
            else:
                fsdp.begin()
            first, fsdp.silent = False, True
            for _, microbatch in feed([(0, self._few)], window.device):
                self._dummy_pass(window, microbatch, run=torch.autograd.backward)

    def _dummy_pass(self, window: OpenWindow, microbatch: Any, *, run: Run) -> None:
        """Run a pass that adds nothing to losses and gradients."""
        assert window.function is not None  # noqa: S101 - the callers have checked
        if self._forward_only:
            with torch.no_grad():
                window.function(window.model, microbatch)
            self._fsdp.went()
            return
        try:
            loss = window.function(window.model, microbatch)
        except Exception:
            # If the model's forward is complete, the other ranks need only the backward of its outputs.
            if not self._fsdp.outputs:
                raise
            loss = None
        made = self._fsdp.passes
        run(*self.silence(loss))
        if self._fsdp.passes == made:  # a plain backward, which `backward` does not count
            self._fsdp.went()

    def _filler(self, window: OpenWindow, begin: Begin) -> tuple[int | None, Any]:
        """Return a microbatch of this rank, or borrowed rows."""
        if self._borrowed is None or self._borrowed is not self._few:
            return next(iter(begin()))
        return next(iter(feed([(rows_of(self._borrowed), self._borrowed)], window.device)))

    @property
    def _sync_now(self) -> str:
        return "fast" if self._fsdp.fast else "lean"

    def _may_be_fast(self, window: OpenWindow, batch: object) -> tuple[bool, str]:
        """Return whether this rank may hold unsharded gradients, and the reason."""
        options = window.options
        if options.ranks.sync != "auto":
            return options.ranks.sync == "fast", "the user chose it"
        if options.batch_norm == EXACT:
            return True, 'batch_norm="exact" has one backward for all microbatches'
        if self._too_fast:
            return False, "memory ran out in a window that held unsharded gradients"
        dtype = narrowest(options.model)
        if dtype is None or torch.promote_types(dtype, options.sums.dtype) != dtype:
            return False, f"unsharded gradients would add up in {dtype}, the dtype of the model's MixedPrecisionPolicy"
        room, whole = room_for(options, batch), unshared_bytes(options.model)
        if room is None:
            return True, "nothing limits memory"
        if self._lean_bytes is None:
            return False, "the first window measures the memory"
        fits = self._lean_bytes + whole <= _SAFE * room
        sizes = f"beside a peak of {format_bytes(self._lean_bytes)} in {format_bytes(room)}"
        return fits, f"unsharded gradients, {format_bytes(whole)}, {'fit' if fits else 'do not fit'} {sizes}"

    def _announce(self, window: OpenWindow, why: str) -> None:
        if window.options.ranks.sync == "auto" and self._sync != self._sync_now:
            self._sync = self._sync_now
            window.options.emit(SyncChosen(step=window.setup.history.windows, sync=self._sync_now, why=why))


def _with_graph(loss: object) -> Sequence[Tensor]:
    """List the tensors of a loss that have a graph."""
    if isinstance(loss, Mapping):
        return [each for part in loss.values() for each in _with_graph(part)]
    value = loss.sum if isinstance(loss, Loss) else loss
    return [value] if isinstance(value, Tensor) and value.requires_grad else []
