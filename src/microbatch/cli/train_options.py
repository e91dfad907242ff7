"""Read the options of ``microbatch train`` and start the run."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from microbatch.cli.shared_options import ConfigFile, JobName, NoColor, option, waiting, with_settings
from microbatch.train.run_settings import FILES, FLAGS, OUTPUT


@with_settings(*FLAGS)
def train(
    flags: dict[str, Any],
    job: JobName = None,
    *,
    config: ConfigFile = None,
    # torchrun completes abbreviated options, and would take --run for one of its own.
    run: Annotated[
        Path | None,
        option("Run directory; a new one under runs/ without it.", FILES, values="DIR", names=("--run", "--run-dir")),
    ] = None,
    resume: Annotated[
        bool, option("Continue --run, or the newest run, bit for bit.", FILES, names=("--resume",))
    ] = False,
    no_compare: Annotated[
        bool, option("Skip the comparison with the full batch.", OUTPUT, names=("--no-compare",))
    ] = False,
    json: Annotated[bool, option("Print one JSON object per line.", OUTPUT, names=("--json",))] = False,
    no_color: NoColor = False,
    watch: Annotated[bool, option("Open the live view during training.", OUTPUT, names=("--watch",))] = False,
    tensorboard: Annotated[
        bool, option("Write TensorBoard's event files too.", OUTPUT, names=("--tensorboard",))
    ] = False,
) -> None:
    """Train a job: its batch in microbatches, one exact optimizer step each.

    Raises:
        Exit: Always, with the exit code: 0 finished, 1 failed, 2 bad input, 130 stopped by Ctrl-C, 143 by SIGTERM,
            129 by a lost terminal.
    """
    flags |= {"job": job, "compare": False if no_compare else None}
    with waiting(as_json=json, color=not no_color) as line:
        from microbatch.cli.train_command import Output, run_training

        output = Output(as_json=json, color=not no_color, watch=watch, tensorboard=tensorboard)
        code = run_training(flags, file=config, run=run, resume=resume, output=output, line=line)
    raise typer.Exit(code)
