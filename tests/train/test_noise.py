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


def estimate(
    batch: Tensor, *, microbatch_size: int, max_grad_norm: float | None = None, windows: int = 1
) -> list[float | None]:
    """Estimate in windows of a batch like this one, the first of them with it."""
    model = Dot(batch.shape[1])
    found = NoiseScale(model)
    accumulator = mb.Accumulator(
        model,
        torch.optim.SGD(model.parameters(), lr=0.0),
        microbatch_size=microbatch_size,
        max_grad_norm=max_grad_norm,
        listeners=[lambda event: found.microbatch_done(event.rows) if isinstance(event, MicrobatchDone) else None],
    )
    estimates: list[float | None] = []
    for _ in range(windows):
        found.begin(due=True)
        estimates.append(found.end(accumulator.step(batch, lambda model, x: model(x).mean())))
        batch = rows(len(batch))
    return estimates


def rows(number: int) -> Tensor:
    return 0.5 + 2.0 * torch.randn(number, 50)  # |G|^2 = 12.5, S = 50 * 4 = 200: a noise scale of 16 samples


@pytest.mark.parametrize("clip", [None, 0.1])
@pytest.mark.parametrize(("batch_size", "microbatch_size"), [(64, 8), (50, 8), (96, 64), (23, 1)])
def test_it_is_the_formula_whatever_the_cut_the_short_last_one_and_the_clip(
    batch_size: int, microbatch_size: int, clip: float | None
) -> None:
    batch = rows(batch_size)
    means = [part.double().mean(0) for part in batch.split(microbatch_size)]
    counts = [len(part) for part in batch.split(microbatch_size)]
    whole = batch.double().mean(0).square().sum()
    parts = sum(count * mean.square().sum() for count, mean in zip(counts, means, strict=True))
    noise = (parts - batch_size * whole) / (len(counts) - 1)
    expected = float(noise / (whole - noise / batch_size))
    assert expected > 0
    found = estimate(batch, microbatch_size=microbatch_size, max_grad_norm=clip)
    assert found == [pytest.approx(expected, rel=1e-4)]


def test_it_is_what_the_rows_were_drawn_with() -> None:
    assert estimate(rows(64), microbatch_size=8, windows=40)[-1] == pytest.approx(16, rel=0.2)


def test_one_microbatch_tells_nothing() -> None:
    assert estimate(rows(8), microbatch_size=8, windows=2) == [None, None]


def test_a_window_that_is_not_measured_copies_nothing() -> None:
    model: Any = Dot(3)
    found = NoiseScale(model)
    found.begin(due=False)
    model.weight.grad = torch.ones(3)
    found.microbatch_done(2)
    assert found._before is None
