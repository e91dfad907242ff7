"""Run the microbatches of a batch through the stages of a pipeline, with a loss function for a single device."""

from __future__ import annotations

from collections.abc import Callable, Generator, Sequence
from contextlib import ExitStack, contextmanager, nullcontext
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_flatten, tree_map, tree_unflatten

from microbatch.batch.batch_tree import leaves, rows_of, slice_rows, take_rows
from microbatch.batch.copies import Copies
from microbatch.batch.prefetch import feed
from microbatch.batch.random_masks import derive
from microbatch.errors import BatchError, LossError
from microbatch.loss.loss import LossLike, Share, shares_of
from microbatch.ranks.pipeline import Pass as StagePass
from microbatch.ranks.pipeline import Pipeline
from microbatch.ranks.stage_ranks import Stages
from microbatch.step.denominator import Denominator
from microbatch.step.saved_state import RandomState, seed_everything

LossFn = Callable[[nn.Module, Any], LossLike]


@dataclass(frozen=True, slots=True)
class _Waiting:
    """A microbatch for the schedule: its index in the window, its rows, and the arguments of the model call."""

    index: int
    rows: int
    microbatch: Any
    call: StagePass


class StageRun:
    """Run the microbatches of one batch through the stages of a pipeline.

    ``loss_fn(model, microbatch)`` is called twice. First every rank calls it with a model that records its arguments
    and raises; the first stage gets these arguments. Then the last stage calls it with a model that returns the output
    of the stages. Both calls start from the same random state on every rank of the pipeline.

    A schedule needs passes of equal shapes, and some schedules need more passes than there are microbatches. So the
    last microbatch is padded with rows, whose outputs are removed before the loss. Missing passes get a loss of zero.
    Both have a gradient of zero.

    Args:
        pipeline: This rank's stages.
        autocast: Dtype for autocast in forward passes, or `None`.

    Attributes:
        first: Checksum of the batch's first row.
        rows: Rows of each microbatch.

    Source:
        Laws N1 to N9, R2.
    """

    def __init__(self, pipeline: Pipeline, *, autocast: torch.dtype | None) -> None:
        self._pipeline = pipeline
        self._device = pipeline.device
        self._dtype = autocast
        self.first = 0
        self.rows: list[int] = []
        self._waiting: list[_Waiting] = []
        self._found: dict[int, list[Share]] = {}
        self._failure: Exception | None = None

    def line_up(self, batch: object, loss_fn: LossFn, *, size: int, seed: int) -> None:
        """Cut a batch, and record the arguments of the model call for each microbatch."""
        rows, device = rows_of(batch), self._device
        pieces = [(start, min(start + size, rows)) for start in range(0, rows, size)]
        self._loss_fn, self._seed, self._size = loss_fn, seed, size
        self._waiting, self._found = [], {}
        self.rows = [stop - start for start, stop in pieces]
        self.first = _checksum_of(slice_rows(batch, 0, 1, rows=rows)) if rows else 0
        cut = feed((slice_rows(batch, *piece, rows=rows, copy_on=device) for piece in pieces), device)
        for index, (number, microbatch) in enumerate(zip(self.rows, cut, strict=True)):
            # The loss function runs twice, and may edit its microbatch in place.
            call = self._record_call(Copies(device)(microbatch), index)
            if call is not None:
                self._waiting.append(_Waiting(index, number, microbatch, call))
        if not self._waiting:
            return
        like = self._waiting[0].call
        if self._waiting[0].rows < size:
            # Only a full microbatch shows which arguments have rows.
            whole = take_rows(batch, [row % rows for row in range(size)], rows=rows)
            like = self._record_call(next(iter(feed([whole], device))), 0) or like
        self._waiting = [replace(each, call=_padded(each, size, like)) for each in self._waiting]

    def run(self, denominator: Denominator) -> None:
        """Run all passes, forward and backward, with the denominator's seeds."""
        self._denominator = denominator
        self._run_passes(self._loss, backward=True)

    def count(self, denominator: Denominator) -> None:
        """Add the losses to the denominator, after all passes; raise the loss function's error, if there was one."""
        if self._failure is not None:
            raise self._failure
        for index, shares in sorted(self._found.items()):
            denominator.add(shares, index)

    @property
    def passes(self) -> int:
        """Number of passes of the schedule."""
        return self._pipeline.passes(len(self._waiting)) if self._waiting else 0

    def _run_passes(self, loss: Callable[[Any, Tensor], Tensor], *, backward: bool) -> None:
        """Run all passes; the last stage calls ``loss`` with the output and the index of each."""
        if not self._waiting:
            return
        calls = [each.call for each in self._waiting]
        calls += [calls[0]] * (self.passes - len(calls))
        with ExitStack() as stack:
            for part in self._pipeline.parts:
                self._under_autocast(part, stack)
            self._pipeline.scheduled.run(self._pipeline, calls, loss_fn=loss, key=_key(calls), backward=backward)

    def _record_call(self, microbatch: Any, index: int) -> StagePass | None:
        """Return the arguments of the model call; `None` for a microbatch that contributes nothing."""
        try:
            with self._seeded(index), self._autocast():
                returned = self._loss_fn(_Model(None), microbatch)
        except _ModelCalled as called:
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
                "the loss function calls its model with a tensor that has a graph, and in a pipeline gradients stop at "
                "the first stage: move the trained modules that compute this tensor into the first stage"
            )
        return call

    def _loss(self, output: Any, number: Tensor) -> Tensor:
        """Return the root of a pass's backward."""
        place = int(number)
        nothing = _zero_loss(output)
        if place >= len(self._waiting) or self._failure is not None:
            return nothing
        each = self._waiting[place]
        try:
            shares = shares_of(self._call(output, each), rows=each.rows)
            seeds = self._denominator.seeds(shares) if shares else []
        except Exception as error:  # noqa: BLE001 - the other stages wait for these passes; `count` raises the error
            self._failure = error
            return nothing
        # The first pass comes here twice when torch infers shapes. For the copies, see `Denominator.add`.
        self._found[each.index] = [replace(share, value=share.value.detach().clone()) for share in shares]
        return sum((share.value * seed for share, seed in zip(shares, seeds, strict=True)), start=nothing)

    def _call(self, output: Any, each: _Waiting) -> LossLike:
        model = _Model(_unpadded(output, each.rows, size=self._size))
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
        """Seed a microbatch's random numbers outside the stages, and restore the random state."""
        before = RandomState(self._device)
        seed_everything(derive(self._seed, index))
        try:
            yield
        finally:
            before.restore()

    def _autocast(self) -> Any:
        dtype, kind = self._dtype, self._device.type
        # Without the weight cache, which would live as long as an outer autocast block.
        return nullcontext() if dtype is None else torch.autocast(kind, dtype, cache_enabled=False)

    def _under_autocast(self, part: nn.Module, stack: ExitStack) -> None:
        """Run a stage's forward passes under autocast, but not the backward passes between them."""
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


