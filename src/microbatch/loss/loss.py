"""Represent a microbatch's loss as a sum and a count, so that it becomes a share of its window's mean."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from numbers import Number, Real
from operator import attrgetter
from typing import Any, TypeAlias, TypeGuard, cast

import torch
from torch import Tensor

from microbatch.arguments import attribute
from microbatch.devices.backend import wide_dtype
from microbatch.errors import CountError, LossError, LossShapeError, MissingCountError, NoGraphError
from microbatch.kind_words import kind_of

Count: TypeAlias = int | float | Tensor
_USUAL = {torch.float32, torch.float64, torch.bfloat16}


@dataclass(frozen=True, slots=True)
class Loss:
    """State a microbatch's loss as a sum and the count that it is a sum over.

    The effective batch's loss is ``sum_i S_i / sum_i c_i`` over all microbatches and ranks. So a mean over tokens is
    right only if every microbatch states its number of tokens.

    Attributes:
        sum: Summed (not averaged) loss; shape ``()``, any floating dtype, attached to its graph. Compute it with
            ``reduction="sum"``. A mean over nothing is NaN, and so is its gradient, whatever factor it is multiplied
            by.
        count: Number of samples or tokens in the sum, or the sum of their weights, without ignored targets. A number or
            a 0-d tensor, at least 0. A microbatch with a count of 0 contributes nothing.
        metrics: Numbers to report beside the loss, by name, such as the number of correct predictions. Each is a sum
            over this microbatch: a number or a 0-d tensor. `Step.metrics` has the sums over the window and all ranks.
            Tensors stay on the device, and are not read before the window ends.

    Raises:
        LossShapeError: ``sum`` is not a 0-d floating-point tensor, or a metric is not 0-d.
        CountError: ``count`` is negative, NaN, infinite, not a number, or a tensor that is not 0-d.

    Example:
        >>> labels = torch.tensor([2, -100, 0])
        >>> logits = torch.zeros(3, 4)
        >>> loss = Loss(
        ...     sum=torch.nn.functional.cross_entropy(logits, labels, reduction="sum"), count=(labels >= 0).sum()
        ... )
        >>> round(loss.mean.item(), 4)  # log 4
        1.3863
    """

    sum: Tensor
    count: Count
    metrics: Mapping[str, Count] = field(default_factory=dict, kw_only=True)  # "dict[...]" would break compiled graphs

    def __post_init__(self) -> None:
        """Refuse values that would fail only later, in backward or at the end of the window."""
        _check_scalar(self.sum, "Loss.sum")
        if not isinstance(self.count, Tensor):
            number = check_number(self.count, "Loss.count")
            if not isinstance(self.count, int | float):  # a number of NumPy
                object.__setattr__(self, "count", int(number) if number.is_integer() else number)
        elif self.count.ndim or self.count.dtype.is_complex or _where_unread(self.count):
            raise CountError(
                f"Loss.count must be a number or a 0-d tensor, not of shape {tuple(self.count.shape)}, "
                f"{self.count.dtype}, on {self.count.device}"
            )
        if not isinstance(self.metrics, Mapping):
            raise LossError(f"Loss.metrics must be a dict of name to number, not {self.metrics!r}")
        for name, value in self.metrics.items():
            _check_metric(value, str(name))

    @property
    def mean(self) -> Tensor:
        """The loss per target: ``sum / count``; shape ``()``, NaN for a count of 0."""
        return self.sum / self.count


LossLike: TypeAlias = Tensor | Loss | Mapping[str, Tensor | Loss | None] | None


@dataclass(slots=True)  # not frozen: one is made for every microbatch, and a frozen one takes five times as long
class Share:
    """One microbatch's part of one term of the loss: the sum ``weight * value`` over ``count`` targets.

    If the loss function returned a mean, ``value`` is this mean and ``weight`` is the number of rows. So the graph
    contains no extra multiplication.

    Attributes:
        name: Name of the term; ``"loss"`` if the loss function returned a single loss.
        value: The tensor that backward starts from; shape ``()``.
        weight: Factor that turns ``value`` into a sum.
        count: Number of samples or targets in the sum.
        is_mean: Whether ``value`` is a mean over the microbatch's rows.
        metrics: Sums of the microbatch to report, by name; 0-d, on the device of ``value``, without a graph. `None` for
            none.
    """

    name: str
    value: Tensor
    weight: float
    count: Count
    is_mean: bool
    metrics: Mapping[str, Tensor] | None = None


value_of = attrgetter("value")


def shares_of(returned: object, *, rows: float | None) -> list[Share]:
    """Convert the result of a loss function into one share per term.

    Args:
        returned: A 0-d tensor (the mean over this microbatch's samples), a `Loss`, or a mapping from names to either of
            them. `None` for a microbatch that contributes nothing.
        rows: Number of samples in this microbatch; `None` if it is not known.

    Returns:
        One share for each term that contributes, in the order of ``returned``.

    Raises:
        LossError: ``returned`` has none of these types.
        LossShapeError: A loss is not a 0-d floating-point tensor.
        NoGraphError: A loss has no graph.
        MissingCountError: A loss is a plain mean, and ``rows`` is `None`.
    """
    if isinstance(returned, Tensor):
        return _mean_of("loss", returned, rows)
    if isinstance(returned, Mapping):
        terms = {str(name): loss for name, loss in cast("Mapping[Any, Any]", returned).items()}
        if len(terms) < len(returned):
            raise LossError(f"two terms of the loss have the same name as text: {', '.join(map(repr, returned))}")
        if attribute(returned, "loss") is not None or "logits" in terms:
            _refuse_output(returned, "loss")
        try:
            return [share for name, loss in terms.items() for share in _shares_of_term(name, loss, rows)]
        except NoGraphError:
            _refuse_beside(terms)
            raise
    return _shares_of_term("loss", returned, rows)


_ITEM = (
    ". A number, as from .item(), has no gradient; to report one, return mb.Loss(sum=..., count=..., "
    "metrics={name: ...})"
)


def _shares_of_term(name: str, loss: object, rows: float | None) -> list[Share]:
    if loss is None:
        return []
    if isinstance(loss, Loss):
        if not isinstance(loss.count, Tensor) and loss.count == 0:
            return []
        if not loss.sum.requires_grad:
            _refuse_without_graph(name)
        return [Share(name, loss.sum, 1.0, loss.count, is_mean=False, metrics=_metrics(loss))]
    if not isinstance(loss, Tensor):
        if attribute(loss, "loss") is not None or (isinstance(loss, tuple) and loss and isinstance(loss[0], Tensor)):
            _refuse_output(loss, name)
        raise LossError(
            f"the loss {name!r} is {kind_of(loss)}; return a 0-d tensor (the mean over the microbatch's "
            f"samples), mb.Loss(sum=..., count=...), or a dict of these{_ITEM if isinstance(loss, Number) else ''}"
        )
    return _mean_of(name, loss, rows)


def _mean_of(name: str, loss: Tensor, rows: float | None) -> list[Share]:
    if loss.ndim or loss.dtype not in _USUAL or loss.layout is not torch.strided or loss.is_meta:
        _check_scalar(loss, f"the loss {name!r}")
    if rows is None:
        raise MissingCountError(
            f"the loss {name!r} is a plain mean, and its number of samples is not known, because this microbatch does "
            "not come from the window (or has been counted already). Pass window.backward(loss, count=rows), or "
            "return mb.Loss(sum=..., count=...)"
        )
    if rows == 0:
        return []
    if not loss.requires_grad:
        _refuse_without_graph(name)
    return [Share(name, loss, float(rows), rows, is_mean=True)]


def _refuse_output(output: object, name: str) -> None:
    first = "output[0]" if isinstance(output, tuple) and attribute(output, "loss") is None else "output.loss"
    raise LossError(
        f"the loss {name!r} is the whole output of a model ({kind_of(output)}), and not its loss alone. "
        "Pass loss_fn=mb.losses.from_model(), which takes the loss out of it and finds its count. By hand: "
        f"n = (labels[:, 1:] != -100).sum(); return mb.Loss(sum={first} * n, count=n). Return {first} itself if it is "
        "a mean over rows"
    )


def _check_scalar(value: object, what: str) -> None:
    if not isinstance(value, Tensor):
        raise LossShapeError(f"{what} must be a 0-d tensor, not {kind_of(value)}")
    if value.ndim != 0:
        raise LossShapeError(
            f"{what} must be 0-d, not of shape {tuple(value.shape)}; return mb.Loss(sum=loss.sum(), count=...)"
        )
    if not value.dtype.is_floating_point or value.dtype.itemsize < 2:
        raise LossShapeError(f"{what} must be floating point, of at least 16 bits, not {value.dtype}")
    if where := _where_unread(value):
        raise LossShapeError(f"{what} must be a dense tensor with a value, and it is {where}")


def _where_unread(value: Tensor) -> str:
    """Return why a tensor has no value to read; empty if it has one."""
    # `is_meta` and `is_sparse` would be operators for the compiler, and so a graph of their own.
    if value.device.type == "meta":
        return "on the meta device, which holds no values"
    return "" if value.layout is torch.strided else "sparse"


def _metrics(loss: Loss) -> dict[str, Tensor]:
    device = loss.sum.device
    return {
        str(name): torch.as_tensor(value, device=device).detach().to(wide_dtype(device))
        for name, value in loss.metrics.items()
    }


def _check_metric(value: object, name: str) -> None:
    if isinstance(value, Tensor):
        is_number = not (value.ndim or value.dtype.is_complex or value.is_meta)
    else:
        is_number = _is_number(value) and not _overflows(value)
    if not is_number:
        told = f"a tensor of shape {tuple(value.shape)}" if isinstance(value, Tensor) else f"{value!r}"
        raise LossShapeError(f"the metric {name!r} must be a number or a 0-d tensor, summed over the rows, not {told}")


def _refuse_without_graph(name: str) -> None:
    raise NoGraphError(
        f"the loss {name!r} has no graph, so it has no gradient: it was detached, computed under torch.no_grad, "
        "or depends on no parameter that requires a gradient. Return None for a microbatch that contributes nothing"
    )


def _refuse_beside(terms: Mapping[str, Any]) -> None:
    """Raise an error for a dict that holds a loss, and a number without a graph beside it."""
    values = {name: loss.sum if isinstance(loss, Loss) else loss for name, loss in terms.items()}
    graphs = {name: isinstance(value, Tensor) and value.requires_grad for name, value in values.items()}
    if not any(graphs.values()):
        return
    name = next(name for name, has in graphs.items() if not has and values[name] is not None)
    raise NoGraphError(
        f"the value {name!r} beside the loss has no graph, and every entry of the dict is taken for a loss. To report "
        "a number of the whole window, return its sum over the rows: mb.Loss(sum=loss * n, count=n, "
        f"metrics={{{name!r}: ...}}), with n rows; step.metrics holds the sums. If {name!r} is a loss, it was "
        "detached, or depends on no parameter that requires a gradient"
    )


def check_number(count: object, what: str) -> float:
    """Refuse a count that is not a finite number of at least 0.

    Args:
        count: The count, on the host.
        what: Name of the count in the error message.

    Returns:
        The count as a float.

    Raises:
        CountError: ``count`` is negative, NaN, infinite, a bool, or not a number.
    """
    if isinstance(count, bool) or not _is_number(count):
        raise CountError(f"{what} must be a number or a 0-d tensor, not {count!r}")
    if _overflows(count) or not math.isfinite(count) or count < 0:
        raise CountError(f"{what} must be finite and at least 0, not {str(count)[:30]}")
    return float(count)


def _is_number(value: object) -> TypeGuard[int | float]:
    return isinstance(value, int | float | Real)  # NumPy's numbers are real numbers, too


def _overflows(value: Any) -> bool:
    try:
        float(value)
    except OverflowError:
        return True
    return False
