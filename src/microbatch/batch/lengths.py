"""Cut a padded batch by length, so that each microbatch is trimmed to its own longest row."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor

from microbatch.arguments import attribute, check_callable, check_one_of, check_whole
from microbatch.batch.batch_tree import Rows, Whole, leaves, rows_of, select
from microbatch.batch.copies import Copies
from microbatch.batch.recognise import spread
from microbatch.batch.walk import is_array
from microbatch.errors import BatchError, ConfigError
from microbatch.kind_words import kind_of

# Entries of packed layouts, which hold several documents in one row, or all rows in one sequence.
_PACKED = ("cu_seqlens", "cu_seq_lens", "seq_idx")


@dataclass(frozen=True, slots=True, kw_only=True)
class Lengths:
    """Describe how long each row of a padded batch is, so that the batch is cut by its number of tokens.

    The gradient of a batch does not depend on the order of its rows. Columns that are padding in every row of a
    microbatch add nothing to the gradient. So rows of similar length go into one microbatch, which is trimmed to its
    longest row. All microbatches have about the same number of tokens.

    Attributes:
        of: Name of the batch's entry with the lengths, or a function of the batch that returns this entry. The entry is
            a mask of shape ``(rows, columns)``, not 0 where there is a token, or lengths in tokens of shape
            ``(rows,)``.
        side: Side of the padding, ``"right"`` or ``"left"``, where lengths are given; a mask shows the side itself.
        keys: Names of the entries to trim in their second dimension. `None` trims all entries whose second dimension is
            the batch's number of columns. Names that a batch does not have are ignored.
        relative_positions: Whether the model uses only relative positions. Padding on the left can then be trimmed
            without ``position_ids`` in the batch.
        microbatch_tokens: Most tokens of one microbatch, padding included; at least 1. `None` allows
            ``microbatch_size`` rows of the batch's longest length.
        overhead: Cost of one more microbatch, in tokens; at least 0.

    Raises:
        ConfigError: A field has a value that cannot work.

    Example:
        >>> Lengths(of="attention_mask", microbatch_tokens=4096).side  # for Accumulator(lengths=...)
        'right'

    Source:
        Every cut has the same gradient. The cost was measured, see ``benchmarks/``.
    """

    of: str | Callable[[Any], Tensor]
    side: str = "right"
    keys: Sequence[str] | None = None
    relative_positions: bool = False
    microbatch_tokens: int | None = None
    overhead: int = 100

    def __post_init__(self) -> None:
        """Refuse values that would fail only later, when a batch is cut."""
        if not isinstance(self.of, str):
            check_callable("lengths: of, if it is no name,", self.of, "of(batch)")
        check_one_of("lengths: side", self.side, ("right", "left"))
        check_one_of("lengths: relative_positions", self.relative_positions, (True, False))
        if self.keys is not None and not isinstance(self.keys, Sequence):
            raise ConfigError(f"lengths: keys must be a list of names, not {self.keys!r}")
        if isinstance(self.keys, str):  # a str is a Sequence[str] too, of its letters
            raise ConfigError(f"lengths: keys must be a list of names, for example [{self.keys!r}]")
        for name, number, least in (("microbatch_tokens", self.microbatch_tokens, 1), ("overhead", self.overhead, 0)):
            if number is not None or name == "overhead":
                object.__setattr__(self, name, check_whole(f"lengths: {name}", number, least=least))  # as an int


@dataclass(frozen=True, slots=True)
class Piece:
    """The rows and columns of one microbatch of a padded batch.

    Attributes:
        rows: Numbers of the microbatch's rows in the batch; shape ``(rows,)``, int64, on the host.
        start: First column that any of the rows uses.
        stop: One past the last column that any of the rows uses.
        columns: Columns of the whole batch.
        tokens: Sum of the rows' own lengths; at most the number of rows times ``stop - start``.
        padded: Side on which the rows of the whole batch have padding: ``"right"``, ``"left"`` or ``"both"``.
    """

    rows: Tensor
    start: int
    stop: int
    columns: int
    tokens: int
    padded: str = "right"


def cut_by_length(batch: object, microbatch_size: int, *, lengths: Lengths) -> list[Piece]:
    """Choose the rows and columns of each microbatch of a padded batch.

    Rows are sorted by length, longest first. They are cut where ``sum_k (rows_k * columns_k + overhead)`` is smallest,
    and no microbatch has more tokens than allowed. A microbatch keeps the columns from the first to the last one that
    any of its rows uses. A microbatch of empty rows keeps one column, because models refuse empty sequences.

    Args:
        batch: A batch as `cut` accepts it.
        microbatch_size: Rows of the longest length that fit into one microbatch.
        lengths: Describes the rows' lengths.

    Returns:
        The microbatches, those with the longest rows first, so that a lack of memory shows at once.

    Raises:
        ConfigError: The batch has no entry with the lengths.
        BatchError: The entry has another number of rows, or cannot be read. Or the layout is packed, padding on the
            left cannot be trimmed, or it is not clear which entries are padded.

    Cost:
        Reads the lengths on the host, and takes ``O(rows * rows per microbatch)`` additions.
    """
    rows = rows_of(batch)
    _refuse_packed(batch)
    lengths_or_mask = _read_lengths(batch, lengths, rows=rows)
    columns = _columns(batch, lengths_or_mask, lengths)
    spans = _spans(lengths_or_mask, columns, side=lengths.side)
    if any(0 < start < stop for start, stop in spans):
        _check_positions(batch, columns, lengths)
    sorted_rows = sorted(range(rows), key=lambda row: (spans[row][0] - spans[row][1], spans[row][0], row))
    spans = _keep_one_column([spans[row] for row in sorted_rows], columns, side=lengths.side)
    padded = "right" if not any(start for start, _ in spans) else "left"
    if padded == "left" and any(stop < columns for _, stop in spans):
        padded = "both"
    sizes = [stop - start for start, stop in spans]
    most = lengths.microbatch_tokens or microbatch_size * sizes[0]
    starts = [start for start, _ in spans]
    return [
        Piece(
            rows=torch.tensor(sorted_rows[begin:end], device="cpu"),
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
    """Cut rows, sorted from long to short, so that padded tokens and the microbatches' overhead cost least.

    Args:
        sizes: Lengths in tokens, none longer than the one before.
        most: Most tokens of a microbatch, padding included; a microbatch of a single row may have more.
        overhead: Cost of a microbatch, in tokens.
        starts: First column of each row; `None` if every row begins at column 0. A microbatch is as wide as the columns
            that its rows use together.

    Returns:
        One pair for each microbatch, in order: its first row, and one past its last.

    Example:
        >>> best_cuts([100, 99, 10, 9, 8], most=200, overhead=20)
        [(0, 2), (2, 5)]
    """
    starts = starts or [0] * len(sizes)
    stops = [start + size for start, size in zip(starts, sizes, strict=True)]
    # least[end] is the cost of the cheapest cut of the first `end` rows; its last microbatch begins at begins[end].
    least, begins = [0, *[-1] * len(sizes)], [0] * (len(sizes) + 1)
    for begin in range(len(sizes)):
        cost_before, low, high = least[begin] + overhead, starts[begin], stops[begin]
        for end in range(begin + 1, len(sizes) + 1):
            # Calls of `min` and `max` would take longer than the rest of this function.
            if starts[end - 1] < low:  # noqa: PLR1730
                low = starts[end - 1]
            if stops[end - 1] > high:  # noqa: PLR1730
                high = stops[end - 1]
            tokens = (end - begin) * (high - low)
            if tokens > most and end > begin + 1:
                break
            if least[end] < 0 or cost_before + tokens < least[end]:
                least[end], begins[end] = cost_before + tokens, begin
    cuts: list[tuple[int, int]] = []
    end = len(sizes)
    while end:
        cuts.append((begins[end], end))
        end = begins[end]
    return cuts[::-1]


def take_piece(batch: object, piece: Piece, *, lengths: Lengths, copy_on: torch.device | None = None) -> Any:
    """Copy one microbatch out of a padded batch, without marks, and trim its columns to those of the piece."""
    trim = partial(_trimmed, piece=piece, keys=lengths.keys)
    copied = None if copy_on is None else Copies(copy_on)
    return select(batch, piece.rows.tolist(), rows=rows_of(batch), copied=copied, trim=trim)


def _trimmed(value: Any, path: str, dim: int, *, piece: Piece, keys: Sequence[str] | None) -> Any:
    """Take the columns of a piece of an array whose rows are in dimension ``dim``."""
    if not _is_trimmed(value, path, columns=piece.columns, keys=keys, dim=dim):
        return value
    columns = slice(piece.start, piece.stop)
    return value[columns] if dim % len(value.shape) else value[:, columns]


def in_order(results: Sequence[Tensor], rows: Sequence[Tensor] | None) -> Tensor:
    """Concatenate results per row of all microbatches, and sort them into the batch's order.

    Args:
        results: One tensor for each microbatch, of shape ``(rows, ...)``.
        rows: Numbers of each microbatch's rows in the batch; `None` if they are in order already.

    Returns:
        Shape ``(rows of the batch, ...)``.

    Example:
        >>> in_order([torch.tensor([20, 0]), torch.tensor([10])], [torch.tensor([2, 0]), torch.tensor([1])]).tolist()
        [0, 10, 20]
    """
    joined = torch.cat(list(results))
    return joined if rows is None else joined[torch.argsort(torch.cat(list(rows))).to(joined.device)]


def _read_lengths(batch: Any, lengths: Lengths, *, rows: int) -> Tensor:
    """Read the batch's entry with the lengths, or with the mask, as a tensor."""
    if isinstance(lengths.of, str):
        name = lengths.of
        entry = batch.get(name) if isinstance(batch, Mapping) else attribute(batch, name)
        if entry is None:
            raise ConfigError(
                f"lengths: the batch has no entry {name!r}; pass of= the name of its mask or of its lengths, or a "
                "function of the batch"
            )
    else:
        entry = lengths.of(batch)
    mark = entry if isinstance(entry, Rows) else Rows([])
    if isinstance(entry, Whole | Rows):
        entry = entry.value
    try:
        lengths_or_mask = torch.as_tensor(entry).movedim(mark.dim, 0)
        if mark.group > 1:  # a row is as long as the longest of its entries, and uses the columns of all of them
            lengths_or_mask = lengths_or_mask.unflatten(0, (-1, mark.group)).amax(dim=1)
    except (TypeError, ValueError, RuntimeError) as error:
        raise BatchError(
            f"lengths: {kind_of(entry)} cannot be read as a mask or as lengths ({error}); pass a tensor, an "
            "array or a list of numbers"
        ) from error
    if lengths_or_mask.ndim not in {1, 2} or lengths_or_mask.shape[0] != rows:
        raise BatchError(
            f"lengths: expected a mask of shape ({rows}, columns) or lengths of shape ({rows},), not a tensor of shape "
            f"{tuple(lengths_or_mask.shape)}"
        )
    return lengths_or_mask


