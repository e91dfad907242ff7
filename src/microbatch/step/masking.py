"""Tell dropout which rows of the effective batch are going through the model."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from typing import Any

import torch

from microbatch.batch.dropout_mode import ByRow, Shown
from microbatch.batch.lengths import Piece
from microbatch.errors import ConfigError, WindowError
from microbatch.ranks.process_group import Ranks
from microbatch.step.canonical import numbered

# Calls of dropout by a loss of the whole batch are counted from here, so that they have no masks of an encoder's.
_WHOLE = 1 << 32


class Masking:
    """Number a window's rows, over all ranks, and show them to the mode that draws their masks.

    Args:
        seed: Of the window; over several ranks the first one's counts.
        ranks: Who else holds a share of the batch.
        parameters: How many gradients the window has; the ranks must agree on it.
        known: Seed, and number of this rank's first row, where an earlier attempt at the window learned them.

    Attributes:
        mode: What masks are drawn by, once the window's rows are known.
        known: What was learned: seed, and number of this rank's first row.

    Source:
        Laws M1, R1.
    """

    def __init__(
        self, seed: int, *, ranks: Ranks | None, parameters: int, known: tuple[int, int] | None = None
    ) -> None:
        self._ranks = ranks
        self._parameters = parameters
        self._first = self._next = 0
        self._pieces: list[Piece] = []
        self.known = (seed, 0) if ranks is None else known
        self.mode = ByRow(seed)
        self._begin()

    def expect(self, rows: int, *, begun: bool) -> None:
        """Learn where this rank's rows begin in the effective batch.

        Args:
            rows: Of this rank's share.
            begun: Whether the window has handed out rows already.

        Raises:
            WindowError: It has, and other ranks would have to be told of more.
            RankError: Another rank failed.

        Cost:
            Over several ranks two small all-reduces, once a window.
        """
        if self._ranks is None:
            self._first, self._next = self._next, self._next + rows
            return
        if begun:
            raise WindowError(
                'dropout="by_row" numbers the rows of all ranks before the first forward; call window.split once'
            )
        if self.known is None:
            seed, shares = numbered(self._ranks, rows, seed=self.mode.seed, parameters=self._parameters)
            self.known = seed, sum(shares[: self._ranks.index])
        self._begin()

    def cut(self, pieces: Sequence[Piece]) -> None:
        """Learn that the rows come in another order than the batch's.

        Args:
            pieces: The microbatches, as they will come.

        Raises:
            ConfigError: Rows are padded on both sides, so that trimming leaves no place its number.
        """
        if any(piece.padded == "both" for piece in pieces):
            raise ConfigError(
                'dropout="by_row" needs all padding of a batch on one side: where rows are trimmed on both, nothing '
                "tells which place is which"
            )
        self._pieces = list(pieces)

    def shown(self, microbatches: Iterable[tuple[int, Any]]) -> Iterator[tuple[int, Any]]:
        """Show every microbatch of the batch while it is handed out, as often as the batch is.

        Args:
            microbatches: Each with its rows.

        Returns:
            The same.
        """
        return self._showing(microbatches, self._first, list(self._pieces))

    def show_whole(self, rows: int) -> None:
        """Show the whole batch, to a loss that couples its samples: with masks of its own, the same on every rank.

        Args:
            rows: Of the batch, over all ranks.
        """
        self.mode.show(Shown(torch.arange(rows, device="cpu")), first=_WHOLE)

    def _showing(
        self, microbatches: Iterable[tuple[int, Any]], first: int, pieces: list[Piece]
    ) -> Iterator[tuple[int, Any]]:
        start = first
        for index, (rows, microbatch) in enumerate(microbatches):
            if pieces:
                self.mode.show(Shown(first + pieces[index].rows, from_end=pieces[index].padded == "left"))
            else:
                self.mode.show(Shown(torch.arange(start, start + rows, device="cpu")))
            start += rows
            yield rows, microbatch
        self.mode.show(None)

    def _begin(self) -> None:
        if self.known is not None:
            self.mode.seed, self._first = self.known
