"""A loss of the whole batch: encode every microbatch, compute one loss, and back-propagate through each microbatch.

First, all microbatches are encoded without a graph (or with graphs that are kept). The loss of all representations,
over all ranks, gives the gradient of each representation. Then each microbatch is encoded once more, with a graph and
with the random state and buffers of the first time. Its backward starts from the gradient of its representations.

Gao, Zhang, Han, Callan 2021, "Scaling deep contrastive learning batch size under memory limited setup".
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor

from microbatch.batch.lengths import in_order
from microbatch.errors import EmptyBatchError, SpillError, WindowError
from microbatch.loss.loss import LossLike, Share, check_number, shares_of
from microbatch.loss.representations import (
    Representations,
    check_reached,
    own_part,
    put_together,
    seeds_for,
    stand_in,
    taken_apart,
)
from microbatch.ranks.gather_representations import Exchange
from microbatch.step.part import Begin, Function, OpenWindow
from microbatch.step.saved_state import RandomState, Snapshot


class Coupled:
    """Encode a window's batch, and run the backward of a loss of all representations.

    Args:
        window: The window, which has not cut a batch yet.
        encode: ``encode(model, microbatch)`` returns the representations of the microbatch's rows.
        keep: Whether the graphs of all microbatches are kept until backward. If not, everything is encoded twice.

    Attributes:
        rows: Rows of the batch over all ranks.
        own: Rows of the batch on this rank.
        graph_bytes: Bytes of the largest graph of a microbatch; `None` if they were not measured.
        waiting: Whether the loss of the representations has not been passed yet.

    Source:
        Laws C1 to C3, M1, R7.
    """

    def __init__(self, window: OpenWindow, encode: Function, *, keep: bool) -> None:
        self._window, self._encode, self._keep = window, encode, keep
        self.rows = self.own = 0
        self.graph_bytes: int | None = None
        self.waiting = False
        self._exchange: Exchange | None = None
        self._start: Snapshot | None = None
        self._sizes: list[int] = []
        self._kept: list[Representations] = []
        self._states: list[RandomState] = []
        self._encoded: list[Tensor] = []
        self._leaves = Representations([], None)

    @property
    def keeps(self) -> bool:
        """Whether graphs are kept until backward, although encoding twice is possible."""
        return self._keep and not self._window.passes.keeps

    def kept_in_vain(self, error: BaseException) -> bool:
        """Return whether a failure goes away if everything is encoded twice: an overwritten tensor, a full disk."""
        overwritten = isinstance(error, RuntimeError) and "modified by an inplace operation" in str(error)
        return self.keeps and (overwritten or isinstance(error, SpillError))

    def representations_of(self, batch: object) -> Any:
        """Encode every microbatch; return the representations of all ranks in the encoder's structure, as leaves."""
        window = self._window
        encode = self._encode = window.called(self._encode)
        # The loss function for dummy passes: the encoder with a stand-in loss.
        window.function = lambda model, microbatch: stand_in(encode(model, microbatch))
        self._begin = begin = window.cut(batch)
        representations = self._gathered(self._together(begin) if window.passes.keeps else self._one_by_one(begin))
        if not window.passes.keeps:
            window.peers.encoded(window)
        for part in window.setup.parts:
            part.whole(window, self.rows)
        return representations

    def take(self, loss: LossLike, count: float | None) -> None:
        """Run the backward of the whole batch's loss, then the backward of every microbatch."""
        window = self._window
        if not self.waiting:
            raise WindowError(
                "this window has already computed the loss of its encoded batch; open another window for the next one"
            )
        shares = shares_of(loss, rows=self.rows if count is None else check_number(count, "count"))
        # With a sharded model, a rank without rows takes part in the backward, too.
        taking_part = self.own or window.peers.passes_together
        shares = window.denominator.whole(shares, rows=self.rows) if taking_part else []
        shares = [own_part(share, own=self.own, whole=self.rows) for share in shares]
        window.run(*(window.seeds(shares, None) if shares else ([], [])))
        # Random state and buffers after the loss are restored at the end.
        after = window.undo.snapshot.again()
        for rows, tensors, seeds in self._push(self._gradients(shares), after):
            window.passes.start(window, rows, tensors, seeds)
        window.passes.finish(window)
        if self._exchange is not None:
            window.peers.speak(self._exchange)
            self._exchange.agree()

    def check(self) -> None:
        """Raise an error if the window was left without the loss of its batch."""
        if self.waiting:
            raise WindowError("the window encoded a batch, and was left without window.backward(loss) of it")

    def first_nonfinite(self) -> int | None:
        """Return the index of this rank's first microbatch with an infinite or NaN representation, or `None`."""
        for index, place in enumerate(self._places()):
            if not all(bool(torch.isfinite(_take(each, place)).all()) for each in self._encoded):
                return index
        return None

    # -- the first encoding --------------------------------------------------------------------------------------------

    def _one_by_one(self, begin: Begin) -> list[Representations]:
        window, encoded = self._window, list[Representations]()
        self._exchange = window.peers.exchange()  # from now on, the other ranks wait in this exchange
        if not self._keep:
            self._start = window.undo.snapshot.again()
        for p in window.passes.of(window, begin, graph=self._keep):
            if not self._keep:
                self._states.append(RandomState(window.device))
            piece = self._encode_piece(p.microbatch, p.rows or 0, graph=self._keep)
            encoded.append(piece.copied())
            if self._keep:
                self._kept.append(piece)
            self._sizes.append(p.rows or 0)
            del p
        return encoded

    def _together(self, begin: Begin) -> list[Representations]:
        window = self._window
        for p, value in window.passes.values(window, begin, self._encode):
            self._exchange = self._exchange or window.peers.exchange()  # all ranks have shared the last statistic
            self._kept.append(taken_apart(value, rows=p.rows or 0))
            self._sizes.append(p.rows or 0)
            del p, value
        self._exchange = self._exchange or window.peers.exchange()
        return [piece.copied() for piece in self._kept]

    def _gathered(self, encoded: Sequence[Representations]) -> Any:
        """Concatenate the representations of all microbatches and ranks, as leaf tensors."""
        self.own = self.rows = sum(self._sizes)
        found = (
            put_together(encoded, partial(in_order, rows=self._window.order)) if encoded else Representations([], None)
        )
        self._encoded = found.tensors
        if self._exchange is not None:
            found = Representations(*self._exchange.gather(found.tensors, found.form))
            self.rows = self._exchange.rows
        if not self.rows:
            raise EmptyBatchError("the batch has 0 rows on every rank; skip empty batches before the training step")
        self._leaves = found.as_leaves()
        self.waiting = True
        return self._leaves.structure

    # -- the second encoding -------------------------------------------------------------------------------------------

    def _gradients(self, shares: Sequence[Share]) -> list[Tensor | None]:
        """Return the gradients of this rank's representations, summed over all ranks."""
        if shares:
            check_reached(self._leaves)
        found = self._leaves.gradients()
        if self._exchange is not None:
            found = self._exchange.give_back(found, self._leaves.tensors)
        self._leaves = Representations([], None)
        self.waiting = False
        return found

    def _push(
        self, gradients: Sequence[Tensor | None], after: Snapshot
    ) -> Iterator[tuple[int, list[Tensor], list[Tensor]]]:
        """Yield the rows of each microbatch, and the roots of its backward with their gradients."""
        if all(gradient is None for gradient in gradients):
            self._kept.clear()
            yield from ((rows, [], []) for rows in self._sizes)
            return
        if self._start is not None:
            self._start.restore_buffers(uncounted=True)
        pieces = self._taken() if self._keep else self._again()
        for rows, place, piece in zip(self._sizes, self._places(), pieces, strict=True):
            yield rows, *seeds_for(piece, [None if each is None else _take(each, place) for each in gradients])
        if self._start is not None:
            after.restore(uncounted=True)

    def _again(self) -> Iterator[Representations]:
        window, states = self._window, iter(self._states)
        for p in window.passes.of(window, self._begin, again=True):
            next(states).restore()
            before = window.setup.live_bytes()
            piece = self._encode_piece(p.microbatch, p.rows or 0, graph=True)
            after = window.setup.live_bytes()
            if before is not None and after is not None:
                self.graph_bytes = max(self.graph_bytes or 0, after - before)
            del p
            yield piece
            del piece

    def _taken(self) -> Iterator[Representations]:
        while self._kept:
            yield self._kept.pop(0)

    def _encode_piece(self, microbatch: Any, rows: int, *, graph: bool) -> Representations:
        with torch.set_grad_enabled(graph):
            return taken_apart(self._encode(self._window.model, microbatch), rows=rows)

    def _places(self) -> Iterator[slice | Tensor]:
        """Yield the row numbers of each microbatch."""
        if self._window.order is not None:
            yield from self._window.order
            return
        start = 0
        for rows in self._sizes:
            yield slice(start, start + rows)
            start += rows


def _take(tensor: Tensor, rows: slice | Tensor) -> Tensor:
    return tensor[rows.to(tensor.device) if isinstance(rows, Tensor) else rows]
