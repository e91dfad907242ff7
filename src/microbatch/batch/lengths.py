"""Row order is free: cut ragged rows by what they cost, and trim each microbatch to its own longest row."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import Tensor

from microbatch.batch.tree import Rows, Whole, leaves, map_leaves, rows_of
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
            batch's number of columns.
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
    """

    rows: Tensor
    start: int
    stop: int
    columns: int


def cut_by_length(batch: object, microbatch_size: int, *, lengths: Lengths) -> list[Piece]:
    """Decide which rows go together.

    Rows are sorted by length, longest first, and cut where ``sum_k (rows_k * longest_k + overhead)`` is least, no
    microbatch having more tokens than allowed.

    Args:
        batch: What `cut` accepts.
        microbatch_size: Rows of the longest length that go through the model at once.
        lengths: How long the rows are.

    Returns:
        The microbatches, the longest rows first: a memory that is too small shows at once.

    Raises:
        ConfigError: The entry that tells the lengths is not there.
        BatchError: It has another number of rows or cannot be read, the layout is packed, or padding on the left
            cannot be trimmed.

    Cost:
        Reads the lengths on the host; ``O(rows * rows per microbatch)`` additions.
    """
    rows = rows_of(batch)
    _refuse_packed(batch)
    told = _told(batch, lengths)
    columns = _columns(batch, told, lengths)
    starts, stops = _spans(told, rows, columns, side=lengths.side)
    if any(start > 0 and stop > start for start, stop in zip(starts, stops, strict=True)):
        _check_positions(batch, lengths)
    sizes = [stop - start for start, stop in zip(starts, stops, strict=True)]
    order = sorted(range(rows), key=lambda row: (-sizes[row], row))
    most = lengths.microbatch_tokens or microbatch_size * max(1, *sizes, 1)
    pieces: list[Piece] = []
    for begin, end in best_cuts([sizes[row] for row in order], most=most, overhead=lengths.overhead):
        chosen = order[begin:end]
        used = [row for row in chosen if sizes[row]] or chosen[:1]
        start = min(starts[row] for row in used)
        # A row without one token still needs a column: models do not take empty sequences.
        stop = max(start + 1, *(stops[row] for row in used))
        pieces.append(Piece(rows=torch.tensor(chosen), start=start, stop=stop, columns=columns))
    return pieces


def best_cuts(sizes: Sequence[int], *, most: int, overhead: int) -> list[tuple[int, int]]:
    """Cut rows, sorted from long to short, so that padded tokens and microbatches together cost least.

    Args:
        sizes: Lengths in tokens, none longer than the one before.
        most: Tokens that a microbatch may have, padding included; a single row may have more.
        overhead: Cost of a microbatch, in tokens.

    Returns:
        Pairs of first row and one past the last, in order.

    Example:
        >>> best_cuts([100, 99, 10, 9, 8], most=200, overhead=20)
        [(0, 2), (2, 5)]
    """
    # least[end]: the cheapest cut of the first `end` rows, and where its last microbatch begins. The microbatch from
    # `begin` to `end` is as wide as its first row.
    least: list[tuple[int, int]] = [(0, 0)] + [(-1, 0)] * len(sizes)
    for begin, size in enumerate(sizes):
        before = least[begin][0]
        for end in range(begin + 1, len(sizes) + 1):
            tokens = (end - begin) * size
            if tokens > most and end > begin + 1:
                break
            cost = before + tokens + overhead
            if least[end][0] < 0 or cost < least[end][0]:
                least[end] = (cost, begin)
    cuts: list[tuple[int, int]] = []
    end = len(sizes)
    while end:
        begin = least[end][1]
        cuts.append((begin, end))
        end = begin
    return cuts[::-1]


