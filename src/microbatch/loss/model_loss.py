"""Use the loss that a model computes itself, with the count that the loss is a mean over."""

from __future__ import annotations

import inspect
import random
import sys
from collections.abc import Callable, Generator
from contextlib import contextmanager
from typing import Any, TypeAlias

import torch
from torch import Tensor, nn

from microbatch.arguments import attribute
from microbatch.devices.backend import is_recording, random_state
from microbatch.errors import LossError
from microbatch.kind_words import kind_of
from microbatch.loss.asked_rows import ROWS_ASKED, Ranges, different_rows, is_wider, joined, ranges_of, widened
from microbatch.loss.counted_labels import (
    CHOICES,
    NAMES,
    ROWS,
    CountOf,
    Fields,
    count_in,
    fields_of,
    is_fake,
    rows_in,
    take,
)
from microbatch.loss.find_count import Found, confirm_count, find_count
from microbatch.loss.loss import Loss
from microbatch.loss.router_loss import check_router_loss, router_loss_of

_DOUBLE = 1e-12  # rounding errors below it are those of float64
_IN_DOUBLE, _ON_CPU, _ON_DEVICE = 1e-5, 1e-4, 5e-3  # relative errors of losses; devices may multiply in TF32
_KEPT = 8  # most rows of a microbatch that are compared with those of a later one

Ask: TypeAlias = Callable[[Any, Fields, Tensor | None], tuple[Tensor, Any]]
"""Runs a model on a microbatch, with ``num_items_in_batch`` or `None`; returns the loss and the output, if known."""


def from_model(count: CountOf = "auto") -> ModelLoss:
    """Create a loss function for models that compute their loss themselves, such as those of Transformers.

    The microbatch must be a dict. The model is called with it, and its output has the loss, usually a mean over
    labels. The mean times its count is the sum that a window needs.

    Args:
        count: What the loss is a mean over. ``"labels"``: the labels that are not -100. ``"next_labels"``: those
            without the first of each row, as a causal language model counts them. ``"rows"``: the rows. A function
            ``count(microbatch)`` returns another count. ``"auto"`` asks the model at the first microbatch: see
            ``docs/losses.md``.

    Returns:
        A loss function for `Accumulator.step` and `Accumulator.gradient`.

    Raises:
        LossError: ``count`` is none of these.

    Cost:
        ``"auto"`` runs about thirty forward passes of at most three rows. For models that ignore
        ``num_items_in_batch``, it does so again at microbatches 2, 4, 8 and so on, and where a label or a mask has a
        value that is new. For these models, each microbatch reads its count from the device.

    Example:
        >>> from types import SimpleNamespace
        >>> class Model(torch.nn.Linear):
        ...     def forward(self, x, labels):
        ...         logits = super().forward(x)
        ...         return SimpleNamespace(loss=torch.nn.functional.cross_entropy(logits, labels))
        >>> batch = {"x": torch.eye(4), "labels": torch.tensor([0, 1, -100, 1])}
        >>> loss = from_model("labels")(Model(4, 2), batch)
        >>> int(loss.count)
        3
    """
    return ModelLoss(_call, count, takes_items=_takes_items)


