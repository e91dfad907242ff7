"""Draw a sweep: loss against samples, steps and time, and steps against samples with the fitted law."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from microbatch.tuning.figure_file import check_figure, drawn
from microbatch.tuning.sweep_records import BatchResult, CurvePoint, SweepRun
from microbatch.tuning.sweep_result import Sweep

_COLORS = ("#0b7285", "#c2410c", "#5f3dc4", "#2b8a3e", "#a61e4d", "#495057", "#e67700", "#1864ab")


def draw(sweep: Sweep, file: Path) -> None:
    """Draw a sweep.

    Args:
        sweep: The result.
        file: Where the figure is written; its suffix says whether as SVG or PNG.

    Raises:
        ConfigError: The name does not end with ``.svg`` or ``.png``.
        MissingDependencyError: matplotlib is not installed.
    """
    check_figure(file)
    style = {"font.size": 9, "axes.spines.top": False, "axes.spines.right": False}
    with drawn(file, kind=file.suffix[1:], size=(10, 7), style=style) as figure:
        (one, two), (three, four) = figure.subplots(2, 2)
        _curves(one, sweep, name="samples", at=lambda _, point: point.samples)
        _curves(two, sweep, name="steps", at=lambda _, point: point.steps)
        _curves(
            three, sweep, name="seconds of steps", at=lambda run, point: (run.seconds_per_sample or 0.0) * point.samples
        )
        _law(four, sweep)
        one.legend(title="batch", frameon=False)


def _colors(batches: Sequence[BatchResult]) -> dict[int, str]:
    return {each.batch_size: _COLORS[index % len(_COLORS)] for index, each in enumerate(batches)}


def _curves(axes: Any, sweep: Sweep, *, name: str, at: Callable[[SweepRun, CurvePoint], float]) -> None:
    """Draw the loss of every run; runs of a beaten learning rate are pale."""
    colors, named = _colors(sweep.batches), set[int]()
    rates = {each.batch_size: each.learning_rate for each in sweep.batches}
    for run in sweep.runs:
        chosen = run.learning_rate == rates[run.batch_size]
        label = f"{run.batch_size:,}" if chosen and run.batch_size not in named else None
        if chosen:
            named.add(run.batch_size)
        axes.plot(
            [at(run, point) for point in run.curve],
            [point.loss for point in run.curve],
            color=colors[run.batch_size],
            alpha=0.9 if chosen else 0.2,
            linewidth=1.2,
            label=label,
        )
    if sweep.target is not None:
        axes.axhline(sweep.target, color="#868e96", linewidth=0.8, linestyle="--")
    axes.set(xlabel=name, ylabel=sweep.measure, xscale="log")


def _law(axes: Any, sweep: Sweep) -> None:
    """Draw what each seed took to the target, and the fitted law."""
    colors = _colors(sweep.batches)
    rates = {each.batch_size: each.learning_rate for each in sweep.batches}
    for run in sweep.runs:
        way = None if sweep.target is None else run.to_target(sweep.target)
        if way is not None and run.learning_rate == rates[run.batch_size] and run.well:
            axes.plot(way[0], way[1], marker="o", linestyle="none", color=colors[run.batch_size])
    fit, sizes = sweep.critical, [float(each.batch_size) for each in sweep.batches if each.samples is not None]
    if fit is not None:
        low, high = min(sizes) / 2, max(sizes) * 2
        batches = [low * (high / low) ** (index / 40) for index in range(41)]
        samples = [fit.expected_samples(batch) for batch in batches]
        axes.plot([s / b for s, b in zip(samples, batches, strict=True)], samples, color="#495057", linewidth=1)
        if fit.found:
            axes.set_title(f"critical batch size {fit.batch_size:,.3g} ({fit.low:,.3g} to {fit.high:,.3g})")
    axes.set(xlabel="steps to the target", ylabel="samples to the target", xscale="log", yscale="log")
