"""The state of one simulation, which all parts of the machine share."""

from __future__ import annotations

import ast
from collections.abc import Callable
from typing import Any

from microbatch.linting.clearing import places_of_clearing
from microbatch.linting.module import Module
from microbatch.linting.slices import Slice
from microbatch.linting.trace import Trace
from microbatch.linting.values import Data

__all__ = ["Frame", "Run", "Simulated", "TooLongError"]


class TooLongError(Exception):
    """The run took more statements than it may."""


class Run:
    """One way to run: N, the length of the loader, and what unknown conditions come out as."""

    def __init__(
        self,
        microbatches: int,
        length: int,
        decisions: dict[str, bool] | None = None,
        *,
        skip: int = 0,
        epochs: int = 2,
    ) -> None:
        self.microbatches = microbatches
        self.decisions = dict(decisions or {})
        self.asked: dict[str, ast.AST] = {}
        self.epochs = epochs
        self._length, self._skip = length, skip
        self.reads_length = self.may_skip = False

    @property
    def length(self) -> int:
        """How many microbatches an epoch has; where no run reads it, all lengths are the same run."""
        self.reads_length = True
        return self._length

    @property
    def skip(self) -> int:
        """The microbatch that is skipped where the loop may skip one, counted from 1; 0 for none."""
        self.may_skip = True
        return self._skip

    def of_length(self, length: int) -> Run:
        """The same way to run, for another length that no run reads."""
        return Run(self.microbatches, length, self.decisions, epochs=self.epochs)


class Frame:
    """The names of one call."""

    __slots__ = ("at_yield", "declared", "feeds", "holder", "locals", "owner", "parent")

    def __init__(self, owner: str | None, parent: Frame | None = None, *, holder: str = "") -> None:
        self.locals: dict[str, Any] = {}
        self.owner = owner
        self.parent = parent
        self.holder = holder or owner or ""  # the object whose method runs
        self.at_yield: Callable[[Any], None] | None = (
            None  # what a context manager or a generator of the file runs around
        )
        self.feeds: Any = None  # the loop that a generator feeds
        self.declared: dict[str, str] = {}  # names that it calls "global" or "nonlocal"

    def find(self, name: str) -> Frame | None:
        """Find the frame that has a name: this one, or one around it."""
        frame: Frame | None = self
        while frame is not None and name not in frame.locals:
            frame = frame.parent
        return frame

    def frame_of(self, name: str, top: Frame) -> Frame:
        """Find the frame where an assignment keeps a name; `top` is that of the file."""
        said = self.declared.get(name)
        if said is None or self.parent is None:
            return self
        return top if said == "global" else self.parent.find(name) or self


class Simulated:
    """What every part of the machine works on.

    Args:
        module: The file.
        run: How to run it.
        relevant: What matters in the file; `None` runs all.
    """

    def __init__(self, module: Module, run: Run, relevant: Slice | None = None) -> None:
        self.module = module
        self.run = run
        self.relevant = relevant.statements if relevant is not None else None
        self.deciding = relevant.deciding if relevant is not None else None
        self.trace = Trace()
        self.heap: dict[str, Any] = {}
        self.rooted: set[str] = set()  # the first words of what the heap holds
        self.globals = Frame(None)
        self.frame = self.globals
        self.depth = 0
        self.active: list[str] = []
        self.spent = 0
        self.sync_off = self.without_graph = 0
        self.loop_depth = 0
        self.output: Data | None = None  # what a model returned last
        self.still_depth = 0  # loops around that run no backward
        self.used_window = False
        self.at_last = False
        self.now_and_then = False
        self.handling = 0  # inside of the handler of an exception
        self.settled: dict[tuple[ast.If, str], list[ast.stmt]] = {}  # branches of long chains, by what they compare
        self.made = 0
        self.begun: set[str] = set()  # classes of which an object was made
        self.summed: set[str] = set()  # names to which losses are added
        self.range_end: Any = None
        self.range_begins: dict[str, Any] = {}  # the first number of ranges whose end is not known
        self.moved: set[tuple[int, str]] = set()  # names for N that the loop itself sets, or that are a length
        self.objects: dict[str, int] = {}  # how many objects were made of each class
        self.window_names, self.window_literals = module.windows
        self.clearing = places_of_clearing(module)

    def __getattr__(self, name: str) -> Any:
        """Refuse a name that no part of the machine has.

        The parts of the machine call one another's methods, which only the machine has all of. This method lets a type
        checker accept these calls.

        Args:
            name: The name that was not found.

        Raises:
            AttributeError: Always; Python asks here only for what it did not find.
        """
        raise AttributeError(f"the simulation has no {name!r}")
