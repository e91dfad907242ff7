"""Sum losses over targets, each with the count that PyTorch's mean divides by."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from microbatch.errors import LossError
from microbatch.loss.loss import Loss


def causal_lm(logits: Tensor, labels: Tensor, *, shift: bool = True, ignore_index: int = -100) -> Loss:
    """Sum the cross-entropy of a language model that predicts the next token.

    Position ``t`` predicts the label at ``t + 1``, so the first label of a row is never a target, and is not counted.

    Args:
        logits: Shape ``(rows, tokens, vocabulary)``, floating point.
        labels: Shape ``(rows, tokens)``, int64.
        shift: Whether to move the labels by one token. Pass False if they are moved already.
        ignore_index: The label of positions without a target.

    Returns:
        The sum, in nats, and the number of targets. The sum is float32, or float64 for float64 logits.

    Raises:
        LossError: The shapes do not fit.

    Example:
        >>> labels = torch.tensor([[1, 2, -100, 3]])  # two targets: the first label is not one
        >>> loss = causal_lm(torch.zeros(1, 4, 5), labels)
        >>> int(loss.count), round(loss.mean.item(), 4)  # log 5
        (2, 1.6094)
    """
    if labels.shape != logits.shape[:-1] or not labels.ndim:
        raise LossError(
            f"causal_lm: logits of shape {tuple(logits.shape)} do not fit labels of shape {tuple(labels.shape)}; pass "
            "(rows, tokens, vocabulary) and (rows, tokens)"
        )
    if shift:
        logits, labels = logits[..., :-1, :], labels[..., 1:]
    return cross_entropy(logits.flatten(0, -2), labels.flatten(), ignore_index=ignore_index)


def cross_entropy(
    logits: Tensor,
    labels: Tensor,
    *,
    weight: Tensor | None = None,
    ignore_index: int = -100,
    label_smoothing: float = 0.0,
) -> Loss:
    """Sum the cross-entropy of classes, over the count that `torch.nn.functional.cross_entropy` divides by.

    With class weights, PyTorch's mean divides by the sum of the targets' weights. So that sum is the count.

    Args:
        logits: Shape ``(rows, classes, ...)``, floating point.
        labels: Classes of shape ``(rows, ...)``, int64; or probabilities of the shape of ``logits``.
        weight: A weight for each class; shape ``(classes,)``.
        ignore_index: The class of positions without a target.
        label_smoothing: Share of each target that is spread evenly over all classes, from 0 to 1.

    Returns:
        The sum, in nats, and its count. The sum is float32, or float64 for float64 logits.

    Raises:
        LossError: The shapes do not fit.

    Example:
        >>> loss = cross_entropy(torch.zeros(3, 2), torch.tensor([0, 1, -100]), weight=torch.tensor([1.0, 3.0]))
        >>> loss.count.item(), round(loss.mean.item(), 4)  # log 2
        (4.0, 0.6931)
    """
    if logits.ndim < 2 or labels.shape not in {logits.shape, logits.shape[:1] + logits.shape[2:]}:
        raise LossError(
            f"cross_entropy: logits of shape {tuple(logits.shape)} do not fit labels of shape {tuple(labels.shape)}; "
            "pass (rows, classes, ...) and (rows, ...)"
        )
    logits = _wide(logits)
    weight = None if weight is None else weight.to(logits.device, logits.dtype)
    total = F.cross_entropy(
        logits, labels, weight, ignore_index=ignore_index, label_smoothing=label_smoothing, reduction="sum"
    )
    if labels.is_floating_point():
        return Loss(sum=total, count=labels.numel() // labels.shape[1])  # PyTorch divides by the rows, weighted or not
    kept = labels != ignore_index
    return Loss(sum=total, count=kept.sum() if weight is None else weight[labels.where(kept, 0)][kept].sum())


def mse(predictions: Tensor, targets: Tensor) -> Loss:
    """Sum the squared errors, over the number of elements.

    Args:
        predictions: Any shape, floating point.
        targets: The same shape.

    Returns:
        The sum and the number of elements. The sum is float32, or float64 for float64 predictions.

    Raises:
        LossError: The shapes differ; they are not broadcast.

    Example:
        >>> loss = mse(torch.tensor([[1.0], [4.0]]), torch.zeros(2, 1))
        >>> loss.sum.item(), loss.count
        (17.0, 2)
    """
    _check_equal("mse", predictions, targets)
    return Loss(sum=F.mse_loss(_wide(predictions), _wide(targets), reduction="sum"), count=targets.numel())


def bce(logits: Tensor, targets: Tensor, *, weight: Tensor | None = None, pos_weight: Tensor | None = None) -> Loss:
    """Sum the binary cross-entropy of logits, over the number of elements.

    Args:
        logits: Any shape, floating point; before the sigmoid.
        targets: The same shape, from 0 to 1.
        weight: A weight for each element; it is broadcast. As in PyTorch, it does not change the count.
        pos_weight: A weight for the positive part of each element; it is broadcast.

    Returns:
        The sum, in nats, and the number of elements. The sum is float32, or float64 for float64 logits.

    Raises:
        LossError: The shapes differ; they are not broadcast.

    Example:
        >>> loss = bce(torch.zeros(3, 2), torch.ones(3, 2))
        >>> loss.count, round(loss.mean.item(), 4)  # log 2
        (6, 0.6931)
    """
    _check_equal("bce", logits, targets)
    logits = _wide(logits)
    total = F.binary_cross_entropy_with_logits(
        logits, targets.to(logits.dtype), weight, pos_weight=pos_weight, reduction="sum"
    )
    return Loss(sum=total, count=targets.numel())


def _wide(x: Tensor) -> Tensor:
    return x.to(torch.promote_types(x.dtype, torch.float32))


def _check_equal(name: str, first: Tensor, second: Tensor) -> None:
    if first.shape != second.shape:
        raise LossError(
            f"{name}: the shapes {tuple(first.shape)} and {tuple(second.shape)} differ, and are not broadcast; reshape "
            "one of them, for example by squeeze(-1)"
        )
