"""Show on a terminal what a command is doing, how far it is, and the time left."""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from types import TracebackType
from typing import Self

from rich.console import Console, ConsoleOptions, RenderResult
from rich.live import Live
from rich.text import Text

_LEAST_BAR = 10
_SOON = 1.0
_NO_WIDTH = 10_000


def duration(seconds: float) -> str:
    """Write a time for people.

    Args:
        seconds: At least 0.

    Returns:
        Seconds, or minutes and seconds, with hours where there are any.

    Example:
        >>> duration(2.34), duration(75), duration(3675)
        ('2.3 s', '1:15', '1:01:15')
    """
    if seconds < 10:
        return f"{seconds:.1f} s"
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{rest:02}" if hours else f"{minutes}:{rest:02}"


def output_console(*, color: bool) -> Console:
    """Make the console for what a command found.

    Args:
        color: Whether colours may be used.

    Returns:
        A console on standard output, as wide as the terminal or as ``COLUMNS``; a file has no width.
    """
    made = Console(no_color=None if color else True, highlight=False)
    if not made.is_terminal and "COLUMNS" not in os.environ:
        made.width = _NO_WIDTH
    return made


@dataclass(slots=True)
class ProgressLine:
    """One line with a bar as wide as its fields leave room for.

    Attributes:
        head: What stands before the bar.
        share: How much is done, from 0 to 1; `None` for no bar.
        fields: What stands behind the bar.
        spare: Places of the fields that are left out on a narrow screen, in that order.
    """

    head: Text
    share: float | None = None
    fields: Sequence[Text] = ()
    spare: Sequence[int] = ()

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        """Yield the line for a console."""
        yield self.text(options.max_width)

    def text(self, width: int) -> Text:
        """Write the line.

        Args:
            width: Columns of the screen.

        Returns:
            A line that is not wider.
        """
        kept = dict(enumerate(self.fields))
        least = 0 if self.share is None else _LEAST_BAR
        for place in (*self.spare, *reversed(range(len(self.fields)))):
            if self._wide(kept) + least <= width:
                break
            kept.pop(place, None)
        parts = [self.head, *(each for each in kept.values() if each.cell_len)]
        if self.share is not None and (room := width - self._wide(kept)) >= 1:
            done = round(room * min(1.0, self.share))
            parts.insert(1, Text.assemble(("━" * done, "cyan"), ("━" * (room - done), "bright_black")))
        line = Text("  ") + Text("  ").join(parts)
        line.truncate(width)
        return line

    def _wide(self, kept: dict[int, Text]) -> int:
        """Return the columns that everything but the bar takes, with the spaces around the bar."""
        bar = 0 if self.share is None else 2
        return 2 + self.head.cell_len + bar + sum(2 + each.cell_len for each in kept.values() if each.cell_len)


class Waiting:
    """Show a line on a terminal while a command works; nothing where the output is a file or for programs.

    Use it as a context manager. Nothing is shown by the processes of ``torchrun``, except for the first one.
    """

    def __init__(self, *, as_json: bool, color: bool) -> None:
        """Prepare the line.

        Args:
            as_json: Whether standard output is for programs.
            color: Whether colours may be used.
        """
        # On a terminal, words are not cut at its edge; in a file, a message is one line.
        self.console = Console(stderr=True, no_color=None if color else True, highlight=False)
        self.console.soft_wrap = not self.console.is_terminal
        self.stdout = sys.stdout
        self._line = ProgressLine(Text())
        self._text, self._since = "", time.monotonic()
        self._live: Live | None = None
        if self.console.is_terminal and not as_json and os.environ.get("RANK", "0") == "0":
            self._live = Live(
                console=self.console,
                get_renderable=self._drawn,
                transient=True,
                refresh_per_second=2,  # drawn rarely: some commands measure time
                redirect_stdout=sys.stdout.isatty(),
            )

    def __enter__(self) -> Self:
        """Start.

        Returns:
            Itself.
        """
        if self._live is not None:
            self._live.start(refresh=True)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Take the line away."""
        self.end()

    def end(self) -> None:
        """Take the line away."""
        if self._live is not None:
            self._live.stop()
            self._live = None

    def __call__(self, text: str, share: float | None = None, *, detail: str = "") -> None:
        """Change the line.

        Args:
            text: What the command is doing.
            share: How much of it is done, from 0 to 1; `None` where nobody knows.
            detail: Figures, left out on a narrow screen.
        """
        first = text != self._text
        if first:
            self._text = text
        if self._line.share is None and share is not None:
            self._since = time.monotonic()
        self._line = ProgressLine(Text(text), share, [Text(detail)])
        if first and self._live is not None:
            self._live.refresh()

    def _drawn(self) -> ProgressLine:
        line, passed = self._line, time.monotonic() - self._since
        told = f"{duration(passed)}" if passed >= _SOON else ""
        if line.share:
            told = f"{duration(passed * (1 - line.share) / line.share)} left" if passed >= _SOON else ""
        return ProgressLine(line.head, line.share, [*line.fields, Text(told, style="dim")], spare=(0,))
