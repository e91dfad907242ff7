"""Compute the cross-entropy of large vocabularies tile by tile, so that the logits are never complete in memory."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from typing import Any, NoReturn, cast

import torch
import torch.nn.functional as F
from torch import Tensor

from microbatch.arguments import whole
from microbatch.errors import LossError
from microbatch.kind_words import kind_of
from microbatch.loss.loss import Loss
from microbatch.products import add_product_

# Number of logits that are turned into probabilities at once, few enough to stay in cache.
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
    """Sum the cross-entropy of a linear layer's logits, with only one tile of logits in memory.

    The loss is ``-log softmax(h W^T + b)[label]``, summed over the targets that are not ignored. The plain formula
    holds three tensors of ``tokens * vocabulary``: the logits, their log-probabilities and their gradient. This
    function computes the logits of one tile of tokens, and turns them into their gradient ``softmax - onehot`` in
    place.

    With a single tile, the logits wait for backward. With several tiles, forward also multiplies each tile's gradient
    out, and adds the results up in one gradient of the weight.

    Args:
        hidden: Shape ``(..., width)``, floating point.
        weight: Shape ``(vocabulary, width)``.
        labels: Shape ``(...)``, int64, from 0 to ``vocabulary - 1``, or ``ignore_index``.
        bias: Shape ``(vocabulary,)``, or `None`.
        ignore_index: Label of targets that do not count.
        tile: Number of tokens whose logits exist at once, at least 1. `None` takes ``width`` tokens, so that a tile is
            as large as the weight.

    Returns:
        The sum, in nats, and the number of targets that count. The sum is float32, or float64 for float64 input.

    Raises:
        LossError: Shapes or dtypes do not fit, or ``tile`` is below 1.
        RuntimeError: In backward, if a second derivative is needed, or if a single tile's graph is used a second time.

    Cost:
        Three matrix products, as for the plain loss, and the memory of one tile of logits. With several tiles, also one
        gradient of the weight, at least in float32. No host synchronisation.

    Example:
        >>> hidden, weight = torch.ones(3, 2), torch.zeros(4, 2, requires_grad=True)
        >>> loss = linear_cross_entropy(hidden, weight, torch.tensor([1, -100, 3]))
        >>> round(loss.mean.item(), 4), loss.count.item()  # log 4
        (1.3863, 2)
    """
    tile = _check(hidden, weight, labels, tile)
    left_out = whole(ignore_index)
    if left_out is None or abs(left_out) >= 1 << 63:
        raise LossError(f"linear_cross_entropy: ignore_index must be an int64 number, not {str(ignore_index)[:30]}")
    ignore_index = left_out
    if bias is not None and (not isinstance(bias, Tensor) or bias.shape != weight.shape[:1]):
        raise LossError(f"linear_cross_entropy: bias must be a tensor of shape {tuple(weight.shape[:1])} or None")
    rows = hidden.reshape(-1, hidden.shape[-1])
    targets = labels.reshape(-1)
    count = (targets != ignore_index).sum()
    if len(rows) <= tile or not torch.is_grad_enabled():
        parts = zip(rows.split(tile), targets.split(tile), strict=True)
        sums = [_loss_sum_in_place(F.linear(part, weight, bias), labels_of, ignore_index) for part, labels_of in parts]
        return Loss(sum=torch.stack(sums).sum() if sums else rows.sum() * 0, count=count)
    kind = rows.device.type
    if torch.is_autocast_enabled(kind):
        dtype = torch.get_autocast_dtype(kind)
        rows = rows.to(dtype)
    total = _TiledHead.apply(rows, weight, bias, targets, ignore_index, tile, _graph_link(rows, weight, bias))
    return Loss(sum=cast("Tensor", total), count=count)


def _loss_sum_in_place(logits: Tensor, labels: Tensor, ignore_index: int) -> Tensor:
    if not logits.requires_grad:
        return _loss_sum(logits, labels, ignore_index)
    return cast("Tensor", _CrossEntropyInPlace.apply(logits, labels, ignore_index))


def cross_entropy(  # noqa: PLR0913 - torch's own signature, and `place`
    input: Tensor,  # noqa: A002 - torch's own name for it
    target: Tensor,
    weight: Tensor | None = None,
    size_average: bool | None = None,
    ignore_index: int = -100,
    reduce: bool | None = None,
    reduction: str = "mean",
    label_smoothing: float = 0.0,
    *,
    place: Callable[[Tensor], Tensor],
) -> Tensor | None:
    """Replace `torch.nn.functional.cross_entropy` for large logits, with less memory traffic.

    The log-probabilities are not kept. Log-probabilities and probabilities stay in cache until they are summed or have
    become the gradient.

    Args:
        input: Logits, shape ``(targets, vocabulary)``; other shapes are not supported.
        target: Labels, shape ``(targets,)``, int64; other shapes and dtypes are not supported.
        weight: Only `None` is supported.
        size_average: Only `None` is supported.
        ignore_index: Label of targets that do not count.
        reduce: Only `None` is supported.
        reduction: ``"sum"`` or ``"mean"``; others are not supported.
        label_smoothing: Only 0 is supported.
        place: Returns the memory for the gradient of the logits: ``place(logits)``, which may be the logits' own
            memory.

    Returns:
        The result of torch's own function, shape ``()``; `None` if this call is not supported.

    Cost:
        Keeps the logits in their own dtype. Their gradient overwrites them, or takes as much memory again if other code
        holds the logits. Nothing else is as large as the logits.
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
    total = cast("Tensor", _CrossEntropy.apply(input, target, ignore_index, place))
    return total if reduction == "sum" else total / (target != ignore_index).sum()


