"""Laws P1 to P4: low precision adds up as if it were high, and one NaN is one NaN."""

import copy
import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

import microbatch as mb
from microbatch.errors import NonfiniteError

from .reference import (
    EXACT,
    Batch,
    Door,
    Gradients,
    by_hand,
    few,
    filled,
    full_batch,
    gradients_of,
    limit,
    moved,
    norm,
    numbers,
    on_each_device,
    pieces_of,
    points,
    regressor,
    relative_error,
    sentences,
    squared,
    subject,
    tagger,
    through_each_door,
    token_loss,
    token_mean,
)

SEEDS = st.integers(0, 2**16)
LOW = {"bfloat16": torch.bfloat16, "float16": torch.float16}
STOPS = {torch.bfloat16: 256, torch.float16: 2048}  # the first whole number that its successor rounds back to
each_low_dtype = pytest.mark.parametrize("dtype", [pytest.param(dtype, id=name) for name, dtype in LOW.items()])


class Line(nn.Module):
    """Weights whose gradient is the batch itself, so that nothing is measured but the adding up."""

    def __init__(self, width: int, dtype: torch.dtype, device: str) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(width, dtype=dtype, device=device))


def ones(model: Any) -> Tensor:
    """Return the weights' sum, whose gradient is 1."""
    return model.weight.sum()


def dot(model: Any, batch: Batch) -> Tensor:
    """Return the mean over rows of ``weight . x``."""
    return (batch["x"].to(model.weight.dtype) * model.weight).sum(-1).mean()


# -- P1: many small numbers ----------------------------------------------------------------------------------------


@each_low_dtype
@on_each_device
def test_p1_4096_unit_gradients_add_up_to_4096(device: str, dtype: torch.dtype) -> None:
    model = Line(1, dtype, device)
    it = subject(model)
    by_hand_model = copy.deepcopy(model)
    with it.accumulator.window() as window:
        for _ in range(4096):
            window.backward(mb.Loss(sum=ones(it.model), count=2.0**-12))  # the counts add up to 1
            ones(by_hand_model).backward()
    assert it.updates[0]["weight"].item() == 4096
    assert window.step.grad_norm.item() == 4096
    assert gradients_of(by_hand_model)["weight"].item() == STOPS[dtype]


@on_each_device
@settings(max_examples=5)
@given(microbatches=st.integers(1, 400), dtype=st.sampled_from(list(LOW.values())))
@example(microbatches=300, dtype=torch.bfloat16)
def test_p1_a_mean_of_ones_is_one(device: str, microbatches: int, dtype: torch.dtype) -> None:
    it = subject(Line(1, dtype, device))
    it.accumulator.step({"x": torch.ones(microbatches, 1, dtype=dtype)}, dot)
    assert it.updates[0]["weight"].item() == 1
    assert it.updates[0]["weight"].dtype == dtype


# -- P2: random gradients ------------------------------------------------------------------------------------------

# The least error against float64 of adding up so many bfloat16 gradients in `.grad`.
BY_HAND = {8: 0.002, 64: 0.005, 512: 0.015, 1024: 0.1}


@on_each_device
@pytest.mark.parametrize("microbatches", BY_HAND)
def test_p2_bfloat16_weights_add_up_as_float32_would(device: str, microbatches: int) -> None:
    x = (numbers(microbatches, microbatches, 256) + 1).to(torch.bfloat16)
    reference = {"weight": x.double().mean(0)}
    model = Line(256, torch.bfloat16, device)
    it = subject(model)
    step = it.accumulator.step({"x": x}, dot)
    recipe = by_hand(model, dot, pieces_of({"x": x}, 1), divide_by=microbatches)
    # What is handed over is rounded to bfloat16 once, as the best possible gradient would be; the norm is not.
    best = relative_error({"weight": reference["weight"].to(torch.bfloat16)}, reference)
    ours = relative_error({"weight": it.updates[0]["weight"].cpu()}, reference)
    size = norm(reference.values())
    table = f"{microbatches:5} microbatches: ours {ours:.2e}, best {best:.2e}, by hand "
    error = relative_error({"weight": recipe["weight"].cpu()}, reference)
    assert ours <= best * 1.01, table
    assert abs(step.grad_norm.item() - size) / size < 1e-6, table
    assert error > max(BY_HAND[microbatches], 1.2 * best), table + f"{error:.2e}"
    assert abs(norm(recipe.values()) - size) / size > 1e-4, table + f"{error:.2e}"


