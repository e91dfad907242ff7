"""Judge one source: read its loops, leave out what comments silence, and turn lines into places of its cells."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import replace
from pathlib import Path

from microbatch.linting.find_files import find_files
from microbatch.linting.finding import Finding
from microbatch.linting.sources import Source, read_file, source_of, unreadable
from microbatch.linting.suppressions import has_comments, suppress

__all__ = ["Judge", "examine", "examine_path", "once_each"]

Judge = Callable[[Source, Path | None], list[Finding]]
"""Finds the faults of a source, in lines of its text. The folder is where its imports are looked up."""


def examine(
    source: Source | Finding, judge: Judge, *, folder: Path | None = None, walked: bool = False
) -> list[Finding]:
    """Find the faults of one source. This never raises: what cannot be judged is a finding.

    Of the files of a folder, those without any word of accumulation are not parsed, and nothing is said of those
    without a loop.

    Args:
        source: The source, or the finding that says why it cannot be read.
        judge: What reads the loops.
        folder: Where imports of the source's own project are looked up.
        walked: Whether the source is one of the files of a folder.

    Returns:
        The findings in the order of their lines; a source that cannot be parsed has one, MB000.
    """
    if isinstance(source, Finding):
        return [source]
    if walked and not source.can_accumulate and not has_comments(source):
        return []
    if isinstance(source.tree, Finding):
        return [source.tree]
    try:
        found = judge(source, folder) if source.can_accumulate else [_nothing(source)]
        elsewhere = [each for each in found if each.path != source.path]
        own = [each for each in found if each.path == source.path]
        own = [replace(each, line=source.line_of(each.cell, each.line), cell=None) for each in own]
        own = suppress(source, own)
    except (RecursionError, MemoryError):
        return [unreadable(source.path, "its expressions are nested too deeply")]
    except Exception as error:  # noqa: BLE001 - one file that the doctor fails on must not hide what it found in others
        return [unreadable(source.path, f"the doctor failed on it, which is a fault of its own: {error!r}")]
    placed = list(source.left_out)  # what is not read may hold the loop: it is said also where the rest is judged
    for each in sorted(own, key=lambda each: (each.line, each.column, each.rule)):
        if walked and each.rule == "MB001":
            continue
        cell, line = source.place(each.line)
        placed.append(replace(each, cell=cell, line=line))
    placed.sort(key=lambda each: each.cell or 0)
    return placed + _without_comments(elsewhere)


def once_each(findings: Iterable[Finding]) -> list[Finding]:
    """Return findings without repetition: a file that another one imports is judged with it, and by itself.

    Args:
        findings: Of several files.

    Returns:
        One for each rule and place: the certain one, where there are several.
    """
    best = dict[tuple[str, str, int | None, int, int], Finding]()
    for each in findings:
        key = (each.rule, each.path, each.cell, each.line, each.column)
        if key not in best or (each.confidence == "certain" and best[key].confidence != "certain"):
            best[key] = each
    return list(best.values())


def examine_path(source_or_path: str | Path, judge: Judge, *, folder: Path | None = None) -> list[Finding]:
    """Find the faults of a text, of a file, or of all files in a folder.

    Args:
        source_or_path: Source text, or a path; `source_of` says which.
        judge: What reads the loops.
        folder: Where imports are looked up; `None` for the folder that is given, or that of the file.

    Returns:
        The findings. That a file has no loop is not said of the files of a folder.
    """
    path = Path(source_or_path) if "\0" not in str(source_or_path) else None
    try:
        is_folder = path is not None and str(source_or_path) != "" and path.is_dir()
    except OSError:  # too long for a name
        is_folder = False
    if path is None or not is_folder:
        source = source_of(source_or_path)
        given = isinstance(source, Source) and source.path != "<source>"
        return examine(source, judge, folder=Path(source.path).parent if given and folder is None else folder)
    found = list[Finding]()
    for file in find_files([path]):
        source = file if isinstance(file, Finding) else read_file(file)
        found += examine(source, judge, folder=folder or path, walked=True)
    return once_each(found)


def _without_comments(findings: list[Finding]) -> list[Finding]:
    """Leave out the findings in imported files that comments there silence."""
    kept = list[Finding]()
    for path in dict.fromkeys(each.path for each in findings):
        here = [each for each in findings if each.path == path]
        source = read_file(Path(path), path=path)
        kept += [each for each in suppress(source, here) if each in here] if isinstance(source, Source) else here
    return kept


def _nothing(source: Source) -> Finding:
    message = "no loop was found in which gradients of several microbatches are added up"
    return Finding(rule="MB001", path=source.path, line=1, column=1, confidence="note", message=message)
