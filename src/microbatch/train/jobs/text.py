"""Text to learn from: the standard library's own sources, or files of the user's, cut into documents."""

from __future__ import annotations

import ast
import hashlib
import io
import json
import re
import sysconfig
import textwrap
import tokenize
import warnings
from collections.abc import Iterator, Sequence
from pathlib import Path

from microbatch.errors import DataError

SUFFIXES = (".jsonl", ".md", ".py", ".txt")
"""Endings of the files that are read."""

NOT_LIBRARY = frozenset({
    "__pycache__", "dist-packages", "ensurepip", "idlelib", "lib2to3", "pydoc_data", "site-packages", "test", "tests",
    "turtledemo",
})  # fmt: skip
"""Folders of the standard library that hold tests, generated tables, demonstrations or other people's packages."""

JSON_LINE = 'every line must be an object such as {"text": "..."}'
"""What a line of a .jsonl file must be, for errors."""

SHORT_CLASS = 1_000
"""Characters up to which a class is one document; a longer one is read as its methods."""

SHORT_PASSAGE = 200
"""Characters below which a paragraph of prose is joined to the next one, so that headings are not documents."""


def find_files(data: Path | None) -> list[Path]:
    """List the text files of a job, in an order that depends on their names alone.

    Args:
        data: A file or a folder (searched through, hidden names left out); `None` for the sources of Python's own
            standard library.

    Returns:
        Files that end in one of `SUFFIXES`, at least one, sorted by their path below ``data``.

    Raises:
        DataError: ``data`` does not exist, has an ending that is not read, or holds no such file; or this Python
            comes without its sources.
    """
    if data is None:
        return _library_files(Path(sysconfig.get_path("stdlib")))
    if not data.exists():
        raise DataError(f"there is no file or folder {data}; pass a {_endings()} file, or a folder of them")
    if data.is_file():
        if data.suffix.lower() not in SUFFIXES:
            raise DataError(f"{data} ends in {data.suffix!r}, which is not read; pass a {_endings()} file")
        return [data]
    files = [path for path in data.rglob("*") if path.suffix.lower() in SUFFIXES and path.is_file()]
    files = _sorted_below(data, [path for path in files if not _hidden(path.relative_to(data))])
    if not files:
        raise DataError(f"the folder {data} holds no {_endings()} file; pass one that does")
    return files


def fingerprint(files: Sequence[Path]) -> str:
    """Hash what `read_documents` would read, without cutting it.

    Args:
        files: Files in reading order.

    Returns:
        SHA-256 of the files' endings, sizes and bytes, in hexadecimal.

    Raises:
        DataError: A file cannot be opened.

    Cost:
        Reads every byte once; 10 MB take about 0.1 s.
    """
    digest = hashlib.sha256()
    for path in files:
        content = _read_bytes(path)
        digest.update(f"{path.suffix.lower()} {len(content)}\n".encode())
        digest.update(content)
    return digest.hexdigest()


def read_documents(files: Sequence[Path]) -> list[str]:
    """Cut files into documents: functions and classes, passages of prose, lines of JSON.

    Duplicates are left out, so that no document is both learnt from and held out.

    Args:
        files: Files in reading order, see `find_files`.

    Returns:
        Documents of very different lengths, none blank, none twice, at least one, in reading order.

    Raises:
        DataError: A file cannot be decoded, a line of a ``.jsonl`` file is not an object with a string ``"text"``
            (file and line are named), or there is nothing but blanks.

    Cost:
        Parses Python sources: about half a second per megabyte.
    """
    documents = dict.fromkeys(document for path in files for document in _cut_file(path))
    documents.pop("", None)
    if not documents:
        raise DataError(f"{files[0]} and {len(files) - 1} other files hold nothing but blanks; pass files with text")
    return list(documents)


def code_documents(source: str) -> Iterator[str]:
    r"""Yield the functions and the short classes of a Python module, each moved to the left margin.

    A class of more than `SHORT_CLASS` characters is read as its methods and inner classes. A module without any is
    one document.

    Args:
        source: Text of the module, lines ending in a newline character.

    Yields:
        One document at a time, in the order of the module, trailing blanks removed.

    Raises:
        SyntaxError: The source is not of this version of Python.

    Example:
        >>> list(code_documents("import os\n\ndef f():\n    pass\n\nclass A:\n    x = 1\n"))
        ['def f():\n    pass', 'class A:\n    x = 1']
    """
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # a stray "\d" in someone's file is not the reader's business
        module = ast.parse(source)
    lines = source.split("\n")
    documents = list(_members(module, lines))
    yield from documents or [source.strip()]


