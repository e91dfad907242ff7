"""Choose the rows that a model is asked about: rows, and changed copies of rows, in which counts differ."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TypeAlias

import torch
from torch import Tensor
from torch.nn.functional import pad

from microbatch.devices.backend import to_wide
from microbatch.loss.counted_labels import IGNORED, Fields, rows_in, take

ROWS_ASKED = 3  # most rows that a model is asked about at once
_NATURAL = 4  # most trials of rows as they are
_MORE = 6  # most trials with labels left out at random
_SHARES = (0.4, 1.0, 0.7)  # how much of a mask the rows of a changed copy keep
_SCALES = (1.0, 0.5, 0.25)  # by what the numbers of the rows are multiplied in a changed copy
_CLASSES = 64  # most classes that labels are drawn from

Ranges: TypeAlias = dict[str, tuple[float, float]]
"""The smallest and the largest value of the tensors of a microbatch that labels, masks or weights are seen in."""


@dataclass(frozen=True, slots=True)
class Trial:
    """Rows whose loss is compared with that of its two parts.

    Attributes:
        whole: The rows.
        parts: The first row, and the others.
        twice: The first part two times: whatever a mean is over, it stays as it is.
        changed: Whether labels, masks or numbers are others than in the batch.
    """

    whole: Fields
    parts: Sequence[Fields]
    twice: Fields
    changed: bool = False


def trial_of(rows: Fields, *, changed: bool = False) -> Trial:
    """Return the trial of some rows: the first one against the others."""
    return Trial(rows, [take(rows, [0]), take(rows, range(1, rows_in(rows)))], take(rows, [0, 0]), changed)


def different_rows(batch: Fields, most: int) -> list[int]:
    """Return numbers of at most ``most`` rows that differ: by their labels, classes, masks and numbers."""
    features, rows = _features(batch), rows_in(batch)
    ends = [each for feature in features for each in (int(feature.argmax()), int(feature.argmin()))]
    return list(dict.fromkeys([*ends, *range(rows)]))[:most]


def natural_trials(batch: Fields) -> list[Trial]:
    """Return trials of rows of a batch, as they are: the first row and the others differ where the batch's rows do."""
    rows = rows_in(batch)
    if rows < 2:
        return []
    number = min(ROWS_ASKED, rows)
    some = different_rows(batch, 2 * _NATURAL)
    orders = [[some[(first + each) % len(some)] for each in range(number)] for first in range(min(len(some), _NATURAL))]
    return [trial_of(take(batch, order)) for order in orders]


def changed_trials(batch: Fields, name: str, labels: Tensor | None, *, ignores: bool, classes: int) -> list[Trial]:
    """Return trials of changed copies: other classes in the parts, shorter masks, smaller numbers.

    Args:
        batch: A batch.
        name: The name of its labels.
        labels: Its classes; `None` for a batch without.
        ignores: Whether the loss may be given a label of -100.
        classes: How many classes the loss is known to have; 0 where it is not known.

    Returns:
        Trials.
    """
    order = [each % rows_in(batch) for each in range(ROWS_ASKED)]
    rows = take(batch, order)
    changes: list[dict[str, Tensor]] = []
    if labels is not None and bool((labels != IGNORED).any()):
        pool, some = _pool(labels, classes), rows[name]
        changes += [{name: _other_classes(some, pool, index)} for index in range(min(2, len(pool)))]
    else:
        target = rows.get("labels")
        if isinstance(target, Tensor) and target.is_floating_point() and ignores:
            changes.append({"labels": _partly_ignored(target)})
    masks = {each: _shorter(value) for each, value in rows.items() if _is_mask(each, value)}
    numbers = {
        each: value * torch.tensor(_SCALES, dtype=value.dtype, device=value.device)
        for each, value in rows.items()
        if isinstance(value, Tensor) and value.is_floating_point() and value.ndim == 1
    }
    changes += [each for each in (masks, numbers) if each]
    return [trial_of(take(batch, order, **each), changed=True) for each in changes]


def relabelled_trials(batch: Fields, labels: Tensor, name: str, *, classes: int) -> list[Trial]:
    """Return trials with labels that are left out at random, and with others of the batch's labels in their place."""
    random = torch.Generator().manual_seed(0)
    order = [each % rows_in(batch) for each in range(ROWS_ASKED)]
    pool = labels[labels != IGNORED].flatten()
    if labels.ndim == 1 or bool((pool == pool[0]).all()):
        pool = _pool(labels, classes)
    found: list[Trial] = []
    for index in range(_MORE):
        some = labels[torch.tensor(order, device=labels.device)]
        drawn = pool[torch.randint(len(pool), some.shape, generator=random).to(pool.device)]
        if labels.ndim == 1:
            drawn = _other_classes(some.where(some != IGNORED, pool[0]), pool, index)
        kept = _kept(some.shape, index, random).to(some.device)
        relabelled = drawn.where(kept, torch.full_like(some, IGNORED))
        found.append(trial_of(take(batch, order, **{name: relabelled}), changed=True))
    return found


def ranges_of(batch: Fields) -> Ranges:
    """Return the ranges of what a loss could leave out or weigh by: labels, masks, positions, weights."""
    found = {each: value for each, value in batch.items() if _is_telling(each, value)}
    if not found:
        return {}
    ends = [torch.stack([to_wide(each.amin()), to_wide(each.amax())]).cpu() for each in found.values()]
    return {
        name: (float(low), float(high) if value.ndim == 1 else float("inf"))
        for (name, value), (low, high) in zip(found.items(), ends, strict=True)
    }


