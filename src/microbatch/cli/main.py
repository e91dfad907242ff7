"""The command line. PyTorch is imported when a command runs, so that help answers at once."""

from __future__ import annotations

from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Annotated

import typer

app = typer.Typer(
    name="microbatch",
    no_args_is_help=True,
    add_completion=False,
    # A traceback of the user's own code is printed as Python prints it, and ours as one message.
    pretty_exceptions_enable=False,
    help="Ask for the batch you want. It runs in the memory you have, and the gradient is the large batch's gradient.",
)

_BATCH, _LENGTH, _MACHINE, _FILES, _OUTPUT = "The batch", "How long", "The machine", "Files", "Output"
_ELSEWHERE = "Hardware that is not here"


def main() -> None:
    """Run the command line."""
    app(prog_name="microbatch")


def _print_version(wanted: bool) -> None:
    if not wanted:
        return
    try:
        typer.echo(f"microbatch {version('microbatch')}")
    except PackageNotFoundError:
        typer.echo("microbatch (not installed)")
    raise typer.Exit


@app.callback()
def root(
    *,
    show_version: Annotated[
        bool,
        # Eager, and with a callback of its own: it is answered before a command is asked for.
        typer.Option("--version", help="Print the version.", is_eager=True, callback=_print_version),
    ] = False,
) -> None:
    """Answer what concerns every command.

    Args:
        show_version: Whether to print the version and leave.
    """