@on_each_device
@few
@given(microbatches=st.integers(1, 64), dtype=st.sampled_from(list(LOW.values())), seed=SEEDS)
def test_p2_the_sum_is_float32s_to_the_bit(device: str, microbatches: int, dtype: torch.dtype, seed: int) -> None:
    x = numbers(seed, microbatches, 16).to(dtype)
    wide, narrow = torch.zeros(16), torch.zeros(16, dtype=dtype)
    it = subject(Line(16, dtype, device))
    with it.accumulator.window() as window:
        for row in x:
            window.backward(mb.Loss(sum=dot(it.model, {"x": row.to(device)}), count=1 / microbatches))
            wide, narrow = wide + row, narrow + row
    update = it.updates[0]["weight"].cpu()
    total = wide * (1 / math.fsum([1 / microbatches] * microbatches))
    assert torch.equal(update, total.to(dtype))
    if microbatches >= 32:
        assert not torch.equal(update, narrow)


@on_each_device
@few
@given(rows=st.integers(1, 9), size=st.integers(1, 3), wide=st.sampled_from([torch.float64, torch.float32]), seed=SEEDS)
def test_p2_the_optimizer_sees_the_parameters_own_dtype(
    device: str, rows: int, size: int, wide: torch.dtype, seed: int
) -> None:
    model = regressor(seed, device, torch.bfloat16)
    model[0].float()  # type: ignore[index]

    def mixed(model: Any, batch: Batch) -> Tensor:
        return (model[2](model[0](batch["x"]).tanh().bfloat16()).float() - batch["y"]).square().mean()

    it = subject(model, size=size, sums=mb.Sums(dtype=wide))
    it.accumulator.step(points(seed, rows, torch.float32), mixed)
    for name, parameter in it.model.named_parameters():
        assert it.updates[0][name].dtype == parameter.dtype
    assert {each.dtype for each in it.updates[0].values()} == {torch.float32, torch.bfloat16}


# -- P3: no worse than the full batch in the same precision --------------------------------------------------------

PRECISIONS = st.sampled_from([torch.float64, torch.float32, torch.bfloat16, torch.float16])


@through_each_door
@on_each_device
@few
@given(
    targets=st.lists(st.integers(0, 8), min_size=1, max_size=12).filter(any),
    size=st.integers(1, 5),
    dtype=PRECISIONS,
    seed=SEEDS,
)
@example(targets=[8, 1, 2, 5] * 3, size=1, dtype=torch.bfloat16, seed=0)
@example(targets=[8, 1, 2, 5] * 3, size=1, dtype=torch.float16, seed=0)
def test_p3_no_worse_than_the_full_batch_and_one_rounding(
    door: Door, device: str, targets: list[int], size: int, dtype: torch.dtype, seed: int
) -> None:
    model, batch = tagger(seed, device, dtype), sentences(seed, targets)
    reference = full_batch(model, token_mean, batch)
    it = subject(model, size=size)
    door(it, batch, token_loss, size=size)
    assert relative_error(it.updates[0], reference) <= limit(model, token_mean, batch, reference)


@on_each_device
@few
@given(rows=st.integers(1, 12), size=st.integers(1, 5), dtype=PRECISIONS, seed=SEEDS)
def test_p3_a_plain_mean_likewise(device: str, rows: int, size: int, dtype: torch.dtype, seed: int) -> None:
    model, batch = regressor(seed, device, dtype), points(seed, rows, dtype)
    reference = full_batch(model, squared, batch)
    it = subject(model, size=size)
    it.accumulator.step(batch, squared)
    assert relative_error(it.updates[0], reference) <= limit(model, squared, batch, reference)


@on_each_device
@pytest.mark.parametrize("seed", range(3))
def test_p3_by_hand_adding_up_in_bfloat16_is_worse(device: str, seed: int) -> None:
    x = (numbers(seed, 512, 32) + 1).to(torch.bfloat16)
    model, batch = Line(32, torch.bfloat16, device), {"x": x}
    reference = full_batch(model, dot, batch)
    allowed = limit(model, dot, batch, reference)
    it = subject(model)
    it.accumulator.step(batch, dot)
    assert relative_error(it.updates[0], reference) <= allowed
    assert relative_error(by_hand(model, dot, pieces_of(batch, 1), divide_by=512), reference) > allowed


# -- P4: one NaN ---------------------------------------------------------------------------------------------------

Poison = Callable[[nn.Module, Tensor], Tensor]
POISONS: dict[str, Poison] = {
    "loss": lambda model, loss: loss * math.nan,
    "infinite loss": lambda model, loss: loss * math.inf,
    # Finite going forward; the derivative of a root at 0 is not.
    "gradient": lambda model, loss: loss + (model.get_parameter("2.bias").sum() * 0).sqrt(),
}


def poisoned(how: str, at: int | None) -> Callable[[nn.Module, Batch], Tensor]:
    """Make a loss in which one row is at fault, whichever microbatch it comes in, also when it is run again."""

    def loss_fn(model: nn.Module, batch: Batch) -> Tensor:
        loss = squared(model, batch)
        at_fault = at is not None and bool((batch["row"] == at).any())
        return POISONS[how](model, loss) if at_fault else loss

    return loss_fn


def with_rows(seed: int, rows: int) -> Batch:
    return {**points(seed, rows), "row": torch.arange(rows)}


