"""Real ranks: processes that talk to one another by gloo."""

import inspect
import os
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from tests.forked import Forked

WORKER = Path(__file__).with_name("worker.py")
# Seen once on a busy machine, and nothing of ours: gloo's own connections are refused while a process group starts.
UNCONNECTED = "Gloo connectFullMesh failed"


def run_ranks_(
    function: Callable[[int, int], Any], ranks: int, folder: Path, *, timeout: float = 60, again: bool = True
) -> list[Any]:
    """Run ``function(rank, ranks)`` in as many processes.

    Args:
        function: A function of a test file, by its name in that file; what it returns is tensors, numbers and texts.
        ranks: Number of processes.
        folder: A folder that nobody else uses.
        timeout: Seconds after which every process is killed and the test fails.
        again: Whether to run all once more if gloo could not connect them.

    Returns:
        What it returned on each rank.

    Raises:
        AssertionError: A rank failed, or took too long; with what it wrote.
    """
    folder.mkdir(parents=True, exist_ok=True)
    outputs = [folder / f"output-{rank}.txt" for rank in range(ranks)]
    processes: list[Forked] = []
    for rank, output in enumerate(outputs):
        command = [str(WORKER), inspect.getfile(function), function.__name__, str(rank), str(ranks), str(folder)]
        processes.append(Forked(command, out=output, err=output, env={**os.environ, "OMP_NUM_THREADS": "1"}))
    deadline = time.monotonic() + timeout
    try:
        while time.monotonic() < deadline:
            codes = [process.poll() for process in processes]
            if None not in codes or any(codes):
                break
            time.sleep(0.02)
    finally:
        for process in processes:
            process.kill()
            process.wait()
    if any(process.returncode for process in processes):
        written = [output.read_text(errors="replace")[-4000:] for output in outputs]
        if again and any(UNCONNECTED in each for each in written):
            return run_ranks_(function, ranks, folder / "again", timeout=timeout, again=False)
        told = "\n".join(f"--- rank {r}: {p.returncode}\n{w}" for r, (p, w) in enumerate(zip(processes, written)))  # noqa: B905
        raise AssertionError(f"{function.__name__} on {ranks} ranks:\n{told}")
    return [torch.load(folder / f"result-{rank}.pt", weights_only=True) for rank in range(ranks)]


@pytest.fixture(scope="session")
def run_ranks() -> Callable[..., list[Any]]:
    """The function above, for test files, which are no package and cannot import it."""
    return run_ranks_
