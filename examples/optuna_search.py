"""Search a learning rate and a weight decay with Optuna; every trial takes exact steps of the same effective batch.

``mb.sweep`` compares batch sizes. A search over anything else is Optuna's work: it chooses values, and ends bad trials
early. The accumulator lets every trial have its whole batch, whatever fits into memory.
"""

from typing import Any

import optuna  # pyright: ignore[reportMissingImports]
import torch
from torch import Tensor, nn

import microbatch as mb

ROWS, BATCH, STEPS = 512, 64, 80


def data() -> tuple[Tensor, Tensor]:
    rows = torch.randn(ROWS, 8, generator=torch.Generator().manual_seed(0))
    return rows, (rows[:, 0] * rows[:, 1] > 0).long()


def loss_fn(model: nn.Module, microbatch: tuple[Tensor, Tensor]) -> mb.Loss:
    rows, labels = microbatch
    return mb.losses.cross_entropy(model(rows), labels)


def objective(trial: Any) -> float:
    rate = trial.suggest_float("lr", 1e-4, 1e-1, log=True)
    decay = trial.suggest_float("weight_decay", 1e-4, 1e-1, log=True)
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(8, 32), nn.Tanh(), nn.Linear(32, 2))
    optimizer = torch.optim.AdamW(model.parameters(), lr=rate, weight_decay=decay)
    accumulator = mb.Accumulator(model, optimizer, microbatch_size=16)
    rows, labels = data()
    loss = float("inf")
    for step in range(STEPS):
        start = step * BATCH % ROWS
        batch = rows[start : start + BATCH], labels[start : start + BATCH]
        loss = float(accumulator.step(batch, loss_fn).loss)
        trial.report(loss, step)
        if trial.should_prune():
            raise optuna.TrialPruned
    return loss


def main(trials: int = 12) -> float:
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    sampler = optuna.samplers.TPESampler(seed=0)
    study = optuna.create_study(sampler=sampler, pruner=optuna.pruners.MedianPruner(n_startup_trials=4))
    study.optimize(objective, n_trials=trials)
    return float(study.best_value)


if __name__ == "__main__":
    print(f"best loss: {main():.3f}")
