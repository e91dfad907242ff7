"""The window: from the first microbatch to the optimizer step, weights frozen, gradients growing."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Generator, Iterable, Iterator, Sequence
from contextlib import ExitStack, contextmanager, nullcontext
from dataclasses import replace
from types import TracebackType
from typing import Any, Self

import torch
from torch import Tensor
from torch.nn.parallel import DistributedDataParallel

from microbatch.batch.batch_tree import rows_of, slice_rows
from microbatch.batch.lengths import in_order
from microbatch.batch.prefetch import feed
from microbatch.errors import (
    EmptyBatchError,
    EmptyWindowError,
    RankAgainError,
    RankError,
    WindowClosedError,
    WindowError,
    WindowOpenError,
)
from microbatch.gradients.clipping import first_nonfinite
from microbatch.gradients.parameters import trainable
from microbatch.loss.loss import LossLike, Share, check_number, shares_of
from microbatch.loss.rank_stats import Across
from microbatch.loss.representations import own_part, stand_in
from microbatch.memory.out_of_memory import is_out_of_memory, let_go_of_locals
from microbatch.memory.recompute import checkpointed
from microbatch.memory.scratch import Scratch
from microbatch.ranks.agreement import agree
from microbatch.ranks.fsdp import reshard
from microbatch.ranks.gather_representations import Exchange
from microbatch.ranks.process_group import Ranks
from microbatch.step.alike import Alike, Plan
from microbatch.step.canonical import Canonical
from microbatch.step.close import Closing, close, get_ready
from microbatch.step.coupling import Coupling, Encode, Scheme
from microbatch.step.cutting import cut_up
from microbatch.step.denominators import Denominators
from microbatch.step.early import Early
from microbatch.step.events import MicrobatchDone, Retry, StepDone
from microbatch.step.force_eager import uncompiled
from microbatch.step.foresee import begin_tuning
from microbatch.step.fusing import fuse_for
from microbatch.step.in_turns import InTurns, Passed, Pieces, across_ranks
from microbatch.step.lookback import look_back
from microbatch.step.masking import Masking
from microbatch.step.norms import Norms
from microbatch.step.piped import Piped
from microbatch.step.record import Step
from microbatch.step.recovery import Attempt, Cut, RanOut, run_out
from microbatch.step.rounds import Rounds
from microbatch.step.saved_state import Snapshot, forget_unscaled
from microbatch.step.settings import Counts, Memory, Settings
from microbatch.step.sums import sums_for
from microbatch.step.tune import Stopwatch
from microbatch.step.watch import Watch


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
        attempt: Attempt | None = None,
        in_turns: InTurns | None = None,
        run: Callable[[Any], LossLike] | None = None,
    ) -> None:
        """Prepare a window; nothing happens before it is entered.

        Args:
            settings: The accumulator's.
            memory: The accumulator's.
            counts: Denominators of the loss's terms: a function of the whole batch, or its result.
            source: Microbatches to hand out, for windows over a loader.
            attempt: Which attempt this is, where whoever opens the window can run its batch again; `None` where not.
            in_turns: Runs all microbatches together, for exact batch statistics; `None` to run one after the other.
            run: Calls the loss function with a microbatch; `None` where a loop of the user's does.
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
        self._attempt = attempt
        self._cut: Cut | None = None
        self._coupling: Coupling | None = None
        self._in_turns = in_turns
        self._run = run
        self._passed: Passed | None = None
        self._alike: Alike | None = None
        self._piped: Piped | None = None
        self._early: Early | None = None
        self._talk: Across | Exchange | None = None  # where the other ranks wait before they come to the window's end
        self._stopwatch: Stopwatch | None = None
        self._stepping = self._stepped = False
        self.ran_out: RanOut | None = None

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
        earlier = self._attempt or Attempt()
        self._started = time.perf_counter() if earlier.started is None else earlier.started
        settings, device = self._settings, self._settings.device
        reshard(settings.model)
        self._ranks = settings.ranks
        self._alike = self._piped = None
        if self._ranks is not None and settings.is_sharded:
            self._alike = Alike(settings, self._memory, self._ranks)
        if settings.pipeline is not None:
            self._piped = Piped(settings.pipeline, ranks=self._ranks, autocast=settings.autocast)
        if not self._memory.shared and (self._ranks is not None or self._piped is not None):
            self._share()
        self._spilled = self._memory.spilled()
        self._named = trainable(settings.model, settings.optimizers)
        self._denominators = Denominators(
            self._counts,
            estimate=self._memory.count or None,
            ranks=self._ranks,
            parameters=len(self._named),
            known=earlier.declared,
        )
        self._snapshot = Snapshot(settings.model, device)
        seed, rank = self._memory.window_seed(), 0 if self._ranks is None else self._ranks.index
        self._gradients = sums_for(settings, seed=seed, aside=self._memory.aside.put, rank=rank)
        self._gradients.open(self._named)
        if self._ranks is not None and settings.overlap:
            narrow = settings.reduce_dtype is None
            self._early = Early(self._ranks, self._gradients, self._memory, narrow=narrow)
        self._masking = self._masking_for(seed, earlier) if settings.dropout else None
        self._canonical = self._canonical_for(seed) if settings.deterministic else None
        self._scratch = Scratch()
        # Where every microbatch's gradient is taken away, there is no sum to add to inside the product; a pipeline's
        # backward is its schedule's.
        fuse = settings.fuse and not settings.deterministic and self._piped is None
        self._fuse = fuse_for(
            self._named if fuse else [],
            self._gradients,
            scratch=self._scratch,
            keep=None if settings.spill is None else settings.spill.leave,
        )
        self._memory.open, self._state = True, "open"
        self._outer, self._inner = ExitStack(), ExitStack()
        try:
            if self._alike is not None:
                self._outer.callback(self._alike.sharded.close)
                self._alike.sharded.open()
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
        laps = None if self._stopwatch is None else self._stopwatch.laps
        told = look_back(self._settings, self._memory, watch=self._watch, cut=self._cut, step=self.step, laps=laps)
        for event in [StepDone(step=self.step), *told]:
            self._settings.emit(event)

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
    def coupling(self) -> Coupling | None:
        """How its batch was encoded, if it was."""
        return self._coupling

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
            WindowError: It has encoded a batch.
            BatchError: The batch cannot be cut.
            EmptyBatchError: It has no rows; over several ranks, one rank's share may be empty.
        """
        self._check_open("split")
        if self._coupling is not None:
            raise WindowError("a window that encodes its batch has no microbatches beside it; open another window")
        return self._hand_out(self._cut_up(batch))

    def encode(self, batch: object, encode: Encode, *, keep: bool = False) -> Any:
        """Encode this rank's share of the effective batch for a loss that couples samples.

        The loss of what this returns is given to `backward`, which pushes its gradient back through all microbatches:
        the gradient of the whole batch's loss, over all ranks. See ``docs/coupled.md``.

        Args:
            batch: What `cut` accepts, usually on the host.
            encode: ``encode(model, microbatch)`` returns the representations of the microbatch's rows: a tensor of
                shape ``(rows, ...)``, or nested dicts, lists and tuples of such. What is not floating point, such as
                labels, is passed on.
            keep: Keep the graphs of all microbatches until backward, instead of encoding twice.

        Returns:
            The representations of the whole batch over all ranks, in the order of its rows and of the ranks, in the
            structure that ``encode`` returned.

        Raises:
            WindowError: The window has had a batch already, or was given ``counts``.
            BatchError: The batch cannot be cut.
            EmptyBatchError: It has no rows; over several ranks, one rank's share may be empty.
            LossError: ``encode`` returned something else than representations of the rows.
            RankError: Another rank failed.

        Cost:
            A forward of every microbatch, without a graph unless ``keep``; `backward` runs another with one. Memory for
            the representations. Over several ranks, one small message and one all-gather of the representations.

        Example:
            >>> import microbatch as mb
            >>> model = torch.nn.Linear(1, 1, bias=False)
            >>> _ = torch.nn.init.ones_(model.weight)
            >>> accumulator = mb.Accumulator(model, torch.optim.SGD(model.parameters(), lr=0.5), microbatch_size=1)
            >>> with accumulator.window() as window:
            ...     z = window.encode(torch.tensor([[1.0], [3.0]]), lambda model, x: model(x))
            ...     window.backward(z.var())  # 2 w^2: no sum over rows
            >>> model.weight.item()  # 1 - 0.5 * 4
            -1.0

        Source:
            Laws C1 to C3.
        """
        self._check_open("encode in")
        self._settings.refuse_coupled()
        if self._coupling is not None or self._index:
            raise WindowError(
                "a window encodes one batch, and has no other loss than that batch's; open another window"
            )
        if self._canonical is not None:
            raise WindowError("deterministic=True adds up what microbatches give one by one; encode= is for the whole")
        if self._counts is not None:
            raise WindowError("counts= is not needed beside encode=: the loss of the whole batch says its denominators")
        settings, pieces = self._settings, self._cut_up(batch)
        keep = keep and not (self._attempt is not None and self._attempt.twice)
        keep, in_turns = keep or self._in_turns is not None, self._in_turns is not None
        scheme = Scheme(
            encode,
            settings.bare_model,
            settings.device,
            self._rounds(pieces, encode),
            keep,
            in_turns,
            lambda: self._watch.live_bytes,
            together=self._alike is not None,
        )
        if keep:
            self._fuse.keep_casts()
        self._coupling = Coupling(scheme, self._ranks)
        if self._in_turns is not None:
            self._passed = self._pass_together(pieces, encode, self._in_turns)
            self._talk = self._coupling.exchange
            values, rows = self._passed.values, self._passed.rows
            representations = self._coupling.take(values, rows, order=self._order)
            values.clear()
            return representations
        self._talk = self._coupling.exchange
        representations = self._coupling.encode(self._order, self._encoded)
        if self._alike is not None:  # where no rank has failed so far: it takes all of them
            self._alike.end_round()
        if self._masking is not None:
            self._masking.show_whole(self._coupling.rows)
        return representations

    def _rounds(
        self, pieces: Callable[[], Iterator[tuple[int, Any]]], encode: Encode
    ) -> Callable[[], Iterator[tuple[int, Any]]]:
        """Return what begins to hand out microbatches each time that they are encoded."""
        if self._alike is None:
            return lambda: iter(self._shown(pieces()))
        model = self._settings.bare_model

        def fill(microbatch: Any) -> Tensor:
            return stand_in(encode(model, microbatch))

        return Rounds(self._alike, pieces, self._shown, fill=fill, backward=self._run_backward)

    def _encoded(self, rows: int) -> None:
        self._norms.encoded()
        if self._stopwatch is not None:
            self._stopwatch.lap(rows)

    def _pass_together(
        self, begin: Callable[[], Iterator[tuple[int, Any]]], function: Callable[..., Any], in_turns: InTurns
    ) -> Passed:
        """Run all forward passes in turns."""
        self._talk = across = across_ranks(self._ranks)
        if self._alike is not None and self._settings.spill is not None:
            self._settings.spill.leave(self._alike.hold_whole())
            self._alike.sharded.went_forward()
        self._fuse.keep_casts()
        handed = list(begin())
        pieces = Pieces([each for _, each in handed], [rows for rows, _ in handed], self._gradients, across)
        return in_turns.run(function, pieces)

    def _cut_up(self, batch: object) -> Callable[[], Iterator[tuple[int, Any]]]:
        """Cut a batch, and return what begins to hand out its microbatches, each with its rows."""
        rows = self._rows_of(batch)
        self._expect([batch])
        if rows and self._memory.sizing.open:
            begin_tuning(self._settings, self._memory, rows=rows)
        if self._memory.tuning is not None:
            self._stopwatch = Stopwatch(self._memory.clock, self._settings.device)
        cutting = cut_up(batch, rows, settings=self._settings, sizing=self._memory.sizing)
        self._planned, self._order = self._index + cutting.microbatches, cutting.order
        if cutting.cut is not None:
            self._cut = cutting.cut
            self._watch.expect(cutting.cut.extent, batch)
        if self._masking is not None and cutting.pieces is not None:
            self._masking.cut(cutting.pieces)
        self._agree_on(Plan(cutting.microbatches, rows, batch))
        return cutting.begin

    def _rows_of(self, batch: object) -> int:
        rows = rows_of(batch)
        if rows == 0 and self._ranks is None:
            raise EmptyBatchError("the batch has 0 rows; skip empty batches before they reach the training step")
        return rows

    def _agree_on(self, plan: Plan) -> None:
        if self._alike is not None:
            self._denominators.share(self._alike.expect(plan, parameters=len(self._named)))

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
        source, device = self._source, self._settings.device
        sizes = [rows_of(microbatch) for microbatch in source]
        self._agree_on(Plan(len(source), sum(sizes), source[0]))

        def begin() -> Iterable[tuple[int, Any]]:
            pieces = zip(sizes, source, strict=True)
            return feed(((rows, slice_rows(batch, 0, rows, rows=rows)) for rows, batch in pieces), device)

        yield from self._hand_out(begin)
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
            WindowError: With ``overlap=True``, the last microbatch has been already.
            LossError: The loss cannot be used; the subclasses of it say why.
            GradientsTouchedError: Something else wrote to the gradients since the last backward.
            RankError: With ``overlap=True``, in the last microbatch: another rank failed.

        Cost:
            One backward; no host synchronisation and no communication between ranks, but for the last microbatch's with
            ``overlap=True``.
        """
        self._check_open("backward in")
        if self._coupling is not None:
            self._backward_coupled(loss, self._coupling, count=count)
            return
        if self._alike is not None:
            self._alike.check_agreed()
        if self._early is not None and self._early.begun:
            raise WindowError(
                "overlap=True reduces gradients in the backward of the last microbatch that window.split hands out, "
                "and this is one more: split one batch a window, or leave overlap= out"
            )
        rows = self._rows if count is None else check_number(count, "count")
        self._rows = None
        shares = shares_of(loss, rows=rows)
        self._denominators.need()
        if self._alike is None:
            self._backward([shares], first=self._index, rows=rows)
        elif not self._backward_alike(loss, shares, self._alike):
            return
        self._done(rows)

    def backward_together(self, batch: object, loss_fn: Callable[..., LossLike]) -> None:
        """Run all microbatches of a batch in turns, and one backward for all of them.

        Args:
            batch: As for `split`.
            loss_fn: Called with a model and a microbatch.
        """
        assert self._in_turns is not None  # noqa: S101 - whoever calls this has given it
        passed = self._pass_together(self._cut_up(batch), loss_fn, self._in_turns)
        if self._ranks is not None:
            self._denominators.share(passed.whole)
        parts = [shares_of(loss, rows=rows) for loss, rows in zip(passed.values, passed.rows, strict=True)]
        passed.values.clear()
        self._denominators.need()
        self._backward(parts, first=0, anchors=passed.anchors)
        self._end_together(passed)
        for rows in passed.rows:
            self._done(rows)

    def backward_by_schedule(self, batch: object, loss_fn: Callable[..., LossLike]) -> None:
        """Run all microbatches of a batch through the stages of a pipeline, forward and backward.

        Args:
            batch: As for `split`; the same on every rank of the pipeline.
            loss_fn: Called with a model and a microbatch.
        """
        assert self._piped is not None  # noqa: S101 - whoever calls this has a pipeline
        piped, parameters = self._piped, len(self._named)
        rows = self._rows_of(batch)
        piped.line_up(batch, loss_fn, size=self._memory.sizing.rows, seed=self._memory.window_seed())
        piped.stages.attend(rows, piped.passes, first=piped.first, parameters=parameters)
        self._expect([batch])
        self._denominators.share(float(rows))
        self._planned = len(piped.rows)
        self._gradients.check_untouched()
        # A stage that stops inside of a pass has nobody who would listen: the others wait for what it was to compute.
        self._awaited = False
        piped.run(self._denominators.tally)
        self._awaited = True
        piped.finish(self._denominators.tally)
        self._gradients.mark()
        for each in piped.rows:
            self._done(each)

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
        self._watch = Watch(settings, self._memory.watched, self._outer)
        self._watch.open()
        if self._piped is not None:
            self._watch.only_count()
        for optimizer in settings.optimizers:
            self._outer.callback(optimizer.register_step_pre_hook(self._guard).remove)
        if isinstance(settings.model, DistributedDataParallel):
            self._inner.enter_context(settings.model.no_sync())
        self._inner.enter_context(checkpointed(settings.bare_model, self._memory.checkpoint or ()))
        self._norms = Norms(settings, self._memory)
        if self._alike is not None:
            self._alike.aside = self._norms.aside
        self._norms.open(self._inner)  # under fuse, which keeps what is under it on in backward
        if self._masking is not None:
            # What is compiled would draw masks of its own. And what checkpoints run again, inside of backward, runs
            # under this mode only where another one, inside of it, has taken backward over: fused weights or not.
            if "torch._dynamo" in sys.modules:
                self._inner.enter_context(uncompiled())
            self._inner.enter_context(self._masking.mode)
        if self._fuse.useful or self._masking is not None:
            self._inner.callback(self._fuse.forget)
            self._inner.callback(self._scratch.forget)
            self._inner.enter_context(self._fuse)
        if settings.autocast is not None and self._piped is None:  # which has its own, around what is forward
            # Without the cache: it would last as long as the block, and what else runs inside it would share it.
            self._inner.enter_context(torch.autocast(device.type, settings.autocast, cache_enabled=False))

    def _share(self) -> None:
        """Give every rank what the first one begins with."""
        if self._piped is not None:  # whose ranks draw the same numbers, and have different weights
            self._piped.stages.warn_of_twins(self._settings.model)
            self._memory.seed = self._piped.stages.first_of(self._memory.first_seed())
        if self._ranks is not None and not isinstance(self._settings.model, DistributedDataParallel):
            self._ranks.broadcast_(self._settings.model)  # which the wrapper has done itself
        self._memory.shared = True

    def _guard(self, *_: object) -> None:
        if not self._stepping:
            raise WindowOpenError("optimizer.step() was called inside a window; leaving the window takes the step")
        self._stepped = True

    def _masking_for(self, seed: int, earlier: Attempt) -> Masking:
        return Masking(seed, ranks=self._ranks, parameters=len(self._named), known=earlier.masked)

    def _canonical_for(self, seed: int) -> Canonical:
        size = self._memory.sizing.rows
        device = self._settings.device
        return Canonical(seed, size=size, ranks=self._ranks, gradients=self._gradients, device=device)

    @property
    def _masked(self) -> tuple[int, int] | None:
        return None if self._masking is None else self._masking.known

    def _expect(self, batches: Sequence[Any]) -> None:
        self._denominators.expect(batches, begun=self._index > 0)
        if self._masking is not None:
            self._masking.expect(sum(rows_of(batch) for batch in batches), begun=self._index > 0)
        if self._canonical is not None:
            rows = sum(rows_of(batch) for batch in batches)
            begun = self._index > 0
            self._denominators.share(self._canonical.expect(rows, parameters=len(self._named), begun=begun))

    def _shown(self, pieces: Iterable[tuple[int, Any]]) -> Iterable[tuple[int, Any]]:
        pieces = pieces if self._canonical is None else self._canonical.shown(pieces)
        return pieces if self._masking is None else self._masking.shown(pieces)

    def _hand_out(self, begin: Callable[[], Iterable[tuple[int, Any]]]) -> Iterator[Any]:
        pieces = self._shown(begin()) if self._alike is None else self._alike.even(begin, self._shown)
        for rows, microbatch in pieces:
            self._check_open("take microbatches from")
            self._rows = rows
            yield microbatch
        self._rows = None

    def _backward(
        self,
        parts: Sequence[list[Share]],
        *,
        first: int | None,
        anchors: Sequence[Tensor] = (),
        rows: float | None = None,
    ) -> None:
        """Add losses to the tally, and their gradients to the sums.

        Args:
            parts: Of each microbatch.
            first: Which microbatch the first one is; `None` for the loss of all of them.
            anchors: Where backward has to begin as well, with a gradient of 0.
            rows: Of the microbatch, where it is one.
        """
        self._gradients.check_untouched()
        tally, scaler = self._denominators.tally, self._settings.grad_scaler
        tensors, seeds = list(anchors), [torch.zeros_like(each) for each in anchors]
        for index, shares in enumerate(parts):
            if shares:
                own = tally.seeds(shares)
                seeds += own if scaler is None else [scaler.scale(seed) for seed in own]
                tally.add(shares, microbatch=None if first is None else first + index)
                tensors += [share.value for share in shares]
        if tensors:
            self._begin_sums()
        if tensors and self._early is not None and self._index + 1 == self._planned:
            self._agree_early(self._early, rows or 0)
            self._early.watch()
        self._run_backward(tensors, seeds)

    def _agree_early(self, early: Early, rows: float) -> None:
        closing = self._closing(self._samples + rows)
        message = get_ready(closing)
        if message is not None:
            early.agree(message, closing.tally)

    def _backward_alike(self, loss: LossLike, shares: list[Share], alike: Alike) -> bool:
        """Run a backward that the other ranks run too, and return whether the microbatch was one of this rank's."""
        sharded = alike.sharded
        sharded.went_forward()
        if shares and not alike.filling:
            self._backward([shares], first=self._index)
            sharded.went()
            return True
        self._gradients.check_untouched()
        sharded.silent = True
        tensors, seeds = alike.silence(loss)
        if tensors:  # without any the model has not been called, and a pass is to be made yet
            self._run_backward(tensors, seeds)
            sharded.went()
        sharded.silent = alike.filling
        return not alike.filling

    def _backward_coupled(self, loss: LossLike, coupling: Coupling, *, count: float | None) -> None:
        """Run the backward of the whole batch's loss, and then that of every microbatch."""
        if not coupling.waiting:
            raise WindowError("the batch that this window encoded has had its loss; open another window")
        shares = shares_of(loss, rows=coupling.rows if count is None else check_number(count, "count"))
        # What passes through a sharded model is a part of all ranks' sums, also where nothing is this one's.
        taking_part = coupling.own or self._alike is not None
        shares = self._denominators.whole(shares, rows=coupling.rows) if taking_part else []
        shares = [own_part(share, own=coupling.own, whole=coupling.rows) for share in shares]
        if self._alike is not None:  # what the loss has called may be gathered for the first time
            self._alike.sharded.went_forward()
        self._backward([shares], first=None)
        gradients = coupling.gradients(shares)
        if self._alike is not None and self._passed is None:  # the others make passes now, and wait for this rank's
            self._alike.begin_round(graph=True)
        self._begin_sums()
        if self._passed is not None:
            self._push_together(coupling, gradients, self._passed)
        else:
            if self._stopwatch is not None:
                self._stopwatch.again()
            self._norms.encode_again()
            for rows, tensors, seeds in coupling.push(gradients):
                self._gradients.check_untouched()
                if self._alike is not None:
                    self._alike.sharded.went_forward()
                self._run_backward(tensors, seeds)
                self._done(rows)
        if coupling.exchange is not None:
            self._talk = coupling.exchange
            coupling.exchange.agree()

    def _begin_sums(self) -> None:
        # A loss of the whole batch is one over all ranks already.
        ranks = 1 if self._coupling is not None else self.ranks
        self._gradients.begin(self._denominators.tally.outlook(ranks=ranks))

    def _push_together(self, coupling: Coupling, gradients: Sequence[Tensor | None], passed: Passed) -> None:
        """Run one backward for all microbatches."""
        self._talk = passed.across
        passed.norm.look_away()
        tensors, seeds = passed.anchors, [torch.zeros_like(each) for each in passed.anchors]
        for _, own, given in coupling.push(gradients):
            tensors += own
            seeds += given
        self._gradients.check_untouched()
        self._run_backward(tensors, seeds)
        self._end_together(passed)
        for rows in passed.rows:
            self._done(rows)

    def _end_together(self, passed: Passed) -> None:
        """Come to the end of the one backward, and after it scatter what it has left of a sharded model's gradients."""
        passed.end()
        if self._alike is not None:
            self._alike.scatter_whole()
            self._gradients.mark(some=False)

    def _run_backward(self, tensors: list[Tensor], seeds: list[Tensor]) -> None:
        if not tensors:
            return
        # Backward runs in the dtypes that forward recorded; under autocast its fp32 products would be cast again.
        autocast = self._settings.autocast is not None
        with torch.autocast(self._settings.device.type, enabled=False) if autocast else nullcontext():
            self._fuse.run_backward(tensors, seeds)
        self._scratch.keep()
        # What a loop does to the gradients it does after every microbatch: all are watched after the first and
        # the last.
        self._gradients.mark(some=self._planned is not None and 0 < self._index < self._planned - 1)

    def _done(self, rows: float | None) -> None:
        self._samples += rows or 0
        self._largest = max(self._largest, rows or 0)
        if self._stopwatch is not None:
            self._stopwatch.lap(rows or 0)
        done = MicrobatchDone(step=self._memory.windows, index=self._index, microbatches=self._planned, rows=rows)
        self._index += 1
        self._norms.went(self._index)
        self._settings.emit(done)

    def _finish(self) -> None:
        self._inner.close()
        if self._coupling is not None and self._coupling.waiting:
            raise WindowError("the window encoded a batch, and was left without window.backward(loss) of it")
        self._gradients.check_untouched()
        if self._ranks is not None:
            self._gradients.begin(1.0)  # without one microbatch here, the first rank still brings what others add to
        if self._index == 0 and self._ranks is None:
            raise EmptyWindowError("the window was left without one backward, so there is nothing to learn from")
        self._norms.check()
        if self._canonical is not None:
            self._canonical.check()
        self._watch.only_count()
        if self._alike is not None:
            reshard(self._settings.model)
        if self._early is not None and not self._early.begun:
            self._agree_early(self._early, 0)
        closing = self._closing(self._samples)
        message = get_ready(closing) if self._early is None else self._early.message
        self._stepping, self._awaited = True, self._early is not None and self._early.waits
        end = close(closing, message)
        if end.applied:
            self._norms.finish()
        else:
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
            retries=0 if self._attempt is None else self._attempt.retries,
            applied=end.applied,
            seconds=time.perf_counter() - self._started,
            peak_bytes=self._watch.peak_bytes,
            spilled_bytes=self._memory.spilled() - self._spilled,
            comm_bytes=0 if self._ranks is None else self._ranks.sent_bytes,
            comm_calls=0 if self._ranks is None else self._ranks.calls,
            sync=None if self._alike is None else self._alike.sync,
        )
        if self._alike is not None:
            self._alike.learn(self._watch.peak_bytes)
        self._memory.count = end.count
        self._memory.windows += 1
        self._memory.fusion = self._fuse.report
        self._leave()

    def _closing(self, samples: float) -> Closing:
        return Closing(
            settings=self._settings,
            gradients=self._gradients,
            tally=self._denominators.tally,
            ranks=self._ranks,
            samples=samples,
            progress=self._memory.progress,
            canonical=self._canonical,
            flat=self._memory.flat,
            sharded=None if self._alike is None else self._alike.sharded,
            stages=None if self._piped is None else self._piped.stages,
            early=self._early,
        )

    @property
    def _waited_for(self) -> bool:
        """Whether the other ranks wait for what this one says of its window."""
        return self._awaited and not (self._early is not None and self._early.deaf)

    def _abort(self, error: BaseException) -> None:
        """Put back what was there before the window, and tell the other ranks, who would wait otherwise."""
        awaited = self._waited_for and isinstance(error, Exception) and not isinstance(error, RankError)
        if self._alike is not None:
            self._keep_step(self._alike, error, awaited=awaited)
        self._inner.close()
        self._leave()
        self._gradients.put_back()
        self._snapshot.restore()
        if self._settings.grad_scaler is not None:
            forget_unscaled(self._settings.grad_scaler, self._settings.optimizers)
        if is_out_of_memory(error):
            self._ran_out(error)
        elif self._attempt is not None and self._can_run_again(error):
            self._run_again(error, self._attempt)
        elif self._attempt is not None and self._attempt.retries:
            error.add_note(
                "microbatch: memory had run out in this window, so that it was being run again, in microbatches of "
                f"{self._memory.sizing.rows} rows"
            )
        # An agreement that has been reached, or that failed, is not waited for.
        if awaited and self._piped is not None:
            self._piped.stages.agree(None, parameters=len(self._named))
        elif self._ranks is not None and awaited:
            self._tell_failure(self._ranks, again=self.ran_out is not None and self.ran_out.again is not None)
        retried = self.ran_out is not None and self.ran_out.again is not None
        if self.ran_out is not None and self.ran_out.event is not None and not retried:
            self._settings.emit(self.ran_out.event)

    def _keep_step(self, alike: Alike, error: BaseException, *, awaited: bool) -> None:
        """Make the passes that the other ranks wait for, and leave nothing of them."""
        self._watch.only_count()
        if is_out_of_memory(error):
            let_go_of_locals(error, self._settings.model)
        if awaited and self._run is not None:
            alike.keep_step(self._run)
        alike.drop()

    def _tell_failure(self, ranks: Ranks, *, again: bool) -> None:
        if self._talk is not None and not self._talk.over:
            with self._nobody_left():
                self._talk.fail(again=again)
        elif self._alike is not None:
            with self._nobody_left():
                agree(ranks, None, parameters=len(self._named), again=again)
        elif self._early is not None and self._early.waits:
            if not self._early.fail(again=again) and self.ran_out is not None:
                self.ran_out = replace(self.ran_out, again=None)
        elif not again:  # where the same window is run again, the others wait for what comes of that
            agree(ranks, None, parameters=len(self._named))

    @contextmanager
    def _nobody_left(self) -> Generator[None]:
        """Do not run a batch again that another rank has given up; the others' errors say why."""
        try:
            yield
        except RankError:
            self.ran_out = None if self.ran_out is None else replace(self.ran_out, again=None)

    def _ran_out(self, error: BaseException) -> None:
        """Make the next cut smaller, if that is what can help, and say so."""
        coupling, known, earlier = self._coupling, self._denominators.known, self._attempt
        # Once the ranks have agreed, or the optimizer has begun, a smaller microbatch comes too late.
        late = self._stepped or (self._ranks is not None and not self._waited_for)
        late = late or (self._talk is not None and self._talk.over)
        # What another size would give would be other bits.
        late = late or self._canonical is not None
        # Nor where all have met for statistics, which another attempt would do once more, and wait to be told of more.
        late = late or (self._passed is not None and isinstance(self._talk, Exchange) and not self._talk.begun)
        kept = coupling is not None and coupling.keeps and not late
        kept = kept or (self._alike is not None and self._alike.ran_out() and not late)
        # The loss of all representations is as large, however they were made.
        waiting = coupling is not None and coupling.waiting
        twice = (kept and coupling is not None) or (earlier is not None and earlier.twice)
        again = None if earlier is None else Attempt(earlier.retries + 1, self._started, known, twice, self._masked)
        cut = None if late or waiting else self._cut
        event = run_out(self._memory, error, index=self._index, cut=cut, again=again, kept=kept)
        again = again if isinstance(event, Retry) else None
        largest = None if self._cut is None else self._cut.rows
        self.ran_out = RanOut(again, event, largest, self._watch.budget, self._stepped, waiting)

    def _can_run_again(self, error: BaseException) -> bool:
        kept_in_vain = self._coupling is not None and self._coupling.kept_in_vain(error)
        return kept_in_vain or isinstance(error, RankAgainError)

    def _run_again(self, error: BaseException, earlier: Attempt) -> None:
        """Go on with another attempt because another rank does, or because graphs cannot be kept."""
        twice = earlier.twice or not isinstance(error, RankAgainError)
        again = Attempt(earlier.retries + 1, self._started, earlier.declared, twice, self._masked)
        rows = 0 if self._cut is None else self._cut.rows
        event = Retry(step=self._memory.windows, index=self._index, before=rows, after=rows, error=str(error))
        self.ran_out = RanOut(again, event, None, None, stepped=False)

    def _leave(self) -> None:
        self._outer.close()
        self._state, self._memory.open = "closed", False
        self._source = None

    def _check_open(self, verb: str) -> None:
        if self._state != "open":
            when = "before it was entered" if self._state == "new" else "after it was closed"
            raise WindowClosedError(f"cannot {verb} a window {when}; use it inside its `with` block or its loop")
