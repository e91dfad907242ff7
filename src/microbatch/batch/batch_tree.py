"""A batch as a tree: walk it, count its rows, map its tensors."""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Callable, Mapping, MutableMapping, Sequence
from typing import Any, cast

import torch
from torch import Tensor

from microbatch.errors import BatchError, RowsDisagreeError


@dataclasses.dataclass(frozen=True, slots=True)
class Whole:
    """Mark a value of a batch that belongs to the whole batch, so that every microbatch gets all of it.

    Needed only for tensors of one or more dimensions, such as class weights: 0-d tensors, numbers, texts and `None`
    are whole by nature. The loss function receives the value itself, without the mark.

    Attributes:
        value: Any object.

    Example:
        >>> batch = {"x": torch.zeros(4, 2), "class_weights": Whole(torch.ones(10))}
        >>> rows_of(batch)
        4
    """

    value: Any


@dataclasses.dataclass(frozen=True, slots=True)
class Rows:
    """Mark a sequence of a batch that holds one item for every row, so that it is sliced and not walked into.

    Needed for lists that hold tensors, such as images of different sizes: a list of tensors without the mark is a
    structure whose tensors have rows of their own. The loss function receives the slice, without the mark.

    Attributes:
        items: A sequence of one item per row, of any kind.

    Example:
        >>> rows_of({"images": Rows([torch.zeros(3, 8, 8), torch.zeros(3, 5, 9)])})
        2
    """

    items: Sequence[Any]


def map_leaves(function: Callable[[Any, str], Any], node: object, path: str = "batch") -> Any:
    """Rebuild a nested structure with ``function(leaf, path)`` in the place of every leaf.

    Mappings, lists, tuples, named tuples and dataclasses are walked into and keep their type; everything else is a
    leaf, and so are lists without any tensor in them, such as one text per row.

    Args:
        function: Called with each leaf and where it stands, for example ``"batch['tokens'][0]"``.
        node: The structure.
        path: How the structure itself is named in paths.

    Returns:
        A structure of the same types.
    """
    # What most batches are made of comes first: this runs once a microbatch, and asking for a Mapping is slow.
    if isinstance(node, Tensor):
        return function(node, path)
    if isinstance(node, dict | Mapping):
        items = cast("Mapping[Any, Any]", node)
        return _mapping_like(items, {key: map_leaves(function, items[key], f"{path}[{key!r}]") for key in items})
    if isinstance(node, list | tuple) and not _is_column(node):
        children = [map_leaves(function, child, f"{path}[{i}]") for i, child in enumerate(cast("Sequence[Any]", node))]
        if hasattr(node, "_fields"):
            return type(node)(*children)
        return type(node)(children)
    if dataclasses.is_dataclass(node) and not isinstance(node, type | Whole | Rows):
        return _dataclass_like(node, function, path)
    return function(node, path)


def map_tensors(function: Callable[[Tensor], Tensor], node: object) -> Any:
    """Rebuild a nested structure with ``function(tensor)`` in the place of every tensor.

    Args:
        function: What to do with each tensor, for example move it.
        node: The structure.

    Returns:
        A structure of the same types.
    """
    return map_leaves(lambda value, _path: function(value) if isinstance(value, Tensor) else value, node)


def leaves(node: object) -> list[tuple[str, Any]]:
    """List every leaf of a structure with its path, in order.

    Args:
        node: The structure.

    Returns:
        Pairs of path and leaf.
    """
    found: list[tuple[str, Any]] = []

    def visit(value: Any, path: str) -> Any:
        found.append((path, value))
        return value

    map_leaves(visit, node)
    return found


def rows_of(batch: object) -> int:
    """Count the rows of a batch: the leading dimension that all its tensors share.

    Args:
        batch: Nested dict, list, tuple, named tuple, dataclass or Mapping of tensors and NumPy arrays of shape
            ``(rows, ...)``, beside 0-d tensors and plain values that belong to the whole batch.

    Returns:
        The number of rows; 0 or more.

    Raises:
        BatchError: There is nothing with rows in it, or a nested or sparse tensor, which cannot be sliced by rows.
        RowsDisagreeError: Two tensors have different leading dimensions.

    Example:
        >>> rows_of({"x": torch.zeros(10, 3), "y": torch.zeros(10), "temperature": torch.tensor(0.7)})
        10
    """
    found = leaves(batch)
    sizes = {path: size for path, value in found if (size := _leading(value, path)) is not None}
    if not sizes:
        sizes = {path: len(value) for path, value in found if isinstance(value, list | tuple)}
    if not sizes:
        raise BatchError(
            f"the batch has no rows: no tensor of one or more dimensions was found in a {type(batch).__name__}; "
            "pass tensors of shape (rows, ...), nested in dicts, lists, tuples or dataclasses as you like"
        )
    if len(set(sizes.values())) > 1:
        listed = ", ".join(f"{path} has {size}" for path, size in sizes.items())
        raise RowsDisagreeError(
            f"the tensors of one batch have different numbers of rows: {listed}; wrap a value that belongs to the "
            "whole batch in mb.Whole(...), and a list of one item per row in mb.Rows(...)"
        )
    return next(iter(sizes.values()))


