"""Run the command line. A command imports PyTorch only when it runs, so that ``--help`` answers at once."""

from __future__ import annotations

from typing import Annotated, Any, cast

import typer
from typer.core import TyperCommand, TyperGroup

from microbatch.cli.check_options import check
from microbatch.cli.doctor_options import doctor
from microbatch.cli.guide_options import guide
from microbatch.cli.lr_options import lr
from microbatch.cli.new_options import new
from microbatch.cli.plan_options import plan
from microbatch.cli.sweep_options import sweep
from microbatch.cli.train_options import train


class _BareHelp:
    """Show the option ``--help`` without a type beside it."""

    def get_help_option(self, ctx: Any) -> Any:
        """Return the option."""
        option = cast("Any", super()).get_help_option(ctx)
        if option is not None:
            option.metavar = ""
        return option


class _Command(_BareHelp, TyperCommand):
    """One command."""


class _Group(_BareHelp, TyperGroup):
    """All commands."""


app = typer.Typer(
    cls=_Group,
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
    from importlib.metadata import PackageNotFoundError, version  # it is slow

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
        typer.Option("--version", metavar="", help="Print the version.", is_eager=True, callback=_print_version),
    ] = False,
) -> None:
    """Answer the options that come before any command.

    Args:
        show_version: Whether to print the version and exit.
    """


app.command(cls=_Command, help="Train a job: its batch in microbatches, one exact optimizer step each.")(train)
app.command(
    cls=_Command, help="Find the fastest microbatch size that fits: predicted and measured memory, measured time."
)(plan)
app.command(cls=_Command, help="Find a learning rate: a few steps while it grows, and the loss at each rate.")(lr)
app.command(cls=_Command, help="Train a job at several effective batches: steps, samples and time to the same loss.")(
    sweep
)
app.command(cls=_Command, help="Check that accumulating gives the large batch's gradient, and if not, find out why.")(
    check
)
app.command(
    cls=_Command, help="Find what is wrong with a gradient accumulation loop, from its source, without running it."
)(doctor)
app.command(
    cls=_Command, help="Open the guide: an explanation, a playground that really trains, and the live view of runs."
)(guide)
app.command(cls=_Command, help="Write a job of your own, as a file that runs as it is.")(new)
