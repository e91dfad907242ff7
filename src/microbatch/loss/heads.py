"""Loss heads for large vocabularies: the logits are never held whole."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from microbatch.errors import LossError
from microbatch.loss.loss import Loss

# Logits that are turned into probabilities at once: they stay in cache.
_IN_CACHE = 1 << 18


def linear_cross_entropy(
    hidden: Tensor,
    weight: Tensor,
    labels: Tensor,
    *,
    bias: Tensor | None = None,
    ignore_index: int = -100,
    tile: int | None = None,
) -> Loss:
    """Sum the cross-entropy of a linear layer's logits without holding more than one tile of them.

    ``-log softmax(h W^T + b)[label]``, summed over the targets that are not ignored. A plain loss holds the logits,
    their log-probabilities and their gradient, each of ``tokens * vocabulary``. Here the logits of one tile of tokens
    are made, and become their own gradient ``softmax - onehot`` in place. Up to one tile, that waits for backward, and
    the weight's gradient is fused; with more tiles it is multiplied out at once, into one gradient of the weight.

    Args:
        hidden: Shape ``(..., width)``, floating point.
        weight: Shape ``(vocabulary, width)``.
        labels: Shape ``(...)``, int64, from 0 to ``vocabulary - 1``, or ``ignore_index``.
        bias: Shape ``(vocabulary,)``, or `None`.
        ignore_index: Label of targets that do not count.
        tile: Tokens whose logits exist at once, at least 1; `None` takes as many as the weight is wide, so that a tile
            is no larger than the weight.

    Returns:
        The sum, in nats, and the number of targets that count; in float32, or float64 for float64 input.

    Raises:
        LossError: Shapes or dtypes do not fit.

    Cost:
        Three matrix products, as the plain loss has; memory for one tile of logits, and with several tiles one more
        gradient of the weight. No host synchronisation. It can be differentiated once.

    Example:
        >>> hidden, weight = torch.ones(3, 2), torch.zeros(4, 2, requires_grad=True)
        >>> loss = linear_cross_entropy(hidden, weight, torch.tensor([1, -100, 3]))
        >>> round(loss.mean.item(), 4), loss.count.item()  # log 4
        (1.3863, 2)
    """
    _check(hidden, weight, labels, tile)
    rows = hidden.reshape(-1, hidden.shape[-1])
    targets = labels.reshape(-1)
    count = (targets != ignore_index).sum()
    tile = weight.shape[1] if tile is None else tile
    if len(rows) <= tile or not torch.is_grad_enabled():
        parts = zip(rows.split(tile), targets.split(tile), strict=True)
        sums = [_sum_of(F.linear(part, weight, bias), labels_of, ignore_index) for part, labels_of in parts]
        return Loss(sum=torch.stack(sums).sum() if sums else rows.sum() * 0, count=count)
    kind = rows.device.type
    if torch.is_autocast_enabled(kind):
        dtype = torch.get_autocast_dtype(kind)
        rows = rows.to(dtype)
    total = _Tiles.apply(rows, weight, bias, targets, ignore_index, tile)
    return Loss(sum=cast("Tensor", total), count=count)


def _sum_of(logits: Tensor, labels: Tensor, ignore_index: int) -> Tensor:
    if not logits.requires_grad:
        return _sum(logits, labels, ignore_index)
    return cast("Tensor", _InPlace.apply(logits, labels, ignore_index))


def cross_entropy(
    input: Tensor,  # noqa: A002 - torch's own name for it
    target: Tensor,
    weight: Tensor | None = None,
    size_average: bool | None = None,
    ignore_index: int = -100,
    reduce: bool | None = None,
    reduction: str = "mean",
    label_smoothing: float = 0.0,
) -> Tensor | None:
    """Stand in for `torch.nn.functional.cross_entropy` where its logits are large, with less traffic.

    The log-probabilities are not kept, and neither they nor the probabilities leave the cache before they are summed
    or have become the gradient.

    Args:
        input: Logits, shape ``(targets, vocabulary)``.
        target: Shape ``(targets,)``, int64.
        weight: Must be `None` to be covered.
        size_average: Likewise.
        ignore_index: Label of targets that do not count.
        reduce: Must be `None` to be covered.
        reduction: ``"sum"`` or ``"mean"``, to be covered.
        label_smoothing: Must be 0 to be covered.

    Returns:
        What torch's own function returns; shape ``()``, or `None` if this call is not covered.

    Cost:
        Saves the logits, in their own precision, and makes their gradient; nothing else of their size.
    """
    plain = weight is None and size_average is None and reduce is None and label_smoothing == 0.0
    if not plain or reduction not in {"sum", "mean"} or not input.requires_grad or not torch.is_grad_enabled():
        return None
    if input.ndim != 2 or target.ndim != 1 or target.dtype != torch.int64 or input.numel() < _IN_CACHE:
        return None
    if not input.dtype.is_floating_point or (
        input.dtype.itemsize < 4 and not torch.is_autocast_enabled(input.device.type)
    ):
        return None
    total = cast("Tensor", _OutOfPlace.apply(input, target, ignore_index))
    return total if reduction == "sum" else total / (target != ignore_index).sum()


class _OutOfPlace(torch.autograd.Function):
    """Cross-entropy of logits that others may look at."""

    @staticmethod
    def forward(ctx: Any, logits: Tensor, labels: Tensor, ignore_index: int) -> Tensor:
        ctx.save_for_backward(logits, labels)
        ctx.ignore_index = ignore_index
        return _sum(logits, labels, ignore_index)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        logits, labels = ctx.saved_tensors
        if torch.is_grad_enabled():  # a second derivative is asked for: torch's own function has one
            wide = logits.to(torch.promote_types(logits.dtype, torch.float32))
            total = F.cross_entropy(wide, labels, ignore_index=ctx.ignore_index, reduction="sum")
            return (*torch.autograd.grad(total, logits, grads[0], create_graph=True), None, None)
        out = torch.empty_like(logits)
        _to_gradient_(out, logits, labels, ctx.ignore_index, weight=grads[0])
        return out, None, None


class _InPlace(torch.autograd.Function):
    """Cross-entropy of logits that nobody else sees, so that backward may overwrite them with their gradient."""

    @staticmethod
    def forward(ctx: Any, logits: Tensor, labels: Tensor, ignore_index: int) -> Tensor:
        ctx.save_for_backward(logits, labels)
        ctx.ignore_index = ignore_index
        return _sum(logits, labels, ignore_index)

    @staticmethod
    @once_differentiable  # which hides the name of the first argument
    def backward(  # pyright: ignore[reportIncompatibleMethodOverride]
        ctx: Any, *grads: Tensor
    ) -> tuple[Tensor | None, ...]:
        logits, labels = ctx.saved_tensors
        _to_gradient_(logits, logits, labels, ctx.ignore_index, weight=grads[0])
        return logits, None, None


class _Tiles(torch.autograd.Function):
    """The whole head, tile by tile; the gradient for a loss of weight 1 is made on the way."""

    @staticmethod
    def forward(
        ctx: Any, rows: Tensor, weight: Tensor, bias: Tensor | None, labels: Tensor, ignore_index: int, tile: int
    ) -> Tensor:
        ready = weight.to(rows.dtype)
        ready_bias = None if bias is None else bias.to(rows.dtype)
        grad_rows, grad_weight, grad_bias = (
            torch.zeros_like(each) if each is not None and each.requires_grad else None for each in (rows, weight, bias)
        )
        one = torch.ones((), device=rows.device)
        sums: list[Tensor] = []
        for at in range(0, len(rows), tile):
            part, labels_of = rows[at : at + tile], labels[at : at + tile]
            logits = F.linear(part, ready, ready_bias)
            sums.append(_sum(logits, labels_of, ignore_index))
            _to_gradient_(logits, logits, labels_of, ignore_index, weight=one)
            if grad_rows is not None:
                torch.mm(logits, ready, out=grad_rows[at : at + tile])
            if grad_weight is not None:
                _add_product_(grad_weight, logits, part)
            if grad_bias is not None:
                grad_bias += logits.sum(0)
        ctx.save_for_backward(grad_rows, grad_weight, grad_bias)
        return torch.stack(sums).sum()

    @staticmethod
    @once_differentiable  # which hides the name of the first argument
    def backward(  # pyright: ignore[reportIncompatibleMethodOverride]
        ctx: Any, *grads: Tensor
    ) -> tuple[Tensor | None, ...]:
        # Out of place: the graph may be kept and walked again.
        scaled = [None if each is None else each * grads[0].to(each.dtype) for each in ctx.saved_tensors]
        return (*scaled, None, None, None)


def _sum(logits: Tensor, labels: Tensor, ignore_index: int) -> Tensor:
    """Return the summed cross-entropy, at least in float32."""
    dtype = torch.promote_types(logits.dtype, torch.float32)
    counted = labels != ignore_index
    at = torch.where(counted, labels, 0).unsqueeze(1)
    # torch's own kernel for a whole row is the fastest there is; a tile of its result is read while it is in cache.
    chosen = [part.log_softmax(1, dtype).gather(1, where) for part, where in _tiles(logits, at)]
    return -torch.where(counted, torch.cat(chosen).squeeze(1), 0).sum()


def _to_gradient_(out: Tensor, logits: Tensor, labels: Tensor, ignore_index: int, *, weight: Tensor) -> None:
    """Write ``weight * (softmax - onehot)`` of logits to ``out``, which may be they; 0 for rows that do not count."""
    dtype = torch.promote_types(logits.dtype, torch.float32)
    counted = labels != ignore_index
    factor = torch.where(counted, weight.to(dtype), 0).unsqueeze(1)
    at = torch.where(counted, labels, 0).unsqueeze(1)
    for into, part, where, each in _tiles(out, logits, at, factor):
        probabilities = torch.softmax(part, 1, dtype).mul_(each)
        into.copy_(probabilities.scatter_(1, where, probabilities.gather(1, where) - each))


def _tiles(logits: Tensor, *others: Tensor) -> Iterator[tuple[Tensor, ...]]:
    """Yield rows that fit into cache together, of several tensors alike."""
    step = max(1, _IN_CACHE // max(1, logits.shape[1]))
    return zip(*(each.split(step) for each in (logits, *others)), strict=True)


def _add_product_(total: Tensor, left: Tensor, right: Tensor) -> None:
    if total.dtype == left.dtype:
        total.addmm_(left.T, right)
        return
    rows = max(1, _IN_CACHE // max(1, total.shape[1]))
    for part, at in zip(left.split(rows, dim=1), range(0, total.shape[0], rows), strict=True):
        total[at : at + rows].add_(part.T @ right)


def _check(hidden: Tensor, weight: Tensor, labels: Tensor, tile: int | None) -> None:
    if weight.ndim != 2 or hidden.shape[-1] != weight.shape[1] or hidden.shape[:-1] != labels.shape:
        raise LossError(
            f"linear_cross_entropy: hidden {tuple(hidden.shape)}, weight {tuple(weight.shape)} and labels "
            f"{tuple(labels.shape)} do not fit; they are (..., width), (vocabulary, width) and (...)"
        )
    if labels.dtype != torch.int64 or not hidden.dtype.is_floating_point:
        raise LossError(
            f"linear_cross_entropy: labels must be int64 and hidden floating point, not {labels.dtype}, {hidden.dtype}"
        )
    if tile is not None and tile < 1:
        raise LossError(f"linear_cross_entropy: tile must be at least 1 token, not {tile}")