def slice_rows(batch: object, start: int, stop: int, *, rows: int) -> Any:
    """Take the rows from ``start`` to ``stop`` of a batch, as views.

    Args:
        batch: What `rows_of` accepts.
        start: First row, from 0.
        stop: One past the last row.
        rows: ``rows_of(batch)``, counted once by the caller.

    Returns:
        The same structure with sliced tensors; marks are taken off.

    Cost:
        No tensor is copied.
    """

    def leaf(value: Any, path: str) -> Any:
        if _leading(value, path) is not None:
            return value.items[start:stop] if isinstance(value, Rows) else value[start:stop]
        if isinstance(value, Whole):
            return value.value
        if isinstance(value, list | tuple) and len(cast("Sequence[Any]", value)) == rows:
            return value[start:stop]
        return value

    return map_leaves(leaf, batch)


def take_rows(batch: object, index: Sequence[int], *, rows: int, marked: bool = False) -> Any:
    """Copy some rows of a batch, in any order, any of them more than once.

    Args:
        batch: What `rows_of` accepts.
        index: Which rows, from 0.
        rows: ``rows_of(batch)``, counted once by the caller.
        marked: Whether `Whole` and `Rows` are kept, so that the result can be cut again.

    Returns:
        The same structure.

    Cost:
        Copies the rows.
    """
    chosen = list(index)

    def leaf(value: Any, path: str) -> Any:
        if isinstance(value, Whole):
            return value if marked else value.value
        if isinstance(value, Rows):
            items = [value.items[row] for row in chosen]
            return Rows(items) if marked else items
        if _leading(value, path) is not None:
            return value[chosen]
        if isinstance(value, list | tuple) and len(cast("Sequence[Any]", value)) == rows:
            return type(value)(value[row] for row in chosen)
        return value

    return map_leaves(leaf, batch)


def _leading(value: Any, path: str) -> int | None:
    """Return the leading dimension of a leaf that has rows, and `None` for one that does not."""
    if isinstance(value, Tensor):
        if value.is_nested or value.layout is not torch.strided:
            kind = "nested" if value.is_nested else str(value.layout)
            raise BatchError(
                f"{path} is a {kind} tensor, which cannot be sliced by rows; pad it, or pass mb.Rows([...])"
            )
        return value.shape[0] if value.ndim else None
    if isinstance(value, Rows):
        return len(value.items)
    # NumPy arrays are sliced like tensors, without importing NumPy to recognise them.
    shape = getattr(value, "shape", None)
    if isinstance(shape, tuple) and hasattr(value, "dtype") and hasattr(value, "__getitem__"):
        return int(cast("tuple[int, ...]", shape)[0]) if shape else None
    return None


def _is_column(node: Sequence[Any]) -> bool:
    """Tell whether a list is data (one value per row, say) rather than a structure that holds tensors."""
    # `default_collate` leaves texts as lists or tuples. A tuple of numbers is a size or a shape far more often than a
    # column, so of tuples only those of texts count.
    if isinstance(node, tuple):
        return bool(node) and not hasattr(node, "_fields") and all(isinstance(item, str | bytes) for item in node)
    return not any(_holds_tensor(item) for item in node)


def _holds_tensor(node: Any) -> bool:
    if isinstance(node, Tensor | Whole | Rows) or hasattr(node, "__array__"):
        return True
    if isinstance(node, Mapping):
        return any(_holds_tensor(child) for child in cast("Mapping[Any, Any]", node).values())
    if isinstance(node, list | tuple):
        return any(_holds_tensor(child) for child in cast("Sequence[Any]", node))
    if dataclasses.is_dataclass(node) and not isinstance(node, type):
        return any(_holds_tensor(getattr(node, field.name)) for field in dataclasses.fields(node))
    return False


def _mapping_like(old: Mapping[Any, Any], new: dict[Any, Any]) -> Mapping[Any, Any]:
    if type(old) is dict:
        return new
    if isinstance(old, MutableMapping):
        # A copy keeps what a tokenizer's output carries beside its items; a constructor call would lose it.
        made = copy.copy(old)
        for key, value in new.items():
            made[key] = value
        return made
    try:
        return type(old)(new)  # pyright: ignore[reportCallIssue] -- a Mapping's constructor is not part of its protocol
    except TypeError:
        return new


def _dataclass_like(node: Any, function: Callable[[Any, str], Any], path: str) -> Any:
    made = copy.copy(node)
    for field in dataclasses.fields(node):
        child = map_leaves(function, getattr(node, field.name), f"{path}.{field.name}")
        # Frozen dataclasses, and fields that the constructor does not take, are set past the front door.
        object.__setattr__(made, field.name, child)
    return made
