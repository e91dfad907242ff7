"""One exact optimizer step from a batch of any size."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import nullcontext, suppress
from dataclasses import replace
from functools import partial
from typing import Any, cast

import torch
from torch import nn
from torch.optim import Optimizer

from microbatch.batch.cut import check_microbatch_size
from microbatch.batch.lengths import Lengths
from microbatch.errors import ConfigError, NonfiniteError
from microbatch.gradients.momentum_buffer import LinearState
from microbatch.loss.loss import LossLike
from microbatch.memory.budget import parse_bytes
from microbatch.memory.out_of_memory import explained, let_go
from microbatch.memory.recompute import named_blocks
from microbatch.memory.spill import Spill
from microbatch.step.auto_checkpoint import relieve
from microbatch.step.compiled import Compiled, Function
from microbatch.step.coupled_way import Ways
from microbatch.step.coupling import Encode
from microbatch.step.events import Listener
from microbatch.step.foresee import foresee, room_for
from microbatch.step.in_turns import InTurns
from microbatch.step.pace import Pace
from microbatch.step.program import Coupled, Plain
from microbatch.step.record import Step
from microbatch.step.recovery import Attempt
from microbatch.step.settings import EXACT, Counts, Memory, Settings
from microbatch.step.sizing import Sizing
from microbatch.step.suggest import suggestions
from microbatch.step.tune import Tuning
from microbatch.step.window import Window


class Accumulator:
    r"""Run an effective batch in microbatches and take one optimizer step with the large batch's gradient.

    The gradient is ``sum_i grad S_i / sum_i c_i``: every microbatch's summed loss over one denominator, whatever the
    cut, the tail, the masks or the rank. Gradients are zeroed, normalised, clipped and applied by the accumulator; the
    learning-rate scheduler stays the user's, once per step.

    Args:
        model: The module to train, on its device; or a `Pipeline` of this rank's stages of one that is split.
        optimizer: Optimizer over its parameters, or several of them.
        microbatch_size: Rows that go through the model at once; at least 1. Fewer do while memory is too small.
            ``"auto"`` takes the fastest that fits: the first steps, exact like all, are run at several sizes and timed.
        memory_budget: Bytes, or a text such as ``"6 GiB"``, that a window may use on the device; `None` for what the
            device really has, ``"none"`` for no limit. See ``docs/out-of-memory.md``.
        max_grad_norm: Clip the finished gradient to this Euclidean norm, once; `None` does not clip.
        autocast: ``torch.bfloat16`` or ``torch.float16`` to run forwards under autocast; `None` for the model's own
            precision.
        grad_scaler: Loss scaling for float16, with float32 parameters.
        accumulate_dtype: Precision in which gradients of narrower parameters add up; the optimizer still sees the
            parameters' own.
        nonfinite: ``"raise"`` stops at an infinite or NaN loss or gradient with everything put back; ``"skip"`` drops
            the window, keeps the weights and counts it.
        fuse: Add weight gradients inside the matrix product, where that is possible; see ``docs/fuse.md``.
        lengths: For ragged batches: rows of like length go together, trimmed to the longest of them. The name of the
            batch's mask or lengths, or a `Lengths`.
        offload: ``"activations"`` to move what autograd saves off the device until backward asks for it, in `step`; a
            `Spill` of your own to say where to; `None` to leave it there.
        checkpoint: Blocks whose activations are computed again in backward instead of kept: names of submodules,
            ``"all"`` for those that the model repeats, or ``"auto"`` for as few as let the microbatch fit, found in the
            first `step`; see ``docs/checkpoints.md``.
        look_again: With ``microbatch_size="auto"``, time the size and its neighbours once more where steps have become
            markedly faster or slower, at most three times in a run.
        coupled: How `step` encodes a batch whose loss couples samples: ``"twice"``, first without a graph; or once,
            with the graphs of all microbatches in memory (``"keep"``) or off the device (``"spill"``). ``"auto"`` keeps
            them where they fit, and else takes the faster of the others.
        batch_norm: What batch normalisation normalises by. ``"exact"``: the effective batch, gradient included, in
            `step`, which runs all microbatches in turns. ``"microbatch"``: each microbatch, as everyone has it; the
            default, `None`, does the same and warns. ``"pooled"``: each microbatch, and running statistics are moved
            once, by those of the whole batch. ``"frozen"``: the running statistics. See ``docs/batchnorm.md``.
        compile: Run ``step``'s loss functions (its encoders, with ``encode``) and the model in them through
            `torch.compile`; ``"reduce-overhead"``
            or another of its modes, to say how. Microbatches of other shapes than the first two run uncompiled.
        accumulate: How gradients of bfloat16 parameters add up with ``accumulate_dtype=torch.bfloat16``: ``"plain"``,
            as torch does; ``"compensated"``, in 3 bytes each; ``"stochastic"``, in 2, rounded at random. See
            ``docs/precision.md``.
        gradient_buffer: ``"none"`` to add gradients up inside the momentum of SGD or of Muon, without a buffer of their
            own; ``"own"`` for an ordinary buffer; a `LinearState` for an optimizer of your own; or one for each
            optimizer. See ``docs/precision.md``.
        dropout: ``"by_row"`` to draw dropout's masks by row of the effective batch, so that they do not depend on the
            cut; see ``docs/dropout.md``.
        deterministic: Give the same bits on any number of ranks, dropout included: microbatches of ``microbatch_size``
            rows are numbered through the effective batch, each has seeds of its own, and gradients add up in one
            binary tree over them. See ``docs/ranks.md``.
        process_group: Over whom counts and gradients add up: a process group, or a `DeviceMesh` of one dimension, with
            tensor- or context-parallel ranks, or the other stages of a `Pipeline`, beside it. `None` for all ranks, or
            for those that a fully sharded model is sharded over.
        sync: When the gradients of a fully sharded model meet: after every microbatch (``"lean"``), or once, with whole
            gradients in memory until then (``"fast"``). ``"auto"`` goes from the first to the second where a window has
            shown that there is room. See ``docs/sharded.md``.
        reduce_dtype: What narrow gradients of several ranks add up in: float32, or `None` for the parameter's own.
        overlap: Add the gradients of several ranks up while the last microbatch's backward still makes the rest of
            them, with memory for a copy of all gradients. See ``docs/ranks.md``.
        listeners: Callables that are given every event.

    Raises:
        ConfigError: An argument cannot work.

    Example:
        >>> model = torch.nn.Linear(1, 1, bias=False)
        >>> _ = torch.nn.init.ones_(model.weight)
        >>> accumulator = Accumulator(model, torch.optim.SGD(model.parameters(), lr=0.5), microbatch_size=2)
        >>> batch = torch.tensor([[1.0], [2.0], [3.0]])  # the gradient of mean(w x) is mean(x) = 2
        >>> step = accumulator.step(batch, lambda model, x: model(x).mean())
        >>> step.loss.item(), step.microbatches, model.weight.item()  # 1 - 0.5 * 2
        (2.0, 2, 0.0)

    Source:
        Laws N1 to N9, B1 to B6, P1 to P4.
    """

    def __init__(  # noqa: PLR0913 - each is one thing that a user may want to say, by name
        self,
        model: nn.Module,
        optimizer: Optimizer | Sequence[Optimizer],
        *,
        microbatch_size: int | str = "auto",
        memory_budget: int | str | None = None,
        max_grad_norm: float | None = None,
        autocast: torch.dtype | None = None,
        grad_scaler: torch.amp.GradScaler | None = None,
        accumulate_dtype: torch.dtype = torch.float32,
        nonfinite: str = "raise",
        fuse: bool = True,
        lengths: Lengths | str | None = None,
        offload: str | Spill | None = None,
        checkpoint: str | Sequence[str] | None = None,
        look_again: bool = False,
        coupled: str = "auto",
        batch_norm: str | None = None,
        compile: bool | str = False,  # noqa: A002 - torch's own name for it
        accumulate: str = "plain",
        gradient_buffer: str | LinearState | Sequence[str | LinearState] = "own",
        dropout: str | None = None,
        deterministic: bool = False,
        process_group: object = None,
        sync: str = "auto",
        reduce_dtype: torch.dtype | None = torch.float32,
        overlap: bool = False,
        listeners: Sequence[Listener] = (),
    ) -> None:
        self._settings = Settings(
            model=model,
            optimizers=_listed("optimizer", optimizer, Optimizer),
            microbatch_size=microbatch_size,
            memory_budget=memory_budget
            if memory_budget is None or memory_budget == "none"
            else parse_bytes(memory_budget),
            max_grad_norm=max_grad_norm,
            autocast=autocast,
            grad_scaler=grad_scaler,
            accumulate_dtype=accumulate_dtype,
            nonfinite=nonfinite,
            fuse=fuse,
            compile=compile,
            lengths=Lengths(of=lengths) if isinstance(lengths, str) else lengths,
            offload=offload,
            checkpoint=checkpoint,
            look_again=look_again,
            coupled=coupled,
            batch_norm=batch_norm,
            listeners=_listed("listeners", listeners, ()),
            accumulate=accumulate,
            gradient_buffer=_for_each(gradient_buffer, optimizer),
            dropout=dropout,
            deterministic=deterministic,
            process_group=process_group,
            sync=sync,
            reduce_dtype=reduce_dtype,
            overlap=overlap,
        )
        blocks = None if checkpoint == "auto" else named_blocks(self._settings.bare_model, checkpoint or ())
        self._memory = Memory(sizing=Sizing(asked=microbatch_size), checkpoint=blocks, ways=Ways(self._settings.way))
        self._memory.spilled = self._spilled
        if isinstance(offload, str) or (offload is None and batch_norm == EXACT):
            self._settings = replace(self._settings, offload=Spill(self._settings.bare_model))
        self._graphs: Spill | None = None
        spill = self._settings.spill
        self._in_turns = InTurns(self._settings, spill) if spill is not None and batch_norm == EXACT else None
        self._compiled = Compiled(compile if isinstance(compile, str) else None) if compile else None

    @property
    def settings(self) -> Settings:
        """What was asked for."""
        return self._settings

    @property
    def microbatch_size(self) -> int | None:
        """Rows that go through the model at once, now; `None` before ``"auto"`` has seen a batch."""
        sizing = self._memory.sizing
        return None if sizing.open else sizing.rows

    @property
    def skipped(self) -> int:
        """Windows dropped so far because their gradient was not finite."""
        return self._memory.skipped

    @property
    def eager(self) -> int:
        """Microbatches that ran uncompiled so far although ``compile=`` was asked for, because of their shapes."""
        return 0 if self._compiled is None else self._compiled.eager

    def step(
        self,
        batch: object,
        loss_fn: Callable[[nn.Module, Any], LossLike],
        *,
        counts: Counts | None = None,
        encode: Encode | None = None,
    ) -> Step:
        """Take exactly one optimizer step on a batch.

        Args:
            batch: This rank's share of the effective batch, usually on the host; what `cut` accepts.
            loss_fn: ``loss_fn(model, microbatch)`` returns the mean over the microbatch's samples (0-d), a `Loss`, a
                dict of either for several terms, or `None` for a microbatch that contributes nothing.
            counts: For several terms with counts of their own: ``counts(batch)`` returns the denominators of the
                whole batch, by term, or a dict of them.
            encode: For losses that couple samples: ``encode(model, microbatch)`` returns the representations of the
                microbatch's rows, tensors of shape ``(rows, ...)``, nested as one likes. Then ``loss_fn(model,
                representations)`` is given those of the whole batch, over all ranks. See ``docs/coupled.md``.

        Returns:
            The record of the step.

        Raises:
            BatchError: The batch cannot be cut, or is empty.
            ConfigError: ``encode`` and ``deterministic=True``.
            LossError: What ``loss_fn`` returned cannot be used.
            NonfiniteError: The loss or the gradient is infinite or NaN, and ``nonfinite="raise"``.
            OutOfMemoryError: Memory ran out even with a microbatch of one row, or where a smaller one cannot help.

        Cost:
            One forward and one backward a microbatch, without host synchronisation; one at the end. Where memory runs
            out, the window is run again with microbatches of half the size, and gives the same result. With ``encode``
            one forward more, unless the graphs are kept: see ``coupled``.
        """
        if encode is not None and self._settings.deterministic:
            raise ConfigError(
                "deterministic=True adds up what microbatches give one by one, and with encode= the loss is of the "
                "whole batch; leave one of them out"
            )
        if encode is None:
            in_turns, piped = self._in_turns is not None, self._settings.pipeline is not None
            plain = Plain(batch, loss_fn, call=self._call, in_turns=in_turns, piped=piped)
            return self._take_step(plain, counts)
        self._settings.refuse_coupled()
        coupled = Coupled(batch, loss_fn, encode=encode, settings=self._settings, memory=self._memory, call=self._call)
        return self._take_step(coupled, counts)

    def window(self, *, counts: Counts | None = None) -> Window:
        """Open a window for a hand-written loop.

        Args:
            counts: As for `step`; a function is given the batch that ``window.split`` cuts.

        Returns:
            A context manager; see `Window`.

        Raises:
            ConfigError: ``batch_norm="exact"``, or a `Pipeline`, which a hand-written loop cannot run.
        """
        self._refuse_loops()
        return Window(self._settings, self._memory, counts=counts)

    def windows(self, loader: Iterable[Any], *, microbatches: int, counts: Counts | None = None) -> Iterator[Window]:
        """Group a loader's microbatches into windows, the last one shorter if it does not divide.

        The step is taken when the inner loop over a window ends, so ``window.step`` can be read right after it.

        Args:
            loader: Yields microbatches.
            microbatches: Microbatches in a window; at least 1.
            counts: As for `step`; a function is given each microbatch, and its results are added up.

        Returns:
            An iterator over windows to iterate over, each followed by one optimizer step.

        Raises:
            ConfigError: ``microbatches`` is not a whole number of at least 1, or ``batch_norm="exact"`` or a
                `Pipeline`, which a hand-written loop cannot run, or ``deterministic=True``.

        Cost:
            Holds one window's microbatches on the host.

        Source:
            Laws B1, B2, N1.
        """
        self._refuse_loops()
        if self._settings.deterministic:
            raise ConfigError(
                "deterministic=True numbers the microbatches of a batch that it has cut itself: use "
                "accumulator.step(batch, loss_fn), or window.split(batch)"
            )
        try:
            check_microbatch_size(microbatches)
        except ConfigError:
            raise ConfigError(f"microbatches must be a whole number of at least 1, not {microbatches!r}") from None
        return self._windows(iter(loader), microbatches, counts)

    def fusion(self) -> Mapping[str, str]:
        """Say for each parameter whether the last window added its gradients inside the matrix product.

        Returns:
            ``"fused"``, or why not, by name; empty before the first step and without ``fuse=True``.
        """
        return self._memory.fusion()

    def suggestions(self) -> list[str]:
        """Say what would make the step cheaper and is the user's to change.

        Returns:
            Sentences; empty if there is nothing to say.
        """
        return suggestions(self._settings)

    def state_dict(self) -> dict[str, Any]:
        """Return what a resumed run needs to continue bit for bit; plain numbers.

        Returns:
            The number of windows and of skipped ones, the last count, and the microbatch size of now.
        """
        memory, tuning = self._memory, self._memory.tuning
        return {
            "windows": memory.windows,
            "skipped": memory.skipped,
            "count": memory.count,
            "seed": memory.first_seed(),
            "sizing": memory.sizing.state(),
            "ways": memory.ways.state(),
            "tuning": None if tuning is None else tuning.state(),
            "pace": None if memory.pace is None else memory.pace.state(),
            "checkpoint": None if memory.checkpoint is None else list(memory.checkpoint),
            "sharded": {"lean_bytes": memory.lean_bytes, "too_fast": memory.too_fast},
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Continue where `state_dict` was taken.

        Args:
            state: What it returned.

        Raises:
            ConfigError: A key is missing.
        """
        try:
            sizing = Sizing(asked=self._settings.microbatch_size).restored(state["sizing"])
            tuning = state.get("tuning") if sizing.asked == "auto" else None
            self._memory = Memory(
                sizing=sizing,
                tuning=None if tuning is None else Tuning.restored(tuning, sizing),
                clock=self._memory.clock,
                warned=self._memory.warned,
                spilled=self._spilled,
                ways=Ways(self._settings.way).restored(state.get("ways")),
                windows=state["windows"],
                skipped=state["skipped"],
                count=state["count"],
                pace=_pace(state.get("pace") if self._settings.look_again else None, sizing),
                checkpoint=self._blocks(state.get("checkpoint")),
                seed=state.get("seed"),
                **state.get("sharded", {}),
            )
        except KeyError as error:
            raise ConfigError(f"the accumulator's state has no {error}; it was not made by state_dict()") from None

    def _blocks(self, saved: Sequence[str] | None) -> tuple[str, ...] | None:
        """Take over what ``"auto"`` had chosen; what is asked for by name is asked for now."""
        if self._settings.checkpoint != "auto":
            return self._memory.checkpoint
        return None if saved is None else named_blocks(self._settings.bare_model, saved)

    def _take_step(self, program: Plain | Coupled, counts: Counts | None) -> Step:
        """Run a batch's window, as often as it takes."""
        found = self._memory.tuning
        if found is not None and found.unsure and not self._memory.open:
            foresee(self._settings, self._memory, batch=program.batch, loss_fn=program.alone)
        sizing, tuning = replace(self._memory.sizing), self._memory.tuning
        if self._memory.checkpoint is None and not self._memory.open:
            batch, loss_fn = program.batch, program.alone
            self._memory.checkpoint = relieve(self._settings, sizing, batch=batch, loss_fn=loss_fn)
        if sizing.open and not self._memory.open:
            foresee(self._settings, self._memory, batch=program.batch, loss_fn=program.alone)
        piped = self._settings.pipeline is not None
        # A pipeline's batch is run once: the stages that do not fail do not know by how much less would fit.
        window = self._window(counts, None if piped else Attempt(), program)
        try:
            while (failure := self._attempt(window, program.run)) is not None:
                # What it did has been put back; here, where no `except` block holds it, its tensors can be freed.
                let_go(failure, self._settings.device)
                window = self._start_over(window, counts, program)
        except NonfiniteError as error:
            coupling = window.coupling
            together = piped or (self._in_turns is not None and coupling is None)
            if error.microbatch is not None or window.ranks > 1 or together:
                raise
            found = self._locate(program, counts) if coupling is None else coupling.first_nonfinite()
            raise NonfiniteError(microbatch=found, parameter=error.parameter) from None
        except BaseException:
            # What no size helped, or what another fault ended, says nothing of the next batch.
            self._memory.sizing, self._memory.tuning = sizing, tuning
            if tuning is not None:
                tuning.sizing = sizing
            raise
        if isinstance(program, Coupled):
            program.learn(window)
        peak = window.step.peak_bytes
        if self._in_turns is not None and peak is not None:
            self._in_turns.learn(peak, room_for(self._settings, program.batch))
        return window.step

    def _attempt(self, window: Window, run: Callable[[Window], None]) -> Exception | None:
        """Run a window, and return the error if it ran out of memory and is to be run again, smaller."""
        try:
            with window:
                run(window)
        except Exception as error:
            ran_out = window.ran_out
            if ran_out is None or ran_out.stepped or self._settings.pipeline is not None:
                raise
            if ran_out.again is not None:
                return error
            smallest = "with a microbatch of 1 row, the smallest there is"
            limit = smallest if ran_out.largest == 1 else "where a smaller microbatch cannot help"
            if ran_out.coupled:
                limit = (
                    "in the loss over the whole batch's representations, where a smaller microbatch cannot help (the "
                    "losses of mb.losses never hold a whole similarity matrix)"
                )
            model, device = self._settings.model, self._settings.device
            raise explained(error, model=model, device=device, budget=ran_out.budget, limit=limit) from error
        return None

    def _start_over(self, window: Window, counts: Counts | None, program: Plain | Coupled) -> Window:
        """Make the window that runs the batch of another one again, in smaller microbatches."""
        ran_out = window.ran_out
        if ran_out is not None and ran_out.event is not None:
            self._settings.emit(ran_out.event)
        if ran_out is not None and ran_out.again is not None and ran_out.again.twice and window.coupling is not None:
            self._memory.ways.too_much(window.coupling.own)
        if self._compiled is not None:
            self._compiled.start_over()
        if self._in_turns is not None:
            self._in_turns.ran_out()
        return self._window(counts, None if ran_out is None else ran_out.again, program)

    def _window(self, counts: Counts | None, attempt: Attempt | None, program: Plain | Coupled) -> Window:
        run = partial(self._call, program.alone)
        return Window(self._settings, self._memory, counts=counts, attempt=attempt, in_turns=self._in_turns, run=run)

    def _call(self, function: Function, microbatch: Any, *, spill: bool = False) -> Any:
        model = self._settings.bare_model
        if spill and self._settings.spill is None:
            self._graphs = self._graphs or Spill(model)
        around = self._settings.spill or (self._graphs if spill else None) or nullcontext()
        with around:
            if self._compiled is None:
                return function(model, microbatch)
            return self._compiled(function, model, microbatch)

    def _spilled(self) -> int:
        return sum(each.bytes_spilled for each in (self._settings.spill, self._graphs) if each is not None)

    def _refuse_loops(self) -> None:
        if self._settings.pipeline is not None:
            raise ConfigError(
                "the microbatches of a Pipeline are run by its schedule, several at once, and a hand-written loop runs "
                "one after the other: use accumulator.step(batch, loss_fn), which takes the same batch"
            )
        if self._settings.batch_norm == EXACT:
            raise ConfigError(
                'batch_norm="exact" needs all microbatches of a batch at once, and a hand-written loop runs one after '
                "the other: use accumulator.step(batch, loss_fn), which takes the same batch"
            )

    def _windows(self, source: Iterator[Any], microbatches: int, counts: Counts | None) -> Iterator[Window]:
        while held := _take(source, microbatches):
            with Window(self._settings, self._memory, counts=counts, source=held) as window:
                del held
                yield window

    def _locate(self, program: Plain | Coupled, counts: Counts | None) -> int | None:
        """Run a window's microbatches again, with the same random state, until a gradient is not finite."""
        # The losses were finite, or the window would have told: only the gradients can.
        settings = replace(self._settings, listeners=[])
        now = self._memory
        memory = Memory(
            sizing=replace(now.sizing),
            count=now.count,
            checkpoint=now.checkpoint,
            windows=now.windows,
            seed=now.seed,
            aside=now.aside,
            warned=True,
        )
        found: int | None = None
        with suppress(_LeaveWithoutStep), Window(settings, memory, counts=counts) as window:
            for index, microbatch in enumerate(window.split(program.batch)):
                window.backward(program.alone(settings.bare_model, microbatch))
                if window.first_nonfinite() is not None:
                    found = index
                    break
            _leave_without_step()
        return found


