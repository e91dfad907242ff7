"""Ctrl-C at a chosen line of a step: the handler is called there, with the interrupted frame, as Python does it."""

from __future__ import annotations

import ast
import signal
import sys
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from types import FrameType
from typing import Any, Self

import microbatch as mb
from microbatch.interrupts import interrupts_here

from .kinds import Job, differences, make

OURS = str(Path(mb.__file__).parent)


class Interrupting:
    """Signal at the n-th line of the package that runs inside the block; count the lines.

    Args:
        at: The line; -1 for none.
        raising: Raise KeyboardInterrupt at the line itself instead, as no signal does: in postponed parts too.
    """

    def __init__(self, at: int, *, raising: bool = False) -> None:
        self.at, self.raising, self.lines, self.where = at, raising, 0, ""
        self.places: dict[tuple[str, int], list[int]] | None = None

    def __enter__(self) -> Self:
        """Begin to trace."""
        sys.settrace(self._call)
        return self

    def __exit__(self, *error: object) -> None:
        """Trace no more."""
        sys.settrace(None)

    def _call(self, frame: FrameType, event: str, arg: object) -> Any:
        return self._enter if frame.f_code.co_filename.startswith(OURS) else None

    def _enter(self, frame: FrameType, event: str, arg: object) -> Any:
        if event == "line":
            if self.places is not None:
                self.places.setdefault((frame.f_code.co_filename, frame.f_lineno), []).append(self.lines)
            self.lines += 1
            if self.lines - 1 == self.at and self.raising and _swallows(frame):
                self.at += 1
            elif self.lines - 1 == self.at:
                sys.settrace(None)
                self.where = f"{frame.f_code.co_filename.removeprefix(OURS)}:{frame.f_lineno} {frame.f_code.co_name}"
                if self.raising:
                    raise KeyboardInterrupt
                handler: Any = signal.getsignal(signal.SIGINT)
                handler(signal.SIGINT, frame)  # as Python calls it between two lines
        return self._enter


def _swallows(frame: FrameType | None) -> bool:
    """Return whether a finalizer is running, whose errors Python reports and then forgets."""
    while frame is not None and frame.f_code.co_name != "__del__":
        frame = frame.f_back
    return frame is not None


@dataclass
class Outcome:
    """What an interrupt at one line led to."""

    line: int
    where: str
    outcome: str
    left: list[str]
    next: str

    @property
    def wrong(self) -> bool:
        """Whether the law is broken."""
        return self.outcome not in {"before", "after"} or self.next != ""


def interrupted(kind: str, line: int, *, before: Any, after: Any, raising: bool = False) -> Outcome:
    """Interrupt a step at a line, and look at what is left; then take the step again, or the next one."""
    job, handler = make(kind), signal.default_int_handler
    signal.signal(signal.SIGINT, handler)  # a shell may have started the tests without one
    ended = "no interrupt"
    trace = Interrupting(line, raising=raising)
    try:
        with trace:
            job.step()
    except KeyboardInterrupt:
        ended = ""
    except BaseException as error:  # noqa: BLE001 - what is not to happen
        ended = f"{type(error).__name__}: {error}"
    now = job.state()
    old, new = differences(before, now), differences(after, now)
    outcome = ended or ("before" if not old else "after" if not new else "mixed")
    # An error of no signal, at the very line that puts the handler back, leaves that to the next step.
    put_back = raising or signal.getsignal(signal.SIGINT) is handler
    told = _next(job, again=not old, after=after, handler=handler) if put_back else "the handler was not put back"
    return Outcome(line, trace.where, outcome, min(old, new, key=len), told)


def at_ends(kind: str) -> list[Outcome]:
    """Interrupt a step of a kind at the first and the last line of each ``with`` statement that it goes through."""
    job, places = make(kind), dict[tuple[str, int], list[int]]()
    before = job.state()
    with Interrupting(-1) as trace:
        trace.places = places
        job.step()
    after, ends = job.state(), dict[str, set[int]]()
    for file, _ in places:
        if file not in ends:
            tree = ast.parse(Path(file).read_text("utf-8"))
            ends[file] = {each.lineno for each in ast.walk(tree) if isinstance(each, ast.With)}
    # Python comes back to the line of the statement to leave its context.
    lines = [line for (file, at), seen in places.items() if at in ends[file] for line in {*seen[:2], *seen[-2:]}]
    return [interrupted(kind, line, before=before, after=after) for line in lines]


def _next(job: Job, *, again: bool, after: Any, handler: Any) -> str:
    try:
        job.step()
    except BaseException as error:  # noqa: BLE001 - what is not to happen
        return f"{type(error).__name__}: {error}"
    if signal.getsignal(signal.SIGINT) is not handler:
        return "the handler was not put back by the next step"
    if interrupts_here().held:
        return "signals wait after the next step"
    return ", ".join(differences(after, job.state())) if again else ""


def sweep(kind: str, *, stride: int, last: int | None = None, raising: bool = False) -> tuple[int, list[Outcome]]:
    """Interrupt a step of a kind at some lines, or at some of the last ones; return the number of lines too."""
    job = make(kind)
    before = job.state()
    with Interrupting(-1) as count:
        job.step()
    after = job.state()
    lines: Iterable[int] = range(0 if last is None else count.lines - last, count.lines, stride)
    return count.lines, [interrupted(kind, line, before=before, after=after, raising=raising) for line in lines]
