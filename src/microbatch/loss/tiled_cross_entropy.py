"""Loss heads for large vocabularies: the logits are never held whole."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from typing import Any, NoReturn, cast

import torch
import torch.nn.functional as F
from torch import Tensor

from microbatch.errors import LossError
from microbatch.loss.loss import Loss
from microbatch.products import add_product_

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
        gradient of the weight, in float32 at least. No host synchronisation. A second derivative is refused, and so
        is a second backward through the graph of a single tile, whose logits the first has overwritten.

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
    total = _Tiles.apply(rows, weight, bias, targets, ignore_index, tile, _link(rows, weight, bias))
    return Loss(sum=cast("Tensor", total), count=count)


def _sum_of(logits: Tensor, labels: Tensor, ignore_index: int) -> Tensor:
    if not logits.requires_grad:
        return _sum(logits, labels, ignore_index)
    return cast("Tensor", _InPlace.apply(logits, labels, ignore_index))


def cross_entropy(  # noqa: PLR0913 - torch's own signature, and where to put the gradient
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
        place: Finds memory for the gradient: ``place(logits)``, which may be theirs.

    Returns:
        What torch's own function returns; shape ``()``, or `None` if this call is not covered.

    Cost:
        Saves the logits, in their own precision; their gradient takes their place, or as much memory again where
        somebody else holds them; nothing else of their size.
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
    total = cast("Tensor", _OutOfPlace.apply(input, target, ignore_index, place))
    return total if reduction == "sum" else total / (target != ignore_index).sum()


class _OutOfPlace(torch.autograd.Function):
    """Cross-entropy of logits that others may look at."""

    @staticmethod
    def forward(
        ctx: Any, logits: Tensor, labels: Tensor, ignore_index: int, place: Callable[[Tensor], Tensor]
    ) -> Tensor:
        ctx.save_for_backward(logits, labels)
        ctx.ignore_index, ctx.place = ignore_index, place
        return _sum(logits, labels, ignore_index)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        logits, labels = ctx.saved_tensors
        if torch.is_grad_enabled():  # a second derivative is asked for, so this has to have a graph of its own
            counted = (labels != ctx.ignore_index).unsqueeze(1)
            wide = logits.to(torch.promote_types(logits.dtype, torch.float32))
            chosen = torch.zeros_like(wide).scatter_(1, torch.where(counted, labels.unsqueeze(1), 0), 1)
            whole = torch.where(counted, wide.softmax(1) - chosen, 0) * grads[0]
            return whole.to(logits.dtype), None, None, None
        out = ctx.place(logits)
        _to_gradient_(out, logits, labels, ctx.ignore_index, weight=grads[0])
        return out, None, None, None


class _InPlace(torch.autograd.Function):
    """Cross-entropy of logits that nobody else sees, so that backward may overwrite them with their gradient."""

    @staticmethod
    def forward(ctx: Any, logits: Tensor, labels: Tensor, ignore_index: int) -> Tensor:
        ctx.save_for_backward(logits, labels)
        ctx.ignore_index = ignore_index
        ctx.spent = math.inf
        return _sum(logits, labels, ignore_index)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        logits, labels = ctx.saved_tensors
        # torch itself refuses logits that were overwritten, but not those that a hook on saved tensors gave back.
        # Logits that were computed or copied anew have the version that the first had before backward.
        if not torch.compiler.is_compiling():
            if logits._version >= ctx.spent:
                raise RuntimeError(
                    "linear_cross_entropy: the logits needed for this backward were turned into their gradient, "
                    "inplace, by the one before it; compute the loss again, or give a smaller tile="
                )
            ctx.spent = logits._version + 1
        with torch.no_grad():
            gradient = logits.detach()
            _to_gradient_(gradient, gradient, labels, ctx.ignore_index, weight=grads[0])
        return *_once(gradient, links=(logits, grads[0])), None, None


class _Tiles(torch.autograd.Function):
    """The whole head, tile by tile; the gradient for a loss of weight 1 is made on the way."""

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
        ready = weight.to(rows.dtype)
        ready_bias = None if bias is None else bias.to(rows.dtype)
        grad_rows = torch.empty_like(rows) if rows.requires_grad else None
        # A sum of many tiles stops growing in a narrow precision.
        grad_weight, grad_bias = (
            torch.zeros_like(each, dtype=torch.promote_types(each.dtype, torch.float32))
            if each is not None and each.requires_grad
            else None
            for each in (weight, bias)
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
        # Out of place: the graph may be kept and walked again.
        with torch.no_grad():
            scaled = [None if each is None else each * grads[0].to(each.dtype) for each in gradients]
        return *_once(*scaled, links=(link, grads[0])), None, None, None, None


class _Once(torch.autograd.Function):
    """A gradient as it is, whose own gradient is refused rather than missing."""

    @staticmethod
    def forward(ctx: Any, gradient: Tensor, *links: Tensor) -> Tensor:
        del ctx, links
        return gradient.view_as(gradient)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> NoReturn:
        del ctx, grads
        raise RuntimeError(
            "linear_cross_entropy cannot be differentiated twice: its backward is once_differentiable; use "
            "torch.nn.functional.cross_entropy where second derivatives are needed"
        )


def _once(*gradients: Tensor | None, links: tuple[Tensor, ...]) -> list[Tensor | None]:
    """Refuse second derivatives, if any may be asked for, of gradients whose graph would lead where the links' do."""
    # torch's own decorator, `once_differentiable`, refuses only where the incoming gradient has a graph, which a
    # loss's does not, and not where the second derivative is asked for with inputs=.
    if torch.compiler.is_compiling() or not torch.is_grad_enabled():
        return list(gradients)
    return [None if each is None else cast("Tensor", _Once.apply(each, *links)) for each in gradients]


def _link(*tensors: Tensor | None) -> Tensor:
    """Return a tensor whose graph leads to all of these, and which does not keep them in memory."""
    return torch.stack([each[:0].sum(dtype=torch.float32) for each in tensors if each is not None]).sum()


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
        probabilities = torch.softmax(part, 1, dtype)
        chosen = (probabilities.gather(1, where) - 1) * each
        torch.mul(probabilities, each, out=into).scatter_(1, where, chosen.to(into.dtype))


def _tiles(logits: Tensor, *others: Tensor) -> Iterator[tuple[Tensor, ...]]:
    """Yield rows that fit into cache together, of several tensors alike."""
    step, threads = max(1, _IN_CACHE // max(1, logits.shape[1])), torch.get_num_threads()
    if step > threads:  # a thread takes whole rows: of five, two threads would take as long as of six
        step -= step % threads
    return zip(*(each.split(step) for each in (logits, *others)), strict=True)


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
