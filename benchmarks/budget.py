"""Compare ``microbatch_size="auto"`` with the best hand-written loop, both under the same memory budget.

::

    python -m benchmarks.budget                          about ten minutes on two idle cores
    python -m benchmarks.budget --kept-heap              the same with a C library that keeps freed memory
    python -m benchmarks.budget --case vit-small --repeats 3 --out /tmp/budget
    python -m benchmarks.budget --quick                  does everything run?

For each case, the full batch runs under `mb.MemoryMeter`, which gives its peak. The budgets are a half, a quarter and
an eighth of it. The hand-written loop runs at every size of a grid (powers of two, and those between), and at
the largest size that fits each budget, found by its own peak. Each size has a process of its own. Sizes whose peak is
above the budget are disqualified. The fastest of the others is the best loop that a user could find by trying.

`microbatch` is given the budget alone: ``Accumulator(microbatch_size="auto", memory_budget=...)``; for ragged rows
``lengths=`` too. It chooses in a fresh process, which then goes on. In the last rounds it takes turns with the two
fastest loops, a window each. Loops on ragged rows trim each microbatch to its own longest row.
"""

from __future__ import annotations

import argparse
import os
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import microbatch as mb
from benchmarks.cases import BUDGET_CASES
from benchmarks.machine import KEPT_HEAP, busy_seconds, hardware, heap, versions
from benchmarks.report import write
from benchmarks.summary import NOISY, Summary, order_of_round, summarize, summarize_ratio
from benchmarks.under_budget import Chosen, Handle

RESULTS = Path(__file__).parent / "results" / "budget"
PAGE = Path(__file__).parents[1] / "docs" / "cost.md"
SHARES = (2, 4, 8)
GOAL, RAGGED_GOAL = 0.9, 0.7
"""The most time of a step, as a part of the best loop's."""
FINALISTS = 2


@dataclass(frozen=True, slots=True, kw_only=True)
class Loop:
    """A hand-written loop at one size.

    Attributes:
        microbatch_size: Rows that go through the model at once.
        peak_bytes: Most bytes of tensors in a window, by the meter.
        allocated_bytes: Likewise by the profiler, workspaces inside operators included.
        seconds: Of its windows, alone.
    """

    microbatch_size: int
    peak_bytes: int
    allocated_bytes: int
    seconds: list[float] = field(default_factory=list[float])


@dataclass(frozen=True, slots=True, kw_only=True)
class Row:
    """One budget of one case.

    Attributes:
        case: A key of `BUDGET_CASES`.
        share: The budget is one ``share``-th of the full batch's peak.
        budget: Bytes.
        chosen: What "auto" chose; `None` if it refused the budget.
        refusal: Why, if it refused.
        auto_peak: Most bytes of tensors in a window of `microbatch`, by the meter.
        auto_allocated: Likewise by the profiler, workspaces inside operators included.
        auto_seconds: Of its windows in the last rounds.
        loop_seconds: Of the loops' windows in the last rounds, by microbatch size; empty if no size fits.
        loop_peaks: Their peaks by the meter.
        loop_allocated: Their peaks by the profiler.
        others_cpu: Share of the machine's cores that other jobs took meanwhile, or `None` if unknown.
    """

    case: str
    share: int
    budget: int
    chosen: Chosen | None = None
    refusal: str | None = None
    auto_peak: int | None = None
    auto_allocated: int | None = None
    auto_seconds: list[float] = field(default_factory=list[float])
    loop_seconds: dict[int, list[float]] = field(default_factory=dict[int, list[float]])
    loop_peaks: dict[int, int] = field(default_factory=dict[int, int])
    loop_allocated: dict[int, int] = field(default_factory=dict[int, int])
    others_cpu: float | None = None

    @property
    def best_loop(self) -> int | None:
        """Microbatch size of the fastest loop in the last rounds; `None` if no size fits."""
        times = {size: summarize(taken).median for size, taken in self.loop_seconds.items()}
        return min(times, key=times.__getitem__, default=None)

    @property
    def ratio(self) -> Summary | None:
        """The rounds' ratios of the two times; `None` where one of them could not run."""
        best = self.best_loop
        if best is None or not self.auto_seconds:
            return None
        return summarize_ratio(self.auto_seconds, self.loop_seconds[best])

    @property
    def goal(self) -> float:
        """The most that the ratio may be."""
        return GOAL if BUDGET_CASES[self.case].lengths is None else RAGGED_GOAL

    @property
    def noisy(self) -> bool:
        """Whether another job was running."""
        best = self.best_loop
        if best is None or not self.auto_seconds:
            return False
        spreads = summarize(self.auto_seconds).noisy or summarize(self.loop_seconds[best]).noisy
        return spreads or (self.others_cpu or 0.0) > NOISY

    @property
    def verdict(self) -> str:
        """``"met"``, ``"missed"``, ``"undecided"`` with another job running, or who could not run."""
        ratio = self.ratio
        if ratio is None:
            fits = [name for name, there in (("microbatch", self.chosen), ("the loop", self.best_loop)) if there]
            return f"only {fits[0]} fits" if fits else "neither fits"
        if (self.auto_peak or 0) > self.budget:
            return "over the budget"
        return "undecided" if self.noisy else "met" if ratio.median <= self.goal else "missed"