@app.command(help="Train a job: its batch in microbatches, one exact optimizer step each.")
def train(
    job: Annotated[
        str | None,
        typer.Argument(
            metavar="JOB",
            help="language (the default), images, images-batchnorm, pairs, or path/to/file.py:function that returns "
            "an mb.Job.",
            show_default=False,
        ),
    ] = None,
    *,
    batch_size: Annotated[
        int | None, typer.Option(metavar="N", help="Effective batch, in samples.", rich_help_panel=_BATCH)
    ] = None,
    microbatch_size: Annotated[
        str | None,
        typer.Option(metavar="N|auto", help="Samples that go through the model at once.", rich_help_panel=_BATCH),
    ] = None,
    memory: Annotated[
        str | None,
        typer.Option(
            metavar="BYTES",
            help='Most memory a step may use, such as "6 GiB"; none for what there is.',
            rich_help_panel=_BATCH,
        ),
    ] = None,
    max_grad_norm: Annotated[
        str | None,
        typer.Option(metavar="X|none", help="Clip the finished gradient to this norm.", rich_help_panel=_BATCH),
    ] = None,
    accumulation: Annotated[
        str | None,
        typer.Option(
            metavar="exact|plain",
            help="plain couples samples within each microbatch alone, as usual, to compare.",
            rich_help_panel=_BATCH,
        ),
    ] = None,
    lr: Annotated[
        float | None, typer.Option("--lr", metavar="X", help="Peak learning rate.", rich_help_panel=_BATCH)
    ] = None,
    steps: Annotated[int | None, typer.Option(metavar="N", help="Optimizer steps.", rich_help_panel=_LENGTH)] = None,
    epochs: Annotated[
        float | None, typer.Option(metavar="X", help="Passes over the data, instead of steps.", rich_help_panel=_LENGTH)
    ] = None,
    warmup_steps: Annotated[
        int | None, typer.Option(metavar="N", help="Steps of linear warm-up.", rich_help_panel=_LENGTH)
    ] = None,
    validate_every: Annotated[
        int | None, typer.Option(metavar="N", help="Steps between validations.", rich_help_panel=_LENGTH)
    ] = None,
    checkpoint_every: Annotated[
        int | None, typer.Option(metavar="N", help="Steps between checkpoints.", rich_help_panel=_LENGTH)
    ] = None,
    device: Annotated[
        str | None, typer.Option(metavar="NAME", help="auto, cpu, cuda, cuda:1 or mps.", rich_help_panel=_MACHINE)
    ] = None,
    autocast: Annotated[
        str | None, typer.Option(metavar="bf16|fp16|none", help="Precision of the forward.", rich_help_panel=_MACHINE)
    ] = None,
    seed: Annotated[
        int | None, typer.Option(metavar="N", help="Seed of everything that is random.", rich_help_panel=_MACHINE)
    ] = None,
    deterministic: Annotated[
        bool,
        typer.Option("--deterministic", help="The same bits on any number of ranks.", rich_help_panel=_MACHINE),
    ] = False,
    async_checkpoints: Annotated[
        bool,
        typer.Option("--async-checkpoints", help="Train on while a checkpoint is written.", rich_help_panel=_MACHINE),
    ] = False,
    rank_timeout: Annotated[
        float | None,
        typer.Option(
            metavar="SECONDS",
            help="How long a rank of several waits for the others before it says who is missing.",
            rich_help_panel=_MACHINE,
        ),
    ] = None,
    shard: Annotated[
        str | None,
        typer.Option(
            metavar="none|zero2|zero3",
            help="What each of several ranks holds a share of: gradients and optimizer state, or weights too.",
            rich_help_panel=_MACHINE,
        ),
    ] = None,
    sync: Annotated[
        str | None,
        typer.Option(
            metavar="auto|lean|fast",
            help="When gradients of a sharded model meet: after every microbatch, or once a step.",
            rich_help_panel=_MACHINE,
        ),
    ] = None,
    data: Annotated[
        str | None, typer.Option(metavar="PATH", help="Your own file or folder of data.", rich_help_panel=_FILES)
    ] = None,
    config: Annotated[
        Path | None,
        typer.Option(metavar="FILE.toml", help="Settings in a file; flags go over it.", rich_help_panel=_FILES),
    ] = None,
    run: Annotated[
        Path | None,
        typer.Option(
            "--run",
            # torchrun takes --run for the beginning of an option of its own.
            "--run-dir",
            metavar="DIR",
            help="Run directory; by default a new one under runs/.",
            rich_help_panel=_FILES,
        ),
    ] = None,
    resume: Annotated[
        bool,
        typer.Option("--resume", help="Go on with --run, or with the newest run, bit for bit.", rich_help_panel=_FILES),
    ] = False,
    no_compare: Annotated[
        bool,
        typer.Option("--no-compare", help="Leave out the comparison with the full batch.", rich_help_panel=_OUTPUT),
    ] = False,
    json: Annotated[
        bool, typer.Option("--json", help="One JSON object a line, for machines.", rich_help_panel=_OUTPUT)
    ] = False,
    no_color: Annotated[bool, typer.Option("--no-color", help="No colours.", rich_help_panel=_OUTPUT)] = False,
    watch: Annotated[
        bool, typer.Option("--watch", help="Open the live view while it trains.", rich_help_panel=_OUTPUT)
    ] = False,
    tensorboard: Annotated[
        bool, typer.Option("--tensorboard", help="Write TensorBoard's event files too.", rich_help_panel=_OUTPUT)
    ] = False,
) -> None:
    """Train a job: its batch in microbatches, one exact optimizer step each.

    Raises:
        Exit: Always, with the exit code: 0 finished, 1 failed, 2 bad input, 130 stopped by Ctrl-C, 143 by SIGTERM.
    """
    from microbatch.cli.train_command import Output, run_training

    flags = {
        "job": job,
        "data": data,
        "batch_size": batch_size,
        "microbatch_size": _number(microbatch_size, int),
        "memory": memory,
        "steps": steps,
        "epochs": epochs,
        "device": device,
        "seed": seed,
        "autocast": autocast,
        "accumulation": accumulation,
        "learning_rate": lr,
        "warmup_steps": warmup_steps,
        "max_grad_norm": _number(max_grad_norm, float),
        "validate_every": validate_every,
        "checkpoint_every": checkpoint_every,
        "compare": False if no_compare else None,
        "deterministic": deterministic or None,
        "async_checkpoints": async_checkpoints or None,
        "rank_timeout": rank_timeout,
        "shard": shard,
        "sync": sync,
    }
    output = Output(as_json=json, color=not no_color, watch=watch, tensorboard=tensorboard)
    raise typer.Exit(run_training(flags, file=config, run=run, resume=resume, output=output))