def _spans(lengths_or_mask: Tensor, columns: int, *, side: str) -> list[tuple[int, int]]:
    """Find the first used column of every row, and one past its last."""
    if lengths_or_mask.ndim == 2:
        used = (lengths_or_mask != 0).to("cpu", torch.int8)
        not_empty = used.amax(dim=1) > 0
        starts = torch.where(not_empty, used.argmax(dim=1), 0)
        stops = torch.where(not_empty, columns - used.flip(1).argmax(dim=1), 0)
        return list(zip(starts.tolist(), stops.tolist(), strict=True))
    sizes: list[int] = lengths_or_mask.cpu().long().tolist()
    if min(sizes) < 0 or max(sizes) > columns:
        raise BatchError(f"lengths: all lengths must be between 0 and the batch's {columns} columns, not {sizes}")
    return [(columns - size, columns) if side == "left" else (0, size) for size in sizes]


def _keep_one_column(spans: Sequence[tuple[int, int]], columns: int, *, side: str) -> list[tuple[int, int]]:
    """Widen every empty row to one column, which the row before already uses, so that no microbatch gets wider."""
    widened: list[tuple[int, int]] = []
    for start, stop in spans:
        if start < stop:
            widened.append((start, stop))
            continue
        first, end = widened[-1] if widened else (0, columns)
        widened.append((end - 1, end) if side == "left" else (first, first + 1))
    return widened


