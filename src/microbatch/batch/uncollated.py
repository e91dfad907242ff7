"""Distinguish a list of samples, which were not collated, from a batch whose values are in a list.

The rule uses the form of the entries, because sizes change from one batch to the next.

Two tensors are ``(x, y)``, and are a batch. Two colour images of different sizes are samples.

Three or more tensors of one shape and dtype, or three or more entries that are alike, can be samples.

Two alike entries can be samples in a list. In a tuple they can be samples if they hold numbers, or if all their tensors
have one dimension. Other tuples of two are a batch, as ``zip(one_loader, other_loader)`` gives it.

Two lists are a batch, which ``default_collate`` makes of nested tuples, unless they hold numbers.

One entry can be a sample if it is in a list, and if all its tensors have one dimension.

A list of images beside a list of as many dicts are the samples of a detector.

Entries are alike if they have one type, the same keys, and tensors of the same dtypes and numbers of dimensions.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, cast

from torch import Tensor

from microbatch.batch.marks import Rows
from microbatch.batch.walk import LISTS, children, is_array, leaves, slices_itself

_CHANNELS = 4  # most channels of an image: a first dimension of up to 4 may be colours
_COLOURS, _SIDE = 3, 8  # a tensor can be an image if it has three colours, and sides this long
_IMAGE = 3  # dimensions of one image


def could_be_samples(node: object, values: Sequence[Any]) -> str:
    """Return in words what the entries of a list are if they could be samples; empty if they could not."""
    if not values:
        return ""
    first = values[0]
    if isinstance(first, Tensor) or is_array(first):
        return _alike_tensors(values)
    forms = [_form(each) for each in values]
    form = forms[0]
    if form is None or any(other != form for other in forms[1:]) or "marked" in form:
        return ""
    what = f"{len(values)} {'entry' if len(values) == 1 else 'entries'} of type {type(first).__name__}, alike in form"
    if len(values) > 2 or (len(values) == 2 and "number" in form):
        return what
    if isinstance(first, list) or form[0] == "object":
        return ""
    in_a_list = not isinstance(node, tuple)
    if len(values) == 2 and in_a_list:
        return what
    return what if (in_a_list or len(values) == 2) and _is_flat(first) else ""


def two_images(first: Any, second: Any) -> bool:
    """Return whether two tensors are colour images of different sizes; two of one size could be ``(x, y)``."""
    one, other = first.shape, second.shape
    return one != other and looks_coloured(one) and looks_coloured(other) and first.dtype == second.dtype


def looks_coloured(shape: Sequence[int]) -> bool:
    """Return whether a shape is that of a colour image, with its channels first."""
    return len(shape) == _IMAGE and shape[0] == _COLOURS and min(shape[1:]) >= _SIDE


def images_with_targets(inner: Sequence[tuple[str, Any]]) -> str | None:
    """Find a list of images beside a list of as many dicts, as detectors take them; return the end of its path."""
    lists = [(end, cast("Sequence[Any]", each)) for end, each in inner if isinstance(each, LISTS) and len(each)]
    if len(lists) < 2:
        return None
    targets = {len(each) for _, each in lists if all(isinstance(one, Mapping) for one in each)}
    images = (end for end, each in lists if len(each) in targets and all(map(_is_image, each)))
    return next(images, None)


def _is_image(value: Any) -> bool:
    return (isinstance(value, Tensor) or is_array(value)) and len(value.shape) == _IMAGE and value.shape[0] <= _CHANNELS


def _alike_tensors(values: Sequence[Any]) -> str:
    first = values[0]
    if len(values) < 2 or not all(isinstance(each, Tensor) or is_array(each) for each in values):
        return ""
    if len(values) == 2:
        images = two_images(first, values[1])
        return f"2 tensors of shapes {tuple(first.shape)} and {tuple(values[1].shape)}" if images else ""
    if len({(each.dtype, len(each.shape)) for each in values}) > 1 or not first.shape:
        return ""
    shapes = {tuple(each.shape) for each in values}
    images = len(first.shape) >= _IMAGE and all(shape[0] == first.shape[0] <= _CHANNELS for shape in shapes)
    if len(shapes) == 1:
        return f"{len(values)} tensors of shape {tuple(first.shape)}"
    return f"{len(values)} tensors such as one of shape {tuple(first.shape)}" if images else ""


def _is_flat(node: Any) -> bool:
    """Return whether all tensors in an entry have one dimension, as those of one text or one row have."""
    dims = {len(leaf.shape) for _, leaf in leaves(node) if isinstance(leaf, Tensor) or is_array(leaf)}
    return dims - {0} == {1}


def _form(node: Any) -> tuple[Any, ...] | None:
    """Return the form of a container: its keys, and the kind of each value; `None` for what is no container."""
    inner = children(node)
    if inner is None:
        return ("object", type(node)) if slices_itself(node) else None
    found: list[Any] = [type(node)]
    for end, child in inner:
        if isinstance(child, int | float) or (isinstance(child, Tensor) and child.ndim == 0):
            found.append("number")
        elif isinstance(child, Rows):
            found.append("marked")
        elif isinstance(child, Tensor) or is_array(child):
            found += [end, child.dtype, len(child.shape)]
        else:
            found += [end, _form(child) or type(child)]
    return tuple(found)
