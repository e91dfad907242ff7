"""The command ``check``: is the accumulated gradient the large batch's, and if not, why."""

from __future__ import annotations

import json
import sys
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table
from rich.text import Text

from microbatch.checking.check_report import Check
from microbatch.checking.equal import check
from microbatch.cli.reported import FAILED, reported
from microbatch.cli.run_views import ACCENT, QUIET, WARN
from microbatch.cli.waiting import Waiting, output_console
from microbatch.devices.available_devices import resolve_device
from microbatch.train.config import Settings, load_settings
from microbatch.train.find_job import find_job
from microbatch.train.resolve import check_data_path, resolve
from microbatch.train.start import make_job


def run_check(
    flags: Mapping[str, Any], *, file: Path | None, loop: str | None = None, as_json: bool, color: bool, line: Waiting
) -> int:
    """Check a job, and say what was found.

    Args:
        flags: Settings given on the command line; `None` for those that were not.
        file: Configuration file, or `None`.
        loop: Where the user's own loop is, ``path/to/file.py:function``; `None` to check the accumulator.
        as_json: Whether standard output is for machines.
        color: Whether colours may be used.
        line: Where a terminal shows how far the check is.

    Returns:
        The exit code: 0 the large batch's gradient, 1 not, or the check failed, 2 bad input.
    """

    def work() -> tuple[Settings, Check]:
        settings = load_settings(flags, file=file)
        return settings, _check(settings, loop, line)

    done, code = reported(work, line, as_json=as_json)
    if done is None:
        return code
    settings, found = done
    if as_json:
        sys.stdout.write(json.dumps({"event": "check", "job": settings.job, **found.as_dict()}) + "\n")
    else:
        _show(found, output_console(color=color))
    return 0 if found.ok else FAILED


def _check(settings: Settings, loop: str | None, line: Waiting) -> Check:
    check_data_path(settings)
    device = resolve_device(settings.device)
    line(f"making the job {settings.job}")
    job = make_job(settings, device)
    if job.steps is None and job.epochs is None:  # how long a run would be says nothing here
        job = replace(job, epochs=1.0)
    config = resolve(settings, job, device=device)
    batch = job.first_batch(config.batch_size)
    encode = None if config.plain else job.encode
    said = {"batch_norm": config.batch_norm, "buffers": config.buffers}
    options: dict[str, Any] = {name: value for name, value in said.items() if value is not None}
    if loop is not None:
        options |= {"loop": find_job(loop), "optimizer": job.optimizer}
    return check(
        job.model,
        job.batch_loss if encode is None else job.loss_fn,
        batch,
        microbatch_size=config.microbatch_size,
        encode=encode,
        counts=job.counts,
        memory_budget=settings.memory,  # not the job's own, which is for a step and not for a whole batch at once
        autocast=config.autocast,
        lengths=job.lengths,
        progress=line,
        **options,
    )


def _show(found: Check, console: Console) -> None:
    style = ACCENT if found.ok else WARN
    console.print(Text(found.verdict, style=style))
    cut = f"{found.rows} rows in {found.microbatches} microbatches of {found.microbatch_size}"
    console.print(Text(f"{cut}, {found.precision} against {found.yardstick}", style=QUIET))
    console.print()
    head, *lines = found.table(width=console.width).splitlines()
    console.print(Text(head, style=QUIET))
    for line in lines:
        console.print(Text(line))
    if found.causes:
        grid = Table.grid(padding=(0, 1))
        for cause in found.causes:
            grid.add_row("-", Text.assemble((cause.kind, "bold"), f": {cause.words}"))
            grid.add_row("", Text(cause.remedy, style=QUIET))
        console.print()
        console.print(grid)
    for note in found.notes:
        console.print(Text(f"note  {note}", style=QUIET))
