"""One's own statistics over the effective batch, from inside of a model or a loss function."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, TypeAlias

import torch
from torch import Tensor
from torch.overrides import handle_torch_function, has_torch_function_unary

from microbatch.errors import BatchStatisticsError
from microbatch.loss.caller import caller
from microbatch.loss.loss import Count, wide_dtype
from microbatch.loss.rank_stats import Across
from microbatch.loss.round_robin import Call, Rule, Seat, Topic


def batch_mean(x: Tensor, *, count: Count | None = None) -> Tensor:
    """Turn a mean over a microbatch into the mean over the effective batch.

    Under ``batch_norm="exact"`` every microbatch brings its own mean, and is given ``sum_i c_i x_i / sum_i c_i``, the
    gradient of all included. Anywhere else there is one batch, and its mean is the mean: ``x`` comes back as it is.

    Args:
        x: A mean over the rows of this microbatch, or over ``count`` things in it; of any shape, the same in every
            microbatch.
        count: What it is a mean over; by default this microbatch's rows. Where it may be 0, bring sums instead:
            ``batch_sum(total) / batch_sum(count)``, because a mean over nothing is NaN, and so is its gradient.

    Returns:
        The mean over the effective batch; shape and dtype of ``x``.

    Raises:
        BatchStatisticsError: The microbatches do not all come here, or bring other shapes.

    Cost:
        One meeting of the microbatches; nothing elsewhere.

    Example:
        >>> x = torch.tensor([1.0, 2.0])
        >>> batch_mean(x) is x
        True

    Source:
        Law C4.
    """
    if has_torch_function_unary(x):
        return handle_torch_function(batch_mean, (x,), x, count=count)
    return x


def batch_sum(x: Tensor) -> Tensor:
    """Turn a sum over a microbatch into the sum over the effective batch.

    Args:
        x: A sum over this microbatch; of any shape, the same in every microbatch.

    Returns:
        Under ``batch_norm="exact"`` the sum of what all microbatches brought, with the gradient of all; elsewhere
        ``x`` itself. Shape and dtype of ``x``.

    Raises:
        BatchStatisticsError: The microbatches do not all come here, or bring other shapes.

    Cost:
        One meeting of the microbatches; nothing elsewhere.

    Source:
        Law C4.
    """
    if has_torch_function_unary(x):
        return handle_torch_function(batch_sum, (x,), x)
    return x


def batch_gather(x: Tensor) -> Tensor:
    """Turn a microbatch's rows into the effective batch's.

    Args:
        x: Shape ``(rows, ...)``; what comes after the rows is the same in every microbatch.

    Returns:
        Under ``batch_norm="exact"`` the rows of all microbatches, in their order, with the gradient of all; elsewhere
        ``x`` itself. Shape ``(all rows, ...)``, dtype of ``x``.

    Raises:
        BatchStatisticsError: The microbatches do not all come here, or bring other shapes.

    Cost:
        One meeting of the microbatches, and the memory of all rows, once; nothing elsewhere.

    Source:
        Law C4.
    """
    if has_torch_function_unary(x):
        return handle_torch_function(batch_gather, (x,), x)
    return x


def sharing_rules(rows: Sequence[float], across: Across | None) -> dict[Any, Rule]:
    """Return what to call in the place of these functions in a lockstep.

    Args:
        rows: Of each microbatch.
        across: The other ranks, whose microbatches are part of the batch; `None` if there are none.

    Returns:
        The rules, by function.
    """
    merges = {batch_mean: _mean, batch_sum: _sum, batch_gather: _gather}
    return {func: partial(_share, merge=merge, rows=rows, across=across) for func, merge in merges.items()}


_Merge: TypeAlias = Callable[..., Tensor]


def _share(seat: Seat, call: Call, *, merge: _Merge, rows: Sequence[float], across: Across | None) -> Tensor:
    x: Tensor = call.args[0]
    count = call.kwargs.get("count")
    what, place = call.func.__name__, caller()
    together = partial(_together, merge=merge, across=across, what=what, place=place)
    brought = (x, rows[seat.index] if count is None else count)
    return seat.meet(Topic(what, place, together), brought, graph=[x] if x.requires_grad else [])


def _together(
    parts: Sequence[tuple[Tensor, Count]], *, merge: _Merge, across: Across | None, what: str, place: str
) -> Tensor:
    tensors = [x for x, _ in parts]
    rows = merge is _gather
    if len({tuple(x.shape[1:] if rows else x.shape) for x in tensors}) > 1 or (rows and not tensors[0].dim()):
        raise BatchStatisticsError(
            f"at {place} microbatches brought tensors of the shapes {', '.join(str(tuple(x.shape)) for x in tensors)} "
            f"to {what}; " + ("all but their rows must be the same" if rows else "they must be the same")
        )
    found = merge(tensors, [count for _, count in parts], what=f"{what} at {place}", across=across)
    return found.to(tensors[0].dtype)


def _mean(tensors: Sequence[Tensor], counts: Sequence[Count], *, what: str, across: Across | None) -> Tensor:
    stacked = _wide(torch.stack(list(tensors)))
    known = [torch.as_tensor(count, device=stacked.device).detach().to(stacked.dtype) for count in counts]
    weights = torch.stack(known)
    mean = (stacked * (weights / weights.sum()).view(-1, *[1] * (stacked.dim() - 1))).sum(0)
    return mean if across is None else across.mean(mean, weights.sum(), what=what)


def _sum(tensors: Sequence[Tensor], counts: Sequence[Count], *, what: str, across: Across | None) -> Tensor:
    del counts
    total = _wide(torch.stack(list(tensors))).sum(0)
    return total if across is None else across.total(total, what)


def _gather(tensors: Sequence[Tensor], counts: Sequence[Count], *, what: str, across: Across | None) -> Tensor:
    del counts
    rows = torch.cat(list(tensors))
    return rows if across is None else across.gather(rows, what)


def _wide(x: Tensor) -> Tensor:
    return x.to(torch.promote_types(x.dtype, wide_dtype(x.device))) if x.is_floating_point() else x
