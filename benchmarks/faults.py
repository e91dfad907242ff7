"""Faults in steps of every kind: interrupts at every line, memory that ends, values of wrong kinds, and leaks.

``python -m benchmarks.faults --seconds 240`` goes through the faults in turn, each for an equal part of the time, and
writes what it counted to ``benchmarks/results/faults.json``. ``--leaks`` takes 5,000 steps of each kind instead, and
writes after each kind. Faults are listed by name; an empty list is the goal.

No fault lasts longer than 10 seconds: one that hangs is stopped, and listed with the line where it waited.
"""

from __future__ import annotations

import argparse
import gc
import json
import signal
import time
import zlib
from collections import Counter
from collections.abc import Generator, Iterable, Iterator
from contextlib import contextmanager
from itertools import cycle, takewhile
from pathlib import Path
from traceback import extract_tb
from typing import Any

import torch
from tests import wrong_values
from tests.interrupts import interrupted, sweep
from tests.kinds import KINDS, make
from tests.laws.test_memory_ends import outcome, states
from tests.leaks import LEAKS, STEPS, leaked

from benchmarks.machine import hardware, versions

OUT = Path(__file__).parent / "results" / "faults.json"
LONGEST = 10
"""Seconds that one fault may take, on a busy machine."""
_ENDS = ("plain", "unfused", "coupled", "momentum", "exact", "bfloat16", "checkpoint", "pooled")


def until(seconds: float, each: Iterable[Any]) -> Iterator[Any]:
    """Take one after the other until the time is over."""
    end = time.monotonic() + seconds
    return takewhile(lambda _: time.monotonic() < end, each)


class TooLong(BaseException):
    """A fault hangs. Not an Exception: nobody who handles errors handles this one."""


@contextmanager
def limited(wrong: dict[str, str], name: str) -> Generator[None]:
    """Stop what takes longer than a fault may take, and write down where it was."""

    def stop(*_: object) -> None:
        raise TooLong

    signal.signal(signal.SIGALRM, stop)
    signal.alarm(LONGEST)
    try:
        yield
    except TooLong as error:
        *_, last = [frame for frame in extract_tb(error.__traceback__) if frame.name != "stop"]
        wrong[name] = f"hangs at {Path(last.filename).name}:{last.lineno} {last.name}"
    finally:
        signal.alarm(0)


def interrupts(seconds: float) -> dict[str, Any]:
    """Interrupt steps of every kind at lines, one after the other."""
    signal.signal(signal.SIGINT, signal.default_int_handler)
    counted, wrong = Counter[str](), dict[str, str]()
    prepared: dict[str, tuple[int, Any, Any]] = {}
    for number, kind in until(seconds, enumerate(cycle(KINDS))):
        if kind not in prepared:
            lines, _ = sweep(kind, stride=1 << 30)
            job = make(kind)
            before = job.state()
            job.step()
            prepared[kind] = lines, before, job.state()
        lines, before, after = prepared[kind]
        line = spread(number, lines)
        with limited(wrong, f"{kind} at line {line}"):
            found = interrupted(kind, line, before=before, after=after)
            counted[found.outcome] += 1
            if found.wrong:
                wrong[f"{kind} at line {line}"] = str(found)
    lines_of = {kind: lines for kind, (lines, _, _) in prepared.items()}
    return {"lines": lines_of, "interrupted": counted.total(), "ended": dict(counted), "wrong": wrong}


def ends(seconds: float) -> dict[str, Any]:
    """End the memory at operators of steps."""
    counted, wrong = Counter[str](), dict[str, str]()
    prepared: dict[str, tuple[dict[str, Any], int]] = {}
    for number, kind in until(seconds, enumerate(cycle(_ENDS))):
        if kind not in prepared:
            prepared[kind] = states(kind)
        known, operators = prepared[kind]
        at = spread(number, operators)
        with limited(wrong, f"{kind} at operator {at}"):
            found = outcome(kind, at, known)
            counted[found] += 1
            if found not in {"small", "before", "said", "large"}:
                wrong[f"{kind} at operator {at}"] = found
    of = {kind: each[1] for kind, each in prepared.items()}
    return {"operators": of, "ended_at": counted.total(), "ended": dict(counted), "wrong": wrong}


def values(seconds: float) -> dict[str, Any]:
    """Make calls with values of wrong kinds: every call, or as many as the time lasts for, from all over the list."""
    made, found = 0, dict[str, str]()
    every = list(wrong_values.calls())
    every.sort(key=lambda call: zlib.crc32(call[0].encode("utf-8", "surrogatepass")))
    for name, call in until(seconds, every):
        made += 1
        with limited(found, name):
            if (told := wrong_values.raw(call)) is not None:
                found[name] = told
    return {"calls": made, "of": len(every), "raw": found}


def spread(number: int, of: int) -> int:
    """Return a place for each number, so that places are taken evenly: Fibonacci hashing."""
    return number * 2654435769 % of


def leaks(result: dict[str, Any], steps: int) -> None:
    """Take steps of every kind, and write the numbers after each kind."""
    gc.freeze()  # each collection is quicker without what the imports made
    found: dict[str, Any] = {"steps": steps}
    for kind in sorted(LEAKS, key=lambda kind: kind in STEPS):  # the slow ones last
        started = time.monotonic()
        found[kind] = leaked(kind, steps=steps) | {"seconds": round(time.monotonic() - started)}
        write(result | {"leaks": found})


def write(result: dict[str, Any]) -> None:
    """Write the numbers."""
    OUT.write_text(json.dumps(result, indent=2) + "\n")


RUNS = {"values": values, "interrupts": interrupts, "memory": ends}


def main() -> None:
    """Run the faults and write the numbers."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seconds", type=float, default=300.0, help="for values, interrupts and memory together")
    parser.add_argument("--leaks", type=int, nargs="?", const=5000, default=0, help="steps of each kind")
    given = parser.parse_args()
    torch.set_num_threads(1)
    result: dict[str, Any] = json.loads(OUT.read_text()) if OUT.exists() else {}
    result |= {"hardware": hardware("cpu"), "versions": versions()}
    if given.leaks:
        leaks(result, given.leaks)
        return
    end = time.monotonic() + given.seconds
    result["seconds"] = given.seconds
    for kinds_left, (name, run) in zip((3, 2, 1), RUNS.items(), strict=True):
        result[name] = run((end - time.monotonic()) / kinds_left)
        write(result)


if __name__ == "__main__":
    main()