class _CrossEntropy(torch.autograd.Function):
    """Summed cross-entropy of logits that other code may use too."""

    @staticmethod
    def forward(
        ctx: Any, logits: Tensor, labels: Tensor, ignore_index: int, place: Callable[[Tensor], Tensor]
    ) -> Tensor:
        ctx.save_for_backward(logits, labels)
        ctx.ignore_index, ctx.place = ignore_index, place
        return _loss_sum(logits, labels, ignore_index)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        logits, labels = ctx.saved_tensors
        if torch.is_grad_enabled():  # create_graph=True: the gradient needs a graph of its own
            counted = (labels != ctx.ignore_index).unsqueeze(1)
            wide = logits.to(torch.promote_types(logits.dtype, torch.float32))
            of_labels = torch.zeros_like(wide).scatter_(1, torch.where(counted, labels.unsqueeze(1), 0), 1)
            full_gradient = torch.where(counted, wide.softmax(1) - of_labels, 0) * grads[0]
            return full_gradient.to(logits.dtype), None, None, None
        out = ctx.place(logits)
        _write_gradient_(out, logits, labels, ctx.ignore_index, weight=grads[0])
        return out, None, None, None


class _CrossEntropyInPlace(torch.autograd.Function):
    """Summed cross-entropy of logits that no other code uses, so that backward overwrites them with their gradient."""

    @staticmethod
    def forward(ctx: Any, logits: Tensor, labels: Tensor, ignore_index: int) -> Tensor:
        ctx.save_for_backward(logits, labels)
        ctx.ignore_index = ignore_index
        ctx.overwritten_version = math.inf
        return _loss_sum(logits, labels, ignore_index)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        logits, labels = ctx.saved_tensors
        # Torch refuses overwritten logits by itself, but not if a hook for saved tensors returned them. Logits that
        # were computed or loaded again have the version that the first ones had before backward.
        if not torch.compiler.is_compiling():
            if logits._version >= ctx.overwritten_version:
                raise RuntimeError(
                    "linear_cross_entropy: the logits needed for this backward were turned into their gradient, "
                    "inplace, by an earlier backward. Compute the loss again, or pass a smaller tile="
                )
            ctx.overwritten_version = logits._version + 1
        with torch.no_grad():
            gradient = logits.detach()
            _write_gradient_(gradient, gradient, labels, ctx.ignore_index, weight=grads[0])
        return *_once_differentiable(gradient, links=(logits, grads[0])), None, None


class _TiledHead(torch.autograd.Function):
    """Linear layer and cross-entropy, tile by tile; forward also computes the gradient of the sum."""

    @staticmethod
    def forward(
        ctx: Any,
        rows: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        labels: Tensor,
        ignore_index: int,
        tile: int,
        link: Tensor,
    ) -> Tensor:
        weight_cast = weight.to(rows.dtype)
        bias_cast = None if bias is None else bias.to(rows.dtype)
        grad_rows = torch.empty_like(rows) if rows.requires_grad else None
        # At least float32, because small summands are rounded away in a sum of many tiles in a narrower dtype.
        grad_weight, grad_bias = (
            torch.zeros_like(each, dtype=torch.promote_types(each.dtype, torch.float32))
            if each is not None and each.requires_grad
            else None
            for each in (weight, bias)
        )
        unit_weight = torch.ones((), device=rows.device)
        sums: list[Tensor] = []
        for at in range(0, len(rows), tile):
            part, labels_of = rows[at : at + tile], labels[at : at + tile]
            logits = F.linear(part, weight_cast, bias_cast)
            sums.append(_loss_sum(logits, labels_of, ignore_index))
            _write_gradient_(logits, logits, labels_of, ignore_index, weight=unit_weight)
            if grad_rows is not None:
                torch.mm(logits, weight_cast, out=grad_rows[at : at + tile])
            if grad_weight is not None:
                add_product_(grad_weight, logits, part)
            if grad_bias is not None:
                grad_bias += logits.sum(0, dtype=grad_bias.dtype)
        grad_weight, grad_bias = (
            made if made is None or each is None else made.to(each.dtype)
            for made, each in ((grad_weight, weight), (grad_bias, bias))
        )
        ctx.save_for_backward(grad_rows, grad_weight, grad_bias, link)
        return torch.stack(sums).sum()

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        *gradients, link = ctx.saved_tensors
        # Out of place, because backward may run through this graph again.
        with torch.no_grad():
            scaled = [None if each is None else each * grads[0].to(each.dtype) for each in gradients]
        return *_once_differentiable(*scaled, links=(link, grads[0])), None, None, None, None