class Scored(StageRun):
    """Run the microbatches of a held-out batch through a pipeline, forward only, and score each.

    ``score(model, microbatch)`` follows the rules for a loss function, but may return any value.

    Args:
        pipeline: This rank's stages, in training or evaluation mode.
        autocast: Dtype for autocast in forward passes, or `None`.
    """

    def __init__(self, pipeline: Pipeline, *, autocast: torch.dtype | None) -> None:
        super().__init__(pipeline, autocast=autocast)
        self._stages = Stages(pipeline, None)
        self._scores: dict[int, Any] = {}

    @property
    def failure(self) -> Exception | None:
        """The first error of the score on the last stage; the passes continue, because other stages wait."""
        return self._failure

    @torch.no_grad()
    def score(self, batch: object, score: Callable[[nn.Module, Any], Any], *, size: int) -> dict[int, Any]:
        """Score one batch, the same on every rank; return the scores by microbatch, empty but on the last stage."""
        self._scores = {}
        self.line_up(batch, score, size=size, seed=0)
        self._stages.attend(sum(self.rows), self.passes, first=self.first, parameters=0)
        self._run_passes(self._take, backward=False)
        return self._scores

    def _take(self, output: Any, number: Tensor) -> Tensor:
        place = int(number)
        if place < len(self._waiting) and self._failure is None:
            each = self._waiting[place]
            try:
                self._scores[each.index] = self._call(output, each)
            except Exception as error:  # noqa: BLE001 - the other stages wait for these passes
                self._failure = error
        return torch.zeros((), device=self._device)


