"""Run the suite's tests that are marked ``cuda``, the laws on CUDA among them, with pytest alone."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path

from benchmarks.gpu.exact_proofs import Say
from benchmarks.gpu.here import Here
from benchmarks.gpu.outcome import FAILED, Numbers

ROOT = Path(__file__).parents[2]
MARKED = re.compile(r"mark\.cuda\b|\bon_each_device\b")
SECONDS = 75  # that the tests of one file may take
PROCESSES = 6  # at once, at most
# Of the dry run: a law that has the same tests for each device.
DRY = ("tests/laws/test_heads.py",)


def files() -> list[Path]:
    """Return the files with tests that are marked ``cuda``; those with most text first, which take longest."""
    found = [file for file in (ROOT / "tests").rglob("test_*.py") if MARKED.search(file.read_text(encoding="utf-8"))]
    return sorted(found, key=lambda file: -file.stat().st_size)


def marked(here: Here, say: Say) -> Numbers:
    """Run the files in processes of their own, some at once; a plugin writes each test's result.

    Tests of the device's free memory, which are unit tests, run alone.
    """
    if not here.cuda:
        _run(here, say, [ROOT / name for name in DRY])
        here.rest("tests that are marked cuda")
    chosen = files()
    units = [file for file in chosen if file.parent.name == "unit"]
    _run(here, say, units)
    at_once = max(1, min(PROCESSES, (os.cpu_count() or 1) // 2))
    with ThreadPoolExecutor(at_once) as pool:
        list(pool.map(partial(_run, here, say), [[file] for file in chosen if file not in units]))
    return {"files": len(chosen), "processes at once": at_once}


def _run(here: Here, say: Say, chosen: Sequence[Path]) -> None:
    names = [file.relative_to(ROOT).as_posix() for file in chosen]
    command = [sys.executable, "-m", "benchmarks.gpu.suite", "-q", "-p", "no:cacheprovider"]
    # Warnings are not errors here: this device and this version of PyTorch may have some of their own.
    command += [
        "-W",
        "default",
        "-o",
        "minversion=7",
        *(["-m", "cuda"] if here.cuda else ["-k", "cpu", "-m", "not cuda"]),
    ]
    failed = ""
    try:
        done = subprocess.run(  # noqa: S603 - the project's own tests
            [*command, *names],
            cwd=ROOT,
            env={**os.environ, "PYTEST_DISABLE_PLUGIN_AUTOLOAD": "1"},
            capture_output=True,
            text=True,
            timeout=SECONDS,
            check=False,
        )
    except subprocess.TimeoutExpired:
        failed = f"stopped after {SECONDS} s"
    else:
        print(done.stdout[-6000:], done.stderr[-2000:])
        if done.returncode:
            failed = f"pytest ended with status {done.returncode}: {(done.stdout + done.stderr)[-500:]}"
    if failed:
        say(test=" ".join(names), status=FAILED, note=failed)
