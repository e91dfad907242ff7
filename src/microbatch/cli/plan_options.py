"""Read the options of ``microbatch plan`` and start the search, or the plan for a cluster."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from microbatch.cli.shared_options import (
    ConfigFile,
    JsonObject,
    NoColor,
    number_or_word,
    option,
    waiting,
    with_settings,
)
from microbatch.train.run_settings import OUTPUT

ELSEWHERE, COSTS = "Hardware that you do not have", "What it costs"


@with_settings(
    *("batch_size", "microbatch_size", "memory", "device", "autocast", "seed", "data"),
    microbatch_size={"help": "Microbatch size to compare with the best one.", "values": "N", "default": ""},
    device={
        "help": 'auto, cpu, cuda, cuda:1, mps, xpu; or hardware that you do not have: a100-40gb, h100, "24 GiB"; '
        "several, with commas, to compare.",
    },
)
def plan(
    flags: dict[str, Any],
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
    config: ConfigFile = None,
    ranks: Annotated[
        str | None, option("Number of devices; several numbers to compare.", ELSEWHERE, values="N,N,...", default="1")
    ] = None,
    strategy: Annotated[
        str | None,
        option("What is sharded: ddp (nothing), zero1, zero2 or fsdp.", ELSEWHERE, values="NAME", default="ddp"),
    ] = None,
    checkpointing: Annotated[
        str | None, option("What backward recomputes.", ELSEWHERE, values="none|blocks", default="none")
    ] = None,
    offload: Annotated[
        str | None,
        option(
            "What is kept in host memory: none, optimizer, optimizer+gradients or all.",
            ELSEWHERE,
            values="NAME",
            default="none",
        ),
    ] = None,
    precision: Annotated[
        str | None,
        option("fp32, mixed, bf16, bf16-8bit, ...", ELSEWHERE, values="NAME", default="mixed"),
    ] = None,
    reduce: Annotated[
        str | None,
        option(
            "After which of these gradients are reduced.", ELSEWHERE, values="microbatch|window", default="microbatch"
        ),
    ] = None,
    sequence_length: Annotated[str | None, option("Tokens in a row.", ELSEWHERE, values="N")] = None,
    bandwidth: Annotated[
        str | None, option('What one rank can send: "25 GB/s", "10 Gbit/s".', ELSEWHERE, values="AMOUNT/s")
    ] = None,
    latency: Annotated[
        str | None, option('Latency of a collective: "20 us", "0.5 ms".', ELSEWHERE, values="TIME")
    ] = None,
    utilisation: Annotated[
        str | None,
        option("Share of the device's peak speed that is reached.", ELSEWHERE, values="SHARE", default="0.4"),
    ] = None,
    microbatch_seconds: Annotated[
        str | None,
        option('Measured time of a microbatch on that hardware: "0.25 s".', ELSEWHERE, values="TIME"),
    ] = None,
    price: Annotated[
        str | None,
        option(
            'Of a device: "2.50/h", "2.50 EUR/h"; of each of several: "a100-40gb=1.20/h,h100=2.50/h".',
            COSTS,
            values="PRICE",
        ),
    ] = None,
    deadline: Annotated[
        str | None, option('Find the cheapest plan within "90 min", "6 h" or "2 d".', COSTS, values="TIME")
    ] = None,
    steps: Annotated[str | None, option("Optimizer steps of the run.", COSTS, values="N", default="the job's")] = None,
    samples: Annotated[str | None, option("Samples of the run, instead of steps.", COSTS, values="N")] = None,
    plot: Annotated[Path | None, option("Write a figure.", OUTPUT, values="FILE.svg")] = None,
    no_cache: Annotated[bool, option("Plan again, without the cache.", OUTPUT, names=("--no-cache",))] = False,
    json: JsonObject = False,
    no_color: NoColor = False,
) -> None:
    """Find the fastest microbatch size that fits.

    Raises:
        Exit: Always, with the exit code: 0 planned, 1 failed, does not fit or misses the deadline, 2 bad input.
    """
    costs = {
        "price": price,
        "deadline": deadline,
        "steps": number_or_word(steps, int),
        "samples": number_or_word(samples, int),
    }
    elsewhere = {
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
        **{key: flags[key] for key in ("device", "batch_size", "microbatch_size")},
    }
    flags["job"] = job
    show = {"as_json": json, "color": not no_color}
    with waiting(**show) as line:
        from microbatch.cli.cluster_command import is_for_a_cluster, run_cluster_plan
        from microbatch.cli.plan_command import run_plan

        if is_for_a_cluster(job or "", flags["device"]):
            code = run_cluster_plan(job or "language", elsewhere | costs, as_json=json, line=line)
        else:
            code = run_plan(flags, costs, file=config, plot=plot, cache=not no_cache, **show, line=line)
    raise typer.Exit(code)
