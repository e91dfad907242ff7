"""Rows for dummy passes, from this rank's batch or from another rank's."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from microbatch.batch.batch_tree import map_tensors, rows_of, slice_rows, unmarked
from microbatch.batch.batches import parts_of
from microbatch.errors import BatchError
from microbatch.ranks.process_group import RankGroup

_FEW = 2  # one row has no variance for batch normalisation


def few_of(batch: Any) -> Any:
    """Copy the first two rows of a batch, or its only one; of a loader's microbatches, return the first."""
    parts = parts_of(batch)
    try:
        part = next(part for part in parts if rows_of(part))
        rows = rows_of(part)
    except BatchError:
        return unmarked(parts[0])
    return map_tensors(torch.clone, slice_rows(part, 0, min(_FEW, rows), rows=rows))


def borrow_rows(ranks: RankGroup, batch: Any, *, microbatches: Sequence[float]) -> Any:
    """Send the first rows of the first rank that has microbatches to every rank, on the host."""
    lender = next(index for index, number in enumerate(microbatches) if number)
    given = map_tensors(lambda each: each.cpu(), few_of(batch)) if ranks.index == lender else None
    return ranks.tell(given)[lender]
