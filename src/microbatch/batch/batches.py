"""One effective batch that is given as several collated batches."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from microbatch.errors import BatchError


@dataclass(frozen=True, slots=True)
class Batches:
    """Join several collated batches to one effective batch, without padding them to one length.

    Each of them is cut into microbatches by itself, so a microbatch has rows of one of them, and its padding. The
    gradient is that of all their rows together.

    Attributes:
        batches: What `cut` accepts, at least one; each has its own number of rows, columns and padding.

    Raises:
        BatchError: There is none.

    Example:
        >>> import torch
        >>> from microbatch.batch.batch_tree import rows_of
        >>> rows_of(Batches([{"ids": torch.zeros(4, 7)}, {"ids": torch.zeros(2, 30)}]))
        6

    Source:
        Whatever the cut, the sums over microbatches are the sums over the rows.
    """

    batches: Sequence[Any]

    def __post_init__(self) -> None:
        """Refuse what could only fail later."""
        if not isinstance(self.batches, list | tuple) or not self.batches:
            raise BatchError(f"mb.Batches takes a list of one or more batches, not {self.batches!r:.200}")


def parts_of(batch: object) -> Sequence[Any]:
    """Return the batches of `Batches`, or another batch alone."""
    return batch.batches if isinstance(batch, Batches) else [batch]
