"""Count the rows of a batch, and slice or select them."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, TypeAlias, cast

import torch
from torch import Tensor

from microbatch.batch.batches import Batches
from microbatch.batch.copies import Copies, rows_copied
from microbatch.batch.marks import Rows, Whole
from microbatch.batch.recognise import count_rows, entries_of, spread
from microbatch.batch.walk import LISTS, contents, is_array, leaves, map_leaves, map_tensors
from microbatch.errors import BatchError
from microbatch.kind_words import kind_of

__all__ = [
    "Rows",
    "Whole",
    "contents",
    "leaves",
    "map_leaves",
    "map_tensors",
    "rows_of",
    "select",
    "slice_rows",
    "take_rows",
    "unmarked",
]

Pick: TypeAlias = slice | Sequence[int]
"""Rows to take: consecutive ones, or numbers in any order."""


def rows_of(batch: object) -> int:
    """Count the rows of a batch: the size of the first dimension, which all its tensors share.

    Args:
        batch: Nested dict, list, tuple, named tuple, dataclass or Mapping of tensors and NumPy arrays of shape
            ``(rows, ...)``, or of objects that slice themselves. `Rows` marks another layout, `Whole` a value without
            rows. 0-d tensors, numbers and strings belong to the whole batch. A list of strings or of lists has one
            item per row. See ``docs/batches.md``.

    Returns:
        The number of rows; 0 or more.

    Raises:
        BatchError: Nothing in the batch has rows. Or a value cannot be sliced, or can be read in two ways: a list of
            samples, a list of numbers, an object that holds tensors or arrays.
        RowsDisagreeError: Two values have different numbers of rows.

    Example:
        >>> rows_of({"x": torch.zeros(10, 3), "y": torch.zeros(10), "temperature": torch.tensor(0.7)})
        10
    """
    if isinstance(batch, Batches):
        return sum(map(count_rows, batch.batches))
    return count_rows(batch)


def slice_rows(batch: object, start: int, stop: int, *, rows: int, copy_on: torch.device | None = None) -> Any:
    """Slice the rows from ``start`` to ``stop`` of a batch.

    Args:
        batch: A batch as `rows_of` accepts it.
        start: First row, from 0.
        stop: One past the last row.
        rows: ``rows_of(batch)``, counted once by the caller.
        copy_on: Device whose tensors are copied, and the arrays with them, so that the user's function may edit its
            microbatch in place. Tensors on other devices are copied by the move to this device. `None` copies nothing.

    Returns:
        The same structure with sliced tensors, and without the marks `Whole` and `Rows`. A tensor that occurs twice in
        the batch occurs twice in the result.

    Cost:
        Without ``copy_on``, no tensor is copied; with it, the rows are copied once.
    """
    if isinstance(batch, Tensor) and batch.ndim:  # as below, without detours
        return rows_copied(batch, start, stop, device=copy_on)
    return select(batch, slice(start, stop), rows=rows, copied=None if copy_on is None else Copies(copy_on))


def take_rows(batch: object, index: Sequence[int], *, rows: int, marked: bool = False) -> Any:
    """Copy selected rows, in any order and with repetition; ``marked`` keeps `Whole` and `Rows`, to cut again."""
    return select(batch, list(index), rows=rows, marked=marked)


def unmarked(batch: object) -> Any:
    """Return a batch without the marks `Whole` and `Rows`; nothing is copied."""
    return map_leaves(lambda leaf, _: leaf.value if isinstance(leaf, Rows | Whole) else leaf, batch)


def select(
    batch: object,
    pick: Pick,
    *,
    rows: int,
    marked: bool = False,
    copied: Copies | None = None,
    trim: Callable[[Any, str, int], Any] | None = None,
) -> Any:
    """Take rows of a batch.

    Args:
        batch: A batch as `rows_of` accepts it.
        pick: The rows.
        rows: ``rows_of(batch)``.
        marked: Whether marks are kept.
        copied: Copies a value that would share memory with the batch; `None` to share it.
        trim: ``trim(array, path, dim)`` is called with every array and the dimension of its rows, before rows are
            taken; `None` to take all columns.

    Returns:
        The same structure with the rows.
    """
    return map_leaves(_Selection(pick, rows=rows, marked=marked, copied=copied, trim=trim).leaf, batch)


class _Selection:
    """The rows that `select` takes of each leaf; a tensor that occurs twice in the batch is taken once."""

    # A class, and no functions in a function: where annotations are checked, these would be in reference cycles, and
    # keep the microbatch alive.

    def __init__(
        self,
        pick: Pick,
        *,
        rows: int,
        marked: bool,
        copied: Copies | None,
        trim: Callable[[Any, str, int], Any] | None,
    ) -> None:
        self._pick, self._rows, self._marked, self._trim = pick, rows, marked, trim
        self._share = copied or _as_it_is
        self._copy_on = None if copied is None else copied.device
        self._between = (pick.start, pick.stop) if isinstance(pick, slice) else None
        self._taken: dict[Any, Any] = {}

    def leaf(self, value: Any, path: str) -> Any:
        """Return the rows of a leaf, or a leaf without rows as it is."""
        if isinstance(value, Tensor) and value.ndim and self._between:  # the usual case, without detours
            key = id(value)
            if key not in self._taken:
                self._taken[key] = rows_copied(value, *self._between, device=self._copy_on)
            return self._taken[key]
        if isinstance(value, Rows):
            found = self._inside(value, path)
            return Rows(found, value.dim, group=value.group) if self._marked else found
        if isinstance(value, Whole):
            return value if self._marked else self._share(value.value)
        if value is None or isinstance(value, str | int | float):
            return value
        if isinstance(value, LISTS):
            has_rows = len(cast("Sequence[Any]", value)) == self._rows
            return self._take(value, path) if has_rows else self._share(value)
        return self._share(value) if entries_of(value, path) is None else self._take(value, path)

    def _take(self, value: Any, path: str, *, dim: int = 0, group: int = 1) -> Any:
        key = id(value), dim, group
        if key not in self._taken:
            source = self._trim(value, path, dim) if self._trim is not None and is_array(value) else value
            some = taken_from(source, self._pick, path, dim=dim, group=group)
            is_view = self._between is not None or isinstance(value, LISTS)
            self._taken[key] = self._share(some) if is_view else some
        return self._taken[key]

    def _inside(self, mark: Rows, path: str) -> Any:
        """Take rows of a marked value, or of each value of a marked dict or dataclass."""
        places = dict(spread(mark, path))
        if list(places) == [path]:
            return self._take(mark.value, path, dim=mark.dim, group=mark.group)
        return map_leaves(partial(self._inner_leaf, places), mark.value, path, lists=False)

    def _inner_leaf(self, places: dict[str, Rows], value: Any, path: str) -> Any:
        if isinstance(value, Rows):
            return self._inside(value, path)
        if path in places:
            each = places[path]
            return self._take(each.value, path, dim=each.dim, group=each.group)
        return value.value if isinstance(value, Whole) else value


def taken_from(value: Any, pick: Pick, path: str, *, dim: int = 0, group: int = 1) -> Any:
    """Take rows of one value.

    Args:
        value: A tensor, an array, a list or tuple, or another object that slices itself.
        pick: The rows.
        path: Where the value is.
        dim: Dimension of the rows.
        group: Number of consecutive entries that are one row.

    Returns:
        A value of the same type; a view of a tensor or an array if ``pick`` is a slice.

    Raises:
        BatchError: The object slices itself, but does not select rows in any order.
    """
    if isinstance(pick, slice):
        chosen: Any = slice(pick.start * group, pick.stop * group)
    else:
        chosen = [row * group + each for row in pick for each in range(group)] if group > 1 else list(pick)
    if isinstance(value, Tensor) or is_array(value):
        if dim < 0:
            dim += len(value.shape)
        if isinstance(value, Tensor) and not isinstance(chosen, slice):
            return value.index_select(dim, torch.tensor(chosen, dtype=torch.long, device=value.device))
        at = (*[slice(None)] * dim, chosen) if dim else chosen
        return value[at] if isinstance(value, Tensor) else _of_array(value, at, path)
    if isinstance(value, LISTS):
        return _of_list(value, chosen)
    if isinstance(chosen, slice):
        return value[chosen]
    if isinstance(value, str | bytes):
        return [value[each] for each in chosen]
    try:
        return value[chosen]
    except Exception as error:
        raise BatchError(
            f"{path} is {kind_of(value)}, which does not select rows by a list of their numbers "
            f"({type(error).__name__}: {error!s:.200}); pass its tensors in a dict"
        ) from error


def _of_list(value: Any, chosen: Any) -> Any:
    if isinstance(chosen, slice) and not isinstance(value, deque):
        return value[chosen]
    some = list(value)[chosen] if isinstance(chosen, slice) else [value[each] for each in chosen]
    return some if isinstance(value, range) else type(value)(some)


def _of_array(value: Any, at: Any, path: str) -> Any:
    try:
        return value[at]
    except Exception as error:
        raise BatchError(
            f"{path} is {kind_of(value)}, whose rows cannot be taken ({type(error).__name__}: {error!s:.200}); pass an "
            "array that can be indexed (for a sparse matrix of SciPy, value.tocsr()), or mark it with mb.Whole(...) if "
            "it has no rows"
        ) from error


def _as_it_is(value: Any) -> Any:
    return value
