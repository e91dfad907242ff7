"""Read the options of ``microbatch check`` and start the check."""

from __future__ import annotations

from typing import Annotated

import typer

from microbatch.cli.shared_options import (
    BATCH,
    FILES,
    Autocast,
    BatchSize,
    ConfigFile,
    DataPath,
    DeviceName,
    JobName,
    JsonObject,
    NoColor,
    Seed,
    number_or_word,
)


def check(
    job: JobName = None,
    *,
    batch_size: BatchSize = None,
    microbatch_size: Annotated[
        str | None,
        typer.Option(metavar="N", help="Samples that go through the model at once.", rich_help_panel=BATCH),
    ] = None,
    memory: Annotated[
        str | None,
        typer.Option(
            metavar="BYTES",
            help='Memory limit of the check, such as "6 GiB"; none for all available memory.',
            rich_help_panel=BATCH,
        ),
    ] = None,
    accumulation: Annotated[
        str | None,
        typer.Option(
            metavar="exact|plain",
            help="exact, or plain to compare: a contrastive loss within each microbatch only.",
            rich_help_panel=BATCH,
        ),
    ] = None,
    loop: Annotated[
        str | None,
        typer.Option(
            metavar="FILE.py:NAME",
            help="A loop of your own to check: loop(model, optimizer, batch) takes one step on a batch.",
            rich_help_panel=FILES,
        ),
    ] = None,
    device: DeviceName = None,
    autocast: Autocast = None,
    seed: Seed = None,
    data: DataPath = None,
    config: ConfigFile = None,
    json: JsonObject = False,
    no_color: NoColor = False,
) -> None:
    """Check that accumulating gives the large batch's gradient.

    Raises:
        Exit: Always, with the exit code: 0 equal, 1 not equal or failed, 2 bad input.
    """
    from microbatch.cli.check_command import run_check

    flags = {
        "job": job,
        "data": data,
        "batch_size": number_or_word(batch_size, int),
        "microbatch_size": number_or_word(microbatch_size, int),
        "memory": memory,
        "accumulation": accumulation,
        "device": device,
        "seed": number_or_word(seed, int),
        "autocast": autocast,
    }
    raise typer.Exit(run_check(flags, file=config, loop=loop, as_json=json, color=not no_color))
