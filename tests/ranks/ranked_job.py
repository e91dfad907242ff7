"""A job for several ranks, in float64: exact sums, so that what differs is wrong."""

import signal
import time
from dataclasses import replace
from itertools import count

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn
from torch.distributed.fsdp import fully_shard

from microbatch.loss import losses
from microbatch.loss.loss import Loss
from microbatch.train.job import Job

ROWS = 29


def loss_fn(model: nn.Module, microbatch: tuple[Tensor, Tensor]) -> Tensor:
    return F.cross_entropy(model(microbatch[0]), microbatch[1])


def make(*, device: torch.device, dropout: float = 0.0, batch_size: int = 7, dtype: torch.dtype = torch.float64) -> Job:
    """29 samples in batches of 7, so that shares are uneven, an epoch's last batch has one row, and some have none."""
    x = torch.randn(ROWS, 5, generator=torch.Generator().manual_seed(3), dtype=dtype)
    y = (x.sum(1) > 0).long()
    model = nn.Sequential(nn.Linear(5, 9), nn.Tanh(), nn.Dropout(dropout), nn.Linear(9, 2)).to(device, dtype)
    pairs = list(zip(x, y, strict=True))
    return Job(
        model=model,
        optimizer=torch.optim.AdamW(model.parameters(), lr=1e-2),
        loss_fn=loss_fn,
        data=pairs,
        validation=pairs[:11],
        batch_size=batch_size,
        microbatch_size=2,
        steps=12,
        max_grad_norm=1.0,
    )


def plain(*, device: torch.device) -> Job:
    return make(device=device)


def dropping(*, device: torch.device) -> Job:
    return make(device=device, dropout=0.3, dtype=torch.float32)


def by_row(*, device: torch.device) -> Job:
    """With dropout whose masks are the rows'."""
    return replace(make(device=device, dropout=0.3), dropout="by_row")


def blocks(*, device: torch.device, own: bool = False) -> Job:
    """With a model of repeated blocks, two of which share a weight, and two groups of parameters."""
    job = make(device=device)
    middle = [nn.Sequential(nn.Linear(6, 6), nn.Tanh()) for _ in range(4)]
    middle[3][0].weight = middle[2][0].weight
    model = nn.Sequential(nn.Linear(5, 6), *middle, nn.Linear(6, 2)).to(device, torch.float64)
    if own:
        for block in [*middle[:2], model]:
            fully_shard(block)
    groups = [{"params": model[:3].parameters(), "lr": 2e-2}, {"params": model[3:].parameters()}]
    return replace(job, model=model, optimizer=torch.optim.AdamW(groups, lr=1e-2))


def own_shards(*, device: torch.device) -> Job:
    """The same, which shards its model itself where there are several ranks."""
    return blocks(device=device, own=dist.is_initialized())


class Two(nn.Module):
    """Two encoders of one input, and a temperature of the loss's."""

    def __init__(self) -> None:
        super().__init__()
        self.towers = nn.ModuleList(nn.Sequential(nn.Linear(5, 4), nn.Tanh()) for _ in range(2))
        self.scale = nn.Parameter(torch.tensor(0.3))

    def forward(self, x: Tensor) -> list[Tensor]:
        return [tower(x) for tower in self.towers]


def pairs(*, device: torch.device) -> Job:
    """One whose loss couples all samples of a batch."""
    model = Two().to(device, torch.float64)

    def clip(model: nn.Module, encoded: list[Tensor]) -> Loss:
        return losses.clip(*encoded, scale=model.get_parameter("scale").exp())

    return replace(
        make(device=device),
        model=model,
        optimizer=torch.optim.AdamW(model.parameters(), lr=1e-2),
        encode=lambda model, microbatch: model(microbatch[0]),
        loss_fn=clip,
        batch_size=9,
        steps=3,
    )


def slow(*, device: torch.device) -> Job:
    """The first, with steps that take long enough to be killed in."""
    job = make(device=device)

    def slowly(model: nn.Module, microbatch: tuple[Tensor, Tensor]) -> Tensor:
        time.sleep(0.03)
        return loss_fn(model, microbatch)

    return replace(job, loss_fn=slowly, steps=20)


def stopping(*, device: torch.device) -> Job:
    """The first, whose process is asked to stop in its third step; one that has a row in each."""
    job = make(device=device)
    calls = count(1)

    def loss_then_signal(model: nn.Module, microbatch: tuple[Tensor, Tensor]) -> Tensor:
        if next(calls) == 3:
            signal.raise_signal(signal.SIGTERM)
        return loss_fn(model, microbatch)

    return replace(job, loss_fn=loss_then_signal)
