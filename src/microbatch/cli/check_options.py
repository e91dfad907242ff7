"""Read the options of ``microbatch check`` and start the check."""

from __future__ import annotations

from typing import Annotated, Any

import typer

from microbatch.cli.shared_options import ConfigFile, JobName, JsonObject, NoColor, option, waiting, with_settings
from microbatch.train.run_settings import FILES


@with_settings(
    *("batch_size", "microbatch_size", "memory", "accumulation", "device", "autocast", "seed", "data"),
    microbatch_size={"values": "N", "default": "the job's"},
    memory={"help": 'Memory limit of the check, such as "6 GiB".', "default": "none"},
)
def check(
    flags: dict[str, Any],
    job: JobName = None,
    *,
    loop: Annotated[
        str | None,
        option(
            "A loop of your own to check: loop(model, optimizer, batch) takes one step on a batch.",
            FILES,
            values="FILE.py:NAME",
        ),
    ] = None,
    config: ConfigFile = None,
    json: JsonObject = False,
    no_color: NoColor = False,
) -> None:
    """Check that accumulating gives the large batch's gradient.

    Raises:
        Exit: Always, with the exit code: 0 equal, 1 not equal or failed, 2 bad input.
    """
    flags["job"] = job
    with waiting(as_json=json, color=not no_color) as line:
        from microbatch.cli.check_command import run_check

        code = run_check(flags, file=config, loop=loop, as_json=json, color=not no_color, line=line)
    raise typer.Exit(code)
