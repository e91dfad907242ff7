"""Loss heads for large vocabularies: the logits are never held whole."""

from __future__ import annotations

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
        return _sum_and_normaliser(logits, labels, ignore_index)[0]
    return cast("Tensor", _InPlace.apply(logits, labels, ignore_index))


class _InPlace(torch.autograd.Function):
    """Cross-entropy of logits that nobody else sees, so that backward may overwrite them with their gradient."""

    @staticmethod
    def forward(ctx: Any, logits: Tensor, labels: Tensor, ignore_index: int) -> Tensor:
        total, normaliser = _sum_and_normaliser(logits, labels, ignore_index)
        ctx.save_for_backward(logits, labels, normaliser)
        ctx.ignore_index = ignore_index
        return total

    @staticmethod
    @once_differentiable  # which hides the name of the first argument
    def backward(  # pyright: ignore[reportIncompatibleMethodOverride]
        ctx: Any, *grads: Tensor
    ) -> tuple[Tensor | None, ...]:
        logits, labels, normaliser = ctx.saved_tensors
        _to_gradient_(logits, labels, normaliser, ctx.ignore_index, grads[0])
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
            total, normaliser = _sum_and_normaliser(logits, labels_of, ignore_index)
            sums.append(total)
            _to_gradient_(logits, labels_of, normaliser, ignore_index, one)
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


def _sum_and_normaliser(logits: Tensor, labels: Tensor, ignore_index: int) -> tuple[Tensor, Tensor]:
    """Return the summed loss, and the log-sum-exp of every row; both at least float32."""
    dtype = torch.promote_types(logits.dtype, torch.float32)
    step = max(1, _IN_CACHE // max(1, logits.shape[1]))
    normaliser = torch.cat([part.to(dtype).logsumexp(1) for part in logits.split(step)])
    counted = labels != ignore_index
    chosen = logits.gather(1, torch.where(counted, labels, 0).unsqueeze(1)).squeeze(1).to(dtype)
    return torch.where(counted, normaliser - chosen, 0).sum(), normaliser


def _to_gradient_(logits: Tensor, labels: Tensor, normaliser: Tensor, ignore_index: int, weight: Tensor) -> None:
    """Overwrite logits with ``weight * (softmax - onehot)``, and rows that do not count with zeros."""
    step = max(1, _IN_CACHE // max(1, logits.shape[1]))
    counted = labels != ignore_index
    factor = torch.where(counted, weight.to(normaliser.dtype), 0)
    for part, part_labels, part_normaliser, part_factor in zip(
        logits.split(step), labels.split(step), normaliser.split(step), factor.split(step), strict=True
    ):
        probabilities = part.to(normaliser.dtype) if part.dtype != normaliser.dtype else part
        probabilities.sub_(part_normaliser.unsqueeze(1)).exp_().mul_(part_factor.unsqueeze(1))
        at = torch.where(part_labels != ignore_index, part_labels, 0).unsqueeze(1)
        probabilities.scatter_add_(1, at, -part_factor.unsqueeze(1))
        if probabilities is not part:
            part.copy_(probabilities)


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
