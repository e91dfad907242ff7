"""Search a learning rate with Ray Tune; every trial takes exact steps of the same effective batch.

Ray runs trials side by side and ends bad ones early (ASHA). In each trial an accumulator gives the whole batch's
gradient in the memory that the trial has.
"""

from typing import Any

import torch
from ray import tune  # pyright: ignore[reportMissingImports]
from torch import Tensor, nn

import microbatch as mb

ROWS, BATCH, STEPS = 512, 64, 80


def loss_fn(model: nn.Module, microbatch: tuple[Tensor, Tensor]) -> mb.Loss:
    rows, labels = microbatch
    return mb.losses.cross_entropy(model(rows), labels)


def trial(config: dict[str, Any]) -> None:
    torch.manual_seed(0)
    rows = torch.randn(ROWS, 8)
    labels = (rows[:, 0] * rows[:, 1] > 0).long()
    model = nn.Sequential(nn.Linear(8, 32), nn.Tanh(), nn.Linear(32, 2))
    optimizer = torch.optim.AdamW(model.parameters(), lr=config["lr"])
    accumulator = mb.Accumulator(model, optimizer, microbatch_size=16)
    for step in range(STEPS):
        start = step * BATCH % ROWS
        batch = rows[start : start + BATCH], labels[start : start + BATCH]
        tune.report({"loss": float(accumulator.step(batch, loss_fn).loss)})


def main(trials: int = 8) -> float:
    tuner = tune.Tuner(
        tune.with_resources(trial, {"cpu": 1}),
        param_space={"lr": tune.loguniform(1e-4, 1e-1)},
        tune_config=tune.TuneConfig(
            metric="loss", mode="min", num_samples=trials, scheduler=tune.schedulers.ASHAScheduler(max_t=STEPS)
        ),
    )
    return float(tuner.fit().get_best_result().metrics["loss"])


if __name__ == "__main__":
    print(f"best loss: {main():.3f}")
