"""The command ``sweep``: what each effective batch takes to the same loss."""

from __future__ import annotations

import itertools
import json
import sys
import time
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.text import Text

from microbatch.cli.reported import refuse_word, reported
from microbatch.cli.run_views import ACCENT, QUIET, WARN
from microbatch.cli.waiting import Waiting, output_console
from microbatch.devices.available_devices import resolve_device
from microbatch.errors import ConfigError, MissingDependencyError
from microbatch.train.config import Settings, load_settings
from microbatch.train.job import Job
from microbatch.train.resolve import check_data_path, resolve
from microbatch.train.rundir import jsonable
from microbatch.train.start import make_job
from microbatch.tuning.figure_file import check_figure
from microbatch.tuning.sweep import sweep
from microbatch.tuning.sweep_figure import draw
from microbatch.tuning.sweep_records import SweepProgress
from microbatch.tuning.sweep_result import Sweep

STOPPED = 130


def run_sweep(
    flags: Mapping[str, Any],
    asked: Mapping[str, Any],
    *,
    file: Path | None,
    output: Path | None,
    plot: Path | None,
    as_json: bool,
    color: bool,
    line: Waiting,
) -> int:
    """Sweep a job, and write what was found.

    Args:
        flags: Settings given on the command line; `None` for those that were not.
        asked: Arguments of `mb.sweep`; `None` for those that were not given, and the batch sizes as one text.
        file: Configuration file, or `None`.
        output: Folder of the sweep; `None` for a new one.
        plot: Where to write a figure too, or `None`.
        as_json: Whether standard output is for machines.
        color: Whether colours may be used.
        line: Where a terminal shows how far it is.

    Returns:
        The exit code: 0 done, 1 failed, 2 bad input, 130 stopped by a signal.
    """
    folder = output or _new_folder(str(flags.get("job") or "language"))

    def work() -> tuple[Settings, Sweep, bool]:
        settings = load_settings(flags, file=file)
        _check_numbers(asked)
        if plot is not None:
            check_figure(plot)
        check_data_path(settings)
        line(f"making the job {settings.job}")
        jobs, given = _jobs(settings), {key: value for key, value in asked.items() if value is not None}
        given["batch_sizes"] = _sizes(asked["batch_sizes"], jobs)
        found = sweep(jobs, **given, accumulation=settings.accumulation, folder=folder, progress=_shown(line))
        return settings, found, _figures(found, folder, plot)

    try:
        done, code = reported(work, line, as_json=as_json)
    except KeyboardInterrupt:
        line.console.print(f"stopped; go on with the same command and --output {folder}", markup=False)
        return STOPPED
    if done is None:
        return code
    settings, found, drawn = done
    if as_json:
        told = {"event": "sweep", "job": settings.job, "folder": str(folder), **found.as_dict()}
        sys.stdout.write(json.dumps(jsonable(told)) + "\n")
    else:
        _show(found, folder, drawn, output_console(color=color))
    return 0


def _check_numbers(asked: Mapping[str, Any]) -> None:
    for key in ("samples", "target_loss", "seeds", "points", "microbatch_size"):
        if (key, asked[key]) != ("microbatch_size", "auto"):
            refuse_word(key, asked[key], "a number" if key == "target_loss" else "a whole number")


def _jobs(settings: Settings) -> Callable[[int], Job]:
    device = resolve_device(settings.device)

    def made(seed: int) -> Job:
        # The sweep counts its seeds from 0.
        own = settings.model_copy(update={"seed": settings.seed + seed})
        job = make_job(own, device)
        if job.steps is None and job.epochs is None:
            job = replace(job, epochs=1.0)
        config = resolve(own, job, device=device)
        return replace(job, autocast=config.autocast, memory_budget=config.memory_budget)

    return made


def _sizes(text: str | None, jobs: Callable[[int], Job]) -> list[int]:
    if text is None:
        own = jobs(0).batch_size
        return sorted({max(1, own // 2), own, own * 2, own * 4})
    try:
        return [int(part) for part in text.split(",")]
    except ValueError:
        raise ConfigError(f"--batch-size is {json.dumps(text)}: it must be whole numbers, such as 64,128,256") from None


def _new_folder(job: str) -> Path:
    stem = f"sweep-{Path(job.rpartition(':')[0] or job).stem}-{time.strftime('%Y%m%d-%H%M%S')}"
    names = itertools.chain([stem], (f"{stem}-{number}" for number in itertools.count(2)))
    return next(path for name in names if not (path := Path("runs") / name).exists())


def _figures(found: Sweep, folder: Path, plot: Path | None) -> bool:
    """Draw the figures into the folder, where matplotlib is installed."""
    try:
        for suffix in ("svg", "png"):
            draw(found, folder / f"sweep.{suffix}")
    except MissingDependencyError:
        return False
    if plot is not None:
        draw(found, plot)
    return True


def _shown(line: Waiting) -> Callable[[SweepProgress], None]:
    def show(told: SweepProgress) -> None:
        if told.seed is None:
            _say(line.console, f"batch {told.batch_size:,}: learning rate {told.learning_rate:.3g}")
            return
        loss = "diverged" if told.loss is None else f"loss {told.loss:.4g}"
        run = f"batch {told.batch_size:,}, rate {told.learning_rate:.3g}, seed {told.seed}"
        _say(line.console, f"{told.point}/{told.points}  {run}: {loss}")
        line("training", told.share, detail=f"{told.running} runs")

    return show


def _say(console: Console, text: str) -> None:
    console.print(Text(text, style=QUIET))


def _show(found: Sweep, folder: Path, drawn: bool, console: Console) -> None:
    console.print(Text(found.goal, style=QUIET))
    console.print()
    head, *lines = found.table(width=console.width).splitlines()
    console.print(Text(head, style=QUIET))
    for line in lines:
        console.print(Text(line))
    console.print()
    for index, sentence in enumerate(found.sentences):
        console.print(Text(sentence, style=ACCENT if index == 0 else ""))
    for note in found.notes:
        console.print(Text(f"! {note}", style=WARN))
    figures = "sweep.svg and sweep.png" if drawn else 'no figure (pip install "microbatch[figures]")'
    console.print(Text(f"{folder}: runs, result.json, {figures}", style=QUIET))
