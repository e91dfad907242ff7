"""Recognise the rows of a batch, and refuse a batch that can be read in two ways."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Sequence, ValuesView
from dataclasses import dataclass, field
from io import IOBase
from typing import Any, cast

import torch
from torch import Tensor
from torch.nn.utils.rnn import PackedSequence

from microbatch.arguments import attribute
from microbatch.batch.marks import Rows, Whole
from microbatch.batch.row_errors import (
    Entry,
    disagreement,
    out_of_reach,
    read_once,
    samples_in_a_list,
    unknown_object,
)
from microbatch.batch.uncollated import could_be_samples, images_with_targets, two_images
from microbatch.batch.walk import (
    ENDLESS,
    LISTS,
    beside,
    children,
    holds_arrays,
    is_array,
    is_number,
    is_size,
    slices_itself,
)
from microbatch.errors import BatchError
from microbatch.kind_words import kind_of


@dataclass(slots=True)
class _Doubtful:
    """A list that could be the samples of the batch, or different things with rows of their own.

    Attributes:
        path: Where the list is.
        entries: Number of its entries.
        inner: The tensors in it with their first dimensions; empty for a list of numbers.
        what: The entries in words.
    """

    path: str
    entries: int
    inner: list[Entry]
    what: str


@dataclass(slots=True)
class Found:
    """What a batch holds.

    Attributes:
        sure: Every value whose rows are certain, without a mark or with one.
        doubtful: Lists that can be read in two ways.
        numbers: Lists of numbers: one for each row, or a value of the whole batch.
    """

    sure: list[Entry] = field(default_factory=list[Entry])
    doubtful: list[_Doubtful] = field(default_factory=list[_Doubtful])
    numbers: list[Entry] = field(default_factory=list[Entry])


def count_rows(batch: object) -> int:
    """Count the rows of one batch."""
    rows = _rows_of_tensors(batch)
    if rows is not None:
        return rows
    found = Found()
    try:
        _survey(batch, "batch", found)
    except RecursionError:
        raise BatchError(ENDLESS) from None
    return _settle(found, batch)


def entries_of(value: Any, path: str) -> int | None:
    """Count the rows of a leaf; `None` for a leaf without rows. Refuse one that cannot be sliced by rows."""
    if isinstance(value, Tensor):
        if value.is_nested or value.layout is not torch.strided:
            raise BatchError(_cannot_slice(value, path))
        return value.shape[0] if value.ndim else None
    if isinstance(value, Rows):
        return _marked(value, path)
    if isinstance(value, PackedSequence):
        raise BatchError(
            f"{path} is a PackedSequence, in which the rows of a time step lie beside each other, so it cannot be cut "
            "by rows. Pass the padded tensor and the lengths, and call pack_padded_sequence in the loss function"
        )
    if is_array(value):
        return int(value.shape[0]) if value.shape else None
    return len(value) if slices_itself(value) else None


def spread(mark: Rows, path: str) -> list[tuple[str, Rows]]:
    """List the values of a marked dict or dataclass with their paths, each with the same mark."""
    inner = None if isinstance(mark.value, LISTS) else children(mark.value)
    if inner is None:
        return [(path, mark)]
    found: list[tuple[str, Rows]] = []
    for end, child in inner:
        if isinstance(child, Rows):
            found += spread(child, path + end)
        elif not _is_single(child):
            found += spread(Rows(child, mark.dim, group=mark.group), path + end)
    return found


def _is_single(value: Any) -> bool:
    """Return whether a value inside a marked dict has no rows."""
    return (
        value is None or isinstance(value, str | int | float | Whole) or (isinstance(value, Tensor) and value.ndim == 0)
    )


def _rows_of_tensors(batch: Any) -> int | None:
    """Count the rows of a flat batch of tensors that agree, which is nearly every batch; `None` for all others."""
    values = batch.values() if type(batch) is dict else batch if type(batch) in {list, tuple} else (batch,)
    if len(values) > 2 and type(batch) is not dict:
        return None
    rows = -1
    for value in values:
        if not isinstance(value, Tensor) or not value.ndim or value.layout is not torch.strided or value.is_nested:
            return None
        if rows not in {-1, value.shape[0]}:
            return None
        rows = value.shape[0]
    if rows == 3 and len(values) == 2 and type(batch) is not dict and two_images(*values):  # three colours
        return None
    return None if rows < 0 else rows


# -- one value --------------------------------------------------------------------------------------------------------


def _marked(mark: Rows, path: str) -> int | None:
    if not isinstance(mark.value, LISTS) and children(mark.value) is not None:
        sizes = {_marked(each, where) for where, each in spread(mark, path)}
        if len(sizes) != 1:
            raise BatchError(f"{path}: the values in mb.Rows have {_listed(sizes)} rows; mark each value by itself")
        return sizes.pop()
    return _entries_along(mark, path) // mark.group


def _entries_along(mark: Rows, path: str) -> int:
    value, dim = mark.value, mark.dim
    if isinstance(value, Tensor) or is_array(value):
        if isinstance(value, Tensor) and (value.is_nested or value.layout is not torch.strided):
            raise BatchError(_cannot_slice(value, path))
        if not -len(value.shape) <= dim < len(value.shape):
            raise BatchError(f"{path} has shape {tuple(value.shape)}, so it has no dimension {dim} for mb.Rows(dim=)")
        entries = int(value.shape[dim])
    elif isinstance(value, PackedSequence):
        entries_of(value, path)  # raises
        raise AssertionError
    elif isinstance(value, (*LISTS, str, bytes)) or slices_itself(value):
        if dim:
            raise BatchError(
                f"{path}: mb.Rows of {kind_of(value)} has one item per row, so dim= must be 0, not {dim}. Mark "
                "each tensor by itself, or put the tensors into a dict"
            )
        entries = len(value)
    else:
        raise BatchError(
            f"{path}: mb.Rows takes a tensor, an array, a list with one item per row, or a dict of them, not a "
            f"{type(value).__name__}"
        )
    if entries % mark.group:
        raise BatchError(
            f"{path} has {entries} entries, which is not a multiple of group={mark.group} in mb.Rows; every row must "
            f"have {mark.group} consecutive entries"
        )
    return entries


def _cannot_slice(value: Tensor, path: str) -> str:
    if value.is_nested:
        return (
            f"{path} is a nested tensor, which cannot be sliced by rows; pad it with to_padded_tensor, or pass "
            "mb.Rows([...]) of its rows, for example mb.Rows(list(nested.unbind()))"
        )
    return (
        f"{path} is a {value.layout} tensor, which cannot be sliced by rows. Pass to_dense() of it, or mb.Rows([...]) "
        "with one sparse tensor per row, or mb.Whole(...) if it has no rows"
    )


# -- the batch --------------------------------------------------------------------------------------------------------


def _survey(node: Any, path: str, found: Found) -> None:
    """Note every value with rows, and every list that can be read in two ways."""
    if isinstance(node, Tensor):
        _note(node, path, found)
        return
    if node is None or isinstance(node, str | int | float | Whole):
        return
    inner = children(node)
    if inner is None:
        _survey_leaf(node, path, found)
        return
    for end, value in beside(node):
        if holds_arrays(value):
            raise out_of_reach(node, path, end)
    images = images_with_targets(inner)
    if images is not None:
        raise samples_in_a_list(path + images, len(dict(inner)[images]), "images, beside a list of as many dicts")
    if isinstance(node, LISTS) and attribute(node, "_fields") is None:
        values = [child for _, child in inner]
        if _are_numbers(values):
            if not is_size(node):
                found.numbers.append(Entry(path, len(values), (len(values),), what="list of 0-d tensors"))
            return
        what = could_be_samples(node, values)
        if what:
            own = Found()
            for end, child in inner:
                _survey(child, path + end, own)
            entries = [*own.sure, *(each for some in own.doubtful for each in some.inner)]
            found.doubtful.append(_Doubtful(path, len(values), entries, what))
            return
    for end, child in inner:
        _survey(child, path + end, found)


def _survey_leaf(leaf: Any, path: str, found: Found) -> None:
    numbers = isinstance(leaf, ValuesView) or (isinstance(leaf, Sequence) and slices_itself(leaf))
    if (numbers and _are_numbers(cast("Collection[Any]", leaf))) or (
        isinstance(leaf, LISTS) and not isinstance(leaf, PackedSequence)
    ):
        _note_values(cast("Collection[Any]", leaf), path, found)
    elif not _note(leaf, path, found) and not isinstance(leaf, Rows):
        if isinstance(leaf, Iterator) and not isinstance(leaf, IOBase):
            raise read_once(leaf, path)
        if holds_arrays(leaf):
            raise unknown_object(leaf, path)


def _note(value: Any, path: str, found: Found) -> bool:
    if isinstance(value, Rows):
        for where, mark in spread(value, path):
            rows = _marked(mark, where)
            if rows is not None:
                found.sure.append(Entry(where, rows, _shape(mark.value), marked=True))
        return True
    rows = entries_of(value, path)
    if rows is None:
        return isinstance(value, Tensor) or is_array(value)
    found.sure.append(Entry(path, rows, _shape(value)))
    return True


def _shape(value: Any) -> tuple[int, ...]:
    return tuple(value.shape) if isinstance(value, Tensor) or is_array(value) else ()


def _note_values(values: Collection[Any], path: str, found: Found) -> None:
    if not values:
        found.numbers.append(Entry(path, 0, (0,), what="list"))
        return
    kind = found.numbers if _are_numbers(values) else found.sure
    kind.append(Entry(path, len(values), (len(values),), what="list"))


def _settle(found: Found, batch: object) -> int:
    sizes = {each.rows for each in found.sure}
    if len(sizes) > 1:
        raise disagreement(found.sure)
    rows = next(iter(sizes), None)
    for each in found.doubtful:
        inner = {entry.rows for entry in each.inner}
        # Entries that agree with the rest of the batch are different things, unless there is one entry for each row.
        agree = rows is not None and inner == {rows} and (each.entries != rows or each.entries <= 2)
        if not agree:
            raise samples_in_a_list(each.path, each.entries, each.what, inner=each.inner, rows=rows)
    numbers = [each for each in found.numbers if each.rows] if rows is not None else found.numbers
    if rows is None:
        if not numbers:
            raise BatchError(
                f"the batch has no rows: {kind_of(batch)} without any tensor of one or more dimensions was "
                "given. Pass tensors of shape (rows, ...), which may be nested in dicts, lists, tuples and dataclasses"
            )
        if len({each.rows for each in numbers}) > 1:
            raise disagreement(numbers)
        for each in numbers:
            if each.what != "list":
                raise BatchError(
                    f"{each.path} is a {each.what}: stack them into one tensor (torch.stack), or mark the list with "
                    "mb.Rows(...) or with mb.Whole(...)"
                )
        return numbers[0].rows
    for each in numbers:
        if each.rows != rows:
            raise disagreement([*found.sure[:1], each])
        raise BatchError(
            f"{each.path} is a list of {each.rows} numbers, and the batch has {rows} rows, so it could be one number "
            "for each row, or a value of the whole batch such as class weights. Mark it with mb.Rows(...) or with "
            "mb.Whole(...), or pass a tensor if it has one number for each row"
        )
    return rows


def _are_numbers(values: Collection[Any]) -> bool:
    return bool(values) and (isinstance(values, range) or all(map(is_number, values)))


def _listed(sizes: set[int | None]) -> str:
    return " and ".join(str(each) for each in sorted(sizes, key=lambda each: each or 0)) or "no"
