"""Walk a batch as a tree of dicts, lists, tuples and dataclasses, and rebuild it with other leaves."""

from __future__ import annotations

import copy
import dataclasses
from collections import OrderedDict, UserDict, UserList, deque
from collections.abc import Callable, Iterator, Mapping, MappingView, MutableMapping, Sequence
from contextlib import suppress
from functools import partial
from numbers import Integral, Number
from types import FunctionType, MethodType
from typing import Any, cast

from torch import Size, Tensor, nn
from torch.nn.utils.rnn import PackedSequence

from microbatch.arguments import attribute
from microbatch.batch.marks import Rows, Whole
from microbatch.errors import BatchError
from microbatch.kind_words import kind_of

Leaf = Callable[[Any, str], Any]
"""``function(leaf, path)`` returns what stands in the leaf's place."""

ENDLESS = "the batch is nested too deeply, or contains itself; pass a batch whose dicts and lists end somewhere"
_PLAIN = (str, bytes, bytearray, memoryview, int, float, complex, range, type(None), Rows, Whole)
LISTS = (list, tuple, UserList, deque, range)
"""What holds one value after the other, in order, and is read as a list."""
_LONGEST_SIZE = 4  # a longer tuple of whole numbers is not a size
_PLAIN_SETTERS = (dict.__setitem__, OrderedDict.__setitem__)
_DEPTH, _MOST = 5, 500  # how deep, and at how many objects, `holds_tensors` looks


def map_leaves(function: Leaf, node: object, path: str = "batch", *, lists: bool = True) -> Any:
    """Rebuild a nested structure with ``function(leaf, path)`` in place of every leaf.

    Mappings, lists, tuples, named tuples and dataclasses are traversed, and the result has the same types. Everything
    else is a leaf. A list without any tensor in it, such as one string per row, is a leaf too; so is an object that
    slices itself.

    Args:
        function: Called with each leaf and its path, for example ``"batch['tokens'][0]"``.
        node: The structure.
        path: Name of the structure itself, with which every path begins.
        lists: Whether lists and tuples are traversed; if not, they are leaves.

    Returns:
        A structure of the same types as ``node``.

    Raises:
        BatchError: An object cannot be rebuilt with other values, or the structure contains itself.
    """
    try:
        return _mapped(function, node, path, lists=lists)
    except RecursionError:
        raise BatchError(ENDLESS) from None


def map_tensors(function: Callable[[Tensor], Tensor], node: object) -> Any:
    """Rebuild a nested structure with ``function(tensor)`` in place of every tensor."""
    return map_leaves(lambda value, _path: function(value) if isinstance(value, Tensor) else value, node)


def leaves(node: object) -> list[tuple[str, Any]]:
    """List every leaf of a nested structure with its path, in order; a marked value is one leaf."""
    found: list[tuple[str, Any]] = []

    def visit(value: Any, path: str) -> Any:
        found.append((path, value))
        return value

    map_leaves(visit, node)
    return found


def contents(node: object) -> list[Any]:
    """List every leaf of a nested structure, those inside marks included."""
    if isinstance(node, Tensor):
        return [node]
    found: list[Any] = []
    for _, leaf in leaves(node):
        found += contents(leaf.value) if isinstance(leaf, Rows | Whole) else [leaf]
    return found


def children(node: object) -> list[tuple[str, Any]] | None:
    """List what a container of a batch holds, each with the end of its path; `None` for a leaf."""
    if isinstance(node, dict | Mapping) and not _is_sliced_mapping(node):
        return [(f"[{key!r}]", value) for key, value in _items(node, "the batch").items()]
    if isinstance(node, LISTS) and not _is_leaf(cast("Sequence[Any]", node)):
        return [(f"[{index}]", child) for index, child in enumerate(cast("Sequence[Any]", node))]
    if _is_dataclass(node):
        return [(f".{name}", value) for name, value in _fields(node, "the batch").items()]
    return None


def is_array(value: Any) -> bool:
    """Return whether a leaf is an array other than a tensor, such as one of NumPy."""
    # Recognised by its attributes, because this library must not import NumPy.
    try:
        return isinstance(value.shape, tuple) and hasattr(value, "dtype") and hasattr(value, "__getitem__")
    except Exception:  # noqa: BLE001 - whatever a property of the user's own object raises
        return False


