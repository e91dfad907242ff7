"""What `import microbatch` costs over `import torch`: fresh interpreters, in turn."""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path

from benchmarks.machine import hardware, versions
from benchmarks.summary import Summary, order_of_round, summarize

GOAL_SECONDS = 0.050
OUT = Path(__file__).parent / "results" / "import.json"
# Names are imported when they are first used, so the accumulator, which needs nearly everything, is used too.
STATEMENTS = {
    "import microbatch": "import microbatch",
    "import microbatch, and use Accumulator": "import microbatch; microbatch.Accumulator",
}
_PROGRAM = "import time, torch; start = time.perf_counter(); {}; print(time.perf_counter() - start)"


def measure(repeats: int) -> dict[str, Summary]:
    """Time each statement after `import torch`, every time in an interpreter of its own.

    Args:
        repeats: Rounds; at least 1.

    Returns:
        Seconds that each took over `import torch`.
    """
    for statement in STATEMENTS.values():
        _run(statement)  # leaves the byte code behind, as an installation does
    seconds: dict[str, list[float]] = {name: [] for name in STATEMENTS}
    for index in range(repeats):
        for name in order_of_round(list(STATEMENTS), index):
            seconds[name].append(_run(STATEMENTS[name]))
    return {name: summarize(each) for name, each in seconds.items()}


def main(arguments: Sequence[str] | None = None) -> int:
    """Measure, print and write.

    Args:
        arguments: Of the command line; `None` for this process's own.

    Returns:
        0; 1 if ``--strict`` was given and the goal was missed.
    """
    parser = argparse.ArgumentParser(prog="python -m benchmarks.import_time", description=__doc__)
    parser.add_argument("--repeats", type=int, default=15, help="interpreters for each statement")
    parser.add_argument("--out", type=Path, default=OUT)
    parser.add_argument("--strict", action="store_true", help="fail if the goal is missed")
    flags = parser.parse_args(arguments)
    found = measure(flags.repeats)
    for name, summary in found.items():
        spread = f"{1000 * summary.lower:.1f} to {1000 * summary.upper:.1f}"
        print(f"{name}: {1000 * summary.median:.1f} ms over import torch (quartiles {spread})")
    worst = max(summary.median for summary in found.values())
    met = worst <= GOAL_SECONDS
    print(f"goal of {1000 * GOAL_SECONDS:.0f} ms: {'met' if met else 'missed'}")
    record = {
        "hardware": hardware("cpu"),
        "versions": versions(),
        "seconds_over_torch": {name: asdict(summary) for name, summary in found.items()},
        "goal_seconds": GOAL_SECONDS,
        "met": met,
    }
    flags.out.parent.mkdir(parents=True, exist_ok=True)
    flags.out.write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")
    return int(flags.strict and not met)


def _run(statement: str) -> float:
    # An installed package brings its byte code; without it, half of the time would be the compiler's.
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONDONTWRITEBYTECODE"}
    done = subprocess.run(  # noqa: S603 - this interpreter, and a program from above
        [sys.executable, "-c", _PROGRAM.format(statement)],
        capture_output=True,
        check=True,
        env=environment,
        text=True,
    )
    return float(done.stdout)


if __name__ == "__main__":
    sys.exit(main())
