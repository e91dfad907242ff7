"""The denominator of a window over an engine, and the losses that the engine gets: divided before each backward."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from microbatch.batch.batch_tree import leaves
from microbatch.errors import EmptyBatchError, MissingCountError
from microbatch.loss.loss import Loss, Share
from microbatch.step.denominator import Denominator, Total


class EngineDenominator(Denominator):
    """A denominator that is known before the first backward, because an engine's gradient is not divided at the end.

    Source:
        Laws N1 to N5.
    """

    def expect(self, batches: Sequence[Any], rows: int | None, *, begun: bool, total: Total) -> None:
        """Add up the rows and the declared counts over the ranks.

        Args:
            batches: This rank's share of the effective batch.
            rows: Their rows.
            begun: Whether a backward has run already.
            total: Adds up rows and counts over the ranks.

        Raises:
            EmptyBatchError: No rank has a row.
        """
        if self.declares:
            super().expect(batches, rows, begun=begun, total=total)
        else:
            self.declare(*total(float(rows or 0), {}))
            self.means = True
        if not self.rows:
            raise EmptyBatchError("the batch has 0 rows on every rank; skip empty batches before the training step")

    def seeds(self, shares: Sequence[Share]) -> list[Tensor]:
        """Return the first gradient of each share's backward, in float32 at least.

        Args:
            shares: The shares of one microbatch.

        Returns:
            0-d tensors.

        Raises:
            MissingCountError: A loss has a count of its own that is not declared.
        """
        declared = self.declared or {}
        for share in shares:
            if not self.declares and not share.is_mean and share.name not in declared:
                raise MissingCountError(
                    f"the loss {share.name!r} has a count of its own, and the engine needs each microbatch's share of "
                    "the whole, over all ranks, before its backward. Pass counts=, a function of the whole "
                    f"batch, for example counts=lambda batch: {{{share.name!r}: (batch['labels'] != -100).sum()}}"
                )
        return super().seeds([replace(share, value=_widened(share.value.detach())) for share in shares])

    def factor(self, counts: Mapping[str, float]) -> float:
        """Check that the counted numbers are the expected ones.

        Args:
            counts: Counted numbers by term, over all ranks.

        Returns:
            1.

        Raises:
            MissingCountError: Only some of the rows contributed to a mean.
        """
        for name, count in counts.items():
            if not self.declares and 0 <= count < (self.rows or 0):
                raise MissingCountError(
                    f"the loss {name!r} is a mean over samples, of which {count:g} of {self.rows} contributed, and the "
                    "engine got shares of all. Pass counts=, a function of the whole batch that returns their number"
                )
        return super().factor(counts)


def engine_loss(values: Sequence[Tensor], seeds: Sequence[Tensor], *, divisor: int) -> Tensor:
    """Turn a microbatch's loss into the loss that an engine gets.

    The engine adds up the gradients of its passes, and divides their sum over the ranks by ``divisor``. So each pass
    gets ``divisor * S / C``, and the gradient is that of ``sum S / C`` over all passes and ranks.

    Args:
        values: The loss of each term.
        seeds: The first gradient of each.
        divisor: What the engine divides the sum over the ranks by; at least 1.

    Returns:
        The loss; shape ``()``, at least float32.

    Example:
        >>> value, seed = torch.tensor(6.0), torch.tensor(1 / 12)  # 12 tokens on two ranks
        >>> engine_loss([value], [seed], divisor=2).item()  # 2 * 6 / 12
        1.0
    """
    parts = [_widened(value) * seed for value, seed in zip(values, seeds, strict=True)]
    return sum(parts[1:], parts[0]) * divisor


def silent_loss(outputs: Sequence[Tensor], returned: object) -> Tensor | None:
    """Create a loss with a gradient of zero, for a pass that only communicates.

    Args:
        outputs: What the model's forward returned: a loss may be a mean of nothing, whose gradient is NaN times zero.
        returned: What the loss function returned, for models whose outputs are not known.

    Returns:
        The loss; shape ``()``. `None` if neither has a graph, because the model has not been called.
    """
    found = [each for each in outputs if each.requires_grad] or graphs_of(returned)
    return torch.stack([(each * 0.0).sum().float() for each in found]).sum() if found else None


def graphs_of(returned: object) -> list[Tensor]:
    """List the tensors with a graph in the result of a model or a loss function."""
    if isinstance(returned, Loss):
        return graphs_of(returned.sum)
    if isinstance(returned, Mapping):
        return [each for part in returned.values() for each in graphs_of(part)]
    return [leaf for _, leaf in leaves(returned) if isinstance(leaf, Tensor) and leaf.requires_grad]


def _widened(value: Tensor) -> Tensor:
    return value.to(torch.promote_types(value.dtype, torch.float32))
