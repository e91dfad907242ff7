"""What is summed, and over what: a microbatch's loss as shares of its window's."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, TypeAlias, cast

import torch
from torch import Tensor

from microbatch.errors import CountError, LossError, LossShapeError, MissingCountError, NoGraphError

Count: TypeAlias = int | float | Tensor


@dataclass(frozen=True, slots=True)
class Loss:
    """State a microbatch's loss as a sum and the count it is a sum over.

    The effective batch's loss is ``sum_i S_i / sum_i c_i`` over all microbatches and ranks, so a mean over tokens is
    right only when every microbatch says how many tokens it had.

    Attributes:
        sum: Summed (not averaged) loss; shape ``()``, any floating dtype, attached to its graph. Sum it with
            ``reduction="sum"``: a mean of nothing is NaN, and so is its gradient, whatever it is multiplied with.
        count: What it is a sum over, ignored targets left out: samples, tokens or summed weights; a number or a
            0-d tensor, at least 0. A microbatch of count 0 contributes nothing.

    Raises:
        LossShapeError: ``sum`` is not a 0-d floating-point tensor.
        CountError: ``count`` is negative, NaN or infinite, or a tensor that is not 0-d.

    Example:
        >>> labels = torch.tensor([2, -100, 0])
        >>> logits = torch.zeros(3, 4)
        >>> loss = Loss(
        ...     sum=torch.nn.functional.cross_entropy(logits, labels, reduction="sum"), count=(labels >= 0).sum()
        ... )
        >>> round(loss.mean.item(), 4)  # log 4
        1.3863

    Source:
        Laws N1 to N5.
    """

    sum: Tensor
    count: Count

    def __post_init__(self) -> None:
        """Refuse what could only go wrong later."""
        _check_scalar(self.sum, "Loss.sum")
        _check_count(self.count, "Loss.count")

    @property
    def mean(self) -> Tensor:
        """The loss per target: ``sum / count``; shape ``()``, NaN for a count of 0."""
        return self.sum / self.count


LossLike: TypeAlias = Tensor | Loss | Mapping[str, Tensor | Loss | None] | None


@dataclass(frozen=True, slots=True)
class Share:
    """One microbatch's part of one term of the loss: ``weight * value`` is the sum, over ``count``.

    A mean is kept as it came, with its rows as the weight, so that no multiplication is added to the graph.

    Attributes:
        name: The term's name; ``"loss"`` when the loss function returned a single loss.
        value: What backward starts from; shape ``()``.
        weight: Factor that turns ``value`` into a sum.
        count: What the sum is over.
        is_mean: Whether ``value`` is a mean over the microbatch's rows.
    """

    name: str
    value: Tensor
    weight: float
    count: Count
    is_mean: bool


def shares_of(returned: object, *, rows: float | None) -> list[Share]:
    """Read what a loss function returned.

    Args:
        returned: A 0-d tensor (the mean over this microbatch's samples), a `Loss`, a dict of either, or `None` for
            a microbatch that has nothing to contribute.
        rows: Samples in this microbatch, or `None` if nobody said.

    Returns:
        One share for each term that has something to contribute, in the order given.

    Raises:
        LossError: It is none of the above.
        LossShapeError: A loss is not 0-d.
        NoGraphError: A loss has no graph.
        MissingCountError: A plain mean, and the rows are not known.
    """
    if returned is None:
        return []
    if isinstance(returned, Mapping):
        terms = cast("Mapping[Any, Any]", returned)
        return [share for name, loss in terms.items() for share in _share(str(name), loss, rows)]
    return _share("loss", returned, rows)


def _share(name: str, loss: object, rows: float | None) -> list[Share]:
    if loss is None:
        return []
    if isinstance(loss, Loss):
        if not isinstance(loss.count, Tensor) and loss.count == 0:
            return []
        _check_graph(loss.sum, name)
        return [Share(name, loss.sum, 1.0, loss.count, is_mean=False)]
    if not isinstance(loss, Tensor):
        raise LossError(
            f"the loss {name!r} is a {type(loss).__name__}; return a 0-d tensor (the mean over the microbatch's "
            "samples), mb.Loss(sum=..., count=...), or a dict of these"
        )
    _check_scalar(loss, f"the loss {name!r}")
    if rows is None:
        raise MissingCountError(
            f"the loss {name!r} is a plain mean, and the window does not know over how many samples, because it did "
            "not hand this microbatch out (or has counted it already); pass window.backward(loss, count=rows), or "
            "return mb.Loss(sum=..., count=...)"
        )
    if rows == 0:
        return []
    _check_graph(loss, name)
    return [Share(name, loss, float(rows), rows, is_mean=True)]


def _check_scalar(value: object, what: str) -> None:
    if not isinstance(value, Tensor):
        raise LossShapeError(f"{what} must be a 0-d tensor, not a {type(value).__name__}")
    if value.ndim != 0:
        raise LossShapeError(
            f"{what} must be 0-d, not of shape {tuple(value.shape)}; return mb.Loss(sum=loss.sum(), count=...)"
        )
    if not value.dtype.is_floating_point:
        raise LossShapeError(f"{what} must be floating point, not {value.dtype}")


def _check_graph(value: Tensor, name: str) -> None:
    if not value.requires_grad:
        raise NoGraphError(
            f"the loss {name!r} has no graph, so it has no gradient: it was detached, computed under torch.no_grad, "
            "or reaches no parameter that requires one; return None for a microbatch that contributes nothing"
        )


def _check_count(count: object, what: str) -> None:
    if isinstance(count, Tensor):
        if count.ndim != 0 or count.dtype.is_complex:
            raise CountError(
                f"{what} must be a number or a 0-d tensor, not of shape {tuple(count.shape)}, {count.dtype}"
            )
        return
    check_number(count, what)


def check_number(count: object, what: str) -> float:
    """Refuse a count that is not a finite number of at least 0.

    Args:
        count: The count, on the host.
        what: How the message names it.

    Returns:
        The count as a float.

    Raises:
        CountError: It is negative, NaN, infinite or no number.
    """
    if isinstance(count, bool) or not isinstance(count, int | float):
        raise CountError(f"{what} must be a number or a 0-d tensor, not {count!r}")
    if not math.isfinite(count) or count < 0:
        raise CountError(f"{what} must be finite and at least 0, not {count}")
    return float(count)


def wide_dtype(device: torch.device) -> torch.dtype:
    """Return the widest floating dtype that sums of scalars can be kept in on ``device``.

    Args:
        device: Where the scalars are.

    Returns:
        float64, or float32 on MPS, which has no float64.
    """
    return torch.float32 if device.type == "mps" else torch.float64
