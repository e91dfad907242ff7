"""How long the doctor takes: whole commands, each in a process of its own, a large folder, and files of yours.

``--real PATH`` reads real training scripts one by one, and prints the CPU time of each: inside of a process that has
imported the doctor, and of a whole command.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import resource
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

from benchmarks.machine import hardware, versions
from benchmarks.summary import summarize
from microbatch.linting.doctor import doctor

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


@dataclass(frozen=True, slots=True)
class RealFile:
    """How long a real file took.

    Attributes:
        name: Its name.
        lines: How many it has.
        cpu_seconds: CPU time of the doctor alone.
        command_cpu_seconds: CPU time of a whole command.
    """

    name: str
    lines: int
    cpu_seconds: float
    command_cpu_seconds: float


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


def cpu_seconds_of(path: Path, *, repeats: int = 3) -> tuple[float, float]:
    """Read a real file, in this process and with a whole command.

    Args:
        path: The file.
        repeats: How often; the least time counts, as other work on the machine only adds to it.

    Returns:
        Seconds of CPU time: of the doctor alone, after its import, and of the command.
    """
    inside, whole = list[float](), list[float]()
    for _ in range(repeats):
        start = time.process_time()
        doctor(path)
        inside.append(time.process_time() - start)
        before = resource.getrusage(resource.RUSAGE_CHILDREN)
        seconds_of(path)
        after = resource.getrusage(resource.RUSAGE_CHILDREN)
        whole.append(after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime)
    return min(inside), min(whole)


def read_real(paths: Sequence[Path], *, repeats: int = 3) -> list[RealFile]:
    """Read real files one by one, and print the time of each.

    Args:
        paths: Files, and folders of files.
        repeats: How often each is read.

    Returns:
        One record a file.
    """
    files = [file for path in paths for file in (sorted(path.rglob("*.py")) if path.is_dir() else [path])]
    found: list[RealFile] = []
    for file in files:
        doctor(file)  # what only the first reading pays is no part of any file
        inside, whole = cpu_seconds_of(file, repeats=repeats)
        lines = file.read_text(encoding="utf-8").count("\n")
        print(f"{file.name}, {lines} lines: {inside:.2f} s of CPU, {whole:.2f} s with the whole command")
        found.append(RealFile(file.name, lines, inside, whole))
    return found


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
    parser.add_argument("--real", type=Path, nargs="+", default=[], help="real files, or folders: read them alone")
    parser.add_argument("--out", type=Path, default=OUT)
    parser.add_argument("--strict", action="store_true", help="fail if a goal is missed")
    flags = parser.parse_args(arguments)
    if flags.real:
        slowest = max(each.cpu_seconds for each in read_real(flags.real))
        return int(flags.strict and slowest > GOAL_SECONDS["file"])
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