class _OnceDifferentiable(torch.autograd.Function):
    """Pass a gradient through, and raise an error if its own gradient is needed."""

    @staticmethod
    def forward(ctx: Any, gradient: Tensor, *links: Tensor) -> Tensor:
        del ctx, links
        return gradient.view_as(gradient)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> NoReturn:
        del ctx, grads
        raise RuntimeError(
            "linear_cross_entropy cannot be differentiated twice: its backward is once_differentiable; use "
            "torch.nn.functional.cross_entropy for second derivatives"
        )


def _once_differentiable(*gradients: Tensor | None, links: tuple[Tensor, ...]) -> list[Tensor | None]:
    """Return gradients whose own gradient raises an error, for the inputs that the graphs of ``links`` lead to."""
    # Torch's decorator `once_differentiable` raises only if the incoming gradient has a graph, which the gradient of a
    # loss has not, and never for a second derivative that is requested with inputs=.
    if torch.compiler.is_compiling() or not torch.is_grad_enabled():
        return list(gradients)
    return [None if each is None else cast("Tensor", _OnceDifferentiable.apply(each, *links)) for each in gradients]


def _graph_link(*tensors: Tensor | None) -> Tensor:
    """Return a 0-d tensor whose graph leads to all these tensors, without keeping them in memory."""
    return torch.stack([each[:0].sum(dtype=torch.float32) for each in tensors if each is not None]).sum()


def _loss_sum(logits: Tensor, labels: Tensor, ignore_index: int) -> Tensor:
    """Return the summed cross-entropy; shape ``()``, at least float32."""
    dtype = torch.promote_types(logits.dtype, torch.float32)
    counted = labels != ignore_index
    at = torch.where(counted, labels, 0).unsqueeze(1)
    # Torch's kernel for whole rows is the fastest; its result is read part by part, while a part is in cache.
    of_labels = [part.log_softmax(1, dtype).gather(1, where) for part, where in _split_to_cache(logits, at)]
    return -torch.where(counted, torch.cat(of_labels).squeeze(1), 0).sum()


def _write_gradient_(out: Tensor, logits: Tensor, labels: Tensor, ignore_index: int, *, weight: Tensor) -> None:
    """Write ``weight * (softmax - onehot)`` to ``out``, which may be ``logits``; rows that do not count get 0."""
    dtype = torch.promote_types(logits.dtype, torch.float32)
    counted = labels != ignore_index
    factor = torch.where(counted, weight.to(dtype), 0).unsqueeze(1)
    at = torch.where(counted, labels, 0).unsqueeze(1)
    for out_part, part, where, each in _split_to_cache(out, logits, at, factor):
        probabilities = torch.softmax(part, 1, dtype)
        of_labels = (probabilities.gather(1, where) - 1) * each
        torch.mul(probabilities, each, out=out_part).scatter_(1, where, of_labels.to(out_part.dtype))


def _split_to_cache(logits: Tensor, *others: Tensor) -> Iterator[tuple[Tensor, ...]]:
    """Split several tensors alike into parts of rows that fit in cache together."""
    rows_per_part, threads = max(1, _IN_CACHE // max(1, logits.shape[1])), torch.get_num_threads()
    if rows_per_part > threads:  # each thread takes whole rows: two threads need as long for five rows as for six
        rows_per_part -= rows_per_part % threads
    return zip(*(each.split(rows_per_part) for each in (logits, *others)), strict=True)


def _check(hidden: Tensor, weight: Tensor, labels: Tensor, tile: int | None) -> int:
    for name, value in [("hidden", hidden), ("weight", weight), ("labels", labels)]:
        if not isinstance(value, Tensor):
            raise LossError(f"linear_cross_entropy: {name} must be a tensor, not {kind_of(value)}")
    if weight.ndim != 2 or not hidden.ndim or hidden.shape[-1] != weight.shape[1] or hidden.shape[:-1] != labels.shape:
        raise LossError(
            f"linear_cross_entropy: hidden {tuple(hidden.shape)}, weight {tuple(weight.shape)} and labels "
            f"{tuple(labels.shape)} do not fit; pass the shapes (..., width), (vocabulary, width) and (...)"
        )
    if labels.dtype != torch.int64 or not hidden.dtype.is_floating_point:
        raise LossError(
            f"linear_cross_entropy: labels must be int64 and hidden floating point, not {labels.dtype}, {hidden.dtype}"
        )
    tokens = weight.shape[1] if tile is None else whole(tile, least=1)
    if tokens is None or tokens >= 1 << 63:
        raise LossError(f"linear_cross_entropy: tile must be a whole number and at least 1 token, not {str(tile)[:30]}")
    return tokens
