"""Cut a batch into microbatches."""

from __future__ import annotations

from typing import Any

from microbatch.batch.batch_tree import rows_of, slice_rows
from microbatch.errors import ConfigError, EmptyBatchError


def cut(batch: object, microbatch_size: int) -> list[Any]:
    """Cut a batch into microbatches of ``microbatch_size`` rows, the last one shorter if it does not divide.

    Rows keep their order, and every row is in exactly one microbatch, so sums over the microbatches are sums over
    the batch.

    Args:
        batch: Nested dict, list, tuple, named tuple, dataclass or Mapping whose tensors have shape ``(rows, ...)``.
            0-d tensors, numbers, texts and `None` belong to the whole batch and are given to every microbatch;
            `Whole` says so of other tensors, and `Rows` marks a list that holds one item per row. Lists of plain
            values (and tuples of texts) as long as the batch has rows are sliced with it.
        microbatch_size: Rows of a microbatch; at least 1. More than the batch has gives one microbatch.

    Returns:
        ``ceil(rows / microbatch_size)`` structures of the batch's own types, holding views.

    Raises:
        ConfigError: ``microbatch_size`` is not a whole number of at least 1.
        BatchError: Nothing in the batch has rows, or a tensor in it cannot be sliced by rows.
        RowsDisagreeError: Two tensors have different numbers of rows.
        EmptyBatchError: The batch has 0 rows.

    Cost:
        No tensor is copied.

    Example:
        >>> import torch
        >>> [len(piece["x"]) for piece in cut({"x": torch.arange(7), "scale": 2.0}, 3)]
        [3, 3, 1]

    Source:
        Law N8.
    """
    check_microbatch_size(microbatch_size)
    rows = rows_of(batch)
    if rows == 0:
        raise EmptyBatchError("the batch has 0 rows; skip empty batches before they reach the training step")
    return [
        slice_rows(batch, start, min(start + microbatch_size, rows), rows=rows)
        for start in range(0, rows, microbatch_size)
    ]


def check_microbatch_size(size: object) -> None:
    """Refuse a microbatch size that is not a whole number of at least 1.

    Args:
        size: What the user gave.

    Raises:
        ConfigError: It cannot be a number of rows.
    """
    if isinstance(size, bool) or not isinstance(size, int) or size < 1:
        raise ConfigError(f"microbatch_size must be a whole number of at least 1, not {size!r}")
