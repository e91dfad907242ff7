"""Reduce gradients during the backward of the last microbatch."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from torch import Tensor

from microbatch.errors import WindowError
from microbatch.ranks.agreement import Message, agree
from microbatch.ranks.bucketed_reduce import Overlap
from microbatch.step.met import Met
from microbatch.step.part import OpenWindow, Run
from microbatch.step.peers.data_parallel import DataParallel


class Overlapped(DataParallel):
    """Ranks that agree before the last backward, when every loss is known, and reduce gradients during it.

    After the last backward, the ranks exchange which parameters have a gradient, and whether a rank failed.

    Source:
        Laws R1, R2, R4, R7, B4.
    """

    def __init__(self) -> None:
        super().__init__()
        self.overlap: Overlap | None = None
        self._agreed: Message | None = None
        # Whether the other ranks wait for buckets of this one, and whether they do not wait for any message.
        self._sending = self._nobody_waits = False

    def prepare(self, window: OpenWindow) -> None:
        """Find the ranks, and reset the agreement."""
        super().prepare(window)
        self._agreed, self._sending, self._nobody_waits = None, False, False

    def backward(self, window: OpenWindow, run: Run) -> Run:
        """Agree before the last backward, and reduce each bucket as soon as backward has filled it."""

        def overlapped(tensors: Sequence[Any], seeds: Sequence[Tensor]) -> None:
            if self._agreed is not None:
                raise WindowError(
                    "Ranks(overlap=True) reduces gradients in the backward of the last microbatch that window.split "
                    "hands out, and this is one more: split one batch in each window, or leave overlap= out"
                )
            if len(window.done) + 1 == window.planned:
                self._begin_overlap(window, window.rows or 0).watch()
            run(tensors, seeds)

        return overlapped

    def reserve(self, window: OpenWindow) -> None:
        """Reserve memory for all buckets, while the other ranks can still be notified of a failure."""
        parameters = [each.parameter for each in window.gradients.named]
        if self.overlap is None or not self.overlap.fits(parameters):
            self.overlap = None  # free the old buckets before the new ones are allocated
            self.overlap = Overlap(parameters, narrow=window.options.ranks.reduce_dtype is None)

    def meet(self, window: OpenWindow) -> Met:
        """Reduce the remaining buckets, and copy the sums over all ranks into the gradients."""
        overlap = self.overlap if self._agreed is not None else self._begin_overlap(window, 0)
        agreed, gradients = self._agreed, window.gradients
        assert overlap is not None  # noqa: S101 - `_begin_overlap` makes both
        assert agreed is not None  # noqa: S101 - `_begin_overlap` makes both
        self._waited = self._sending
        sums = {id(each.parameter): total for each, total in gradients.gradients()}
        overlap.rest([sums.get(id(each.parameter)) for each in gradients.named])
        self._sending, self._nobody_waits = False, True
        present = overlap.agree(gradients.present)
        gradients.fill(present)
        sums = {id(each.parameter): total for each, total in gradients.gradients()}
        for place, total in overlap.results():
            if present[place]:
                sums[id(gradients.named[place].parameter)].copy_(total)
        agreed = replace(agreed, present=present)
        return self.met(window, agreed, agreed.sums, dict(zip(agreed.names, agreed.counts, strict=True)))

    def waited(self, window: OpenWindow) -> bool:
        """Return whether the other ranks wait for buckets or for the agreement."""
        return super().waited(window) and not self._nobody_waits

    def tell_failure(self, window: OpenWindow, *, again: bool) -> bool:
        """Send zeros for the buckets that the other ranks wait for, and notify them of the failure."""
        if not self._sending or self.overlap is None:
            return super().tell_failure(window, again=again)
        self._sending, self._nobody_waits = False, True
        return self.overlap.fail(again=again)

    def _begin_overlap(self, window: OpenWindow, rows: float) -> Overlap:
        """Agree with the other ranks; every rank does so once, even without microbatches."""
        message = self.message(window, sum(window.done) + rows)
        assert self.ranks is not None  # noqa: S101 - `prepare` finds them
        assert self.overlap is not None  # noqa: S101 - `reserve` makes it
        self._nobody_waits = True
        agreed = agree(self.ranks, message, parameters=self.setup.room(window))
        counts = dict(zip(agreed.names, agreed.counts, strict=True))
        self.overlap.begin(self.ranks, window.denominator.factor(counts) if any(agreed.counts) else 1.0)
        self._agreed, self._sending, self._nobody_waits = agreed, True, False
        return self.overlap
