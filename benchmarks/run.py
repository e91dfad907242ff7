"""Measure `microbatch` against the full batch, the hand-written loop and its peers.

::

    python -m benchmarks.run                              the default, half an hour on two cores
    python -m benchmarks.run --thorough --retries 2       every microbatch size, more rounds
    python -m benchmarks.run --case gpt --microbatch-size 1 4 --repeats 5 --out /tmp/gpt
    python -m benchmarks.run --quick                      does everything run?
"""

from __future__ import annotations

import argparse
import importlib.util
import os
import sys
import time
from collections.abc import Iterator, Sequence
from pathlib import Path

from benchmarks.cases import CASES, THIRD_PARTY
from benchmarks.goals import agrees
from benchmarks.machine import KEPT_HEAP
from benchmarks.measure import Bench, Entry, Plan
from benchmarks.report import as_markdown, as_record, line, write
from benchmarks.worker import NATIVE, PACKAGES, PEERS

RESULTS = Path(__file__).parent / "results"
DEFAULT_CASES = ("gpt", "residual", "vit")
THOROUGH_CASES = ("gpt", "residual", "batchnorm", "vit")


def main(arguments: Sequence[str] | None = None) -> int:
    """Measure, print and write.

    Args:
        arguments: Of the command line; `None` for this process's own.

    Returns:
        0; 1 if ``--strict`` was given and a row was noisy or a contender did other arithmetic.
    """
    flags = _parse(arguments)
    missing = [name for name in flags.contenders if not _installed(name)]
    if missing:
        print(f"not installed, so left out: {', '.join(missing)} (pip install --group bench)", file=sys.stderr)
    names = dict.fromkeys(("loop", *flags.contenders))
    plan = Plan(
        contenders=tuple(name for name in NATIVE | PEERS if name in names and name not in missing),
        repeats=flags.repeats,
        row_seconds=flags.row_seconds,
        retries=flags.retries,
        memory=flags.memory,
        device=flags.device,
        threads=flags.threads,
        kept_heap=flags.kept_heap,
        processes=flags.processes,
    )
    if flags.kept_heap:
        os.environ.update(KEPT_HEAP)  # which the C library of each contender's process reads when it starts
    out = flags.out or RESULTS / (flags.device + "-kept-heap" * flags.kept_heap + "-quick" * flags.quick)
    entries: list[Entry] = []
    markdown = ""
    for row in _rows(flags, plan):
        entries += row
        # After every row, so that an hour's work outlives what the next row does.
        record = as_record(entries, plan, missing=missing)
        markdown = as_markdown(entries, record)
        write(record, markdown, out)
    print(f"\n{markdown[markdown.index('## Goals') :]}\nwritten: {out.with_suffix('.json')}, {out.with_suffix('.md')}")
    bad = any(entry.noisy or not (agrees(entry) or CASES[entry.case].couples_rows) for entry in entries)
    return int(flags.strict and bad)


def _rows(flags: argparse.Namespace, plan: Plan) -> Iterator[list[Entry]]:
    bench = Bench(plan)
    for case in flags.case:
        for size in _sizes(flags, case):
            started = time.perf_counter()
            row = bench.row(case, size)
            print("\n".join(line(entry) for entry in row))
            rounds, took, others = len(row[0].seconds), time.perf_counter() - started, row[0].others_cpu
            note = "" if others is None else f"; other jobs took {others:.0%} of the cores"
            print(f"    {rounds} rounds; {took:.0f} s with verification and memory{note}", flush=True)
            yield row


def _sizes(flags: argparse.Namespace, case: str) -> tuple[int, ...]:
    if flags.microbatch_size is None:
        return CASES[case].all_sizes if flags.thorough else CASES[case].sizes
    return tuple(flags.microbatch_size)


def _installed(name: str) -> bool:
    return name not in PACKAGES or importlib.util.find_spec(PACKAGES[name].split(".")[0]) is not None


def _parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.run", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("--case", nargs="+", choices=[*CASES, "third-party"], help="what is trained")
    add("--microbatch-size", nargs="+", type=int, help="rows that go through at once; must divide the case's batch")
    add("--contenders", nargs="+", choices=[*NATIVE, *PEERS], default=[*NATIVE, *PEERS], help="the loop always is one")
    add("--repeats", type=int, help="rounds of a row, at least (default 3; quick 2; thorough 9)")
    add("--row-seconds", type=float, help="go on with a row for so long (default 10; quick 0; thorough 30)")
    add("--processes", type=int, default=1, help="processes that each contender has, one after the other (default 1)")
    add("--retries", type=int, default=0, help="measure a noisy row again so many times, and keep the quietest")
    add("--device", choices=("cpu", "cuda"), default="cpu")
    add("--threads", type=int, default=os.cpu_count() or 1, help="threads of torch's operators")
    add("--memory", action=argparse.BooleanOptionalAction, default=True, help="measure peak memory too")
    add("--kept-heap", action="store_true", help="let glibc keep freed memory, in every process")
    add("--out", type=Path, help="where to write, without suffix (default benchmarks/results/DEVICE)")
    add("--strict", action="store_true", help="fail if a row is noisy or a contender did other arithmetic")
    length = parser.add_mutually_exclusive_group()
    length.add_argument("--quick", action="store_true", help="two rounds of a tiny case: does everything run?")
    length.add_argument("--thorough", action="store_true", help="every case and microbatch size")
    flags = parser.parse_args(arguments)
    if flags.case is None:
        flags.case = ["tiny"] if flags.quick else list(THOROUGH_CASES if flags.thorough else DEFAULT_CASES)
    flags.case = [each for case in flags.case for each in (THIRD_PARTY if case == "third-party" else [case])]
    if flags.repeats is None:
        flags.repeats = 2 if flags.quick else 9 if flags.thorough else 3
    if flags.row_seconds is None:
        flags.row_seconds = 0.0 if flags.quick else 30.0 if flags.thorough else 10.0
    for name in ("repeats", "processes"):
        if getattr(flags, name) < 1:
            parser.error(f"--{name} must be at least 1, not {getattr(flags, name)}")
    for case in flags.case:
        for size in flags.microbatch_size or ():
            if size < 1 or CASES[case].batch_size % size:
                parser.error(f"--microbatch-size {size} does not divide {case}'s batch of {CASES[case].batch_size}")
    return flags


if __name__ == "__main__":
    sys.exit(main())
