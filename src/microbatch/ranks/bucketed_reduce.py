"""The all-reduce of gradients, bucket by bucket, overlapped with the last backward of a window."""

from __future__ import annotations

import operator
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.utils.hooks import RemovableHandle

from microbatch.devices.captured_graphs import graphs_are_captured
from microbatch.errors import RankAgainError, WindowError
from microbatch.ranks.process_group import RUN_AGAIN, RankGroup, failure_words
from microbatch.ranks.reduce import buckets_of


@dataclass(slots=True)
class _Bucket:
    """Gradients that one all-reduce sums.

    Attributes:
        places: Indices of the bucket's parameters.
        memory: The buffer that is reduced.
        missing: Indices of the parameters whose gradients backward has not made yet.
        work: The asynchronous collective, once it has started.
    """

    places: Sequence[int]
    memory: Tensor
    missing: set[int] = field(default_factory=set[int])
    work: Any = None


class Overlap:
    """All-reduce gradients in buckets, from the last layer to the first, as soon as a bucket is complete.

    After `begin`, every rank runs the same collectives in the same order: one for each bucket, and then one that
    reports success or failure. A rank that fails sends zeros for its remaining buckets, and then reports the failure.
    So no rank hangs in a collective, and either all ranks take the step or none.

    Args:
        parameters: The window's parameters, in the same order on every rank.
        narrow: Whether gradients are reduced in their own dtype, even if it is narrower than float32.

    Attributes:
        early: Number of the window's buckets whose all-reduce started before backward had ended.

    Cost:
        Memory for a copy of all gradients, kept from window to window.

    Source:
        Laws R1, R2, R4, R5, R7, B4.
    """

    def __init__(self, parameters: Sequence[Tensor], *, narrow: bool) -> None:
        self._parameters = list(parameters)
        # Backward makes the gradients of the last layer first.
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
        self._ranks: RankGroup | None = None
        self._factor, self._next = 1.0, 0
        self.early = 0

    def begin(self, ranks: RankGroup, factor: float) -> None:
        """Start a window's reduction, after the ranks have agreed on its denominator."""
        self._ranks, self._factor, self._next, self.early = ranks, factor, 0, 0
        self._versions.clear()
        for bucket in self._buckets:
            bucket.missing, bucket.work = set(bucket.places), None

    def watch(self) -> None:
        """Install hooks on the parameters that start a bucket's all-reduce once backward has made its gradients."""
        for place, parameter in enumerate(self._parameters):
            reached = partial(self._reached, place)
            self._hooks.append(parameter.register_post_accumulate_grad_hook(reached))

    def rest(self, sums: Sequence[Tensor | None]) -> None:
        """Start the all-reduce of the remaining buckets, after backward has ended."""
        self._remove_hooks()
        for place, (total, version) in self._versions.items():
            # The first gradient in the memory of a captured CUDA graph has been replaced by its copy.
            replaced = sums[place] is not total and not graphs_are_captured()
            if replaced or total._version != version:
                raise WindowError(
                    f"the gradient of parameter {place} changed after Ranks(overlap=True) had started its all-reduce, "
                    "as happens under activation checkpointing with use_reentrant=True. Pass use_reentrant=False to "
                    "checkpoint(), or leave out overlap="
                )
        for bucket in self._buckets[self._next :]:
            self._send(bucket, sums)

    def fits(self, parameters: Sequence[Tensor]) -> bool:
        """Return whether the buckets were made for these parameters."""
        return len(parameters) == len(self._parameters) and all(map(operator.is_, parameters, self._parameters))

    def agree(self, present: Sequence[bool]) -> list[bool]:
        """Report success to the other ranks, and wait for their reports.

        Args:
            present: For each parameter, whether this rank has a gradient for it.

        Returns:
            For each parameter, whether any rank has a gradient for it.

        Raises:
            RankError: Another rank failed.
            RankAgainError: Ranks failed, and all of them will run the batch again.

        Cost:
            One all-reduce of 8 bytes a parameter, and one host synchronisation.
        """
        failed, again, where, found = self._report(map(float, present), failed=False, again=False)
        if failed and failed == again:
            raise RankAgainError(
                f"{int(failed)} ranks ran out of memory in the last backward, during the all-reduce of the gradients, "
                f"{RUN_AGAIN}"
            )
        if failed and self._ranks is not None:
            raise self._ranks.failed_error(where)
        return [each > 0 for each in found]

    def results(self) -> Iterator[tuple[int, Tensor]]:
        """Yield each parameter's index, and its sum over all ranks in the buffer, which the caller must copy."""
        for bucket in self._buckets:
            pieces = bucket.memory.split([self._parameters[place].numel() for place in bucket.places])
            for place, piece in zip(bucket.places, pieces, strict=True):
                yield place, piece.view(self._parameters[place].shape)

    def fail(self, *, again: bool) -> bool:
        """Send zeros in the remaining buckets, and return whether every rank that failed will run the batch again."""
        self._remove_hooks()
        nothing: list[Tensor | None] = [None] * len(self._parameters)
        for bucket in self._buckets[self._next :]:
            self._send(bucket, nothing)
        failed, retrying, *_ = self._report([0.0] * len(self._parameters), failed=True, again=again)
        return again and failed == retrying

    def _reached(self, place: int, parameter: Tensor) -> None:
        """Record that a gradient is complete, and start the next buckets in order as far as they are complete."""
        total = parameter.grad
        if total is None or place in self._versions:
            return  # `rest` checks whether the gradient changed since
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

    def _report(
        self, present: Iterable[float], *, failed: bool, again: bool
    ) -> tuple[float, float, list[int], list[float]]:
        """Wait for all buckets, and exchange reports.

        Returns:
            Number of ranks that failed, number that will run the batch again, indices of those that failed, and for
            each parameter the sum of ``present``.
        """
        ranks = self._ranks
        assert ranks is not None  # noqa: S101 - `begin` comes before
        for bucket in self._buckets:
            if bucket.work is not None:
                bucket.work.wait()
        values = [float(failed), float(again), *ranks.failure_flags(failed=failed), *present]
        vector = torch.tensor(values, dtype=torch.float64, device=ranks.device)
        ranks.sum_(vector)
        number, retrying, *rest = vector.tolist()
        words = failure_words(ranks.size)
        return number, retrying, ranks.failed(rest[:words]), rest[words:]

    def _remove_hooks(self) -> None:
        for hook in self._hooks:
            hook.remove()
        self._hooks = []
