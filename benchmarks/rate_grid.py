"""Real runs at a grid of learning rates, and at the rate that the range test suggests: how near is it to the best?

::

    python -m benchmarks.rate_grid                    both jobs: about ten minutes on one core
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
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import microbatch as mb
from benchmarks.machine import hardware, versions
from microbatch.train.config import load_settings
from microbatch.train.resolve import resolve_device
from microbatch.train.start import make_job, prepare

OUT = Path(__file__).parent / "results"
GRID = (1e-4, 3e-4, 1e-3, 3e-3, 1e-2, 3e-2, 1e-1)
SUGGESTIONS = ("suggested", "steepest", "valley", "minimum_tenth")
NEAR = 0.02
_HEAD = """Written by `python -m benchmarks.rate_grid`. Every line is a run of `microbatch train`, with its warm-up and
its cosine. The loss is that of the held-out set at the end, a mean over the seeds. "Over the best" is how far it is
above the lowest loss of the grid; "of the fall" is how much of the way it went from the loss before training to that
lowest loss. Where there are several seeds, the error is the standard error of the difference to the best rate, seed by
seed."""


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
    "images": Setting(batch_size=32, steps=150, seeds=(0, 1, 2)),
    "language": Setting(batch_size=8, steps=150, seeds=(0,)),
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


def mean_loss(job: str, rate: float, *, setting: Setting) -> float:
    """Average the loss of a rate over the seeds."""
    return statistics.fmean(trained(job, rate, setting=setting, seed=seed) for seed in setting.seeds)


def found(job: str, setting: Setting) -> mb.LearningRate:
    """Run the range test of a job, at the batch of the real runs."""
    settings = load_settings({"job": job, "batch_size": setting.batch_size, "device": "cpu"})
    return mb.find_learning_rate(make_job(settings, resolve_device("cpu")), batch_size=setting.batch_size)


def measured(job: str) -> dict[str, Any]:
    """Run the grid, the range test, and the rates that it suggests.

    Args:
        job: A key of `SETTINGS`.

    Returns:
        Losses by rate, the range test's result, and how far each suggestion is from the grid's best loss.
    """
    setting, started = SETTINGS[job], time.perf_counter()
    losses: dict[float, float] = {}
    for rate in GRID:
        losses[rate] = mean_loss(job, rate, setting=setting)
        print(f"{job}: {rate:.3g} ends at {losses[rate]:.4f}", flush=True)
    test = found(job, setting)
    best = min(losses.values())
    suggestions: dict[str, Any] = {}
    for name in SUGGESTIONS:
        rate = getattr(test, name)
        if rate is None:
            suggestions[name] = None
            continue
        known = [each["loss"] for each in suggestions.values() if each and each["rate"] == rate]
        loss = known[0] if known else mean_loss(job, rate, setting=setting)
        suggestions[name] = {"rate": rate, "loss": loss, "over_best": loss / best - 1}
        print(f"{job}: {name} {rate:.3g} ends at {loss:.4f}, {100 * (loss / best - 1):+.1f} %", flush=True)
    return {
        "batch_size": setting.batch_size,
        "steps": setting.steps,
        "seeds": list(setting.seeds),
        "grid": [{"rate": rate, "loss": loss} for rate, loss in losses.items()],
        "range_test": test.as_dict(),
        "suggestions": suggestions,
        "seconds": time.perf_counter() - started,
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
        best = min(line["loss"] for line in each["grid"])
        lines = [(line["rate"], line["loss"], "") for line in each["grid"]]
        lines += [(one["rate"], one["loss"], name) for name, one in each["suggestions"].items() if one]
        parts += ["", f"## {job}", ""]
        parts.append(f"Batch {each['batch_size']}, {each['steps']} steps, seeds {each['seeds']}.")
        parts += ["", "| rate | loss | over the best | suggestion |", "|---|---|---|---|"]
        parts += [
            f"| {rate:.3g} | {loss:.4f} | {100 * (loss / best - 1):+.1f} % | {name} |"
            for rate, loss, name in sorted(lines)
        ]
        suggested = each["suggestions"]["suggested"]
        if suggested is None:
            parts += ["", "The range test suggested nothing."]
        else:
            met = "within" if suggested["over_best"] <= NEAR else "not within"
            parts += ["", f"The suggestion is {met} {100 * NEAR:.0f} % of the grid's best loss."]
    return "\n".join(parts) + "\n"


def main() -> None:
    """Run what is asked for, and write the results."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--job", choices=list(SETTINGS), action="append", help="default: all of them")
    parser.add_argument("--out", type=Path, default=OUT)
    given = parser.parse_args()
    given.out.mkdir(parents=True, exist_ok=True)
    file = given.out / "rate-grid.json"
    kept = json.loads(file.read_text(encoding="utf-8"))["jobs"] if file.exists() else {}
    for job in given.job or list(SETTINGS):
        kept[job] = measured(job)
        told = {"hardware": hardware("cpu"), "versions": versions(), "jobs": kept}
        file.write_text(json.dumps(told, indent=2) + "\n", encoding="utf-8")
        (given.out / "rate-grid.md").write_text(page(kept), encoding="utf-8")


if __name__ == "__main__":
    main()
