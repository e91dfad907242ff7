"""Tables of text: columns of equal width, and columns that are left out where a screen is narrow."""

from __future__ import annotations

from collections.abc import Sequence


def aligned(rows: Sequence[Sequence[str]]) -> str:
    """Align cells to the right in columns.

    Args:
        rows: Rows of equal length; at least one.

    Returns:
        A line for each row.

    Example:
        >>> print(aligned([["size", "fits"], ["128", "no"]]))
        size  fits
         128    no
    """
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    lines = ("  ".join(cell.rjust(width) for cell, width in zip(row, widths, strict=True)) for row in rows)
    return "\n".join(line.rstrip() for line in lines)


def fitting(rows: list[list[str]], spare: Sequence[str], width: int | None) -> list[list[str]]:
    """Leave out columns until the table is narrow enough.

    Args:
        rows: Rows of equal length; the first holds the columns' names.
        spare: Names of the columns that may be left out, in that order.
        width: Characters that a line may have; `None` for no limit.

    Returns:
        The rows with the columns that are left.
    """
    for name in spare:
        if width is None or max(map(len, aligned(rows).splitlines())) <= width:
            break
        column = rows[0].index(name)
        rows = [[*row[:column], *row[column + 1 :]] for row in rows]
    return rows
