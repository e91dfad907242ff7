"""Predict the peak memory of windows by sequence length, from dry runs at several lengths."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from microbatch.arguments import attribute
from microbatch.batch.batch_tree import Rows, Whole, map_leaves
from microbatch.memory.length_curves import Lengthwise
from microbatch.step.options import Options
from microbatch.step.size.dry_run import dry_run
from microbatch.step.size.dry_run_copies import LossFunction


def dry_run_lengths(
    options: Options,
    loss_fn: LossFunction,
    *,
    batches: Mapping[int, object],
    sizes: Sequence[int] | None = None,
    witness: Sequence[int] = (1, 2, 4, 8, 16),
) -> Lengthwise:
    """Predict the peak memory of an accumulator's windows by microbatch size and sequence length.

    Args:
        options: The options of the accumulator.
        loss_fn: As for `Accumulator.step`.
        batches: Batches by length, three or more, ascending; `some_columns` creates them from one batch. Each length
            should be about twice the one before.
        sizes: As for `dry_run`.
        witness: As for `dry_run`.

    Returns:
        The prediction.

    Raises:
        ConfigError: There are too few lengths, or the model, the optimizer or the loss function cannot be copied.

    Cost:
        The cost of `dry_run` for each length.
    """
    return Lengthwise(
        {
            length: dry_run(options, loss_fn, batch=batch, sizes=sizes, witness=witness)
            for length, batch in batches.items()
        }
    )


def some_columns(batch: object, length: int, *, columns: int) -> Any:
    """Copy the first columns of a batch, and repeat them if there are too few.

    Args:
        batch: A batch that `rows_of` accepts.
        length: Number of columns of the copy; at least 1.
        columns: Number of columns of the batch. Only tensors and arrays with this second dimension are cut.

    Returns:
        The copy, in the same structure.

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
        return value[:, index] if tuple(attribute(value, "shape", ()))[1:2] == (columns,) else value

    return map_leaves(leaf, batch)
