"""The sum of sparse gradients over the ranks, which stays sparse."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from microbatch.errors import RankError
from microbatch.ranks.process_group import RankGroup


def reduce_sparse(
    ranks: RankGroup,
    gradients: Sequence[Tensor | None],
    factor: float,
    *,
    like: Sequence[Tensor],
    dtypes: Sequence[torch.dtype],
) -> list[Tensor]:
    """Return for each gradient the sum over all ranks of ``factor * gradient``.

    The ranks gather the indices and values of all ranks, and add up the values of equal indices in the order of the
    ranks. So every rank gets the same bits, and an optimizer such as `SparseAdam` updates the rows that any rank used.

    Args:
        ranks: The data-parallel ranks.
        gradients: Sparse tensors, the same parameters in the same order on every rank; `None` for zero.
        factor: What this rank's gradients are multiplied by.
        like: For each gradient, a tensor of its shape and device.
        dtypes: The dtype of each gradient's values in the sum.

    Returns:
        Coalesced sparse tensors, of the dtypes of ``dtypes``.

    Raises:
        RankError: The ranks' gradients of one parameter have different numbers of sparse dimensions.

    Cost:
        One small all-gather with a host synchronisation; then for each gradient two all-gathers of its indices and
        values, padded to those of the rank with the most rows.
    """
    own = [None if each is None else each.detach().coalesce() for each in gradients]
    sizes = [[0, 0] if each is None else [each.sparse_dim(), each._nnz()] for each in own]
    told = ranks.gather(torch.tensor(sizes, dtype=torch.int64, device=ranks.device))
    found: list[Tensor] = []
    for index, (sizes_of_all, shape) in enumerate(
        zip(zip(*[each.tolist() for each in told], strict=True), like, strict=True)
    ):
        dimensions = {dimension for dimension, number in sizes_of_all if number} or {1}
        if len(dimensions) > 1:
            raise RankError(
                f"the ranks' gradients of a parameter of shape {tuple(shape.shape)} have different numbers of sparse "
                f"dimensions: {sorted(dimensions)}; give every rank the same model"
            )
        numbers = [number for _, number in sizes_of_all]
        found.append(
            _gathered(
                ranks, own[index], factor, like=shape, numbers=numbers, dimension=max(dimensions), dtype=dtypes[index]
            )
        )
    return found


def _gathered(
    ranks: RankGroup,
    own: Tensor | None,
    factor: float,
    *,
    like: Tensor,
    numbers: Sequence[int],
    dimension: int,
    dtype: torch.dtype,
) -> Tensor:
    longest = max(numbers)
    indices = torch.zeros(dimension, longest, dtype=torch.int64, device=like.device)
    values = torch.zeros(longest, *like.shape[dimension:], dtype=dtype, device=like.device)
    if own is not None and own._nnz():
        indices[:, : own._nnz()] = own.indices()
        values[: own._nnz()] = own.values().mul(factor)
    if longest:
        all_indices = [each[:, :number] for each, number in zip(ranks.gather(indices), numbers, strict=True)]
        all_values = [each[:number] for each, number in zip(ranks.gather(values), numbers, strict=True)]
        indices, values = torch.cat(all_indices, dim=1), torch.cat(all_values)
    return torch.sparse_coo_tensor(indices, values, like.shape, check_invariants=False).coalesce()
