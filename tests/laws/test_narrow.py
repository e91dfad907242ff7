"""Laws P1 to P3 where sums in float32 do not fit: bfloat16 with one byte more, or rounded at random."""

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
from microbatch.gradients.bfloat16_sums import PIECE, Compensated, NarrowSum, Stochastic
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
NARROW: dict[str, Any] = {"accumulate_dtype": HALF}
WAYS = ["compensated", "stochastic"]
each_way = pytest.mark.parametrize("way", WAYS)


class Line(nn.Module):
    """Weights whose gradient is the batch itself, so that nothing is measured but the adding up."""

    def __init__(self, width: int, device: str) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(width, dtype=HALF, device=device))


def dot(model: Any, batch: Batch) -> Tensor:
    """Return the mean over rows of ``weight . x``."""
    return (batch["x"].to(model.weight.dtype) * model.weight).sum(-1).mean()


def made(way: str, first: Tensor, seed: int = 0) -> NarrowSum:
    if way == "compensated":
        return Compensated(first)
    return Stochastic(first, torch.Generator(first.device).manual_seed(seed))


# -- P1: many small numbers ----------------------------------------------------------------------------------------


@on_each_device
def test_p1_4096_unit_gradients_compensated_are_4096(device: str) -> None:
    total = made("compensated", torch.ones(3, dtype=HALF, device=device))
    plain = torch.ones(3, dtype=HALF, device=device)
    for _ in range(4095):
        total.add_(torch.ones(3, dtype=HALF, device=device))
        plain.add_(torch.ones(3, dtype=HALF, device=device))
    assert total.total.tolist() == [4096.0] * 3
    assert plain.tolist() == [256.0] * 3


@on_each_device
def test_p1_4096_unit_gradients_at_random_are_4096_on_average(device: str) -> None:
    total = made("stochastic", torch.ones(4096, dtype=HALF, device=device))
    for _ in range(4095):
        total.add_(torch.ones(4096, dtype=HALF, device=device))
    found = total.total.double()
    # From 2048 on a unit in the last place is 16: each addition has a variance of at most 15.
    assert abs(found.mean().item() - 4096) < 5 * math.sqrt(4096 * 15 / 4096)
    assert found.std().item() < math.sqrt(4096 * 15)


@on_each_device
@each_way
def test_p1_through_the_accumulator(device: str, way: str) -> None:
    model = Line(512, device)
    it = subject(model, accumulate=way, **NARROW)
    with it.accumulator.window() as window:
        for _ in range(1024):
            window.backward(mb.Loss(sum=it.model.get_parameter("weight").sum(), count=2.0**-10))
    found = it.updates[0]["weight"].double()
    assert it.updates[0]["weight"].dtype == HALF
    assert abs(found.mean().item() - 1024) < (0.1 if way == "compensated" else 8)
    plain = subject(model, **NARROW)
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
    it = subject(Line(256, device), accumulate="compensated", **NARROW)
    it.accumulator.step({"x": x}, dot)
    best = relative_error({"weight": reference["weight"].to(HALF)}, reference)
    ours = relative_error({"weight": it.updates[0]["weight"].cpu()}, reference)
    recipe = by_hand(Line(256, device), dot, pieces_of({"x": x}, 1), divide_by=microbatches)
    assert ours <= best * 1.02
    assert relative_error({"weight": recipe["weight"].cpu()}, reference) > 1.2 * best


@on_each_device
def test_p2_at_random_errors_do_not_add_up_to_a_bias(device: str) -> None:
    # Every addend is a third of a unit in the sum's last place: to the nearest, each of them is lost.
    first, part = torch.full((4096,), 256.0, dtype=HALF, device=device), torch.full((4096,), 2 / 3, device=device)
    total, plain = made("stochastic", first.clone()), first.clone()
    for _ in range(300):
        total.add_(part)
        plain.add_(part.to(HALF))
    assert plain.unique().tolist() == [256.0]
    # Of each element: 300 roundings of variance at most 2^2 * (1/3) * (2/3).
    spread = math.sqrt(300 * 4 * 2 / 9 / 4096)
    assert abs(total.total.double().mean().item() - 456) < 5 * spread


