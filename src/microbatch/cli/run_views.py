"""What people see of a run: its plan, a line about a step, its summary."""

from __future__ import annotations

import shlex
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from rich import box
from rich.console import Console, ConsoleOptions, Group, RenderableType, RenderResult
from rich.measure import Measurement
from rich.padding import Padding
from rich.panel import Panel
from rich.table import Table
from rich.text import Text

from microbatch.cli.waiting import duration
from microbatch.memory.budget import format_bytes
from microbatch.memory.kept_heap import heap_is_kept
from microbatch.planning.time_words import format_time
from microbatch.step.events import BudgetPassed, PlanChosen, Retry, SizeChanged, SyncChosen
from microbatch.train.run_config import RunConfig
from microbatch.train.run_events import RunPlanned

ACCENT, GOOD, QUIET, WARN = "bold cyan", "bold green", "dim", "yellow"
_SHARDED = {
    "zero2": "gradients and optimizer state, over all ranks (ZeRO-2)",
    "zero3": "weights, gradients and optimizer state, over all ranks (ZeRO-3)",
    "job": "as the job has sharded its model itself",
}
_SYNC = {
    "auto": "lean or fast, as memory allows",
    "lean": "lean: gradients meet after every microbatch",
    "fast": "fast: gradients meet once a step",
}
_ANY_WIDTH = 1000
_MOST_CELLS = 16
"""Microbatches that are drawn one cell each; more share the cells."""


def resume_command(run: Path | str) -> str:
    """Write the command that goes on with a run.

    Args:
        run: Its directory.

    Returns:
        A line for the shell.

    Example:
        >>> resume_command("runs/my model")
        "microbatch train --run 'runs/my model' --resume"
    """
    return f"microbatch train --run {shlex.quote(str(run))} --resume"


def plan_text(event: PlanChosen) -> str:
    """Say which microbatch size was found, and how its memory was predicted.

    Args:
        event: What happened.

    Returns:
        One sentence, without a full stop.
    """
    text = f"microbatches of {event.microbatch_size} from now on: {event.why}"
    if event.predicted_bytes is not None and event.peak_bytes is not None and event.error is not None:
        predicted, measured = format_bytes(event.predicted_bytes), format_bytes(event.peak_bytes)
        text += f"; peak memory predicted {predicted}, measured {measured} ({event.error:+.1%})"
    return text


def sync_text(event: SyncChosen) -> str:
    """Say when gradients of a sharded model meet, and why then.

    Args:
        event: What happened.

    Returns:
        One sentence, without a full stop.
    """
    when = {"lean": "after every microbatch, in shards", "fast": "once a step, whole until then"}[event.sync]
    return f"from step {event.step + 1} on {event.sync}: gradients meet {when}, because {event.why}"


def memory_text(event: Retry | SizeChanged | BudgetPassed) -> str:
    """Say what became of the microbatch size, and why.

    Args:
        event: What happened.

    Returns:
        One sentence, without a full stop.
    """
    at = f"step {event.step + 1}"
    match event:
        case Retry():
            return f"{at}: memory ran out, so the same batch starts again in microbatches of {event.after}"
        case SizeChanged():
            return f"after {at}: microbatches of {event.after} instead of {event.before}, because {event.reason}"
        case BudgetPassed():
            peak, budget = format_bytes(event.peak_bytes), format_bytes(event.budget)
            return f"{at} took {peak}, more than the {budget} allowed, where nothing can be refused"


