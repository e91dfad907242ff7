"""Train the runs of a sweep in turns, and end those that another run has beaten."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from microbatch.train.job import Job
from microbatch.tuning.sweep_records import BEATEN, DIVERGED, FINISHED, REACHED, CurvePoint, SweepProgress, SweepRun
from microbatch.tuning.sweep_result import Sweep
from microbatch.tuning.sweep_runs import Jobs, RunPlan, Runs
from microbatch.tuning.sweep_setup import Setups, rule_warnings
from microbatch.tuning.sweep_summary import summarise

_RUNGS = (8, 4, 2)
"""Successive halving: after one part in so many of the samples, the worse half of the learning rates ends."""


@dataclass(slots=True)
class _Run:
    """One run as it stands."""

    plan: RunPlan
    ended: str | None = None
    curve: Sequence[CurvePoint] = ()

    @property
    def loss(self) -> float:
        """Return the loss at the newest point; infinite for a run that diverged."""
        return self.curve[-1].loss if self.curve and self.ended != DIVERGED else math.inf

    @property
    def share(self) -> float:
        """Return the share of its samples that it has trained on."""
        return self.plan.ends[len(self.curve) - 1] / self.plan.ends[-1] if self.curve else 0.0


class Rounds:
    """The runs of a sweep, which take turns.

    Args:
        jobs: Where the jobs come from.
        folder: Folder of the sweep.
        asked: The arguments of the sweep.
        progress: Called after every slice; `None` for nobody.
    """

    def __init__(
        self, jobs: Jobs, folder: Path, asked: Mapping[str, Any], *, progress: Callable[[SweepProgress], object] | None
    ) -> None:
        self._jobs, self._folder, self._asked, self._progress = jobs, folder, asked, progress
        self._runs = Runs(jobs, folder)
        self._points, self._target = int(asked["points"]), asked["target_loss"]
        self._notes: list[str] = []
        self._all: list[_Run] = []

    def run(self) -> Sweep:
        """Run them to their ends.

        Returns:
            The result.

        Raises:
            KeyboardInterrupt: A signal asked to stop.
        """
        setups = Setups(self._jobs, self._folder, self._asked, found=self._found)
        found = setups.read_or_find()
        self._notes = setups.notes
        self._all = [_Run(plan) for plan in self._plans(found)]
        for point in range(self._points):
            going = [run for run in self._all if run.ended is None]
            if not going:
                break
            turn = point % len(going)  # nobody is always first
            for run in (*going[turn:], *going[:turn]):
                self._advance(run, point)
            if self._asked["drop"]:
                self._drop_worse(point + 1)
        for run in self._all:
            run.ended = run.ended or FINISHED
        job = self._jobs.fresh(0)
        return summarise(
            [self._record(run) for run in self._all],
            target=None if self._target is None else float(self._target),
            measure=self._measure(job),
            unit=job.unit,
            # The warnings of the rule are about its rates.
            notes=(
                *self._notes,
                *(rule_warnings(job, self._asked["batch_sizes"]) if self._asked["lr"] != "auto" else ()),
            ),
        )

    def _record(self, run: _Run) -> SweepRun:
        return SweepRun(
            batch_size=run.plan.batch_size,
            microbatch_size=run.plan.microbatch_size,
            learning_rate=run.plan.learning_rate,
            seed=run.plan.seed,
            ended=run.ended or FINISHED,
            curve=tuple(run.curve),
            seconds_per_sample=self._runs.seconds_per_sample(run.plan),
        )

    def _advance(self, run: _Run, point: int) -> None:
        if not self._runs.advance(run.plan, point):
            run.ended = DIVERGED
        run.curve = self._runs.curve(run.plan, points=point + 1)
        if run.ended is None and self._target is not None and run.loss <= self._target:
            run.ended = REACHED
        told = SweepProgress(
            point=point + 1,
            points=self._points,
            batch_size=run.plan.batch_size,
            learning_rate=run.plan.learning_rate,
            seed=run.plan.seed,
            loss=run.curve[-1].loss if run.curve else None,
            running=sum(each.ended is None for each in self._all),
            share=sum(each.share for each in self._all) / sum(each.share if each.ended else 1.0 for each in self._all),
        )
        self._tell(told)

    def _drop_worse(self, done: int) -> None:
        """End learning rates that another one of the same batch size has beaten."""
        # In samples, by the smallest batch, whose points are the most exact.
        ends = self._all[0].plan.ends
        before, now = (ends[done - 2] if done > 1 else 0) / ends[-1], ends[done - 1] / ends[-1]
        rung = any(before < 1 / part <= now for part in _RUNGS)
        for size in self._asked["batch_sizes"]:
            rates: dict[float, list[_Run]] = {}
            for run in self._all:
                if run.plan.batch_size == size and run.ended not in {BEATEN, DIVERGED}:
                    rates.setdefault(run.plan.learning_rate, []).append(run)
            for rate, runs in list(rates.items()):
                if len(runs) < self._asked["seeds"] and len(rates) > 1:  # one of its seeds diverged
                    _end(rates.pop(rate))
            there = [rate for rate, runs in rates.items() if all(run.ended == REACHED for run in runs)]
            if there:
                beaten = [rate for rate in rates if rate not in there]
            elif rung:
                order = sorted(rates, key=lambda rate: sum(run.loss for run in rates[rate]))
                beaten = order[math.ceil(len(order) / 2) :]
            else:
                beaten = []
            for rate in beaten:
                _end(rates[rate])

    def _plans(self, found: Mapping[int, Mapping[str, Any]]) -> list[RunPlan]:
        return [
            RunPlan(
                batch_size=size,
                microbatch_size=setup["microbatch_size"],
                learning_rate=rate,
                seed=seed,
                ends=tuple(setup["ends"]),
                warmup_steps=setup["warmup_steps"],
                by_rule=setup["by_rule"],
                accumulation=self._asked["accumulation"],
            )
            for seed in range(self._asked["seeds"])
            for size, setup in sorted(found.items())
            for rate in setup["rates"]
        ]

    def _measure(self, job: Job) -> str:
        if job.validation is None:
            return "training loss"
        # A job may evaluate other things than a loss; then the curves are of the training loss.
        records = next((run.plan for run in self._all if run.curve), None)
        if records is not None and not self._runs.validates_loss(records):
            self._notes.append('the job\'s evaluate returns no "loss", so the curves are of the training loss')
            return "training loss"
        return "validation loss"

    def _found(self, size: int, rate: float) -> None:
        self._tell(SweepProgress(point=0, points=self._points, batch_size=size, learning_rate=rate))

    def _tell(self, told: SweepProgress) -> None:
        if self._progress is not None:
            self._progress(told)


def _end(runs: Sequence[_Run]) -> None:
    for run in runs:
        run.ended = run.ended or BEATEN
