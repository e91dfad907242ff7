"""Small networks, trained at multiples of the suggested learning rate: is the suggestion too low, or too high?

::

    python -m benchmarks.rate_factors        about three minutes on one core

`benchmarks.rate_grid` asks it of two jobs. These are four others, with other optimizers. Every run has a warm-up of ten
steps, a cosine, and gradients clipped to a norm of 1, as the jobs have.
"""

from __future__ import annotations

import argparse
import json
import math
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cache, partial
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.optim import SGD, AdamW, Optimizer

import microbatch as mb
from benchmarks.machine import hardware, versions
from benchmarks.report import write
from microbatch.train.jobs.pictures import hold_out, read_digits
from microbatch.train.schedule import warmup_cosine

OUT = Path(__file__).parent / "results" / "rate-factors"
FACTORS = (0.5, 0.7, 1.0, 1.4, 2.0, 2.8)
STEPS, SEEDS, WARMUP_STEPS, NORM = (100, 300), range(8), 10, 1.0

Batch = Mapping[str, Tensor]


@dataclass(frozen=True, slots=True, kw_only=True)
class Problem:
    """Hold a network, its data and its optimizer.

    Attributes:
        network: Makes the network, from torch's random state.
        data: Returns the rows to train on, and those that are held out.
        optimizer: Makes the optimizer: of parameters and ``lr``.
        rate: The rate that the range of the test is built around.
        batch_size: Rows of a step.
    """

    network: Callable[[], nn.Module]
    data: Callable[[], tuple[Batch, Batch]]
    optimizer: Callable[..., Optimizer]
    rate: float
    batch_size: int


@cache
def teacher() -> tuple[Batch, Batch]:
    """Return points whose classes a network with random weights gives."""
    draw = torch.Generator().manual_seed(0)
    first, second = torch.randn(20, 64, generator=draw) / 3, torch.randn(64, 10, generator=draw) / 4
    points = torch.randn(6144, 20, generator=draw)
    classes = ((points @ first).tanh() @ second).argmax(1)
    rows = {"x": points, "y": classes}
    return {name: each[:4096] for name, each in rows.items()}, {name: each[4096:] for name, each in rows.items()}


@cache
def digits() -> tuple[Batch, Batch]:
    """Return the images of the job `images`, at mean 0 and scale 1."""
    both = hold_out(read_digits(), share=0.2, seed=0)
    mean, scale = both[0].images.mean(), both[0].images.std()
    train, held_out = ({"x": (part.images - mean) / scale, "y": part.labels} for part in both)
    return train, held_out


def perceptron() -> nn.Module:
    """Return three layers for points of 20 numbers."""
    return nn.Sequential(nn.Linear(20, 64), nn.ReLU(), nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 10))


def convolutions() -> nn.Module:
    """Return two convolutions and a linear layer, for images of 8 times 8."""
    layers = [nn.Conv2d(1, 8, 3, padding=1), nn.ReLU(), nn.Conv2d(8, 16, 3, stride=2, padding=1), nn.ReLU()]
    return nn.Sequential(*layers, nn.Flatten(), nn.Linear(256, 10))


ADAM, MOMENTUM = partial(AdamW, betas=(0.9, 0.99)), partial(SGD, momentum=0.9)
PROBLEMS = {
    "perceptron, Adam": Problem(network=perceptron, data=teacher, optimizer=ADAM, rate=1e-3, batch_size=32),
    "perceptron, momentum": Problem(network=perceptron, data=teacher, optimizer=MOMENTUM, rate=0.1, batch_size=32),
    "convolutions, Adam": Problem(network=convolutions, data=digits, optimizer=ADAM, rate=1e-3, batch_size=16),
    "convolutions, momentum": Problem(network=convolutions, data=digits, optimizer=MOMENTUM, rate=0.01, batch_size=32),
}


def loss_of(model: nn.Module, batch: Batch) -> Tensor:
    """Return the mean cross-entropy."""
    return F.cross_entropy(model(batch["x"]), batch["y"])


def found(problem: Problem) -> mb.LearningRate:
    """Run the range test of a problem."""
    torch.manual_seed(0)
    model, (train, _) = problem.network(), problem.data()
    job = mb.Job(
        model=model,
        optimizer=problem.optimizer(model.parameters(), lr=problem.rate),
        loss_fn=loss_of,
        data=[{name: each[row] for name, each in train.items()} for row in range(len(train["x"]))],
        batch_size=problem.batch_size,
        microbatch_size=problem.batch_size,
        max_grad_norm=NORM,
    )
    return mb.find_learning_rate(job)