def plan_view(event: RunPlanned) -> Panel:
    """Lay out what a run will do.

    Args:
        event: The plan.

    Returns:
        Something for a console.
    """
    config = event.config
    batch = min(config.batch_size, config.samples or config.batch_size)
    grid = _grid()
    cut_into = f"{config.microbatches} microbatches of {config.microbatch_size}"
    if config.pipelines is not None:
        cut_into = (
            f"{config.pipelines} pipelines of {config.ranks // config.pipelines} ranks, each with up to {cut_into}"
        )
    elif config.ranks > 1:
        cut_into = f"{config.ranks} ranks, each with up to {cut_into}"
    elif config.auto:
        cut_into = "microbatches whose size the first steps find"
    elif config.ragged:
        cut_into = f"microbatches as large as {config.microbatch_size} of its longest"
    elif config.microbatches == 1:
        cut_into = "one microbatch"
    elif batch % config.microbatch_size:
        cut_into += f" (the last of {batch % config.microbatch_size})"
    grid.add_row("batch", Text.assemble((f"{batch:,}", ACCENT), " samples a step = ", (cut_into, ACCENT)))
    grid.add_row("model", f"{config.parameters:,} parameters, {config.precision}")
    grid.add_row("device", config.device_name)
    if config.shard != "none":
        grid.add_row("sharded", f"{_SHARDED[config.shard]}; {_SYNC[config.sync]}")
    limit = (
        "what the device has"
        if config.memory_budget is None
        else f"at most {format_bytes(config.memory_budget)} for a step"
    )
    kept = "; freed memory is kept for the next step" if config.device.type == "cpu" and heap_is_kept() else ""
    grid.add_row("memory", limit + kept)
    held_out = f", {config.validation_samples:,} held out" if config.validation_samples else ""
    grid.add_row("data", f"{config.samples:,} samples{held_out}" if config.samples else f"a stream{held_out}")
    passes = f" = {config.epochs:.3g} epochs" if config.samples else ""
    grid.add_row("length", f"{config.steps:,} steps{passes}, {_schedule(config)}")
    grid.add_row("run", Text(str(event.path)))
    if event.step:
        grid.add_row("resumed", Text(f"after step {event.step}", style=GOOD))
    return _framed(grid, title=config.job, color="cyan")


def step_line(metrics: Mapping[str, Any], *, config: RunConfig, rate: float, width: int | None = None) -> Text:
    """Write one line about a step.

    Args:
        metrics: Its line of metrics.
        config: The run's configuration.
        rate: Units a second, smoothed.
        width: Columns that there are; `None` for a file, which has no width.

    Returns:
        The line; where it does not fit, without its last figures.
    """
    fields = [
        Text.assemble(("step ", QUIET), f"{metrics['step']:>{len(str(config.steps))}}"),
        Text.assemble(("loss ", QUIET), f"{metrics['loss']:.4f}"),
    ]
    for name, value in metrics.get("validation", {}).items():
        label = "validation" if name == "loss" else name
        fields.append(Text.assemble((f"{label} ", QUIET), (f"{value:.4f}", ACCENT)))
    fields += [Text(f"{rate:,.0f} {config.unit}/s"), Text.assemble(("lr ", QUIET), f"{metrics['lr']:.2e}")]
    if "comm_bytes" in metrics:
        fields.append(Text.assemble(("sent ", QUIET), format_bytes(metrics["comm_bytes"])))
    if "sync" in metrics:
        fields.append(Text.assemble(("sync ", QUIET), metrics["sync"]))
    while width is not None and len(fields) > 2 and Text("  ").join(fields).cell_len > width:
        fields.pop()
    return Text("  ").join(fields)


def cells(done: int, microbatches: int) -> str:
    """Draw how far a window is.

    Args:
        done: Microbatches that are through.
        microbatches: Microbatches in the window.

    Returns:
        One cell for each microbatch, or for several where there are many.

    Example:
        >>> cells(3, 8)
        '■■■□□□□□'
    """
    width = min(microbatches, _MOST_CELLS)
    full = done * width // microbatches
    return "■" * full + "□" * (width - full)


def stop_text(signal: str) -> str:
    """Say what happens after a signal.

    Args:
        signal: Its name.

    Returns:
        A sentence.
    """
    again = "; Ctrl-C again stops at once" if signal == "SIGINT" else ""
    return f"{signal}: this step's window is finished first, then a checkpoint is written{again}"


def summary_view(summary: Mapping[str, Any]) -> Group:
    """Lay out what came of a run.

    Args:
        summary: As in ``summary.json``.

    Returns:
        Something for a console.
    """
    grid = _grid()
    grid.add_row("steps", f"{summary['step']:,} of {summary['steps']:,} in {duration(summary['seconds'])}")
    for name, value in summary["validation"].items():
        grid.add_row(
            Text("validation loss" if name == "loss" else f"validation {name}"), Text(_figure(value), style=GOOD)
        )
    if summary.get("best") is not None and summary["best"]["step"] != summary["step"]:
        grid.add_row("best", best_text(summary))
    if not summary["validation"]:
        grid.add_row("loss", Text(_figure(summary["loss"]), style=GOOD))
    for name, value in summary["facts"].items():
        grid.add_row(Text(name), _figure(value))
    if summary["peak_bytes"] is not None:
        of = "" if summary["memory_budget"] is None else f" of the {format_bytes(summary['memory_budget'])} allowed"
        grid.add_row("peak memory", f"{format_bytes(summary['peak_bytes'])}{of}")
    if (said := summary.get("communication")) is not None:
        grid.add_row("communication", f"{format_bytes(said['bytes'])} from each rank in {said['calls']} calls a step")
    finished = summary["finished"]
    early = " early" if summary.get("stopped_early") else ""
    title = f"finished{early}" if finished else f"stopped by {summary['stopped_by']}"
    parts: list[RenderableType] = [_framed(grid, title=title, color="green" if finished else "yellow")]
    if summary["comparison"] is not None:
        found = summary["comparison"]
        notes = [Padding(Text(note, style=WARN), (0, 2)) for note in found["notes"]]
        parts += [Text(), _Comparison(found), *notes]
    if summary["text"]:
        parts += [Text(), _framed(Text(summary["text"].rstrip()), title="in its own words", color="bright_black")]
    return Group(*parts, Text(), Padding(_closing(summary), (0, 2)))


