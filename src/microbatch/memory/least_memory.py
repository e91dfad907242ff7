"""The memory that every step needs before the first activation: weights, gradients and optimizer state."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy
from torch.optim import SGD, Adagrad, Adam, NAdam, Optimizer, RAdam, RMSprop

from microbatch.memory.budget import format_bytes
from microbatch.shards import local_of


@dataclass(frozen=True, slots=True)
class LeastMemory:
    """Hold the bytes that a step needs in any case; what this cannot know is left out, so the step needs more.

    Attributes:
        weights: Parameters and buffers.
        gradients: Gradients of what the optimizers train.
        state: State that the optimizers hold, or will create in their first step.
    """

    weights: int
    gradients: int
    state: int

    @property
    def total(self) -> int:
        """All of it, in bytes."""
        return self.weights + self.gradients + self.state

    def refusal(self, budget: int) -> str | None:
        """Describe why a budget is too small, and the least that could do; `None` if it is not."""
        if budget >= self.total:
            return None
        parts = [("weights and buffers", self.weights), ("gradients", self.gradients), ("optimizer state", self.state)]
        told = ", ".join(f"{name} {format_bytes(size)}" for name, size in parts if size)
        return (
            f"{format_bytes(budget)} cannot hold what every step of this model needs before the first activation: "
            f"{told}, together {format_bytes(self.total)}; allow more than {format_bytes(self.total)}"
        )


def least_memory(
    model: nn.Module, optimizers: Sequence[Optimizer], *, device: torch.device, gradients: bool = True
) -> LeastMemory:
    """Add up what a step needs in any case, on one device; of a model that is sharded over ranks, on this rank."""
    here = [each for each in (*model.parameters(), *model.buffers()) if _is_on(each, device)]
    trained = {id(each): each for optimizer in optimizers for each in _parameters(optimizer) if _is_on(each, device)}
    with_gradient = [each for each in trained.values() if each.requires_grad] if gradients else []
    return LeastMemory(
        weights=_bytes(here),
        gradients=_numbers(with_gradient),
        state=sum(_state_bytes(optimizer, device) for optimizer in optimizers),
    )


def state_copies(optimizer: Optimizer, group: Mapping[str, Any]) -> int:
    """Return how many tensors of a parameter's size one of torch's optimizers keeps for it; 0 for all others."""
    if isinstance(optimizer, SGD):
        return int(group["momentum"] != 0)
    if isinstance(optimizer, Adam | NAdam | RAdam):
        return 2 + int(group.get("amsgrad", False))
    if isinstance(optimizer, RMSprop):
        return 1 + int(group["centered"]) + int(group["momentum"] > 0)
    return int(isinstance(optimizer, Adagrad))


def _state_bytes(optimizer: Optimizer, device: torch.device) -> int:
    """Return the bytes of the state that an optimizer holds, or that one of torch's own will create."""
    held = [value for state in optimizer.state.values() for value in state.values() if isinstance(value, Tensor)]
    if held:
        return _numbers([each for each in held if _is_on(each, device)])
    total = 0
    # A class that inherits from one of torch's may create another state.
    known = type(optimizer).__module__.startswith("torch.optim")
    for group in optimizer.param_groups if known else ():
        trained = [each for each in group["params"] if each.requires_grad and _is_on(each, device)]
        total += state_copies(optimizer, group) * _numbers(trained)
    return total


def _parameters(optimizer: Optimizer) -> Iterable[Tensor]:
    return [each for group in optimizer.param_groups for each in group["params"]]


def _is_on(tensor: Tensor, device: torch.device) -> bool:
    return tensor.device.type == device.type and not is_lazy(tensor) and tensor.layout is torch.strided


def _bytes(tensors: Iterable[Tensor]) -> int:
    """Return the bytes of distinct storages."""
    storages = [local_of(each).untyped_storage() for each in tensors]
    return sum({each._cdata: each.nbytes() for each in storages}.values())  # pyright: ignore[reportPrivateUsage]


def _numbers(tensors: Iterable[Tensor]) -> int:
    """Return the bytes of the tensors' own numbers."""
    return sum(each.numel() * each.element_size() for each in map(local_of, tensors))
