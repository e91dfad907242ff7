"""Read the options of ``microbatch doctor`` and start it."""

from __future__ import annotations

from typing import Annotated

import typer

from microbatch.cli.shared_options import OUTPUT

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
        typer.Option(
            metavar="text|json|jsonl|github|sarif",
            help="In which form standard output has the findings.",
            rich_help_panel=OUTPUT,
        ),
    ] = "text",
    show_window: Annotated[
        bool,
        typer.Option(
            "--show-window",
            metavar="",
            help="Draw the window too: which microbatches enter which step, and with which weight.",
            rich_help_panel=OUTPUT,
        ),
    ] = False,
    explain: Annotated[
        str | None,
        typer.Option(
            metavar="CODE",
            help="Explain a rule, such as MB105; with paths, show what it finds there.",
            rich_help_panel=OUTPUT,
            show_default=False,
        ),
    ] = None,
    select: Annotated[
        list[str] | None,
        typer.Option(
            metavar="CODES",
            help="Rules that are reported, such as MB1,MB201: codes or their beginnings.",
            rich_help_panel=RULES,
            show_default="all",
        ),
    ] = None,
    ignore: Annotated[
        list[str] | None,
        typer.Option(metavar="CODES", help="Rules that are not.", rich_help_panel=RULES, show_default="none"),
    ] = None,
    exclude: Annotated[
        list[str] | None,
        typer.Option(
            metavar="PATTERNS",
            help="Names or paths that folders are read without, such as tests or old_*.py.",
            rich_help_panel=RULES,
            show_default="none",
        ),
    ] = None,
    strict: Annotated[
        bool,
        typer.Option(
            "--strict",
            metavar="",
            help="End with 1 for faults that depend on something, too.",
            rich_help_panel=RULES,
        ),
    ] = False,
    stdin_filename: Annotated[
        str | None,
        typer.Option(
            metavar="PATH",
            help="The name of what comes from standard input.",
            rich_help_panel=RULES,
            show_default=False,
        ),
    ] = None,
    diff: Annotated[
        bool,
        typer.Option(
            "--diff",
            metavar="",
            help="Print the changes that mend faults as a diff. Read it before you apply it.",
            rich_help_panel=CHANGES,
        ),
    ] = False,
    rewrite: Annotated[
        bool,
        typer.Option(
            "--rewrite",
            metavar="",
            help="Print each loop with mb.Accumulator as a diff: a sketch to read.",
            rich_help_panel=CHANGES,
        ),
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
