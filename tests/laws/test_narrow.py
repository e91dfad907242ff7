"""Laws P1 to P3 where sums in float32 do not fit: bfloat16 with one byte more."""

import copy
import math
from typing import Any

import pytest
import torch
from hypothesis import example, given
from hypothesis import strategies as st
from torch import Tensor, nn

import microbatch as mb
from microbatch import products
from microbatch.errors import ConfigError, NonfiniteError
from microbatch.gradients import fused_matmul
from microbatch.gradients.bfloat16_sums import PIECE, Compensated
from microbatch.memory.meter import MemoryMeter

from .reference import (
    Batch,
    by_hand,
    few,
    filled,
    full_batch,
    gradients_of,
    limit,
    numbers,
    on_each_device,
    pieces_of,
    relative_error,
    sentences,
    subject,
    tagger,
    token_loss,
    token_mean,
)

SEEDS = st.integers(0, 2**16)
HALF = torch.bfloat16
PLAIN, NARROW = mb.Sums(dtype=HALF), mb.Sums(dtype=HALF, how="compensated")


class Line(nn.Module):
    """Weights whose gradient is the batch itself, so that nothing is measured but the adding up."""

    def __init__(self, width: int, device: str) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(width, dtype=HALF, device=device))


def dot(model: Any, batch: Batch) -> Tensor:
    """Return the mean over rows of ``weight . x``."""
    return (batch["x"].to(model.weight.dtype) * model.weight).sum(-1).mean()


# -- P1: many small numbers ----------------------------------------------------------------------------------------


@on_each_device
def test_p1_4096_unit_gradients_compensated_are_4096(device: str) -> None:
    total = Compensated(torch.ones(3, dtype=HALF, device=device))
    plain = torch.ones(3, dtype=HALF, device=device)
    for _ in range(4095):
        total.add_(torch.ones(3, dtype=HALF, device=device))
        plain.add_(torch.ones(3, dtype=HALF, device=device))
    assert total.total.tolist() == [4096.0] * 3
    assert plain.tolist() == [256.0] * 3


@on_each_device
def test_p1_through_the_accumulator(device: str) -> None:
    model = Line(512, device)
    it = subject(model, sums=NARROW)
    with it.accumulator.window() as window:
        for _ in range(1024):
            window.backward(mb.Loss(sum=it.model.get_parameter("weight").sum(), count=2.0**-10))
    found = it.updates[0]["weight"].double()
    assert it.updates[0]["weight"].dtype == HALF
    assert abs(found.mean().item() - 1024) < 0.1
    plain = subject(model, sums=PLAIN)
    with plain.accumulator.window() as window:
        for _ in range(1024):
            window.backward(mb.Loss(sum=plain.model.get_parameter("weight").sum(), count=2.0**-10))
    assert plain.updates[0]["weight"].double().mean().item() == 256


# -- P2: random gradients ------------------------------------------------------------------------------------------


@on_each_device
@pytest.mark.parametrize("microbatches", [8, 64, 512, 1024])
def test_p2_compensated_is_as_good_as_float32_once_it_is_rounded(device: str, microbatches: int) -> None:
    x = (numbers(microbatches, microbatches, 256) + 1).to(HALF)
    reference = {"weight": x.double().mean(0)}
    it = subject(Line(256, device), sums=NARROW)
    it.accumulator.step({"x": x}, dot)
    best = relative_error({"weight": reference["weight"].to(HALF)}, reference)
    ours = relative_error({"weight": it.updates[0]["weight"].cpu()}, reference)
    recipe = by_hand(Line(256, device), dot, pieces_of({"x": x}, 1), divide_by=microbatches)
    assert ours <= best * 1.02
    assert relative_error({"weight": recipe["weight"].cpu()}, reference) > 1.2 * best


