"""Find batches that could be read in another way than they are: along another dimension, or with other rows."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any, cast

from torch import Size, Tensor, nn

from microbatch.arguments import attribute
from microbatch.batch.marks import Rows
from microbatch.batch.recognise import count_rows
from microbatch.batch.uncollated import looks_coloured
from microbatch.batch.walk import LISTS, children, is_array, is_number, is_size, leaves, slices_itself

_BATCH_FIRST = {"input_ids", "attention_mask", "token_type_ids"}  # names of a library whose rows always come first
_CHANNELS = 4  # most channels of an image
_IMAGES = 4  # dimensions of a batch of images, whose second dimension is the channels


def other_layout(batch: object, *, time_first: Sequence[str], thorough: bool = False) -> str:
    """Return a warning if the second dimension could hold the rows of every tensor as well as the first one.

    Sequences of one length look like this in either layout, so a module that expects the time first must be in the
    model, or the search must be thorough.

    Args:
        batch: One batch that has rows.
        time_first: Names of the model's modules that expect the layout (time, rows, features).
        thorough: Whether two tensors that agree in their first two dimensions are enough, if one of them has three or
            more. Tensors of shape ``(rows, features)`` or ``(rows, tokens)`` are never enough.

    Returns:
        A text with the remedy; empty if the first dimension is not doubtful.
    """
    if isinstance(batch, Mapping) and not _BATCH_FIRST.isdisjoint(batch):
        return ""
    if isinstance(batch, Tensor) and not time_first:
        return ""  # as below, sooner
    found = leaves(batch)
    if any(isinstance(leaf, Rows) for _, leaf in found):
        return ""
    shapes = {path: tuple(leaf.shape) for path, leaf in found if isinstance(leaf, Tensor) or is_array(leaf)}
    wide = {path: shape for path, shape in shapes.items() if len(shape) > 1}
    named = isinstance(batch, tuple) and attribute(batch, "_fields") is not None
    images = None if named else next(filter(None, (_images(each, shapes) for each in wide)), None)
    if images is not None:
        return images
    if not wide:
        return ""
    first = next(iter(wide.values()))
    rows, others = first[0], first[1]
    if rows < 2 or others < 2 or any(shape[:2] != first[:2] or len(shape) == _IMAGES for shape in wide.values()):
        return ""
    # A tensor with one dimension and a list show the rows, unless both dimensions have the same size.
    shown = any(len(shape) == 1 for shape in shapes.values()) or any(
        isinstance(leaf, LISTS) or slices_itself(leaf) for _, leaf in found
    )
    if shown and (rows != others or not time_first):
        return ""
    if not time_first and (not thorough or len(wide) < 2 or max(map(len, wide.values())) < 3):
        return ""
    named = ", ".join(f"{path} of shape {shape}" for path, shape in list(wide.items())[:3])
    why = f", and {time_first[0]} of the model expects (time, rows, features)" if time_first else ""
    return (
        f"the rows of the batch could be in dimension 0 or in dimension 1 of all its tensors ({named}){why}. "
        f"The window uses dimension 0, so the batch has {rows} rows. If the rows are in dimension 1, mark every tensor "
        "as mb.Rows(value, dim=1). If dimension 0 is right, mark one tensor as mb.Rows(value), and this warning ends"
    )


def modules_with_time_first(model: nn.Module) -> list[str]:
    """List the modules of a model that expect the layout (time, rows, features), by name and type."""
    kinds = (nn.RNNBase, nn.MultiheadAttention, nn.Transformer, nn.RNNCellBase)
    return [
        f"{name or 'the root module'} ({type(each).__name__})"
        for name, each in model.named_modules()
        if isinstance(each, kinds) and not attribute(each, "batch_first", False)
    ]


def doubtful_numbers(batch: object) -> str:
    """Return a warning if numbers in lists could be those of the rows as well as a value of the batch; or "".

    These are lists of equally long lists, which are cut, and short tuples of whole numbers, which are not cut.
    """
    if isinstance(batch, Tensor):
        return ""
    if type(batch) is dict and all(isinstance(each, Tensor) for each in cast("dict[Any, Any]", batch).values()):
        return ""
    found = list(_in_lists(batch, "batch"))
    if not found or not any(isinstance(leaf, Tensor | Rows) or is_array(leaf) for _, leaf in leaves(batch)):
        return ""
    rows = count_rows(batch)
    for path, shape in found:
        if shape[0] != rows or rows < 2:
            continue
        if len(shape) > 1:
            return (
                f"{path} is a list of {rows} lists of numbers, and the batch has {rows} rows. It is read as one "
                "list for each row. If it is a value of the whole batch, such as weights, mark it with mb.Whole(...). "
                "If it has one list for each row, mark it with mb.Rows(...), and this warning ends"
            )
        return (
            f"{path} is a tuple of {rows} whole numbers, and the batch has {rows} rows. It is read as a size, which "
            "every microbatch gets. If it has one number for each row, mark it with mb.Rows(...). If it is a size, "
            "mark it with mb.Whole(...), and this warning ends"
        )
    return ""


def _in_lists(node: object, path: str) -> Iterator[tuple[str, tuple[int, ...]]]:
    """Yield every size, and every list of lists of numbers, with its path and shape."""
    inner = children(node)
    if isinstance(node, LISTS) and len(node):
        shape = _shape(node) if inner is None else None
        if shape is not None and len(shape) > 1:
            yield path, shape
        if is_size(node) and not isinstance(node, Size) and attribute(node, "_fields") is None:
            yield path, (len(node),)
    for end, child in inner or ():
        if not isinstance(child, Tensor):
            yield from _in_lists(child, path + end)


def _shape(node: object) -> tuple[int, ...] | None:
    """Return the shape of numbers in lists, as an array of them has it; `None` if there is no such array."""
    if not isinstance(node, LISTS):
        return () if is_number(node) else None
    values = cast("Sequence[Any]", node)
    if len({len(each) if isinstance(each, LISTS) else -1 for each in values}) != 1:
        return None
    shapes = {_shape(each) for each in values}
    inner = shapes.pop()
    return None if shapes or inner is None else (len(values), *inner)


def _images(path: str, shapes: Mapping[str, tuple[int, ...]]) -> str | None:
    """Return a warning for a list of one or two tensors that look like images, with their channels first.

    A warning, and no error: one tensor of this shape, or two equal ones, can also be the last three rows of a loader.
    """
    shape, start = shapes[path], path.removesuffix("[0]")
    if start == path or len(shape) != _IMAGES - 1:
        return None
    if sum(bool(each) for other, each in shapes.items() if other.startswith(f"{start}[")) == 1:
        if not looks_coloured(shape):
            return None
        return (
            f"{path} of shape {shape} is read as a value with {shape[0]} rows. If it is one image, collate it "
            "(torch.stack, or collate_fn of the DataLoader), or mark the list of images as mb.Rows([...]). If it has "
            f"{shape[0]} rows, mark it with mb.Rows(value), and this warning ends"
        )
    if shapes.get(f"{start}[1]") != shape or f"{start}[2]" in shapes:
        return None
    if not 1 < shape[0] <= _CHANNELS < min(shape[1:]):
        return None
    return (
        f"{start} is a list of 2 tensors of shape {shape}, which is read as two values with {shape[0]} rows each. "
        "If the list holds 2 images, collate them (torch.stack), or mark the list as mb.Rows([...]). If it holds two "
        "values, pass them in a dict, and this warning ends"
    )
