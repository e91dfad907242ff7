"""Compute a mean, sum or concatenation over the effective batch, called inside a model or a loss function."""

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
from microbatch.loss.round_robin import Call, Rule, Seat, SyncPoint


def batch_mean(x: Tensor, *, count: Count | None = None) -> Tensor:
    """Turn the mean over a microbatch into the mean over the effective batch.

    Under ``batch_norm="exact"``, every microbatch contributes its own mean ``x_i``, and each one gets
    ``sum_i c_i x_i / sum_i c_i`` with the complete gradient. In every other case the function returns ``x`` unchanged.

    Args:
        x: A mean over this microbatch's rows, or over ``count`` other items in it; any shape, the same in every
            microbatch.
        count: Number of items that ``x`` is a mean over; by default the number of this microbatch's rows. Where the
            number may be 0, use ``batch_sum(total) / batch_sum(count)`` instead: a mean over nothing is NaN, and so is
            its gradient.

    Returns:
        The mean over the effective batch; shape and dtype of ``x``.

    Raises:
        BatchStatisticsError: Not every microbatch calls this function at this point, or their shapes differ.

    Cost:
        One sync point of all microbatches under ``batch_norm="exact"``; nothing otherwise.

    Example:
        >>> x = torch.tensor([1.0, 2.0])
        >>> batch_mean(x) is x
        True
    """
    if has_torch_function_unary(x):
        return handle_torch_function(batch_mean, (x,), x, count=count)
    return x


def batch_sum(x: Tensor) -> Tensor:
    """Turn the sum over a microbatch into the sum over the effective batch.

    Args:
        x: A sum over this microbatch; any shape, the same in every microbatch.

    Returns:
        Under ``batch_norm="exact"`` the sum over all microbatches, with the complete gradient; otherwise ``x`` itself.
        Shape and dtype of ``x``.

    Raises:
        BatchStatisticsError: Not every microbatch calls this function at this point, or their shapes differ.

    Cost:
        One sync point of all microbatches under ``batch_norm="exact"``; nothing otherwise.

    Example:
        >>> x = torch.tensor([3.0])
        >>> batch_sum(x) is x  # outside of a window, the microbatch is the whole batch
        True
    """
    if has_torch_function_unary(x):
        return handle_torch_function(batch_sum, (x,), x)
    return x


def batch_gather(x: Tensor) -> Tensor:
    """Concatenate the rows of all microbatches of the effective batch.

    Args:
        x: This microbatch's rows; shape ``(rows, ...)``. The other dimensions are the same in every microbatch.

    Returns:
        Under ``batch_norm="exact"`` the rows of all microbatches in the batch's order, with the complete gradient;
        otherwise ``x`` itself. Shape ``(all rows, ...)``, dtype of ``x``.

    Raises:
        BatchStatisticsError: Not every microbatch calls this function at this point, or their shapes differ.

    Cost:
        One sync point of all microbatches and the memory of all rows, once, under ``batch_norm="exact"``; nothing
        otherwise.

    Example:
        >>> x = torch.ones(2, 3)
        >>> batch_gather(x) is x  # outside of a window, the microbatch is the whole batch
        True
    """
    if has_torch_function_unary(x):
        return handle_torch_function(batch_gather, (x,), x)
    return x


def sharing_rules(rows: Sequence[float], across: Across | None) -> dict[Any, Rule]:
    """Return the rules that replace `batch_mean`, `batch_sum` and `batch_gather` in a lockstep, over all ranks."""
    merges = {batch_mean: _mean, batch_sum: _sum, batch_gather: _gather}
    return {func: partial(_reduce, merge=merge, rows=rows, across=across) for func, merge in merges.items()}


_MergeFunction: TypeAlias = Callable[..., Tensor]


def _reduce(seat: Seat, call: Call, *, merge: _MergeFunction, rows: Sequence[float], across: Across | None) -> Tensor:
    """Contribute this microbatch's tensor to the reduction, and return the reduced tensor."""
    x: Tensor = call.args[0]
    count = call.kwargs.get("count")
    what, place = call.func.__name__, caller()
    merge_all = partial(_merge_contributions, merge=merge, across=across, what=what, place=place)
    contribution = (x, rows[seat.index] if count is None else count)
    return seat.sync(SyncPoint(what, place, merge_all), contribution, graph=[x] if x.requires_grad else [])


def _merge_contributions(
    parts: Sequence[tuple[Tensor, Count]], *, merge: _MergeFunction, across: Across | None, what: str, place: str
) -> Tensor:
    """Check the shapes of all contributions, and merge the contributions in the dtype of the first one."""
    tensors = [x for x, _ in parts]
    rows = merge is _gather
    if len({tuple(x.shape[1:] if rows else x.shape) for x in tensors}) > 1 or (rows and not tensors[0].dim()):
        raise BatchStatisticsError(
            f"at {place} the microbatches called {what} with tensors of the shapes "
            f"{', '.join(str(tuple(x.shape)) for x in tensors)}; "
            + ("all dimensions but the rows must be the same" if rows else "the shapes must be the same")
        )
    merged = merge(tensors, [count for _, count in parts], what=f"{what} at {place}", across=across)
    return merged.to(tensors[0].dtype)


def _mean(tensors: Sequence[Tensor], counts: Sequence[Count], *, what: str, across: Across | None) -> Tensor:
    stacked = _wide(torch.stack(list(tensors)))
    weights_of_parts = [torch.as_tensor(count, device=stacked.device).detach().to(stacked.dtype) for count in counts]
    weights = torch.stack(weights_of_parts)
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
