"""Law S5 in lockstep: a buffer that every forward pass moves is moved once, from its value before the window."""

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import microbatch as mb

from .reference import Batch, gradients_of, relative_error, subject
from .test_batchnorm import EXACT, WRONG, buffers_differ


class Centre(nn.Module):
    """Subtract a running centre, as DINO's teacher does, and move it by the mean of the whole batch."""

    def __init__(self, *, in_place: bool) -> None:
        super().__init__()
        self.in_place = in_place
        self.register_buffer("centre", torch.linspace(0, 1, 6).double())
        self.centre: Tensor

    def forward(self, x: Tensor) -> Tensor:
        out = x - self.centre
        mean = mb.batch_mean(x.detach().mean(0))
        if self.in_place:
            self.centre.mul_(0.9).add_(mean, alpha=0.1)
        else:
            self.centre = 0.9 * self.centre + 0.1 * mean
        return out


class Counting(nn.Module):
    """Scale by a counter of passes that two modules share."""

    def __init__(self, count: Tensor) -> None:
        super().__init__()
        self.register_buffer("count", count)
        self.count: Tensor

    def forward(self, x: Tensor) -> Tensor:
        self.count += 1
        return x * self.count.clone()


def two_that_share() -> nn.Module:
    count = torch.ones((), dtype=torch.float64)
    return nn.Sequential(Counting(count), Counting(count))


MIDDLE: dict[str, Callable[[], nn.Module]] = {
    "a centre in place": lambda: Centre(in_place=True),
    "a centre that is replaced": lambda: Centre(in_place=False),
    "spectral norm": lambda: nn.utils.parametrizations.spectral_norm(nn.Linear(6, 6)),
    "a shared counter": two_that_share,
}


def network(middle: nn.Module) -> nn.Module:
    torch.manual_seed(2)
    return nn.Sequential(nn.Linear(4, 6), nn.BatchNorm1d(6), nn.Tanh(), middle, nn.Linear(6, 3)).double()


def batch() -> Batch:
    torch.manual_seed(3)
    return {"x": torch.randn(8, 4).double(), "y": torch.randint(0, 3, (8,))}


def loss_fn(model: nn.Module, batch: Batch) -> Tensor:
    return F.cross_entropy(model(batch["x"]), batch["y"])


@pytest.mark.parametrize("size", [1, 3])
@pytest.mark.parametrize("what", MIDDLE)
def test_a_buffer_moves_once_in_a_window(what: str, size: int) -> None:
    torch.manual_seed(1)
    model = network(MIDDLE[what]())
    whole = copy.deepcopy(model)
    it = subject(model, size=size, batch_norm="exact")
    for _ in range(2):
        whole.zero_grad()
        loss_fn(whole, batch()).backward()
        it.accumulator.step(batch(), loss_fn)
        assert relative_error(it.updates[-1], gradients_of(whole)) <= EXACT
        assert buffers_differ(dict(it.model.named_buffers()), dict(whole.named_buffers())) <= EXACT


def test_microbatches_one_after_the_other_are_told_apart() -> None:
    """The negative control: the same model in a hand-written loop moves its buffer once a microbatch."""
    model = network(two_that_share())
    whole, twin = copy.deepcopy(model), copy.deepcopy(model)
    loss_fn(whole, batch())
    for piece in mb.cut(batch(), 4):
        loss_fn(twin, piece)
    moved: Any = buffers_differ(dict(twin.named_buffers()), dict(whole.named_buffers()))
    assert moved > WRONG


def test_a_window_that_fails_moves_no_buffer() -> None:
    model = network(MIDDLE["a centre in place"]())
    it = subject(model, size=3, batch_norm="exact")
    before = copy.deepcopy(dict(it.model.named_buffers()))

    def failing(model: nn.Module, batch: Batch) -> Tensor:
        loss = loss_fn(model, batch)
        if len(batch["y"]) < 3:
            raise ZeroDivisionError
        return loss

    with pytest.raises(ZeroDivisionError):
        it.accumulator.step(batch(), failing)
    assert buffers_differ(dict(it.model.named_buffers()), before) == 0.0
