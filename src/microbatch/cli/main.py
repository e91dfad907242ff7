"""Run the command line. A command imports PyTorch only when it runs, so that ``--help`` answers at once."""

from __future__ import annotations

import shutil
from typing import Annotated, Any, cast

import typer
from typer.core import TyperArgument, TyperCommand, TyperGroup

from microbatch.cli.check_options import check
from microbatch.cli.doctor_options import doctor
from microbatch.cli.guide_options import guide
from microbatch.cli.lr_options import lr
from microbatch.cli.new_options import new
from microbatch.cli.plan_options import plan
from microbatch.cli.sweep_options import sweep
from microbatch.cli.train_options import train

_ROOM_FOR_PANELS = 80


def _without_type(**_: Any) -> None:
    pass


class _BareHelp:
    """Show switches and arguments without a type of Python's beside them."""

    def get_params(self, ctx: Any) -> Any:
        """Return the parameters of the command."""
        params = cast("Any", super()).get_params(ctx)
        for each in params:
            if isinstance(each, TyperArgument):
                cast("Any", each).display_type_rich = _without_type
            elif getattr(each, "is_flag", False):
                each.metavar = ""
        return params


class _Command(_BareHelp, TyperCommand):
    """One command."""


class _Group(_BareHelp, TyperGroup):
    """All commands."""


app = typer.Typer(
    cls=_Group,
    name="microbatch",
    no_args_is_help=True,
    # An error in the user's own code is printed as Python's traceback, and an error of ours as one message.
    pretty_exceptions_enable=False,
    # Panels of a narrow screen would cut the names of flags.
    rich_markup_mode="rich" if shutil.get_terminal_size().columns >= _ROOM_FOR_PANELS else None,
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
