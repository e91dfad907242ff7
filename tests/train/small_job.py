"""A job whose every step depends on every kind of state that a checkpoint has to bring back."""

import random
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from microbatch.train.job import Job


class Noisy(torch.utils.data.Dataset[tuple[Tensor, Tensor]]):
    """Samples that are drawn anew each time with Python's and NumPy's global generators."""

    def __init__(self, samples: int) -> None:
        self.x = torch.randn(samples, 6, generator=torch.Generator().manual_seed(1))

    def __len__(self) -> int:
        return len(self.x)

    def __getitem__(self, index: int) -> tuple[Tensor, Tensor]:
        noise = random.random() + float(np.random.rand())  # noqa: NPY002, S311 -- the global generators are the point
        return self.x[index] + 0.1 * noise, (self.x[index].sum() > 0).long()


class Net(nn.Module):
    """Dropout, BatchNorm, tied weights and a buffer that is not in the state dict but decides the loss."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.again, self.last = nn.Linear(6, 6), nn.Linear(6, 6), nn.Linear(6, 2)
        self.again.weight = self.first.weight
        self.norm, self.drop = nn.BatchNorm1d(6), nn.Dropout(0.2)
        self.register_buffer("calls", torch.zeros(()), persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        if self.training:
            self.calls += 1
        hidden = self.drop(self.norm(self.first(x)).relu()) * (1 + 0.01 * self.calls)
        return self.last(self.again(hidden))


def loss_fn(model: nn.Module, microbatch: Any) -> Tensor:
    x, y = microbatch
    return F.cross_entropy(model(x), y)


def small(*, device: torch.device) -> Job:
    """Make the job; 53 samples in batches of 8 leave a short last batch of 5."""
    model = Net().to(device)
    return Job(
        model=model,
        optimizer=torch.optim.AdamW(model.parameters(), lr=1e-2),
        loss_fn=loss_fn,
        data=Noisy(53),
        validation=[(x, (x.sum() > 0).long()) for x in torch.randn(11, 6)],
        batch_size=8,
        microbatch_size=3,
        batch_norm="microbatch",
        buffers="each",
        steps=40,
        warmup_steps=3,
        max_grad_norm=1.0,
    )
