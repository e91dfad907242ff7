"""Count the targets of each microbatch: in labels and masks, and in the graphs of torch's cross entropies."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from microbatch.batch.batch_tree import Rows, leaves
from microbatch.batch.batches import parts_of
from microbatch.batch.recognise import spread
from microbatch.batch.walk import is_array
from microbatch.loss.counted_labels import IGNORED
from microbatch.step.cutting import Cutting
from microbatch.step.parts.loss_graph import nodes_of_loss

_VOID = 255  # of segmentation
_TARGETS = ("label", "target", "'y'", ".y")
_MASKS = ("mask", "valid", "keep")
_SLACK = 1.01  # counts that differ by less have next to no effect
_THROUGH = ("AddBackward0", "MulBackward1", "ToCopyBackward0", "ViewBackward0")  # torch's own steps after a mean
_NODES = 8  # nodes of a graph that are looked at
_MEAN, _SUM = 1, 2  # torch's numbers of reduction="mean" and "sum"


@dataclass(slots=True)
class Unequal:
    """Targets that the microbatches have different numbers of.

    Attributes:
        path: The tensor that shows them.
        count: An expression for their number in a microbatch.
        least: Smallest number of targets a row.
        most: Largest number of targets a row.
    """

    path: str
    count: str
    least: float
    most: float


@dataclass(slots=True)
class Mean:
    """The cross entropy of one microbatch.

    Attributes:
        total: What torch divided by: the number of targets, or the sum of their class weights; shape ``()``.
        rows: Rows of the microbatch, or the count that the user gave.
        ignored: The label that is left out.
        weighted: Whether classes have weights.
    """

    total: Tensor
    rows: float
    ignored: int
    weighted: bool


def unequal_in(batch: object, cutting: Cutting) -> Unequal | None:
    """Find a tensor of a batch that counts differently in the microbatches; `None` if all count alike."""
    for path, count, counts in _counted(_columns(parts_of(batch))):
        per_row = [each.cpu().double() for each in counts]
        if cutting.order is None:
            pieces = [piece for each in per_row for piece in each.split(cutting.size or max(len(each), 1))]
        else:
            joined = torch.cat(per_row)
            pieces = [joined[rows] for rows in cutting.order]
        means = [float(piece.mean()) for piece in pieces if len(piece)]
        if means and max(means) > _SLACK * min(means):
            return Unequal(path, count, min(means), max(means))
    return None


def mean_behind(loss: Tensor, rows: float) -> Mean | None:
    """Find in a loss's graph, before its backward, the mean over targets that the loss is; `None` for others."""
    for node in nodes_of_loss(loss, _THROUGH, most=_NODES):
        if type(node).__name__.startswith("NllLoss"):
            total, weight = _saved(node, "total_weight"), _saved(node, "weight")
            if node._saved_reduction != _MEAN or not isinstance(total, Tensor):
                return None
            ignored = int(node._saved_ignore_index)
            return Mean(total, rows, ignored - (1 << 64) if ignored >> 63 else ignored, weight is not None)
    return None


def is_sum(loss: Tensor) -> bool:
    """Return whether a loss is what torch's loss functions return with ``reduction="sum"``, or adds to it."""
    return any(getattr(node, "_saved_reduction", None) == _SUM for node in nodes_of_loss(loss, _THROUGH, most=_NODES))


def unequal_means(means: Sequence[Mean]) -> Unequal | None:
    """Return how far apart the microbatches' cross entropies are in what they divided by; `None` if they agree."""
    if len(means) < 2:
        return None
    rows = torch.tensor([each.rows for each in means], dtype=torch.float64, device="cpu")
    totals = torch.stack([each.total.float() for each in means]).cpu().double() / rows  # a device may lack float64
    least, most = float(totals.min()), float(totals.max())
    if not most > _SLACK * least:
        return None
    if means[0].weighted:
        count = f"weight[labels[labels != {means[0].ignored}]].sum()"
        return Unequal("the class weights of torch's cross entropy", count, least, most)
    ignored = means[0].ignored
    return Unequal(f"ignore_index={ignored} of torch's cross entropy", f"(labels != {ignored}).sum()", least, most)


