"""A job whose model is whole on one rank, and in stages where there are several; in float64."""

from dataclasses import replace
from itertools import pairwise

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.pipelining import PipelineStage

from microbatch.loss.loss import Loss
from microbatch.ranks.pipeline import Pipeline
from microbatch.train.job import Job

ROWS = 29
WIDTHS = [3, 6, 5, 5, 4]


def loss_fn(model: nn.Module, microbatch: tuple[Tensor, Tensor]) -> Loss:
    logits, labels = model(microbatch[0]).flatten(0, 1), microbatch[1].flatten()
    return Loss(sum=F.cross_entropy(logits, labels, reduction="sum"), count=(labels >= 0).sum())


def make(*, device: torch.device, stages: int = 2) -> Job:
    """29 sequences in batches of 7, the last of an epoch of 1: two pipelines have uneven shares, and one has none."""
    generator = torch.Generator().manual_seed(3)
    x = torch.randn(ROWS, 4, WIDTHS[0], dtype=torch.float64, generator=generator)
    labels = torch.randint(4, (ROWS, 4), generator=generator)
    for row in range(ROWS):
        labels[row, 1 + row % 4 :] = -100
    layers = [nn.Sequential(nn.Linear(a, b), nn.Tanh()) for a, b in pairwise(WIDTHS)]
    model: nn.Module = nn.Sequential(*layers).to(device, torch.float64)
    if dist.is_initialized():
        mesh = init_device_mesh("cpu", (dist.get_world_size() // 2, 2), mesh_dim_names=("dp", "pp"))
        each = len(layers) // stages
        parts = [nn.Sequential(*layers[at : at + each]) for at in range(0, len(layers), each)]
        own = range(mesh["pp"].get_local_rank(), stages, 2)
        group = mesh["pp"].get_group()
        model = Pipeline([PipelineStage(parts[index], index, stages, device, group=group) for index in own])
    data = list(zip(x, labels, strict=True))
    return Job(
        model=model,
        optimizer=torch.optim.AdamW(model.parameters(), lr=1e-2),
        loss_fn=loss_fn,
        data=data,
        validation=data[:11],
        batch_size=7,
        microbatch_size=2,
        steps=8,
        max_grad_norm=1.0,
    )


def two(*, device: torch.device) -> Job:
    return make(device=device)


def four(*, device: torch.device) -> Job:
    """With two stages a rank."""
    return make(device=device, stages=4)


class Drawing(nn.Module):
    """Draws a number, as dropout draws many."""

    def forward(self, x: Tensor) -> Tensor:
        self.drawn = float(torch.rand(()))
        return x


def drawing(*, device: torch.device) -> Job:
    """With a layer in each stage that draws."""
    job = make(device=device)
    for part in job.model.get_submodule("parts").children():
        assert isinstance(part, nn.Sequential)
        part.append(Drawing())
    return job


def failing(*, device: torch.device) -> Job:
    """Whose loss, on the last stage, fails from the third microbatch on."""
    job = make(device=device)
    calls = iter(range(1000))

    def loss_that_fails(model: nn.Module, microbatch: tuple[Tensor, Tensor]) -> Loss:
        loss = loss_fn(model, microbatch)
        if next(calls) >= 2:
            raise ValueError("no loss today")
        return loss

    return replace(job, loss_fn=loss_that_fails)


def failing_score(*, device: torch.device) -> Job:
    """Whose score fails on the last stage."""

    def score_that_fails(model: nn.Module, microbatch: tuple[Tensor, Tensor]) -> dict[str, Loss]:
        model(microbatch[0])
        raise ValueError("no score today")

    return replace(make(device=device), evaluate=score_that_fails)