def best_text(summary: Mapping[str, Any]) -> Text:
    """Describe the best validation of a run, and where its checkpoint is.

    Args:
        summary: As in ``summary.json``, with a best validation.

    Returns:
        One line.
    """
    best = summary["best"]
    name = best["score"].partition(":")[2]
    return Text.assemble((f"{name} {best['value']:.4f}", GOOD), f" at step {best['step']:,}, in {best['checkpoint']}")


class _Comparison:
    """A table of what was measured on the first batch; on a narrow screen, without the ratios."""

    def __init__(self, found: Mapping[str, Any]) -> None:
        self._found = found

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        """Yield the table that fits."""
        wide = _comparison_table(self._found, ratios=True)
        fits = Measurement.get(console, options.update(width=_ANY_WIDTH), wide).maximum <= options.max_width
        yield wide if fits else _comparison_table(self._found, ratios=False)


def _comparison_table(found: Mapping[str, Any], *, ratios: bool) -> Table:
    ways = {
        "accumulated": "microbatches",
        "whole": "whole batch",
        "hand_written": "written by hand" if ratios else "by hand",
    }
    title = f"measured on the first batch, {found['samples']} samples in {found['microbatches']} microbatches"
    table = Table(
        box=box.SIMPLE_HEAD,
        title=title,
        title_justify="left",
        title_style="default",
        pad_edge=False,
        padding=(0, 1, 0, 0),
    )
    table.add_column(style=QUIET, no_wrap=True)
    for key, label in ways.items():
        style = ACCENT if key == "accumulated" else "bold"
        table.add_column(label, justify="right", header_style=style, no_wrap=True)
    errors = [_error(found[key]["relative_error"]) for key in ways]
    if found["accumulated"]["relative_error"] is not None:
        errors[list(ways).index("whole")] = "reference"
    table.add_row("gradient error", *errors)
    for label, key, write in (("peak memory", "peak_bytes", format_bytes), ("time per step", "seconds", format_time)):
        whole = found["whole"][key] if ratios else None
        table.add_row(label, *(_against(found[way][key], whole, write) for way in ways))
    return table


def _closing(summary: Mapping[str, Any]) -> Text:
    if summary["finished"]:
        return Text.assemble(("everything of this run is in ", QUIET), summary["run"])
    return Text.assemble(
        ("go on from step ", QUIET), f"{summary['step']}", (" with  ", QUIET), (resume_command(summary["run"]), ACCENT)
    )


def _framed(content: RenderableType, *, title: str, color: str) -> Panel:
    return Panel(content, title=Text(title, style="bold"), title_align="left", box=box.ROUNDED, border_style=color)


def _grid() -> Table:
    grid = Table.grid(padding=(0, 2))
    grid.add_column(style=QUIET)
    grid.add_column(overflow="fold")
    return grid


def _schedule(config: RunConfig) -> str:
    if config.schedule == "job":
        return "the job's own schedule"
    warmup = f"{config.warmup_steps} of warm-up, then " if config.warmup_steps else ""
    return f"{warmup}{config.schedule} from {config.learning_rate:g}"


def _error(value: float | None) -> str:
    return "—" if value is None else f"{value:.1e}" if value < 0.001 else f"{value:.1%}"


def _against(value: float | None, reference: float | None, write: Callable[[Any], str]) -> str:
    if value is None:
        return "—"
    ratio = f"  {value / reference:.2f}×" if reference else ""
    return f"{write(value)}{ratio}"


def _figure(value: float | None) -> str:
    return "not finite" if value is None else f"{value:.4f}"