def grid(rows: int) -> list[int]:
    """List the sizes that a patient user would try: powers of two, and the sizes between them, below the batch.

    Args:
        rows: Rows of the batch.

    Returns:
        Sizes, ascending.

    Example:
        >>> grid(48)
        [1, 2, 3, 4, 6, 8, 12, 16, 24, 32]
    """
    powers = [1 << power for power in range(rows.bit_length())]
    return sorted(size for size in {*powers, *(3 * power // 2 for power in powers[1:])} if size < rows)


def largest_within(peaks: Mapping[int, int], budget: int) -> int | None:
    """Estimate the largest size that fits, from the peaks of other sizes: between two of them, the peak is a line.

    Args:
        peaks: Peak bytes by size; at least two, the largest of them above the budget.
        budget: Bytes.

    Returns:
        A size between the largest that fits and the next one; `None` where there is none between, or none fits.

    Example:
        >>> largest_within({4: 50, 8: 90}, 75), largest_within({4: 50, 5: 60}, 55), largest_within({4: 50, 8: 90}, 40)
        (6, None, None)
    """
    below = max((size for size, peak in peaks.items() if peak <= budget), default=None)
    above = min((size for size, peak in peaks.items() if peak > budget), default=None)
    if below is None or above is None or above < below:
        return None
    slope = (peaks[above] - peaks[below]) / (above - below)
    size = below + int((budget - peaks[below]) / slope)
    return size if below < size < above else None


def measure(case: str, *, repeats: int, looks: int, threads: int) -> tuple[int, list[Loop], list[Row]]:
    """Measure one case.

    Args:
        case: A key of `BUDGET_CASES`.
        repeats: Rounds of the comparison; at least 1.
        looks: Windows by which the fastest loops are found; at least 1.
        threads: Threads of torch's operators.

    Returns:
        The full batch's peak in bytes, the loops that fit at least one budget, and a row for each budget.
    """
    rows = BUDGET_CASES[case].batch_size
    full = Handle(case, size=rows, threads=threads)
    full.ask("window")
    peak: int = full.ask("peaks")[0]
    full.close()
    loops: dict[int, Loop] = {}
    handles: dict[int, Handle] = {}
    peaks = {rows: peak}

    def look(size: int) -> None:
        handle = Handle(case, size=size, threads=threads)
        handle.ask("window")  # makes the optimizer's state
        counted, allocated = handle.ask("peaks")
        peaks[size] = counted
        if counted > peak // SHARES[0]:
            handle.close()
        else:
            handles[size] = handle
            loops[size] = Loop(microbatch_size=size, peak_bytes=counted, allocated_bytes=allocated)

    try:
        for size in grid(rows):
            look(size)
        for share in SHARES:
            between = largest_within(peaks, peak // share)
            if between is not None:
                look(between)
        for index in range(looks if loops else 0):
            for name in order_of_round([str(size) for size in sorted(loops)], index):
                loops[int(name)].seconds.append(handles[int(name)].ask("window"))
        tried = [loops[size] for size in sorted(loops)]
        found: list[Row] = []
        for share in SHARES:
            best = {size: handles[size] for size in finalists(tried, peak // share)}
            row = Row(
                case=case,
                share=share,
                budget=peak // share,
                loop_peaks={size: loops[size].peak_bytes for size in best},
                loop_allocated={size: loops[size].allocated_bytes for size in best},
            )
            found.append(_compare(row, best, repeats=repeats, threads=threads))
    finally:
        for handle in handles.values():
            handle.close()
    return peak, tried, found


def finalists(loops: Sequence[Loop], budget: int) -> list[int]:
    """Return the sizes of the fastest loops within a budget, ascending.

    Args:
        loops: Loops with their peaks and times.
        budget: Bytes; loops above it are disqualified.
    """
    within = sorted(
        (each for each in loops if each.peak_bytes <= budget), key=lambda each: summarize(each.seconds).median
    )
    return sorted(each.microbatch_size for each in within[:FINALISTS])


def _compare(row: Row, loops: Mapping[int, Handle], *, repeats: int, threads: int) -> Row:
    """Measure the size that "auto" chooses under the budget, against the fastest loops."""
    auto = Handle(row.case, budget=row.budget, threads=threads)
    try:
        try:
            chosen: Chosen = auto.ask("choose")
            counted, allocated = auto.ask("peaks")
        except mb.MicrobatchError as error:
            return replace(row, refusal=str(error).split(";")[0])
        everyone = {"auto": auto, **{str(size): handle for size, handle in loops.items()}}
        seconds: dict[str, list[float]] = {name: [] for name in everyone}
        spent, busy, started = _all_spent(everyone), busy_seconds(), time.perf_counter()
        for index in range(repeats):
            for name in order_of_round(list(everyone), index):
                seconds[name].append(everyone[name].ask("window"))
        elapsed, busy_now = time.perf_counter() - started, busy_seconds()
        others = None
        if busy is not None and busy_now is not None:
            mine = _all_spent(everyone) - spent
            others = max(0.0, (busy_now - busy - mine) / (elapsed * (os.cpu_count() or 1)))
    finally:
        auto.close()
    return replace(
        row,
        chosen=chosen,
        auto_peak=counted,
        auto_allocated=allocated,
        auto_seconds=seconds.pop("auto"),
        loop_seconds={int(name): taken for name, taken in seconds.items()},
        others_cpu=others,
    )


def _all_spent(handles: Mapping[str, Handle]) -> float:
    return time.process_time() + sum(handle.spent() for handle in handles.values())


def as_markdown(record: Mapping[str, Any], results: Mapping[str, tuple[int, Sequence[Loop], Sequence[Row]]]) -> str:
    """Return the tables.

    Args:
        record: On what, and how, it was measured.
        results: By case: the full batch's peak, the loops, and the rows.
    """
    on = "; ".join(f"{name} {value}" for each in ("hardware", "versions") for name, value in record[each].items())
    lines = [
        "# At a memory budget",
        "",
        f"`{record['command']}`; {record['date']}; {on}; {record['threads']} threads; heap: {record['heap']}.",
        "",
        'A step with `microbatch_size="auto"` and a memory budget, against the fastest hand-written loop of all sizes',
        f"under the same budget. Times are medians of {record['repeats']} windows in turn. `peak` counts tensors,",
        "which the budget limits; `allocated` counts workspaces inside operators too. A `~` marks rows during which",
        "another job was running: they decide nothing.",
        "",
        "| case | budget | loop's best size | loop | peak | auto's size | microbatch | peak | ratio | goal | |",
        "|---|---|---|---|---|---|---|---|---|---|---|",
    ]
    lines += [_line(row) for _, _, rows in results.values() for row in rows]
    for case, (peak, loops, rows) in results.items():
        lines += ["", f"## {case}: {BUDGET_CASES[case].describe}; batch {BUDGET_CASES[case].batch_size}", ""]
        lines += [f"Peak of the full batch: {_mebibytes(peak)}.", ""]
        lines += ["| loop's microbatch | peak | window |", "|---|---|---|"]
        for each in loops:
            taken = _seconds(summarize(each.seconds).median)
            lines.append(f"| {each.microbatch_size} | {_mebibytes(each.peak_bytes)} | {taken} |")
        lines += [
            "",
            "| budget | auto chose | after | allocated, loop | allocated, microbatch | why |",
            "|" + "---|" * 6,
        ]
        for row in rows:
            loop_bytes = row.loop_allocated.get(row.best_loop or 0)
            if row.chosen is None:
                lines.append(f"| 1/{row.share} | - | - | {_mebibytes(loop_bytes)} | - | refused: {row.refusal} |")
                continue
            why = row.chosen.why if row.chosen.decided else f"not decided: {row.chosen.why}"
            after = f"{row.chosen.steps} steps, {row.chosen.seconds:.1f} s"
            both = f"{_mebibytes(loop_bytes)} | {_mebibytes(row.auto_allocated)}"
            lines.append(f"| 1/{row.share} | {row.chosen.microbatch_size} | {after} | {both} | {why} |")
    return "\n".join(lines) + "\n"


def page_table(rows: Sequence[Row], record: Mapping[str, Any]) -> str:
    """Return the short table of ``docs/cost.md``.

    Args:
        rows: What was measured.
        record: On what.
    """
    hardware = record["hardware"]
    on = f"{record['date']}, {hardware['cpu']}, {record['threads']} threads"
    lines = [
        f"{on}, heap: {record['heap']}. A `~` marks rows during which another job was running.",
        "",
        "| model | budget | best loop | microbatch | ratio | goal | |",
        "|---|---|---|---|---|---|---|",
    ]
    for row in rows:
        cells = _cells(row)
        lines.append(f"| {row.case} | 1/{row.share} | {cells[3]} | {cells[6]} | {' | '.join(cells[8:])} |")
    return "\n".join(lines)


def put_between(page: str, name: str, table: str) -> str:
    """Replace what stands between two marks of a page.

    Args:
        page: Text with the lines ``<!-- name: begin -->`` and ``<!-- name: end -->``.
        name: Which marks.
        table: What is to stand there.

    Raises:
        ValueError: The page has no such marks.
    """
    begin, end = f"<!-- {name}: begin -->\n", f"\n<!-- {name}: end -->"
    before, _, rest = page.partition(begin)
    _, mark, after = rest.partition(end)
    if not mark:
        raise ValueError(f"the page has no marks {name!r}")
    return f"{before}{begin}{table}{end}{after}"


def _line(row: Row) -> str:
    return f"| {' | '.join(_cells(row))} |"


def _cells(row: Row) -> list[str]:
    mark, best = "~" if row.noisy else "", row.best_loop
    loop_time = "-" if best is None else mark + _seconds(summarize(row.loop_seconds[best]).median)
    auto_time = mark + _seconds(summarize(row.auto_seconds).median) if row.auto_seconds else "-"
    return [
        row.case,
        f"1/{row.share}, {_mebibytes(row.budget)}",
        "-" if best is None else str(best),
        loop_time,
        "-" if best is None else _mebibytes(row.loop_peaks[best]),
        "-" if row.chosen is None else str(row.chosen.microbatch_size),
        auto_time,
        _mebibytes(row.auto_peak),
        "-" if row.ratio is None else f"{mark}{row.ratio.median:.3f}",
        f"{row.goal}",
        row.verdict,
    ]


def _seconds(seconds: float) -> str:
    return f"{seconds:.2f} s" if seconds >= 1 else f"{1000 * seconds:.0f} ms"


def _mebibytes(size: int | None) -> str:
    return "-" if size is None else f"{size / 2**20:.1f} MiB"


def main(arguments: Sequence[str] | None = None) -> int:
    """Measure, print and write.

    Args:
        arguments: Of the command line; `None` for this process's own.

    Returns:
        0.
    """
    parser = argparse.ArgumentParser(prog="python -m benchmarks.budget", description="See the module's docstring.")
    parser.add_argument("--case", nargs="+", choices=list(BUDGET_CASES), help="what is trained")
    parser.add_argument("--repeats", type=int, help="rounds of the comparison (default 5; quick 1)")
    parser.add_argument("--looks", type=int, help="windows by which the best loops are found (default 2; quick 1)")
    parser.add_argument("--threads", type=int, default=os.cpu_count() or 1)
    parser.add_argument("--kept-heap", action="store_true", help="let glibc keep freed memory, in every process")
    parser.add_argument("--quick", action="store_true", help="a tiny case: does everything run?")
    parser.add_argument("--out", type=Path, help="where to write, without ending (default benchmarks/results/budget)")
    flags = parser.parse_args(arguments)
    cases = flags.case or (["tiny"] if flags.quick else [name for name in BUDGET_CASES if name != "tiny"])
    repeats, looks = flags.repeats or (1 if flags.quick else 5), flags.looks or (1 if flags.quick else 2)
    ending = "-kept-heap" * flags.kept_heap + "-quick" * flags.quick
    out = flags.out or RESULTS.with_name(RESULTS.name + ending)
    if flags.kept_heap:
        os.environ.update(KEPT_HEAP)  # before the server starts, of which all processes are forks
    get_context("forkserver").set_forkserver_preload(["benchmarks.under_budget"])
    record: dict[str, Any] = {
        "command": " ".join(["python -m benchmarks.budget", *(sys.argv[1:] if arguments is None else arguments)]),
        "date": time.strftime("%Y-%m-%d"),
        "hardware": hardware("cpu"),
        "versions": versions(),
        "threads": flags.threads,
        "repeats": repeats,
        "heap": heap(kept=flags.kept_heap),
        "shares": list(SHARES),
    }
    results: dict[str, tuple[int, list[Loop], list[Row]]] = {}
    started = time.perf_counter()
    for case in cases:
        results[case] = measure(case, repeats=repeats, looks=looks, threads=flags.threads)
        # After every case, so that what is measured outlives what the next one does.
        told = {
            name: {
                "full_peak_bytes": peak,
                "loops": [asdict(each) for each in loops],
                "rows": [
                    {**asdict(row), "ratio": row.ratio and row.ratio.median, "verdict": row.verdict} for row in rows
                ],
            }
            for name, (peak, loops, rows) in results.items()
        }
        write({**record, "cases": told}, as_markdown(record, results), out)
        for row in results[case][2]:
            print(_line(row))
        print(f"    {time.perf_counter() - started:.0f} s so far", flush=True)
    if out.parent == RESULTS.parent and not flags.quick and flags.case is None:
        rows = [row for _, _, found in results.values() for row in found]
        page = put_between(PAGE.read_text(encoding="utf-8"), out.name, page_table(rows, record))
        PAGE.write_text(page, encoding="utf-8")
        print(f"written: {PAGE}")
    print(f"written: {out.with_suffix('.json')}, {out.with_suffix('.md')}")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
