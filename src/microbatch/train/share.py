"""Which part of a batch, and of the held-out set, is a rank's: the parts together are the whole, however many."""

from __future__ import annotations


def share(rows: int, *, ranks: int, rank: int, unit: int = 1) -> range:
    """Name a rank's rows of a batch.

    Rows are dealt in contiguous runs whose lengths differ by one unit at most, so the batch, put together in the order
    of the ranks, is the same for any number of them. With more ranks than units some have none.

    Args:
        rows: Rows of the batch; 0 or more.
        ranks: How many share it.
        rank: Which one, from 0.
        unit: Rows that stay together: those of one virtual microbatch, where these must not depend on the ranks.

    Returns:
        Its rows.

    Example:
        >>> [len(share(10, ranks=4, rank=rank)) for rank in range(4)]
        [2, 3, 2, 3]
        >>> [list(share(5, ranks=2, rank=rank, unit=2)) for rank in range(2)]
        [[0, 1], [2, 3, 4]]
    """
    units = -(-rows // unit)
    return range(min(units * rank // ranks * unit, rows), min(units * (rank + 1) // ranks * unit, rows))
