"""Small jobs for sweeps: a noisy quadratic, whose curve is known."""

from typing import Any

import torch
from torch import Tensor, nn

import microbatch as mb


class Point(nn.Module):
    """A point that is drawn to the samples."""

    def __init__(self, dimensions: int) -> None:
        super().__init__()
        self.at = nn.Parameter(torch.full((dimensions,), 3.0, dtype=torch.float64))


def distance(model: nn.Module, rows: Tensor) -> mb.Loss:
    return mb.Loss(sum=0.5 * (model.get_parameter("at") - rows).square().sum(), count=float(len(rows)))


def quadratic(
    *,
    noise: float = 1.0,
    rate: float = 0.02,
    batch_size: int = 8,
    samples: int = 512,
    dimensions: int = 6,
    validation: bool = True,
    **options: Any,
) -> mb.Job:
    """Make a job whose gradient is the point's distance from the mean of the batch."""
    rows = torch.randn(samples, dimensions, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    rows = noise * (rows - rows.mean(dim=0))
    model = Point(dimensions)
    made: dict[str, Any] = {
        "model": model,
        "optimizer": torch.optim.SGD(model.parameters(), lr=rate),
        "loss_fn": distance,
        "data": rows,
        "validation": list(rows[:64]) if validation else None,
        "batch_size": batch_size,
        "epochs": 1.0,
    }
    return mb.Job(**(made | options))
