"""A window's microbatches through the stages of a pipeline, with the loss function that a single device has."""

from __future__ import annotations

from collections.abc import Callable, Generator, Sequence
from contextlib import ExitStack, contextmanager, nullcontext
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_flatten, tree_map, tree_unflatten

from microbatch.batch.batch_tree import leaves, rows_of, slice_rows, take_rows
from microbatch.batch.prefetch import feed
from microbatch.batch.random_masks import derive
from microbatch.errors import BatchError, LossError
from microbatch.loss.loss import LossLike, Share, shares_of
from microbatch.loss.tally import Tally
from microbatch.ranks.pipeline import Pass, Pipeline
from microbatch.ranks.process_group import Ranks
from microbatch.ranks.stage_ranks import Stages
from microbatch.step.saved_state import RandomState, seed_everything

LossFn = Callable[[nn.Module, Any], LossLike]


@dataclass(frozen=True, slots=True)
class _Waiting:
    """A microbatch that the model is called for: its place in the window, its rows, and what the call is given."""

    index: int
    rows: int
    microbatch: Any
    call: Pass


class Piped:
    """Run a window's microbatches through a pipeline.

    ``loss_fn(model, microbatch)`` is called twice. First every rank calls it with a model that takes down its arguments
    and returns to nobody; these go to the first stage. Then the last stage calls it with one that returns what the
    stages made of them. Both begin from the same random state, the same on every rank of the pipeline.

    A schedule wants passes of equal shapes, and some want more of them than there are microbatches. So the last
    microbatch is filled up with rows whose output is cut off before the loss sees it, and what is missing are passes
    without a loss: both have a gradient of zero.

    Args:
        pipeline: This rank's stages.
        ranks: The data-parallel ranks; `None` if there is only this one.
        autocast: Precision of the forward passes, or `None`.

    Attributes:
        stages: Who has the other stages.
        first: What tells the batch's first row from others.
        rows: Of each microbatch.

    Source:
        Laws N1 to N9, R2.
    """

    def __init__(self, pipeline: Pipeline, *, ranks: Ranks | None, autocast: torch.dtype | None) -> None:
        self._pipeline = pipeline
        self._device = pipeline.device
        self._dtype = autocast
        self.stages = Stages(pipeline, ranks)
        self.first = 0
        self.rows: list[int] = []
        self._waiting: list[_Waiting] = []
        self._found: dict[int, list[Share]] = {}
        self._failure: Exception | None = None

    def line_up(self, batch: object, loss_fn: LossFn, *, size: int, seed: int) -> None:
        """Cut a batch, and take down what the model is called with for each microbatch.

        Args:
            batch: The whole of it, the same on every rank of the pipeline.
            loss_fn: As for `Accumulator.step`.
            size: Rows of a microbatch.
            seed: Of the window, likewise the same.

        Raises:
            LossError: The loss function does not call its model, or gives it what has a graph.
            BatchError: The model is called with other shapes for one microbatch than for another.
        """
        rows, device = rows_of(batch), self._device
        pieces = [(start, min(start + size, rows)) for start in range(0, rows, size)]
        self._loss_fn, self._seed, self._size = loss_fn, seed, size
        self._waiting, self._found = [], {}
        self.rows = [stop - start for start, stop in pieces]
        self.first = _told_by(slice_rows(batch, 0, 1, rows=rows)) if rows else 0
        cut = feed((slice_rows(batch, *piece, rows=rows) for piece in pieces), device)
        for index, (number, microbatch) in enumerate(zip(self.rows, cut, strict=True)):
            call = self._take_down(microbatch, index)
            if call is not None:
                self._waiting.append(_Waiting(index, number, microbatch, call))
        if not self._waiting:
            return
        like = self._waiting[0].call
        if self._waiting[0].rows < size:
            # Which of the arguments have rows, only a whole microbatch can tell.
            whole = take_rows(batch, [row % rows for row in range(size)], rows=rows)
            like = self._take_down(next(iter(feed([whole], device))), 0) or like
        self._waiting = [replace(each, call=_filled_up(each, size, like)) for each in self._waiting]

    def run(self, tally: Tally) -> None:
        """Run all passes, forward and backward.

        Args:
            tally: Tells what backward is divided by meanwhile.

        Raises:
            RankError: Another stage did not answer.
        """
        self._tally = tally
        self._go(self._loss, backward=True)

    def finish(self, tally: Tally) -> None:
        """Add the losses up, once all passes have been made.

        Args:
            tally: To which they are added.

        Raises:
            Exception: What the loss function raised; the passes went on without it, as other stages waited for them.
        """
        if self._failure is not None:
            raise self._failure
        for index, shares in sorted(self._found.items()):
            tally.add(shares, microbatch=index)

    @property
    def passes(self) -> int:
        """How many passes the schedule makes."""
        return self._pipeline.passes(len(self._waiting)) if self._waiting else 0

    def _go(self, loss: Callable[[Any, Tensor], Tensor], *, backward: bool) -> None:
        """Run all passes; the last stage calls ``loss`` with the output and the number of each."""
        if not self._waiting:
            return
        calls = [each.call for each in self._waiting]
        calls += [calls[0]] * (self.passes - len(calls))
        with ExitStack() as stack:
            for part in self._pipeline.parts:
                self._under_autocast(part, stack)
            self._pipeline.scheduled.run(self._pipeline, calls, loss_fn=loss, key=_key(calls), backward=backward)

    def _take_down(self, microbatch: Any, index: int) -> Pass | None:
        """Return what the model is called with; `None` for a microbatch that contributes nothing."""
        try:
            with self._seeded(index), self._autocast():
                returned = self._loss_fn(_Model(None), microbatch)
        except _Called as called:
            call = called.call
        else:
            if returned is None:
                return None
            raise LossError(
                "the loss function did not call its model; in a pipeline it calls model(...) exactly once, or returns "
                "None for a microbatch that contributes nothing"
            )
        if any(isinstance(each, Tensor) and each.requires_grad for each in _leaves(call)):
            raise LossError(
                "the loss function calls its model with a tensor that has a graph, and in a pipeline gradients go no "
                "further back than the first stage: move what is trained before it into that stage"
            )
        return call

    def _loss(self, output: Any, number: Tensor) -> Tensor:
        """Return where a pass's backward begins."""
        place = int(number)
        nothing = _nothing(output)
        if place >= len(self._waiting) or self._failure is not None:
            return nothing
        each = self._waiting[place]
        try:
            shares = shares_of(self._call(output, each), rows=each.rows)
            seeds = self._tally.seeds(shares) if shares else []
        except Exception as error:  # noqa: BLE001 - whatever it is, the other stages wait for these passes; see `finish`
            self._failure = error
            return nothing
        # With torch finding shapes out, the first one comes here twice. Copies: see `Tally.add`.
        self._found[each.index] = [replace(share, value=share.value.detach().clone()) for share in shares]
        return sum((share.value * seed for share, seed in zip(shares, seeds, strict=True)), start=nothing)

    def _call(self, output: Any, each: _Waiting) -> LossLike:
        model = _Model(_cut_off(output, each.rows, size=self._size))
        with self._seeded(each.index), self._autocast():
            loss = self._loss_fn(model, each.microbatch)
        if model.calls != 1:
            raise LossError(
                f"the loss function called its model {model.calls} times for one microbatch; a pipeline runs its "
                "stages once for each, so call model(...) once and use what it returns again"
            )
        return loss

    @contextmanager
    def _seeded(self, index: int) -> Generator[None]:
        """Draw a microbatch's random numbers, outside of the stages, from a state of their own."""
        before = RandomState(self._device)
        seed_everything(derive(self._seed, index))
        try:
            yield
        finally:
            before.restore()

    def _autocast(self) -> Any:
        dtype, kind = self._dtype, self._device.type
        # Without the cache, which would last as long as whatever is around it.
        return nullcontext() if dtype is None else torch.autocast(kind, dtype, cache_enabled=False)

    def _under_autocast(self, part: nn.Module, stack: ExitStack) -> None:
        """Run a stage's forward passes under autocast, and not the backward passes in between."""
        if self._dtype is None:
            return
        inside: list[Any] = []

        def enter(*_: object) -> None:
            inside.append(self._autocast())
            inside[-1].__enter__()

        def leave(*_: object) -> None:
            inside.pop().__exit__(None, None, None)

        stack.callback(part.register_forward_pre_hook(enter, prepend=True).remove)
        stack.callback(part.register_forward_hook(leave, always_call=True).remove)