def is_number(value: object) -> bool:
    """Return whether a value is a single number: of Python, of NumPy, or a 0-d tensor or array."""
    if isinstance(value, str | bytes):
        return False
    return isinstance(value, Number) or (
        (isinstance(value, Tensor) or is_array(value)) and not cast("Any", value).shape
    )


def is_size(value: object) -> bool:
    """Return whether a value is a size, such as height and width: `torch.Size`, or a tuple of up to 4 whole numbers."""
    if not isinstance(value, tuple):
        return False
    numbers = cast("tuple[Any, ...]", value)
    return isinstance(value, Size) or (
        len(numbers) <= _LONGEST_SIZE
        and all(isinstance(each, Integral) and not isinstance(each, bool) for each in numbers)
    )


def slices_itself(value: Any) -> bool:
    """Return whether an object, but no tensor or list, has a length and slices of its own type, as a TensorDict."""
    kind = type(value)
    if isinstance(value, (*_PLAIN, Tensor, *LISTS, dict, nn.Module)):
        return False
    if not hasattr(kind, "__len__") or not hasattr(kind, "__getitem__"):
        return False
    try:
        some = value[0:1]
        return type(some) is kind and len(some) == min(1, len(value))
    except Exception:  # noqa: BLE001 - whatever the user's own object raises
        return False


def holds_tensors(value: object) -> bool:
    """Return whether an object holds a tensor, in its attributes or in containers in them, a few levels deep."""
    return any(isinstance(each, Tensor) for each in held_in(value))


def holds_arrays(value: object) -> bool:
    """Return whether an object holds a tensor, or an array with a dimension, as `holds_tensors` looks for them."""
    return any(
        isinstance(each, Tensor) or (not isinstance(each, _PLAIN) and is_array(each) and each.shape)
        for each in held_in(value)
    )


def beside(node: object) -> Iterator[tuple[str, Any]]:
    """Yield what a container holds beside its items: attributes that are no fields, which no cut reaches."""
    if type(node) in {dict, list, tuple} or not (
        isinstance(node, dict | UserDict | list | tuple | UserList) or _is_dataclass(node)
    ):
        return
    known = {"data"} if isinstance(node, UserDict | UserList) else set[str]()
    if dataclasses.is_dataclass(node) and not isinstance(node, dict):
        known |= {each.name for each in dataclasses.fields(node)}
    # A class whose own `__setitem__` writes its attributes too, such as a model's output, has the cut rows in both.
    kept_in_step = isinstance(node, dict) and type(node).__setitem__ not in _PLAIN_SETTERS
    items = {id(child) for _, child in children(node) or ()} if kept_in_step else set[int]()
    held = attribute(node, "__dict__", {})
    for name, value in held.items() if held is not node else ():
        if name not in known and id(value) not in items:
            yield f".{name}", value


def held_in(value: object) -> Iterator[Any]:
    """Yield an object, and what it holds in its attributes and in containers in them, a few levels deep."""
    waiting, seen = [(value, 0)], set[int]()
    while waiting and len(seen) < _MOST:
        each, depth = waiting.pop()
        yield each
        if depth < _DEPTH and id(each) not in seen and not isinstance(each, (*_PLAIN, Tensor, type)):
            seen.add(id(each))
            waiting += [(inner, depth + 1) for inner in _inside(each)]


def _mapped(function: Leaf, node: object, path: str, *, lists: bool) -> Any:
    # Tensors and dicts are tested first, because isinstance(node, Mapping) is slow and this runs for every microbatch.
    if isinstance(node, Tensor):
        return function(node, path)
    if type(node) is dict or (isinstance(node, Mapping) and not _is_sliced_mapping(node)):
        items = node if type(node) is dict else _items(node, path)
        found = {key: _mapped(function, items[key], f"{path}[{key!r}]", lists=lists) for key in items}
        return _rebuilt(_mapping_like, node, found, path=path)
    if isinstance(node, LISTS):
        if not lists or _is_leaf(cast("Sequence[Any]", node)):
            return function(node, path)
        made = [
            _mapped(function, child, f"{path}[{i}]", lists=lists) for i, child in enumerate(cast("Sequence[Any]", node))
        ]
        return _rebuilt(_sequence_like, node, made, path=path)
    if _is_dataclass(node):
        fields = _fields(node, path)
        values = {name: _mapped(function, value, f"{path}.{name}", lists=lists) for name, value in fields.items()}
        return _rebuilt(_dataclass_like, node, values, path=path)
    return function(node, path)


