"""The two passes of a coupled window: encode all microbatches, then push the gradient of their representations back.

Where all microbatches are run in turns, for exact batch statistics, somebody else encodes them, once, and what
`Coupling.push` yields is collected for one backward.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, TypeAlias

import torch
from torch import Tensor, nn

from microbatch.batch.lengths import in_order
from microbatch.errors import EmptyBatchError, SpillError
from microbatch.loss.loss import Share
from microbatch.loss.representations import Representations, check_reached, put_together, seeds_for, taken_apart
from microbatch.ranks.gather_representations import Exchange
from microbatch.ranks.process_group import Ranks
from microbatch.step.saved_state import RandomState, Snapshot

Encode: TypeAlias = Callable[[nn.Module, Any], Any]


@dataclass(frozen=True, slots=True)
class Scheme:
    """How one window's microbatches are encoded.

    Attributes:
        encode: ``encode(model, microbatch)`` returns the representations of its rows.
        model: What it is called with.
        device: Where that is.
        pieces: Begins to hand out the microbatches, with their rows, each time it is called.
        keep: Whether the graphs are kept until backward; if not, everything is encoded twice.
        in_turns: Whether somebody else encodes, all microbatches together.
        live_bytes: Bytes in use now; `None` where nobody counts.
        together: Whether all ranks make the same passes, so that none can make its own again.
    """

    encode: Encode
    model: nn.Module
    device: torch.device
    pieces: Callable[[], Iterator[tuple[int, Any]]]
    keep: bool
    in_turns: bool
    live_bytes: Callable[[], int | None]
    together: bool = False


class Coupling:
    """Encode a window's batch for a loss of the whole of it, and push that loss's gradient back.

    The second time a microbatch is encoded, random state and buffers are what they were the first time, so that both
    see the same dropout masks and the same statistics. In the end they are as if everything had been encoded once, and
    then the loss computed.

    Args:
        scheme: How.
        ranks: Who else holds a share of the batch.

    Attributes:
        exchange: What the ranks tell one another meanwhile.
        waiting: Whether the loss of what has been encoded is still to come.
        rows: Rows of the batch, over all ranks.
        own: Rows of it on this rank.
        graph_bytes: What the largest graph of a microbatch takes; `None` where nobody counted.

    Source:
        Laws C1 to C3.
    """

    def __init__(self, scheme: Scheme, ranks: Ranks | None) -> None:
        self._scheme = scheme
        self.exchange = None if ranks is None else Exchange(ranks, together=scheme.together)
        self.waiting = False
        self.rows = self.own = 0
        self.graph_bytes: int | None = None
        self._start: Snapshot | None = None
        self._order: Sequence[Tensor] | None = None
        self._sizes: list[int] = []
        self._kept: list[Representations] = []
        self._states: list[RandomState] = []
        self._encoded: list[Tensor] = []
        self._leaves = Representations([], None)

    @property
    def keeps(self) -> bool:
        """Whether the graphs are kept until backward, and need not be."""
        return self._scheme.keep and not self._scheme.in_turns

    def encode(self, order: Sequence[Tensor] | None, lap: Callable[[int], object]) -> Any:
        """Encode every microbatch, and give the loss what it is a loss of.

        Args:
            order: Where the rows of each microbatch stand in the batch; `None` if they follow one another.
            lap: Told after each microbatch how many rows it had.

        Returns:
            The representations of the batch over all ranks, in the structure that ``encode`` returned; leaves of a
            graph of their own.

        Raises:
            EmptyBatchError: No rank has a row.
        """
        scheme = self._scheme
        if not scheme.keep:
            self._start = Snapshot(scheme.model, scheme.device)
        encoded: list[Representations] = []
        for rows, microbatch in scheme.pieces():
            if not scheme.keep:
                self._states.append(RandomState(scheme.device, self._states[-1] if self._states else None))
            piece = self._encode(microbatch, rows, graph=scheme.keep)
            encoded.append(piece.copied())
            if scheme.keep:
                self._kept.append(piece)
            self._sizes.append(rows)
            lap(rows)
        return self._handed_over(encoded, order)

    def take(self, values: Sequence[Any], rows: Sequence[int], *, order: Sequence[Tensor] | None) -> Any:
        """Take what every microbatch was encoded to by somebody else, and give the loss what it is a loss of.

        Args:
            values: What ``encode`` returned for each.
            rows: Rows of each.
            order: As for `encode`.

        Returns:
            As `encode`.

        Raises:
            EmptyBatchError: No rank has a row.
        """
        self._kept = [taken_apart(value, rows=number) for value, number in zip(values, rows, strict=True)]
        self._sizes = list(rows)
        return self._handed_over([piece.copied() for piece in self._kept], order)

    def _handed_over(self, encoded: Sequence[Representations], order: Sequence[Tensor] | None) -> Any:
        self._order = order
        self.own = self.rows = sum(self._sizes)
        found = put_together(encoded, self._join) if encoded else Representations([], None)
        self._encoded = found.tensors
        if self.exchange is not None:
            found = Representations(*self.exchange.gather(found.tensors, found.form))
            self.rows = self.exchange.rows
        if not self.rows:
            raise EmptyBatchError("the batch has 0 rows on every rank; skip empty batches before the training step")
        self._leaves = found.as_leaves()
        self.waiting = True
        return self._leaves.structure

    def kept_in_vain(self, error: BaseException) -> bool:
        """Tell whether a window failed because graphs were kept.

        Args:
            error: How: a microbatch has written to what an earlier one's graph still needed, or the disk is full.

        Returns:
            Whether it can go on by encoding twice.
        """
        overwritten = isinstance(error, RuntimeError) and "modified by an inplace operation" in str(error)
        return self.keeps and (overwritten or isinstance(error, SpillError))

    def gradients(self, shares: Sequence[Share]) -> list[Tensor | None]:
        """Take the gradients that the loss's backward has left, over all ranks, for this rank's rows.

        Args:
            shares: What of the loss had a backward.

        Returns:
            One for each tensor of the representations, in the order of the batch's rows.
        """
        if shares:
            check_reached(self._leaves)
        found = self._leaves.gradients()
        if self.exchange is not None:
            found = self.exchange.give_back(found, self._leaves.tensors)
        self._leaves = Representations([], None)
        self.waiting = False
        return found

    def push(self, gradients: Sequence[Tensor | None]) -> Iterator[tuple[int, list[Tensor], list[Tensor]]]:
        """Encode again, or take what was kept, and say where each microbatch's backward begins.

        Args:
            gradients: What `gradients` returned.

        Yields:
            Rows of each microbatch, the tensors that its backward begins with, and their gradients.
        """
        if all(gradient is None for gradient in gradients):
            self._kept.clear()
            yield from ((rows, [], []) for rows in self._sizes)
            return
        # What the loss drew, and what it did to buffers, is to remain.
        after = Snapshot(self._scheme.model, self._scheme.device)
        if self._start is not None:
            self._start.restore_buffers()
        pieces = self._taken() if self._scheme.keep else self._again()
        for rows, place, piece in zip(self._sizes, self._places(), pieces, strict=True):
            yield rows, *seeds_for(piece, [None if each is None else _take(each, place) for each in gradients])
        if self._start is not None:
            after.restore()

    def first_nonfinite(self) -> int | None:
        """Find the first microbatch of this rank with an infinite or NaN representation.

        Returns:
            Its index, or `None`.

        Cost:
            Reads the representations: for the error path only.
        """
        for index, place in enumerate(self._places()):
            if not all(bool(torch.isfinite(_take(each, place)).all()) for each in self._encoded):
                return index
        return None

    def _encode(self, microbatch: Any, rows: int, *, graph: bool) -> Representations:
        with torch.set_grad_enabled(graph):
            return taken_apart(self._scheme.encode(self._scheme.model, microbatch), rows=rows)

    def _again(self) -> Iterator[Representations]:
        live_bytes = self._scheme.live_bytes
        for (rows, microbatch), state in zip(self._scheme.pieces(), self._states, strict=True):
            state.restore()
            before = live_bytes()
            piece = self._encode(microbatch, rows, graph=True)
            after = live_bytes()
            if before is not None and after is not None:
                self.graph_bytes = max(self.graph_bytes or 0, after - before)
            yield piece
            del piece

    def _taken(self) -> Iterator[Representations]:
        while self._kept:
            yield self._kept.pop(0)

    def _join(self, results: Sequence[Tensor]) -> Tensor:
        return torch.cat(list(results)) if self._order is None else in_order(results, self._order)

    def _places(self) -> Iterator[slice | Tensor]:
        """Say where the rows of each microbatch stand in the batch."""
        if self._order is not None:
            yield from self._order
            return
        start = 0
        for rows in self._sizes:
            yield slice(start, start + rows)
            start += rows


def _take(tensor: Tensor, rows: slice | Tensor) -> Tensor:
    return tensor[rows.to(tensor.device) if isinstance(rows, Tensor) else rows]
