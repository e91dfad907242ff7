"""Run the command line. A command imports PyTorch only when it runs, so that ``--help`` answers at once."""

from __future__ import annotations

from importlib.metadata import PackageNotFoundError, version
from typing import Annotated

import typer

from microbatch.cli.check_options import check
from microbatch.cli.guide_options import guide
from microbatch.cli.plan_options import plan
from microbatch.cli.train_options import train

app = typer.Typer(
    name="microbatch",
    no_args_is_help=True,
    add_completion=False,
    # An error in the user's own code is printed as Python's traceback, and an error of ours as one message.
    pretty_exceptions_enable=False,
    help="Ask for the batch you want. It runs in the memory you have, and the gradient is the large batch's gradient.",
)


def main() -> None:
    """Run the command line."""
    app(prog_name="microbatch")


def _print_version(wanted: bool) -> None:
    if not wanted:
        return
    try:
        typer.echo(f"microbatch {version('microbatch')}")
    except PackageNotFoundError:
        typer.echo("microbatch (not installed)")
    raise typer.Exit


@app.callback()
def root(
    *,
    show_version: Annotated[
        bool,
        # Eager, with its own callback: Typer answers it before it asks for a command.
        typer.Option("--version", help="Print the version.", is_eager=True, callback=_print_version),
    ] = False,
) -> None:
    """Answer the options that come before any command.

    Args:
        show_version: Whether to print the version and exit.
    """


app.command(help="Train a job: its batch in microbatches, one exact optimizer step each.")(train)
app.command(help="Find the fastest microbatch size that fits: predicted and measured memory, measured time.")(plan)
app.command(help="Check that accumulating gives the large batch's gradient, and if not, find out why.")(check)
app.command(help="Open the guide: an explanation, a playground that really trains, and the live view of runs.")(guide)
