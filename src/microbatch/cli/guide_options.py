"""Read the options of ``microbatch guide`` and open the guide."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from microbatch.cli.shared_options import number_or_word


def guide(
    runs: Annotated[
        list[Path] | None,
        typer.Argument(
            metavar="RUN",
            help="Run directories, or the folder of a sweep, in progress or finished.",
            show_default=False,
        ),
    ] = None,
    *,
    port: Annotated[
        str | None, typer.Option(metavar="N", help="Port on 127.0.0.1; 0 for any free port.", show_default=False)
    ] = None,
    no_browser: Annotated[bool, typer.Option("--no-browser", metavar="", help="Only print the address.")] = False,
    export: Annotated[
        Path | None,
        typer.Option(metavar="FOLDER", help="Write a copy for any web server, with recorded runs, and exit."),
    ] = None,
) -> None:
    """Open the guide.

    Raises:
        Exit: Always, with the exit code: 0 ended as asked, 2 bad input.
    """
    from microbatch.cli.guide_command import run_guide

    raise typer.Exit(run_guide(runs or (), port=number_or_word(port, int), browser=not no_browser, export=export))