def _columns(batch: object, lengths_or_mask: Tensor, lengths: Lengths) -> int:
    """Count the columns of the padded entries, and refuse a batch in which the padded entries are not clear."""
    named = [(path, shape) for path, shape in _shapes(batch) if _is_key(path, lengths.keys)]
    widths = {shape[1] for _, shape in named if len(shape) > 1}
    if lengths_or_mask.ndim == 1 and len(widths) != 1:
        raise BatchError(
            f"lengths: the entries' second dimensions are {sorted(widths)}, so it is not clear which entries are "
            "padded. Name the padded entries with keys=, or pass a mask instead of lengths"
        )
    columns = int(lengths_or_mask.shape[1]) if lengths_or_mask.ndim == 2 else next(iter(widths))
    if columns not in widths or columns == 0:
        raise BatchError(
            f"lengths: {columns} columns cannot be trimmed: the entries' second dimensions are {sorted(widths)}. "
            "Pass the mask of these entries, or name the entries to trim with keys="
        )
    for path, shape in named:
        _check_entry(shape, path, columns=columns, keys=lengths.keys)
    return columns


def _check_entry(shape: tuple[int, ...], path: str, *, columns: int, keys: Sequence[str] | None) -> None:
    """Refuse an entry whose other dimensions would no longer fit after its second dimension is trimmed."""
    if keys is not None:
        if shape[1:2] != (columns,):
            raise BatchError(
                f"lengths: {path} is named in keys=, but its shape is {shape}, and its second dimension must be the "
                f"{columns} columns; leave it out of keys="
            )
    elif columns in shape[2:]:
        raise BatchError(
            f"lengths: {path} has shape {shape}, with {columns} columns in other dimensions than the second, as a mask "
            "over pairs of tokens has. Leave this entry out, build it in the model, or name the entries to trim with "
            "keys="
        )


