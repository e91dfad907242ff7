"""The passes that an engine makes: as many on every rank, each with its share of the whole loss."""

from __future__ import annotations

import zlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, TypeAlias

import torch
from torch import Tensor

from microbatch.batch.batch_tree import leaves, rows_of, slice_rows
from microbatch.batch.prefetch import feed
from microbatch.loss.loss import Loss, Share
from microbatch.ranks.process_group import RankGroup
from microbatch.step.denominator import Denominator
from microbatch.step.peers.borrow_rows import borrow_rows, few_of

Pass: TypeAlias = tuple[int, Any]


def engine_loss(shares: Sequence[Share], denominator: Denominator, *, divisor: int) -> Tensor:
    """Turn a microbatch's loss into what an engine has to be given.

    The engine adds the gradients of its passes up, and divides their sum over the ranks by ``divisor``. So each pass is
    given ``divisor * S / C``, and the gradient is that of ``sum S / C`` over all passes and ranks.

    Args:
        shares: The microbatch's sums; at least one.
        denominator: What each is divided by, over all ranks.
        divisor: What the engine divides the sum over the ranks by; at least 1.

    Returns:
        The loss; shape ``()``, at least float32, whatever the losses' dtype.

    Raises:
        UnknownTermError: A term whose denominator nobody declared.

    Example:
        >>> import microbatch as mb
        >>> from microbatch.loss.loss import shares_of
        >>> denominator = Denominator()
        >>> denominator.declare(8.0, {"loss": 12.0})  # rows and tokens of two ranks
        >>> said = mb.Loss(sum=torch.tensor(6.0, requires_grad=True), count=4)
        >>> engine_loss(shares_of(said, rows=2), denominator, divisor=2).item()  # 2 * 6 / 12
        1.0
    """
    wide = [replace(s, value=s.value.to(torch.promote_types(s.value.dtype, torch.float32))) for s in shares]
    parts = [share.value * seed for share, seed in zip(wide, denominator.seeds(wide), strict=True)]
    return sum(parts[1:], parts[0]) * divisor


def silent_loss(outputs: Sequence[Tensor], returned: object) -> Tensor | None:
    """Make a loss whose gradient is zero everywhere, for a pass that the other ranks wait for.

    Args:
        outputs: What the model's forward returned: a loss may be a mean of nothing, whose gradient is NaN times zero.
        returned: What the loss function returned; it is taken where the model's outputs cannot be seen.

    Returns:
        The loss; shape ``()``. `None` where neither has a graph: the model has not been called.
    """
    found = [each for each in outputs if each.requires_grad] or graphs_of(returned)
    return torch.stack([(each * 0.0).sum().float() for each in found]).sum() if found else None


def graphs_of(returned: object) -> list[Tensor]:
    """List the tensors in something returned that have a graph.

    Args:
        returned: By a model or by a loss function.

    Returns:
        Those that require a gradient.
    """
    if isinstance(returned, Loss):
        return graphs_of(returned.sum)
    if isinstance(returned, Mapping):
        return [each for part in returned.values() for each in graphs_of(part)]
    return [leaf for _, leaf in leaves(returned) if isinstance(leaf, Tensor) and leaf.requires_grad]


@dataclass(frozen=True, slots=True)
class Passes:
    """What one rank runs in a window.

    Attributes:
        batch: Its rows of the effective batch.
        size: Rows of a microbatch.
        planned: Passes of the rank that has most.
        lent: A few rows of another rank, for one that has none.
    """

    batch: Any
    size: int
    planned: int
    lent: Any = None

    @classmethod
    def agree(cls, ranks: RankGroup | None, batch: object, *, size: int, together: bool) -> Passes:
        """Agree on how many passes there are.

        Args:
            ranks: Who else runs passes; `None` for a single process.
            batch: This rank's rows; some rank has one.
            size: Rows of a microbatch here.
            together: Whether passes communicate, so that every rank needs as many.

        Returns:
            The passes.

        Cost:
            Where passes communicate, one small all-reduce; where a rank has no rows, some of another's are sent to all.
        """
        own = -(-rows_of(batch) // size)
        if ranks is None or not together:
            return cls(batch, size, own)
        numbers = torch.zeros(ranks.size, dtype=torch.float64, device=ranks.device)
        numbers[ranks.index] = own
        ranks.sum_(numbers)
        counts, lent = [int(each) for each in numbers.tolist()], None
        if not all(counts):
            lent = borrow_rows(ranks, batch, microbatches=counts)
        return cls(batch, size, max(counts), lent)

    @property
    def own(self) -> int:
        """Passes with this rank's rows."""
        return -(-rows_of(self.batch) // self.size)

    def microbatches(self, device: torch.device) -> Iterator[Pass]:
        """Hand out this rank's microbatches.

        Args:
            device: Where the model is.

        Yields:
            The rows of each, and the microbatch on the device.
        """
        rows = rows_of(self.batch)
        pieces = (range(start, min(start + self.size, rows)) for start in range(0, rows, self.size))
        yield from feed(
            ((len(p), slice_rows(self.batch, p.start, p.stop, rows=rows, copy_on=device)) for p in pieces), device
        )

    def filler(self, device: torch.device) -> Pass:
        """Give what is run while other ranks have microbatches yet.

        Args:
            device: Where the model is.

        Returns:
            0 rows that count, and a microbatch of few rows.
        """
        few = few_of(self.batch) if self.own else self.lent
        return next(iter(feed([(0, few)], device)))


class Order:
    """Tell whether parameters got their gradients in the same order on every rank.

    An engine that reduces gradients as they come puts them into buckets in that order. Where ranks differ, a bucket of
    one meets another bucket of the other: with luck their sizes differ, and the job ends; without it, their sum is of
    two parameters.
    """

    def __init__(self) -> None:
        self._sum = 0

    def come(self, index: int) -> None:
        """Note a gradient.

        Args:
            index: Of its parameter; below 0 for the end of a pass.
        """
        self._sum = zlib.crc32(index.to_bytes(8, "little", signed=True), self._sum)

    def alike(self, ranks: RankGroup) -> bool:
        """Ask the other ranks.

        Args:
            ranks: The ranks.

        Returns:
            Whether all of them noted the same.

        Cost:
            One all-gather of 8 bytes, and a host synchronisation.
        """
        own = torch.tensor([self._sum], dtype=torch.float64, device=ranks.device)
        return len({each.item() for each in ranks.gather(own)}) == 1
