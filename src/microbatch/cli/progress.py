"""Output for people, as the run goes: a live line on a terminal, a few plain lines elsewhere."""

from __future__ import annotations

import os
from collections.abc import Mapping
from types import TracebackType
from typing import Any, Self

from rich.console import Console
from rich.live import Live
from rich.table import Table
from rich.text import Text

from microbatch.cli.run_views import (
    QUIET,
    WARN,
    cells,
    memory_text,
    plan_text,
    plan_view,
    step_line,
    stop_text,
    summary_view,
    sync_text,
)
from microbatch.cli.waiting import ProgressLine, duration
from microbatch.memory.budget import format_bytes
from microbatch.step.events import BudgetPassed, MicrobatchDone, PlanChosen, Retry, SizeChanged, SyncChosen
from microbatch.train.run_config import RunConfig
from microbatch.train.run_events import (
    Comparing,
    Notice,
    RunEnded,
    RunEvent,
    RunPlanned,
    StepLogged,
    Stopping,
)


class Screen:
    """Show a run as it goes: a live line on a terminal, a few plain lines elsewhere.

    Use it as a context manager, which puts the terminal back however the run ends.
    """

    def __init__(self, console: Console) -> None:
        """Draw on a console.

        Args:
            console: Where; its own settings decide about colours and width.
        """
        self._console = console
        self._config: RunConfig | None = None
        self._live: Live | None = None
        self._line = ProgressLine(Text())
        self._done, self._drawn_cells = 0, ""
        self._figures: tuple[Text, ...] = ()
        self._peak: int | None = None
        self._rate: float | None = None
        self._seconds: float | None = None
        self._last_line = 0

    def __enter__(self) -> Self:
        """Start.

        Returns:
            Itself.
        """
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Take the live line away."""
        self._end_progress()

    def __call__(self, event: RunEvent) -> None:
        """Show one event.

        Args:
            event: What happened.
        """
        match event:
            case RunPlanned():
                self._plan(event)
            case MicrobatchDone():
                self._microbatch(event)
            case Retry() | SizeChanged() | BudgetPassed():
                self._say("memory", memory_text(event))
            case PlanChosen():
                self._say("plan", plan_text(event))
            case SyncChosen():
                self._say("sync", sync_text(event))
            case StepLogged():
                self._step(event.metrics)
            case Notice():
                self._say("note", event.text)
            case Stopping():
                self._say("stopping", stop_text(event.signal))
            case Comparing():
                self._end_progress()
                self._line = ProgressLine(Text("measuring the first batch against the full batch", style=QUIET))
                self._start_line(refresh_per_second=1)  # drawn rarely: what is measured now is time
            case RunEnded():
                self._end_progress()
                self._console.print(summary_view(event.summary))
            case _:
                pass

    def _plan(self, event: RunPlanned) -> None:
        self._config = event.config
        self._last_line = event.step
        self._console.print(plan_view(event))
        self._done = event.step
        self._draw()
        self._start_line(refresh_per_second=8)

    def _start_line(self, *, refresh_per_second: float) -> None:
        if self._console.is_terminal:
            self._live = Live(
                console=self._console,
                get_renderable=lambda: self._line,
                transient=True,
                refresh_per_second=refresh_per_second,
            )
            self._live.start(refresh=True)

    def _draw(self) -> None:
        """Put the line together; the peak, the cells and the rate are left out first on a narrow screen."""
        if self._config is not None:
            head = Text.assemble((f"{self._done}", "bold"), f"/{self._config.steps}")
            fields = (Text(self._drawn_cells, style="cyan"), *self._figures)
            self._line = ProgressLine(head, self._done / self._config.steps, fields, spare=(4, 0, 2))

    def _microbatch(self, event: MicrobatchDone) -> None:
        if self._live is not None and event.microbatches is not None:
            self._drawn_cells = self._cells(event.index + 1, event.microbatches)
            self._draw()

    def _cells(self, done: int, microbatches: int) -> str:
        """Keep the width of a whole batch, so that an epoch's short batch does not move the line about."""
        whole = self._config.microbatches if self._config is not None else microbatches
        return cells(done, microbatches).ljust(len(cells(0, whole)))

    def _step(self, metrics: Mapping[str, Any]) -> None:
        config = self._config
        if config is None:
            return
        self._peak = max(self._peak or 0, metrics["peak_bytes"] or 0) or None
        # Steps differ in length, so what is shown is smoothed; the metrics file has the exact figures.
        self._rate = _smooth(self._rate, metrics["per_second"])
        self._seconds = _smooth(self._seconds, metrics["seconds"])
        step = metrics["step"]
        if self._live is not None:
            self._done = step
            self._figures = (
                Text.assemble(("loss ", QUIET), (f"{metrics['loss']:.3f}", "bold")),
                Text(f"{self._rate:,.0f} {config.unit}/s"),
                Text(f"{duration((config.steps - step) * self._seconds)} left", style=QUIET),
                Text("" if self._peak is None else f"peak {format_bytes(self._peak)}", style=QUIET),
            )
            self._draw()
        if not metrics["applied"]:
            self._say("note", f"step {step} was dropped: its gradient is not finite")
        spacing = max(1, config.steps // 10)
        if "validation" in metrics or step - self._last_line >= spacing or step == config.steps:
            self._last_line = step
            width = self._width
            line = step_line(metrics, config=config, rate=self._rate, width=None if width is None else width - 2)
            self._console.print(Text("  ") + line, soft_wrap=True)

    @property
    def _width(self) -> int | None:
        """Return the columns of a terminal, or those that the user names; `None` for a file."""
        return self._console.width if self._console.is_terminal or "COLUMNS" in os.environ else None

    def _say(self, label: str, text: str) -> None:
        """Print a line; where it is too long, break it between words, below its own beginning."""
        line = Text.assemble("  ", (f"{label}  ", WARN), text)
        if self._width is None or line.cell_len <= self._width:
            self._console.print(line, soft_wrap=True)
            return
        grid = Table.grid(padding=(0, 2, 0, 0))
        grid.add_row("", Text(label, style=WARN), Text(text))
        self._console.print(grid)

    def _end_progress(self) -> None:
        if self._live is not None:
            self._live.stop()
            self._live = None


def _smooth(before: float | None, now: float) -> float:
    return now if before is None else 0.9 * before + 0.1 * now
