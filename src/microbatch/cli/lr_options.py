"""Read the options of ``microbatch lr`` and start the learning-rate range test."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from microbatch.cli.shared_options import (
    ConfigFile,
    JobName,
    JsonObject,
    NoColor,
    number_or_word,
    option,
    waiting,
    with_settings,
)
from microbatch.train.run_settings import OUTPUT

RANGE = "The range"


@with_settings(
    *("batch_size", "microbatch_size", "memory", "steps", "device", "autocast", "seed", "data"),
    microbatch_size={"default": "the job's"},
    steps={"help": "Steps of a run, from the first rate to the last.", "group": RANGE, "default": "100"},
)
def lr(
    flags: dict[str, Any],
    job: JobName = None,
    *,
    low: Annotated[
        str | None,
        option("First learning rate.", RANGE, values="RATE", default="the optimizer's / 10,000, lower if needed"),
    ] = None,
    high: Annotated[
        str | None,
        option("Last learning rate.", RANGE, values="RATE", default="the optimizer's x 10,000, higher if needed"),
    ] = None,
    seeds: Annotated[
        str | None, option("Runs, each with another order of the data.", RANGE, values="N", default="3")
    ] = None,
    config: ConfigFile = None,
    plot: Annotated[
        Path | None,
        option("Write a figure of the curve.", OUTPUT, values="FILE.svg|FILE.png", names=("--plot", "--output")),
    ] = None,
    json: JsonObject = False,
    no_color: NoColor = False,
) -> None:
    """Find a learning rate with a range test.

    Raises:
        Exit: Always, with the exit code: 0 found, 1 the curve says nothing or a step failed, 2 bad input.
    """
    flags |= {"job": job, "steps": 100 if flags["steps"] is None else flags["steps"]}
    values = {
        "low": number_or_word(low, float),
        "high": number_or_word(high, float),
        "seeds": 3 if seeds is None else number_or_word(seeds, int),
    }
    with waiting(as_json=json, color=not no_color) as line:
        from microbatch.cli.lr_command import run_lr

        code = run_lr(flags, values, file=config, plot=plot, as_json=json, color=not no_color, line=line)
    raise typer.Exit(code)
