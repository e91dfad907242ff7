"""Define the options that several commands share, and the panels that ``--help`` lists them in."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

BATCH, LENGTH, MACHINE, FILES, OUTPUT = "The batch", "How long", "The machine", "Files", "Output"
ELSEWHERE, COSTS = "Hardware that you do not have", "What it costs"

THE_JOBS = "the job's"
"""What holds where neither a flag nor a file says anything, and the job does."""

# Numbers are taken as texts and checked with the settings of a file, by one function and in the same words.
BatchSize = Annotated[
    str | None,
    typer.Option(metavar="N", help="Effective batch, in samples.", rich_help_panel=BATCH, show_default=THE_JOBS),
]
Memory = Annotated[
    str | None,
    typer.Option(
        metavar="BYTES",
        help='Memory limit of a step, such as "6 GiB"; none for all available memory.',
        rich_help_panel=BATCH,
        show_default=THE_JOBS,
    ),
]
Accumulation = Annotated[
    str | None,
    typer.Option(
        metavar="exact|plain",
        help="exact, or plain to compare: a contrastive loss within each microbatch only.",
        rich_help_panel=BATCH,
        show_default="exact",
    ),
]
DeviceName = Annotated[
    str | None,
    typer.Option(
        metavar="NAME",
        help="auto, cpu, cuda, cuda:1, mps, xpu, npu or hpu.",
        rich_help_panel=MACHINE,
        show_default="auto",
    ),
]
Autocast = Annotated[
    str | None,
    typer.Option(
        metavar="bf16|fp16|none", help="Precision of the forward pass.", rich_help_panel=MACHINE, show_default=THE_JOBS
    ),
]
Seed = Annotated[
    str | None,
    typer.Option(metavar="N", help="Seed of all random numbers.", rich_help_panel=MACHINE, show_default="0"),
]
DataPath = Annotated[
    str | None, typer.Option(metavar="PATH", help="Your own file or folder of data.", rich_help_panel=FILES)
]
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


def microbatch_size_option(default: str) -> Any:
    """Define ``--microbatch-size``, which has another default in each command.

    Args:
        default: What holds without the flag, as ``--help`` shows it.

    Returns:
        The option.
    """
    return typer.Option(
        metavar="N|auto",
        help="Samples that go through the model at once.",
        rich_help_panel=BATCH,
        show_default=default,
    )


def number_or_word(text: str | None, kind: type[int | float]) -> int | float | str | None:
    """Convert an option to a number, and return it unchanged where it is a word.

    A wrong word is refused later, with the other settings.

    Args:
        text: The option as it was given; `None` where it was not.
        kind: ``int`` or ``float``.

    Returns:
        The number, the word, or `None`.
    """
    if text is None:
        return None
    try:
        return kind(text)
    except ValueError:
        return text
