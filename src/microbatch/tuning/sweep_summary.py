"""Turn the curves of all runs into a sweep's result."""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from microbatch.tuning.sweep_fit import crossing, fit_critical
from microbatch.tuning.sweep_records import BEATEN, DIVERGED, BatchResult, CurvePoint, SweepRun
from microbatch.tuning.sweep_result import Sweep
from microbatch.tuning.sweep_runs import RunPlan
from microbatch.tuning.sweep_words import advise


@dataclass(frozen=True, slots=True)
class Ended:
    """Hold a run that has ended.

    Attributes:
        plan: What it was trained with.
        ended: Why it ended.
        curve: Its curve.
    """

    plan: RunPlan
    ended: str
    curve: tuple[CurvePoint, ...]

    @property
    def well(self) -> bool:
        """Return whether it was neither beaten nor diverged."""
        return self.ended not in {BEATEN, DIVERGED}

    @property
    def best(self) -> float:
        """Return the lowest loss of the curve."""
        return min((point.loss for point in self.curve), default=math.inf)

    def to_target(self, target: float) -> tuple[float, float] | None:
        """Return steps and samples to a target; `None` if it was not reached."""
        losses = [point.loss for point in self.curve]
        steps = crossing(losses, [point.steps for point in self.curve], target)
        samples = crossing(losses, [point.samples for point in self.curve], target)
        return None if steps is None or samples is None else (steps, samples)

    def noise_scale(self, samples: float) -> float | None:
        """Return the geometric mean of the noise scales measured up to a number of samples."""
        found = [p.noise_scale for p in self.curve if p.noise_scale is not None and p.samples <= samples]
        return statistics.geometric_mean(found) if found else None


def summarise(
    ended: Sequence[Ended],
    *,
    target: float | None,
    seconds: Callable[[RunPlan], float | None],
    measure: str,
    unit: str,
    notes: Sequence[str],
) -> Sweep:
    """Find the target, what each run took to it, and the critical batch size.

    Args:
        ended: All runs.
        target: The loss that the caller asked for; `None` for the worst of the best losses.
        seconds: Returns the time of a sample in a run.
        measure: What the curves show.
        unit: What the job counts.
        notes: What the reader has to know already.

    Returns:
        The result.
    """
    given, notes = target is not None, [*notes, *_told(ended)]
    sizes = sorted({each.plan.batch_size for each in ended})
    tried = {size: [each for each in ended if each.plan.batch_size == size] for size in sizes}
    chosen = {size: _best_rate(tried[size], target) for size in sizes}
    if target is None:
        bests = [each.best for runs in chosen.values() for each in runs]
        target = max(bests) if bests and math.isfinite(max(bests)) else None
    batches = tuple(_batch(chosen[size], tried[size], target=target, seconds=seconds) for size in sizes)
    reached = {each.batch_size: each for each in batches if each.samples is not None}
    if target is not None:
        for each in batches:
            if each.samples is None:
                notes.append(
                    f"batch {each.batch_size:,}: {each.reached} of {len(chosen[each.batch_size])} seeds reached the "
                    "target, so it is left out of the fit; use more samples, or a higher target"
                )
    found = {
        size: [way for run in chosen[size] if target is not None and (way := run.to_target(target)) is not None]
        for size in reached
    }
    critical = fit_critical(found)
    runs = tuple(_run(each, target, seconds) for each in ended)
    return Sweep(
        batches=batches,
        runs=runs,
        target=target,
        target_given=given,
        critical=critical,
        measure=measure,
        notes=tuple(notes),
        advice=advise(batches, critical),
        unit=unit,
    )


def _best_rate(runs: Sequence[Ended], target: float | None) -> list[Ended]:
    """Return the runs of the best learning rate of a batch size; none if every rate diverged or was beaten."""
    rates: dict[float, list[Ended]] = {}
    for run in runs:
        rates.setdefault(run.plan.learning_rate, []).append(run)
    whole = {rate: those for rate, those in rates.items() if all(run.well for run in those)}

    def order(rate: float) -> tuple[float, float]:
        ways = [run.to_target(target) if target is not None else None for run in whole[rate]]
        steps = sum(math.inf if way is None else way[0] for way in ways) if target is not None else 0.0
        return steps, sum(run.best for run in whole[rate])

    return whole[min(whole, key=order)] if whole else []


def _batch(
    chosen: Sequence[Ended],
    tried: Sequence[Ended],
    *,
    target: float | None,
    seconds: Callable[[RunPlan], float | None],
) -> BatchResult:
    ways = [way for run in chosen if target is not None and (way := run.to_target(target)) is not None]
    whole = bool(chosen) and len(ways) == len(chosen)
    logs = [math.log(samples) for _, samples in ways]
    times = [found for run in chosen if (found := seconds(run.plan)) is not None]
    reach = max((samples for _, samples in ways), default=math.inf)
    noises = [found for run in chosen if (found := run.noise_scale(reach)) is not None]
    plan = (chosen or tried)[0].plan
    return BatchResult(
        batch_size=plan.batch_size,
        microbatch_size=plan.microbatch_size,
        learning_rate=plan.learning_rate,
        rates=len({run.plan.learning_rate for run in tried}),
        seeds=len(chosen),
        best_loss=statistics.fmean(run.best for run in chosen) if chosen else None,
        reached=len(ways),
        steps=statistics.geometric_mean([steps for steps, _ in ways]) if whole else None,
        samples=statistics.geometric_mean([samples for _, samples in ways]) if whole else None,
        spread=statistics.stdev(logs) if whole and len(logs) > 1 else None,
        seconds_per_sample=statistics.median(times) if times else None,
        noise_scale=statistics.geometric_mean(noises) if noises else None,
    )


def _run(each: Ended, target: float | None, seconds: Callable[[RunPlan], float | None]) -> SweepRun:
    way = None if target is None else each.to_target(target)
    return SweepRun(
        batch_size=each.plan.batch_size,
        learning_rate=each.plan.learning_rate,
        seed=each.plan.seed,
        ended=each.ended,
        curve=each.curve,
        seconds_per_sample=seconds(each.plan),
        steps_to_target=None if way is None else way[0],
        samples_to_target=None if way is None else way[1],
    )


def _told(ended: Sequence[Ended]) -> list[str]:
    """Say which runs ended before the others."""
    notes: list[str] = []
    beaten = [each for each in ended if each.ended == BEATEN]
    if beaten:
        samples = sum(each.curve[-1].samples for each in beaten if each.curve)
        notes.append(
            f"{len(beaten)} runs ended early, after {samples:,} samples together: another learning rate of the same "
            "batch size had a lower loss then (successive halving), and could have lost later"
        )
    diverged = [each for each in ended if each.ended == DIVERGED]
    for size in sorted({each.plan.batch_size for each in diverged}):
        rates = sorted({each.plan.learning_rate for each in diverged if each.plan.batch_size == size})
        notes.append(f"batch {size:,}: diverged at learning rate {', '.join(f'{rate:.3g}' for rate in rates)}")
    return notes
