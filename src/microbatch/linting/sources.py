"""Read what the doctor judges: Python files in any encoding, notebooks, text. What cannot be read becomes a finding."""

from __future__ import annotations

import ast
import io
import re
import sys
import tokenize
import warnings
from bisect import bisect_right
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path

from microbatch.linting.finding import Finding
from microbatch.linting.notebooks import Cell, NotebookError, join_cells

__all__ = ["Source", "read_bytes", "read_file", "read_text", "source_of", "unreadable"]

LARGEST = 5_000_000
"""Bytes of a file that is still read; no training script is larger."""
LARGEST_NOTEBOOK = 100_000_000
"""Likewise of a notebook, which holds its pictures too."""
# A loop that adds gradients up runs a backward; if that stands in another file, it speaks of accumulation and steps.
_ADDS = re.compile(
    r"grad\w*_accum|accum\w*_(step|iter|grad)|grad_acc|update_freq|micro_?batch|loss_scaler\(|\.accumulate\("
    r"|train_batch|training_step"
)
_BACKWARD = re.compile(r"backward\s*\(|loss_scaler\(|training_step")
_STEPS = re.compile(r"zero_grad|optimizer|\.step\(\)|training_step|train_batch")
_NO_SOURCE = re.compile("[\0\ud800-\udfff]")  # a null, and halves of surrogate pairs
_VERSION = ".".join(map(str, sys.version_info[:2]))
_SUFFIXES = (".py", ".pyi", ".pyw", ".ipynb")


@dataclass(frozen=True)
class Source:
    """The text of one file, as the doctor reads it.

    Lines are counted in the text. Those of a notebook are the lines of its code cells, one cell after the other;
    `place` turns them into a cell and a line of that cell.

    Attributes:
        path: The name that findings show, with forward slashes.
        text: The source, with line ends of one character. IPython's own commands are replaced by `pass`.
        cells: The code cells of a notebook; empty for a script.
        newline: What ends a line in the file itself.
    """

    path: str
    text: str
    cells: tuple[Cell, ...] = ()
    newline: str = "\n"

    @cached_property
    def lines(self) -> list[str]:
        """The lines without their ends; the line n of the text is `lines[n - 1]`."""
        return self.text.split("\n")

    @cached_property
    def tree(self) -> ast.Module | Finding:
        """The syntax tree without the cells of `left_out`, or the finding MB000 where the text is not Python."""
        found = self._whole
        if isinstance(found, ast.Module) or not self.left_out or len(self.left_out) == len(self.cells):
            return found
        lines, bad = list(self.lines), {each.cell for each in self.left_out}
        for cell in self.cells:
            if cell.number in bad:
                lines[cell.first - 1 : cell.end] = [""] * (cell.end - cell.first + 1)
        return _parse(replace(self, text="\n".join(lines)))

    @cached_property
    def _whole(self) -> ast.Module | Finding:
        return _parse(self)

    @cached_property
    def left_out(self) -> list[Finding]:
        """The findings MB000 of a notebook's cells that are not Python: the others are read without them."""
        if not self.cells or isinstance(self._whole, ast.Module):
            return []
        each = (
            _parse(replace(self, text="\n" * (cell.first - 1) + "\n".join(self.lines[cell.first - 1 : cell.end])))
            for cell in self.cells
        )
        left = [found for found in each if isinstance(found, Finding)]
        if len(left) == len(self.cells):
            return left
        return [replace(found, message=f"{found.message}; the other cells are read without this one") for found in left]

    @cached_property
    def can_accumulate(self) -> bool:
        """Whether the text has any word of a loop that adds gradients up. Most files of a project do not."""
        if _BACKWARD.search(self.text):
            return True
        return _ADDS.search(self.text) is not None and _STEPS.search(self.text) is not None

    def place(self, line: int) -> tuple[int | None, int]:
        """Return the cell, `None` for a script, and the line in it, of a line of the text."""
        if not self.cells:
            return None, line
        cell = self.cells[max(bisect_right([each.first for each in self.cells], line) - 1, 0)]
        return cell.number, max(line - cell.first + 1, 1)

    def line_of(self, cell: int | None, line: int) -> int:
        """Return the line of the text that is a line of a cell: the inverse of `place`."""
        if cell is None or not self.cells:
            return line
        return line + self.cells[min(max(cell, 1), len(self.cells)) - 1].first - 1

    def column(self, line: int, offset: int) -> int:
        """Return the 1-based column, in characters, of an offset in bytes, as syntax trees have it."""
        if not 1 <= line <= len(self.lines):
            return offset + 1
        return len(self.lines[line - 1].encode("utf-8", "surrogatepass")[:offset].decode("utf-8", "replace")) + 1