def _saved(node: Any, name: str) -> Any:
    """Return what a node saved, but not what hooks hold: reading it could recompute a layer."""
    raw = getattr(node, f"_raw_saved_{name}", None)
    if raw is None or getattr(raw, "unpack_hook", raw) is not None:
        return None
    return raw.data


def _columns(parts: Sequence[object]) -> dict[str, list[Tensor]]:
    """List by path the tensors that all parts of a batch have, with their rows first."""
    found = [dict(_tensors(part)) for part in parts]
    return {
        path: [each[path] for each in found]
        for path, value in found[0].items()
        if all(path in each and each[path].ndim == value.ndim for each in found)
    }


def _tensors(batch: object) -> Iterator[tuple[str, Tensor]]:
    for path, leaf in leaves(batch):
        has_rows = isinstance(leaf, Tensor) or is_array(leaf)
        marks = spread(leaf, path) if isinstance(leaf, Rows) else [(path, Rows(leaf))] if has_rows else []
        for at, mark in marks:
            value = _tensor_of(mark.value)
            if value is not None and value.ndim and -value.ndim <= mark.dim < value.ndim:
                value = value.movedim(mark.dim, 0)
                yield at, value.unflatten(0, (-1, mark.group)) if mark.group > 1 else value


def _tensor_of(value: Any) -> Tensor | None:
    """Return labels or a mask as a tensor; `None` for a value that is neither."""
    if isinstance(value, Tensor):
        return None if value.is_meta else value
    if (is_array(value) and getattr(value.dtype, "kind", "") in {"i", "u", "b"}) or isinstance(value, list | tuple):
        try:
            return torch.tensor(value)
        except Exception:  # noqa: BLE001 - whatever a list of any objects, or an array of another library, raises
            return None
    return None


def _counted(tensors: dict[str, list[Tensor]]) -> Iterator[tuple[str, str, list[Tensor]]]:
    """Yield each tensor that marks targets: its path, the number of targets, and the targets of each row."""
    labels, last = False, next(reversed(tensors), "")
    for path, values in tensors.items():
        if values[0].is_floating_point() or values[0].is_complex() or values[0].dtype == torch.bool:
            continue
        ignored = _ignored_in(values, is_target=path == last or any(word in path.lower() for word in _TARGETS))
        if ignored is not None:
            labels = True
            yield path, f"({path} != {ignored}).sum()", [_per_row(value != ignored) for value in values]
    # A mask of tokens counts targets only where no tensor has one target a row: a classifier pools under its mask. A
    # mask of rows counts rows, whatever else there is.
    single = labels or any(values[0].ndim == 1 and not _is_mask(path, values) for path, values in tensors.items())
    for path, values in tensors.items():
        if _is_mask(path, values) and not (single and values[0].ndim > 1):
            yield path, f"({path}).sum()", [_per_row(value) for value in values]


def _per_row(targets: Tensor) -> Tensor:
    return targets.flatten(1).sum(1) if targets.ndim > 1 else targets


def _is_mask(path: str, values: Sequence[Tensor]) -> bool:
    return (
        values[0].ndim <= 2
        and any(word in path.lower() for word in _MASKS)
        and all(bool(((value == 0) | (value == 1)).all()) for value in values)
    )


def _ignored_in(labels: Sequence[Tensor], *, is_target: bool) -> int | None:
    """Return the label that stands for "no target here"; `None` if there is none."""
    labels = [each for each in labels if each.numel()]
    if any(bool((each == IGNORED).any()) for each in labels):
        return IGNORED
    if not is_target or not labels:
        return None
    least, most = min(int(each.min()) for each in labels), max(int(each.max()) for each in labels)
    if least == -1 and most > 1:  # labels of -1 and 1 are two classes
        return -1
    if most == _VOID and labels[0].ndim > 2 and labels[0].dtype == torch.int64:  # maps of classes, not pictures
        classes = torch.cat([each[each != _VOID] for each in labels])
        return _VOID if classes.numel() and int(classes.max()) < _VOID // 2 else None
    return None
