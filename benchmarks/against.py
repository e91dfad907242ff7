"""A window of a benchmark's case, against another checkout: time and peak memory, in turn.

::

    git worktree add ../before COMMIT
    python -m benchmarks.against ../before --case gpt --microbatch-size 1 4       some minutes on two cores

Every process has the package of one checkout, and runs a few windows. The checkouts take turns.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import time
from collections.abc import Sequence
from contextlib import nullcontext
from pathlib import Path
from statistics import median
from typing import Any

import torch

from benchmarks.cases import CASES
from benchmarks.contenders import make_subject, microbatch
from benchmarks.machine import KEPT_HEAP, hardware, heap, versions
from benchmarks.memory import Peak, warm_up_profiler
from benchmarks.summary import order_of_round, summarize_ratio

HERE = Path(__file__).parents[1]
RESULTS = Path(__file__).parent / "results" / "against"


def run(case: str, size: int, *, windows: int) -> dict[str, float]:
    """Run windows with the package of this process.

    Args:
        case: A key of `CASES`.
        size: Rows that go through at once.
        windows: Windows that are timed, after two that warm up.

    Returns:
        Median seconds of a window, and the peak bytes of one more.
    """
    subject = make_subject(case, size, device="cpu")
    window, seconds = microbatch(subject), list[float]()
    for index in range(windows + 2):
        started = time.perf_counter()
        window(nullcontext())
        if index >= 2:
            seconds.append(time.perf_counter() - started)
    warm_up_profiler()
    peak = Peak(subject)
    window(peak)
    return {"seconds": median(seconds), "peak_bytes": peak.bytes}


def measure(
    other: Path, case: str, size: int, *, repeats: int, windows: int, threads: int
) -> dict[str, list[dict[str, float]]]:
    """Run both checkouts in turn, each time in a new process.

    Args:
        other: Root of the other checkout.
        case: A key of `CASES`.
        size: Rows that go through at once.
        repeats: Processes of each checkout.
        windows: Windows that a process times.
        threads: Threads of a process.

    Returns:
        What `run` returns, for each process of ``"here"`` and ``"other"``.
    """
    roots = {"here": HERE, "other": other.resolve()}
    found: dict[str, list[dict[str, float]]] = {name: [] for name in roots}
    for index in range(repeats):
        for name in order_of_round(list(roots), index):
            path = os.pathsep.join([str(roots[name] / "src"), str(HERE)])
            program = (
                f"import json, torch; torch.set_num_threads({threads}); from benchmarks.against import run; "
                f"print(json.dumps(run({case!r}, {size}, windows={windows})))"
            )
            done = subprocess.run(  # noqa: S603 - this interpreter, and a program from above
                [sys.executable, "-c", program],
                env=os.environ | {"PYTHONPATH": path},
                capture_output=True,
                text=True,
                check=True,
            )
            found[name].append(json.loads(done.stdout.splitlines()[-1]))
    return found


def main(arguments: Sequence[str] | None = None) -> int:
    """Measure, print and write.

    Args:
        arguments: Of the command line; `None` for this process's own.

    Returns:
        0.
    """
    parser = argparse.ArgumentParser(prog="python -m benchmarks.against", description=__doc__)
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.add_argument("other", type=Path, help="root of the other checkout")
    parser.add_argument("--case", choices=list(CASES), default="gpt")
    parser.add_argument("--microbatch-size", type=int, nargs="+", default=[1, 4])
    parser.add_argument("--repeats", type=int, default=3, help="processes of each checkout")
    parser.add_argument("--windows", type=int, default=3, help="windows that a process times")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--kept-heap", action="store_true", help="let glibc keep freed memory, in every process")
    parser.add_argument("--out", type=Path, default=RESULTS, help="where to write, without suffix")
    flags = parser.parse_args(arguments)
    if flags.kept_heap:
        os.environ.update(KEPT_HEAP)
    rows: list[dict[str, Any]] = []
    for size in flags.microbatch_size:
        found = measure(
            flags.other, flags.case, size, repeats=flags.repeats, windows=flags.windows, threads=flags.threads
        )
        row: dict[str, Any] = {"microbatch_size": size, **found}
        for what in ("seconds", "peak_bytes"):
            here, other = ([each[what] for each in found[name]] for name in ("here", "other"))
            row[f"{what}_ratio"] = summarize_ratio(here, other).median
        rows.append(row)
        print(
            f"{flags.case} at {size}: time {row['seconds_ratio']:.3f}, peak {row['peak_bytes_ratio']:.3f} of the other"
        )
    record = {
        "case": flags.case,
        "threads": flags.threads,
        "heap": heap(kept=flags.kept_heap),
        "hardware": hardware("cpu"),
        "versions": versions(),
        "rows": rows,
    }
    flags.out.with_suffix(".json").write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
