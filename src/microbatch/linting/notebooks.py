"""Join the code cells of a notebook into one source, in which every line is one of a cell."""

from __future__ import annotations

import ast
import json
import re
import warnings
from dataclasses import dataclass
from typing import Any

__all__ = ["Cell", "NotebookError", "join_cells"]

_KEEP_BODY = frozenset({"time", "timeit", "capture", "prun", "memit", "mprun", "lprun", "debug", "skip"})
"""Commands for a whole cell whose other lines are Python all the same."""
_LINE_COMMAND = re.compile(r"(?P<indent>[ \t]*)(?:[%!?,;/].*|[^#'\"]*[\w)\]]\?{1,2}\s*)$")
_ASSIGNED = re.compile(r"(?P<target>[ \t]*[\w., ()\[\]'\"]+=[ \t]*)(?:!|%[A-Za-z]).*$")


@dataclass(frozen=True)
class Cell:
    """A code cell: its number, from 1, among the code cells, and the line of the joined source on which it begins.

    `written` is its own text, with IPython's commands.
    """

    number: int
    first: int
    written: str = ""

    @property
    def end(self) -> int:
        """Its last line in the joined source."""
        return self.first + self.written.count("\n")


class NotebookError(ValueError):
    """A file that should be a notebook is none. It becomes a finding and leaves the package never.

    Args:
        reason: What is wrong.
        line: Where, from 1.
        column: Likewise.
    """

    def __init__(self, reason: str, line: int = 1, column: int = 1) -> None:
        super().__init__(reason)
        self.line, self.column = line, column


def join_cells(text: str) -> tuple[str, tuple[Cell, ...]]:
    """Join the code cells of a notebook.

    Args:
        text: The notebook's file (nbformat 3 or 4).

    Returns:
        The source, and the cells. A notebook in another language has no cells.

    Raises:
        NotebookError: The text is not JSON, or not a notebook.
    """
    try:
        notebook = json.loads(text)
    except json.JSONDecodeError as error:
        raise NotebookError(f"it is not JSON: {error.msg}", error.lineno, error.colno) from None
    except (RecursionError, ValueError) as error:  # nested too deeply, or a number of more than 4300 digits
        raise NotebookError(f"it is not JSON that can be read: {error}") from None
    if not isinstance(notebook, dict):
        raise NotebookError("it is no notebook: its JSON is not an object")
    sources = _code(notebook) if _language(notebook) in {"python", "python3", "ipython", ""} else []
    cells, lines = list[Cell](), list[str]()
    for number, source in enumerate(sources, 1):
        cells.append(Cell(number, len(lines) + 1, source.replace("\r\n", "\n").replace("\r", "\n")))
        lines += as_python(source).split("\n")
    return "\n".join(lines), tuple(cells)


def as_python(source: str) -> str:
    """Replace IPython's own commands, such as `%matplotlib inline` and `!pip install`, so that the rest is Python.

    A cell that is Python is left as it is: a line of an expression may begin with `%`.

    Args:
        source: The text of a code cell.

    Returns:
        As many lines.
    """
    source = source.replace("\r\n", "\n").replace("\r", "\n")
    if _is_python(source):
        return source
    lines = source.split("\n")
    first = next((line for line in lines if line.strip()), "")
    command = re.match(r"%%(\w*)", first)
    if command:
        if command.group(1) not in _KEEP_BODY:
            return "\n".join("" for _ in lines)
        lines[lines.index(first)] = ""
        if _is_python("\n".join(lines)):
            return "\n".join(lines)
    continued = False
    for index, line in enumerate(lines):
        found, assigned = _LINE_COMMAND.match(line), _ASSIGNED.match(line)
        goes_on = line.endswith("\\")
        if continued:
            lines[index] = ""
        elif assigned:
            lines[index] = f"{assigned['target']}None"
        elif found:
            lines[index] = f"{found['indent']}pass"
        continued = goes_on and (continued or bool(found or assigned))
    return "\n".join(lines)


def _is_python(source: str) -> bool:
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            ast.parse(source)
    except SyntaxError:
        return False
    except (ValueError, RecursionError, MemoryError):  # said with its reason when the whole is parsed
        return True
    return True


def _language(notebook: dict[str, Any]) -> str:
    metadata = notebook.get("metadata")
    for place, key in (("kernelspec", "language"), ("language_info", "name")):
        inner = metadata.get(place) if isinstance(metadata, dict) else None
        if isinstance(inner, dict) and isinstance(inner.get(key), str):
            return inner[key].lower()
    return ""


def _code(notebook: dict[str, Any]) -> list[str]:
    cells = notebook.get("cells")
    if cells is None and isinstance(notebook.get("worksheets"), list):  # nbformat 3
        sheets = [sheet for sheet in notebook["worksheets"] if isinstance(sheet, dict)]
        cells = [cell for sheet in sheets for cell in sheet.get("cells") or ()]
    if not isinstance(cells, list):
        raise NotebookError("it is no notebook: it has no list of cells")
    sources = list[str]()
    for cell in cells:
        if isinstance(cell, dict) and cell.get("cell_type") == "code":
            source = cell.get("source", cell.get("input", ""))
            lines = source if isinstance(source, list) else [source]
            if not all(isinstance(line, str) for line in lines):
                raise NotebookError(f"it is no notebook: the source of code cell {len(sources) + 1} is not text")
            sources.append("".join(lines))
    return sources
