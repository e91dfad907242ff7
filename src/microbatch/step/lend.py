"""Rows for passes that count for nothing, of this rank's own or of another's."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from microbatch.batch.batch_tree import map_tensors, rows_of, slice_rows
from microbatch.ranks.process_group import Ranks

_FEW = 2  # of one, batch normalisation has no variance


def few_of(batch: Any) -> Any:
    """Take a few rows of a batch.

    Args:
        batch: With one row or more.

    Returns:
        The first of them, as views.
    """
    rows = rows_of(batch)
    return slice_rows(batch, 0, min(_FEW, rows), rows=rows)


def lend(ranks: Ranks, batch: Any, *, microbatches: Sequence[float]) -> Any:
    """Give every rank a few rows of the first that has any.

    Args:
        ranks: All of which call this.
        batch: This rank's.
        microbatches: How many each rank has.

    Returns:
        The rows, on the host.

    Cost:
        Two small all-gathers.
    """
    lender = next(index for index, number in enumerate(microbatches) if number)
    given = map_tensors(lambda each: each.cpu(), few_of(batch)) if ranks.index == lender else None
    return ranks.tell(given)[lender]
