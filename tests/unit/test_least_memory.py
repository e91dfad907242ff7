"""A budget below weights, gradients and optimizer state is refused before any window, with the least that could do."""

import re
from typing import Any

import pytest
import torch
from torch import nn

import microbatch as mb
from microbatch.errors import ConfigError
from microbatch.memory.budget import parse_bytes
from microbatch.memory.least_memory import least_memory

CPU = torch.device("cpu")


def tied() -> nn.Sequential:
    model = nn.Sequential(nn.Linear(6, 6), nn.Linear(6, 6), nn.BatchNorm1d(6))
    model[1].weight = model[0].weight
    return model


def held(model: nn.Module, optimizer: torch.optim.Optimizer) -> tuple[int, int, int]:
    """Count what is there after a step, by hand."""
    model(torch.randn(4, 6)).sum().backward()
    optimizer.step()
    weights = {id(each): each for each in (*model.parameters(), *model.buffers())}.values()
    gradients = [each.grad for each in model.parameters() if each.grad is not None]
    state = [each for values in optimizer.state.values() for each in values.values() if torch.is_tensor(each)]
    steps = [each for each in state if each.ndim == 0]
    sizes = [sum(each.numel() * each.element_size() for each in group) for group in (weights, gradients, state, steps)]
    return sizes[0], sizes[1], sizes[2] - sizes[3]


@pytest.mark.parametrize(
    ("kind", "options"),
    [
        (torch.optim.SGD, {}), (torch.optim.SGD, {"momentum": 0.9}), (torch.optim.Adam, {}),
        (torch.optim.AdamW, {"amsgrad": True}), (torch.optim.NAdam, {}), (torch.optim.RAdam, {}),
        (torch.optim.RMSprop, {}), (torch.optim.RMSprop, {"centered": True, "momentum": 0.9}),
        (torch.optim.Adagrad, {}),
    ],
)  # fmt: skip
def test_the_least_is_what_a_step_leaves(kind: Any, options: dict[str, Any]) -> None:
    model = tied()
    model[2].get_parameter("bias").requires_grad_(False)
    optimizer = kind(model.parameters(), lr=0.1, **options)
    least = least_memory(model, [optimizer], device=CPU)
    found = held(model, optimizer)
    assert (least.weights, least.gradients) == found[:2]
    assert found[2] <= least.state <= found[2] + 64  # Adagrad has its numbers of steps at once
    after = least_memory(model, [optimizer], device=CPU)
    assert found[2] <= after.state <= found[2] + 64


def test_an_unknown_optimizer_adds_nothing_that_is_not_there() -> None:
    class Own(torch.optim.AdamW):
        pass

    model = tied()
    assert least_memory(model, [Own(model.parameters())], device=CPU).state == 0
    assert least_memory(model, [torch.optim.AdamW(model.parameters())], device=torch.device("cuda")).total == 0


def budgeted(budget: int | str) -> mb.Step:
    model = tied().eval()
    optimizer = torch.optim.AdamW(model.parameters())
    calls: list[int] = []

    def loss(model: nn.Module, x: torch.Tensor) -> torch.Tensor:
        calls.append(1)
        return model(x).square().mean()

    accumulator = mb.Accumulator(model, optimizer, microbatch_size=4, memory_budget=budget)
    try:
        return accumulator.step(torch.randn(8, 6), loss)
    except ConfigError:
        assert calls == []  # before any retry, and before the model ran at all
        raise


def test_a_budget_below_it_is_refused_with_the_least_and_one_above_is_taken() -> None:
    with pytest.raises(ConfigError, match=r"memory_budget=3: 3 B cannot hold.*gradients.*optimizer state") as refused:
        budgeted(3)
    least = parse_bytes(re.findall(r"more than ([\d.]+ \w+)", str(refused.value))[0])
    with pytest.raises(ConfigError, match="cannot hold"):
        budgeted(least // 2)
    assert budgeted(8 * least).applied