class _LeaveWithoutStep(Exception):  # noqa: N818 - nothing is wrong: the only way out of a window without a step
    pass


def _leave_without_step() -> None:
    raise _LeaveWithoutStep


def _pace(state: Mapping[str, Any] | None, sizing: Sizing) -> Pace | None:
    return None if state is None else Pace.restored(state, Tuning.restored(state["tuning"], sizing))


def _listed(name: str, given: Any, kind: Any) -> list[Any]:
    """Make a list of one thing or several."""
    if isinstance(given, kind):
        return [given]
    if not isinstance(given, Iterable):
        raise ConfigError(f"{name} must be one or several of them in a list, not a {type(given).__name__}")
    return list(cast("Iterable[Any]", given))


def _for_each(
    given: str | LinearState | Sequence[str | LinearState], optimizer: Optimizer | Sequence[Optimizer]
) -> list[str | LinearState]:
    """Make one value for each optimizer of one for all of them."""
    if isinstance(given, str | LinearState):
        return [given] * len(_listed("optimizer", optimizer, Optimizer))
    return list(given)


def _take(source: Iterator[Any], microbatches: int) -> list[Any]:
    held: list[Any] = []
    for microbatch in source:
        held.append(microbatch)
        if len(held) == microbatches:
            break
    return held