@app.command(help="Find the fastest microbatch size that fits: predicted and measured memory, measured time.")
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
    batch_size: Annotated[
        int | None, typer.Option(metavar="N", help="Effective batch, in samples.", rich_help_panel=_BATCH)
    ] = None,
    microbatch_size: Annotated[
        str | None,
        typer.Option(metavar="N", help="Size to compare the best one with.", rich_help_panel=_BATCH),
    ] = None,
    memory: Annotated[
        str | None,
        typer.Option(
            metavar="BYTES",
            help='Most memory a step may use, such as "6 GiB"; none for no limit of its own.',
            rich_help_panel=_BATCH,
        ),
    ] = None,
    device: Annotated[
        str | None,
        typer.Option(
            metavar="NAME",
            help='auto, cpu, cuda, cuda:1, mps; or hardware that is not here: a100-40gb, h100, "24 GiB".',
            rich_help_panel=_MACHINE,
        ),
    ] = None,
    autocast: Annotated[
        str | None, typer.Option(metavar="bf16|fp16|none", help="Precision of the forward.", rich_help_panel=_MACHINE)
    ] = None,
    seed: Annotated[
        int | None, typer.Option(metavar="N", help="Seed of everything that is random.", rich_help_panel=_MACHINE)
    ] = None,
    data: Annotated[
        str | None, typer.Option(metavar="PATH", help="Your own file or folder of data.", rich_help_panel=_FILES)
    ] = None,
    config: Annotated[
        Path | None,
        typer.Option(metavar="FILE.toml", help="Settings in a file; flags go over it.", rich_help_panel=_FILES),
    ] = None,
    ranks: Annotated[
        str | None, typer.Option(metavar="N[,N...]", help="Devices; several to compare.", rich_help_panel=_ELSEWHERE)
    ] = None,
    strategy: Annotated[
        str | None, typer.Option(metavar="ddp|zero1|zero2|fsdp", help="What is sharded.", rich_help_panel=_ELSEWHERE)
    ] = None,
    checkpointing: Annotated[
        str | None,
        typer.Option(metavar="none|blocks", help="What is computed again in backward.", rich_help_panel=_ELSEWHERE),
    ] = None,
    offload: Annotated[
        str | None,
        typer.Option(
            metavar="none|optimizer|optimizer+gradients|all", help="What the host holds.", rich_help_panel=_ELSEWHERE
        ),
    ] = None,
    precision: Annotated[
        str | None,
        typer.Option(metavar="NAME", help="fp32, mixed, bf16, bf16-8bit, ...", rich_help_panel=_ELSEWHERE),
    ] = None,
    reduce: Annotated[
        str | None,
        typer.Option(metavar="microbatch|window", help="When gradients are reduced.", rich_help_panel=_ELSEWHERE),
    ] = None,
    sequence_length: Annotated[
        int | None, typer.Option(metavar="N", help="Tokens of a row.", rich_help_panel=_ELSEWHERE)
    ] = None,
    bandwidth: Annotated[
        str | None,
        typer.Option(
            metavar="AMOUNT/s", help='What leaves a rank: "25 GB/s", "10 Gbit/s".', rich_help_panel=_ELSEWHERE
        ),
    ] = None,
    latency: Annotated[
        str | None,
        typer.Option(metavar="TIME", help='Of a collective: "20 us", "0.5 ms".', rich_help_panel=_ELSEWHERE),
    ] = None,
    utilisation: Annotated[
        float | None,
        typer.Option(metavar="SHARE", help="Of the device's peak arithmetic; 0.4.", rich_help_panel=_ELSEWHERE),
    ] = None,
    microbatch_seconds: Annotated[
        str | None,
        typer.Option(metavar="TIME", help='Of a microbatch there, if measured: "0.25 s".', rich_help_panel=_ELSEWHERE),
    ] = None,
    plot: Annotated[
        Path | None, typer.Option(metavar="FILE.svg", help="Write a figure.", rich_help_panel=_OUTPUT)
    ] = None,
    no_cache: Annotated[
        bool,
        typer.Option("--no-cache", help="Plan again, and keep nothing.", rich_help_panel=_OUTPUT),
    ] = False,
    json: Annotated[
        bool, typer.Option("--json", help="One JSON object, for machines.", rich_help_panel=_OUTPUT)
    ] = False,
    no_color: Annotated[bool, typer.Option("--no-color", help="No colours.", rich_help_panel=_OUTPUT)] = False,
) -> None:
    """Find the fastest microbatch size that fits.

    Raises:
        Exit: Always, with the exit code: 0 planned, 1 failed or does not fit, 2 bad input.
    """
    from microbatch.cli.cluster_command import is_for_a_cluster, run_cluster_plan
    from microbatch.cli.plan_command import run_plan

    if is_for_a_cluster(job or "", device):
        elsewhere = {
            "device": device,
            "ranks": ranks,
            "strategy": strategy,
            "checkpointing": checkpointing,
            "offload": offload,
            "precision": precision,
            "reduce": reduce,
            "sequence_length": sequence_length,
            "bandwidth": bandwidth,
            "latency": latency,
            "utilisation": utilisation,
            "microbatch_seconds": microbatch_seconds,
            "batch_size": batch_size,
            "microbatch_size": _number(microbatch_size, int),
        }
        raise typer.Exit(run_cluster_plan(job or "language", elsewhere, as_json=json))
    flags = {
        "job": job,
        "data": data,
        "batch_size": batch_size,
        "microbatch_size": _number(microbatch_size, int),
        "memory": memory,
        "device": device,
        "seed": seed,
        "autocast": autocast,
    }
    raise typer.Exit(run_plan(flags, file=config, plot=plot, cache=not no_cache, as_json=json, color=not no_color))