def trained(problem: Problem, rate: float, *, steps: int, seed: int) -> float:
    """Train a problem in plain PyTorch, and return the loss of the rows that are held out."""
    torch.manual_seed(seed)
    model, (train, held_out) = problem.network(), problem.data()
    optimizer, size = problem.optimizer(model.parameters(), lr=rate), problem.batch_size
    rows = len(train["x"])
    order = torch.cat([torch.randperm(rows) for _ in range(1 + steps * size // rows)])
    for step, chosen in enumerate(order[: steps * size].split(size)):
        share = warmup_cosine(step, steps=steps, warmup_steps=WARMUP_STEPS, final_fraction=0.1)
        for group in optimizer.param_groups:
            group["lr"] = rate * share
        optimizer.zero_grad()
        loss_of(model, {name: each[chosen] for name, each in train.items()}).backward()
        nn.utils.clip_grad_norm_(model.parameters(), NORM)
        optimizer.step()
    with torch.no_grad():
        loss = float(loss_of(model, held_out))
    return loss if math.isfinite(loss) else math.inf


def measured(problem: Problem) -> dict[str, Any]:
    """Run the range test, and real runs at multiples of what it suggests.

    Args:
        problem: The problem.

    Returns:
        The suggestion; and for each number of steps, each factor's mean loss and how far it is above the lowest one,
        with the standard error of that.
    """
    started, suggested = time.perf_counter(), found(problem).suggested
    if suggested is None:
        return {"suggested": None, "runs": []}
    lines: list[dict[str, Any]] = []
    for steps in STEPS:
        losses = {
            factor: [trained(problem, factor * suggested, steps=steps, seed=seed) for seed in SEEDS]
            for factor in FACTORS
        }
        best = min(losses.values(), key=statistics.fmean)
        least = statistics.fmean(best)
        for factor, each in losses.items():
            apart = [a - b for a, b in zip(each, best, strict=True)]
            lines.append(
                {
                    "steps": steps,
                    "factor": factor,
                    "loss": statistics.fmean(each),
                    "over_best": statistics.fmean(each) / least - 1,
                    "error": statistics.stdev(apart) / math.sqrt(len(apart)) / least,
                }
            )
    return {"suggested": suggested, "runs": lines, "seconds": time.perf_counter() - started}


def page(results: Mapping[str, Any]) -> str:
    """Write the results as Markdown.

    Args:
        results: What `measured` returned, by problem.

    Returns:
        A table.
    """
    lines = [
        "# Multiples of the suggested learning rate",
        "",
        "Written by `python -m benchmarks.rate_factors`. How far the loss of the held-out rows is above that of the",
        f"best multiple, a mean over {len(SEEDS)} seeds. Each run has a warm-up and a cosine. The error is the",
        "standard error of the difference at the suggestion, seed by seed.",
        "",
        "| problem | suggested | steps | " + " | ".join(f"× {factor:g}" for factor in FACTORS) + " | error |",
        "|---" * (len(FACTORS) + 4) + "|",
    ]
    for name, each in results.items():
        for steps in STEPS:
            runs = {run["factor"]: run for run in each["runs"] if run["steps"] == steps}
            if runs:
                cells = [f"{100 * run['over_best']:+.1f} %" for run in runs.values()]
                ends = f"± {100 * runs[1.0]['error']:.1f} %"
                lines.append(f"| {name} | {each['suggested']:.2g} | {steps} | " + " | ".join([*cells, ends]) + " |")
    return "\n".join(lines) + "\n"


def main(arguments: Sequence[str] | None = None) -> int:
    """Measure, print and write.

    Args:
        arguments: Of the command line; `None` for this process's own.

    Returns:
        0.
    """
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.rate_factors", description=(__doc__ or "").partition("\n")[0]
    )
    parser.add_argument("--out", type=Path, default=OUT, help="where to write, without suffix")
    given = parser.parse_args(arguments)
    torch.set_num_threads(1)
    results = {name: measured(problem) for name, problem in PROBLEMS.items()}
    record = {"hardware": hardware("cpu"), "versions": versions(), "problems": results}
    markdown = page(results)
    print(json.dumps({name: each["suggested"] for name, each in results.items()}))
    print(markdown)
    write(record, markdown, given.out)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
