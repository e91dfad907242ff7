"""Pairs that belong together: what a function is said to do, and the function; or pairs of the user's."""

from __future__ import annotations

import ast
import csv
import inspect
import io
import json
import re
import textwrap
import warnings
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from microbatch.errors import DataError
from microbatch.train.jobs.text import find_files, read_text

SUFFIXES = (".csv", ".jsonl", ".py")
"""Endings of the files that are read."""

FIELDS = ("anchor", "positive")
"""Names of the two texts of a pair, in the header of a .csv file and in the objects of a .jsonl file."""

_FEWEST_WORDS = 3
"""Of a docstring: one or two words, such as a name again, say nothing about a function."""

_Function = ast.FunctionDef | ast.AsyncFunctionDef


@dataclass(frozen=True, slots=True)
class Pair:
    """Two texts that belong together.

    Attributes:
        anchor: What is looked for by, such as a description.
        positive: What is to be found, such as a function.
    """

    anchor: str
    positive: str


def read_pairs(data: Path | None) -> list[Pair]:
    """Read pairs of texts.

    A text that occurs in several pairs belongs to more than one other, so none of these pairs can be told right from
    wrong: they are left out.

    Args:
        data: A ``.jsonl`` file of objects with the fields ``"anchor"`` and ``"positive"``, a ``.csv`` file with these
            columns, a ``.py`` file whose functions have docstrings, or a folder of Python files; `None` for the sources
            of Python's own standard library.

    Returns:
        At least two pairs, no text twice, in reading order.

    Raises:
        DataError: There is no such file, it cannot be read as pairs (file and line are named), or there are too few.

    Cost:
        Parses Python sources: about half a second per megabyte.
    """
    if data is not None and data.is_file():
        read = {".csv": _csv_pairs, ".jsonl": _json_pairs, ".py": _python_pairs}.get(data.suffix.lower())
        if read is None:
            raise DataError(
                f"{data} ends in {data.suffix!r}; pairs are read from {', '.join(SUFFIXES)}, or a folder of .py files"
            )
        found = list(read(data))
    else:
        found = [pair for path in find_files(data) if path.suffix == ".py" for pair in _python_pairs(path)]
    pairs = list(_unmistakable(found))
    if len(pairs) < 2:
        raise DataError(
            f"{data or 'the standard library'} holds {len(pairs)} pairs of texts that occur once; pass at least 2"
        )
    return pairs


def described_functions(source: str) -> Iterator[Pair]:
    r"""Yield what the functions of a Python module are said to do, and their code without that.

    Args:
        source: Text of the module, lines ending in a newline character.

    Yields:
        The first paragraph of each docstring of at least three words, in one line, and the function moved to the left
        margin, docstring and decorators left out.

    Raises:
        SyntaxError: The source is not of this version of Python.

    Example:
        >>> text = "class A:\n    def size(self):\n        'Count what is in it.'\n        return 3\n"
        >>> list(described_functions(text))
        [Pair(anchor='Count what is in it.', positive='def size(self):\n    return 3')]
    """
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # a stray "\d" in someone's file is not the reader's business
        module = ast.parse(source)
    lines = source.split("\n")
    for node in ast.walk(module):
        if isinstance(node, _Function) and (said := ast.get_docstring(node)):
            anchor = " ".join(re.split(r"\n\s*\n", inspect.cleandoc(said))[0].split())
            code = _without_docstring(node, lines)
            if len(anchor.split()) >= _FEWEST_WORDS and code is not None:
                yield Pair(anchor, code)


def _without_docstring(node: _Function, lines: Sequence[str]) -> str | None:
    """Cut a function out of its module; `None` where nothing but a docstring is in it, or both share a line."""
    docstring = node.body[0]
    if len(node.body) < 2 or docstring.lineno == node.lineno or node.body[1].lineno <= (docstring.end_lineno or 0):
        return None
    kept = [*lines[node.lineno - 1 : docstring.lineno - 1], *lines[docstring.end_lineno : node.end_lineno]]
    return textwrap.dedent("\n".join(line for line in kept if line.strip())).rstrip()


def _unmistakable(pairs: Iterable[Pair]) -> Iterator[Pair]:
    """Leave out every pair of which a text occurs in another pair too."""
    found = list(dict.fromkeys(pairs))
    anchors, positives = Counter(pair.anchor for pair in found), Counter(pair.positive for pair in found)
    return (pair for pair in found if anchors[pair.anchor] == positives[pair.positive] == 1)


def _python_pairs(path: Path) -> Iterator[Pair]:
    try:
        yield from described_functions(read_text(path))
    except (SyntaxError, ValueError):  # a template, or Python 2
        return


def _json_pairs(path: Path) -> Iterator[Pair]:
    for number, line in enumerate(read_text(path).split("\n"), start=1):
        if not line.strip():
            continue
        try:
            record = json.loads(line)
        except (ValueError, RecursionError) as error:
            raise DataError(f"{path}, line {number} is not JSON ({error}); {_wanted()}") from error
        yield _pair(record, where=f"{path}, line {number}")


def _csv_pairs(path: Path) -> Iterator[Pair]:
    reader = csv.DictReader(io.StringIO(read_text(path)), strict=True)
    try:
        for record in reader:
            yield _pair(record, where=f"{path}, line {reader.line_num}")
    except csv.Error as error:
        raise DataError(f"{path}, line {reader.line_num} is not CSV ({error}); {_wanted()}") from error


def _pair(record: Any, *, where: str) -> Pair:
    texts = [record.get(name) if isinstance(record, dict) else None for name in FIELDS]
    for name, text in zip(FIELDS, texts, strict=True):
        if not isinstance(text, str) or not text.strip():
            others = "" if not isinstance(record, dict) or name in record else _told_columns(record)
            raise DataError(f'{where} has no text under "{name}"{others}; {_wanted()}')
    return Pair(*(str(text).strip() for text in texts))


def _told_columns(record: dict[Any, Any]) -> str:
    names = [str(name) for name in record if name is not None]
    return f"; rename its columns, which are {', '.join(map(ascii, names[:6]))}" if names else ""


def _wanted() -> str:
    return 'every pair needs the texts "anchor" and "positive"'