def prose_documents(text: str) -> Iterator[str]:
    r"""Yield the passages of a text: paragraphs, short ones joined to what follows them.

    Args:
        text: Prose whose paragraphs are separated by blank lines.

    Yields:
        One passage at a time; all but the last have at least `SHORT_PASSAGE` characters.

    Example:
        >>> list(prose_documents("Title\n\n" + "a" * 300 + "\n\nThe end.\n"))[1]
        'The end.'
    """
    waiting = ""
    for paragraph in re.split(r"\n\s*\n", text):
        waiting = f"{waiting}\n\n{paragraph.rstrip()}".strip("\n")
        if len(waiting) >= SHORT_PASSAGE:
            yield waiting
            waiting = ""
    if waiting.strip():
        yield waiting


def _members(parent: ast.Module | ast.ClassDef, lines: Sequence[str]) -> Iterator[str]:
    """Yield the documents directly below a module or a long class."""
    for node in parent.body:
        if not isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef)):
            continue
        first = min([node.lineno, *(decorator.lineno for decorator in node.decorator_list)])
        document = textwrap.dedent("\n".join(lines[first - 1 : node.end_lineno])).rstrip()
        if isinstance(node, ast.ClassDef) and len(document) > SHORT_CLASS:
            yield from _members(node, lines)
        else:
            yield document


def _cut_file(path: Path) -> Iterator[str]:
    """Yield the documents of one file, by its ending."""
    suffix = path.suffix.lower()
    text = read_text(path)
    if suffix == ".jsonl":
        yield from _json_documents(text, path=path)
    elif suffix == ".py":
        try:
            yield from code_documents(text)
        except (SyntaxError, ValueError):  # a template, or Python 2: still text
            yield from prose_documents(text)
    else:
        yield from prose_documents(text)


def _json_documents(text: str, *, path: Path) -> Iterator[str]:
    """Yield the field "text" of every line."""
    for number, line in enumerate(text.split("\n"), start=1):
        if not line.strip():
            continue
        where = f"{path}, line {number}"
        try:
            record = json.loads(line)
        except ValueError as error:
            raise DataError(f"{where} is not JSON ({error}); {JSON_LINE}") from error
        found = record.get("text") if isinstance(record, dict) else None
        if not isinstance(found, str):
            raise DataError(f'{where} has no string under "text"; {JSON_LINE}')
        yield found.strip()


def read_text(path: Path) -> str:
    """Decode a file: as Python declares it, or as UTF-8.

    Args:
        path: Where it is.

    Returns:
        Its text, lines ending in a newline character.

    Raises:
        DataError: It cannot be opened or decoded.
    """
    content = _read_bytes(path)
    encoding = "utf-8-sig"
    try:
        if path.suffix.lower() == ".py":
            encoding, _ = tokenize.detect_encoding(io.BytesIO(content).readline)
        text = content.decode(encoding)
    except (UnicodeDecodeError, SyntaxError) as error:
        raise DataError(f"{path} is not {encoding} text ({error}); convert it to UTF-8, or leave it out") from error
    return text.replace("\r\n", "\n").replace("\r", "\n")


def _read_bytes(path: Path) -> bytes:
    """Read a file whole."""
    try:
        return path.read_bytes()
    except OSError as error:
        raise DataError(f"{path} cannot be read ({error.strerror}); check its permissions, or leave it out") from error


def _library_files(root: Path) -> list[Path]:
    """List the modules of the standard library."""
    inside = [path for path in root.rglob("*.py") if NOT_LIBRARY.isdisjoint(path.relative_to(root).parts)]
    if not inside:
        raise DataError(f"this Python has no sources in {root}; pass text of your own with --data")
    return _sorted_below(root, inside)


def _sorted_below(root: Path, files: Sequence[Path]) -> list[Path]:
    """Sort by the path below ``root``, spelled the same on every system."""
    return sorted(files, key=lambda path: path.relative_to(root).as_posix())


def _hidden(path: Path) -> bool:
    """Tell whether a name on the way begins with a dot, or is a folder of compiled Python."""
    return any(part.startswith(".") or part == "__pycache__" for part in path.parts)


def _endings() -> str:
    """Name the endings in a sentence."""
    return f"{', '.join(SUFFIXES[:-1])} or {SUFFIXES[-1]}"
