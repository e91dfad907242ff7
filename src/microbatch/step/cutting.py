"""Cut a batch into a window's microbatches, by rows or by length."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

from torch import Tensor

from microbatch.batch.batch_tree import slice_rows
from microbatch.batch.lengths import Lengths, Piece, cut_by_length, take_piece
from microbatch.batch.prefetch import feed, is_there
from microbatch.step.recovery import Cut, cut_of_pieces, cut_of_rows
from microbatch.step.settings import Settings
from microbatch.step.sizing import Sizing


@dataclass(frozen=True, slots=True)
class Cutting:
    """A batch that has been cut.

    Attributes:
        begin: Begins to hand out the microbatches, on the device, each with its rows.
        microbatches: How many there are.
        cut: How large they are; `None` for a batch without rows.
        pieces: Which rows each has, where these do not follow one another.
    """

    begin: Callable[[], Iterator[tuple[int, Any]]]
    microbatches: int
    cut: Cut | None
    pieces: Sequence[Piece] | None = None

    @property
    def order(self) -> list[Tensor] | None:
        """Where the rows of each microbatch stand in the batch; `None` if they follow one another."""
        return None if self.pieces is None else [piece.rows for piece in self.pieces]


def cut_up(batch: object, rows: int, *, settings: Settings, sizing: Sizing) -> Cutting:
    """Cut a batch.

    Args:
        batch: The whole of it.
        rows: Its rows.
        settings: The accumulator's.
        sizing: The size of now; with ``"auto"`` and ragged rows it is told the width of the first batch.

    Returns:
        The microbatches.
    """
    size = sizing.rows if rows else 1
    if settings.lengths is not None and rows:
        return _cut_up_by_length(batch, size, settings=settings, sizing=sizing, lengths=settings.lengths)
    there, device = is_there(batch, settings.device), settings.device

    def begin() -> Iterator[tuple[int, Any]]:
        pieces = (range(start, min(start + size, rows)) for start in range(0, rows, size))
        cut = ((len(p), slice_rows(batch, p.start, p.stop, rows=rows)) for p in pieces)
        return cut if there else feed(cut, device)

    return Cutting(begin, -(-rows // size), cut_of_rows(batch, sizing, rows=rows) if rows else None)


def _cut_up_by_length(batch: object, size: int, *, settings: Settings, sizing: Sizing, lengths: Lengths) -> Cutting:
    tokens = sizing.tokens if lengths.microbatch_tokens is None else lengths.microbatch_tokens
    now = lengths if tokens is None else replace(lengths, microbatch_tokens=sizing.halved(tokens))
    pieces = cut_by_length(batch, size, lengths=now)
    if sizing.asked == "auto" and sizing.width is None:
        sizing.width = pieces[0].stop - pieces[0].start
    device = settings.device

    def begin() -> Iterator[tuple[int, Any]]:
        return feed(((len(p.rows), take_piece(batch, p, lengths=lengths)) for p in pieces), device)

    return Cutting(begin, len(pieces), cut_of_pieces(batch, pieces, sizing, lengths=lengths), pieces)
