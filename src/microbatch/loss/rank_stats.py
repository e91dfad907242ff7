"""Meetings over several ranks: one small agreement, and one sum that has a gradient."""

from __future__ import annotations

import zlib
from collections.abc import Callable, Sequence
from typing import Any, cast

import torch
from torch import Tensor
from torch.nn.functional import pad

from microbatch.errors import RankAgainError, RankError
from microbatch.loss.channel_stats import Moments, merged
from microbatch.loss.loss import wide_dtype

# What a rank says of itself.
_FAILED, _HERE, _AGAIN = 0.0, 1.0, 2.0


class Across:
    """Share what the microbatches of one rank have in common with those of the other ranks.

    Every meeting is first agreed on: each rank says what it has come for, and whether it failed. So a rank that failed,
    or that has come to something else, is found out by all before any of them waits for what never comes; where it ran
    out of memory and will run its batch again, all do. Backward takes the meetings in the reverse order on every rank,
    because each holds on to the one before it, and `anchor` to the last, whether or not a rank's own loss depends on
    them.

    Args:
        size: Number of ranks.
        index: This rank, from 0.
        device: Where tensors have to be.
        add_: Replaces a tensor by its sum over the ranks.

    Attributes:
        over: Whether it has come to its end, or a rank failed, so that nobody waits any more.
        anchor: What backward has to start from, beside the losses, with a gradient of 0.
    """

    def __init__(self, *, size: int, index: int, device: torch.device, add_: Callable[[Tensor], None]) -> None:
        self._size, self._index, self._device, self._add_ = size, index, device, add_
        self.over = False
        self.anchor = torch.zeros((), device=device, requires_grad=True)

    def agree(self, what: str, *, number: float = 0.0) -> list[float]:
        """Wait until every rank has come to the same.

        Args:
            what: What this rank has come for.
            number: What the others are to know of it.

        Returns:
            Every rank's number.

        Raises:
            RankError: A rank failed, or has come to something else.
            RankAgainError: A rank will run its batch again.

        Cost:
            One all-reduce of 24 bytes a rank, and a host synchronisation.
        """
        code = float(zlib.crc32(f"{what}, {torch.is_grad_enabled()}".encode()))
        said = self._exchange([_HERE, code, number])
        lost = [(rank, state) for rank, (state, _, _) in enumerate(said) if state != _HERE]
        others = [rank for rank, (_, other, _) in enumerate(said) if other != code]
        self.over = bool(lost or others)
        if any(state == _FAILED for _, state in lost):
            raise RankError(
                f"rank {_listed(lost, _FAILED)} failed before {what}, where all ranks share a statistic; its own error "
                "says why, and this window is dropped here too"
            )
        if lost:
            raise RankAgainError(
                f"rank {_listed(lost, _AGAIN)} ran out of memory before {what}, where all ranks share a statistic, so "
                "the batch has to be run again on every rank; gradients, random state and buffers are as before the "
                "window"
            )
        if others:
            raise RankError(
                f"rank {self._index} has come to {what}, and rank {others[0]} to something else: every rank must have "
                "rows, and meet for the same statistics in the same order"
            )
        return [each for _, _, each in said]

    def fail(self, *, again: bool) -> None:
        """Tell the others that this rank will not come any more.

        Args:
            again: Whether it will run the same batch again.
        """
        self.over = True
        self._exchange([_AGAIN if again else _FAILED, 0.0, 0.0])

    def end(self, what: str) -> None:
        """Wait until every rank has come to the end, so that none fails after another has gone on.

        Args:
            what: The end of what.

        Raises:
            RankError: A rank failed, or has come to something else.
            RankAgainError: A rank will run its batch again.
        """
        self.agree(what)
        self.over = True

    def sum(self, x: Tensor, what: str) -> Tensor:
        """Add up over the ranks, the gradient too.

        Args:
            x: The same shape on every rank.
            what: What for.

        Returns:
            The sum; shape and dtype of ``x``.
        """
        if not (torch.is_grad_enabled() and x.is_floating_point()):
            total = x.detach().clone(memory_format=torch.contiguous_format)
            self._add_(total)
            return total
        total, self.anchor = cast("tuple[Tensor, Tensor]", _Sum.apply(x, self.anchor, self, what))
        return total

    def merge(self, moments: Moments, what: str) -> Moments:
        """Merge the moments of every rank.

        Args:
            moments: This rank's.
            what: What for.

        Returns:
            Those of all.
        """
        count, mean, squares = moments
        counts = self.agree(f"{what}, {tuple(mean.shape)}", number=count)
        own = torch.stack([mean, squares]).unsqueeze(0)
        parts = self.sum(pad(own, (0, 0, 0, 0, self._index, self._size - 1 - self._index)), what)
        return merged([(each, part[0], part[1]) for each, part in zip(counts, parts.unbind(), strict=True)])

    def mean(self, x: Tensor, count: Tensor, *, what: str) -> Tensor:
        """Take the mean over the ranks.

        Args:
            x: This rank's mean.
            count: What it is a mean over; shape ``()``.
            what: What for.

        Returns:
            Shape of ``x``.
        """
        self.agree(f"{what}, {tuple(x.shape)}")
        count = count.to(x.dtype)
        total = self.sum(torch.cat([(x * count).reshape(-1), count.reshape(1)]), what)
        return (total[:-1] / total[-1].detach()).view(x.shape)

    def total(self, x: Tensor, what: str) -> Tensor:
        """Add up over the ranks what they agree on.

        Args:
            x: This rank's sum.
            what: What for.

        Returns:
            Shape of ``x``.
        """
        self.agree(f"{what}, {tuple(x.shape)}")
        return self.sum(x, what)

    def gather(self, x: Tensor, what: str) -> Tensor:
        """Put the rows of all ranks together, in the order of the ranks.

        Args:
            x: Shape ``(rows, ...)``; every rank may have another number of rows.
            what: What for.

        Returns:
            Shape ``(all rows, ...)``.
        """
        rows = [int(each) for each in self.agree(f"{what}, {tuple(x.shape[1:])}", number=len(x))]
        before, after = sum(rows[: self._index]), sum(rows[self._index + 1 :])
        return self.sum(pad(x, [0] * (2 * (x.dim() - 1)) + [before, after]), what)

    def add_(self, tensor: Tensor) -> None:
        """Replace a tensor by its sum over the ranks.

        Args:
            tensor: The same shape and dtype on every rank.
        """
        self._add_(tensor)

    def _exchange(self, own: Sequence[float]) -> list[list[float]]:
        said = torch.zeros(self._size, len(own), dtype=wide_dtype(self._device))
        said[self._index] = torch.tensor(own, dtype=said.dtype)
        there = said.to(self._device)
        self._add_(there)
        return there.tolist()


def _listed(lost: Sequence[tuple[int, float]], state: float) -> str:
    return ", ".join(str(rank) for rank, each in lost if each == state)


class _Sum(torch.autograd.Function):
    """The sum over the ranks; its gradient is the sum of theirs."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, anchor: Tensor, across: Across, what: str) -> tuple[Tensor, Tensor]:
        ctx.across, ctx.what = across, what
        total = x.detach().clone(memory_format=torch.contiguous_format)
        across.add_(total)
        return total, anchor.clone()

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        across: Across = ctx.across
        across.agree(f"the gradient of {ctx.what}")
        total = grads[0].clone(memory_format=torch.contiguous_format)
        across.add_(total)
        return total, grads[1], None, None