def _shapes(batch: object) -> list[tuple[str, tuple[int, ...]]]:
    """List the shape of every tensor and array with at least one dimension, with the rows first."""
    found = [(path, leaf) for path, leaf in leaves(batch) if not isinstance(leaf, Rows)]
    shapes = [(path, _rows_first(leaf, 0)) for path, leaf in found if _is_array(leaf)]
    marks = [each for path, leaf in leaves(batch) if isinstance(leaf, Rows) for each in spread(leaf, path)]
    return shapes + [(path, _rows_first(mark.value, mark.dim)) for path, mark in marks if _is_array(mark.value)]


def _is_array(value: Any) -> bool:
    """Return whether a leaf is a tensor or a NumPy array with at least one dimension."""
    return (isinstance(value, Tensor) or is_array(value)) and bool(value.shape)


def _rows_first(value: Any, dim: int) -> tuple[int, ...]:
    shape = list(value.shape)
    return (shape.pop(dim), *shape)


def _is_trimmed(value: Any, path: str, *, columns: int, keys: Sequence[str] | None, dim: int = 0) -> bool:
    return _is_array(value) and _rows_first(value, dim)[1:2] == (columns,) and _is_key(path, keys)


def _is_key(path: str, keys: Sequence[str] | None) -> bool:
    return keys is None or any(path.endswith((f"[{key!r}]", f".{key}")) for key in keys)


def _refuse_packed(batch: object) -> None:
    for path, _ in leaves(batch):
        if any(name in path for name in _PACKED):
            raise BatchError(
                f"lengths: {path} belongs to a packed layout, whose documents are not rows, so the batch cannot be cut "
                "by length. Leave lengths= out, or pad the documents instead of packing them"
            )


def _check_positions(batch: object, columns: int, lengths: Lengths) -> None:
    if lengths.relative_positions or any(
        _is_key(path, ["position_ids"]) and _is_trimmed(value, path, columns=columns, keys=lengths.keys)
        for path, value in leaves(batch)
    ):
        return
    raise BatchError(
        "lengths: the padding is on the left, and trimming it would move every token to another position. Add "
        "position_ids of the tokens' shape to the batch, or set relative_positions=True if the model uses only "
        "relative positions"
    )
