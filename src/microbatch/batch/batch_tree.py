"""Walk a batch as a tree: count its rows, slice them, and map its tensors."""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Callable, Mapping, MutableMapping, Sequence
from typing import Any, cast

import torch
from torch import Tensor

from microbatch.batch.batches import Batches
from microbatch.errors import BatchError, RowsDisagreeError
from microbatch.kind_words import kind_of


@dataclasses.dataclass(frozen=True, slots=True)
class Whole:
    """Mark a value of a batch that has no rows, so that every microbatch gets the complete value.

    The mark is needed only for tensors of one or more dimensions, such as class weights. 0-d tensors, numbers, strings
    and `None` never have rows. The loss function receives the value without the mark.

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
    """Mark a sequence that holds one item per row of the batch, so that the sequence is sliced.

    The mark is needed for lists of tensors, such as images of different sizes. Without the mark, each tensor in such a
    list is taken as a tensor with rows of its own. The loss function receives the slice of the sequence, without the
    mark.

    Attributes:
        items: A sequence with one item per row; items of any type.

    Example:
        >>> rows_of({"images": Rows([torch.zeros(3, 8, 8), torch.zeros(3, 5, 9)])})
        2
    """

    items: Sequence[Any]


def map_leaves(function: Callable[[Any, str], Any], node: object, path: str = "batch") -> Any:
    """Rebuild a nested structure with ``function(leaf, path)`` in place of every leaf.

    Mappings, lists, tuples, named tuples and dataclasses are traversed, and the result has the same types. Everything
    else is a leaf. A list without any tensor in it, such as one string per row, is a leaf too.

    Args:
        function: Called with each leaf and its path, for example ``"batch['tokens'][0]"``.
        node: The structure.
        path: Name of the structure itself, with which every path begins.

    Returns:
        A structure of the same types as ``node``.
    """
    # Tensors and dicts are tested first, because isinstance(node, Mapping) is slow and this runs for every microbatch.
    if isinstance(node, Tensor):
        return function(node, path)
    if isinstance(node, dict | Mapping):
        items = cast("Mapping[Any, Any]", node)
        return _mapping_like(items, {key: map_leaves(function, items[key], f"{path}[{key!r}]") for key in items})
    if isinstance(node, list | tuple) and not _is_list_of_values(node):
        children = [map_leaves(function, child, f"{path}[{i}]") for i, child in enumerate(cast("Sequence[Any]", node))]
        if hasattr(node, "_fields"):
            return type(node)(*children)
        return type(node)(children)
    if dataclasses.is_dataclass(node) and not isinstance(node, type | Whole | Rows):
        return _dataclass_like(node, function, path)
    return function(node, path)


def map_tensors(function: Callable[[Tensor], Tensor], node: object) -> Any:
    """Rebuild a nested structure with ``function(tensor)`` in place of every tensor.

    Args:
        function: Called with each tensor, for example to copy the tensor to a device.
        node: The structure.

    Returns:
        A structure of the same types as ``node``.
    """
    return map_leaves(lambda value, _path: function(value) if isinstance(value, Tensor) else value, node)


def leaves(node: object) -> list[tuple[str, Any]]:
    """List every leaf of a nested structure with its path, in order.

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
    """Count the rows of a batch: the size of the first dimension, which all its tensors share.

    Args:
        batch: Nested dict, list, tuple, named tuple, dataclass or Mapping of tensors and NumPy arrays of shape
            ``(rows, ...)``. 0-d tensors and plain values belong to the whole batch and are not counted. In a batch
            without any tensor with rows, lists of plain values are counted instead.

    Returns:
        The number of rows; 0 or more.

    Raises:
        BatchError: Nothing in the batch has rows, or a tensor is nested or sparse and cannot be sliced by rows.
        RowsDisagreeError: Two tensors have different sizes in their first dimension.

    Example:
        >>> rows_of({"x": torch.zeros(10, 3), "y": torch.zeros(10), "temperature": torch.tensor(0.7)})
        10
    """
    if isinstance(batch, Batches):
        return sum(map(rows_of, batch.batches))
    found = leaves(batch)
    sizes = {path: size for path, value in found if (size := _leading_size(value, path)) is not None}
    if not sizes:
        sizes = {path: len(value) for path, value in found if isinstance(value, list | tuple)}
    if not sizes:
        raise BatchError(
            f"the batch has no rows: {kind_of(batch)} without any tensor of one or more dimensions was given; "
            "pass tensors of shape (rows, ...), which may be nested in dicts, lists, tuples and dataclasses"
        )
    if len(set(sizes.values())) > 1:
        listed = ", ".join(f"{path} has {size}" for path, size in sizes.items())
        raise RowsDisagreeError(
            f"the tensors of one batch have different numbers of rows: {listed}; wrap a value that belongs to the "
            "whole batch in mb.Whole(...), and a list with one item per row in mb.Rows(...)"
        )
    return next(iter(sizes.values()))


