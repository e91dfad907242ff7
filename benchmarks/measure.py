"""Measure one row: every contender on one case at one microbatch size, in turn, round after round."""

from __future__ import annotations

import os
import time
from collections.abc import Sequence
from dataclasses import dataclass

from benchmarks.cases import CASES
from benchmarks.machine import busy_seconds
from benchmarks.summary import NOISY, Summary, order_of_round, summarize, summarize_ratio
from benchmarks.worker import Agreement, Footprint, Limit, Spec, Timing, Worker

MOST_ROUNDS = 101


@dataclass(frozen=True, slots=True, kw_only=True)
class Plan:
    """How a row is measured.

    Attributes:
        contenders: Names, in the table's order; the hand-written loop among them.
        repeats: Rounds, at least.
        row_seconds: Go on until the rounds of a set of processes have taken so long.
        retries: Times that a noisy row is measured again; the quietest is kept.
        memory: Whether to measure memory, in processes of its own.
        device: ``"cpu"`` or ``"cuda"``.
        threads: Threads of torch's operators.
        kept_heap: Whether the C library keeps freed memory, in every process.
        processes: Processes that each contender has, one after the other. Where memory lies differs from process to
            process, and can make one 5 % slower than the next.
    """

    contenders: tuple[str, ...]
    repeats: int
    row_seconds: float
    retries: int
    memory: bool
    device: str
    threads: int
    kept_heap: bool = False
    processes: int = 1


@dataclass(frozen=True, slots=True, kw_only=True)
class Entry:
    """One contender's numbers at one microbatch size of one case.

    Attributes:
        case: A key of `CASES`.
        batch_size: Rows of the effective batch.
        microbatch_size: Rows that went through at once.
        contender: Its name.
        seconds: Each window's wall-clock time, in seconds, in the order measured.
        cpu_seconds: Each window's time of all threads together, in seconds.
        time: Summary of ``seconds``.
        against_loop: Summary of the rounds' ratios to the hand-written loop.
        against_full: Summary of the rounds' ratios to the full batch, if it took part.
        peak_bytes: Most bytes that torch held at once in a window, or `None` if not measured.
        rss_bytes: Most bytes in RAM beyond what the imports took, or `None`.
        gradient_error: Of the first window's gradient, relative to the hand-written loop's.
        update_error: Of the first change of the weights, likewise.
        of_limit: Share of the speed of a large matrix product, measured in the same run, that the model's arithmetic
            (the full batch's, padding included) went at.
        others_cpu: Share of the machine's cores that other jobs took meanwhile, or `None` if unknown.
        noisy: Whether the interquartile range, of this or of the hand-written loop, or the machine itself says that
            another job was running.
    """

    case: str
    batch_size: int
    microbatch_size: int
    contender: str
    seconds: list[float]
    cpu_seconds: list[float]
    time: Summary
    against_loop: Summary
    against_full: Summary | None
    peak_bytes: int | None
    rss_bytes: int | None
    gradient_error: float
    update_error: float
    of_limit: float
    others_cpu: float | None
    noisy: bool


@dataclass(frozen=True, slots=True)
class _Rounds:
    timings: dict[str, list[Timing]]
    others_cpu: float | None

    @property
    def disturbance(self) -> float:
        spreads = [summarize([each.seconds for each in timings]).spread for timings in self.timings.values()]
        return max(*spreads, self.others_cpu or 0.0)


@dataclass(frozen=True, slots=True)
class _Measured:
    agreements: dict[str, Agreement]
    limit: Limit
    rounds: _Rounds


def _pooled(found: Sequence[_Rounds]) -> _Rounds:
    """Put the rounds of several sets of processes together."""
    timings = {name: [each for rounds in found for each in rounds.timings[name]] for name in found[0].timings}
    others = [rounds.others_cpu for rounds in found if rounds.others_cpu is not None]
    return _Rounds(timings, max(others, default=None))


