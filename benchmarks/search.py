"""Hold the microbatch size that "auto" chooses against the best of all sizes, and count what choosing costs.

::

    python -m benchmarks.search                        half an hour on two cores
    python -m benchmarks.search --case vit --repeats 5 --out /tmp/search
    python -m benchmarks.search --quick                does everything run?

Every size runs in a process of its own, a window each in turn, round after round, which tells the best. Then "auto"
runs in fresh processes until it has chosen, and goes on there, in turn with the process of the best size: the choice
is close enough if the median over these rounds of its time over the best size's is. So what a process remembers of the
sizes that it tried (pages that the C library keeps) counts on the side where it happens. What choosing costs is every
second of the steps until the choice, rehearsals included, beyond as many steps of a run that has the size from the
start; it is compared with 200 steps.
"""

from __future__ import annotations

import argparse
import gc
import json
import os
import time
from collections.abc import Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, dataclass, field
from functools import partial
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

import microbatch as mb
from benchmarks.cases import CASES, loss_sum
from benchmarks.contenders import make_subject
from benchmarks.machine import busy_seconds, hardware, versions
from benchmarks.summary import NOISY, Summary, order_of_round, summarize, summarize_ratio
from benchmarks.worker import Spec, Worker

RESULTS = Path(__file__).parent / "results" / "search"
DEFAULT_CASES = ("gpt", "vit", "residual")
CLOSE, OVERHEAD, RUN, PROBES = 1 / 0.95, 0.03, 200, 5
"""The goals: time at most so much of the best size's; costs at most this part of so many steps; sizes timed."""
_WARM_UP = 3  # windows: the meter is on in the first two
_MOST_STEPS = 80


@dataclass(frozen=True, slots=True, kw_only=True)
class Auto:
    """One run of "auto" until it has chosen.

    Attributes:
        microbatch_size: What it chose.
        decided: Whether speed was measured; if not, it refused, and the size is a default.
        why: In its words.
        timed: Seconds per row by size, as it measured them.
        sizes: Microbatch size of each step until the choice.
        seconds: Of each of these steps, from the call to the return.
        rehearsal_seconds: Of the first two steps, what went before their windows.
        after: Seconds of steps after the choice, in the same process.
        best: Seconds of the best size's windows in its own process, in turn with ``after``.
        first: Seconds of the first windows of a process that had the chosen size from the start.
    """

    microbatch_size: int
    decided: bool
    why: str
    timed: dict[int, float]
    sizes: list[int]
    seconds: list[float]
    rehearsal_seconds: float
    after: list[float] = field(default_factory=list[float])
    best: list[float] = field(default_factory=list[float])
    first: list[float] = field(default_factory=list[float])

    @property
    def against_best(self) -> float:
        """Median over the rounds of what was chosen over the best size."""
        return summarize_ratio(self.after, self.best).median

    @property
    def overhead(self) -> float:
        """What choosing took beyond as many steps of a run that begins with the size, as a part of 200 steps."""
        step = summarize(self.after).median
        # The first windows of any process are slower: memory is new, and the optimizer makes its state.
        without = sum(self.first) + (len(self.seconds) - len(self.first)) * step
        return (sum(self.seconds) - without) / (RUN * step)


@dataclass(frozen=True, slots=True, kw_only=True)
class Row:
    """A case: every size, and what "auto" made of it.

    Attributes:
        case: A key of `CASES`.
        batch_size: Rows of the effective batch.
        seconds: Of each window, by microbatch size; one for each round.
        trials: Runs of "auto".
        others_cpu: Share of the machine's cores that other jobs took while sizes were timed, or `None` if unknown.
    """

    case: str
    batch_size: int
    seconds: dict[int, list[float]]
    trials: list[Auto]
    others_cpu: float | None

    @property
    def times(self) -> dict[int, Summary]:
        """Each size's windows."""
        return {size: summarize(taken) for size, taken in self.seconds.items()}

    @property
    def best(self) -> int:
        """The size whose windows took least."""
        times = self.times
        return min(times, key=lambda size: times[size].median)

    @property
    def noisy(self) -> bool:
        """Whether another job was running."""
        return self.times[self.best].noisy or (self.others_cpu or 0.0) > NOISY

    def against_best(self, size: int) -> float:
        """Return the median over the rounds of a size's time over the best size's."""
        return summarize_ratio(self.seconds[size], self.seconds[self.best]).median


