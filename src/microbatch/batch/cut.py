"""Cut a batch into microbatches of a fixed number of rows."""

from __future__ import annotations

from typing import Any, SupportsIndex

from microbatch.arguments import whole
from microbatch.batch.batch_tree import rows_of, slice_rows
from microbatch.errors import ConfigError, EmptyBatchError


def cut(batch: object, microbatch_size: SupportsIndex) -> list[Any]:
    """Cut a batch into microbatches of ``microbatch_size`` rows; the last microbatch may be shorter.

    Rows keep their order, and every row is in exactly one microbatch. So a sum over the microbatches is the sum over
    the batch.

    Args:
        batch: Nested dict, list, tuple, named tuple, dataclass or Mapping whose tensors have shape ``(rows, ...)``. 0-d
            tensors, numbers, strings and `None` belong to the whole batch, and every microbatch gets them. Mark other
            values without rows with `Whole`; rows in another dimension, several entries per row, and a list with one
            item per row with `Rows`. A list or a tuple of strings has one for each row. See ``docs/batches.md``.
        microbatch_size: Rows of a microbatch; at least 1. A size larger than the batch gives one microbatch.

    Returns:
        ``ceil(rows / microbatch_size)`` structures of the batch's types, whose tensors are views.

    Raises:
        ConfigError: ``microbatch_size`` is not a whole number of at least 1.
        BatchError: Nothing in the batch has rows, or a value cannot be sliced by rows, or can be read in two ways.
        RowsDisagreeError: Two values have different numbers of rows.
        EmptyBatchError: The batch has 0 rows.

    Cost:
        No tensor is copied.

    Example:
        >>> import torch
        >>> [len(piece["x"]) for piece in cut({"x": torch.arange(7), "scale": 2.0}, 3)]
        [3, 3, 1]
    """
    microbatch_size = check_microbatch_size(microbatch_size)
    rows = rows_of(batch)
    if rows == 0:
        raise EmptyBatchError("the batch has 0 rows; skip empty batches before they reach the training step")
    return [
        slice_rows(batch, start, min(start + microbatch_size, rows), rows=rows)
        for start in range(0, rows, microbatch_size)
    ]


def check_microbatch_size(size: object, alternative: str = "") -> int:
    """Return a microbatch size as an int; refuse what is no whole number of at least 1."""
    number = whole(size, least=1)
    if number is None:
        raise ConfigError(f"microbatch_size must be a whole number of at least 1{alternative}, not {size!r}")
    return number