class ModelLoss:
    """A loss function that asks a model for its loss, and finds out once what that loss is a mean over.

    Args:
        ask: Runs the model.
        count: As for `from_model`.
        takes_items: Returns whether a model may be given ``num_items_in_batch``.
        ignores: Whether the loss is known to ignore labels of -100.

    Attributes:
        found: What the loss is a mean over; `None` before ``"auto"`` has found out.

    Raises:
        LossError: ``count`` is neither a known name nor a function.
    """

    def __init__(
        self,
        ask: Ask,
        count: CountOf,
        *,
        takes_items: Callable[[Any], bool],
        ignores: bool = False,
    ) -> None:
        if not callable(count) and count not in {*NAMES, "auto"}:
            raise LossError(f"count must not be {count!r}; {CHOICES}")
        self._ask, self._takes_items, self._ignores = ask, takes_items, ignores
        self._count = None if count == "auto" else count
        self.found: Found | None = None
        self._seen, self._scale = 0, 1.0
        self._shown: Ranges = {}
        self._kept: Fields | None = None  # rows of the first microbatch

    def __call__(self, model: nn.Module, microbatch: object) -> Loss | None:
        """Return the sum and the count of a microbatch's loss.

        Args:
            model: The model.
            microbatch: A dict, with which the model is called.

        Returns:
            A `Loss`; `None` for a microbatch without targets.

        Raises:
            LossError: What the loss is a mean over could not be found out.
        """
        batch = fields_of(microbatch)
        if is_fake(batch):
            return self._loss(model, batch, ROWS, takes_items=False)
        if self._count is not None:
            return self._loss(model, batch, self._count, takes_items=False)
        if self.found is None:
            self.find(model, batch)
        elif not (self.found.takes_items or _is_recorded() or _is_sharded(model)) and self.is_due(batch):
            self.confirm(model, batch)  # never of a head that takes its count: it is not asked again
        if self.found is None:
            return None  # no label at all
        return self._loss(model, batch, self.found.count, takes_items=self.found.takes_items)

    @property
    def known(self) -> bool:
        """Whether the count was given or has been found."""
        return self._count is not None or self.found is not None

    def find(self, model: nn.Module, microbatch: object) -> None:
        """Find out what the model's loss is a mean over, unless it is known already.

        The model runs without dropout and without a graph. Its weights, buffers and modes, and the random state, are
        as before.

        Args:
            model: The model.
            microbatch: Some rows; it needs one label at least.

        Raises:
            LossError: No count fits clearly.
        """
        if self.known:
            return
        if torch.compiler.is_compiling():
            raise LossError(f'count="auto" cannot ask the model inside compiled code; {CHOICES}')
        batch = fields_of(microbatch)
        with self._asking(model) as loss_of:
            self.found = find_count(
                loss_of,
                batch,
                takes_items=self._takes_items(model),
                ignores=self._ignores,
                precision=_precision(model),
            )
            if self.found is not None and not self.found.takes_items:
                self._scale = abs(loss_of(take(batch, range(min(ROWS_ASKED, rows_in(batch)))), False))
        if self.found is not None and not self.found.takes_items:
            self._seen, self._shown = 1, ranges_of(batch)
            self._kept = take(batch, different_rows(batch, _KEPT))

    def is_due(self, microbatch: object) -> bool:
        """Count a microbatch; return whether the model should be asked about it.

        Args:
            microbatch: A microbatch, or a window's rows.

        Returns:
            Whether it is number 2, 4, 8 and so on, or shows an ignored label, a padded mask or a number that no
            microbatch has shown before.
        """
        if self.found is None or self.found.takes_items:
            return False
        self._seen += 1
        ranges = ranges_of(fields_of(microbatch))
        due = not self._seen & (self._seen - 1) or is_wider(ranges, self._shown)
        self._shown = widened(self._shown, ranges)
        return due

    def confirm(self, model: nn.Module, microbatch: object) -> None:
        """Compare the count that was found with a later microbatch; as `find` does.

        Args:
            model: The model.
            microbatch: Some rows.

        Raises:
            LossError: The losses of parts no longer make the loss of their union.
        """
        if self.found is None or self.found.takes_items:
            return
        batch = fields_of(microbatch)
        some = take(batch, different_rows(batch, _KEPT))
        both = None if self._kept is None else joined([some, self._kept])
        with self._asking(model) as loss_of:
            rows = batch if both is None else both
            tolerance = _tolerance(model, rows)
            confirm_count(loss_of, rows, self.found, tolerance=tolerance, least=self._scale, ignores=self._ignores)

    @contextmanager
    def _asking(self, model: nn.Module) -> Generator[Callable[[Fields, bool], float]]:
        with _undisturbed(model):
            one = torch.ones((), device=next((p.device for p in model.parameters()), None))

            def loss_of(rows: Fields, as_sum: bool) -> float:  # noqa: FBT001 - `LossOf` has it by position
                loss, output = self._ask(model, dict(rows), one if as_sum else None)
                router = router_loss_of(output, rows, model)
                if router is not None:
                    check_router_loss(router, model)
                return float(loss if router is None else loss - router.own)

            try:
                yield loss_of
            except torch.OutOfMemoryError as error:
                raise LossError(
                    f'memory ran out where count="auto" asked the model about three rows; {CHOICES}'
                ) from error

    def _loss(self, model: nn.Module, batch: Fields, count: CountOf, *, takes_items: bool) -> Loss | None:
        number = count_in(batch, count)
        if not takes_items and count != ROWS and not float(number):
            return None  # a mean over nothing is NaN
        divisor = torch.as_tensor(number).clamp(min=1) if takes_items else number
        loss, output = self._ask(model, dict(batch), divisor if takes_items else None)
        _check_loss(loss, model)
        router = router_loss_of(output, batch, model)
        if router is not None:  # the batch's router loss is the same in every microbatch, so any weights give its mean
            loss = loss - router.own + router.of_the_batch(model)
        return Loss(sum=loss * divisor, count=number)