def _items(node: Mapping[Any, Any], path: str) -> dict[Any, Any]:
    try:
        return {key: node[key] for key in node}
    except Exception as error:
        raise _unreadable(node, path, error) from error


def _fields(node: object, path: str) -> dict[str, Any]:
    try:
        return {each.name: getattr(node, each.name) for each in dataclasses.fields(cast("Any", node))}
    except Exception as error:
        raise _unreadable(node, path, error) from error


def _unreadable(node: object, path: str, error: Exception) -> BatchError:
    return BatchError(
        f"{path} has {kind_of(node)}, whose entries cannot be read ({type(error).__name__}: {error!s:.200}); pass "
        "a dict instead, or mark it with mb.Whole(...) if it has no rows"
    )


def _is_sliced_mapping(node: object) -> bool:
    # A sparse matrix of SciPy may be a dict of its entries.
    kind = type(node)
    return kind is not dict and (
        (hasattr(kind, "shape") and is_array(node)) or (not isinstance(node, dict) and slices_itself(node))
    )


def _is_dataclass(node: object) -> bool:
    return dataclasses.is_dataclass(node) and not isinstance(node, type | Whole | Rows) and not slices_itself(node)


def _is_leaf(node: Sequence[Any]) -> bool:
    """Return whether a list or a tuple holds plain values, such as one string per row, and no tensor."""
    if isinstance(node, range):  # it may be endlessly long
        return True
    # `default_collate` returns strings as a list or a tuple.
    if isinstance(node, tuple):
        if attribute(node, "_fields") is not None:
            return isinstance(node, PackedSequence)
        if all(is_number(item) and not isinstance(item, Tensor) for item in node):
            return not is_size(node)
        return all(isinstance(item, str | bytes) for item in node)
    return not any(_holds_array(item) for item in node)


def _holds_array(node: Any) -> bool:
    if isinstance(node, str | bytes | int | float):
        return False
    if isinstance(node, Tensor | Whole | Rows):
        return True
    if attribute(node, "__array__") is not None:
        return attribute(node, "shape") != ()  # a number of NumPy
    inner = children(node)
    if inner is None:
        return not isinstance(node, LISTS) and holds_tensors(node)
    return any(_holds_array(child) for _, child in inner)


def _inside(value: object) -> Iterator[Any]:
    if isinstance(value, Mapping):
        try:
            yield from list(cast("Mapping[Any, Any]", value).values())
        except Exception:  # noqa: BLE001 - whatever the user's own object raises
            return
        return
    if isinstance(value, list | tuple | set | frozenset | deque | MappingView):
        yield from cast("Sequence[Any]", value)
        return
    if isinstance(value, partial):
        yield from (value.func, value.args, value.keywords)
    elif isinstance(value, MethodType):
        yield value.__self__
        return
    elif isinstance(value, FunctionType):
        yield from (value.__defaults__, value.__kwdefaults__)
        for cell in value.__closure__ or ():
            with suppress(ValueError):  # a variable without a value yet
                yield cell.cell_contents
    yield from list(attribute(value, "__dict__", {}).values())
    for kind in type(value).__mro__:
        slots = kind.__dict__.get("__slots__", ())
        for name in [slots] if isinstance(slots, str) else slots:
            yield attribute(value, name)


# -- rebuild ----------------------------------------------------------------------------------------------------------


def _rebuilt(make: Callable[[Any, Any], Any], old: object, new: object, *, path: str) -> Any:
    """Rebuild a container around new values, or name the container that cannot be rebuilt."""
    try:
        return make(old, new)
    except Exception as error:
        raise BatchError(
            f"{path} is {kind_of(old)}, which cannot be made again with other values "
            f"({type(error).__name__}: {error!s:.200}). Pass a dict or a dataclass instead, or mark it with "
            "mb.Whole(...) if it has no rows"
        ) from error


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


def _sequence_like(old: Sequence[Any], new: list[Any]) -> Sequence[Any]:
    if type(old) is list:
        return new
    if attribute(old, "_fields") is not None:
        return type(old)(*new)
    return type(old)(new)  # pyright: ignore[reportCallIssue] -- nor is a Sequence's


def _dataclass_like(old: Any, new: Mapping[str, Any]) -> Any:
    made = copy.copy(old)
    for name, value in new.items():
        # `object.__setattr__` also works for frozen dataclasses and for fields that the constructor does not take.
        object.__setattr__(made, name, value)
    return made
