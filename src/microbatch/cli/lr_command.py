"""The command ``lr``: which learning rate."""

from __future__ import annotations

import json
import shlex
import sys
import traceback
from collections.abc import Callable, Generator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn
from rich.table import Table
from rich.text import Text

from microbatch.cli.error_report import report_error
from microbatch.cli.run_views import ACCENT, QUIET, WARN
from microbatch.errors import ConfigError, MicrobatchError
from microbatch.train.config import Settings, load_settings
from microbatch.train.resolve import check_data_path, check_memory, resolve, resolve_device
from microbatch.train.start import make_job
from microbatch.tuning.learning_rate import LearningRate, RangeStep
from microbatch.tuning.range_figure import check_figure
from microbatch.tuning.rate_search import check_range, rate_for, seeds_of

NOTHING, BAD_INPUT = 1, 2


def run_lr(
    flags: Mapping[str, Any],
    values: Mapping[str, Any],
    *,
    file: Path | None,
    plot: Path | None,
    as_json: bool,
    color: bool,
) -> int:
    """Find a learning rate for a job, and print what was found.

    Args:
        flags: Settings given on the command line; `None` for those that were not.
        values: ``"low"``, ``"high"`` and ``"seeds"``.
        file: Configuration file, or `None`.
        plot: Where to write a figure, or `None`.
        as_json: Whether standard output is for machines.
        color: Whether colours may be used.

    Returns:
        The exit code: 0 found, 1 the curve says nothing or a step failed, 2 bad input.
    """
    errors = Console(stderr=True, no_color=True if not color else None, highlight=False, soft_wrap=True)
    try:
        # The test has no warm-up, and a file may have one that is longer.
        settings = load_settings({**flags, "warmup_steps": 0}, file=file)
        given = {name: _number(name, value) for name, value in values.items()}
        check_range(given["low"], given["high"], steps=settings.steps or 0)
        seeds = seeds_of(given["seeds"], first=settings.seed)
        if plot is not None:
            check_figure(plot)
        with _shown(errors, wanted=not as_json) as progress:
            found = _find(settings, given, seeds, progress)
        if plot is not None:
            found.draw(plot)
    except (MicrobatchError, OSError) as error:
        report_error(error, errors, as_json=as_json)
        return NOTHING if isinstance(error, torch.OutOfMemoryError | OSError) else BAD_INPUT
    except Exception:  # noqa: BLE001 - whatever the user's own code raises is shown as Python shows it
        traceback.print_exc()
        return NOTHING
    if as_json:
        sys.stdout.write(json.dumps({"event": "lr", "job": settings.job, **found.as_dict()}) + "\n")
    else:
        _show(found, settings, Console(no_color=True if not color else None, highlight=False))
    return 0 if found.suggested is not None else NOTHING


def _find(
    settings: Settings, given: Mapping[str, Any], seeds: Sequence[int], progress: Callable[[RangeStep], None]
) -> LearningRate:
    check_data_path(settings)
    device = resolve_device(settings.device)
    job = make_job(settings, device)
    config = resolve(settings, job, device=device)
    check_memory(settings, job, config)
    return rate_for(job, config, low=given["low"], high=given["high"], seeds=seeds, progress=progress)


def _number(name: str, value: Any) -> Any:
    kind = "a whole number" if name == "seeds" else "a number"
    if isinstance(value, str):
        raise ConfigError(f"--{name} is {json.dumps(value)}: it must be {kind}")
    return value


@contextmanager
def _shown(console: Console, *, wanted: bool) -> Generator[Callable[[RangeStep], None]]:
    """Show a bar on a terminal while the steps are taken."""
    if not (wanted and console.is_terminal):
        yield lambda step: None
        return
    columns = TextColumn("  run {task.fields[run]}"), BarColumn(bar_width=None), TextColumn("{task.fields[figures]}")
    with Progress(*columns, console=console, transient=True, refresh_per_second=8) as bar:
        task = bar.add_task("", total=None, run="", figures="")

        def show(step: RangeStep) -> None:
            bar.update(
                task,
                completed=step.step,
                total=step.steps,
                run=f"{step.sweep + 1}/{step.sweeps}",
                figures=f"lr {step.rate:.2e}  loss {step.loss:.4f}",
            )

        yield show


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
        console.print(Text(f"{command} --lr {found.suggested:.2g}", style=QUIET), soft_wrap=True)
