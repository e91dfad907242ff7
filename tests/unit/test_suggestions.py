"""What the accumulator finds to be cheaper, and when it keeps quiet."""

from typing import Any

import pytest
import torch
from torch import nn
from torch.optim import SGD, Adam, AdamW, Optimizer, Rprop
from torch.optim.optimizer import ParamsT

import microbatch as mb


def suggested(optimizer: type[Optimizer], **how: Any) -> list[str]:
    model = nn.Linear(2, 2)
    return mb.Accumulator(model, optimizer(model.parameters(), **how), microbatch_size=1).suggestions()


@pytest.mark.parametrize("optimizer", [Adam, AdamW, SGD])
def test_fused_is_suggested_where_there_is_one_and_does_what_it_says(optimizer: type[Optimizer]) -> None:
    (text,) = suggested(optimizer, lr=0.1)
    assert f"{optimizer.__name__}(..., fused=True)" in text
    assert suggested(optimizer, lr=0.1, fused=True) == []


@pytest.mark.parametrize("how", [{"fused": False}, {"foreach": False}, {"foreach": True}, {"differentiable": True}])
def test_nothing_is_said_to_whoever_chose(how: dict[str, bool]) -> None:
    assert suggested(AdamW, lr=0.1, **how) == []


def test_foreach_where_there_is_no_fused() -> None:
    (text,) = suggested(Rprop, lr=0.1)
    assert "Rprop(..., foreach=True)" in text


def test_an_optimizer_that_knows_neither_is_left_alone() -> None:
    class Plain(Optimizer):
        def __init__(self, params: ParamsT, lr: float) -> None:
            super().__init__(params, {"lr": lr})

    assert suggested(Plain, lr=0.1) == []


def test_the_same_is_said_once() -> None:
    model = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2))
    optimizers = [SGD(layer.parameters(), lr=0.1) for layer in model]
    assert len(mb.Accumulator(model, optimizers, microbatch_size=1).suggestions()) == 1


def test_what_is_suggested_works_here() -> None:
    model = nn.Linear(2, 1)
    accumulator = mb.Accumulator(model, AdamW(model.parameters(), fused=True), microbatch_size=2)
    assert accumulator.step(torch.ones(3, 2), lambda model, x: model(x).mean()).applied
