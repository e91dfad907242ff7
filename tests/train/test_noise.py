"""The noise scale, where it is known: rows whose gradients are drawn from a normal distribution."""

from typing import Any

import pytest
import torch
from torch import Tensor, nn

import microbatch as mb
from microbatch.step.events import MicrobatchDone
from microbatch.train.noise import NoiseScale


class Dot(nn.Module):
    """Its gradient is the mean of the rows it was given."""

    def __init__(self, length: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(length))

    def forward(self, x: Tensor) -> Tensor:
        return x @ self.weight


def estimate(*, batch_size: int, microbatch_size: int, max_grad_norm: float | None = None) -> list[float | None]:
    length, spread = 50, 2.0
    mean = torch.full((length,), 0.5)  # |G|^2 = 12.5, S = 50 * 4 = 200: a noise scale of 16 samples
    model = Dot(length)
    found = NoiseScale(model)
    accumulator = mb.Accumulator(
        model,
        torch.optim.SGD(model.parameters(), lr=0.0),
        microbatch_size=microbatch_size,
        max_grad_norm=max_grad_norm,
        listeners=[lambda event: found.microbatch_done(event.rows) if isinstance(event, MicrobatchDone) else None],
    )
    estimates: list[float | None] = []
    for _ in range(40):
        found.begin(due=True)
        batch = mean + spread * torch.randn(batch_size, length)
        estimates.append(found.end(accumulator.step(batch, lambda model, x: model(x).mean())))
    return estimates


@pytest.mark.parametrize(("batch_size", "microbatch_size"), [(64, 8), (50, 8), (96, 32)])
def test_it_is_found_whatever_the_cut_the_short_last_one_and_the_clip(batch_size: int, microbatch_size: int) -> None:
    for clip in (None, 0.1):
        last = estimate(batch_size=batch_size, microbatch_size=microbatch_size, max_grad_norm=clip)[-1]
        assert last == pytest.approx(16, rel=0.3)


def test_one_microbatch_tells_nothing() -> None:
    assert estimate(batch_size=8, microbatch_size=8) == [None] * 40


def test_a_window_that_is_not_measured_copies_nothing() -> None:
    model: Any = Dot(3)
    found = NoiseScale(model)
    found.begin(due=False)
    model.weight.grad = torch.ones(3)
    found.microbatch_done(2)
    assert found._before is None