class Choosing:
    """A training run with ``microbatch_size="auto"``.

    Args:
        case: A key of `CASES`.
        threads: Threads of torch's operators.
    """

    def __init__(self, case: str, threads: int) -> None:
        torch.set_num_threads(threads)
        self._subject = subject = make_subject(case, 1, device="cpu")
        self._case = case
        self._chosen: list[mb.PlanChosen] = []
        self._accumulator = mb.Accumulator(
            subject.model, subject.optimizer, microbatch_size="auto", listeners=[self._listen]
        )

    def step(self) -> tuple[float, mb.Step]:
        """Take a step, and say how long it took from the call to the return."""
        gc.collect()  # as before every window that it is compared with
        started = time.perf_counter()
        step = self._accumulator.step(self._subject.batch, _loss)
        return time.perf_counter() - started, step

    def choose(self) -> Auto:
        """Train until it has chosen.

        Raises:
            RuntimeError: It has not chosen within 80 steps.
        """
        sizes: list[int] = []
        seconds: list[float] = []
        rehearsal = 0.0
        while not self._chosen:
            if len(sizes) == _MOST_STEPS:
                raise RuntimeError(f'"auto" has chosen no size for {self._case} in {_MOST_STEPS} steps')
            taken, step = self.step()
            seconds.append(taken)
            sizes.append(int(step.microbatch_size))
            if len(sizes) <= 2:
                rehearsal += taken - step.seconds
        chosen = self._chosen[0]
        return Auto(
            microbatch_size=chosen.microbatch_size,
            decided=chosen.decided,
            why=chosen.why,
            timed=dict(chosen.seconds),
            sizes=sizes,
            seconds=seconds,
            rehearsal_seconds=rehearsal,
        )

    def _listen(self, event: object) -> None:
        if isinstance(event, mb.PlanChosen):
            self._chosen.append(event)


_RUNS: list[Choosing] = []
"""Of the process that a run of "auto" has for itself: it goes on after the choice."""


def _begin(case: str, threads: int) -> Auto:
    _RUNS.append(Choosing(case, threads))
    return _RUNS[0].choose()


def _go_on() -> float:
    return _RUNS[0].step()[0]


def _loss(model: nn.Module, piece: dict[str, Tensor]) -> mb.Loss:
    return mb.Loss(sum=loss_sum(model, piece), count=piece["labels"].numel())


def measure(case: str, *, repeats: int, trials: int, threads: int) -> Row:
    """Time every size of a case, then let "auto" choose.

    Args:
        case: A key of `CASES`.
        repeats: Rounds; at least 1.
        trials: Runs of "auto", each in a fresh process.
        threads: Threads of torch's operators.
    """
    rows = CASES[case].batch_size
    sizes = [1 << power for power in range(rows.bit_length()) if 1 << power <= rows]
    spec = partial(Spec, case=case, contenders=("microbatch",), device="cpu", threads=threads)
    workers = {size: Worker(spec(microbatch_size=size)) for size in sizes}
    seconds: dict[int, list[float]] = {size: [] for size in sizes}
    try:
        first = {
            size: [worker.window("microbatch").seconds for _ in range(_WARM_UP)] for size, worker in workers.items()
        }
        spent, busy, started = _spent(workers), busy_seconds(), time.perf_counter()
        for index in range(repeats):
            for size in map(int, order_of_round([str(size) for size in sizes], index)):
                seconds[size].append(workers[size].window("microbatch").seconds)
        elapsed, busy_now = time.perf_counter() - started, busy_seconds()
        mine = _spent(workers) - spent
        others = None
        if busy is not None and busy_now is not None:
            others = max(0.0, (busy_now - busy - mine) / (elapsed * (os.cpu_count() or 1)))
        row = Row(case=case, batch_size=rows, seconds=seconds, trials=[], others_cpu=others)
        for _ in range(trials):
            trial = _trial(row, workers[row.best], repeats=repeats, threads=threads)
            trial.first.extend(first[trial.microbatch_size])
            row.trials.append(trial)
    finally:
        for worker in workers.values():
            worker.close()
    return row


def _trial(row: Row, best: Worker, *, repeats: int, threads: int) -> Auto:
    """Let "auto" choose, and hold what it chose against the best size."""
    with ProcessPoolExecutor(1, mp_context=get_context("spawn")) as fresh:
        found = fresh.submit(_begin, row.case, threads).result()
        turns = {
            "auto": lambda: found.after.append(fresh.submit(_go_on).result()),
            "best": lambda: found.best.append(best.window("microbatch").seconds),
        }
        for turn in turns.values():  # the meter may be on in the first window after the choice
            turn()
        found.after.clear()
        found.best.clear()
        for index in range(repeats):
            for name in order_of_round(list(turns), index):
                turns[name]()
    return found


def _spent(workers: Mapping[int, Worker]) -> float:
    return time.process_time() + sum(worker.spent() for worker in workers.values())


def verdicts(row: Row) -> list[tuple[str, str, str]]:
    """Hold a case against the goals.

    Args:
        row: What was measured.

    Returns:
        Goal, what was measured, and ``"met"``, ``"missed"``, ``"refused"`` or, with another job running,
        ``"undecided"``; a goal that one trial misses is missed.
    """
    close = [each.against_best for each in row.trials if each.decided]
    costs = [each.overhead for each in row.trials]
    probes = max(len(each.timed) for each in row.trials)
    refused = len(row.trials) - len(close)

    def verdict(*, good: bool) -> str:
        return "undecided" if row.noisy else "met" if good else "missed"

    found = [
        (
            "chosen size within 5 % of the best",
            ", ".join(f"{each:.3f}" for each in close) or "-",
            "refused" if not close else verdict(good=max(close) <= CLOSE),
        ),
        (f"costs less than {OVERHEAD:.0%} of {RUN} steps", _percent(costs), verdict(good=max(costs) < OVERHEAD)),
        (f"at most {PROBES} sizes timed", str(probes), "met" if probes <= PROBES else "missed"),
    ]
    return found if not refused else [*found, ("runs that refused to decide", f"{refused} of {len(row.trials)}", "-")]


