"""Make the options that several commands share; those of settings are made from the settings themselves."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Annotated, Any

import typer

from microbatch.cli.waiting import Waiting
from microbatch.train.run_settings import FILES, OUTPUT, described, kind_of_flag

ConfigFile = Annotated[
    Path | None,
    typer.Option(metavar="FILE.toml", help="Settings file; flags have priority.", rich_help_panel=FILES),
]
NoColor = Annotated[bool, typer.Option("--no-color", metavar="", help="No colours.", rich_help_panel=OUTPUT)]
JsonObject = Annotated[bool, typer.Option("--json", metavar="", help="Print one JSON object.", rich_help_panel=OUTPUT)]
JobName = Annotated[
    str | None,
    typer.Argument(
        metavar="JOB",
        help="language (the default), images, images-batchnorm, pairs, or path/to/file.py:function that returns "
        "an mb.Job.",
        show_default=False,
    ),
]


def option(help: str, group: str, *, values: str = "", default: str = "", names: tuple[str, ...] = ()) -> Any:  # noqa: A002 - as Typer calls it
    """Make an option whose default stands in its help, in words.

    Args:
        help: What it is for, in one sentence.
        group: Panel of ``--help`` that lists it.
        values: What is written behind it; empty for a switch.
        default: What holds without it, in words; empty where that needs no words.
        names: Its names; empty for the name of the parameter.

    Returns:
        The option, for `typing.Annotated`.
    """
    text = f"{help} Default: {default}." if default else help
    return typer.Option(*names, metavar=values, help=text, rich_help_panel=group, show_default=False)


def with_settings(*keys: str, **changed: Mapping[str, str]) -> Callable[[Callable[..., None]], Callable[..., None]]:
    """Give a command the flags of settings.

    Args:
        keys: Keys of `Settings`, in the order of ``--help``.
        changed: By key, fields of its `Flag` that are different for this command.

    Returns:
        A decorator for a function whose first parameter is ``flags``: a dict of the settings, `None` for those that
        were not given. Numbers are numbers; a wrong word is refused later, with the settings of a file and in the same
        words.
    """

    def decorate(command: Callable[..., None]) -> Callable[..., None]:
        def run(**given: Any) -> None:
            flags = {key: _read(given.pop(key), kind_of_flag(key)) for key in keys}
            command(flags, **given)

        made: list[inspect.Parameter] = []
        for key in keys:
            flag, switch = replace(described(key), **changed.get(key, {})), kind_of_flag(key) is bool
            told = option(
                flag.help, flag.group, values=flag.values or "", default=flag.default or "", names=(str(flag.name),)
            )
            made.append(
                _parameter(key, Annotated[bool if switch else str | None, told], default=False if switch else None)
            )
        job, *rest = [
            each for name, each in inspect.signature(command, eval_str=True).parameters.items() if name != "flags"
        ]
        run.__signature__ = inspect.Signature([job, *made, *rest])
        run.__name__, run.__doc__ = command.__name__, command.__doc__
        run.__annotations__ = {each.name: each.annotation for each in (job, *made, *rest)}
        return run

    return decorate


def _parameter(name: str, annotation: Any, *, default: bool | None) -> inspect.Parameter:
    return inspect.Parameter(name, inspect.Parameter.KEYWORD_ONLY, annotation=annotation, default=default)


def _read(given: str | bool | None, kind: type) -> Any:
    """Convert what was given; a switch that was not is `None`, so that a file decides."""
    if isinstance(given, bool):
        return given or None
    return number_or_word(given, kind)


def waiting(*, as_json: bool, color: bool) -> Waiting:
    """Make the line that a terminal shows from the first moment: importing PyTorch takes longer than people wait.

    Args:
        as_json: Whether standard output is for programs.
        color: Whether colours may be used.

    Returns:
        The line.
    """
    line = Waiting(as_json=as_json, color=color)
    line("loading PyTorch")
    return line


def number_or_word(text: str | None, kind: Callable[[str], Any]) -> Any:
    """Convert an option to a number, and return it unchanged where it is a word.

    A wrong word is refused later, with the other settings.

    Args:
        text: The option as it was given; `None` where it was not.
        kind: ``int``, ``float`` or ``str``.

    Returns:
        The number, the word, or `None`.
    """
    if text is None:
        return None
    try:
        return kind(text)
    except ValueError:
        return text