@on_each_device
@each_way
@few
@given(values=st.lists(st.floats(width=32, allow_subnormal=True), min_size=1, max_size=8), seed=SEEDS)
@example(values=[math.nan, math.inf, -math.inf, -0.0, 3.3e38, -3.3e38, 1e-40, 1.0], seed=0)
def test_p2_what_bfloat16_holds_goes_through_unchanged(device: str, way: str, values: list[float], seed: int) -> None:
    first = torch.tensor(values, device=device).to(HALF)
    total = made(way, first.clone(), seed)
    for _ in range(3):
        total.add_(torch.zeros_like(first))
    # A zero's sign aside, as in any sum with 0.
    assert torch.equal(total.total.nan_to_num(7.0), (first + 0).nan_to_num(7.0))
    assert torch.equal(total.total.isnan(), first.isnan())


@on_each_device
@each_way
def test_p2_every_nan_stays_one(device: str, way: str) -> None:
    # What a GPU makes; with anything added to its bits it would be a zero.
    largest = torch.tensor([0x7FFFFFFF, -1], dtype=torch.int32, device=device).view(torch.float32)
    total = made(way, torch.ones(2, dtype=HALF, device=device))
    total.add_(largest)
    assert total.total.isnan().all()
    total.add_(torch.ones(2, device=device))
    total.scale_(0.5)
    assert total.total.isnan().all()


