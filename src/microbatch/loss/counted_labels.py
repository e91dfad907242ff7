"""Count the targets of a batch for models that compute their loss themselves."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, TypeAlias, cast

import torch
from torch import Tensor

from microbatch.errors import LossError
from microbatch.kind_words import kind_of

IGNORED = -100  # PyTorch's label for "no target here"
ROWS, LABELS, NEXT_LABELS = "rows", "labels", "next_labels"
NAMES = (ROWS, LABELS, NEXT_LABELS)
CHOICES = (
    'pass count="rows", "labels" (all that are not -100), "next_labels" (as a causal language model counts), or a '
    "function that returns the count of a microbatch"
)

Fields: TypeAlias = Mapping[str, Any]
CountOf: TypeAlias = str | Callable[[Any], Any]


def fields_of(batch: object) -> Fields:
    """Return a batch as a mapping from names to values, or refuse it."""
    if not isinstance(batch, Mapping):
        raise LossError(
            f"mb.losses.from_model calls model(**microbatch), so a microbatch must be a dict, not {kind_of(batch)}; "
            "write a loss function that returns mb.Loss(sum=..., count=...)"
        )
    return cast("Fields", batch)


def rows_in(batch: Fields) -> int:
    """Count the rows of a microbatch: the first dimension of its tensors, which must agree."""
    sizes = {len(each) for each in batch.values() if isinstance(each, Tensor) and each.ndim}
    if len(sizes) != 1:
        found = " and ".join(map(str, sorted(sizes))) or "no"
        raise LossError(f"the rows of this microbatch are not known: its tensors have {found} rows; {CHOICES}")
    return sizes.pop()


def count_in(batch: Fields, count: CountOf) -> Any:
    """Count the targets of a microbatch: by one of `NAMES`, or by a function of the microbatch."""
    if not isinstance(count, str):
        return count(batch)
    if count == ROWS:
        return rows_in(batch)
    shifted = batch.get("shift_labels") if count == NEXT_LABELS else None
    labels = batch.get("labels") if shifted is None else shifted
    if not isinstance(labels, Tensor) or not labels.ndim:
        raise LossError(f'count="{count}" counts the tensor "labels" of a microbatch, and there is none; {CHOICES}')
    if count == NEXT_LABELS and shifted is None:
        labels = labels[..., 1:]
    return labels.numel() if labels.is_floating_point() else (labels != IGNORED).sum()


def take(batch: Fields, index: Sequence[int], **replaced: Tensor) -> dict[str, Any]:
    """Copy rows of a microbatch, in any order and with repetition; ``replaced`` take the place of some values."""
    rows = rows_in(batch)
    return {name: replaced.get(name, _taken(value, index, rows)) for name, value in batch.items()}


def is_fake(batch: Fields) -> bool:
    """Return whether a microbatch holds tensors without values, as dry runs do."""
    return any(type(each).__name__ == "FakeTensor" or getattr(each, "is_meta", False) for each in batch.values())


def _taken(value: Any, index: Sequence[int], rows: int) -> Any:
    if isinstance(value, Tensor):
        return value[torch.tensor(index, device=value.device)] if value.ndim else value
    if isinstance(value, list | tuple) and len(cast("Sequence[Any]", value)) == rows:
        return [value[each] for each in index]
    return value
