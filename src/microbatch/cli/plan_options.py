"""Read the options of ``microbatch plan`` and start the search, or the plan for a cluster."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from microbatch.cli.shared_options import (
    BATCH,
    COSTS,
    ELSEWHERE,
    MACHINE,
    OUTPUT,
    THE_JOBS,
    Autocast,
    BatchSize,
    ConfigFile,
    DataPath,
    JsonObject,
    NoColor,
    Seed,
    number_or_word,
)


def plan(
    job: Annotated[
        str | None,
        typer.Argument(
            metavar="JOB",
            help="language (the default), images, images-batchnorm, pairs, path/to/file.py:function that returns an "
            "mb.Job, or a Transformers config.json.",
            show_default=False,
        ),
    ] = None,
    *,
    batch_size: BatchSize = None,
    microbatch_size: Annotated[
        str | None,
        typer.Option(metavar="N", help="Microbatch size to compare with the best one.", rich_help_panel=BATCH),
    ] = None,
    memory: Annotated[
        str | None,
        typer.Option(
            metavar="BYTES",
            help='Memory limit of a step, such as "6 GiB"; none for all available memory.',
            rich_help_panel=BATCH,
        ),
    ] = None,
    device: Annotated[
        str | None,
        typer.Option(
            metavar="NAME",
            help='auto, cpu, cuda, cuda:1, mps, xpu; or hardware that you do not have: a100-40gb, h100, "24 GiB"; '
            "several, with commas, to compare.",
            rich_help_panel=MACHINE,
        ),
    ] = None,
    autocast: Autocast = None,
    seed: Seed = None,
    data: DataPath = None,
    config: ConfigFile = None,
    ranks: Annotated[
        str | None,
        typer.Option(
            metavar="N[,N...]", help="Number of devices; several numbers to compare.", rich_help_panel=ELSEWHERE
        ),
    ] = None,
    strategy: Annotated[
        str | None, typer.Option(metavar="ddp|zero1|zero2|fsdp", help="What is sharded.", rich_help_panel=ELSEWHERE)
    ] = None,
    checkpointing: Annotated[
        str | None,
        typer.Option(metavar="none|blocks", help="What backward recomputes.", rich_help_panel=ELSEWHERE),
    ] = None,
    offload: Annotated[
        str | None,
        typer.Option(
            metavar="none|optimizer|optimizer+gradients|all",
            help="What is kept in host memory.",
            rich_help_panel=ELSEWHERE,
        ),
    ] = None,
    precision: Annotated[
        str | None,
        typer.Option(metavar="NAME", help="fp32, mixed, bf16, bf16-8bit, ...", rich_help_panel=ELSEWHERE),
    ] = None,
    reduce: Annotated[
        str | None,
        typer.Option(metavar="microbatch|window", help="When gradients are reduced.", rich_help_panel=ELSEWHERE),
    ] = None,
    sequence_length: Annotated[
        str | None, typer.Option(metavar="N", help="Tokens in a row.", rich_help_panel=ELSEWHERE)
    ] = None,
    bandwidth: Annotated[
        str | None,
        typer.Option(
            metavar="AMOUNT/s", help='What one rank can send: "25 GB/s", "10 Gbit/s".', rich_help_panel=ELSEWHERE
        ),
    ] = None,
    latency: Annotated[
        str | None,
        typer.Option(metavar="TIME", help='Latency of a collective: "20 us", "0.5 ms".', rich_help_panel=ELSEWHERE),
    ] = None,
    utilisation: Annotated[
        str | None,
        typer.Option(
            metavar="SHARE",
            help="Share of the device's peak speed that is reached; 0.4 by default.",
            rich_help_panel=ELSEWHERE,
        ),
    ] = None,
    microbatch_seconds: Annotated[
        str | None,
        typer.Option(
            metavar="TIME", help='Measured time of a microbatch on that hardware: "0.25 s".', rich_help_panel=ELSEWHERE
        ),
    ] = None,
    price: Annotated[
        str | None,
        typer.Option(
            metavar="PRICE",
            help='Of a device: "2.50/h", "2.50 EUR/h"; of each of several: "a100-40gb=1.20/h,h100=2.50/h".',
            rich_help_panel=COSTS,
        ),
    ] = None,
    deadline: Annotated[
        str | None,
        typer.Option(
            metavar="TIME", help='Find the cheapest plan within "90 min", "6 h" or "2 d".', rich_help_panel=COSTS
        ),
    ] = None,
    steps: Annotated[
        str | None,
        typer.Option(metavar="N", help="Optimizer steps of the run.", rich_help_panel=COSTS, show_default=THE_JOBS),
    ] = None,
    samples: Annotated[
        str | None, typer.Option(metavar="N", help="Samples of the run, instead of steps.", rich_help_panel=COSTS)
    ] = None,
    plot: Annotated[
        Path | None, typer.Option(metavar="FILE.svg", help="Write a figure.", rich_help_panel=OUTPUT)
    ] = None,
    no_cache: Annotated[
        bool,
        typer.Option("--no-cache", metavar="", help="Plan again, without the cache.", rich_help_panel=OUTPUT),
    ] = False,
    json: JsonObject = False,
    no_color: NoColor = False,
) -> None:
    """Find the fastest microbatch size that fits.

    Raises:
        Exit: Always, with the exit code: 0 planned, 1 failed, does not fit or misses the deadline, 2 bad input.
    """
    from microbatch.cli.cluster_command import is_for_a_cluster, run_cluster_plan
    from microbatch.cli.plan_command import run_plan

    costs = {
        "price": price,
        "deadline": deadline,
        "steps": number_or_word(steps, int),
        "samples": number_or_word(samples, int),
    }
    if is_for_a_cluster(job or "", device):
        elsewhere = {
            "device": device,
            "ranks": ranks,
            "strategy": strategy,
            "checkpointing": checkpointing,
            "offload": offload,
            "precision": precision,
            "reduce": reduce,
            "sequence_length": number_or_word(sequence_length, int),
            "bandwidth": bandwidth,
            "latency": latency,
            "utilisation": number_or_word(utilisation, float),
            "microbatch_seconds": microbatch_seconds,
            "batch_size": number_or_word(batch_size, int),
            "microbatch_size": number_or_word(microbatch_size, int),
        }
        raise typer.Exit(run_cluster_plan(job or "language", elsewhere | costs, as_json=json))
    flags = {
        "job": job,
        "data": data,
        "batch_size": number_or_word(batch_size, int),
        "microbatch_size": number_or_word(microbatch_size, int),
        "memory": memory,
        "device": device,
        "seed": number_or_word(seed, int),
        "autocast": autocast,
    }
    code = run_plan(flags, costs, file=config, plot=plot, cache=not no_cache, as_json=json, color=not no_color)
    raise typer.Exit(code)