def _call(model: Any, batch: Fields, items: Tensor | None) -> tuple[Tensor, Any]:
    """Call a model with a microbatch, and take the loss out of its output."""
    output = model(**batch) if items is None else model(**batch, num_items_in_batch=items)
    loss = output.get("loss") if isinstance(output, dict) else attribute(output, "loss")
    if loss is None and isinstance(output, tuple) and output and isinstance(output[0], Tensor):
        loss = output[0]
    if not isinstance(loss, Tensor):
        raise LossError(
            f"the output of {type(model).__name__} ({kind_of(output)}) has no loss; models of Transformers compute one "
            'if the microbatch has "labels"'
        )
    return loss, output


def _check_loss(loss: Tensor, model: nn.Module) -> None:
    if loss.ndim:
        raise LossError(
            f"the loss of {type(model).__name__} has the shape {tuple(loss.shape)}, and must be one number. Let the "
            "model average it, or write a loss function that returns mb.Loss(sum=loss.sum(), count=...)"
        )


def _precision(model: nn.Module) -> float:
    """Return the rounding error of the narrowest dtype that a model computes in."""
    dtypes = {each.dtype for each in model.parameters() if each.is_floating_point() and each.dtype.itemsize > 1}
    return max((torch.finfo(dtype).eps for dtype in dtypes), default=0.0)


def _tolerance(model: nn.Module, batch: Fields) -> float:
    """Return the relative error that rounding may have in the losses of a model that was trained for a while."""
    own, devices = _precision(model), {each.device.type for each in batch.values() if isinstance(each, Tensor)}
    dtypes = [torch.get_autocast_dtype(each) for each in devices if torch.is_autocast_enabled(each)]
    least = _IN_DOUBLE if 0 < own < _DOUBLE and not dtypes else _ON_CPU if devices <= {"cpu"} else _ON_DEVICE
    return max(least, 10 * own, *(10 * torch.finfo(dtype).eps for dtype in dtypes))


def _is_sharded(model: nn.Module) -> bool:
    """Return whether ranks must run the model together, which each of them may ask at another microbatch."""
    return any(type(each).__name__ in {"DTensor", "FlatParameter"} for each in model.parameters())


def _is_recorded() -> bool:
    """Return whether code is compiled or a graph of the device is recorded, where nothing can be asked."""
    return torch.compiler.is_compiling() or is_recording()


def _takes_items(model: Any) -> bool:
    """Return whether a model's forward may be called with ``num_items_in_batch``."""
    try:
        parameters = inspect.signature(model.forward).parameters.values()
    except (TypeError, ValueError):
        return False
    return any(each.kind is each.VAR_KEYWORD or each.name == "num_items_in_batch" for each in parameters)


@contextmanager
def _undisturbed(model: nn.Module) -> Generator[None]:
    """Run a model without dropout and without a graph, and leave everything as before."""
    modes = {module: module.training for module in model.modules()}
    buffers = [(buffer, buffer.clone()) for buffer in model.buffers()]
    devices = [each for each in {each.device for each in model.parameters()} if random_state(each) is not None]
    kind = devices[0].type if devices else "cuda"
    python, numpy = random.getstate(), sys.modules.get("numpy")
    state = None if numpy is None else numpy.random.get_state()
    try:
        with torch.no_grad(), torch.random.fork_rng([each.index or 0 for each in devices], device_type=kind):
            for module in modes:
                module.training = False
            yield
    finally:
        for module, training in modes.items():
            module.training = training
        with torch.no_grad():
            for buffer, before in buffers:
                if not torch.equal(buffer, before):
                    buffer.copy_(before)
        random.setstate(python)
        if numpy is not None:
            numpy.random.set_state(state)
