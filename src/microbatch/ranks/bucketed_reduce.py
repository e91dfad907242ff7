"""Add gradients up over the ranks while the last backward still makes the rest of them."""

from __future__ import annotations

import operator
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.utils.hooks import RemovableHandle

from microbatch.errors import RankAgainError, RankError, WindowError
from microbatch.ranks.process_group import Ranks
from microbatch.ranks.reduce import buckets_of


@dataclass(slots=True)
class _Bucket:
    """Gradients that go together, and how far they are.

    Attributes:
        places: Of its parameters.
        memory: What is sent.
        missing: Places of gradients that the backward has not made yet.
        work: The collective, once it has begun.
    """

    places: Sequence[int]
    memory: Tensor
    missing: set[int] = field(default_factory=set[int])
    work: Any = None


class Overlap:
    """Reduce gradients in buckets, from the last layer's to the first, as soon as a bucket is whole.

    From `begin` on every rank owes the others the same collectives in the same order: all buckets, whatever is in
    them, and one message on how it went. One that fails says zeros for what is left, and then that it failed. So no
    rank waits for what never comes, and none takes a step that the others do not.

    Args:
        parameters: The window's, in an order that all ranks have.
        narrow: Whether gradients add up in their own dtype, even where that is narrower than float32.

    Attributes:
        early: Buckets of the window that began before backward had ended.

    Cost:
        Memory for a copy of all gradients, kept from window to window.

    Source:
        Laws R1, R2, R4, R5, R7, B4.
    """

    def __init__(self, parameters: Sequence[Tensor], *, narrow: bool) -> None:
        self._parameters = list(parameters)
        # Backward makes the last layer's first.
        backwards = [each.detach() for each in reversed(self._parameters)]
        places = {id(each): place for each, place in zip(backwards, reversed(range(len(backwards))), strict=True)}
        wide = [each.dtype if narrow else torch.promote_types(each.dtype, torch.float32) for each in backwards]
        self._buckets = [
            _Bucket(
                [places[id(each)] for each in bucket],
                torch.empty(sum(each.numel() for each in bucket), dtype=dtype, device=bucket[0].device),
            )
            for bucket, dtype in buckets_of(backwards, wide)
        ]
        self._hooks: list[RemovableHandle] = []
        self._versions: dict[int, tuple[Tensor, int]] = {}
        self._ranks: Ranks | None = None
        self._factor, self._next = 1.0, 0
        self.early = 0

    def begin(self, ranks: Ranks, factor: float) -> None:
        """Learn that the ranks have agreed.

        Args:
            ranks: Those of the window.
            factor: What this rank's gradients are multiplied with on their way.
        """
        self._ranks, self._factor, self._next, self.early = ranks, factor, 0, 0
        self._versions.clear()
        for bucket in self._buckets:
            bucket.missing, bucket.work = set(bucket.places), None

    def watch(self) -> None:
        """Send each bucket as soon as the backward that comes has made its gradients."""
        for place, parameter in enumerate(self._parameters):
            reached = partial(self._reached, place)
            self._hooks.append(parameter.register_post_accumulate_grad_hook(reached))

    def rest(self, sums: Sequence[Tensor | None]) -> None:
        """Send what is left, once backward has ended.

        Args:
            sums: The gradient of each parameter; `None` where this rank has none.

        Raises:
            WindowError: A gradient has grown after it had been sent.
        """
        self._look_away()
        for place, (total, version) in self._versions.items():
            if sums[place] is not total or total._version != version:
                raise WindowError(
                    f"the gradient of parameter {place} went on growing after backward had finished with it, as "
                    "checkpoints with use_reentrant=True make it, and overlap=True had sent it by then; leave "
                    "overlap= out, or pass use_reentrant=False"
                )
        for bucket in self._buckets[self._next :]:
            self._send(bucket, sums)

    def fits(self, parameters: Sequence[Tensor]) -> bool:
        """Tell whether these are the same parameters as in the windows before."""
        return len(parameters) == len(self._parameters) and all(map(operator.is_, parameters, self._parameters))

    def agree(self, present: Sequence[bool]) -> list[bool]:
        """Tell the other ranks that all went well, and wait for them.

        Args:
            present: For each parameter, whether this rank has a gradient of it.

        Returns:
            Whether any rank has.

        Raises:
            RankError: Another rank failed.
            RankAgainError: Ranks failed, and all that did will run the batch again.

        Cost:
            One all-reduce of 8 bytes a parameter, and a host synchronisation.
        """
        failed, again, *found = self._tell([0.0, 0.0, *map(float, present)])
        if failed and failed == again:
            raise RankAgainError(
                f"{int(failed)} ranks ran out of memory in the last backward, while gradients were being reduced, so "
                "the batch has to be run again on every rank; gradients, random state and buffers are as before the "
                "window"
            )
        if failed:
            raise RankError(
                f"{int(failed)} ranks failed inside this window; its gradients are dropped here too (the failing "
                "rank's own error says why)"
            )
        return [each > 0 for each in found]

    def results(self) -> Iterator[tuple[int, Tensor]]:
        """Yield each parameter's place with the sum over all ranks, to be copied."""
        for bucket in self._buckets:
            pieces = bucket.memory.split([self._parameters[place].numel() for place in bucket.places])
            for place, piece in zip(bucket.places, pieces, strict=True):
                yield place, piece.view(self._parameters[place].shape)

    def fail(self, *, again: bool) -> bool:
        """Say zeros for what the other ranks wait for, and that this one failed.

        Args:
            again: Whether it will run the same batch again.

        Returns:
            Whether all ranks that failed will.
        """
        self._look_away()
        nothing: list[Tensor | None] = [None] * len(self._parameters)
        for bucket in self._buckets[self._next :]:
            self._send(bucket, nothing)
        failed, told_again, *_ = self._tell([1.0, float(again), *([0.0] * len(self._parameters))])
        return again and failed == told_again

    def _reached(self, place: int, parameter: Tensor) -> None:
        """Note that a gradient is there, and send every bucket that is whole and whose turn it is."""
        total = parameter.grad
        if total is None or place in self._versions:
            return  # `rest` finds out whether it grew
        self._versions[place] = total, total._version
        for bucket in self._buckets[self._next :]:
            bucket.missing.discard(place)
        while self._next < len(self._buckets) and not self._buckets[self._next].missing:
            self._send(self._buckets[self._next], [each.grad for each in self._parameters])
            self.early += 1

    @torch.no_grad()
    def _send(self, bucket: _Bucket, sums: Sequence[Tensor | None]) -> None:
        sizes = [self._parameters[place].numel() for place in bucket.places]
        for place, piece in zip(bucket.places, bucket.memory.split(sizes), strict=True):
            total = sums[place]
            if total is None:
                piece.zero_()
            else:
                piece.copy_((total.to_dense() if total.is_sparse else total).reshape(-1))
        bucket.memory.mul_(self._factor)
        self._next += 1
        assert self._ranks is not None  # noqa: S101 - `begin` comes before
        self._ranks.count("sum", bucket.memory)
        bucket.work = dist.all_reduce(bucket.memory, group=self._ranks.group, async_op=True)

    def _tell(self, said: Sequence[float]) -> list[float]:
        assert self._ranks is not None  # noqa: S101 - `begin` comes before
        for bucket in self._buckets:
            if bucket.work is not None:
                bucket.work.wait()
        vector = torch.tensor(said, dtype=torch.float64, device=self._ranks.device)
        self._ranks.sum_(vector)
        return vector.tolist()

    def _look_away(self) -> None:
        for hook in self._hooks:
            hook.remove()
        self._hooks = []