def unreadable(path: str, reason: str, *, line: int = 1, column: int = 1, cell: int | None = None) -> Finding:
    """Make the finding MB000.

    Args:
        path: The file.
        reason: Why it cannot be read, and what to do.
        line: Where, from 1.
        column: Likewise.
        cell: The code cell of a notebook.

    Returns:
        The finding.
    """
    message = f"cannot be read: {reason}"
    return Finding(
        rule="MB000", path=path, line=max(line, 1), column=max(column, 1), confidence="note", message=message, cell=cell
    )


def source_of(source_or_path: str | Path, *, path: str = "<source>") -> Source | Finding:
    """Read a file, or take text as it is.

    A text is a path where it is one line that names a file: it ends in `.py` or `.ipynb`, or there is such a file.

    Args:
        source_or_path: Source text, or the path of a file.
        path: The name that findings show for text.

    Returns:
        The source, or the finding MB000.
    """
    if isinstance(source_or_path, Path):
        return read_file(source_or_path)
    if "\n" not in source_or_path and "\0" not in source_or_path and source_or_path.strip():
        file = Path(source_or_path)
        try:
            is_file = file.suffix in _SUFFIXES or file.exists()
        except (OSError, ValueError):  # too long for a name, or no name that the system can encode
            is_file = False
        if is_file:
            return read_file(file)
    return read_text(source_or_path, path=path)


def read_file(file: Path, *, path: str | None = None) -> Source | Finding:
    """Read a script or a notebook.

    Args:
        file: The file.
        path: The name that findings show; the file's own where it is `None`.

    Returns:
        The source, or the finding MB000.
    """
    path = file.as_posix() if path is None else path
    largest = LARGEST_NOTEBOOK if file.suffix == ".ipynb" else LARGEST
    try:
        if file.is_dir():
            return unreadable(path, "it is a folder")
        if file.exists() and not file.is_file():
            return unreadable(path, "it is no regular file; give its text on standard input: microbatch doctor -")
        with file.open("rb") as opened:
            data = opened.read(largest + 1)
    except (OSError, ValueError) as error:
        reason = (error.strerror if isinstance(error, OSError) else None) or str(error)
        return unreadable(path, reason[:1].lower() + reason[1:])
    if len(data) > largest:
        return unreadable(path, f"it is larger than {largest // 1_000_000} MB, and no training script is")
    return read_bytes(data, path=path)


def read_bytes(data: bytes, *, path: str) -> Source | Finding:
    """Decode what a file holds, in the encoding that it declares (PEP 263), and split a notebook into its cells.

    Args:
        data: The bytes.
        path: The name that findings show; a notebook's ends in `.ipynb`.

    Returns:
        The source, or the finding MB000.
    """
    encoding = "utf-8-sig"
    try:
        if not path.endswith(".ipynb"):
            encoding, _ = tokenize.detect_encoding(io.BytesIO(data).readline)
        text = data.decode(encoding)
    except UnicodeDecodeError as error:
        line = data.count(b"\n", 0, error.start) + 1
        name = encoding.removesuffix("-sig")
        reason = f"the byte 0x{data[error.start]:02x} is not {name}; save the file as UTF-8"
        return unreadable(path, reason, line=line)
    except (SyntaxError, LookupError, UnicodeError, ValueError) as error:
        return unreadable(path, f"{error}; save the file as UTF-8")
    return read_text(text, path=path)


def read_text(text: str, *, path: str = "<source>") -> Source | Finding:
    """Take source text.

    Args:
        text: The text of a script, or of a notebook's file.
        path: The name that findings show; a notebook's ends in `.ipynb`.

    Returns:
        The source, or the finding MB000.
    """
    newline = "\r\n" if 2 * text.count("\r\n") > text.count("\n") else "\n"
    text = text.removeprefix("\ufeff").replace("\r\n", "\n").replace("\r", "\n")
    cells: tuple[Cell, ...] = ()
    if path.endswith(".ipynb"):
        try:
            text, cells = join_cells(text)
        except NotebookError as error:
            return unreadable(path, str(error), line=error.line, column=error.column)
        newline = "\n"
    if len(text) > LARGEST:
        return unreadable(path, f"it is larger than {LARGEST // 1_000_000} MB, and no training script is")
    return Source(path, text, cells, newline)


def _parse(source: Source) -> ast.Module | Finding:
    line, column = 1, 1
    bad = _NO_SOURCE.search(source.text)
    try:
        if bad is None:
            with warnings.catch_warnings():  # of escapes in strings: not what the doctor is asked about
                warnings.simplefilter("ignore")
                return ast.parse(source.text)
        line = source.text.count("\n", 0, bad.start()) + 1
        reason = f"it is not Python: it holds the character {bad.group()!r}"
    except SyntaxError as error:
        line, column, reason = error.lineno or 1, error.offset or 1, f"it is not Python {_VERSION}: {error.msg}"
    except (RecursionError, MemoryError):
        reason = "its expressions are nested too deeply"
    except ValueError as error:  # a number of too many digits
        reason = f"it is not Python: {error}"
    cell, line = source.place(line)
    return unreadable(source.path, reason, line=line, column=column, cell=cell)
