"""What the doctor says about a loop: one finding, its place, how sure it is, and what to change."""

from dataclasses import dataclass, field
from typing import Literal

__all__ = ["Confidence", "Edit", "Finding"]

Confidence = Literal["certain", "depends", "note"]


@dataclass(frozen=True)
class Edit:
    """Replace the lines `first` to `last` (1-based, both included) of the file by `text`.

    `last = first - 1` inserts before the line `first`. The text ends with a newline, or is empty to delete.
    """

    first: int
    last: int
    text: str


@dataclass(frozen=True, kw_only=True)
class Finding:
    """One fault of one loop.

    `certain` means that it happens in every setting that the file allows; `depends` that `needs` decides; `note` that
    the doctor could not judge (MB000 to MB002), or that a suppression is not used (MB003).

    Attributes:
        rule: The rule's code, such as "MB105".
        path: The file as it was given; "<stdin>" or "<source>" for text.
        line: The 1-based line of the statement at fault. In a notebook: the line inside its cell.
        column: The 1-based column.
        confidence: How sure it is.
        message: One line, with the numbers of the simulation.
        happens: What happens, in sentences.
        how_much: What it changes, by the optimizer that the file uses.
        fix: What to do, in one sentence.
        needs: What decides, where it depends: settings and lengths, in the words of the file.
        edits: The lines to change, where the change is safe; in a notebook, lines of its code cells joined. Empty
            otherwise.
        window: The simulated windows as text: which microbatches enter which step, with their weights. May be empty.
        function: The function that holds the statement; empty at the top level of the file.
        cell: The 1-based code cell of a notebook; `None` for a script.
        microbatches: The window size of the simulation that showed it, 0 where no simulation is behind it.
    """

    rule: str
    path: str
    line: int
    column: int
    confidence: Confidence
    message: str
    happens: str = ""
    how_much: str = ""
    fix: str = ""
    needs: tuple[str, ...] = ()
    edits: tuple[Edit, ...] = field(default=(), repr=False)
    window: str = field(default="", repr=False)
    function: str = ""
    cell: int | None = None
    microbatches: int = 0