@app.command(help="Check that accumulating gives the large batch's gradient, and if not, find out why.")
def check(
    job: Annotated[
        str | None,
        typer.Argument(
            metavar="JOB",
            help="language (the default), images, images-batchnorm, pairs, or path/to/file.py:function that returns "
            "an mb.Job.",
            show_default=False,
        ),
    ] = None,
    *,
    batch_size: Annotated[
        int | None, typer.Option(metavar="N", help="Effective batch, in samples.", rich_help_panel=_BATCH)
    ] = None,
    microbatch_size: Annotated[
        str | None,
        typer.Option(metavar="N", help="Samples that go through the model at once.", rich_help_panel=_BATCH),
    ] = None,
    memory: Annotated[
        str | None,
        typer.Option(
            metavar="BYTES",
            help='Most memory the check may use, such as "6 GiB"; none for what there is.',
            rich_help_panel=_BATCH,
        ),
    ] = None,
    accumulation: Annotated[
        str | None,
        typer.Option(
            metavar="exact|plain",
            help="plain couples samples within each microbatch alone: what does that lose?",
            rich_help_panel=_BATCH,
        ),
    ] = None,
    device: Annotated[
        str | None, typer.Option(metavar="NAME", help="auto, cpu, cuda, cuda:1 or mps.", rich_help_panel=_MACHINE)
    ] = None,
    autocast: Annotated[
        str | None, typer.Option(metavar="bf16|fp16|none", help="Precision of the forward.", rich_help_panel=_MACHINE)
    ] = None,
    seed: Annotated[
        int | None, typer.Option(metavar="N", help="Seed of everything that is random.", rich_help_panel=_MACHINE)
    ] = None,
    data: Annotated[
        str | None, typer.Option(metavar="PATH", help="Your own file or folder of data.", rich_help_panel=_FILES)
    ] = None,
    config: Annotated[
        Path | None,
        typer.Option(metavar="FILE.toml", help="Settings in a file; flags go over it.", rich_help_panel=_FILES),
    ] = None,
    json: Annotated[
        bool, typer.Option("--json", help="One JSON object, for machines.", rich_help_panel=_OUTPUT)
    ] = False,
    no_color: Annotated[bool, typer.Option("--no-color", help="No colours.", rich_help_panel=_OUTPUT)] = False,
) -> None:
    """Check that accumulating gives the large batch's gradient.

    Raises:
        Exit: Always, with the exit code: 0 equal, 1 not equal or failed, 2 bad input.
    """
    from microbatch.cli.check_command import run_check

    flags = {
        "job": job,
        "data": data,
        "batch_size": batch_size,
        "microbatch_size": _number(microbatch_size, int),
        "memory": memory,
        "accumulation": accumulation,
        "device": device,
        "seed": seed,
        "autocast": autocast,
    }
    raise typer.Exit(run_check(flags, file=config, as_json=json, color=not no_color))


@app.command(help="Open the guide: an explanation, a playground that really trains, and the live view of runs.")
def guide(
    runs: Annotated[
        list[Path] | None,
        typer.Argument(
            metavar="[RUN]...", help="Run directories to look at, in progress or finished.", show_default=False
        ),
    ] = None,
    *,
    port: Annotated[
        int | None, typer.Option(metavar="N", help="Port on 127.0.0.1; 0 for any that is free.", show_default=False)
    ] = None,
    no_browser: Annotated[bool, typer.Option("--no-browser", help="Only print the address.")] = False,
    export: Annotated[
        Path | None,
        typer.Option(metavar="FOLDER", help="Write a copy for hosting, with recorded runs, and leave."),
    ] = None,
) -> None:
    """Open the guide.

    Raises:
        Exit: Always, with the exit code: 0 ended as asked, 2 bad input.
    """
    from microbatch.cli.guide_command import run_guide

    raise typer.Exit(run_guide(runs or (), port=port, browser=not no_browser, export=export))


def _number(text: str | None, kind: type[int | float]) -> int | float | str | None:
    """Read a number where a word is allowed as well; a wrong word is refused with the other settings."""
    if text is None:
        return None
    try:
        return kind(text)
    except ValueError:
        return text
