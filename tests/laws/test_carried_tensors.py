"""A tensor that one microbatch leaves in the model for the next one is warned of, and every other one is not."""

import sys
import warnings
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import microbatch as mb


@pytest.fixture(autouse=True)
def uncompiled() -> None:
    """Forget what other tests have compiled: where a compiler has run, nothing is watched."""
    compiler = sys.modules.get("torch._dynamo.utils")
    if compiler is not None:
        compiler.counters.clear()


X = torch.randn(8, 4, generator=torch.Generator().manual_seed(0), dtype=torch.float64)


class Keeps(nn.Module):
    """A layer, and something that it keeps in plain attributes."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(1)
        self.layer = nn.Linear(4, 4, dtype=torch.float64)
        self.kept: Any = None

    def forward(self, x: Tensor) -> Tensor:
        return self.layer(x)


class State(Keeps):
    def forward(self, x: Tensor) -> Tensor:
        y = self.layer(x if self.kept is None else x + self.kept)
        self.kept = y.detach()
        return y


class InTuple(Keeps):
    def forward(self, x: Tensor) -> Tensor:
        y = self.layer(x if self.kept is None else x + self.kept[1].tanh())
        self.kept = (y.detach(), x)
        return y


class Mean(Keeps):
    def forward(self, x: Tensor) -> Tensor:
        mean = x.mean(0) if self.kept is None else 0.9 * self.kept + 0.1 * x.mean(0)
        self.kept = mean.detach()
        return self.layer(x - mean)


class Queue(Keeps):
    def __init__(self) -> None:
        super().__init__()
        self.kept = torch.ones(6, 4, dtype=torch.float64)

    def forward(self, x: Tensor) -> Tensor:
        y = self.layer(x) @ self.kept.clone().T
        with torch.no_grad():
            self.kept[:2] = x[:2]
        return y


class Table(Keeps):
    def forward(self, x: Tensor) -> Tensor:
        if self.kept is None:
            self.kept = torch.arange(4, dtype=torch.float64).cos()
        return self.layer(x * self.kept)


class Rebuilt(Keeps):
    """A mask for the rows at hand."""

    def forward(self, x: Tensor) -> Tensor:
        self.kept = torch.ones(len(x), 1, dtype=torch.float64)
        return self.layer(x * self.kept)


class Last(Keeps):
    def forward(self, x: Tensor) -> Tensor:
        self.kept = self.layer(x)
        return self.kept * 2


class Report(Keeps):
    def forward(self, x: Tensor) -> Tensor:
        y = self.layer(x)
        self.kept = y.detach().sum() + (0 if self.kept is None else self.kept)
        return y


class Scratch(Keeps):
    def __init__(self) -> None:
        super().__init__()
        self.kept, self.other = torch.empty(2, 4, dtype=torch.float64), torch.empty(2, 4, dtype=torch.float64)

    def forward(self, x: Tensor) -> Tensor:
        self.kept.copy_(x)
        torch.add(x, 1, out=self.other)
        return self.layer(self.kept + self.other)


class Reset(Keeps):
    """A state that begins anew in each forward."""

    def forward(self, x: Tensor) -> Tensor:
        self.kept = x.new_zeros(len(x), 4)
        for _ in range(2):
            self.kept = self.layer(x + self.kept)
        return self.kept


def square(model: nn.Module, x: Tensor) -> Tensor:
    return model(x).square().mean()


def gradient(model: nn.Module, size: int) -> Tensor:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        mb.Accumulator(model, microbatch_size=size).gradient(X, square)
    weight = next(model.parameters())
    assert weight.grad is not None
    return weight.grad


@pytest.mark.parametrize("kind", [State, InTuple, Mean, Queue])
@pytest.mark.parametrize("nested", [False, True])
def test_a_tensor_that_the_next_microbatch_reads_is_named_once(kind: type[Keeps], *, nested: bool) -> None:
    assert not torch.allclose(gradient(kind(), 2), gradient(kind(), 8))  # it does depend on the size
    model = nn.Sequential(kind()) if nested else kind()
    it = mb.Accumulator(model, torch.optim.SGD(model.parameters(), lr=0.1), microbatch_size=2)
    name = "0.kept" if nested else "kept"
    with pytest.warns(mb.MicrobatchWarning, match=rf"left in the model: {name}\. .*depends on the microbatch size"):
        it.step(X, square)
    for _ in range(2):
        it.step(X, square)  # pytest turns a second warning into an error


@pytest.mark.parametrize("kind", [Keeps, Table, Rebuilt, Last, Report, Scratch, Reset])
def test_what_changes_no_loss_is_silent(kind: type[Keeps]) -> None:
    torch.testing.assert_close(gradient(kind(), 2), gradient(kind(), 8 if kind is not Scratch else 2))
    model = kind()
    it = mb.Accumulator(model, torch.optim.SGD(model.parameters(), lr=0.1), microbatch_size=2)
    for _ in range(3):
        it.step(X, square)


def test_a_hand_written_loop_is_watched_too() -> None:
    model = State()
    it = mb.Accumulator(model, torch.optim.SGD(model.parameters(), lr=0.1), microbatch_size=4)

    def loop() -> None:
        with it.window() as window:
            for x in window.split(X):
                window.backward(square(model, x))

    with pytest.warns(mb.MicrobatchWarning, match="left in the model: kept"):
        loop()


def test_one_microbatch_has_none_before_it() -> None:
    model = State()
    it = mb.Accumulator(model, torch.optim.SGD(model.parameters(), lr=0.1), microbatch_size=8)
    for _ in range(3):
        it.step(X, square)