class _ModelCalled(BaseException):
    """Carries the arguments of the model call out of a loss function, past its own ``except Exception``."""

    def __init__(self, call: StagePass) -> None:
        super().__init__()
        self.call = call


class _Model(nn.Module):
    """Stands in for a model on several ranks: records the arguments of its call, or returns the stages' output."""

    def __init__(self, output: Any) -> None:
        super().__init__()
        self._output = output
        self.calls = 0

    def forward(self, *args: Any, **settings: Any) -> Any:
        self.calls += 1
        if self._output is None:
            raise _ModelCalled(StagePass(args, settings))
        return self._output

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:
            raise AttributeError(
                f"in a pipeline the loss function's model can only be called, and has no {name!r}, because no rank has "
                "the whole model. Make the stages return what the loss needs"
            ) from None


def _padded(each: _Waiting, size: int, like: StagePass) -> StagePass:
    """Pad the arguments of a microbatch's call with repeated rows, up to the size of the others."""
    (found, form), (wanted, due) = tree_flatten((each.call.args, each.call.settings)), _flat(like)
    if form == due:
        found = [_repeated(x, each.rows, size=size, like=y) for x, y in zip(found, wanted, strict=True)]
    args, settings = tree_unflatten(found, form)
    call = StagePass(args, settings)
    if _shapes(call) != _shapes(like):
        raise BatchError(
            f"microbatch {each.index} calls the model with {_shapes(call)}, and another one with {_shapes(like)}: the "
            "stages of a pipeline pass on equal shapes, so pad all rows to one length"
        )
    return call


def _repeated(x: Any, rows: int, *, size: int, like: Any) -> Any:
    has_rows = isinstance(x, Tensor) and isinstance(like, Tensor) and x.ndim and x.shape[0] == rows
    if not has_rows or x.shape == like.shape:
        return x
    return torch.cat([x, x[:1].expand(size - rows, *x.shape[1:])])


def _unpadded(output: Any, rows: int, *, size: int) -> Any:
    """Remove the padded rows from a pass's output."""

    def cut(x: Any) -> Any:
        if not isinstance(x, Tensor) or rows == size:
            return x
        if not x.ndim or x.shape[0] != size:
            raise LossError(
                f"the last stage returns a tensor of shape {tuple(x.shape)}, and a microbatch of {rows} rows was "
                f"filled up to {size}, so the padded rows cannot be removed from it. Return one row for each sample, "
                "or pass batches whose rows are a multiple of microbatch_size"
            )
        return x[:rows]

    return tree_map(cut, output)


def _zero_loss(output: Any) -> Tensor:
    """Return a loss of 0 whose gradient is 0, even if the output is infinite or NaN."""
    found = [each for each in tree_flatten(output)[0] if isinstance(each, Tensor) and each.requires_grad]
    nothing = torch.zeros((), device=found[0].device if found else None, requires_grad=True)
    return sum((each.flatten()[:0].sum() for each in found), start=nothing)


def _checksum_of(row: object) -> int:
    """Return a checksum of a row, below 2**16."""
    found = 0
    for leaf in (leaf for _, leaf in leaves(row) if isinstance(leaf, Tensor)):
        read = leaf.detach().flatten().view(torch.uint8).cpu().long()
        # The length is added, so that a row with more zeros at its end has another checksum.
        found = (found * 31 + int((read * (torch.arange(len(read)) % 251 + 1)).sum()) + len(read)) % 65_521
    return found


def _key(calls: Sequence[StagePass]) -> tuple[Any, ...]:
    """Return a key for the shapes that stages pass on, the same on every rank."""
    settled = [x for call in calls for x in _leaves(call) if isinstance(x, bool | int | str)]
    return len(calls), _shapes(calls[0]), settled


def _flat(call: StagePass) -> tuple[list[Any], Any]:
    return tree_flatten((call.args, call.settings))


def _leaves(call: StagePass) -> list[Any]:
    return _flat(call)[0]


def _shapes(call: StagePass) -> Sequence[str]:
    """Return the shape and dtype of each tensor of a call, and the type of each other argument."""
    return [f"{tuple(x.shape)} {x.dtype}" if isinstance(x, Tensor) else type(x).__name__ for x in _leaves(call)]
