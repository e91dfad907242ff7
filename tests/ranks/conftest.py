"""Real ranks: processes that talk to one another by gloo."""

import atexit
import inspect
import json
import os
import select
import subprocess
import sys
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from signal import SIGKILL
from typing import Any

import pytest
import torch

WORKER = Path(__file__).with_name("worker.py")
PLACES: list[Any] = []


def place(rank: int) -> Any:
    """Return the process from which a rank's are forked, one after another; it is started when it is first needed."""
    while len(PLACES) <= rank:
        pipe, environment = subprocess.PIPE, {**os.environ, "OMP_NUM_THREADS": "1"}
        command = [sys.executable, str(WORKER)]
        PLACES.append(subprocess.Popen(command, stdin=pipe, stdout=pipe, bufsize=0, env=environment))
    return PLACES[rank]


@atexit.register
def close_places() -> None:
    """End the processes: their input has come to an end."""
    for each in PLACES:
        each.communicate()


def run_ranks_(function: Callable[[int, int], Any], ranks: int, folder: Path, *, timeout: float = 60) -> list[Any]:
    """Run ``function(rank, ranks)`` in as many processes.

    Args:
        function: A function of a test file, by its name in that file; what it returns is tensors, numbers and texts.
        ranks: Number of processes.
        folder: A folder that nobody else uses.
        timeout: Seconds after which every process is killed and the test fails.

    Returns:
        What it returned on each rank.

    Raises:
        AssertionError: A rank failed, or took too long; with what it wrote.
    """
    folder.mkdir(parents=True, exist_ok=True)
    job = {"file": inspect.getfile(function), "function": function.__name__, "ranks": ranks, "folder": str(folder)}
    job |= {"environment": {**os.environ, "OMP_NUM_THREADS": "1"}, "directory": str(Path.cwd())}
    places = [place(rank) for rank in range(ranks)]
    for rank, each in enumerate(places):
        each.stdin.write(json.dumps({**job, "rank": rank}).encode() + b"\n")
    processes = [int(each.stdout.readline()) for each in places]
    codes: dict[int, int] = {}
    deadline = time.monotonic() + timeout
    try:
        while len(codes) < ranks and not any(codes.values()) and (left := deadline - time.monotonic()) > 0:
            running = {each.stdout: rank for rank, each in enumerate(places) if rank not in codes}
            codes |= {running[ended]: int(ended.readline()) for ended in select.select(list(running), [], [], left)[0]}
    finally:
        for rank in set(range(ranks)) - codes.keys():
            with suppress(ProcessLookupError):
                os.kill(processes[rank], SIGKILL)
            codes[rank] = int(places[rank].stdout.readline())
    if any(codes.values()):
        written = [(folder / f"output-{rank}.txt").read_text(errors="replace")[-4000:] for rank in range(ranks)]
        told = "\n".join(f"--- rank {rank}: {codes[rank]}\n{words}" for rank, words in enumerate(written))
        raise AssertionError(f"{function.__name__} on {ranks} ranks:\n{told}")
    return [torch.load(folder / f"result-{rank}.pt", weights_only=True) for rank in range(ranks)]


@pytest.fixture(scope="session")
def run_ranks() -> Callable[..., list[Any]]:
    """The function above, for test files, which are no package and cannot import it."""
    return run_ranks_
