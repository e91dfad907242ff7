"""Read the options of ``microbatch sweep`` and start the sweep."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from microbatch.cli.shared_options import (
    BATCH,
    FILES,
    LENGTH,
    OUTPUT,
    THE_JOBS,
    Accumulation,
    Autocast,
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


def sweep(
    job: JobName = None,
    *,
    batch_size: Annotated[
        str | None,
        typer.Option(
            metavar="N,N,...",
            help="Effective batches to compare, in samples, rising.",
            rich_help_panel=BATCH,
            show_default="a half, once, twice and four times the job's",
        ),
    ] = None,
    microbatch_size: Annotated[str | None, microbatch_size_option("auto")] = None,
    memory: Memory = None,
    accumulation: Accumulation = None,
    lr: Annotated[
        str | None,
        typer.Option(
            "--lr",
            metavar="rule|auto|grid",
            help="The job's rate scaled by the rule, the learning-rate finder, or factors around the rule.",
            rich_help_panel=BATCH,
            show_default="rule",
        ),
    ] = None,
    samples: Annotated[
        str | None,
        typer.Option(
            metavar="N", help="Samples that each run trains on.", rich_help_panel=LENGTH, show_default=THE_JOBS
        ),
    ] = None,
    target_loss: Annotated[
        str | None,
        typer.Option(
            metavar="X",
            help="Loss that steps and samples are counted to; a run ends there.",
            rich_help_panel=LENGTH,
            show_default="the worst of the runs' best",
        ),
    ] = None,
    seeds: Annotated[
        str | None,
        typer.Option(metavar="N", help="Runs of each batch and rate.", rich_help_panel=LENGTH, show_default="3"),
    ] = None,
    points: Annotated[
        str | None,
        typer.Option(metavar="N", help="Points of each curve.", rich_help_panel=LENGTH, show_default="16"),
    ] = None,
    keep_all: Annotated[
        bool,
        typer.Option(
            "--keep-all", metavar="", help="End no learning rate early, although it is beaten.", rich_help_panel=LENGTH
        ),
    ] = False,
    device: DeviceName = None,
    autocast: Autocast = None,
    seed: Seed = None,
    data: DataPath = None,
    config: ConfigFile = None,
    output: Annotated[
        Path | None,
        typer.Option(
            metavar="FOLDER",
            help="Where runs, result and figures go; the same command goes on with a stopped sweep.",
            rich_help_panel=FILES,
            show_default="a new one under runs",
        ),
    ] = None,
    plot: Annotated[
        Path | None,
        typer.Option(metavar="FILE.svg|png", help="Write a figure there too.", rich_help_panel=OUTPUT),
    ] = None,
    json: JsonObject = False,
    no_color: NoColor = False,
) -> None:
    """Train a job at several effective batches.

    Raises:
        Exit: Always, with the exit code: 0 done, 1 failed, 2 bad input, 130 stopped.
    """
    from microbatch.cli.sweep_command import run_sweep

    flags = {
        "job": job,
        "data": data,
        "memory": memory,
        "accumulation": accumulation,
        "device": device,
        "seed": number_or_word(seed, int),
        "autocast": autocast,
    }
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
    code = run_sweep(flags, asked, file=config, output=output, plot=plot, as_json=json, color=not no_color)
    raise typer.Exit(code)
