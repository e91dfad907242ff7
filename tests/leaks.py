"""What steps leave behind in their process: memory, objects, threads and open files.

A script as well: it prints JSON for a process without the checker of types, which keeps a little of every function that
is defined inside another, and without what other tests have left.
"""

from __future__ import annotations

import contextlib
import gc
import json
import os
import sys
import threading
from collections.abc import Callable
from pathlib import Path

import torch
from torch import nn

import microbatch as mb

from .faults import EndsAt
from .kinds import Job, make

_WARM = 20  # steps after which caches are full


def _retry(job: Job) -> None:
    """Run out of memory in the first microbatch, and go on at half the size; the next step begins at the whole one."""
    job.accumulator._it.size.sizing.halvings = 0
    with EndsAt(60):
        job.step()


def _error(job: Job) -> None:
    def fails(model: nn.Module, x: torch.Tensor) -> torch.Tensor:
        if x.data_ptr() != job.batch.data_ptr():  # the second microbatch
            message = "an error of the user"
            raise LookupError(message)
        return model(x).mean()

    with contextlib.suppress(LookupError):
        job.accumulator.step(job.batch, fails)


def _new(job: Job) -> None:
    """Make an accumulator for every step."""
    accumulator = mb.Accumulator(job.model, job.optimizer, microbatch_size=4, batch_norm="microbatch", buffers="each")
    accumulator.step(job.batch, lambda model, x: model(x).mean())


def _plain(job: Job) -> None:
    job.step()


_KEPT: list[list[torch.Tensor]] = []


def _keep(job: Job) -> None:
    """Keep one object of every step: the negative control."""
    _KEPT.append([job.batch.clone()])
    job.step()


LEAKS: dict[str, tuple[str, Callable[[Job], None]]] = {
    "plain": ("plain", _plain),
    "retry": ("plain", _retry),
    "windows": ("windows", _plain),
    "coupled": ("coupled", _plain),
    "exact": ("exact", _plain),
    "spill": ("spill", _plain),
    "checkpoint": ("checkpoint", _plain),
    "error": ("plain", _error),
    "new accumulators": ("plain", _new),
}
KEPT = "kept"
STEPS = {"retry": 25}  # each of these collects garbage several times


def leaked(kind: str, *, steps: int) -> dict[str, float]:
    """Take steps of a kind, and return by how much each count grew.

    Args:
        kind: A key of `LEAKS`, or `KEPT`.
        steps: Number of steps.

    Returns:
        Growth of the resident memory in bytes, and of the numbers of objects, threads and open files.
    """
    of, step = ("plain", _keep) if kind == KEPT else LEAKS[kind]
    job = make(of)
    for _ in range(_WARM):
        step(job)
    before = counts()
    for _ in range(steps):
        step(job)
    after = counts()
    return {name: after[name] - before[name] for name in before}


def counts() -> dict[str, float]:
    """Count what this process holds now."""
    gc.collect()
    return {
        "resident_bytes": int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE"),
        "objects": len(gc.get_objects()),
        "threads": threading.active_count(),
        "files": len(list(Path("/proc/self/fd").iterdir())),
    }


if __name__ == "__main__":
    gc.freeze()  # each collection is quicker without what the imports made
    json.dump({kind: leaked(kind, steps=STEPS.get(kind, 60)) for kind in (*LEAKS, KEPT)}, sys.stdout)
