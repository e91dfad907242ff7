"""Cut a batch into the microbatches of a window, by rows or by length."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import chain
from typing import Any

import torch
from torch import Tensor

from microbatch.arguments import attribute, whole
from microbatch.batch.batch_tree import contents, rows_of, slice_rows, unmarked
from microbatch.batch.batches import parts_of
from microbatch.batch.lengths import Lengths, Piece, cut_by_length, take_piece
from microbatch.batch.prefetch import feed, is_there
from microbatch.errors import BatchError
from microbatch.step.size.sizing import Sizing


@dataclass(slots=True)  # not frozen, nor is `Cutting`: they are made for every window
class Cut:
    """Sizes of the microbatches of a batch.

    Attributes:
        allowed: Rows or tokens of a full microbatch, before any halving.
        used: Rows or tokens of the largest microbatch.
        rows: Largest number of rows in a microbatch.
        row_bytes: Bytes of the largest row.
        bytes: Bytes of the largest microbatch.
        tokens: Tokens of the batch without padding, if it is cut by length.
    """

    allowed: int
    used: int
    rows: int
    row_bytes: float
    bytes: float
    tokens: int | None = None


@dataclass(slots=True)
class Cutting:
    """The microbatches of a batch.

    Attributes:
        begin: Returns a new iterator over ``(rows, microbatch)`` on the device, from the first microbatch on. Rows are
            `None` where nobody knows them.
        microbatches: Number of microbatches.
        cut: Sizes of the microbatches; `None` for a batch without rows, and for microbatches from a loader.
        pieces: Rows of each microbatch, if the batch is cut by length.
        rows: Rows of the batch; `None` if a microbatch from a loader has rows that nobody knows.
        size: Rows of a microbatch, if the batch is cut by rows.
    """

    begin: Callable[[], Iterator[tuple[int | None, Any]]]
    microbatches: int
    cut: Cut | None = None
    pieces: Sequence[Piece] | None = None
    rows: int | None = 0
    size: int = 0

    @property
    def order(self) -> list[Tensor] | None:
        """Row numbers of each microbatch; `None` if microbatches are consecutive rows."""
        return None if self.pieces is None else [piece.rows for piece in self.pieces]


def cut_up(batch: object, rows: int, *, lengths: Lengths | None, sizing: Sizing, device: torch.device) -> Cutting:
    """Cut a batch of a number of rows, or each batch of `Batches`."""
    cuttings: list[Cutting] = []
    start = 0
    for part in parts_of(batch):
        count = rows if part is batch else rows_of(part)
        if not count:
            continue
        if lengths is None:
            cuttings.append(_by_rows(part, count, sizing=sizing, device=device))
        else:
            cuttings.append(_by_length(part, start, sizing=sizing, lengths=lengths, device=device))
        start += count
    if len(cuttings) == 1:
        return cuttings[0]
    return Cutting(
        lambda: chain.from_iterable(each.begin() for each in cuttings),
        sum(each.microbatches for each in cuttings),
        _largest([each.cut for each in cuttings if each.cut is not None]),
        [piece for each in cuttings for piece in each.pieces or ()] if cuttings and lengths is not None else None,
        start,
        size=sizing.rows if lengths is None else 0,
    )


def handed_in(microbatches: Sequence[Any], device: torch.device) -> Cutting:
    """Wrap microbatches from a loader, which are handed on uncut."""
    sizes = [_rows_if_known(each) for each in microbatches]
    known = [size for size in sizes if size is not None]

    def begin() -> Iterator[tuple[int | None, Any]]:
        return feed(zip(sizes, map(unmarked, microbatches), strict=True), device)

    return Cutting(begin, len(microbatches), rows=sum(known) if len(known) == len(sizes) else None)


def _rows_if_known(microbatch: object) -> int | None:
    try:
        return rows_of(microbatch)
    except BatchError:
        return None


def _by_rows(batch: object, rows: int, *, sizing: Sizing, device: torch.device) -> Cutting:
    size, there = sizing.rows, is_there(batch, device)

    def begin() -> Iterator[tuple[int | None, Any]]:
        cut = _sliced(batch, rows, size=size, device=device)
        return cut if there else feed(cut, device)

    largest, row_bytes = min(size, rows), _bytes_of(batch) / rows
    cut = Cut(sizing.most, largest, largest, row_bytes, row_bytes * largest)
    return Cutting(begin, -(-rows // size), cut, rows=rows, size=size)


def _sliced(batch: object, rows: int, *, size: int, device: torch.device) -> Iterator[tuple[int | None, Any]]:
    for start in range(0, rows, size):
        stop = min(start + size, rows)
        yield stop - start, slice_rows(batch, start, stop, rows=rows, copy_on=device)


def _by_length(batch: object, first: int, *, sizing: Sizing, lengths: Lengths, device: torch.device) -> Cutting:
    tokens = sizing.tokens if lengths.microbatch_tokens is None else lengths.microbatch_tokens
    now = lengths if tokens is None else replace(lengths, microbatch_tokens=sizing.halved(tokens))
    pieces = cut_by_length(batch, sizing.rows, lengths=now)
    if sizing.asked == "auto" and sizing.width is None:
        sizing.width = pieces[0].stop - pieces[0].start

    def begin() -> Iterator[tuple[int | None, Any]]:
        cut = ((len(p.rows), take_piece(batch, p, lengths=lengths, copy_on=device)) for p in pieces)
        return feed(cut, device)

    cut = _cut_of_pieces(batch, pieces, sizing, lengths=lengths)
    placed = [replace(p, rows=p.rows + first) for p in pieces] if first else pieces
    return Cutting(begin, len(pieces), cut, placed, sum(len(p.rows) for p in pieces))


def _cut_of_pieces(batch: object, pieces: Sequence[Piece], sizing: Sizing, *, lengths: Lengths) -> Cut:
    longest = pieces[0].stop - pieces[0].start
    tokens = max(len(piece.rows) * (piece.stop - piece.start) for piece in pieces)
    column_bytes = _bytes_of(batch) / sum(len(piece.rows) for piece in pieces) / pieces[0].columns
    used = sum(piece.tokens for piece in pieces)
    by_tokens = lengths.microbatch_tokens
    return Cut(
        allowed=sizing.most if by_tokens is None else by_tokens,
        used=-(-tokens // (sizing.width or longest)) if by_tokens is None else tokens,
        rows=max(len(piece.rows) for piece in pieces),
        row_bytes=column_bytes * longest,
        bytes=column_bytes * tokens,
        tokens=used,
    )


def _largest(cuts: Sequence[Cut]) -> Cut | None:
    """Return the largest values of several cuts: memory must be enough for the largest microbatch of all."""
    if not cuts:
        return None
    tokens = [each.tokens for each in cuts if each.tokens is not None]
    return Cut(
        allowed=cuts[0].allowed,
        used=max(each.used for each in cuts),
        rows=max(each.rows for each in cuts),
        row_bytes=max(each.row_bytes for each in cuts),
        bytes=max(each.bytes for each in cuts),
        tokens=sum(tokens) if tokens else None,
    )


def _bytes_of(batch: object) -> int:
    found = contents(batch)
    strided = [leaf for leaf in found if not isinstance(leaf, Tensor) or leaf.layout is torch.strided]
    known = [whole(attribute(leaf, "nbytes")) for leaf in strided]  # a storage has a method of this name
    return sum(each for each in known if each is not None)
