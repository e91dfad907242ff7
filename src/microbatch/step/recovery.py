"""What a window that ran out of memory leaves to the next attempt, and what others say about the next size."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from microbatch.batch.lengths import Lengths, Piece
from microbatch.batch.tree import Rows, leaves
from microbatch.step.events import Event, Retry, SizeChanged
from microbatch.step.sizing import Sizing
from microbatch.step.watch import Extent


@dataclass(frozen=True, slots=True)
class Attempt:
    """What earlier attempts at a window, which ran out of memory, leave to this one.

    Attributes:
        retries: How many there were.
        started: When the first one opened, by the clock of `time.perf_counter`; `None` if this is it.
        declared: Rows, and the denominators of the loss's terms, where they are known: over several ranks nobody else
            would answer when asked again.
    """

    retries: int = 0
    started: float | None = None
    declared: tuple[float, Mapping[str, float]] | None = None


@dataclass(frozen=True, slots=True)
class RanOut:
    """How a window ended that ran out of memory.

    Attributes:
        again: The attempt to go on with, or `None` where a smaller microbatch cannot help, or nobody can run one.
        event: What listeners are told of it.
        largest: Rows of the largest microbatch that the window cut; `None` if it cut none.
        budget: Bytes that it might use, where somebody counted them.
        stepped: Whether the optimizer had begun.
    """

    again: Attempt | None
    event: Retry | SizeChanged | None
    largest: int | None
    budget: int | None
    stepped: bool


@dataclass(frozen=True, slots=True)
class Cut:
    """How a batch was cut.

    Attributes:
        allowed: Rows, or tokens, that a microbatch would be allowed if nothing had been halved.
        used: What the largest microbatch has of it.
        rows: Rows of the microbatch with most of them.
        extent: How large they are.
    """

    allowed: int
    used: int
    rows: int
    extent: Extent


def cut_of_rows(batch: object, sizing: Sizing, *, rows: int) -> Cut:
    """Say how a batch is cut by rows.

    Args:
        batch: The whole of it.
        sizing: By which size.
        rows: Its rows; at least 1.

    Returns:
        The record.
    """
    largest, row_bytes = min(sizing.rows, rows), _bytes_of(batch) / rows
    return Cut(sizing.most, largest, largest, Extent(row_bytes=row_bytes, bytes=row_bytes * largest))


def cut_of_pieces(batch: object, pieces: Sequence[Piece], sizing: Sizing, *, lengths: Lengths) -> Cut:
    """Say how a batch was cut by length.

    Args:
        batch: The whole of it.
        pieces: Its microbatches, the longest rows first.
        sizing: By which size.
        lengths: As the user gave them.

    Returns:
        The record.
    """
    longest = pieces[0].stop - pieces[0].start
    tokens = max(len(piece.rows) * (piece.stop - piece.start) for piece in pieces)
    row_bytes = _bytes_of(batch) / sum(len(piece.rows) for piece in pieces)
    extent = Extent(row_bytes=row_bytes * longest / pieces[0].columns, bytes=row_bytes * tokens / pieces[0].columns)
    rows = max(len(piece.rows) for piece in pieces)
    if lengths.microbatch_tokens is not None:
        return Cut(lengths.microbatch_tokens, tokens, rows, extent)
    return Cut(sizing.most, -(-tokens // longest), rows, extent)


def shrink(sizing: Sizing, cut: Cut | None) -> tuple[int, int] | None:
    """Halve the size of the following cuts, if there is anything to halve.

    Args:
        sizing: The size.
        cut: How the batch that did not fit was cut, if it was this window that cut it.

    Returns:
        Rows before and after; `None` where a microbatch cannot be smaller.
    """
    if cut is None or cut.rows <= 1 or sizing.halved(cut.allowed) <= 1:
        return None
    before = sizing.rows
    sizing.shrink(cut.allowed, used=cut.used)
    return before, sizing.rows


def look_back(sizing: Sizing, cut: Cut | None, *, step: int, allocation_retries: int) -> list[Event]:
    """Adapt the size after a window that went well.

    Args:
        sizing: The size.
        cut: How the window's batch was cut.
        step: Index of the window.
        allocation_retries: Times that CUDA's allocator had to empty its cache and ask again in it: a window that only
            just fits, and waits for the device each time.

    Returns:
        What to tell listeners.
    """
    if allocation_retries:
        changed = shrink(sizing, cut)
        reason = f"the allocator had to empty its cache {allocation_retries} times inside the window: too tight"
    else:
        before, halvings = (sizing.rows if sizing.halvings else 0), sizing.halvings
        sizing.settle()
        changed = None if sizing.halvings == halvings else (before, sizing.rows)
        reason = "memory has been enough for a while"
    return [] if changed is None else [SizeChanged(step=step, before=changed[0], after=changed[1], reason=reason)]


def _bytes_of(batch: object) -> int:
    found = [leaf for _, leaf in leaves(batch)]
    found += [item for leaf in found if isinstance(leaf, Rows) for item in leaf.items]
    return sum(int(getattr(leaf, "nbytes", 0)) for leaf in found)
