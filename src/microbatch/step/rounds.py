"""The two rounds of passes that a coupled window makes through a fully sharded model, alike on every rank."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from typing import Any

from microbatch.step.alike import Alike, Backward, Piece


class Rounds:
    """Hand out a window's microbatches twice: to be encoded without a graph, and once more with one to push back.

    In both rounds every rank makes as many passes. Whoever asks for the next microbatch is done with the last one; and
    when its own are through, the rest of the passes are made here, with one of them, and come to nothing.

    Args:
        alike: What the ranks have agreed on.
        begin: Begins to hand out this rank's microbatches.
        shown: Shows microbatches to whoever needs to know of them.
        fill: ``fill(microbatch)`` encodes one, and returns some loss of what comes of it.
        backward: Runs backward from tensors with their gradients.

    Source:
        Laws C3, R2.
    """

    def __init__(
        self,
        alike: Alike,
        begin: Callable[[], Iterable[Piece]],
        shown: Callable[..., Iterable[Piece]],
        *,
        fill: Callable[[Any], object],
        backward: Backward,
    ) -> None:
        self._alike, self._begin, self._shown = alike, begin, shown
        self._fill, self._backward = fill, backward
        self._rounds = 0

    def __call__(self) -> Iterator[Piece]:
        """Begin a round.

        Yields:
            This rank's microbatches with their rows.
        """
        alike, graph = self._alike, self._rounds > 0
        self._rounds += 1
        alike.begin_round(graph=graph)
        for piece in self._shown(self._begin()):
            alike.sharded.begin()
            yield piece
            alike.sharded.went()
        while alike.sharded.passes < alike.sharded.planned:
            alike.fill_up(self._begin, self._shown, run=self._fill, backward=self._backward)
