"""The window: from the first microbatch to the optimizer step, weights frozen, gradients growing."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from functools import partial
from types import TracebackType
from typing import Any, Self

import torch
from torch import Tensor
from torch.nn.parallel import DistributedDataParallel

from microbatch.batch.feed import feed, is_there
from microbatch.batch.lengths import Lengths, cut_by_length, in_order, take_piece
from microbatch.batch.tree import rows_of, slice_rows
from microbatch.errors import (
    ConfigError,
    EmptyBatchError,
    EmptyWindowError,
    MissingCountError,
    RankError,
    WindowClosedError,
    WindowError,
    WindowOpenError,
)
from microbatch.gradients.add import GradientSum, trainable
from microbatch.gradients.finish import first_nonfinite
from microbatch.gradients.fuse import Fuse
from microbatch.loss.heads import cross_entropy
from microbatch.loss.loss import Count, LossLike, check_number, shares_of
from microbatch.loss.tally import Tally
from microbatch.memory.meter import MemoryMeter
from microbatch.memory.scratch import Scratch
from microbatch.ranks.agree import Message, agree
from microbatch.ranks.group import Ranks
from microbatch.step.close import Closing, close
from microbatch.step.events import MicrobatchDone, StepDone
from microbatch.step.record import Step
from microbatch.step.replay import Snapshot
from microbatch.step.settings import Counts, Memory, Settings


class Window:
    """One window of a hand-written loop; entering it opens it, leaving it takes the optimizer step.

    Made by `Accumulator.window` and `Accumulator.windows`. An exception inside the block leaves gradients, random
    state and buffers as they were before it, and takes no step.

    Example:
        >>> import microbatch as mb
        >>> model = torch.nn.Linear(2, 1, bias=False)
        >>> accumulator = mb.Accumulator(model, torch.optim.SGD(model.parameters(), lr=0.1), microbatch_size=2)
        >>> with accumulator.window() as window:
        ...     for microbatch in window.split({"x": torch.ones(5, 2)}):
        ...         window.backward(model(microbatch["x"]).mean())
        >>> window.step.microbatches, window.step.samples
        (3, 5)

    Source:
        Laws B1 to B6.
    """

    def __init__(
        self,
        settings: Settings,
        memory: Memory,
        *,
        counts: Counts | None = None,
        source: Sequence[Any] | None = None,
    ) -> None:
        """Prepare a window; nothing happens before it is entered.

        Args:
            settings: The accumulator's.
            memory: The accumulator's.
            counts: Denominators of the loss's terms: a function of the whole batch, or its result.
            source: Microbatches to hand out, for windows over a loader.
        """
        self._settings = settings
        self._memory = memory
        self._counts = counts
        self._source = source
        self._state = "new"
        self._step: Step | None = None
        self._rows: int | float | None = None
        self._index = 0
        self._samples: int | float = 0
        self._largest: int | float = 0
        self._ranks: Ranks | None = None
        self._awaited = True  # whether the other ranks wait for this one's word
        self._order: list[Tensor] | None = None
        self._planned: int | None = None if source is None else len(source)

    # -- opening and closing ------------------------------------------------------------------------------------------

    def __enter__(self) -> Self:
        """Open the window: set gradients aside, remember what might have to be put back.

        Returns:
            The window itself.

        Raises:
            WindowOpenError: Another window of this accumulator is open.
            WindowClosedError: This window was used before.
        """
        if self._state != "new":
            raise WindowClosedError("a window is used once; ask the accumulator for another one")
        if self._memory.open:
            raise WindowOpenError("another window of this accumulator is open; leave it before opening the next one")
        self._started = time.perf_counter()
        settings, device = self._settings, self._settings.device
        self._ranks = Ranks.find(device)
        if self._ranks is not None and not self._memory.shared:
            if not isinstance(settings.model, DistributedDataParallel):  # which has done so itself
                self._ranks.broadcast_(settings.model)
            self._memory.shared = True
        self._tally = Tally(estimate=self._memory.count or 1.0)
        self._named = trainable(settings.model, settings.optimizers)
        self._snapshot = Snapshot(settings.model, device)
        self._gradients = GradientSum(settings.accumulate_dtype)
        self._gradients.open(self._named)
        self._scratch = Scratch()
        place = self._scratch.places(final=lambda: self._fuse.final)
        self._fuse = Fuse(
            self._named if settings.fuse else [],
            self._gradients,
            stand_ins={torch.nn.functional.cross_entropy: partial(cross_entropy, place=place)},
            empty=self._scratch.empty,
        )
        self._memory.open, self._state = True, "open"
        self._outer, self._inner = ExitStack(), ExitStack()
        try:
            self._enter_contexts(device)
            if self._source is not None:
                self._expect(self._source)
        except BaseException as error:
            self._abort(error)
            raise
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        """Close the window: take the step, or put everything back if the block raised.

        Args:
            kind: Type of the exception that left the block, if any.
            error: The exception.
            traceback: Where it was raised.

        Raises:
            EmptyWindowError: Nothing contributed.
            NonfiniteError: The loss or the gradient is infinite or NaN, and ``nonfinite="raise"``.
            CountError: The counts do not add up to what was declared.
            GradientsTouchedError: Something else wrote to the gradients.
            RankError: Another rank failed.
        """
        if self._state != "open":
            return
        if error is not None:
            self._abort(error)
            return
        try:
            self._finish()
        except BaseException as failure:
            self._abort(failure)
            raise
        self._settings.emit(StepDone(step=self.step))

    @property
    def step(self) -> Step:
        """The record of the step that leaving the window took.

        Raises:
            WindowClosedError: The window was left without a step, or not left yet.
        """
        if self._step is None:
            raise WindowClosedError("there is no step yet: the window's record exists once its block has been left")
        return self._step

    @property
    def ranks(self) -> int:
        """Ranks that take part in the window; 1 for a single process."""
        return 1 if self._ranks is None else self._ranks.size

    # -- inside -------------------------------------------------------------------------------------------------------

    def split(self, batch: object) -> Iterator[Any]:
        """Cut this rank's share of the effective batch and hand out its microbatches, each on the model's device.

        Args:
            batch: What `cut` accepts, usually on the host.

        Returns:
            An iterator over microbatches of ``microbatch_size`` rows, the last one shorter if it does not divide.

        Raises:
            WindowClosedError: The window is not open.
            ConfigError: ``microbatch_size`` is ``"auto"``.
            BatchError: The batch cannot be cut.
            EmptyBatchError: It has no rows; over several ranks, one rank's share may be empty.
        """
        self._check_open("split")
        size = self._settings.microbatch_size
        if not isinstance(size, int):
            raise ConfigError(
                'microbatch_size="auto" needs a plan, which this version cannot make yet; pass microbatch_size= as the '
                "number of rows that go through the model at once, for example 8"
            )
        rows = rows_of(batch)
        if rows == 0 and self._ranks is None:
            raise EmptyBatchError("the batch has 0 rows; skip empty batches before they reach the training step")
        self._expect([batch])
        if self._settings.lengths is not None and rows:
            return self._split_by_length(batch, size, lengths=self._settings.lengths)
        self._planned = self._index + -(-rows // size)
        pieces = (range(start, min(start + size, rows)) for start in range(0, rows, size))
        cut = ((len(p), slice_rows(batch, p.start, p.stop, rows=rows)) for p in pieces)
        return self._hand_out(cut if is_there(batch, self._settings.device) else feed(cut, self._settings.device))

    def in_order(self, results: Sequence[Tensor]) -> Tensor:
        """Put what microbatches returned for each row into the order of the batch that `split` was given.

        Args:
            results: One tensor of shape ``(rows, ...)`` for each microbatch, in the order they were handed out.

        Returns:
            Shape ``(rows of the batch, ...)``.
        """
        return torch.cat(list(results)) if self._order is None else in_order(results, self._order)

    def __iter__(self) -> Iterator[Any]:
        """Hand out the microbatches that the loader gave; taking the last one's successor takes the step.

        Yields:
            Microbatches on the model's device.

        Raises:
            WindowError: The window has no loader behind it.
        """
        if self._source is None:
            raise WindowError("this window has no loader behind it; iterate over window.split(batch)")
        self._check_open("iterate over")
        sizes = [rows_of(microbatch) for microbatch in self._source]
        pieces = zip(sizes, self._source, strict=True)
        whole = ((rows, slice_rows(batch, 0, rows, rows=rows)) for rows, batch in pieces)
        yield from self._hand_out(feed(whole, self._settings.device))
        if self._state == "open":
            self.__exit__(None, None, None)

    def backward(self, loss: LossLike, *, count: float | None = None) -> None:
        """Run one microbatch's backward and add its gradients to the window's.

        Args:
            loss: A 0-d tensor (the mean over the microbatch's samples), a `Loss`, a dict of either, or `None` for a
                microbatch that contributes nothing.
            count: Samples in the microbatch; needed for a plain mean over a microbatch that this window did not hand
                out.

        Raises:
            WindowClosedError: The window is not open.
            LossError: The loss cannot be used; the subclasses of it say why.
            GradientsTouchedError: Something else wrote to the gradients since the last backward.

        Cost:
            One backward; no host synchronisation and no communication between ranks.
        """
        self._check_open("backward in")
        rows = self._rows if count is None else check_number(count, "count")
        self._rows = None
        shares = shares_of(loss, rows=rows)
        self._gradients.check_untouched()
        if self._counts is not None and self._tally.declared is None:
            self._declare_without_batch(self._counts)
        if shares:
            seeds = self._tally.seeds(shares)
            if (scaler := self._settings.grad_scaler) is not None:
                seeds = [scaler.scale(seed) for seed in seeds]
            self._tally.add(shares, microbatch=self._index)
            self._backward([share.value for share in shares], seeds)
            self._scratch.keep()
            # What a loop does to the gradients it does after every microbatch: all are watched after the first and
            # the last.
            self._gradients.mark(some=self._planned is not None and 0 < self._index < self._planned - 1)
        self._samples += rows or 0
        self._largest = max(self._largest, rows or 0)
        done = MicrobatchDone(step=self._memory.windows, index=self._index, microbatches=self._planned, rows=rows)
        self._index += 1
        self._settings.emit(done)

    def first_nonfinite(self) -> str | None:
        """Name the first parameter whose gradient is infinite or NaN so far.

        Returns:
            Its name, or `None`.

        Cost:
            Reads the gradients back to the host: for finding a fault, not for every step.
        """
        return first_nonfinite(self._gradients.gradients())

    # -- how ----------------------------------------------------------------------------------------------------------

    def _enter_contexts(self, device: torch.device) -> None:
        settings = self._settings
        if device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(device)
            if settings.memory_budget is not None:
                self._outer.callback(_limit_cuda(device, settings.memory_budget))
        self._meter: MemoryMeter | None = None
        if settings.memory_budget is not None and device.type != "cuda":
            self._meter = MemoryMeter(budget=settings.memory_budget)
            self._meter.track(settings.model, *settings.optimizers)
            self._outer.enter_context(self._meter)
        self._stepping = False
        for optimizer in settings.optimizers:
            self._outer.callback(optimizer.register_step_pre_hook(self._guard).remove)
        if isinstance(settings.model, DistributedDataParallel):
            self._inner.enter_context(settings.model.no_sync())
        if self._fuse.useful:
            self._inner.callback(self._fuse.forget)
            self._inner.callback(self._scratch.forget)
            self._inner.enter_context(self._fuse)
        if settings.autocast is not None:
            # Without the cache: it would last as long as the block, and what else runs inside it would share it.
            self._inner.enter_context(torch.autocast(device.type, settings.autocast, cache_enabled=False))

    def _guard(self, *_: object) -> None:
        if not self._stepping:
            raise WindowOpenError("optimizer.step() was called inside a window; leaving the window takes the step")

    def _expect(self, batches: Sequence[Any]) -> None:
        """Learn the denominators that the first backward needs to know, where they can be known."""
        rows = float(sum(rows_of(batch) for batch in batches))
        if self._counts is None:
            self._tally.rows = int(rows)
            self._tally.estimate = self._memory.count or rows
            return
        if self._index:
            raise WindowError("counts= needs the whole batch before the first backward; call window.split once, first")
        self._declare(self._counts, batches, rows=rows)

    def _declare(self, counts_of: Counts, batches: Sequence[Any], *, rows: float) -> None:
        """Take the denominators from ``counts=``, over all ranks."""
        counts = _declared(counts_of, batches)
        if self._ranks is not None:
            message = Message(
                names=list(counts),
                sums=[0.0] * len(counts),
                counts=list(counts.values()),
                samples=rows,
                double=False,
                present=[False] * len(self._named),
            )
            agreed = agree(self._ranks, message, parameters=len(self._named))
            rows, counts = agreed.samples, dict(zip(agreed.names, agreed.counts, strict=True))
        self._tally = Tally(estimate=rows, declared=counts)
        self._tally.rows = int(rows)

    def _declare_without_batch(self, counts: Counts) -> None:
        if callable(counts) or self._ranks is not None:
            raise MissingCountError(
                "counts= is evaluated on the whole batch, on all ranks together, before the first backward; let "
                "window.split(batch) cut it"
            )
        self._declare(counts, [], rows=0.0)

    def _split_by_length(self, batch: object, size: int, *, lengths: Lengths) -> Iterator[Any]:
        pieces = cut_by_length(batch, size, lengths=lengths)
        self._order = [piece.rows for piece in pieces]
        self._planned = self._index + len(pieces)
        cut = ((len(piece.rows), take_piece(batch, piece, lengths=lengths)) for piece in pieces)
        return self._hand_out(feed(cut, self._settings.device))

    def _hand_out(self, pieces: Iterable[tuple[int, Any]]) -> Iterator[Any]:
        for rows, microbatch in pieces:
            self._check_open("take microbatches from")
            self._rows = rows
            yield microbatch
        self._rows = None

    def _backward(self, losses: list[Tensor], seeds: list[Tensor]) -> None:
        if self._settings.autocast is None:
            self._fuse.run_backward(losses, seeds)
            return
        # Backward runs in the dtypes that forward recorded; under autocast its fp32 products would be cast again.
        with torch.autocast(self._settings.device.type, enabled=False):
            self._fuse.run_backward(losses, seeds)

    def _finish(self) -> None:
        self._inner.close()
        self._gradients.check_untouched()
        if self._index == 0 and self._ranks is None:
            raise EmptyWindowError("the window was left without one backward, so there is nothing to learn from")
        closing = Closing(self._settings, self._gradients, self._tally, self._ranks, self._samples)
        self._stepping, self._awaited = True, False
        end = close(closing)
        if not end.applied:
            self._snapshot.restore_buffers()
            self._memory.skipped += 1
        self._step = Step(
            index=self._memory.windows,
            loss=end.loss,
            terms=end.terms,
            grad_norm=end.grad_norm,
            count=end.count,
            counts=end.counts,
            samples=end.samples,
            microbatches=self._index,
            microbatch_size=int(self._largest) if float(self._largest).is_integer() else self._largest,
            fused=self._fuse.fused,
            retries=0,
            applied=end.applied,
            seconds=time.perf_counter() - self._started,
            peak_bytes=self._peak_bytes(),
        )
        self._memory.count = end.count
        self._memory.windows += 1
        self._memory.fusion = self._fuse.report
        self._leave()

    def _abort(self, error: BaseException) -> None:
        """Put back what was there before the window, and tell the other ranks, who would wait otherwise."""
        self._inner.close()
        self._leave()
        self._gradients.put_back()
        self._snapshot.restore()
        # An agreement that has been reached, or that failed, is not waited for.
        awaited = self._awaited and isinstance(error, Exception) and not isinstance(error, RankError)
        if self._ranks is not None and awaited:
            agree(self._ranks, None, parameters=len(self._named))

    def _leave(self) -> None:
        self._outer.close()
        self._state, self._memory.open = "closed", False
        self._source = None

    def _peak_bytes(self) -> int | None:
        device = self._settings.device
        if device.type == "cuda":
            return torch.cuda.max_memory_allocated(device)
        return None if self._meter is None else self._meter.peak_bytes

    def _check_open(self, verb: str) -> None:
        if self._state != "open":
            when = "before it was entered" if self._state == "new" else "after it was closed"
            raise WindowClosedError(f"cannot {verb} a window {when}; use it inside its `with` block or its loop")


def _declared(counts: Counts, batches: Sequence[Any]) -> dict[str, float]:
    """Evaluate ``counts`` over a window's batches and add up, by term."""
    found = [counts(batch) for batch in batches] if callable(counts) else [counts]
    total: dict[str, float] = {}
    for each in found:
        if not isinstance(each, Mapping):
            raise MissingCountError(f"counts= must give a dict of term to count, not a {type(each).__name__}")
        for name, count in each.items():
            total[str(name)] = total.get(str(name), 0.0) + _number(count, str(name))
    return total


def _number(count: Count, name: str) -> float:
    return check_number(count.item() if isinstance(count, Tensor) else count, f"the count of {name!r}")


def _limit_cuda(device: torch.device, budget: int) -> Callable[[], None]:
    total = torch.cuda.get_device_properties(device).total_memory
    torch.cuda.set_per_process_memory_fraction(min(1.0, budget / total), device)
    return lambda: torch.cuda.set_per_process_memory_fraction(1.0, device)
