"""Turn the curves of all runs into a sweep's result."""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence

from microbatch.tuning.sweep_fit import fit_critical
from microbatch.tuning.sweep_records import BEATEN, DIVERGED, BatchResult, SweepRun
from microbatch.tuning.sweep_result import Sweep
from microbatch.tuning.sweep_words import advise


def summarise(
    runs: Sequence[SweepRun], *, target: float | None, measure: str, unit: str = "samples", notes: Sequence[str] = ()
) -> Sweep:
    """Find the target, what each run took to it, and the critical batch size.

    Args:
        runs: All runs.
        target: The loss that the caller asked for; `None` for the worst of the best losses.
        measure: What the curves show.
        unit: What the job counts.
        notes: What the reader has to know already.

    Returns:
        The result.
    """
    given, notes = target is not None, [*notes, *_told(runs)]
    sizes = sorted({each.batch_size for each in runs})
    tried = {size: [each for each in runs if each.batch_size == size] for size in sizes}
    chosen = {size: _best_rate(tried[size], target) for size in sizes}
    if target is None:
        bests = [each.best_loss for those in chosen.values() for each in those]
        target = max(bests) if bests and math.isfinite(max(bests)) else None
    batches = tuple(_batch(chosen[size], tried[size], target=target) for size in sizes)
    reached = {each.batch_size for each in batches if each.samples is not None}
    if target is not None:
        notes += [_left_out(size, chosen[size], target) for size in sizes if size not in reached]
    found = {
        size: [way for run in chosen[size] if target is not None and (way := run.to_target(target)) is not None]
        for size in sizes
        if size in reached
    }
    critical = fit_critical(found)
    return Sweep(
        batches=batches,
        runs=tuple(runs),
        target=target,
        target_given=given,
        critical=critical,
        measure=measure,
        notes=tuple(notes),
        advice=advise(batches, critical),
        unit=unit,
    )


def _best_rate(runs: Sequence[SweepRun], target: float | None) -> list[SweepRun]:
    """Return the runs of the best learning rate of a batch size; none if every rate diverged or was beaten."""
    rates: dict[float, list[SweepRun]] = {}
    for run in runs:
        rates.setdefault(run.learning_rate, []).append(run)
    whole = {rate: those for rate, those in rates.items() if all(run.well for run in those)}

    def order(rate: float) -> tuple[float, float]:
        ways = [run.to_target(target) if target is not None else None for run in whole[rate]]
        steps = sum(math.inf if way is None else way[0] for way in ways) if target is not None else 0.0
        return steps, sum(run.best_loss for run in whole[rate])

    return whole[min(whole, key=order)] if whole else []


def _batch(chosen: Sequence[SweepRun], tried: Sequence[SweepRun], *, target: float | None) -> BatchResult:
    ways = [way for run in chosen if target is not None and (way := run.to_target(target)) is not None]
    whole = bool(chosen) and len(ways) == len(chosen)
    logs = [math.log(samples) for _, samples in ways]
    times = [found for run in chosen if (found := run.seconds_per_sample) is not None]
    reach = max((samples for _, samples in ways), default=math.inf)
    noises = [found for run in chosen if (found := run.noise_scale(reach)) is not None]
    first = (chosen or tried)[0]
    return BatchResult(
        batch_size=first.batch_size,
        microbatch_size=first.microbatch_size,
        learning_rate=first.learning_rate,
        rates=len({run.learning_rate for run in tried}),
        seeds=len(chosen),
        best_loss=statistics.fmean(run.best_loss for run in chosen) if chosen else None,
        reached=len(ways),
        steps=statistics.geometric_mean([steps for steps, _ in ways]) if whole else None,
        samples=statistics.geometric_mean([samples for _, samples in ways]) if whole else None,
        spread=statistics.stdev(logs) if whole and len(logs) > 1 else None,
        seconds_per_sample=statistics.median(times) if times else None,
        noise_scale=statistics.geometric_mean(noises) if noises else None,
    )


def _left_out(size: int, chosen: Sequence[SweepRun], target: float) -> str:
    """Say why a batch size is not in the fit."""
    if not chosen:
        return f"batch {size:,}: no learning rate ended well with every seed"
    early = sum(run.early(target) for run in chosen)
    if early:
        return (
            f"batch {size:,}: {early} of {len(chosen)} seeds were at the target at the first point already, so it is "
            "left out of the fit; use a lower target, or smaller batches alone"
        )
    reached = sum(run.to_target(target) is not None for run in chosen)
    return (
        f"batch {size:,}: {reached} of {len(chosen)} seeds reached the target, so it is left out of the fit; use more "
        "samples, or a higher target"
    )


def _told(runs: Sequence[SweepRun]) -> list[str]:
    """Say which runs ended before the others."""
    notes: list[str] = []
    beaten = [each for each in runs if each.ended == BEATEN]
    if beaten:
        samples = sum(each.curve[-1].samples for each in beaten if each.curve)
        notes.append(
            f"{len(beaten)} runs ended early, after {samples:,} samples together: another learning rate of the same "
            "batch size had a lower loss then (successive halving), and could have lost later"
        )
    diverged = [each for each in runs if each.ended == DIVERGED]
    for size in sorted({each.batch_size for each in diverged}):
        rates = sorted({each.learning_rate for each in diverged if each.batch_size == size})
        notes.append(f"batch {size:,}: diverged at learning rate {', '.join(f'{rate:.3g}' for rate in rates)}")
    return notes