@on_each_device
@each_way
@pytest.mark.parametrize("shape", [(), (3,), (0, 2), (PIECE // 4 + 3, 5)], ids=str)
def test_p2_any_shape_in_any_layout(device: str, way: str, shape: tuple[int, ...]) -> None:
    first, part = (numbers(seed, 1, *shape)[0].to(device, HALF) for seed in (0, 1))
    exact = first.float() + part.float()
    total = made(way, first.clone())
    total.add_(part)
    unit = exact.abs() * 2**-7 + 1e-30
    assert ((total.total.float() - exact).abs() <= unit).all()
    if len(shape) == 2:
        turned = made(way, first.T.contiguous().T)
        turned.add_(part)
        assert ((turned.total.float() - exact).abs() <= unit).all()
        piecewise = made(way, first.clone())
        piecewise.add_(part[:2], rows=slice(0, 2))
        piecewise.add_(part[2:], rows=slice(2, None))
        assert ((piecewise.total.float() - exact).abs() <= unit).all()


# -- P3: no worse than the full batch in bfloat16 ------------------------------------------------------------------


@on_each_device
@each_way
@few
@given(targets=st.lists(st.integers(0, 8), min_size=1, max_size=12).filter(any), size=st.integers(1, 5), seed=SEEDS)
@example(targets=[8, 1, 2, 5] * 3, size=1, seed=0)
def test_p3_no_worse_than_the_full_batch_and_one_rounding(
    device: str, way: str, targets: list[int], size: int, seed: int
) -> None:
    model, batch = tagger(seed, device, HALF), sentences(seed, targets)
    reference = full_batch(model, token_mean, batch)
    it = subject(model, size=size, accumulate=way, **NARROW)
    it.accumulator.step(batch, token_loss)
    assert relative_error(it.updates[0], reference) <= limit(model, token_mean, batch, reference)


@on_each_device
def test_p3_by_hand_it_is_worse(device: str) -> None:
    x = (numbers(0, 512, 32) + 1).to(HALF)
    batch, model = {"x": x}, Line(32, device)
    reference = full_batch(model, dot, batch)
    it = subject(model, accumulate="compensated", **NARROW)
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
        it = subject(layers(device), fuse=fused, accumulate="compensated", **NARROW)
        step = it.accumulator.step(words(9), size_of)
        assert step.fused == (2 if fused else 0)  # of the embedding's rows none: they are left to autograd
        updates.append(it.updates[0])
    assert relative_error(updates[0], updates[1]) == 0


@on_each_device
def test_at_random_and_fused_it_is_as_close(device: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fused_matmul, "SMALLEST", 1)
    model = layers(device)
    reference = full_batch(model, size_of, words(9))
    it = subject(model, accumulate="stochastic", **NARROW)
    assert it.accumulator.step(words(9), size_of).fused == 2
    assert relative_error(it.updates[0], reference) <= limit(model, size_of, words(9), reference)


@on_each_device
def test_at_random_is_the_same_for_the_same_seed_and_leaves_the_users_alone(device: str) -> None:
    def run(seed: int) -> list[Tensor]:
        torch.manual_seed(seed)
        it = subject(layers(device), accumulate="stochastic", **NARROW)
        state = torch.get_rng_state()
        for _ in range(2):
            it.accumulator.step(words(9), size_of)
        assert torch.equal(torch.get_rng_state(), state)
        return [update["1.weight"] for update in it.updates]

    once, again, other = run(1), run(1), run(2)
    assert all(map(torch.equal, once, again))
    assert not torch.equal(once[0], other[0])
    assert not torch.equal(once[0], once[1])  # the same batch and weights, in another window


@on_each_device
@each_way
def test_clipped_to_a_norm_in_float32(device: str, way: str) -> None:
    it = subject(Line(64, device), accumulate=way, max_grad_norm=0.5, **NARROW)
    x = (numbers(3, 64, 64) + 1).to(HALF)
    step = it.accumulator.step({"x": x}, dot)
    size = x.double().mean(0).norm().item()
    allowed = 2e-3 if way == "compensated" else 1e-2  # as far as its sum is off
    assert abs(step.grad_norm.item() - size) / size < allowed
    assert step.grad_norm.dtype == torch.float32
    clipped = it.updates[0]["weight"].double().norm().item()
    assert abs(clipped - 0.5) < 2e-3


@on_each_device
@each_way
def test_what_is_not_finite_is_seen_and_leaves_no_trace(device: str, way: str) -> None:
    model = layers(device)

    def poisoned(model: Any, batch: Batch) -> Tensor:
        loss = size_of(model, batch)
        return loss * math.inf if 6 in batch["ids"][0, :2] else loss

    it = subject(model, accumulate=way, **NARROW)
    with pytest.raises(NonfiniteError):
        it.accumulator.step(words(9), poisoned)
    assert gradients_of(it.model) == {}
    it.accumulator.step(words(9), size_of)
    reference = full_batch(model, size_of, words(9))
    assert relative_error(it.updates[-1], reference) <= limit(model, size_of, words(9), reference)


@on_each_device
@each_way
def test_wider_parameters_add_up_in_their_own(device: str, way: str) -> None:
    model = nn.Sequential(nn.Linear(3, 4).double(), nn.Linear(4, 2).to(HALF)).to(device)

    def mixed(model: Any, batch: Batch) -> Tensor:
        return model[1](model[0](batch["x"]).tanh().to(HALF)).float().square().mean()

    it = subject(copy.deepcopy(model), accumulate=way, **NARROW)
    it.accumulator.step({"x": numbers(0, 5, 3)}, mixed)
    assert {each.dtype for each in it.updates[0].values()} == {torch.float64, HALF}


def test_memory_of_the_sums_is_three_bytes_or_two() -> None:
    peaks: dict[str, int] = {}
    width = 1 << 16
    for way, dtype in [("plain", torch.float32), ("compensated", HALF), ("stochastic", HALF)]:
        it = subject(Line(width, "cpu"), accumulate=way, accumulate_dtype=dtype)
        with it.accumulator.window() as window:
            for _ in range(3):
                window.backward(it.model.get_parameter("weight").sum(), count=1)
            meter = MemoryMeter()
            sums = window._gradients
            meter.track([total for _, total in sums.gradients()])
            meter.track([each for held in sums._wide.narrow_sums.values() for each in held._tensors()])
            peaks[way] = meter.live_bytes // width
    assert peaks == {"plain": 4, "compensated": 3, "stochastic": 2}


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"accumulate": "kahan"}, '"compensated"'),
        ({"accumulate": "stochastic"}, "accumulate_dtype=torch.bfloat16"),
        ({"accumulate": "compensated", "accumulate_dtype": torch.float16}, "not torch.float16"),
    ],
)
def test_what_cannot_work_is_refused(settings: dict[str, Any], words: str) -> None:
    with pytest.raises(ConfigError, match=words):
        subject(Line(2, "cpu"), **settings)
