"""Read the options of ``microbatch doctor`` and start it."""

from __future__ import annotations

from typing import Annotated

import typer

from microbatch.cli.shared_options import option
from microbatch.train.run_settings import OUTPUT

RULES, CHANGES = "Which rules and files", "Changes to your code"


def doctor(
    paths: Annotated[
        list[str] | None,
        typer.Argument(
            metavar="PATH",
            help="Files, notebooks and folders; - for standard input. The current folder where none is given.",
            show_default=False,
        ),
    ] = None,
    *,
    output_format: Annotated[
        str,
        option("Form of the findings: text, json, jsonl, github or sarif.", OUTPUT, values="FORM", default="text"),
    ] = "text",
    show_window: Annotated[
        bool,
        option(
            "Draw the window too: which microbatches enter which step, and with which weight.",
            OUTPUT,
            names=("--show-window",),
        ),
    ] = False,
    explain: Annotated[
        str | None,
        option("Explain a rule, such as MB105; with paths, show what it finds there.", OUTPUT, values="CODE"),
    ] = None,
    select: Annotated[
        list[str] | None,
        option(
            "Rules that are reported, such as MB1,MB201: codes or their beginnings.",
            RULES,
            values="CODES",
            default="all",
        ),
    ] = None,
    ignore: Annotated[
        list[str] | None,
        option("Rules that are not.", RULES, values="CODES", default="none"),
    ] = None,
    exclude: Annotated[
        list[str] | None,
        option(
            "Names or paths that folders are read without, such as tests or old_*.py.",
            RULES,
            values="PATTERNS",
            default="none",
        ),
    ] = None,
    strict: Annotated[
        bool,
        option("End with 1 for faults that depend on something, too.", RULES, names=("--strict",)),
    ] = False,
    stdin_filename: Annotated[
        str | None,
        option("The name of what comes from standard input.", RULES, values="PATH"),
    ] = None,
    diff: Annotated[
        bool,
        option(
            "Print the changes that mend faults as a diff. Read it before you apply it.", CHANGES, names=("--diff",)
        ),
    ] = False,
    rewrite: Annotated[
        bool,
        option("Print each loop with mb.Accumulator as a diff: a sketch to read.", CHANGES, names=("--rewrite",)),
    ] = False,
) -> None:
    """Read gradient accumulation loops and find their faults, without running them.

    Raises:
        Exit: Always, with the exit code: 0 nothing heavy is certain, 1 something is, 2 bad or unreadable input.
    """
    from microbatch.cli.doctor_command import DoctorFlags, run_doctor

    flags = DoctorFlags(
        output_format=output_format,
        show_window=show_window,
        explain=explain,
        select=tuple(select or ()),
        ignore=tuple(ignore or ()),
        exclude=tuple(exclude or ()),
        strict=strict,
        stdin_filename=stdin_filename,
        diff=diff,
        rewrite=rewrite,
    )
    raise typer.Exit(run_doctor(paths or (), flags))
