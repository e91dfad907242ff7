"""A job of your own: every line is yours to change. `microbatch train FILE:job` trains it."""

from __future__ import annotations

from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import microbatch as mb


def job(seed: int, device: torch.device, data: Path | None = None, batch_size: int = 256) -> mb.Job:
    """Make the job: model, optimizer, loss and data. Each parameter is a flag of `microbatch train`, or a setting."""
    inputs, labels = two_spirals(4096, seed=seed) if data is None else read_csv(data)
    samples = list(zip(inputs, labels, strict=True))
    held_out = len(samples) // 10
    model = nn.Sequential(
        nn.Linear(inputs.shape[1], 64),
        nn.GELU(),
        nn.Linear(64, 64),
        nn.GELU(),
        nn.Linear(64, int(labels.max()) + 1),
    ).to(device)
    return mb.Job(
        model=model,
        optimizer=torch.optim.AdamW(model.parameters(), lr=3e-3),
        loss_fn=loss_fn,
        evaluate=evaluate,
        data=samples[held_out:],
        validation=samples[:held_out],
        batch_size=batch_size,
        epochs=20,
    )


def loss_fn(model: nn.Module, microbatch: tuple[Tensor, Tensor]) -> Tensor:
    """Return the mean over the rows of this microbatch. For a mean over something else, return mb.Loss(sum, count)."""
    inputs, labels = microbatch
    return F.cross_entropy(model(inputs), labels)


def evaluate(model: nn.Module, microbatch: tuple[Tensor, Tensor]) -> dict[str, mb.Loss]:
    """Return sums and counts for the validation; they are added up over the whole set."""
    inputs, labels = microbatch
    logits, rows = model(inputs), len(labels)
    return {
        "loss": mb.Loss(sum=F.cross_entropy(logits, labels, reduction="sum"), count=rows),
        "accuracy": mb.Loss(sum=(logits.argmax(1) == labels).sum().float(), count=rows),
    }


def two_spirals(rows: int, *, seed: int) -> tuple[Tensor, Tensor]:
    """Draw points of two spirals, of shape (rows, 2), and which spiral each is of, of shape (rows,)."""
    generator = torch.Generator().manual_seed(seed)
    labels = torch.randint(2, (rows,), generator=generator)
    turn = 3.0 * torch.pi * torch.rand(rows, generator=generator).sqrt()
    angle = turn + torch.pi * labels
    points = torch.stack([angle.cos(), angle.sin()], dim=1) * turn[:, None] / 5.0
    return points + 0.05 * torch.randn(rows, 2, generator=generator), labels


def read_csv(path: Path) -> tuple[Tensor, Tensor]:
    """Read rows of numbers; the last column is the class, from 0. Headings and text would need a reader of yours."""
    rows = [line.split(",") for line in path.read_text().splitlines() if line.strip()]
    table = torch.tensor([[float(number) for number in row] for row in rows])
    return table[:, :-1], table[:, -1].long()