class Bench:
    """Measure rows, and remember the full batch's memory, which is the same in every row of a case.

    Args:
        plan: How.
    """

    def __init__(self, plan: Plan) -> None:
        self._plan = plan
        self._footprints: dict[tuple[str, str, int], Footprint] = {}

    def row(self, case: str, microbatch_size: int) -> list[Entry]:
        """Measure every contender on one case at one microbatch size.

        Args:
            case: A key of `CASES`.
            microbatch_size: Rows that go through at once; divides the batch.

        Returns:
            One entry for each contender, in the plan's order.
        """
        plan, ragged = self._plan, CASES[case].lengths is not None
        names = [name for name in plan.contenders if ragged or name != "trimmed"]
        found = [self._measured(case, microbatch_size, names) for _ in range(plan.processes)]
        rounds = _pooled([each.rounds for each in found])
        agreements, limit = found[0].agreements, found[0].limit
        return [
            _entry(
                (case, microbatch_size, name),
                rounds=rounds,
                agreement=agreements[name],
                footprint=self._footprint(case, microbatch_size, name) if plan.memory else None,
                limit=limit,
            )
            for name in names
        ]

    def _measured(self, case: str, microbatch_size: int, names: Sequence[str]) -> _Measured:
        # A process for each: what one leaves of the heap would be another's to find.
        workers = {name: Worker(self._spec(case, microbatch_size, (name,))) for name in names}
        try:
            agreements = {name: workers[name].agreement(name) for name in names}
            for name in names:
                workers[name].window(name)  # makes what is made lazily, the optimizer's state for one
            return _Measured(agreements, workers["loop"].limit(), self._quietest(workers))
        finally:
            for worker in workers.values():
                worker.close()

    def _quietest(self, workers: dict[str, Worker]) -> _Rounds:
        best = self._rounds(workers)
        for _ in range(self._plan.retries):
            if best.disturbance <= NOISY:
                break
            best = min(best, self._rounds(workers), key=lambda each: each.disturbance)
        return best

    def _rounds(self, workers: dict[str, Worker]) -> _Rounds:
        plan = self._plan
        timings: dict[str, list[Timing]] = {name: [] for name in workers}
        spent, busy, started = self._spent(workers), busy_seconds(), time.perf_counter()
        for index in range(MOST_ROUNDS):
            if index >= plan.repeats and time.perf_counter() - started >= plan.row_seconds:
                break
            for name in order_of_round(list(workers), index):
                timings[name].append(workers[name].window(name))
        elapsed, busy_now = time.perf_counter() - started, busy_seconds()
        if busy is None or busy_now is None:
            return _Rounds(timings, None)
        others = (busy_now - busy) - (self._spent(workers) - spent)
        return _Rounds(timings, max(0.0, others / (elapsed * (os.cpu_count() or 1))))

    @staticmethod
    def _spent(workers: dict[str, Worker]) -> float:
        return time.process_time() + sum(worker.spent() for worker in workers.values())

    def _footprint(self, case: str, microbatch_size: int, name: str) -> Footprint:
        key = (case, name, CASES[case].batch_size if name == "full" else microbatch_size)
        if key not in self._footprints:
            worker = Worker(self._spec(case, microbatch_size, (name,)))
            try:
                self._footprints[key] = worker.footprint(name)
            finally:
                worker.close()
        return self._footprints[key]

    def _spec(self, case: str, microbatch_size: int, contenders: tuple[str, ...]) -> Spec:
        plan = self._plan
        return Spec(
            case=case,
            microbatch_size=microbatch_size,
            contenders=contenders,
            device=plan.device,
            threads=plan.threads,
        )


def _entry(
    row: tuple[str, int, str], *, rounds: _Rounds, agreement: Agreement, footprint: Footprint | None, limit: Limit
) -> Entry:
    case, microbatch_size, name = row
    seconds = {each: [timing.seconds for timing in timings] for each, timings in rounds.timings.items()}
    summary = summarize(seconds[name])
    return Entry(
        case=case,
        batch_size=CASES[case].batch_size,
        microbatch_size=microbatch_size,
        contender=name,
        seconds=seconds[name],
        cpu_seconds=[each.cpu_seconds for each in rounds.timings[name]],
        time=summary,
        against_loop=summarize_ratio(seconds[name], seconds["loop"]),
        against_full=summarize_ratio(seconds[name], seconds["full"]) if "full" in seconds else None,
        peak_bytes=footprint.peak_bytes if footprint else None,
        rss_bytes=footprint.rss_bytes if footprint else None,
        gradient_error=agreement.gradient_error,
        update_error=agreement.update_error,
        of_limit=limit.flops / limit.flops_per_second / summary.median,
        others_cpu=rounds.others_cpu,
        noisy=summary.noisy or summarize(seconds["loop"]).noisy or (rounds.others_cpu or 0.0) > NOISY,
    )