def slice_rows(batch: object, start: int, stop: int, *, rows: int) -> Any:
    """Slice the rows from ``start`` to ``stop`` of a batch, as views.

    Args:
        batch: A batch as `rows_of` accepts it.
        start: First row, from 0.
        stop: One past the last row.
        rows: ``rows_of(batch)``, counted once by the caller.

    Returns:
        The same structure with sliced tensors, and without the marks `Whole` and `Rows`.

    Cost:
        No tensor is copied.
    """

    def leaf(value: Any, path: str) -> Any:
        if _leading_size(value, path) is not None:
            return value.items[start:stop] if isinstance(value, Rows) else value[start:stop]
        if isinstance(value, Whole):
            return value.value
        if isinstance(value, list | tuple) and len(cast("Sequence[Any]", value)) == rows:
            return value[start:stop]
        return value

    return map_leaves(leaf, batch)


def take_rows(batch: object, index: Sequence[int], *, rows: int, marked: bool = False) -> Any:
    """Copy selected rows of a batch, in any order and with repetition.

    Args:
        batch: A batch as `rows_of` accepts it.
        index: Numbers of the rows to copy, from 0.
        rows: ``rows_of(batch)``, counted once by the caller.
        marked: Whether the marks `Whole` and `Rows` are kept, so that the result can be cut again.

    Returns:
        The same structure with ``len(index)`` rows.

    Cost:
        Copies the selected rows.
    """
    chosen = list(index)

    def leaf(value: Any, path: str) -> Any:
        if isinstance(value, Whole):
            return value if marked else value.value
        if isinstance(value, Rows):
            items = [value.items[row] for row in chosen]
            return Rows(items) if marked else items
        if _leading_size(value, path) is not None:
            return value[chosen]
        if isinstance(value, list | tuple) and len(cast("Sequence[Any]", value)) == rows:
            return type(value)(value[row] for row in chosen)
        return value

    return map_leaves(leaf, batch)


def _leading_size(value: Any, path: str) -> int | None:
    """Return the size of a leaf's first dimension, or `None` for a leaf without rows."""
    if isinstance(value, Tensor):
        if value.is_nested or value.layout is not torch.strided:
            kind = "nested" if value.is_nested else str(value.layout)
            raise BatchError(
                f"{path} is a {kind} tensor, which cannot be sliced by rows; pad it, or pass mb.Rows([...])"
            )
        return value.shape[0] if value.ndim else None
    if isinstance(value, Rows):
        return len(value.items)
    # NumPy arrays are recognised by their attributes, because this library must not import NumPy.
    shape = getattr(value, "shape", None)
    if isinstance(shape, tuple) and hasattr(value, "dtype") and hasattr(value, "__getitem__"):
        return int(cast("tuple[int, ...]", shape)[0]) if shape else None
    return None


def _is_list_of_values(node: Sequence[Any]) -> bool:
    """Return whether a list or tuple holds plain values, such as one string per row, and no tensor."""
    # `default_collate` returns strings as a list or a tuple. A tuple of numbers is usually a size or a shape, so only
    # tuples of strings count as one value per row.
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
        # A tokenizer's output has attributes beside its items, which a constructor call would lose.
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
        # `object.__setattr__` also works for frozen dataclasses and for fields that the constructor does not take.
        object.__setattr__(made, field.name, child)
    return made
