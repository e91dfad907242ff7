"""The errors of a batch whose rows disagree or are not known, with advice for its layout."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from microbatch.errors import BatchError, RowsDisagreeError
from microbatch.kind_words import kind_of

_SHOWN = 3

_OTHERWISE = (
    "wrap a list with one item per row in mb.Rows([...]). If a value has several entries per row, such as the boxes of "
    "all images, let the loader make the microbatches, and use accumulator.windows(loader, microbatches=...), which "
    "cuts nothing. mb.Whole(...) is right only for a value without rows, such as class weights"
)


@dataclass(slots=True)
class Entry:
    """A value of a batch with its rows.

    Attributes:
        path: Where it is, such as ``batch['x']``.
        rows: Its number of rows.
        shape: Its shape; empty if it has none.
        marked: Whether `Rows` says where its rows are.
        what: The kind of value, if it is not a tensor or an array.
    """

    path: str
    rows: int
    shape: tuple[int, ...] = ()
    marked: bool = False
    what: str = ""


def disagreement(entries: Sequence[Entry]) -> RowsDisagreeError:
    """Return the error for values with different numbers of rows; it shows three, and advises by their layout."""
    different = {each.rows: each for each in reversed(entries)}  # the first of each size
    chosen = sorted(different.values(), key=entries.index)[:_SHOWN]
    shown = [*chosen, *(each for each in entries if each not in chosen)][:_SHOWN]
    listed = ", ".join(_words(each) for each in sorted(shown, key=entries.index))
    more = f" and {len(entries) - len(shown)} more" if len(entries) > len(shown) else ""
    advice = "; ".join([*_advice(entries, list(different)), _OTHERWISE])
    return RowsDisagreeError(f"the tensors of one batch have different numbers of rows: {listed}{more}; {advice}")


def samples_in_a_list(
    path: str, entries: int, what: str, *, inner: Sequence[Entry] = (), rows: int | None = None
) -> BatchError:
    """Return the error for a list that could be the samples; ``rows`` are those of the rest of the batch."""
    kind, about = BatchError, f"{path} is a list of {what}"
    first = f" with {inner[0].rows} rows each" if len({each.rows for each in inner}) == 1 else ""
    if rows is not None and rows != entries:
        kind, about = RowsDisagreeError, f"{about}, and the rest of the batch has {rows} rows"
    readings = f"they could be {entries} samples, or {entries} different things"
    if entries == 1:
        readings = "it could be one sample, or one value"
    return kind(
        f"{about}: {readings}{first}. If they are samples, collate "
        f"them into one tensor (collate_fn of the DataLoader, torch.stack), or wrap the list in mb.Rows([...]) to get "
        "a list of samples in every microbatch. If they are different things, give them names: pass a dict or a named "
        "tuple"
    )


def out_of_reach(value: object, path: str, end: str) -> BatchError:
    """Return the error for tensors that a container holds in an attribute ``end``, beside its items."""
    return BatchError(
        f"{path}{end} holds tensors or arrays, and is no field or item of {kind_of(value)}, so it would not be cut. "
        f"Make it a field or an item, or pass a dict. Or wrap {path} in mb.Whole(...) if it has no rows"
    )


def unknown_object(value: object, path: str) -> BatchError:
    """Return the error for an object that holds tensors in a way that is not known."""
    return BatchError(
        f"{path} is {kind_of(value)}, which holds tensors or arrays, and it is not known which of them have rows. Wrap "
        "it in mb.Whole(...) if every microbatch needs all of it, or pass its tensors in a dict. Or let the loader "
        "make microbatches, and use accumulator.windows(loader, microbatches=...), which does not cut them"
    )


def read_once(value: object, path: str) -> BatchError:
    """Return the error for a generator or another iterator, which the first microbatch would use up."""
    return BatchError(
        f"{path} is {kind_of(value)}, which can be read only once, so the first microbatch would use it up: pass "
        "mb.Rows(list(...)) of it if it has one item per row, or a list in mb.Whole(...)"
    )


def _words(entry: Entry) -> str:
    if entry.what:
        return f"{entry.path} has {entry.rows} (a {entry.what})"
    shape = f" (shape {entry.shape})" if len(entry.shape) > 1 else ""
    return f"{entry.path} has {entry.rows}{shape}"


def _advice(entries: Sequence[Entry], sizes: Sequence[int]) -> list[str]:
    """Find layouts in which the rows would agree."""
    found: list[str] = []
    plain = [each for each in entries if not each.marked and not each.what]
    start = entries[0].path.removesuffix("[0]")
    alike = len({len(each.shape) for each in entries}) == 1
    if start != entries[0].path and alike and all(each.path == f"{start}[{n}]" for n, each in enumerate(entries)):
        found.append(
            f"if the entries of {start} are samples, pad them and collate them into one tensor (collate_fn of the "
            "DataLoader)"
        )
    for rows in sizes:
        others = [each for each in plain if each.rows != rows]
        if others and all(len(each.shape) > 1 and each.shape[1] == rows for each in others) and rows > 1:
            found.append(
                f"{others[0].path} has {rows} in dimension 1: if these are its rows, mark it with mb.Rows(value, dim=1)"
            )
    small, *rest = sorted(sizes)
    if len(rest) == 1 and small > 1 and rest[0] % small == 0 and not found:
        many = next(each for each in entries if each.rows == rest[0])
        group = rest[0] // small
        found.append(
            f"if every {group} consecutive entries of {many.path} are one row, mark it with mb.Rows(value, "
            f"group={group})"
        )
    return found