def _percent(parts: Sequence[float]) -> str:
    return ", ".join(f"{each:.1%}" for each in parts)


def as_markdown(rows: Sequence[Row], record: Mapping[str, Any]) -> str:
    """Return the tables.

    Args:
        rows: What was measured.
        record: On what.
    """
    on = "; ".join(f"{name} {value}" for each in ("hardware", "versions") for name, value in record[each].items())
    how = (
        f"Times are medians of {record['repeats']} windows, the sizes in turn, each in a process of its own; "
        '"auto" goes on in the process that chose.'
    )
    lines = [
        "# The chosen microbatch size",
        "",
        f"`{record['command']}`; {on}; {record['threads']} threads. {how}",
        "",
        "| model | goal | measured | |",
        "|---|---|---|---|",
        *(f"| {row.case} | {' | '.join(verdict)} |" for row in rows for verdict in verdicts(row)),
    ]
    for row in rows:
        marks = {each.microbatch_size for each in row.trials}
        lines += ["", f"## {row.case}, batch {row.batch_size}", ""]
        if row.others_cpu is not None:
            lines += [f"Other jobs took {row.others_cpu:.0%} of the cores.", ""]
        lines += ["| microbatch | window | of the best | |", "|---|---|---|---|"]
        for size, taken in row.times.items():
            mark = ", ".join(["best"] * (size == row.best) + ["chosen"] * (size in marks))
            spread = f"{1000 * taken.median:,.0f} ms ± {taken.spread / 2:.1%}"
            lines.append(f"| {size} | {spread} | {row.against_best(size):.3f} | {mark} |")
        lines += [
            "",
            '| "auto" | steps until then | of them rehearsal | costs | then | of the best | timed | why |',
            "|---|---|---|---|---|---|---|---|",
        ]
        for each in row.trials:
            timed = ", ".join(f"{size}: {1000 * taken * row.batch_size:,.0f} ms" for size, taken in each.timed.items())
            took = f"{len(each.seconds)}, {sum(each.seconds):.1f} s"
            why = each.why if each.decided else f"refused: {each.why}"
            lines.append(
                f"| {each.microbatch_size} | {took} | {each.rehearsal_seconds:.1f} s | {each.overhead:.1%} "
                f"| {1000 * summarize(each.after).median:,.0f} ms | {each.against_best:.3f} | {timed} | {why} |"
            )
    return "\n".join(lines) + "\n"


def main(arguments: Sequence[str] | None = None) -> int:
    """Measure, print and write.

    Args:
        arguments: Of the command line; `None` for this process's own.

    Returns:
        0.
    """
    parser = argparse.ArgumentParser(prog="python -m benchmarks.search", description="See the module's docstring.")
    even = [name for name, case in CASES.items() if case.lengths is None]
    parser.add_argument("--case", nargs="+", choices=even, help="what is trained")
    parser.add_argument("--repeats", type=int, help="rounds over all sizes (default 7; quick 2)")
    parser.add_argument("--trials", type=int, help='runs of "auto" (default 3; quick 1)')
    parser.add_argument("--threads", type=int, default=os.cpu_count() or 1)
    parser.add_argument("--quick", action="store_true", help="a tiny case: does everything run?")
    parser.add_argument("--out", type=Path, help="where to write, without ending (default benchmarks/results/search)")
    flags = parser.parse_args(arguments)
    cases = flags.case or (["tiny"] if flags.quick else list(DEFAULT_CASES))
    repeats, trials = flags.repeats or (2 if flags.quick else 7), flags.trials or (1 if flags.quick else 3)
    out = flags.out or (RESULTS.with_name("search-quick") if flags.quick else RESULTS)
    record: dict[str, Any] = {
        "command": "python -m benchmarks.search" + (" --quick" if flags.quick else ""),
        "date": time.strftime("%Y-%m-%d"),
        "hardware": hardware("cpu"),
        "versions": versions(),
        "threads": flags.threads,
        "repeats": repeats,
    }
    rows: list[Row] = []
    markdown = ""
    out.parent.mkdir(parents=True, exist_ok=True)
    for case in cases:
        rows.append(measure(case, repeats=repeats, trials=trials, threads=flags.threads))
        # After every case, so that what is measured outlives what the next one does.
        markdown = as_markdown(rows, record)
        told = [{"case": row.case, "verdicts": verdicts(row)} for row in rows]
        text = json.dumps({**record, "verdicts": told, "rows": [asdict(row) for row in rows]}, indent=1)
        out.with_suffix(".json").write_text(text + "\n", encoding="utf-8")
        out.with_suffix(".md").write_text(markdown, encoding="utf-8")
        print("\n".join(f"{row['case']}: {'; '.join(map(str, row['verdicts']))}" for row in told[-1:]), flush=True)
    print(f"\n{markdown}\nwritten: {out.with_suffix('.json')}, {out.with_suffix('.md')}")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