@through_each_door
@on_each_device
@few
@given(
    rows=st.integers(1, 9),
    size=st.integers(1, 4),
    at=st.integers(0, 8),
    how=st.sampled_from(sorted(POISONS)),
    had=st.booleans(),
    seed=SEEDS,
)
@example(rows=8, size=2, at=5, how="gradient", had=False, seed=0)
def test_p4_raise_names_microbatch_and_parameter(
    door: Door, device: str, rows: int, size: int, at: int, how: str, had: bool, seed: int
) -> None:
    at %= rows
    model, batch = regressor(seed, device), with_rows(seed, rows)
    it = subject(model, size=size)
    weight = it.model.get_parameter("0.weight")
    if had:
        weight.grad = torch.ones_like(weight)
    before, weights = gradients_of(it.model), [each.detach().clone() for each in it.model.parameters()]
    with pytest.raises(NonfiniteError) as caught:
        door(it, batch, poisoned(how, at), size=size)
    by = "2.bias" if how == "gradient" else "0.weight"  # where NaN is everywhere, the first is named
    assert caught.value.parameter == by
    if how != "gradient" or door.__name__ == "by_step":  # only `step` can run the window again, to look
        assert caught.value.microbatch == at // size
        assert f"microbatch {at // size}" in str(caught.value)
    assert repr(by) in str(caught.value)
    assert it.updates == []
    assert relative_error(gradients_of(it.model), before) == 0
    assert all(map(torch.equal, it.model.parameters(), weights))
    door(it, batch, squared, size=size)
    assert relative_error(it.updates[0], full_batch(model, squared, batch)) <= EXACT


@through_each_door
@on_each_device
@few
@given(
    rows=st.integers(1, 9),
    size=st.integers(1, 4),
    at=st.integers(0, 8),
    how=st.sampled_from(sorted(POISONS)),
    seed=SEEDS,
)
def test_p4_skip_drops_the_window_and_the_next_is_clean(
    door: Door, device: str, rows: int, size: int, at: int, how: str, seed: int
) -> None:
    at %= rows
    model, batch = regressor(seed, device), with_rows(seed, rows)
    it = subject(model, size=size, nonfinite="skip")
    applied = [door(it, batch, poisoned(how, fault), size=size).applied for fault in (at, None, at, None)]
    assert applied == [False, True, False, True]
    assert it.accumulator.skipped == 2
    assert gradients_of(it.model) == {}
    reference = full_batch(model, squared, batch)
    assert [relative_error(update, reference) <= EXACT for update in it.updates] == [True, True]


@on_each_device
@few
@given(rows=st.integers(1, 6), at=st.integers(0, 5), how=st.sampled_from(sorted(POISONS)), seed=SEEDS)
def test_p4_by_hand_the_sum_is_nan_for_ever(device: str, rows: int, at: int, how: str, seed: int) -> None:
    model, batch = regressor(seed, device), with_rows(seed, rows)
    twin, updates = copy.deepcopy(model), list[Gradients]()
    for fault in (at % rows, None):
        for piece in pieces_of(batch, 1):
            there = {name: each.to(device) for name, each in piece.items()}
            (poisoned(how, fault)(twin, there) / rows).backward()
        updates.append(gradients_of(twin))
        for parameter in twin.parameters():  # a window that is dropped by not stepping, and a NaN times 0
            if parameter.grad is not None:
                parameter.grad.mul_(0)
    reference = full_batch(model, squared, batch)
    assert [relative_error(update, reference) for update in updates] == [math.inf, math.inf]


@through_each_door
@on_each_device
@few
@given(at=st.integers(0, 7), size=st.integers(2, 4), seed=SEEDS)
@example(at=5, size=2, seed=0)
def test_p4_skip_keeps_nan_out_of_running_statistics(door: Door, device: str, at: int, size: int, seed: int) -> None:
    layers = [nn.Linear(3, 4), nn.BatchNorm1d(4), nn.Linear(4, 2)]
    model, batch = filled(nn.Sequential(*layers), seed, device), points(seed, 8 // size * size)
    poison = {**batch, "x": batch["x"].clone()}
    poison["x"][at % len(poison["x"])] = math.nan
    it = subject(model, size=size, nonfinite="skip")
    before = [each.clone() for each in it.model.buffers()]
    assert not door(it, poison, squared, size=size).applied
    assert all(map(torch.equal, it.model.buffers(), before))
    assert door(it, batch, squared, size=size).applied
    assert not any(map(torch.equal, it.model.buffers(), before))
    assert all(bool(each.isfinite().all()) for each in it.model.buffers())
    twin = copy.deepcopy(model)
    for piece in pieces_of(poison, size):  # by hand: a window that is dropped by not stepping
        squared(twin, moved(piece, twin, torch.float64)).backward()
    assert any(bool(each.isnan().any()) for each in twin.buffers())
