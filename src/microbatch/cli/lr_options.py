"""Read the options of ``microbatch lr`` and start the learning-rate range test."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from microbatch.cli.shared_options import (
    OUTPUT,
    THE_JOBS,
    Autocast,
    BatchSize,
    ConfigFile,
    DataPath,
    DeviceName,
    JobName,
    JsonObject,
    Memory,
    NoColor,
    Seed,
    microbatch_size_option,
    number_or_word,
)

RANGE = "The range"


def lr(
    job: JobName = None,
    *,
    batch_size: BatchSize = None,
    microbatch_size: Annotated[str | None, microbatch_size_option(THE_JOBS)] = None,
    memory: Memory = None,
    low: Annotated[
        str | None,
        typer.Option(
            metavar="RATE",
            help="First learning rate.",
            rich_help_panel=RANGE,
            show_default="the optimizer's / 10,000, lower if needed",
        ),
    ] = None,
    high: Annotated[
        str | None,
        typer.Option(
            metavar="RATE",
            help="Last learning rate.",
            rich_help_panel=RANGE,
            show_default="the optimizer's x 10,000, higher if needed",
        ),
    ] = None,
    steps: Annotated[
        str | None,
        typer.Option(
            metavar="N",
            help="Steps of a run, from the first rate to the last.",
            rich_help_panel=RANGE,
            show_default="100",
        ),
    ] = None,
    seeds: Annotated[
        str | None,
        typer.Option(
            metavar="N", help="Runs, each with another order of the data.", rich_help_panel=RANGE, show_default="3"
        ),
    ] = None,
    device: DeviceName = None,
    autocast: Autocast = None,
    seed: Seed = None,
    data: DataPath = None,
    config: ConfigFile = None,
    plot: Annotated[
        Path | None,
        typer.Option(
            "--plot",
            "--output",
            metavar="FILE.svg|FILE.png",
            help="Write a figure of the curve.",
            rich_help_panel=OUTPUT,
        ),
    ] = None,
    json: JsonObject = False,
    no_color: NoColor = False,
) -> None:
    """Find a learning rate with a range test.

    Raises:
        Exit: Always, with the exit code: 0 found, 1 the curve says nothing or a step failed, 2 bad input.
    """
    from microbatch.cli.lr_command import run_lr

    flags = {
        "job": job,
        "data": data,
        "batch_size": number_or_word(batch_size, int),
        "microbatch_size": number_or_word(microbatch_size, int),
        "memory": memory,
        "steps": 100 if steps is None else number_or_word(steps, int),
        "device": device,
        "seed": number_or_word(seed, int),
        "autocast": autocast,
    }
    values = {
        "low": number_or_word(low, float),
        "high": number_or_word(high, float),
        "seeds": 3 if seeds is None else number_or_word(seeds, int),
    }
    raise typer.Exit(run_lr(flags, values, file=config, plot=plot, as_json=json, color=not no_color))