def is_wider(ranges: Ranges, shown: Ranges) -> bool:
    """Return whether a microbatch shows a value outside of the ranges that were shown before."""
    none = float("inf"), -float("inf")
    return any(
        low < shown.get(name, none)[0] or high > shown.get(name, none)[1] for name, (low, high) in ranges.items()
    )


def joined(batches: Sequence[Fields]) -> dict[str, object] | None:
    """Join rows of several batches to one, shorter rows filled up; `None` where they do not fit together."""
    if any(each.keys() != batches[0].keys() for each in batches):
        return None
    found: dict[str, object] = {}
    masked = any("mask" in name for name in batches[0])
    for name, first in batches[0].items():
        values = [each[name] for each in batches]
        if not isinstance(first, Tensor) or not first.ndim:
            found[name] = first
            continue
        if any(not isinstance(each, Tensor) or each.ndim != first.ndim for each in values):
            return None
        if len({each.shape[1:] for each in values}) > 1:
            longest = max(each.shape[1] for each in values)
            if not masked or len({each.shape[2:] for each in values}) > 1:
                return None
            fill = IGNORED if "labels" in name else 0
            sides = [0, 0] * (first.ndim - 2)
            values = [pad(each, [*sides, 0, longest - each.shape[1]], value=fill) for each in values]
        found[name] = torch.cat([each.to(first.device) for each in values])
    return found


def _features(batch: Fields) -> list[Tensor]:
    """Return numbers of each row in which rows differ: labels first."""
    found: list[Tensor] = []
    for name in sorted(batch, key=lambda each: ("label" not in each, "mask" not in each)):
        value = batch[name]
        if not isinstance(value, Tensor) or not value.ndim or value.is_complex():
            continue
        telling = not value.is_floating_point() or value.ndim == 1 or _is_telling(name, value)
        if telling:
            value = value.detach()
            kept = value if value.ndim == 1 else (value > 0 if "label" not in name else value != IGNORED)
            feature = to_wide(kept.reshape(len(value), -1)).sum(1)
            if feature.numel() and bool((feature != feature[0]).any()):
                found.append(feature)
    return found


def _is_telling(name: str, value: object) -> bool:
    if not isinstance(value, Tensor) or not value.ndim or not value.numel() or value.is_complex():
        return False
    if not value.is_floating_point():
        return True
    return value.ndim == 1 or any(each in name for each in ("label", "mask", "weight"))


def _is_mask(name: str, value: object) -> bool:
    if not isinstance(value, Tensor) or value.ndim != 2 or "mask" not in name:
        return False
    return bool(((value == 0) | (value == 1)).all())


def _shorter(mask: Tensor) -> Tensor:
    """Return a mask whose rows keep different shares of their ones, and one of them at least."""
    ones = mask != 0
    place, number = ones.cumsum(1), ones.sum(1, keepdim=True)
    share = torch.tensor(_SHARES, device=mask.device)[: len(mask), None]
    return mask * (place <= (number * share).ceil().clamp(min=1)).to(mask.dtype)


def _partly_ignored(target: Tensor) -> Tensor:
    """Return numbers to predict of which one row leaves out a part."""
    changed = target.clone()
    if target.ndim == 1:
        changed[1] = IGNORED
    elif target.shape[-1] > 1:
        changed[0, ..., target.shape[-1] // 2 :] = IGNORED
    return changed


def _pool(labels: Tensor, classes: int) -> Tensor:
    """Return the classes that copies may have: those of the batch, and a second one where it has only one."""
    pool = labels[labels != IGNORED].unique()[:_CLASSES]
    only = int(pool[0])
    if len(pool) == 1 and (only > 0 or classes > 1 or (not classes and labels.device.type == "cpu")):
        pool = torch.cat([pool, pool.new_tensor([only - 1 if only else 1])])
    return pool


def _other_classes(labels: Tensor, pool: Tensor, index: int) -> Tensor:
    """Return labels of one class in the first row, and of the next classes in the others."""
    row = torch.arange(len(labels), device=labels.device).clamp(max=1).view(-1, *[1] * (labels.ndim - 1))
    place = torch.arange(labels[0].numel(), device=labels.device).view(1, *labels.shape[1:]) if labels.ndim > 1 else 0
    drawn = pool[(row * (1 + place) + index) % len(pool)]
    return drawn.expand_as(labels).where(labels != IGNORED, labels)


def _kept(shape: torch.Size, index: int, random: torch.Generator) -> Tensor:
    """Draw which labels stay: the first row has few, and every part has at least one beside a first label."""
    if len(shape) == 1:
        return torch.tensor([each in {0, 1 + index % 2} for each in range(shape[0])])
    share = torch.tensor([0.1, 0.7, 0.4]).view(-1, *[1] * (len(shape) - 1))
    kept = torch.rand(shape, generator=random) < share
    for row in range(shape[0]):
        kept[row][..., 0] = (row + index) % 2 == 0
    kept[:2, ..., -1 - index % max(1, shape[-1] - 1)] = True
    return kept


def widened(shown: Ranges, ranges: Ranges) -> Ranges:
    """Return ranges that hold the ranges of before and those of a microbatch."""
    both: Mapping[str, tuple[float, float]] = {**ranges, **shown}
    return {
        name: (min(low, ranges.get(name, (low, high))[0]), max(high, ranges.get(name, (low, high))[1]))
        for name, (low, high) in both.items()
    }
