"""What a plain step of a tiny model takes in Python, against another checkout: its arithmetic takes almost nothing.

``python -m benchmarks.python_time ../before`` runs both checkouts in turn, each round in a process of its own, on one
thread, and compares processor time. ``--instructions`` counts instructions with valgrind instead, which noise does not
change.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path

from benchmarks.machine import hardware, versions
from benchmarks.summary import Summary, order_of_round, summarize

GOAL = 0.7
OUT = Path(__file__).parent / "results" / "python-time.json"
COUNTS = OUT.with_name("python-time-instructions.json")
HERE = Path(__file__).parents[1]
_FEW, _MANY = 10, 410  # steps of the two counted runs: their difference leaves the imports out
_PROGRAM = """
import sys, time
import torch
import microbatch as mb

torch.set_num_threads(1)
layers = torch.nn.Linear(8, 16), torch.nn.Tanh(), torch.nn.Linear(16, 2)
model = torch.nn.Sequential(*layers)
optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
accumulator = mb.Accumulator(model, optimizer, microbatch_size=4, memory_budget="none")
batch = torch.randn(32, 8)  # 8 microbatches


def loop():
    for microbatch in batch.split(4):
        (model(microbatch).square().mean() / 8).backward()
    optimizer.step()
    optimizer.zero_grad()


def step():
    accumulator.step(batch, lambda model, microbatch: model(microbatch).square().mean())


run, steps = {"loop": loop, "step": step}[sys.argv[1]], int(sys.argv[2])
seconds = []
for _ in range(steps):
    started = time.process_time()
    run()
    seconds.append(time.process_time() - started)
print(sorted(seconds)[steps // 2])
"""


def timed(checkout: Path, what: str, *, steps: int = 300) -> float:
    """Return the median processor time of a step, in seconds, measured in a process of its own.

    Args:
        checkout: Whose package is imported.
        what: ``"step"``, or ``"loop"`` for the hand-written loop, which imports it as well.
        steps: Steps to take.

    Returns:
        Seconds.
    """
    return float(_run(checkout, [sys.executable, "-c", _PROGRAM, what, str(steps)]))


def counted(checkout: Path, what: str) -> float:
    """Return the instructions of a step, by valgrind: some minutes.

    Args:
        checkout: Whose package is imported.
        what: As for `timed`.

    Returns:
        Instructions.
    """
    with tempfile.TemporaryDirectory() as folder:
        tool = ["valgrind", "--tool=callgrind", f"--callgrind-out-file={folder}/out"]
        told = [
            _run(checkout, [*tool, sys.executable, "-c", _PROGRAM, what, str(steps)], error=True)
            for steps in (_FEW, _MANY)
        ]
    few, many = (int(re.findall(r"Collected : (\d+)", each)[0]) for each in told)
    return (many - few) / (_MANY - _FEW)


def measure(other: Path, *, repeats: int) -> dict[str, Summary]:
    """Time this checkout, the other one and the hand-written loop, in turn.

    Args:
        other: The other checkout.
        repeats: Rounds; at least 1.

    Returns:
        Seconds of a step of each.
    """
    runs = {"here": (HERE, "step"), "other": (other, "step"), "loop": (HERE, "loop")}
    seconds: dict[str, list[float]] = {name: [] for name in runs}
    for index in range(repeats):
        for name in order_of_round(list(runs), index):
            seconds[name].append(timed(*runs[name]))
    return {name: summarize(each) for name, each in seconds.items()}


def main(arguments: Sequence[str] | None = None) -> int:
    """Measure, print and write.

    Args:
        arguments: Of the command line; `None` for this process's own.

    Returns:
        0.
    """
    parser = argparse.ArgumentParser(prog="python -m benchmarks.python_time", description=__doc__)
    parser.add_argument("other", type=Path, help="root of the other checkout")
    parser.add_argument("--repeats", type=int, default=9, help="processes of each")
    parser.add_argument("--instructions", action="store_true", help="count instructions, with valgrind")
    parser.add_argument("--out", type=Path, help=f"default: {OUT.name}, and {COUNTS.name} for instructions")
    flags = parser.parse_args(arguments)
    found: dict[str, object] = {"hardware": hardware("cpu"), "versions": versions(), "goal": GOAL}
    if flags.instructions:
        told = {"here": counted(HERE, "step"), "other": counted(flags.other, "step"), "loop": counted(HERE, "loop")}
        unit = "instructions"
        found["instructions"] = told
    else:
        summaries = measure(flags.other, repeats=flags.repeats)
        told, unit = {name: each.median for name, each in summaries.items()}, "s"
        found["seconds"] = {name: asdict(each) for name, each in summaries.items()}
    found["ratio"] = told["here"] / told["other"]
    for name, number in told.items():
        print(f"{name:6s} {number:.6g} {unit} a step")
    over = told["here"] / told["other"], told["here"] / told["loop"]
    print(f"here over other {over[0]:.3f} (goal {GOAL}), over the loop {over[1]:.2f}")
    out: Path = flags.out or (COUNTS if flags.instructions else OUT)
    out.write_text(json.dumps(found, indent=2) + "\n", encoding="utf-8")
    return 0


def _run(checkout: Path, command: Sequence[str], *, error: bool = False) -> str:
    # Without a fixed seed, imports alone differ by the instructions of several steps.
    fixed = {"PYTHONPATH": str(checkout.resolve() / "src"), "OMP_NUM_THREADS": "1", "PYTHONHASHSEED": "0"}
    environment = os.environ | fixed
    done = subprocess.run(  # noqa: S603 - this interpreter, and a program from above
        command, env=environment, capture_output=True, text=True, check=True
    )
    return done.stderr if error else done.stdout


if __name__ == "__main__":
    sys.exit(main())
