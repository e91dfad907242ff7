"""How long the doctor takes: whole commands, each in a process of its own, and a large folder."""

from __future__ import annotations

import argparse
import importlib.util
import json
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path

from benchmarks.machine import hardware, versions
from benchmarks.summary import summarize

GOAL_SECONDS = {"file": 0.3, "folder": 30.0}
OUT = Path(__file__).parent / "results" / "read-loops.json"
LINES = 1000
_LOOP = """
def train_{number}(model, loader, optimizer, scheduler, scaler, args):
    for epoch in range(args.epochs):
        total = 0.0
        for i, (x, y) in enumerate(loader):
            if args.{flag} > 0:
                y = y * args.{flag}
            loss = criterion(model(x), y)
            if args.gradient_accumulation_steps > 1:
                loss = loss / args.gradient_accumulation_steps
            if args.fp16:
                scaler.scale(loss).backward()
            else:
                loss.backward()
            total += loss.item()
            if (i + 1) % args.gradient_accumulation_steps == 0:
                if args.fp16:
                    scaler.unscale_(optimizer)
                torch.nn.utils.clip_grad_norm_(model.parameters(), args.max_norm)
                scaler.step(optimizer)
                scaler.update()
                scheduler.step()
                optimizer.zero_grad()
"""
_FILLER = """
def load_{number}(path, size, names):
    rows = [line.split(",") for line in open(path)]
    if size > 0:
        rows = rows[:size]
    found = {{}}
    for name, row in zip(names, rows):
        found[name] = [float(value) for value in row if value]
    return found
"""


def a_file() -> str:
    """Write a training script of about a thousand lines: two loops, and functions that have nothing to do with them.

    Returns:
        Its source.
    """
    text = "import torch\n\ncriterion = torch.nn.CrossEntropyLoss()\n"
    text += "".join(_LOOP.format(number=number, flag=f"flag_{number}") for number in range(2))
    number = 0
    while text.count("\n") < LINES:
        text += _FILLER.format(number=number)
        number += 1
    return text


def seconds_of(path: Path) -> float:
    """Run `microbatch doctor PATH` in a process of its own.

    Args:
        path: A file or a folder.

    Returns:
        Seconds of wall time.
    """
    start = time.perf_counter()
    command = [sys.executable, "-m", "microbatch", "doctor", str(path)]
    subprocess.run(command, capture_output=True, check=False)  # noqa: S603 - this interpreter and this package
    return time.perf_counter() - start


def main(arguments: Sequence[str] | None = None) -> int:
    """Measure, print and write.

    Args:
        arguments: Of the command line; `None` for this process's own.

    Returns:
        0; 1 if ``--strict`` was given and a goal was missed.
    """
    parser = argparse.ArgumentParser(prog="python -m benchmarks.read_loops", description=__doc__)
    parser.add_argument("--repeats", type=int, default=9, help="runs of the command on one file")
    parser.add_argument("--folder", type=Path, default=_torch(), help="a large folder (that of torch)")
    parser.add_argument("--out", type=Path, default=OUT)
    parser.add_argument("--strict", action="store_true", help="fail if a goal is missed")
    flags = parser.parse_args(arguments)
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "train.py"
        file.write_text(a_file(), encoding="utf-8")
        seconds_of(file)  # leaves the byte code behind, as an installation does
        one = summarize([seconds_of(file) for _ in range(flags.repeats)])
    files = sum(1 for _ in flags.folder.rglob("*.py"))
    whole = seconds_of(flags.folder)
    print(f"a file of {LINES} lines: {one.median:.2f} s (goal {GOAL_SECONDS['file']} s)")
    print(f"a folder of {files} files: {whole:.1f} s (goal {GOAL_SECONDS['folder']:.0f} s)")
    met = one.median <= GOAL_SECONDS["file"] and whole <= GOAL_SECONDS["folder"]
    record = {
        "hardware": hardware("cpu"),
        "versions": versions(),
        "file": {"lines": LINES, "seconds": asdict(one)},
        "folder": {"files": files, "seconds": whole},
        "goal_seconds": GOAL_SECONDS,
        "met": met,
    }
    flags.out.parent.mkdir(parents=True, exist_ok=True)
    flags.out.write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")
    return int(flags.strict and not met)


def _torch() -> Path:
    spec = importlib.util.find_spec("torch")
    return Path("" if spec is None or spec.origin is None else spec.origin).parent


if __name__ == "__main__":
    sys.exit(main())
