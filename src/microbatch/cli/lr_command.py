"""The command ``lr``: which learning rate."""

from __future__ import annotations

import json
import shlex
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table
from rich.text import Text

from microbatch.cli.reported import FAILED, refuse_word, reported
from microbatch.cli.run_views import ACCENT, QUIET, WARN
from microbatch.cli.waiting import Waiting, output_console
from microbatch.devices.available_devices import resolve_device
from microbatch.train.config import Settings, load_settings
from microbatch.train.resolve import check_data_path, check_memory, resolve
from microbatch.train.start import make_job
from microbatch.tuning.figure_file import check_figure
from microbatch.tuning.learning_rate import LearningRate, RangeStep
from microbatch.tuning.rate_search import check_range, rate_for, seeds_of


def run_lr(
    flags: Mapping[str, Any],
    values: Mapping[str, Any],
    *,
    file: Path | None,
    plot: Path | None,
    as_json: bool,
    color: bool,
    line: Waiting,
) -> int:
    """Find a learning rate for a job, and print what was found.

    Args:
        flags: Settings given on the command line; `None` for those that were not.
        values: ``"low"``, ``"high"`` and ``"seeds"``.
        file: Configuration file, or `None`.
        plot: Where to write a figure, or `None`.
        as_json: Whether standard output is for machines.
        color: Whether colours may be used.
        line: Where a terminal shows how far it is.

    Returns:
        The exit code: 0 found, 1 the curve says nothing or a step failed, 2 bad input.
    """

    def work() -> tuple[Settings, LearningRate]:
        # The test has no warm-up, and a file may have one that is longer.
        settings = load_settings({**flags, "warmup_steps": 0}, file=file)
        for name, value in values.items():
            refuse_word(name, value, "a whole number" if name == "seeds" else "a number")
        check_range(values["low"], values["high"], steps=settings.steps or 0)
        seeds = seeds_of(values["seeds"], first=settings.seed)
        if plot is not None:
            check_figure(plot)
        found = _find(settings, values, seeds, line)
        if plot is not None:
            found.draw(plot)
        return settings, found

    done, code = reported(work, line, as_json=as_json)
    if done is None:
        return code
    settings, found = done
    if as_json:
        sys.stdout.write(json.dumps({"event": "lr", "job": settings.job, **found.as_dict()}) + "\n")
    else:
        _show(found, settings, output_console(color=color))
    return 0 if found.suggested is not None else FAILED


def _find(settings: Settings, given: Mapping[str, Any], seeds: Sequence[int], line: Waiting) -> LearningRate:
    check_data_path(settings)
    device = resolve_device(settings.device)
    line(f"making the job {settings.job}")
    job = make_job(settings, device)
    config = resolve(settings, job, device=device)
    check_memory(settings, job, config)

    def show(step: RangeStep) -> None:
        share = (step.sweep + step.step / step.steps) / step.sweeps
        line(f"run {step.sweep + 1} of {step.sweeps}", share, detail=f"lr {step.rate:.2e}  loss {step.loss:.4f}")

    return rate_for(job, config, low=given["low"], high=given["high"], seeds=seeds, progress=show)


def _show(found: LearningRate, settings: Settings, console: Console) -> None:
    head, *lines = found.table().splitlines()
    console.print(Text(head, style=QUIET))
    for line in lines:
        console.print(Text(line, style=ACCENT if line.endswith("< suggested") else ""))
    grid = Table.grid(padding=(0, 1))
    for index, sentence in enumerate(found.words):
        first = ACCENT if found.suggested is not None else WARN
        grid.add_row("-", Text(sentence, style=first if index == 0 else ""))
    console.print()
    console.print(grid)
    cut = f"batches of {found.batch_size} in microbatches of {found.microbatch_size}"
    console.print(Text(f"{found.steps} steps in {found.seconds:.1f} s, {cut}; the job is as before", style=QUIET))
    if found.suggested is not None:
        command = f"microbatch train {shlex.quote(settings.job)} --batch-size {found.batch_size}"
        console.print(Text(f"{command} --lr {found.suggested:.2g}", style=QUIET), soft_wrap=True)  # to be copied
