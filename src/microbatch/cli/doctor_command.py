"""The command ``doctor``: what is wrong with a loop, read from its source. It needs the standard library alone."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, fields, replace
from importlib import import_module
from pathlib import Path
from typing import Any, TextIO

from microbatch.cli.files_left import with_files_left
from microbatch.cli.safe_stream import safe
from microbatch.errors import LintError, MicrobatchError
from microbatch.linting.edits import file_diff, fitting
from microbatch.linting.examine import Judge, examine, once_each
from microbatch.linting.find_files import find_files, shown
from microbatch.linting.finding import Finding
from microbatch.linting.formats.text_form import clean, place
from microbatch.linting.report import Report
from microbatch.linting.rules.table import RULES, rule_of
from microbatch.linting.settings import DoctorSettings, read_settings
from microbatch.linting.sources import LARGEST_NOTEBOOK, Source, read_bytes, read_file

BAD_INPUT = 2
FORMS = {
    "text": "text_form.text_form",
    "json": "json_form.json_form",
    "jsonl": "json_form.json_lines_form",
    "github": "github_form.github_form",
    "sarif": "sarif_form.sarif_form",
}
CHANGES_THE_SIZE = {"MB101", "MB102", "MB112"}
"""Rules whose mending multiplies the gradient by a number."""


@dataclass(frozen=True)
class DoctorFlags:
    """The flags of the command, as they were given.

    A field is a flag: `stdin_filename` is ``--stdin-filename``. One with a tuple may be given several times.
    """

    output_format: str = "text"
    show_window: bool = False
    explain: str | None = None
    select: tuple[str, ...] = ()
    ignore: tuple[str, ...] = ()
    exclude: tuple[str, ...] = ()
    strict: bool = False
    stdin_filename: str | None = None
    diff: bool = False
    rewrite: bool = False


def read_arguments(arguments: Sequence[str]) -> tuple[tuple[str, ...], DoctorFlags] | None:
    """Read a command line without Typer, whose import takes longer than judging a file.

    Args:
        arguments: What stands behind ``microbatch doctor``.

    Returns:
        The paths and the flags; `None` for a command line that Typer has to answer: help, or a mistake.
    """
    kinds = {f"--{each.name.replace('_', '-')}": (each.name, each.default) for each in fields(DoctorFlags)}
    paths, values, waiting = list[str](), dict[str, Any](), iter(arguments)
    for argument in waiting:
        if argument == "--":
            paths += waiting
            break
        if argument == "-" or not argument.startswith("-"):
            paths.append(argument)
            continue
        flag, has_value, value = argument.partition("=")
        if flag not in kinds:
            return None
        name, default = kinds[flag]
        if isinstance(default, bool):
            if has_value:
                return None
            values[name] = True
            continue
        text = value if has_value else next(waiting, None)
        if text is None:
            return None
        values[name] = (*values.get(name, ()), text) if isinstance(default, tuple) else text
    return tuple(paths), DoctorFlags(**values)


def run_doctor(paths: Sequence[str], flags: DoctorFlags) -> int:
    """Judge files, and write what was found to standard output; whatever else there is to say goes to standard error.

    Args:
        paths: Files, folders, and ``-`` for standard input.
        flags: The flags.

    Returns:
        The exit code: 0 nothing heavy is certain, 1 something is, 2 bad input, or a file that cannot be read.
    """
    out, errors = safe(sys.stdout), safe(sys.stderr)
    try:
        return _run(paths, flags, out=out, errors=errors)
    except MicrobatchError as error:
        errors.write(f"error: {clean(str(error))}\n")
        return BAD_INPUT
    finally:
        out.flush()
        errors.flush()


def _run(paths: Sequence[str], flags: DoctorFlags, *, out: TextIO, errors: TextIO) -> int:
    if flags.output_format not in FORMS:
        raise LintError(f"--output-format {flags.output_format!r} is not there; choose one of {', '.join(FORMS)}")
    if (flags.diff or flags.rewrite) and (flags.diff is flags.rewrite or flags.output_format != "text"):
        raise LintError("--diff and --rewrite each print a diff; use one of them, and no --output-format")
    if flags.explain is not None:
        if flags.output_format != "text" or flags.diff or flags.rewrite:
            raise LintError("--explain is text; leave out --output-format, --diff and --rewrite")
        rule = rule_of(flags.explain)
        out.write(import_module("microbatch.linting.formats.explain_form").explain_form(rule))
        if not paths:
            return 0
        out.write("\n")
        flags = replace(flags, select=(rule.code,), show_window=True)
    if not paths:
        paths = ["." if flags.stdin_filename is None else "-"]
    settings = read_settings(
        _start(paths), select=flags.select, ignore=flags.ignore, exclude=flags.exclude, strict=flags.strict
    )
    reads = _sources(paths, flags, settings, errors)
    if flags.rewrite:
        return _rewrite(reads, out=out, errors=errors)
    report = _report(reads, settings, alone=len(paths) == 1 and not Path(paths[0]).is_dir())
    report = replace(report, show_window=flags.show_window)
    if flags.diff:
        _diff(report, out=out, errors=errors)
    else:
        module, _, function = FORMS[flags.output_format].partition(".")
        lines = getattr(import_module(f"microbatch.linting.formats.{module}"), function)(report)
        out.write("".join(f"{line}\n" for line in lines))
    return report.exit_code(strict=settings.strict)


@dataclass(frozen=True)
class _Read:
    """A source, or why it cannot be read; the folder in which its imports are looked up; how it was found."""

    source: Source | Finding
    folder: Path
    walked: bool = False


def _sources(paths: Sequence[str], flags: DoctorFlags, settings: DoctorSettings, errors: TextIO) -> Iterator[_Read]:
    """Yield what is read of every path; a terminal sees how much is left."""
    here, named = Path.cwd(), {shown(Path(path)) for path in paths}
    files = [(given, file) for given in paths for file in _files(given, settings)]
    # A rewrite writes its reasons to the same stream, file by file.
    for given, file in files if flags.rewrite else with_files_left(files, errors):
        if given == "-":
            name = Path(flags.stdin_filename or "<stdin>")
            yield _Read(read_bytes(sys.stdin.buffer.read(LARGEST_NOTEBOOK), path=shown(name)), here)
            continue
        if isinstance(file, Finding):
            yield _Read(file, here)
        elif file == Path(given):
            near = here if here in file.absolute().parents else file.parent
            yield _Read(read_file(file, path=shown(file)), near)
        else:
            yield _Read(read_file(file, path=shown(file)), Path(given), walked=shown(file) not in named)


def _files(given: str, settings: DoctorSettings) -> Sequence[Path | Finding]:
    """List the files of one path; standard input is one, too."""
    if given == "-":
        return [Path(given)]
    return list(find_files([Path(given)], exclude=settings.exclude, base=settings.base))


def _report(reads: Iterator[_Read], settings: DoctorSettings, *, alone: bool) -> Report:
    """Judge every source, once each; that a file has no loop is said of a file that is given alone."""
    judge: Judge = import_module("microbatch.linting.doctor").judge
    findings, kept, seen = list[Finding](), dict[str, Source](), set[str]()
    for read in reads:
        source = read.source
        if source.path in seen:
            continue
        if isinstance(source, Source):
            seen.add(source.path)
        found = examine(source, judge, folder=read.folder, walked=read.walked)
        found = [each for each in found if settings.keeps(each.rule) and (alone or each.rule != "MB001")]
        findings += found
        if found and isinstance(source, Source):
            kept[source.path] = source
    findings = once_each(findings)
    for path in {finding.path for finding in findings if finding.rule != "MB000"} - set(kept):
        imported = read_file(Path(path), path=path)
        kept |= {path: imported} if isinstance(imported, Source) else {}
    return Report(findings, kept, RULES, len(seen))


def _diff(report: Report, *, out: TextIO, errors: TextIO) -> None:
    """Print the edits of all findings as one diff, and on standard error what is to be known about them."""
    mended, rest = list[Finding](), list[Finding]()
    for path, source in report.sources.items():
        here = [finding for finding in report.findings if finding.path == path]
        chosen = fitting(here)
        out.write(file_diff(source, [edit for finding in chosen for edit in finding.edits]))
        mended += chosen
        rest += [finding for finding in here if finding.edits and finding not in chosen]
    for finding in report.findings:
        if finding.rule == "MB000":
            errors.write(clean(f"{place(finding)}: {finding.rule} {finding.message}") + "\n")
    if mended:
        errors.write("These changes alter what is trained. Read each of them before you apply it.\n")
    if any(finding.rule in CHANGES_THE_SIZE for finding in mended):
        errors.write("A right division makes the gradient larger or smaller: with SGD, tune the learning rate again.\n")
    if rest:
        errors.write(f"left out, because they change the same lines: {len(rest)}; apply this diff and run it again\n")
    errors.write(f"mended here: {len(mended)}; found: {report.summary()}\n")


def _rewrite(reads: Iterator[_Read], *, out: TextIO, errors: TextIO) -> int:
    """Print each loop with `mb.Accumulator` as a diff; on standard error, why a loop has none."""
    sketch_of = import_module("microbatch.linting.rewrite").sketch

    def judge(source: Source, folder: Path | None) -> list[Finding]:  # noqa: ARG001 - as every judge
        sketch = sketch_of(source)
        sketches.extend([sketch.diff] if sketch.diff else [])
        errors.writelines(clean(f"{source.path}: not rewritten: {reason}") + "\n" for reason in sketch.reasons)
        return []

    sketches, code = list[str](), 0
    for read in reads:
        for problem in examine(read.source, judge, folder=read.folder, walked=read.walked):
            if problem.rule == "MB000":
                errors.write(clean(f"{place(problem)}: {problem.rule} {problem.message}") + "\n")
                code = BAD_INPUT
    out.write("".join(sketches))
    errors.write(f"rewritten: {len(sketches)}; each is a sketch to read, and has not been run\n")
    return code


def _start(paths: Sequence[str]) -> Path:
    """Return the folder from which the settings are looked for: the innermost one that holds all paths."""
    try:
        return Path(os.path.commonpath([Path.cwd() if path == "-" else Path(path).absolute() for path in paths]))
    except (OSError, ValueError):  # on several drives, or no name of a file
        return Path.cwd()
