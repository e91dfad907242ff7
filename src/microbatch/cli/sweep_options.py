"""Read the options of ``microbatch sweep`` and start the sweep."""

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
from microbatch.train.run_settings import BATCH, FILES, LENGTH, OUTPUT


@with_settings("memory", "accumulation", "device", "autocast", "seed", "data")
def sweep(
    flags: dict[str, Any],
    job: JobName = None,
    *,
    batch_size: Annotated[
        str | None,
        option(
            "Effective batches to compare, in samples, rising.",
            BATCH,
            values="N,N,...",
            default="a half, once, twice and four times the job's",
        ),
    ] = None,
    microbatch_size: Annotated[
        str | None, option("Samples that go through the model at once.", BATCH, values="N|auto", default="auto")
    ] = None,
    lr: Annotated[
        str | None,
        option(
            "The job's rate scaled by the rule, the learning-rate finder, or factors around the rule.",
            BATCH,
            values="rule|auto|grid",
            default="rule",
        ),
    ] = None,
    samples: Annotated[
        str | None, option("Samples that each run trains on.", LENGTH, values="N", default="the job's")
    ] = None,
    target_loss: Annotated[
        str | None,
        option(
            "Loss that steps and samples are counted to; a run ends there.",
            LENGTH,
            values="X",
            default="the worst of the runs' best",
        ),
    ] = None,
    seeds: Annotated[str | None, option("Runs of each batch and rate.", LENGTH, values="N", default="3")] = None,
    points: Annotated[str | None, option("Points of each curve.", LENGTH, values="N", default="16")] = None,
    keep_all: Annotated[
        bool, option("End no learning rate early, although it is beaten.", LENGTH, names=("--keep-all",))
    ] = False,
    config: ConfigFile = None,
    output: Annotated[
        Path | None,
        option(
            "Where runs, result and figures go; the same command goes on with a stopped sweep.",
            FILES,
            values="FOLDER",
            default="a new one under runs/",
        ),
    ] = None,
    plot: Annotated[Path | None, option("Write a figure there too.", OUTPUT, values="FILE.svg|FILE.png")] = None,
    json: JsonObject = False,
    no_color: NoColor = False,
) -> None:
    """Train a job at several effective batches.

    Raises:
        Exit: Always, with the exit code: 0 done, 1 failed, 2 bad input, 130 stopped.
    """
    flags["job"] = job
    asked = {
        "batch_sizes": batch_size,
        "lr": lr,
        "samples": number_or_word(samples, int),
        "target_loss": number_or_word(target_loss, float),
        "seeds": number_or_word(seeds, int),
        "points": number_or_word(points, int),
        "microbatch_size": number_or_word(microbatch_size, int),
        "drop": False if keep_all else None,
    }
    show = {"as_json": json, "color": not no_color}
    with waiting(**show) as line:
        from microbatch.cli.sweep_command import run_sweep

        code = run_sweep(flags, asked, file=config, output=output, plot=plot, **show, line=line)
    raise typer.Exit(code)