def take_piece(batch: object, piece: Piece, *, lengths: Lengths) -> Any:
    """Take one microbatch out of a ragged batch, trimmed.

    Args:
        batch: The whole batch.
        piece: Which rows and columns.
        lengths: What `cut_by_length` was given.

    Returns:
        The same structure with copies of the rows; marks are taken off.

    Cost:
        Copies the microbatch's rows.
    """
    rows = rows_of(batch)

    def leaf(value: Any, path: str) -> Any:
        if isinstance(value, Whole):
            return value.value
        if isinstance(value, Rows):
            return [value.items[row] for row in piece.rows.tolist()]
        if isinstance(value, list | tuple):
            items = cast("Sequence[Any]", value)
            return type(value)([items[row] for row in piece.rows.tolist()]) if len(items) == rows else value
        if not hasattr(value, "shape") or not value.shape:
            return value
        taken = value[piece.rows]
        if _has_columns(value) and _is_key(path, lengths.keys) and value.shape[1] == piece.columns:
            _check_once(value, path, keys=lengths.keys)
            taken = taken[:, piece.start : piece.stop]
        return taken

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


def _told(batch: Any, lengths: Lengths) -> Tensor:
    """Read the entry that tells the lengths."""
    if not isinstance(lengths.of, str):
        return torch.as_tensor(lengths.of(batch))
    name = lengths.of
    held = batch.get(name) if isinstance(batch, Mapping) else getattr(batch, name, None)
    if held is None:
        raise ConfigError(
            f"lengths: the batch has no entry {name!r}; name its mask or its lengths, or pass a function of the batch"
        )
    return torch.as_tensor(held)


def _spans(told: Tensor, rows: int, columns: int, *, side: str) -> tuple[list[int], list[int]]:
    """Find the first used column of every row, and one past its last."""
    if told.ndim not in {1, 2} or told.shape[0] != rows:
        raise BatchError(
            f"lengths: expected a mask of shape ({rows}, columns) or lengths of shape ({rows},), not a tensor of shape "
            f"{tuple(told.shape)}"
        )
    if told.ndim == 2:
        used = (told != 0).to("cpu", torch.int8)
        some = used.amax(dim=1) > 0
        starts = torch.where(some, used.argmax(dim=1), 0)
        stops = torch.where(some, columns - used.flip(1).argmax(dim=1), 0)
        return starts.tolist(), stops.tolist()
    sizes = told.cpu().long()
    if bool(((sizes < 0) | (sizes > columns)).any()):
        raise BatchError(f"lengths: they must be between 0 and the batch's {columns} columns, not {sizes.tolist()}")
    if side == "left":
        return (columns - sizes).tolist(), [columns] * rows
    return [0] * rows, sizes.tolist()


def _columns(batch: object, told: Tensor, lengths: Lengths) -> int:
    """Count the columns of the padded entries."""
    if told.ndim == 2:
        return told.shape[1]
    named = [value for path, value in leaves(batch) if _has_columns(value) and _is_key(path, lengths.keys)]
    widths = {int(value.shape[1]) for value in named}
    if len(widths) != 1:
        raise BatchError(
            f"lengths: the entries' second dimensions are {sorted(widths)}, so which ones are padded is not clear; "
            "name them with keys=, or give a mask"
        )
    return widths.pop()


def _check_once(value: Any, path: str, *, keys: Sequence[str] | None) -> None:
    """Refuse what looks like a mask over pairs of tokens, of which one dimension alone must not be trimmed."""
    if keys is None and list(value.shape[1:]).count(value.shape[1]) > 1:
        raise BatchError(
            f"lengths: {path} has shape {tuple(value.shape)}, with {value.shape[1]} columns more than once, as a mask "
            "over pairs has; leave it out, build it in the model, or name the entries to trim with keys="
        )


def _has_columns(value: Any) -> bool:
    return hasattr(value, "shape") and len(value.shape) >= 2


def _is_key(path: str, keys: Sequence[str] | None) -> bool:
    return keys is None or any(path.endswith((f"[{key!r}]", f".{key}")) for key in keys)


def _refuse_packed(batch: object) -> None:
    for path, _ in leaves(batch):
        if any(name in path for name in _PACKED):
            raise BatchError(
                f"lengths: {path} belongs to a packed layout, whose documents are not rows; it is not cut by length"
            )


def _check_positions(batch: object, lengths: Lengths) -> None:
    if lengths.relative_positions or any(_is_key(path, ["position_ids"]) for path, _ in leaves(batch)):
        return
    raise BatchError(
        "lengths: the padding is on the left, and trimming it would move every token to another position; put "
        "position_ids into the batch, or say relative_positions=True if the model sees only relative ones"
    )
