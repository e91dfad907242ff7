"""Real runs at a grid of learning rates, and at the rate that the range test suggests: how near is it to the best?

::

    python -m benchmarks.rate_grid                    both jobs: about half an hour on one core
    python -m benchmarks.rate_grid --job images

Every run is one of ``microbatch train``: the job's own warm-up, then a cosine. It ends with the loss of the held-out
set, averaged over the seeds. A run at a suggested rate is a run like the others; nothing is interpolated.
"""

from __future__ import annotations

import argparse
import json
import math
import statistics
import tempfile
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from torch.optim import Optimizer

import microbatch as mb
from benchmarks.machine import hardware, versions
from microbatch.devices.available_devices import resolve_device
from microbatch.train.config import load_settings
from microbatch.train.evaluate import evaluate
from microbatch.train.start import make_job, prepare
from microbatch.tuning.rate_search import ABOVE, BELOW

OUT = Path(__file__).parent / "results"
GRID = (5e-4, 1e-3, 1.8e-3, 3e-3, 5.5e-3, 1e-2, 3e-2)
SUGGESTIONS = ("steepest", "valley", "minimum_tenth")
NEAR = 0.02
_HEAD = """Written by `python -m benchmarks.rate_grid`. Every line is a run of `microbatch train`, with its warm-up and
its cosine. The loss is that of the held-out set at the end, a mean over the seeds. "Over the best" is how far it is
above the lowest loss of the grid; "of the fall" is how much of the way it went from the loss before training to that
lowest loss. Where there are several seeds, the error is the standard error of the difference to the best rate, seed by
seed. "Suggested by the wide range" is without
the second, finer test."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Setting:
    """Hold what is run of a job.

    Attributes:
        batch_size: Effective batch.
        steps: Optimizer steps of every real run.
        seeds: Seeds that a loss is averaged over.
    """

    batch_size: int
    steps: int
    seeds: Sequence[int]


SETTINGS = {
    "images": Setting(batch_size=8, steps=150, seeds=range(20)),
    "language": Setting(batch_size=8, steps=100, seeds=(0,)),
}


def trained(job: str, rate: float, *, setting: Setting, seed: int) -> float:
    """Train a job at a learning rate.

    Args:
        job: A key of `SETTINGS`.
        rate: The rate.
        setting: What is run.
        seed: The run's seed.

    Returns:
        The loss of the held-out set after the last step; infinite if the run broke off.
    """
    flags = {
        "job": job,
        "batch_size": setting.batch_size,
        "steps": setting.steps,
        "learning_rate": rate,
        "seed": seed,
        "device": "cpu",
        "memory": "none",
        "validate_every": setting.steps,
        "checkpoint_every": setting.steps,
        "compare": False,
        "nonfinite": "skip",
    }
    with tempfile.TemporaryDirectory() as folder:
        summary = prepare(flags, run=Path(folder) / "run").train()
    loss = float(summary["validation"]["loss"])
    return loss if math.isfinite(loss) else math.inf


def run(job: str, rate: float, *, setting: Setting, seed: int, kept: Path | None) -> float:
    """Return what `trained` does, from an earlier call with the same values where that was kept."""
    key = f"{job} {setting.batch_size} {setting.steps} {rate!r} {seed}"
    known: dict[str, float] = json.loads(kept.read_text(encoding="utf-8")) if kept and kept.exists() else {}
    if key not in known:
        known[key] = trained(job, rate, setting=setting, seed=seed)
        if kept:
            kept.write_text(json.dumps(known, indent=1) + "\n", encoding="utf-8")
    return known[key]


def untrained(job: str) -> float:
    """Return the loss of the held-out set before any training."""
    settings = load_settings({"job": job, "device": "cpu"})
    made = make_job(settings, resolve_device("cpu"))
    values = evaluate(made, microbatch_size=made.microbatch_size or 1, device=resolve_device("cpu"))
    return values["loss"]


def found(job: str, setting: Setting, *, wide: bool = False) -> mb.LearningRate:
    """Run the range test of a job, at the batch of the real runs; only the first, wide range of it, if asked for."""
    settings = load_settings({"job": job, "batch_size": setting.batch_size, "device": "cpu"})
    made = replace(make_job(settings, resolve_device("cpu")), memory_budget=None)
    given = made.optimizer.param_groups[0]["lr"] if wide and isinstance(made.optimizer, Optimizer) else None
    low, high = (given * BELOW, given * ABOVE) if given else (None, None)
    return mb.find_learning_rate(made, batch_size=setting.batch_size, low=low, high=high)


def measured(job: str, *, kept: Path | None = None) -> dict[str, Any]:
    """Run the grid, the range test, and the rates that it suggests.

    Args:
        job: A key of `SETTINGS`.
        kept: Where finished runs are kept, so that a benchmark that was broken off goes on; `None` keeps none.

    Returns:
        Losses by rate, the range test's result, and how far each suggestion is from the grid's best loss.
    """
    setting, started = SETTINGS[job], time.perf_counter()
    before, test, wide = untrained(job), found(job, setting), found(job, setting, wide=True)
    print(test, flush=True)
    named = {"suggested": test.suggested, "suggested_by_the_wide_range": wide.suggested}
    named |= {name: getattr(wide, name) for name in SUGGESTIONS}
    losses: dict[float, list[float]] = {}
    for rate in [*GRID, *(rate for rate in named.values() if rate is not None)]:
        if rate not in losses:
            losses[rate] = [run(job, rate, setting=setting, seed=seed, kept=kept) for seed in setting.seeds]
            print(f"{job}: {rate:.3g} ends at {statistics.fmean(losses[rate]):.4f}", flush=True)
    best = min((losses[rate] for rate in GRID), key=statistics.fmean)
    lines = [line(rate, each, best=best, before=before) for rate, each in losses.items()]
    return {
        "batch_size": setting.batch_size,
        "steps": setting.steps,
        "seeds": list(setting.seeds),
        "before": before,
        "runs": sorted(lines, key=lambda each: each["rate"]),
        "rates": named,
        "range_test": wide.as_dict(),
        "seconds": None if kept else time.perf_counter() - started,  # not of runs that were kept from before
    }


def line(rate: float, losses: Sequence[float], *, best: Sequence[float], before: float) -> dict[str, Any]:
    """Set the losses of a rate beside those of the grid's best rate.

    Args:
        rate: The rate.
        losses: Of each seed.
        best: Those of the best rate.
        before: The loss before any training.

    Returns:
        The mean loss; how far it is above the best, with the standard error of that; and its part of the fall.
    """
    mean, least = statistics.fmean(losses), statistics.fmean(best)
    differences = [each - other for each, other in zip(losses, best, strict=True)]
    error = statistics.stdev(differences) / math.sqrt(len(differences)) if len(differences) > 1 else None
    return {
        "rate": rate,
        "losses": list(losses),
        "loss": mean,
        "over_best": mean / least - 1,
        "error": None if error is None else error / least,
        "of_the_fall": (before - mean) / (before - least),
    }


def page(results: Mapping[str, Any]) -> str:
    """Write the results as Markdown.

    Args:
        results: What `measured` returned, by job.

    Returns:
        A table for each job.
    """
    parts = ["# The suggested learning rate, and a grid of real runs", "", _HEAD]
    for job, each in results.items():
        parts += ["", f"## {job}", ""]
        parts.append(f"Batch {each['batch_size']}, {each['steps']} steps, seeds {each['seeds']}.")
        parts += ["", "| rate | loss | over the best | error | of the fall | which |", "|---|---|---|---|---|---|"]
        names = {rate: name for name, rate in each["rates"].items() if rate is not None}
        for one in each["runs"]:
            error = "" if one["error"] is None else f"± {100 * one['error']:.1f} %"
            which = names.get(one["rate"], "grid").replace("_", " ")
            parts.append(
                f"| {one['rate']:.2g} | {one['loss']:.4f} | {100 * one['over_best']:+.1f} % | {error} | "
                f"{100 * one['of_the_fall']:.1f} % | {which} |"
            )
        parts += ["", judged(each)]
    return "\n".join(parts) + "\n"


def judged(result: Mapping[str, Any]) -> str:
    """Compare the loss at the suggestion with the best loss of the grid."""
    rate = result["rates"]["suggested"]
    if rate is None:
        return "The range test suggested nothing."
    over = next(each["over_best"] for each in result["runs"] if each["rate"] == rate)
    met = "within" if over <= NEAR else "not within"
    return f"The suggestion is {met} {100 * NEAR:.0f} % of the grid's best loss: {100 * over:+.1f} %."


def main() -> None:
    """Run what is asked for, and write the results."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--job", choices=list(SETTINGS), action="append", help="default: all of them")
    parser.add_argument("--out", type=Path, default=OUT)
    parser.add_argument("--kept", type=Path, help="a file of finished runs, to go on after a break")
    given = parser.parse_args()
    given.out.mkdir(parents=True, exist_ok=True)
    file = given.out / "rate-grid.json"
    results = json.loads(file.read_text(encoding="utf-8"))["jobs"] if file.exists() else {}
    for job in given.job or list(SETTINGS):
        results[job] = measured(job, kept=given.kept)
        told = {"hardware": hardware("cpu"), "versions": versions(), "jobs": results}
        file.write_text(json.dumps(told, indent=2) + "\n", encoding="utf-8")
        (given.out / "rate-grid.md").write_text(page(results), encoding="utf-8")


if __name__ == "__main__":
    main()
