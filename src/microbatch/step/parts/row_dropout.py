"""Dropout masks for each row of the effective batch, so that masks do not depend on the cut."""

from __future__ import annotations

import sys
from collections.abc import Generator, Sequence
from contextlib import ExitStack, contextmanager

import torch

from microbatch.batch.dropout_mode import ByRow, Shown
from microbatch.batch.lengths import Piece
from microbatch.errors import ConfigError, WindowError
from microbatch.step.cutting import Cutting
from microbatch.step.force_eager import force_eager
from microbatch.step.part import OpenWindow, Part, Pass

# Index of the first dropout call in a loss of the whole batch, far from an encoder's, so that no masks are equal.
_WHOLE = 1 << 32


class RowDropout(Part):
    """Number the rows of a window over all ranks, and draw each row's masks from its number.

    Source:
        Laws M1, R1.
    """

    _mode: ByRow

    def open(self, window: OpenWindow, stack: ExitStack) -> None:
        """Enter the mode that draws the masks."""
        # Compiled code would draw other masks.
        if "torch._dynamo" in sys.modules:
            stack.enter_context(force_eager())
        self._mode = stack.enter_context(ByRow(window.seed))
        self._first = self._seen = self._next = 0
        self._pieces: Sequence[Piece] = ()

    def cut(self, window: OpenWindow, batch: object, cutting: Cutting) -> None:
        """Compute the number of this rank's first row."""
        if window.peers.size > 1 and window.done:
            raise WindowError(
                'dropout="by_row" numbers the rows of all ranks before the first forward; call window.split once'
            )
        if any(piece.padded == "both" for piece in cutting.pieces or ()):
            raise ConfigError(
                'dropout="by_row" needs all padding of a batch on one side: if rows are trimmed on both sides, the '
                "position of a token in its row is not known"
            )
        if cutting.rows is None:
            raise ConfigError(
                'dropout="by_row" numbers the rows of the batch, and the rows of a microbatch are not known; mark them '
                "with mb.Rows(...)"
            )
        self._mode.seed, shares = window.peers.number_rows(window, cutting.rows)
        self._first, self._seen = self._seen + sum(shares[: window.peers.index]), self._seen + cutting.rows
        self._next, self._pieces = self._first, cutting.pieces or ()

    @contextmanager
    def around(self, window: OpenWindow, p: Pass) -> Generator[None]:
        """Pass the row numbers of a pass to the mode."""
        if p.index == 0:
            self._next = self._first
        if self._pieces:
            piece = self._pieces[p.index]
            self._mode.show(Shown(self._first + piece.rows, from_end=piece.padded == "left"))
        else:
            first = self._first if p.filler else self._next
            self._mode.show(Shown(torch.arange(first, first + (p.rows or 0), device="cpu")))
            self._next += 0 if p.filler else p.rows or 0
        yield
        self._mode.show(None)

    def whole(self, window: OpenWindow, rows: int) -> None:
        """Pass the numbers of all rows to the mode, so that every rank draws the same masks in the loss."""
        self._mode.show(Shown(torch.arange(rows, device="cpu")), first=_WHOLE)
