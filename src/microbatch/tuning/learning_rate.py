"""What a range test found: a learning rate, the curve behind it, and how sure it is."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from microbatch.tuning.range_curve import RateCurve
from microbatch.tuning.range_figure import draw, svg

_ROWS = 16
"""Rows of a printed table, at most, beside those that are marked."""


@dataclass(frozen=True, slots=True, kw_only=True)
class RangeStep:
    """Report one step of a range test.

    Attributes:
        sweep: Index of the pass over the rates, from 0.
        sweeps: Passes that are planned.
        step: Steps of this pass, this one included.
        steps: Steps of a pass that does not diverge.
        rate: Learning rate of this step.
        loss: Loss before this step.
    """

    sweep: int
    sweeps: int
    step: int
    steps: int
    rate: float
    loss: float


@dataclass(frozen=True, slots=True, kw_only=True)
class LearningRate:
    """Hold the result of a range test; print it, or read ``suggested``.

    A rate is that of the first parameter group of the first optimizer, as ``microbatch train --lr`` takes it. The
    other groups go in proportion to their own rates.

    Attributes:
        suggested: The rate to use; `None` where the curve says nothing.
        steepest: Rate at which the loss falls most.
        valley: Rate in the middle of the longest descent.
        minimum_tenth: A tenth of the rate with the lowest loss.
        diverged_at: The rate from which the loss grew without end, in the run where that came first; `None` if no run
            diverged.
        given: The rate that the optimizer had.
        curve: The loss at every rate.
        batch_size: Effective batch, in samples.
        microbatch_size: Samples that went through the model at once.
        steps: Optimizer steps that were taken, of all runs.
        seconds: Time that the test took.
        words: What was found, and how sure it is.
    """

    suggested: float | None
    steepest: float | None
    valley: float | None
    minimum_tenth: float | None
    diverged_at: float | None
    given: float
    curve: RateCurve
    batch_size: int
    microbatch_size: int
    steps: int
    seconds: float
    words: Sequence[str] = field(default_factory=tuple[str, ...])

    @property
    def marks(self) -> Mapping[str, float]:
        """The rates that have a name, by name; those that were not found are left out."""
        named = {
            "suggested": self.suggested,
            "steepest": self.steepest,
            "valley": self.valley,
            "minimum / 10": self.minimum_tenth,
            "given": self.given or None,
            "diverged": self.diverged_at,
        }
        return {name: rate for name, rate in named.items() if rate is not None}

    def as_dict(self) -> dict[str, Any]:
        """Convert the result to plain values.

        Returns:
            What `json` can write; a loss that is not finite is `None`.
        """
        curve = self.curve
        return {
            "suggested": self.suggested,
            "steepest": self.steepest,
            "valley": self.valley,
            "minimum_tenth": self.minimum_tenth,
            "diverged_at": self.diverged_at,
            "given": self.given,
            "curve": {
                "rates": list(curve.rates),
                "smoothed": list(curve.smoothed),
                "spread": list(curve.spread),
                "losses": [[loss if math.isfinite(loss) else None for loss in run] for run in curve.losses],
            },
            "batch_size": self.batch_size,
            "microbatch_size": self.microbatch_size,
            "steps": self.steps,
            "seconds": self.seconds,
            "words": list(self.words),
        }

    def table(self) -> str:
        """Write some of the curve as a table, with the rates that have a name.

        Returns:
            Lines of at most 72 characters: rate, loss, spread over the runs, names.
        """
        curve = self.curve
        count = len(curve.rates)
        shown = {round(index * (count - 1) / max(1, _ROWS - 1)) for index in range(_ROWS)} if count else set[int]()
        rows = [(curve.rates[i], f"{curve.smoothed[i]:>#11.5g}{curve.spread[i]:>#11.2g}", "") for i in shown]
        rows += [(rate, f"{'':>22}", f"  < {name}") for name, rate in self.marks.items()]
        rows.sort(key=lambda row: row[0])
        lines = [f"{'rate':>9}{'loss':>11}{'spread':>11}"]
        lines += [f"{rate:>9.3g}{numbers}{name}".rstrip() for rate, numbers, name in rows]
        return "\n".join(lines)

    def __str__(self) -> str:
        sentences = "\n".join(f"- {sentence}" for sentence in self.words)
        return f"{self.table()}\n\n{sentences}"

    def svg(self) -> str:
        """Draw the curve as an SVG document.

        Returns:
            The document.

        Raises:
            MissingDependencyError: matplotlib is not installed.
        """
        return svg(self.curve, self.marks)

    def draw(self, path: str | Path) -> None:
        """Draw the curve into a file.

        Args:
            path: The file; its name ends with .svg or .png.

        Raises:
            ConfigError: It ends with something else.
            MissingDependencyError: matplotlib is not installed.
            OSError: The file cannot be written.
        """
        draw(self.curve, self.marks, path=Path(path))
