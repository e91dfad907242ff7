"""Warn about losses that are probably not the large batch's: means over unequal counts, and contrastive losses."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack

import torch
from torch import Tensor

from microbatch.batch.batch_tree import leaves
from microbatch.batch.batches import parts_of
from microbatch.loss.coupling import listen, stop
from microbatch.step.cutting import Cutting
from microbatch.step.part import OpenWindow, Part
from microbatch.step.record import Step

_IGNORED = -100  # torch's and everyone's label for "no target here"
_VOID = 255  # of segmentation
_TARGETS = ("label", "target", "'y'", ".y")
_WINDOWS = 4  # windows whose batches are looked at
_SLACK = 1.01  # counts that differ by less have next to no effect


class CountWarning(Part):
    """Warn about a plain mean whose microbatches have different numbers of targets.

    Source:
        Law S1.
    """

    def __init__(self) -> None:
        self._windows = 0
        self._found: tuple[str, str, float, float] | None = None

    def cut(self, window: OpenWindow, batch: object, cutting: Cutting) -> None:
        """Find labels or masks that count differently in the microbatches."""
        self._found = None
        if self._windows >= _WINDOWS or cutting.microbatches < 2:
            return
        self._windows += 1
        parts = parts_of(batch)
        if len(parts) == 1 and cutting.cut is not None:
            self._found = _unequal(parts[0], cutting)

    def done(self, window: OpenWindow, step: Step) -> None:
        """Warn if the loss was a plain mean over the rows of each microbatch."""
        found, self._found = self._found, None
        if found is None or not window.denominator.means or window.coupled is not None:
            return
        path, condition, least, most = found
        window.setup.warn(
            "counts",
            f"the loss is a plain mean, and the microbatches have between {least:g} and {most:g} targets a row by "
            f"{path}: if the mean is over these targets, the gradient is not the large batch's. Return their sum with "
            "their count:\n"
            f"    n = ({condition}).sum()\n"
            "    return mb.Loss(sum=loss * n, count=n)\n"
            "(a causal language model predicts the next token: count labels[:, 1:]). If the mean is over rows, "
            "return mb.Loss(sum=loss * rows, count=rows)",
        )
        self._windows = _WINDOWS


class CouplingWarning(Part):
    """Warn about a contrastive loss that sees one microbatch at a time.

    Source:
        Law S8.
    """

    def __init__(self) -> None:
        self._names = set[str]()

    def open(self, window: OpenWindow, stack: ExitStack) -> None:
        """Notice contrastive losses until the end of the window."""
        self._names = listen()
        stack.callback(stop)

    def done(self, window: OpenWindow, step: Step) -> None:
        """Warn if a cut window computed one without ``encode=``."""
        if self._names and step.microbatches > 1 and window.coupled is None:
            name = min(self._names)
            window.setup.warn(
                "coupled loss",
                f"mb.losses.{name} compared the samples of one microbatch only, and not those of the whole batch. "
                "Encode first, and compute the loss of all representations:\n"
                f"    accumulator.step(batch, lambda model, encoded: mb.losses.{name}(*encoded, ...), encode=encode)\n"
                "where encode(model, microbatch) returns the representations (docs/coupled.md). If it is meant, "
                'call warnings.filterwarnings("ignore", category=mb.MicrobatchWarning)',
            )


def _unequal(batch: object, cutting: Cutting) -> tuple[str, str, float, float] | None:
    """Return path, condition, least and most targets a row, of a tensor that counts differently in the microbatches."""
    found = [(path, value) for path, value in leaves(batch) if isinstance(value, Tensor) and value.ndim]
    for path, condition, counts in _counted(found):
        per_row = counts.cpu().double()
        if cutting.order is None:
            pieces = per_row.split(cutting.size or len(per_row))
        else:
            pieces = [per_row[rows] for rows in cutting.order]
        means = [float(piece.mean()) for piece in pieces if len(piece)]
        if max(means) > _SLACK * min(means):
            return path, condition, min(means), max(means)
    return None


def _counted(tensors: list[tuple[str, Tensor]]) -> Iterator[tuple[str, str, Tensor]]:
    """Yield each tensor that marks targets: its path, the condition for a target, and the targets of each row."""
    labels = False
    for index, (path, value) in enumerate(tensors):
        if value.is_floating_point() or value.is_complex() or value.dtype == torch.bool or not value.numel():
            continue
        named = index == len(tensors) - 1 or any(word in path.lower() for word in _TARGETS)
        ignored = _ignored_in(value, is_target=named)
        if ignored is not None:
            labels = True
            kept = value != ignored
            yield path, f"{path} != {ignored}", kept.flatten(1).sum(1) if value.ndim > 1 else kept
    # A mask counts targets only where no tensor has one target a row: a classifier pools under its mask.
    if labels or any(value.ndim == 1 for _, value in tensors):
        return
    for path, value in tensors:
        if "mask" in path and value.ndim == 2 and bool(((value == 0) | (value == 1)).all()):
            yield path, path, value.sum(1)


def _ignored_in(labels: Tensor, *, is_target: bool) -> int | None:
    """Return the label that stands for "no target here"; `None` if there is none."""
    if bool((labels == _IGNORED).any()):
        return _IGNORED
    if not is_target:
        return None
    least, most = int(labels.min()), int(labels.max())
    if least == -1 and most > 1:  # labels of -1 and 1 are two classes
        return -1
    if most == _VOID and labels.ndim > 2 and labels.dtype == torch.int64:  # maps of classes, not pictures
        classes = labels[labels != _VOID]
        return _VOID if classes.numel() and int(classes.max()) < _VOID // 2 else None
    return None
