"""Data that is read in its own order: an iterable data set, or a loader of collated batches."""

from __future__ import annotations

import inspect
import itertools
from collections.abc import Iterator, Sequence
from typing import Any, TypeGuard, cast

import torch
from torch import Tensor
from torch.utils._pytree import tree_map
from torch.utils.data import DataLoader, IterableDataset

from microbatch.batch.batch_tree import rows_of, slice_rows
from microbatch.batch.batches import Batches
from microbatch.errors import DataError


def is_stream(data: object) -> TypeGuard[IterableDataset[Any] | DataLoader[Any]]:
    """Return whether data is read in its own order, and not by the numbers of its samples.

    Args:
        data: The data of a job.

    Returns:
        True for an `IterableDataset`, a `DataLoader` (a ``StatefulDataLoader`` is one), and other objects that can be
        iterated but not indexed.
    """
    if isinstance(data, IterableDataset | DataLoader):
        return True
    return hasattr(data, "__iter__") and not hasattr(data, "__getitem__")


def samples_in(data: Any) -> int:
    """Count the samples of one pass over a stream.

    Args:
        data: The stream.

    Returns:
        The number of samples; 0 if it is not known.
    """
    source: Any = data.dataset if isinstance(data, DataLoader) else data
    try:
        return len(source)
    except TypeError:
        return 0


class Stream:
    """Read a stream in pieces of one effective batch.

    A pass over the stream is an epoch, and a piece never crosses its end: the last one of an epoch may be short. Before
    each epoch, ``set_epoch(epoch)`` is called where the stream or its sampler has it.

    Args:
        data: An iterable of samples, or a `DataLoader` of collated batches.
        rows: Rows of an effective batch. The batches of a loader must add up to it.
    """

    def __init__(self, data: Any, *, rows: int) -> None:
        self._data, self._rows = data, rows
        self._collated = isinstance(data, DataLoader)
        self._iterator: Iterator[Any] | None = None
        self._epoch = -1

    @property
    def has_state(self) -> bool:
        """Whether the stream itself can go on where it stood."""
        return all(callable(getattr(self._data, name, None)) for name in ("state_dict", "load_state_dict"))

    def state(self) -> dict[str, Any] | None:
        """Return where the stream stands; `None` if it cannot tell."""
        # Between two epochs as well: the state of a loader that shuffles decides the next order.
        return self._data.state_dict() if self.has_state else None

    def load(self, state: dict[str, Any], *, epoch: int) -> None:
        """Go on where the stream stood.

        Args:
            state: The result of `state`.
            epoch: The epoch it was in.
        """
        self._begin(epoch, state)

    def take(self, epoch: int) -> tuple[list[Any], int, bool]:
        """Read the next piece.

        Args:
            epoch: Number of complete passes before this one.

        Returns:
            Samples, or collated batches; their rows together; and whether the pass has ended with them. No rows if it
            had ended before.

        Raises:
            DataError: The batches of a loader do not add up to an effective batch.
        """
        if self._iterator is None or self._epoch != epoch:
            self._begin(epoch)
        iterator = cast("Iterator[Any]", self._iterator)
        if self._collated:
            items, rows = self._batches(iterator)
        else:
            items = list(itertools.islice(iterator, self._rows))
            rows = len(items)
        ended = rows < self._rows
        if ended:
            self._iterator = None
        return items, rows, ended

    def _batches(self, iterator: Iterator[Any]) -> tuple[list[Any], int]:
        items, rows = list[Any](), 0
        while rows < self._rows and (item := next(iterator, _END)) is not _END:
            items.append(item)
            rows += rows_of(item)
        if rows > self._rows:
            raise DataError(
                f"the job's batch_size is {self._rows}, and its loader's batches have {rows_of(items[0])} rows, which "
                "do not add up to it. Use a batch_size of the job that is a multiple of the loader's"
            )
        return items, rows

    def _begin(self, epoch: int, state: dict[str, Any] | None = None) -> None:
        """Begin a pass over the data, or go on with one from a state."""
        for holder in (self._data, getattr(self._data, "sampler", None), getattr(self._data, "dataset", None)):
            set_epoch: Any = getattr(holder, "set_epoch", None)
            if inspect.ismethod(set_epoch):
                set_epoch(epoch)
        if state is not None:
            self._data.load_state_dict(state)
        self._iterator, self._epoch = iter(self._data), epoch


_END = object()


def joined(batch: Any) -> Any:
    """Join several collated batches into one, for what needs the whole batch at once.

    Args:
        batch: A batch, or `Batches`.

    Returns:
        The batch; of `Batches` whose tensors differ in more than their rows, such as in their padding, the first alone.
    """
    if not isinstance(batch, Batches):
        return batch
    try:
        return tree_map(_concatenated, *batch.batches)
    except (RuntimeError, TypeError, ValueError):
        return batch.batches[0]


def _concatenated(*leaves: Any) -> Any:
    return torch.cat(leaves) if isinstance(leaves[0], Tensor) and leaves[0].ndim else leaves[0]


def rows_taken(job: Any, items: Sequence[Any], own: range) -> Any:
    """Make the batch of some of the rows that a stream gave.

    Args:
        job: The job; its ``collate`` turns samples into a batch.
        items: Samples, or the collated batches of a loader.
        own: The rows.

    Returns:
        A batch; `Batches` for several collated batches. Without rows, a batch of the same form with no rows.
    """
    if not isinstance(job.data, DataLoader):
        if own:
            return job.collate([items[row] for row in own])
        return slice_rows(job.collate(list(items[:1])), 0, 0, rows=1)
    parts, start = list[Any](), 0
    for item in items:
        rows = rows_of(item)
        first, last = max(own.start - start, 0), min(own.stop - start, rows)
        if first < last:
            parts.append(item if last - first == rows else slice_rows(item, first, last, rows=rows))
        start += rows
    if not parts:
        return slice_rows(items[0], 0, 0, rows=rows_of(items[0]))
    return parts[0] if len(parts) == 1 else Batches(parts)
