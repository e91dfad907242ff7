"""Rehearse windows at several sequence lengths, to learn what they take at any."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from microbatch.batch.batch_tree import Rows, Whole, map_leaves
from microbatch.memory.length_curves import Lengthwise
from microbatch.step.dry_run import rehearse
from microbatch.step.dry_run_copies import LossFunction
from microbatch.step.settings import Settings


def rehearse_lengths(
    settings: Settings,
    loss_fn: LossFunction,
    *,
    batches: Mapping[int, object],
    sizes: Sequence[int] | None = None,
    witness: Sequence[int] = (1, 2, 4, 8, 16),
) -> Lengthwise:
    """Predict the peak memory of an accumulator's windows by microbatch size and sequence length.

    Args:
        settings: The accumulator's.
        loss_fn: As for `Accumulator.step`.
        batches: Batches of three or more lengths, ascending, by length; `some_columns` makes them of one. Two lengths
            that are alike say little of others: take each twice the one before.
        sizes: As for `rehearse`.
        witness: As for `rehearse`.

    Returns:
        The prediction.

    Raises:
        ConfigError: Too few lengths, or model, optimizer or loss function cannot be copied.

    Cost:
        A rehearsal for each length.
    """
    return Lengthwise(
        {
            length: rehearse(settings, loss_fn, batch=batch, sizes=sizes, witness=witness)
            for length, batch in batches.items()
        }
    )


def some_columns(batch: object, length: int, *, columns: int) -> Any:
    """Copy a batch with other columns: its first ones, and again from there where there are too few.

    Args:
        batch: What `rows_of` accepts.
        length: How many columns; at least 1.
        columns: How many it has; of its tensors and arrays those are cut whose second dimension this is.

    Returns:
        The same structure.

    Example:
        >>> import torch
        >>> batch = {"ids": torch.tensor([[1, 2, 3]]), "label": torch.tensor([7])}
        >>> some_columns(batch, 5, columns=3)["ids"].tolist()
        [[1, 2, 3, 1, 2]]
    """
    index = [column % columns for column in range(length)]

    def leaf(value: Any, path: str) -> Any:
        del path
        if isinstance(value, Whole | Rows):
            return value
        return value[:, index] if tuple(getattr(value, "shape", ()))[1:2] == (columns,) else value

    return map_leaves(leaf, batch)
