"""Draw the curve of a range test."""

from __future__ import annotations

import io
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from microbatch.tuning.figure_file import check_figure, drawn
from microbatch.tuning.range_curve import RateCurve

_COLORS = {"suggested": "#0b7285", "diverged": "#c92a2a"}
_OTHER, _RUN = "#5c6b75", "#a5b4bd"


def svg(curve: RateCurve, marks: Mapping[str, float]) -> str:
    """Draw a curve as an SVG document.

    Args:
        curve: The curve.
        marks: Rates to mark, by name.

    Returns:
        The document; the same curve gives the same text.
    """
    file = io.StringIO()
    _save(curve, marks, file, kind="svg")
    return file.getvalue()


def draw(curve: RateCurve, marks: Mapping[str, float], *, path: Path) -> None:
    """Draw a curve into a file.

    Args:
        curve: The curve.
        marks: Rates to mark, by name.
        path: The file, whose name ends with .svg or .png.

    Raises:
        ConfigError: It ends with something else.
    """
    check_figure(path)
    _save(curve, marks, path, kind=path.suffix[1:])


def _save(curve: RateCurve, marks: Mapping[str, float], file: Any, *, kind: str) -> None:
    with drawn(file, kind=kind, size=(7.2, 4.0), style={"svg.fonttype": "none"}) as figure:
        axes = figure.subplots()
        for run in curve.losses:
            losses = run[1 : len(curve.rates) + 1]
            axes.plot(curve.rates[: len(losses)], losses, color=_RUN, linewidth=0.6)
        low = [loss - wide for loss, wide in zip(curve.smoothed, curve.spread, strict=True)]
        high = [loss + wide for loss, wide in zip(curve.smoothed, curve.spread, strict=True)]
        axes.fill_between(curve.rates, low, high, color=_COLORS["suggested"], alpha=0.2, linewidth=0)
        axes.plot(curve.rates, curve.smoothed, color=_COLORS["suggested"], linewidth=2, label="smoothed loss")
        for name, rate in marks.items():
            style = "-" if name in _COLORS else ":"
            axes.axvline(rate, color=_COLORS.get(name, _OTHER), linestyle=style, linewidth=1)
            axes.annotate(
                f" {name}",
                (rate, 1.0),
                xycoords=("data", "axes fraction"),
                rotation=90,
                verticalalignment="top",
                fontsize=8,
                color=_COLORS.get(name, _OTHER),
            )
        axes.set_xscale("log")
        axes.set_xlabel("learning rate")
        axes.set_ylabel("loss after the step at this rate")
        if curve.smoothed:
            bottom, top = min(curve.smoothed), max(curve.smoothed[: len(curve.smoothed) // 2 + 1])
            room = (top - bottom) or abs(top) or 1.0
            axes.set_ylim(bottom - 0.2 * room, top + 0.6 * room)
        axes.spines[["top", "right"]].set_visible(False)
