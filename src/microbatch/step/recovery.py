"""What a window that ran out of memory leaves to the next attempt, and what others say about the next size."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from microbatch.batch.batch_tree import Rows, leaves
from microbatch.batch.lengths import Lengths, Piece
from microbatch.step.events import Retry, SizeChanged
from microbatch.step.settings import Memory, Watched
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
        twice: Whether a coupled batch is to be encoded twice, because the graphs of all its microbatches were too much.
        masked: What masks are drawn from, and the number of this rank's first row, likewise.
    """

    retries: int = 0
    started: float | None = None
    declared: tuple[float, Mapping[str, float]] | None = None
    twice: bool = False
    masked: tuple[int, int] | None = None


@dataclass(frozen=True, slots=True)
class RanOut:
    """How a window ended that ran out of memory.

    Attributes:
        again: The attempt to go on with, or `None` where a smaller microbatch cannot help, or nobody can run one.
        event: What listeners are told of it.
        largest: Rows of the largest microbatch that the window cut; `None` if it cut none.
        budget: Bytes that it might use, where somebody counted them.
        stepped: Whether the optimizer had begun.
        coupled: Whether it was in the loss over the representations of the whole batch.
    """

    again: Attempt | None
    event: Retry | SizeChanged | None
    largest: int | None
    budget: int | None
    stepped: bool
    coupled: bool = False


@dataclass(frozen=True, slots=True)
class Cut:
    """How a batch was cut.

    Attributes:
        allowed: Rows, or tokens, that a microbatch would be allowed if nothing had been halved.
        used: What the largest microbatch has of it.
        rows: Rows of the microbatch with most of them.
        extent: How large they are.
        tokens: Tokens of the batch, padding left out, where it is cut by them.
    """

    allowed: int
    used: int
    rows: int
    extent: Extent
    tokens: int | None = None


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
    used = sum(piece.tokens for piece in pieces)
    if lengths.microbatch_tokens is not None:
        return Cut(lengths.microbatch_tokens, tokens, rows, extent, used)
    return Cut(sizing.most, -(-tokens // (sizing.width or longest)), rows, extent, used)


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


def run_out(
    memory: Memory, error: BaseException, *, index: int, cut: Cut | None, again: Attempt | None, kept: bool = False
) -> Retry | SizeChanged | None:
    """Make the next cut smaller, if that is what can help.

    Args:
        memory: What the accumulator remembers.
        error: Told what to do, where only a loop of the user's can run the window again.
        index: Of the microbatch that did not fit.
        cut: How the batch was cut; `None` where a smaller microbatch comes too late.
        again: The attempt to go on with, where whoever opened the window can run its batch again.
        kept: Whether graphs were kept that the next attempt does not keep, so that microbatches can stay as they are.

    Returns:
        What to tell listeners: a `Retry` where the window can be run again.
    """
    # What fitted once may not any more.
    memory.watched = Watched(told=memory.watched.told)
    if kept and again is None:
        error.add_note(
            "microbatch: everything is as before the window, which kept the graphs of all its microbatches; without "
            "keep=True window.encode(batch, encode) encodes them twice instead"
        )
        return None
    changed = (memory.sizing.rows, memory.sizing.rows) if kept else shrink(memory.sizing, cut)
    if changed is None:
        return None
    before, after = changed
    if again is not None:
        return Retry(step=memory.windows, index=index, before=before, after=after, error=str(error))
    error.add_note(
        f"microbatch: everything is as before the window. The next one cuts into microbatches of {after} rows "
        f"instead of {before}: run the same batch again. accumulator.step(batch, loss_fn) does so by itself."
    )
    reason = "memory ran out in a window that only its own loop can run again"
    return SizeChanged(step=memory.windows, before=before, after=after, reason=reason)


def _bytes_of(batch: object) -> int:
    found = [leaf for _, leaf in leaves(batch)]
    found += [item for leaf in found if isinstance(leaf, Rows) for item in leaf.items]
    return sum(int(getattr(leaf, "nbytes", 0)) for leaf in found)