@on_each_device
@few
@given(values=st.lists(st.floats(width=32, allow_subnormal=True), min_size=1, max_size=8))
@example(values=[math.nan, math.inf, -math.inf, -0.0, 3.3e38, -3.3e38, 1e-40, 1.0])
def test_p2_what_bfloat16_holds_goes_through_unchanged(device: str, values: list[float]) -> None:
    first = torch.tensor(values, device=device).to(HALF)
    total = Compensated(first.clone())
    for _ in range(3):
        total.add_(torch.zeros_like(first))
    # A zero's sign aside, as in any sum with 0.
    assert torch.equal(total.total.nan_to_num(7.0), (first + 0).nan_to_num(7.0))
    assert torch.equal(total.total.isnan(), first.isnan())


@on_each_device
def test_p2_every_nan_stays_one(device: str) -> None:
    # What a GPU makes; with anything added to its bits it would be a zero.
    largest = torch.tensor([0x7FFFFFFF, -1], dtype=torch.int32, device=device).view(torch.float32)
    total = Compensated(torch.ones(2, dtype=HALF, device=device))
    total.add_(largest)
    assert total.total.isnan().all()
    total.add_(torch.ones(2, device=device))
    total.scale_(0.5)
    assert total.total.isnan().all()


@on_each_device
@pytest.mark.parametrize("shape", [(), (3,), (0, 2), (PIECE // 4 + 3, 5)], ids=str)
def test_p2_any_shape_in_any_layout(device: str, shape: tuple[int, ...]) -> None:
    first, part = (numbers(seed, 1, *shape)[0].to(device, HALF) for seed in (0, 1))
    exact = first.float() + part.float()
    total = Compensated(first.clone())
    total.add_(part)
    unit = exact.abs() * 2**-7 + 1e-30
    assert ((total.total.float() - exact).abs() <= unit).all()
    if len(shape) == 2:
        turned = Compensated(first.T.contiguous().T)
        turned.add_(part)
        assert ((turned.total.float() - exact).abs() <= unit).all()
        piecewise = Compensated(first.clone())
        piecewise.add_(part[:2], rows=slice(0, 2))
        piecewise.add_(part[2:], rows=slice(2, None))
        assert ((piecewise.total.float() - exact).abs() <= unit).all()


# -- P3: no worse than the full batch in bfloat16 ------------------------------------------------------------------


@on_each_device
@few
@given(targets=st.lists(st.integers(0, 8), min_size=1, max_size=12).filter(any), size=st.integers(1, 5), seed=SEEDS)
@example(targets=[8, 1, 2, 5] * 3, size=1, seed=0)
def test_p3_no_worse_than_the_full_batch_and_one_rounding(
    device: str, targets: list[int], size: int, seed: int
) -> None:
    model, batch = tagger(seed, device, HALF), sentences(seed, targets)
    reference = full_batch(model, token_mean, batch)
    it = subject(model, size=size, sums=NARROW)
    it.accumulator.step(batch, token_loss)
    assert relative_error(it.updates[0], reference) <= limit(model, token_mean, batch, reference)


@on_each_device
def test_p3_by_hand_it_is_worse(device: str) -> None:
    x = (numbers(0, 512, 32) + 1).to(HALF)
    batch, model = {"x": x}, Line(32, device)
    reference = full_batch(model, dot, batch)
    it = subject(model, sums=NARROW)
    it.accumulator.step(batch, dot)
    allowed = limit(model, dot, batch, reference)
    assert relative_error(it.updates[0], reference) <= allowed
    assert relative_error(by_hand(model, dot, pieces_of(batch, 1), divide_by=512), reference) > allowed


# -- inside the matrix product, clipping, what is not finite ---------------------------------------------------------


def layers(device: str) -> nn.Module:
    return filled(nn.Sequential(nn.Embedding(7, 8), nn.Linear(8, 6), nn.Tanh(), nn.Linear(6, 3)), 0, device, HALF)


def words(rows: int) -> Batch:
    return {"ids": torch.arange(rows * 4).view(rows, 4) % 7}


def size_of(model: Any, batch: Batch) -> Tensor:
    return model(batch["ids"]).float().square().mean()


@on_each_device
def test_fused_and_not_they_add_up_to_the_same_bits(device: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fused_matmul, "SMALLEST", 1)
    monkeypatch.setattr(products, "PIECE", 16)
    updates: list[dict[str, Tensor]] = []
    for fused in (True, False):
        it = subject(layers(device), sums=mb.Sums(dtype=HALF, how="compensated", fuse=fused))
        step = it.accumulator.step(words(9), size_of)
        assert step.fused == (2 if fused else 0)  # of the embedding's rows none: they are left to autograd
        updates.append(it.updates[0])
    assert relative_error(updates[0], updates[1]) == 0


@on_each_device
def test_clipped_to_a_norm_in_float32(device: str) -> None:
    it = subject(Line(64, device), sums=NARROW, max_grad_norm=0.5)
    x = (numbers(3, 64, 64) + 1).to(HALF)
    step = it.accumulator.step({"x": x}, dot)
    size = x.double().mean(0).norm().item()
    assert abs(step.grad_norm.item() - size) / size < 2e-3  # as far as its sum is off
    assert step.grad_norm.dtype == torch.float32
    clipped = it.updates[0]["weight"].double().norm().item()
    assert abs(clipped - 0.5) < 2e-3


@on_each_device
def test_what_is_not_finite_is_seen_and_leaves_no_trace(device: str) -> None:
    model = layers(device)

    def poisoned(model: Any, batch: Batch) -> Tensor:
        loss = size_of(model, batch)
        return loss * math.inf if 6 in batch["ids"][0, :2] else loss

    it = subject(model, sums=NARROW)
    with pytest.raises(NonfiniteError):
        it.accumulator.step(words(9), poisoned)
    assert gradients_of(it.model) == {}
    it.accumulator.step(words(9), size_of)
    reference = full_batch(model, size_of, words(9))
    assert relative_error(it.updates[-1], reference) <= limit(model, size_of, words(9), reference)


@on_each_device
def test_wider_parameters_add_up_in_their_own(device: str) -> None:
    model = nn.Sequential(nn.Linear(3, 4).double(), nn.Linear(4, 2).to(HALF)).to(device)

    def mixed(model: Any, batch: Batch) -> Tensor:
        return model[1](model[0](batch["x"]).tanh().to(HALF)).float().square().mean()

    it = subject(copy.deepcopy(model), sums=NARROW)
    it.accumulator.step({"x": numbers(0, 5, 3)}, mixed)
    assert {each.dtype for each in it.updates[0].values()} == {torch.float64, HALF}


def test_memory_of_the_sums_is_three_bytes() -> None:
    peaks: dict[str, int] = {}
    width = 1 << 16
    for way, dtype in [("plain", torch.float32), ("compensated", HALF)]:
        it = subject(Line(width, "cpu"), sums=mb.Sums(how=way, dtype=dtype))
        with it.accumulator.window() as window:
            for _ in range(3):
                window.backward(it.model.get_parameter("weight").sum(), count=1)
            meter = MemoryMeter()
            sums = window.gradients
            meter.track([total for _, total in sums.gradients()])
            meter.track([each for held in sums._wide.narrow_sums.values() for each in (held.total, held._low)])
            peaks[way] = meter.live_bytes // width
    assert peaks == {"plain": 4, "compensated": 3}


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"how": "kahan"}, '"compensated"'),
        ({"how": "stochastic", "dtype": HALF}, '"compensated"'),
        ({"how": "compensated"}, r"dtype=torch\.bfloat16"),
        ({"how": "compensated", "dtype": torch.float16}, "dtype is torch.float16"),
    ],
)
def test_what_cannot_work_is_refused(settings: dict[str, Any], words: str) -> None:
    with pytest.raises(ConfigError, match=words):
        mb.Sums(**settings)
