"""Faults in steps of every kind: interrupts at every line, memory that ends, values of wrong kinds, and leaks.

``python -m benchmarks.faults --seconds 300`` goes through the faults in turn, each for an equal part of the time, and
writes what it counted to ``benchmarks/results/faults.json``. ``--leaks`` adds 5,000 steps of each kind. Faults are
listed by name; an empty list is the goal.
"""

from __future__ import annotations

import argparse
import json
import signal
import time
from collections import Counter
from collections.abc import Iterator
from itertools import cycle
from pathlib import Path
from typing import Any

import torch
from tests import wrong_values
from tests.interrupts import interrupted, sweep
from tests.kinds import KINDS, make
from tests.laws.test_memory_ends import outcome, states
from tests.leaks import LEAKS, leaked

from benchmarks.machine import hardware, versions

OUT = Path(__file__).parent / "results" / "faults.json"
_ENDS = ("plain", "unfused", "coupled", "momentum", "exact", "bfloat16", "checkpoint", "pooled")


def until(seconds: float) -> Iterator[int]:
    """Count rounds until the time is over."""
    end, number = time.monotonic() + seconds, 0
    while time.monotonic() < end:
        yield number
        number += 1


def interrupts(seconds: float) -> dict[str, Any]:
    """Interrupt steps of every kind at lines, one after the other."""
    signal.signal(signal.SIGINT, signal.default_int_handler)
    counted, wrong = Counter[str](), list[str]()
    prepared: dict[str, tuple[int, Any, Any]] = {}
    kinds = cycle(KINDS)
    for number in until(seconds):
        kind = next(kinds)
        if kind not in prepared:
            lines, _ = sweep(kind, stride=1 << 30)
            job = make(kind)
            before = job.state()
            job.step()
            prepared[kind] = lines, before, job.state()
        lines, before, after = prepared[kind]
        # Fibonacci hashing: the lines of every kind are taken evenly.
        found = interrupted(kind, number * 2654435769 % lines, before=before, after=after)
        counted[found.outcome] += 1
        if found.wrong:
            wrong.append(f"{kind} {found}")
    lines_of = {kind: lines for kind, (lines, _, _) in prepared.items()}
    return {"lines": lines_of, "interrupted": sum(counted.values()), "ended": dict(counted), "wrong": wrong}


def ends(seconds: float) -> dict[str, Any]:
    """End the memory at operators of steps."""
    counted, wrong = Counter[str](), list[str]()
    prepared = {kind: states(kind) for kind in _ENDS}
    kinds = cycle(_ENDS)
    for number in until(seconds):
        kind = next(kinds)
        known, operators = prepared[kind]
        at = number * 2654435769 % operators
        found = outcome(kind, at, known)
        counted[found] += 1
        if found not in {"small", "before", "said", "large"}:
            wrong.append(f"{kind} at operator {at}: {found}")
    of = {kind: each[1] for kind, each in prepared.items()}
    return {"operators": of, "ended_at": sum(counted.values()), "ended": dict(counted), "wrong": wrong}


def values(seconds: float) -> dict[str, Any]:
    """Make every call with values of wrong kinds, as long as the time lasts."""
    made, found = 0, dict[str, str]()
    end = time.monotonic() + seconds
    for name, call in wrong_values.calls():
        if time.monotonic() > end:
            break
        made += 1
        if (told := wrong_values.raw(call)) is not None:
            found[name] = told
    return {"calls": made, "raw": found}


def main() -> None:
    """Run the faults and write the numbers."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seconds", type=float, default=300.0, help="for interrupts, memory and values together")
    parser.add_argument("--leaks", type=int, nargs="?", const=5000, default=0, help="steps of each kind")
    given = parser.parse_args()
    torch.set_num_threads(1)
    part = given.seconds / 3
    result: dict[str, Any] = {"hardware": hardware("cpu"), "versions": versions(), "seconds": given.seconds}
    result |= {"values": values(part), "interrupts": interrupts(part), "memory": ends(part)}
    if given.leaks:
        result["leaks"] = {kind: leaked(kind, steps=given.leaks) for kind in LEAKS}
    elif OUT.exists():
        result["leaks"] = json.loads(OUT.read_text()).get("leaks")
    OUT.write_text(json.dumps(result, indent=2) + "\n")


if __name__ == "__main__":
    main()
