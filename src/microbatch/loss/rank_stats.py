"""Share statistics between ranks: a small agreement before each all-reduce, and a sum with a gradient."""

from __future__ import annotations

import zlib
from collections.abc import Callable, Sequence
from typing import Any, cast

import torch
from torch import Tensor
from torch.nn.functional import pad

from microbatch.errors import RankAgainError, RankError
from microbatch.loss.channel_stats import Moments, merged

# The state of a rank in an agreement.
_FAILED, _READY, _RETRY = 0.0, 1.0, 2.0


class Across:
    """Reduce statistics over the ranks, with their gradient.

    Before each all-reduce, all ranks agree on what they reduce, and whether a rank has failed. So a rank that failed,
    or that reduces something else, is detected before any rank waits forever. If a rank ran out of memory and will run
    its batch again, all ranks do.

    In backward, every rank runs the all-reduces in the reverse order, also if its own loss does not depend on them. For
    this, each all-reduce depends in the graph on the one before it, and `anchor` depends on the last one.

    Args:
        size: World size.
        index: This rank, from 0.
        device: Device on which tensors are communicated.
        add_: Replaces a tensor by its sum over the ranks, in place (an all-reduce).
        share: Returns some numbers of every rank, by rank (an all-reduce).
        failures: Describes ranks that have reported a failure.

    Attributes:
        over: Whether the last agreement has taken place or a rank has failed, so that no rank waits any more.
        anchor: The tensor that backward has to start from, with a gradient of 0, in addition to the losses; shape
            ``()``.
    """

    def __init__(
        self,
        *,
        size: int,
        index: int,
        device: torch.device,
        add_: Callable[[Tensor], None],
        share: Callable[[Sequence[float]], list[list[float]]],
        failures: Callable[[Sequence[int]], str],
    ) -> None:
        self._size, self._index, self.add_, self._share, self._failures = size, index, add_, share, failures
        self.over = False
        self.anchor = torch.zeros((), device=device, requires_grad=True)

    def agree(self, what: str, *, number: float = 0.0) -> list[float]:
        """Wait until every rank calls this method for the same purpose.

        Args:
            what: Name of the purpose, for example of a statistic.
            number: A number that the other ranks get, for example a count.

        Returns:
            The number of every rank, by rank.

        Raises:
            RankError: A rank has failed, or called this method for another purpose.
            RankAgainError: A rank will run its batch again.

        Cost:
            One all-reduce of 24 bytes per rank, and a host synchronisation.
        """
        code = float(zlib.crc32(f"{what}, {torch.is_grad_enabled()}".encode()))
        states = self._share([_READY, code, number])
        not_ready = [(rank, state) for rank, (state, _, _) in enumerate(states) if state != _READY]
        mismatched = [rank for rank, (_, other, _) in enumerate(states) if other != code]
        self.over = bool(not_ready or mismatched)
        failed = [rank for rank, state in not_ready if state == _FAILED]
        listed = ", ".join(str(rank) for rank in failed or dict(not_ready))
        if failed:
            raise RankError(
                f"rank {listed} failed before {what}, where all ranks share a statistic, so this window is dropped on "
                f"every rank: {self._failures(failed)}. See that rank's own error for the cause"
            )
        if not_ready:
            raise RankAgainError(
                f"rank {listed} ran out of memory before {what}, where all ranks share a statistic, so the batch has "
                "to be run again on every rank. Gradients, random state and buffers are as before the window"
            )
        if mismatched:
            raise RankError(
                f"rank {self._index} has reached {what}, and rank {mismatched[0]} something else: every rank must have "
                "rows, and must share the same statistics in the same order"
            )
        return [each for _, _, each in states]

    def fail(self, *, again: bool) -> None:
        """Report to the other ranks, which wait in `agree`, that this rank has failed."""
        self.over = True
        self._share([_RETRY if again else _FAILED, 0.0, 0.0])

    def end(self, what: str) -> None:
        """Wait until every rank has finished, so that no rank can fail after another one has continued."""
        self.agree(what)
        self.over = True

    def sum(self, x: Tensor, what: str) -> Tensor:
        """Sum a tensor over the ranks; in backward, sum its gradient over the ranks."""
        if not (torch.is_grad_enabled() and x.is_floating_point()):
            total = x.detach().clone(memory_format=torch.contiguous_format)
            self.add_(total)
            return total
        total, self.anchor = cast("tuple[Tensor, Tensor]", _SumOverRanks.apply(x, self.anchor, self, what))
        return total

    def merge(self, moments: Moments, what: str) -> Moments:
        """Merge the moments of every rank by Chan's formula."""
        count, mean, squares = moments
        counts = self.agree(f"{what}, {tuple(mean.shape)}", number=count)
        own = torch.stack([mean, squares]).unsqueeze(0)
        parts = self.sum(pad(own, (0, 0, 0, 0, self._index, self._size - 1 - self._index)), what)
        return merged([(each, part[0], part[1]) for each, part in zip(counts, parts.unbind(), strict=True)])

    def mean(self, x: Tensor, count: Tensor, *, what: str) -> Tensor:
        """Compute the mean over the ranks, weighted by the number of items in each rank's mean."""
        self.agree(f"{what}, {tuple(x.shape)}")
        count = count.to(x.dtype)
        total = self.sum(torch.cat([(x * count).reshape(-1), count.reshape(1)]), what)
        return (total[:-1] / total[-1].detach()).view(x.shape)

    def total(self, x: Tensor, what: str) -> Tensor:
        """Agree on the shape of a tensor, and sum the tensor over the ranks."""
        self.agree(f"{what}, {tuple(x.shape)}")
        return self.sum(x, what)

    def gather(self, x: Tensor, what: str) -> Tensor:
        """Concatenate the rows of all ranks, in the order of the ranks (an all-gather with a gradient)."""
        rows = [int(each) for each in self.agree(f"{what}, {tuple(x.shape[1:])}", number=len(x))]
        before, after = sum(rows[: self._index]), sum(rows[self._index + 1 :])
        return self.sum(pad(x, [0] * (2 * (x.dim() - 1)) + [before, after]), what)


class _SumOverRanks(torch.autograd.Function):
    """Sum a tensor over the ranks; the gradient is the sum of the ranks' gradients."""

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
