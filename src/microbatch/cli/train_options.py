"""Read the options of ``microbatch train`` and start the run."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from microbatch.cli.shared_options import (
    BATCH,
    FILES,
    LENGTH,
    MACHINE,
    OUTPUT,
    THE_JOBS,
    Accumulation,
    Autocast,
    BatchSize,
    ConfigFile,
    DataPath,
    DeviceName,
    JobName,
    Memory,
    NoColor,
    Seed,
    microbatch_size_option,
    number_or_word,
)


def train(
    job: JobName = None,
    *,
    batch_size: BatchSize = None,
    microbatch_size: Annotated[str | None, microbatch_size_option("the job's, or auto")] = None,
    memory: Memory = None,
    max_grad_norm: Annotated[
        str | None,
        typer.Option(
            metavar="X|none",
            help="Clip the finished gradient to this norm.",
            rich_help_panel=BATCH,
            show_default=THE_JOBS,
        ),
    ] = None,
    accumulation: Accumulation = None,
    buffers: Annotated[
        str | None,
        typer.Option(
            metavar="once|mean|each",
            help="How forward passes update buffers: once a step, by the mean, or in each microbatch.",
            rich_help_panel=BATCH,
            show_default=THE_JOBS,
        ),
    ] = None,
    checkpoint: Annotated[
        str | None,
        typer.Option(
            metavar="auto|all|none",
            help="Recompute activations in backward: of as few blocks as memory requires, of all, or of none.",
            rich_help_panel=MACHINE,
            show_default="none",
        ),
    ] = None,
    lr: Annotated[
        str | None,
        typer.Option("--lr", metavar="X", help="Peak learning rate.", rich_help_panel=BATCH, show_default=THE_JOBS),
    ] = None,
    steps: Annotated[
        str | None, typer.Option(metavar="N", help="Optimizer steps.", rich_help_panel=LENGTH, show_default=THE_JOBS)
    ] = None,
    epochs: Annotated[
        str | None,
        typer.Option(
            metavar="X", help="Passes over the data, instead of steps.", rich_help_panel=LENGTH, show_default=THE_JOBS
        ),
    ] = None,
    warmup_steps: Annotated[
        str | None,
        typer.Option(metavar="N", help="Steps of linear warm-up.", rich_help_panel=LENGTH, show_default=THE_JOBS),
    ] = None,
    validate_every: Annotated[
        str | None,
        typer.Option(
            metavar="N", help="Steps between validations.", rich_help_panel=LENGTH, show_default="a tenth of the run"
        ),
    ] = None,
    checkpoint_every: Annotated[
        str | None,
        typer.Option(
            metavar="N", help="Steps between checkpoints.", rich_help_panel=LENGTH, show_default="a tenth of the run"
        ),
    ] = None,
    best: Annotated[
        str | None,
        typer.Option(
            metavar="min:NAME|max:NAME",
            help="Keep the checkpoint of the best validation, by this score.",
            rich_help_panel=LENGTH,
            show_default="none",
        ),
    ] = None,
    patience: Annotated[
        str | None,
        typer.Option(
            metavar="N",
            help="End early after N validations in a row without a better one.",
            rich_help_panel=LENGTH,
            show_default="never",
        ),
    ] = None,
    device: DeviceName = None,
    autocast: Autocast = None,
    seed: Seed = None,
    deterministic: Annotated[
        bool,
        typer.Option(
            "--deterministic", metavar="", help="Compute the same bits on any number of ranks.", rich_help_panel=MACHINE
        ),
    ] = False,
    async_checkpoints: Annotated[
        bool,
        typer.Option(
            "--async-checkpoints",
            metavar="",
            help="Continue training while a checkpoint is written.",
            rich_help_panel=MACHINE,
        ),
    ] = False,
    rank_timeout: Annotated[
        str | None,
        typer.Option(
            metavar="SECONDS",
            help="How long a rank waits for the others before an error names the missing rank.",
            rich_help_panel=MACHINE,
            show_default="600",
        ),
    ] = None,
    shard: Annotated[
        str | None,
        typer.Option(
            metavar="none|zero2|zero3",
            help="Shard over the ranks: gradients and optimizer state (zero2), or weights too (zero3).",
            rich_help_panel=MACHINE,
            show_default="none",
        ),
    ] = None,
    sync: Annotated[
        str | None,
        typer.Option(
            metavar="auto|lean|fast",
            help="When gradients of a sharded model are reduced: after every microbatch, or once a step.",
            rich_help_panel=MACHINE,
            show_default="auto",
        ),
    ] = None,
    data: DataPath = None,
    config: ConfigFile = None,
    run: Annotated[
        Path | None,
        typer.Option(
            "--run",
            # torchrun completes abbreviated options, and would take --run for one of its own.
            "--run-dir",
            metavar="DIR",
            help="Run directory; by default a new one under runs/.",
            rich_help_panel=FILES,
        ),
    ] = None,
    resume: Annotated[
        bool,
        typer.Option(
            "--resume", metavar="", help="Continue --run, or the newest run, bit for bit.", rich_help_panel=FILES
        ),
    ] = False,
    no_compare: Annotated[
        bool,
        typer.Option(
            "--no-compare", metavar="", help="Skip the comparison with the full batch.", rich_help_panel=OUTPUT
        ),
    ] = False,
    json: Annotated[
        bool, typer.Option("--json", metavar="", help="Print one JSON object per line.", rich_help_panel=OUTPUT)
    ] = False,
    no_color: NoColor = False,
    watch: Annotated[
        bool, typer.Option("--watch", metavar="", help="Open the live view during training.", rich_help_panel=OUTPUT)
    ] = False,
    tensorboard: Annotated[
        bool,
        typer.Option("--tensorboard", metavar="", help="Write TensorBoard's event files too.", rich_help_panel=OUTPUT),
    ] = False,
    tracker: Annotated[
        str | None,
        typer.Option(
            metavar="wandb|mlflow|trackio|tensorboard",
            help="Send every step's metrics to this tracker too.",
            rich_help_panel=OUTPUT,
            show_default="none",
        ),
    ] = None,
) -> None:
    """Train a job: its batch in microbatches, one exact optimizer step each.

    Raises:
        Exit: Always, with the exit code: 0 finished, 1 failed, 2 bad input, 130 stopped by Ctrl-C, 143 by SIGTERM,
            129 by a lost terminal.
    """
    from microbatch.cli.train_command import Output, run_training

    flags = {
        "job": job,
        "data": data,
        "batch_size": number_or_word(batch_size, int),
        "microbatch_size": number_or_word(microbatch_size, int),
        "memory": memory,
        "steps": number_or_word(steps, int),
        "epochs": number_or_word(epochs, float),
        "device": device,
        "seed": number_or_word(seed, int),
        "autocast": autocast,
        "accumulation": accumulation,
        "buffers": buffers,
        "checkpoint": checkpoint,
        "learning_rate": number_or_word(lr, float),
        "warmup_steps": number_or_word(warmup_steps, int),
        "max_grad_norm": number_or_word(max_grad_norm, float),
        "validate_every": number_or_word(validate_every, int),
        "checkpoint_every": number_or_word(checkpoint_every, int),
        "best": best,
        "patience": number_or_word(patience, int),
        "compare": False if no_compare else None,
        "deterministic": deterministic or None,
        "async_checkpoints": async_checkpoints or None,
        "rank_timeout": number_or_word(rank_timeout, float),
        "shard": shard,
        "sync": sync,
        "tracker": tracker,
    }
    output = Output(as_json=json, color=not no_color, watch=watch, tensorboard=tensorboard)
    raise typer.Exit(run_training(flags, file=config, run=run, resume=resume, output=output))
