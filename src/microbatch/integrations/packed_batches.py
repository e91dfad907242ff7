"""Batches whose tensors have different numbers of rows, such as packed images: each one is run as it is."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from torch import Tensor

from microbatch.errors import ConfigError


def are_packed(batches: Sequence[Any], *, together: int) -> bool:
    """Return whether batches of a loader cannot be cut into rows.

    Args:
        batches: The batches of a step.
        together: The trainer's ``gradient_accumulation_steps``.

    Returns:
        Whether a tensor of theirs has another number of rows than the others.

    Raises:
        ConfigError: They cannot be cut, and the step has only one batch.
    """
    for batch in batches:
        sizes = {name: len(each) for name, each in _tensors_of(batch).items() if each.ndim}
        if len(set(sizes.values())) > 1:
            if together > 1:
                return True
            told = ", ".join(f"{name}: {size}" for name, size in sizes.items())
            raise ConfigError(
                f"the tensors of a batch have different numbers of rows ({told}), as packed images have, so it cannot "
                "be cut. Set per_device_train_batch_size to what fits, and gradient_accumulation_steps=N for N times "
                "as many rows: each batch of the loader is then one microbatch of the step"
            )
    return False


def as_one_row(batch: Mapping[str, Any]) -> dict[str, Any]:
    """Return a batch as a single row.

    Args:
        batch: A batch.

    Returns:
        The batch, with a dimension more.
    """
    return {name: each[None] if isinstance(each, Tensor) else each for name, each in batch.items()}


def as_batch(row: Mapping[str, Any]) -> dict[str, Any]:
    """Undo `as_one_row`.

    Args:
        row: What it returned.

    Returns:
        The batch.
    """
    return {name: each[0] if isinstance(each, Tensor) else each for name, each in row.items()}


def _tensors_of(batch: Any) -> dict[str, Tensor]:
    values: Mapping[str, Any] = batch if isinstance(batch, Mapping) else {}
    return {name: each for name, each in values.items() if isinstance(each, Tensor)}
