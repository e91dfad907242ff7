"""Real ranks: processes that talk to one another by gloo."""

import inspect
import os
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

WORKER = Path(__file__).with_name("worker.py")


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
    processes: list[subprocess.Popen[bytes]] = []
    for rank in range(ranks):
        command = [sys.executable, str(WORKER), inspect.getfile(function), function.__name__, str(rank), str(ranks)]
        with (folder / f"output-{rank}.txt").open("wb") as output:
            processes.append(
                subprocess.Popen(
                    [*command, str(folder)],
                    stdout=output,
                    stderr=subprocess.STDOUT,
                    env={**os.environ, "OMP_NUM_THREADS": "1"},
                )
            )
    deadline = time.monotonic() + timeout
    try:
        while time.monotonic() < deadline:
            codes = [process.poll() for process in processes]
            if None not in codes or any(codes):
                break
            time.sleep(0.02)
    finally:
        for process in processes:
            if process.poll() is None:
                process.kill()
            process.wait()
    if any(process.returncode for process in processes):
        written = [(folder / f"output-{rank}.txt").read_text(errors="replace")[-4000:] for rank in range(ranks)]
        told = "\n".join(f"--- rank {r}: {p.returncode}\n{w}" for r, (p, w) in enumerate(zip(processes, written)))  # noqa: B905
        raise AssertionError(f"{function.__name__} on {ranks} ranks:\n{told}")
    return [torch.load(folder / f"result-{rank}.pt", weights_only=True) for rank in range(ranks)]


@pytest.fixture(scope="session")
def run_ranks() -> Callable[..., list[Any]]:
    """The function above, for test files, which are no package and cannot import it."""
    return run_ranks_
