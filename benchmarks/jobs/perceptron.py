"""A small job whose every step takes some milliseconds, for `benchmarks.kills`."""

from __future__ import annotations

import time
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

import microbatch as mb


class Perceptron(nn.Module):
    """Two layers with dropout, so that random numbers count."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.Sequential(nn.Linear(32, 256), nn.ReLU(), nn.Dropout(0.2), nn.Linear(256, 4))

    def forward(self, x: Tensor) -> Tensor:
        """Return the logits."""
        return self.layers(x)


def job(*, device: torch.device) -> mb.Job:
    """Make the job: 997 samples in batches of 16, with a short last one."""
    generator = torch.Generator().manual_seed(5)
    x = torch.randn(997, 32, generator=generator)
    y = (x[:, :8].sum(1) > 0).long() + 2 * (x[:, 8:16].sum(1) > 0).long()
    model = Perceptron().to(device)

    def loss_fn(model: nn.Module, microbatch: Any) -> Tensor:
        time.sleep(0.004)  # something to be killed in
        return F.cross_entropy(model(microbatch[0]), microbatch[1])

    return mb.Job(
        model=model,
        optimizer=torch.optim.AdamW(model.parameters(), lr=3e-3),
        loss_fn=loss_fn,
        data=list(zip(x, y, strict=True)),
        batch_size=16,
        microbatch_size=2,
    )