class Scored(Piped):
    """Run a held-out batch's microbatches through a pipeline, forward only, for what a score makes of each.

    ``score(model, microbatch)`` keeps to what a loss function does.

    Args:
        pipeline: This rank's stages, in the mode that they are to be run in.
        autocast: Precision of the forward passes, or `None`.

    Attributes:
        failure: What the score has raised on the last stage, if anything; the passes go on, as other stages wait.
    """

    def __init__(self, pipeline: Pipeline, *, autocast: torch.dtype | None) -> None:
        super().__init__(pipeline, ranks=None, autocast=autocast)
        self._scores: dict[int, Any] = {}

    @property
    def failure(self) -> Exception | None:
        """What the score has raised so far."""
        return self._failure

    @torch.no_grad()
    def score(self, batch: object, score: Callable[[nn.Module, Any], Any], *, size: int) -> dict[int, Any]:
        """Run one batch.

        Args:
            batch: The whole of it, the same on every rank of the pipeline.
            score: Called on the last stage with a model that returns what the stages have made.
            size: Rows of a microbatch.

        Returns:
            What it returned by the number of the microbatch, on the last stage; elsewhere nothing.

        Raises:
            LossError: The score does not call its model.
            BatchError: The ranks of the pipeline were given different batches.
            RankError: Another stage did not answer.
        """
        self._scores = {}
        self.line_up(batch, score, size=size, seed=0)
        self.stages.attend(sum(self.rows), self.passes, first=self.first, parameters=0)
        self._go(self._take, backward=False)
        return self._scores

    def _take(self, output: Any, number: Tensor) -> Tensor:
        place = int(number)
        if place < len(self._waiting) and self._failure is None:
            each = self._waiting[place]
            try:
                self._scores[each.index] = self._call(output, each)
            except Exception as error:  # noqa: BLE001 - whatever it is, the other stages wait for these passes
                self._failure = error
        return torch.zeros((), device=self._device)


