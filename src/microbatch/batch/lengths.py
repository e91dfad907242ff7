"""Row order is free: cut ragged rows by what they cost, and trim each microbatch to its own longest row."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import Tensor

from microbatch.batch.batch_tree import Rows, Whole, leaves, map_leaves, rows_of
from microbatch.errors import BatchError, ConfigError

# Layouts that hold several documents in a row, or rows end to end: their boundaries are not the rows'.
_PACKED = ("cu_seqlens", "cu_seq_lens", "seq_idx")


@dataclass(frozen=True, slots=True, kw_only=True)
class Lengths:
    """Say how long each row of a batch is, so that it can be cut by cost.

    The gradient of a batch does not depend on the order of its rows, and columns that are padding in every row of a
    microbatch add nothing. So rows of like length go together, every microbatch has about the same number of tokens,
    and its padding ends at its own longest row.

    Attributes:
        of: Name of the batch's entry that tells: a mask of shape ``(rows, columns)``, not 0 where there is a token,
            or lengths of shape ``(rows,)``; or a function of the batch that returns either.
        side: Where lengths leave the padding, ``"right"`` or ``"left"``; a mask tells by itself.
        keys: Names of the entries to trim, in their second dimension; `None` for all whose second dimension is the
            batch's number of columns. A name that a batch does not have is passed over.
        relative_positions: Whether the model sees only relative positions, so that padding on the left may be trimmed
            without ``position_ids`` in the batch.
        microbatch_tokens: Tokens that go through the model at once, padding included; `None` allows what
            ``microbatch_size`` rows as long as the batch's longest would be.
        overhead: What one more microbatch costs, in tokens.

    Raises:
        ConfigError: A field cannot work.

    Source:
        Laws N1 to N9 hold for every cut; the cost was measured, see ``benchmarks/``.
    """

    of: str | Callable[[Any], Tensor]
    side: str = "right"
    keys: Sequence[str] | None = None
    relative_positions: bool = False
    microbatch_tokens: int | None = None
    overhead: int = 100

    def __post_init__(self) -> None:
        """Refuse what could only go wrong later."""
        if self.side not in {"right", "left"}:
            raise ConfigError(f'lengths: side must be "right" or "left", not {self.side!r}')
        if isinstance(self.keys, str):  # a sequence of letters
            raise ConfigError(f"lengths: keys must be a list of names, for example [{self.keys!r}]")
        if self.microbatch_tokens is not None and self.microbatch_tokens < 1:
            raise ConfigError(f"lengths: microbatch_tokens must be at least 1, not {self.microbatch_tokens}")
        if self.overhead < 0:
            raise ConfigError(f"lengths: overhead must be at least 0 tokens, not {self.overhead}")


@dataclass(frozen=True, slots=True)
class Piece:
    """One microbatch of a ragged batch.

    Attributes:
        rows: Where its rows stand in the batch; shape ``(rows,)``, int64, on the host.
        start: First column that any of its rows uses.
        stop: One past the last.
        columns: Columns of the whole batch.
        tokens: Columns that its rows use themselves, all together: less than what goes through the model.
        padded: Where the rows of the whole batch have padding: ``"right"`` if nowhere else, ``"left"`` likewise, or
            ``"both"``.
    """

    rows: Tensor
    start: int
    stop: int
    columns: int
    tokens: int
    padded: str = "right"


def cut_by_length(batch: object, microbatch_size: int, *, lengths: Lengths) -> list[Piece]:
    """Decide which rows go together.

    Rows are sorted by length, longest first, and cut where ``sum_k (rows_k * columns_k + overhead)`` is least, no
    microbatch having more tokens than allowed. The columns of a microbatch reach from the first that any of its rows
    uses to the last; a microbatch of empty rows keeps one, because models do not take empty sequences.

    Args:
        batch: What `cut` accepts.
        microbatch_size: Rows of the longest length that go through the model at once.
        lengths: How long the rows are.

    Returns:
        The microbatches, the longest rows first: a memory that is too small shows at once.

    Raises:
        ConfigError: The entry that tells the lengths is not there.
        BatchError: It has another number of rows or cannot be read, the layout is packed, padding on the left cannot
            be trimmed, or it is not clear which entries are to be trimmed.

    Cost:
        Reads the lengths on the host; ``O(rows * rows per microbatch)`` additions.
    """
    rows = rows_of(batch)
    _refuse_packed(batch)
    told = _told(batch, lengths, rows=rows)
    columns = _columns(batch, told, lengths)
    spans = _spans(told, columns, side=lengths.side)
    if any(0 < start < stop for start, stop in spans):
        _check_positions(batch, columns, lengths)
    order = sorted(range(rows), key=lambda row: (spans[row][0] - spans[row][1], spans[row][0], row))
    spans = _with_a_column([spans[row] for row in order], columns, side=lengths.side)
    padded = "right" if not any(start for start, _ in spans) else "left"
    if padded == "left" and any(stop < columns for _, stop in spans):
        padded = "both"
    sizes = [stop - start for start, stop in spans]
    most = lengths.microbatch_tokens or microbatch_size * sizes[0]
    starts = [start for start, _ in spans]
    return [
        Piece(
            rows=torch.tensor(order[begin:end], device="cpu"),
            start=min(starts[begin:end]),
            stop=max(stop for _, stop in spans[begin:end]),
            columns=columns,
            tokens=sum(sizes[begin:end]),
            padded=padded,
        )
        for begin, end in best_cuts(sizes, starts=starts, most=most, overhead=lengths.overhead)
    ]


def best_cuts(
    sizes: Sequence[int], *, most: int, overhead: int, starts: Sequence[int] | None = None
) -> list[tuple[int, int]]:
    """Cut rows, sorted from long to short, so that padded tokens and microbatches together cost least.

    Args:
        sizes: Lengths in tokens, none longer than the one before.
        most: Tokens that a microbatch may have, padding included; a single row may have more.
        overhead: Cost of a microbatch, in tokens.
        starts: First column of each row, if they differ: a microbatch is as wide as its rows together.

    Returns:
        Pairs of first row and one past the last, in order.

    Example:
        >>> best_cuts([100, 99, 10, 9, 8], most=200, overhead=20)
        [(0, 2), (2, 5)]
    """
    starts = starts or [0] * len(sizes)
    stops = [start + size for start, size in zip(starts, sizes, strict=True)]
    # least[end]: the cost of the cheapest cut of the first `end` rows; begins[end]: where its last microbatch begins.
    least, begins = [0, *[-1] * len(sizes)], [0] * (len(sizes) + 1)
    for begin in range(len(sizes)):
        before, low, high = least[begin] + overhead, starts[begin], stops[begin]
        for end in range(begin + 1, len(sizes) + 1):
            # Calls of `min` and `max` would take longer than all the rest.
            if starts[end - 1] < low:  # noqa: PLR1730
                low = starts[end - 1]
            if stops[end - 1] > high:  # noqa: PLR1730
                high = stops[end - 1]
            tokens = (end - begin) * (high - low)
            if tokens > most and end > begin + 1:
                break
            if least[end] < 0 or before + tokens < least[end]:
                least[end], begins[end] = before + tokens, begin
    cuts: list[tuple[int, int]] = []
    end = len(sizes)
    while end:
        cuts.append((begins[end], end))
        end = begins[end]
    return cuts[::-1]


def take_piece(batch: object, piece: Piece, *, lengths: Lengths) -> Any:
    """Take one microbatch out of a ragged batch, trimmed.

    Args:
        batch: The whole batch.
        piece: Which rows and columns.
        lengths: What `cut_by_length` was given.

    Returns:
        The same structure with copies of the rows, contiguous; marks are taken off.

    Cost:
        Copies the microbatch's tokens.
    """
    rows, chosen = rows_of(batch), piece.rows.tolist()

    def leaf(value: Any, path: str) -> Any:
        if isinstance(value, Whole):
            return value.value
        if isinstance(value, Rows):
            return [value.items[row] for row in chosen]
        if isinstance(value, list | tuple):
            items = cast("Sequence[Any]", value)
            return type(value)([items[row] for row in chosen]) if len(items) == rows else value
        if not _is_array(value):
            return value
        if _is_trimmed(value, path, columns=piece.columns, keys=lengths.keys):
            value = value[:, piece.start : piece.stop]
        # NumPy takes a tensor of one row number for a number, and a list for a list.
        return value.index_select(0, piece.rows.to(value.device)) if isinstance(value, Tensor) else value[chosen]

    return map_leaves(leaf, batch)


def in_order(results: Sequence[Tensor], rows: Sequence[Tensor]) -> Tensor:
    """Put results of the microbatches' rows back into the batch's order.

    Args:
        results: One tensor for each microbatch, of shape ``(rows, ...)``.
        rows: Where the rows of each stand in the batch.

    Returns:
        Shape ``(rows of the batch, ...)``.

    Example:
        >>> in_order([torch.tensor([20, 0]), torch.tensor([10])], [torch.tensor([2, 0]), torch.tensor([1])]).tolist()
        [0, 10, 20]
    """
    order = torch.cat(list(rows))
    together = torch.cat(list(results))
    return together[torch.argsort(order).to(together.device)]


def _told(batch: Any, lengths: Lengths, *, rows: int) -> Tensor:
    """Read the entry that tells the lengths."""
    if isinstance(lengths.of, str):
        name = lengths.of
        held = batch.get(name) if isinstance(batch, Mapping) else getattr(batch, name, None)
        if held is None:
            raise ConfigError(
                f"lengths: the batch has no entry {name!r}; name its mask or its lengths, or pass a function of the "
                "batch"
            )
    else:
        held = lengths.of(batch)
    if isinstance(held, Whole | Rows):
        held = held.value if isinstance(held, Whole) else held.items
    try:
        told = torch.as_tensor(held)
    except (TypeError, ValueError, RuntimeError) as error:
        raise BatchError(f"lengths: a mask or lengths cannot be read from a {type(held).__name__}: {error}") from error
    if told.ndim not in {1, 2} or told.shape[0] != rows:
        raise BatchError(
            f"lengths: expected a mask of shape ({rows}, columns) or lengths of shape ({rows},), not a tensor of shape "
            f"{tuple(told.shape)}"
        )
    return told


def _spans(told: Tensor, columns: int, *, side: str) -> list[tuple[int, int]]:
    """Find the first used column of every row, and one past its last."""
    if told.ndim == 2:
        used = (told != 0).to("cpu", torch.int8)
        some = used.amax(dim=1) > 0
        starts = torch.where(some, used.argmax(dim=1), 0)
        stops = torch.where(some, columns - used.flip(1).argmax(dim=1), 0)
        return list(zip(starts.tolist(), stops.tolist(), strict=True))
    sizes: list[int] = told.cpu().long().tolist()
    if min(sizes) < 0 or max(sizes) > columns:
        raise BatchError(f"lengths: they must be between 0 and the batch's {columns} columns, not {sizes}")
    return [(columns - size, columns) if side == "left" else (0, size) for size in sizes]


def _with_a_column(spans: Sequence[tuple[int, int]], columns: int, *, side: str) -> list[tuple[int, int]]:
    """Give every row without a token one column, of those that the row before it has: it widens no microbatch."""
    made: list[tuple[int, int]] = []
    for start, stop in spans:
        if start < stop:
            made.append((start, stop))
            continue
        before, after = made[-1] if made else (0, columns)
        made.append((after - 1, after) if side == "left" else (before, before + 1))
    return made


def _columns(batch: object, told: Tensor, lengths: Lengths) -> int:
    """Count the columns of the padded entries, and see that it is clear which these are."""
    arrays = [(path, value) for path, value in leaves(batch) if _is_array(value)]
    named = [(path, value) for path, value in arrays if _is_key(path, lengths.keys)]
    widths = {int(value.shape[1]) for _, value in named if len(value.shape) > 1}
    if told.ndim == 1 and len(widths) != 1:
        raise BatchError(
            f"lengths: the entries' second dimensions are {sorted(widths)}, so which ones are padded is not clear; "
            "name them with keys=, or give a mask"
        )
    columns = int(told.shape[1]) if told.ndim == 2 else next(iter(widths))
    if columns not in widths or columns == 0:
        raise BatchError(f"lengths: there are {columns} columns to trim, but the entries have {sorted(widths)}")
    for path, value in named:
        _check_entry(value, path, columns=columns, keys=lengths.keys)
    return columns


def _check_entry(value: Any, path: str, *, columns: int, keys: Sequence[str] | None) -> None:
    """Refuse what trimming the second dimension alone would leave at odds with the rest."""
    shape: tuple[int, ...] = tuple(value.shape)
    if keys is not None:
        if shape[1:2] != (columns,):
            raise BatchError(
                f"lengths: {path} is named in keys=, but has shape {shape}, whose second dimension is not the "
                f"{columns} columns"
            )
    elif columns in shape[2:]:
        raise BatchError(
            f"lengths: {path} has shape {shape}, with {columns} columns elsewhere than in the second dimension alone, "
            "as a mask over pairs has; leave it out, build it in the model, or name the entries to trim with keys="
        )


def _is_array(value: Any) -> bool:
    """Tell whether a leaf is a tensor or a NumPy array with rows."""
    return hasattr(value, "dtype") and bool(getattr(value, "shape", None))


def _is_trimmed(value: Any, path: str, *, columns: int, keys: Sequence[str] | None) -> bool:
    return _is_array(value) and tuple(value.shape[1:2]) == (columns,) and _is_key(path, keys)


def _is_key(path: str, keys: Sequence[str] | None) -> bool:
    return keys is None or any(path.endswith((f"[{key!r}]", f".{key}")) for key in keys)


def _refuse_packed(batch: object) -> None:
    for path, _ in leaves(batch):
        if any(name in path for name in _PACKED):
            raise BatchError(
                f"lengths: {path} belongs to a packed layout, whose documents are not rows; it is not cut by length"
            )


def _check_positions(batch: object, columns: int, lengths: Lengths) -> None:
    if lengths.relative_positions or any(
        _is_key(path, ["position_ids"]) and _is_trimmed(value, path, columns=columns, keys=lengths.keys)
        for path, value in leaves(batch)
    ):
        return
    raise BatchError(
        "lengths: the padding is on the left, and trimming it would move every token to another position; put "
        "position_ids of the tokens' shape into the batch, to be trimmed with them, or say relative_positions=True if "
        "the model sees only relative ones"
    )
