"""Small steps of every kind, and everything that a fault in one of them may leave behind."""

from __future__ import annotations

import copy
import random
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import _get_current_function_mode_stack
from torch.utils._python_dispatch import _get_current_dispatch_mode_stack

import microbatch as mb

_C: Any = getattr(torch, "_C")  # noqa: B009 - private, and without types
ROWS, LARGE, SMALL = 8, 4, 2


class Small(nn.Module):
    """A model with a buffer, random numbers of two generators, and a block for checkpointing."""

    seen: Tensor

    def __init__(self, *, norm: bool = True, dtype: torch.dtype = torch.float32) -> None:
        super().__init__()
        self.first = nn.Linear(4, 6, dtype=dtype)
        self.norm = nn.BatchNorm1d(6, dtype=dtype) if norm else nn.Identity()
        self.block = nn.Sequential(nn.Linear(6, 6, dtype=dtype), nn.Tanh())
        self.last = nn.Linear(6, 3, dtype=dtype)
        self.register_buffer("seen", torch.zeros(()))

    def forward(self, x: Tensor) -> Tensor:
        """Return outputs of shape ``(rows, 3)``."""
        self.seen.add_(random.random())  # noqa: S311 - Python's generator is to be put back too
        hidden = torch.dropout(self.norm(self.first(x)).tanh(), 0.1, self.training)
        return self.last(self.block(hidden))


def mean(model: nn.Module, x: Tensor) -> Tensor:
    """Return a plain mean."""
    return model(x).square().mean()


def similar(model: nn.Module, out: Tensor) -> Tensor:
    """Return a loss that couples the rows."""
    return (out @ out.T).square().mean()


@dataclass
class Job:
    """A model that has made one step, and the next step to take.

    The user's own gradients, and momentum, are there before it.
    """

    model: nn.Module
    optimizer: torch.optim.Optimizer
    accumulator: mb.Accumulator
    batch: Tensor
    take: Callable[[Job], object]
    scale: float = 1.0

    def step(self) -> object:
        """Take one step."""
        return self.take(self)

    def state(self) -> dict[str, Any]:
        """Return a copy of everything that a step may change."""
        weights = self.model.named_parameters()
        state: dict[str, Any] = {f"weight {name}": each.detach().clone() for name, each in weights}
        state |= {f"buffer {name}": each.clone() for name, each in self.model.named_buffers()}
        for name, each in self.model.named_parameters():
            state[f"gradient {name}"] = None if each.grad is None else each.grad.clone()
            state[f"optimizer {name}"] = copy.deepcopy(dict(self.optimizer.state.get(each, {})))
        return state | modes() | {"torch": torch.get_rng_state(), "python": random.getstate()}


def modes() -> dict[str, Any]:
    """Return what is switched on in this thread; steps leave it as it was."""
    return {
        "function modes": len(_get_current_function_mode_stack()),
        "dispatch modes": len(_get_current_dispatch_mode_stack()),
        "gradients": torch.is_grad_enabled(),
        "inference": torch.is_inference_mode_enabled(),
        "autocast": torch.is_autocast_enabled("cpu"),
        "autocast cache": torch.is_autocast_cache_enabled(),
        "hooks on saved tensors": _C._autograd._top_saved_tensors_default_hooks(False) is not None,
        "deterministic": torch.are_deterministic_algorithms_enabled(),
    }


def differences(one: Mapping[str, Any], other: Mapping[str, Any]) -> list[str]:
    """Return the names of what differs between two states, bit by bit."""
    return [name for name in one if not _same(one[name], other[name])]


def _same(one: Any, other: Any) -> bool:
    if isinstance(one, Tensor):
        return isinstance(other, Tensor) and torch.equal(one, other)
    if isinstance(one, dict):
        return isinstance(other, dict) and one.keys() == other.keys() and all(_same(one[k], other[k]) for k in one)
    return one == other


def make(kind: str, *, rows: int = LARGE, **more: Any) -> Job:
    """Make a job of a kind, always with the same numbers.

    Args:
        kind: A key of `KINDS`.
        rows: Rows of a microbatch.
        more: Other options of the accumulator.
    """
    settings, take = KINDS[kind]
    torch.manual_seed(0)
    random.seed(0)
    plain = {"microbatch_size": rows, "batch_norm": "microbatch", "buffers": "each", "memory_budget": "none"}
    options: dict[str, Any] = plain | settings | more
    model = Small(dtype=torch.bfloat16 if kind == "bfloat16" else torch.float32)
    if kind == "checkpoint":
        options["checkpoint"] = ["block"]
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    if kind == "scaler":
        options["grad_scaler"] = torch.amp.GradScaler("cpu", init_scale=2.0**7)
    if kind == "spill":
        options["offload"] = mb.Spill(model)
    accumulator = mb.Accumulator(model, optimizer, **options)
    batch = torch.randn(ROWS, 4, dtype=torch.bfloat16 if kind == "bfloat16" else torch.float32)
    job = Job(model, optimizer, accumulator, batch, take)
    job.step()
    job.scale = float("nan")
    for each in model.parameters():
        each.grad = torch.full_like(each, 0.5)
    return job


def _step(job: Job) -> object:
    return job.accumulator.step(job.batch, mean)


def _coupled(job: Job) -> object:
    return job.accumulator.step(job.batch, similar, encode=lambda model, x: model(x))


def _window(job: Job) -> object:
    with job.accumulator.window() as window:
        for x in window.split(job.batch):
            window.backward(mean(job.model, x))
    return window.step


def _windows(job: Job) -> object:
    for window in job.accumulator.windows(job.batch.split(SMALL), microbatches=4):
        for x in window:
            window.backward(mean(job.model, x))
    return None


def _gradient(job: Job) -> object:
    return job.accumulator.gradient(job.batch, mean)


def _skipped(job: Job) -> object:
    return job.accumulator.step(job.batch, lambda model, x: mean(model, x) * job.scale)


KINDS: dict[str, tuple[dict[str, Any], Callable[[Job], object]]] = {
    "plain": ({}, _step),
    "window": ({}, _window),
    "windows": ({}, _windows),
    "gradient": ({}, _gradient),
    "coupled": ({}, _coupled),
    "kept": ({"coupled": "keep"}, _coupled),
    "exact": ({"batch_norm": "exact"}, _step),
    "pooled": ({"batch_norm": "pooled"}, _step),
    "once": ({"buffers": "once"}, _step),
    "mean": ({"buffers": "mean"}, _step),
    "spill": ({}, _step),
    "checkpoint": ({}, _step),
    "by_row": ({"dropout": "by_row"}, _step),
    "scaler": ({"autocast": torch.float16}, _step),
    "momentum": ({"sums": mb.Sums(buffer="none")}, _step),
    "bfloat16": ({}, _step),
    "skipped": ({"nonfinite": "skip"}, _skipped),
    "skipped_momentum": ({"nonfinite": "skip", "sums": mb.Sums(buffer="none")}, _skipped),
    "unfused": ({"sums": mb.Sums(fuse=False)}, _step),
}
