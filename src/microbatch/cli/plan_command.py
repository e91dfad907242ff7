"""The command ``plan``: which microbatch size, what memory, what time."""

from __future__ import annotations

import hashlib
import json
import os
import platform
import sys
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table
from rich.text import Text

import microbatch.planning.plan as plans
from microbatch.cli.cost_flags import CostFlags, cost_as_dict, read_cost_flags
from microbatch.cli.reported import FAILED, reported
from microbatch.cli.run_views import ACCENT, QUIET
from microbatch.cli.waiting import Waiting, output_console
from microbatch.devices.available_devices import resolve_device
from microbatch.devices.backend import name_of
from microbatch.errors import ConfigError
from microbatch.planning.figure import svg
from microbatch.planning.make_plan import plan
from microbatch.planning.run_costs import RunCost, deadline_words
from microbatch.train.config import Settings, load_settings
from microbatch.train.resolve import check_data_path, check_memory, resolve
from microbatch.train.start import make_job


def run_plan(
    flags: Mapping[str, Any],
    costs: Mapping[str, Any],
    *,
    file: Path | None,
    plot: Path | None,
    cache: bool,
    as_json: bool,
    color: bool,
    line: Waiting,
) -> int:
    """Plan a job, and say what was found.

    Args:
        flags: Settings given on the command line; `None` for those that were not.
        costs: What is asked about time and money; see `read_cost_flags`.
        file: Configuration file, or `None`.
        plot: Where to write a figure, or `None`.
        cache: Whether an earlier plan of the same job, device and versions will do.
        as_json: Whether standard output is for machines.
        color: Whether colours may be used.
        line: Where a terminal shows how far it is.

    Returns:
        The exit code: 0 planned, 1 failed or too slow for the deadline, 2 bad input.
    """

    def work() -> tuple[Settings, CostFlags, plans.Plan, RunCost, bool]:
        settings, asked = load_settings(flags, file=file), read_cost_flags(costs)
        price = asked.price_here()
        _check_plot(plot)
        found, job_steps, cached = _plan(settings, asked, line, cache=cache)
        cost = found.cost(price, **asked.length(job_steps), device=str(resolve_device(settings.device)))
        if plot is not None:
            plot.write_text(svg(found), encoding="utf-8")
        return settings, asked, found, cost, cached

    done, code = reported(work, line, as_json=as_json)
    if done is None:
        return code
    settings, asked, found, cost, cached = done
    late = asked.deadline is not None and not cost.meets(asked.deadline)
    if as_json:
        told = {"event": "plan", "job": settings.job, "cached": cached, **found.as_dict()}
        told["cost"] = cost_as_dict(cost, asked) if asked.any else None
        sys.stdout.write(json.dumps(told) + "\n")
    else:
        said = [cost.words()] if asked.any else []
        said += [deadline_words([cost], asked.deadline)] if asked.deadline is not None else []
        _show(found, said, output_console(color=color), cached=cached)
    return FAILED if late else 0


def _check_plot(plot: Path | None) -> None:
    if plot is not None and plot.suffix != ".svg":
        raise ConfigError(f"--plot {plot}: the figure is an SVG; give it a name that ends with .svg")


def _plan(settings: Settings, asked: CostFlags, line: Waiting, *, cache: bool) -> tuple[plans.Plan, int | None, bool]:
    """Return the plan, the steps of the job's run, and whether the plan was kept from an earlier call."""
    check_data_path(settings)
    device = resolve_device(settings.device)
    file = _cache_file(settings, device)
    if cache and (kept := _kept(file)) is not None:
        return *kept, True
    line(f"making the job {settings.job}")
    job = make_job(settings, device)
    open_ended = {job.steps, job.epochs, settings.steps, settings.epochs} == {None}
    if open_ended and (asked.steps or asked.samples):  # the flag says how long the run is, and a plan needs no more
        job = replace(job, steps=1)
    config = resolve(settings, job, device=device)
    check_memory(settings, job, config)
    job = replace(
        job,
        batch_size=config.batch_size,
        autocast=config.autocast,
        memory_budget=config.memory_budget,
        microbatch_size=None if config.auto else config.microbatch_size,
    )
    found, steps = plan(job, progress=line), None if open_ended else config.steps
    if cache and found.decided:  # a busy machine may be quiet next time
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(json.dumps({**found.as_dict(), "job_steps": steps}), encoding="utf-8")
    return found, steps, False


def _kept(file: Path) -> tuple[plans.Plan, int | None] | None:
    try:
        found = json.loads(file.read_text(encoding="utf-8"))
        return plans.Plan.from_dict(found), found["job_steps"]
    except (OSError, ValueError, KeyError, TypeError):
        return None


def _cache_file(settings: Settings, device: torch.device) -> Path:
    """Name the file by everything that a plan depends on and that can be known without running the job."""
    from importlib.metadata import version

    source = Path(settings.job.rpartition(":")[0]).expanduser()
    name = name_of(device) or platform.processor() or platform.machine()
    told = {
        "settings": settings.model_dump(mode="json"),
        "source": hashlib.sha256(source.read_bytes()).hexdigest() if source.is_file() else None,
        "folder": str(source.resolve()) if source.is_file() else None,
        "device": [str(device), name, platform.node(), torch.get_num_threads()],
        "versions": [version("microbatch"), torch.__version__, platform.python_version()],
    }
    digest = hashlib.sha256(json.dumps(told, sort_keys=True).encode()).hexdigest()
    home = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(home) / "microbatch" / "plans" / f"{digest[:32]}.json"


def _show(found: plans.Plan, costs: Sequence[str], console: Console, *, cached: bool) -> None:
    head, *lines = found.table(width=console.width).splitlines()
    console.print(Text(head, style=QUIET))
    for line in lines:
        console.print(Text(line, style=ACCENT if line.lstrip().startswith(">") else ""))
    if chart := found.chart():
        console.print()
        console.print(Text(chart))
    if len(found.ways) > 1:
        console.print()
        head, *lines = found.ways_table(width=console.width).splitlines()
        console.print(Text(head, style=QUIET))
        for line in lines:
            console.print(Text(line, style=ACCENT if line.lstrip().startswith(">") else ""))
    grid = Table.grid(padding=(0, 1))
    for sentence in (*found.words, *costs):
        grid.add_row("-", Text(sentence))
    console.print()
    console.print(grid)
    console.print(Text(f"prediction: {found.rests_on}", style=QUIET))
    if cached:
        console.print(Text("an earlier plan of the same job, device and versions; --no-cache plans again", style=QUIET))