class _Called(BaseException):
    """Carries what the model was called with out of a loss function, past everything that it catches."""

    def __init__(self, call: Pass) -> None:
        super().__init__()
        self.call = call


class _Model(nn.Module):
    """Stands in for a model that is on several ranks: takes down what it is called with, or returns what they made."""

    def __init__(self, output: Any) -> None:
        super().__init__()
        self._output = output
        self.calls = 0

    def forward(self, *args: Any, **settings: Any) -> Any:
        self.calls += 1
        if self._output is None:
            raise _Called(Pass(args, settings))
        return self._output

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:
            raise AttributeError(
                f"in a pipeline the loss function's model can be called, and has no {name!r}: no rank has the whole of "
                "it; let the stages return what the loss needs"
            ) from None


def _filled_up(each: _Waiting, size: int, like: Pass) -> Pass:
    """Repeat rows of what a microbatch's call is given until it has as many as the others."""
    (found, form), (wanted, due) = tree_flatten((each.call.args, each.call.settings)), _flat(like)
    if form == due:
        found = [_repeated(x, each.rows, size=size, like=y) for x, y in zip(found, wanted, strict=True)]
    args, settings = tree_unflatten(found, form)
    call = Pass(args, settings)
    if _shapes(call) != _shapes(like):
        raise BatchError(
            f"microbatch {each.index} calls the model with {_shapes(call)}, and another one with {_shapes(like)}: the "
            "stages of a pipeline hand on equal shapes, so pad all rows to one length"
        )
    return call


def _repeated(x: Any, rows: int, *, size: int, like: Any) -> Any:
    has_rows = isinstance(x, Tensor) and isinstance(like, Tensor) and x.ndim and x.shape[0] == rows
    if not has_rows or x.shape == like.shape:
        return x
    return torch.cat([x, x[:1].expand(size - rows, *x.shape[1:])])


def _cut_off(output: Any, rows: int, *, size: int) -> Any:
    """Take the rows of a pass's output that are a microbatch's own."""

    def cut(x: Any) -> Any:
        if not isinstance(x, Tensor) or rows == size:
            return x
        if not x.ndim or x.shape[0] != size:
            raise LossError(
                f"the last stage returns a tensor of shape {tuple(x.shape)}, and a microbatch of {rows} rows was "
                f"filled up to {size}: without a row for each nobody can tell which part of it counts; return rows, or "
                "pass batches that divide by microbatch_size"
            )
        return x[:rows]

    return tree_map(cut, output)


def _nothing(output: Any) -> Tensor:
    """Return a loss of 0 whose gradient is 0, also where the output is infinite or NaN."""
    found = [each for each in tree_flatten(output)[0] if isinstance(each, Tensor) and each.requires_grad]
    nothing = torch.zeros((), device=found[0].device if found else None, requires_grad=True)
    return sum((each.flatten()[:0].sum() for each in found), start=nothing)


def _told_by(row: object) -> int:
    """Return a number below 2**16 that is another one for most other rows."""
    found = 0
    for leaf in (leaf for _, leaf in leaves(row) if isinstance(leaf, Tensor)):
        read = leaf.detach().flatten().view(torch.uint8).cpu().long()
        # A row that is longer by zeros is another one.
        found = (found * 31 + int((read * (torch.arange(len(read)) % 251 + 1)).sum()) + len(read)) % 65_521
    return found


def _key(calls: Sequence[Pass]) -> tuple[Any, ...]:
    """Say what the shapes that stages hand on can depend on, alike on every rank."""
    settled = [x for call in calls for x in _leaves(call) if isinstance(x, bool | int | str)]
    return len(calls), _shapes(calls[0]), settled


def _flat(call: Pass) -> tuple[list[Any], Any]:
    return tree_flatten((call.args, call.settings))


def _leaves(call: Pass) -> list[Any]:
    return _flat(call)[0]


def _shapes(call: Pass) -> Sequence[str]:
    """Say of what shapes a call's tensors are, and what its other arguments."""
    return [f"{tuple(x.shape)} {x.dtype}" if isinstance(x, Tensor) else type(x).__name__ for x in _leaves(call)]
