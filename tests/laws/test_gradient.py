"""The gradient without a step: the large batch's, in `.grad`, for closures and loops that step by themselves."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st
from tests.faults import RunsOut
from tests.laws.reference import EXACT, WRONG, Batch, by_hand, few, full_batch, gradients_of, pieces_of, relative_error
from torch import Tensor, nn
from torch.optim import LBFGS, SGD, AdamW
from torch.optim.lr_scheduler import ExponentialLR
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

import microbatch as mb
from microbatch.errors import ConfigError, EmptyWindowError, NonfiniteError

TOKENS = [5, 1, 2, 7, 3, 6, 4]


def make_model(*, norm: bool = False) -> nn.Sequential:
    torch.manual_seed(3)
    middle = nn.BatchNorm1d(6) if norm else nn.Tanh()
    return nn.Sequential(nn.Linear(4, 6), middle, nn.Linear(6, 3)).double()


def make_batch(rows: int = 7) -> Batch:
    draw = torch.Generator().manual_seed(5)
    x = torch.randn(rows, 4, dtype=torch.float64, generator=draw)
    labels = torch.randint(3, (rows,), generator=draw)
    return {"x": x, "y": torch.randn(rows, 3, dtype=torch.float64, generator=draw), "class": labels}


def squares(model: nn.Module, batch: Batch) -> Tensor:
    return F.mse_loss(model(batch["x"]), batch["y"])


def weighted(model: nn.Module, batch: Batch) -> mb.Loss:
    """Count some rows twice: a mean of means is wrong."""
    weight = 1.0 + (batch["class"] == 0).double()
    each = F.cross_entropy(model(batch["x"]), batch["class"], reduction="none")
    return mb.Loss(sum=(each * weight).sum(), count=weight.sum(), metrics={"weight": weight.sum()})


def weighted_mean(model: nn.Module, batch: Batch) -> Tensor:
    return weighted(model, batch).mean


def tokens(lengths: list[int]) -> Batch:
    draw, width = torch.Generator().manual_seed(9), max(lengths)
    mask = torch.arange(width) < torch.tensor(lengths)[:, None]
    return {"x": torch.randn(len(lengths), width, 4, dtype=torch.float64, generator=draw), "mask": mask}


def token_loss(model: nn.Module, batch: Batch) -> mb.Loss:
    each = model(batch["x"]).square().sum(-1)
    return mb.Loss(sum=(each * batch["mask"]).sum(), count=batch["mask"].sum(), metrics={"tokens": batch["mask"].sum()})


# -- it is the gradient of the step --------------------------------------------------------------------------------


@few
@given(rows=st.integers(1, 9), size=st.integers(1, 5))
def test_it_is_the_full_batchs_and_nothing_is_stepped(rows: int, size: int) -> None:
    model, batch = make_model(), make_batch(rows)
    before = copy.deepcopy(model.state_dict())
    optimizer = SGD(model.parameters(), lr=1.0, momentum=0.9)
    step = mb.Accumulator(model, optimizer, microbatch_size=size).gradient(batch, weighted)
    assert relative_error(gradients_of(model), full_batch(model, weighted_mean, batch)) <= EXACT
    assert not step.applied
    assert step.samples == rows
    assert all(torch.equal(each, before[name]) for name, each in model.state_dict().items())
    assert not optimizer.state


def test_the_usual_loop_is_refused_by_the_same_comparison() -> None:
    model, batch = make_model(), make_batch()
    usual = by_hand(model, weighted_mean, pieces_of(batch, 2), divide_by=4)
    assert relative_error(usual, full_batch(model, weighted_mean, batch)) > WRONG


def test_it_replaces_what_was_there_and_a_second_one_too() -> None:
    model, batch = make_model(), make_batch()
    for parameter in model.parameters():
        parameter.grad = torch.full_like(parameter, 7.0)
    unused = nn.Parameter(torch.ones(2, dtype=torch.float64))
    model.register_parameter("unused", unused)
    unused.grad = torch.ones_like(unused)
    accumulator = mb.Accumulator(model, microbatch_size=3)
    for _ in range(2):
        accumulator.gradient(batch, squares)
        assert unused.grad is None
        assert relative_error(gradients_of(model), full_batch(model, squares, batch)) <= EXACT
    assert accumulator.state_dict()["windows"] == 2


def test_it_is_in_the_parameters_own_dtype() -> None:
    model, batch = make_model().bfloat16(), {name: each.bfloat16() for name, each in make_batch().items()}
    mb.Accumulator(model, microbatch_size=1).gradient(batch, squares)
    assert {each.grad.dtype for each in model.parameters() if each.grad is not None} == {torch.bfloat16}


def test_it_is_clipped_only_if_that_was_asked_for() -> None:
    model, batch = make_model(), make_batch()
    step = mb.Accumulator(model, microbatch_size=2, max_grad_norm=0.01).gradient(batch, squares)
    norm = torch.stack([each.square().sum() for each in gradients_of(model).values()]).sum().sqrt()
    assert norm.item() == pytest.approx(0.01, rel=1e-3)
    assert step.grad_norm.item() > 0.01


def test_with_a_loss_that_couples_samples() -> None:
    model, batch = make_model(), make_batch(6)

    def encode(model: nn.Module, microbatch: Batch) -> tuple[Tensor, Tensor]:
        return model(microbatch["x"]), microbatch["y"]

    def coupled(model: nn.Module, found: Any) -> Tensor:
        logits = found[0] @ found[1].T
        return F.cross_entropy(logits, torch.arange(len(logits)))

    mb.Accumulator(model, microbatch_size=2).gradient(batch, coupled, encode=encode)
    assert relative_error(gradients_of(model), full_batch(model, lambda m, b: coupled(m, encode(m, b)), batch)) <= EXACT


def test_with_exact_batch_statistics() -> None:
    model, batch = make_model(norm=True), make_batch(6)
    twin = copy.deepcopy(model)
    mb.Accumulator(model, microbatch_size=2, batch_norm="exact").gradient(batch, squares)
    squares(twin, batch).backward()
    assert relative_error(gradients_of(model), gradients_of(twin)) <= EXACT
    for mine, theirs in zip(model.buffers(), twin.buffers(), strict=True):
        assert torch.allclose(mine.double(), theirs.double(), rtol=1e-12)


def test_pooled_statistics_move_although_nothing_is_applied() -> None:
    model, batch = make_model(norm=True), make_batch(6)
    mb.Accumulator(model, microbatch_size=3, batch_norm="pooled").gradient(batch, squares)
    norm = model[1]
    assert isinstance(norm, nn.BatchNorm1d)
    assert norm.num_batches_tracked is not None
    assert norm.num_batches_tracked.item() == 1


def test_with_declared_counts() -> None:
    model, batch = make_model(), tokens(TOKENS)

    def terms(model: nn.Module, microbatch: Batch) -> dict[str, Any]:
        return {"tokens": token_loss(model, microbatch), "size": 0.1 * model(microbatch["x"]).mean((1, 2)).mean()}

    mb.Accumulator(model, microbatch_size=2).gradient(
        batch, terms, counts=lambda batch: {"tokens": batch["mask"].sum(), "size": len(batch["x"])}
    )
    reference = full_batch(model, lambda m, b: token_loss(m, b).mean + 0.1 * m(b["x"]).mean((1, 2)).mean(), batch)
    assert relative_error(gradients_of(model), reference) <= EXACT


def test_after_memory_ended() -> None:
    model, batch = make_model(), make_batch(8)
    full = RunsOut(5)

    def loss(model: nn.Module, microbatch: Batch) -> mb.Loss:
        full.armed = True
        return weighted(model, microbatch)

    with full:
        step = mb.Accumulator(model, microbatch_size=4).gradient(batch, loss)
    assert full.refused
    assert (step.retries, step.microbatch_size) == (1, 2)
    assert relative_error(gradients_of(model), full_batch(model, weighted_mean, batch)) <= EXACT


def test_with_a_size_that_is_looked_for() -> None:
    model, batch = make_model(), make_batch(8)
    accumulator = mb.Accumulator(model, microbatch_size="auto")
    for _ in range(12):
        accumulator.gradient(batch, weighted)
        assert relative_error(gradients_of(model), full_batch(model, weighted_mean, batch)) <= EXACT
    assert accumulator.microbatch_size is not None


# -- not finite, nothing at all ------------------------------------------------------------------------------------


def infinite(model: nn.Module, batch: Batch) -> Tensor:
    return squares(model, batch) * float("inf")


def test_an_error_leaves_what_was_there() -> None:
    model, batch = make_model(), make_batch()
    accumulator = mb.Accumulator(model, microbatch_size=3)
    accumulator.gradient(batch, squares)
    before = gradients_of(model)
    with pytest.raises(NonfiniteError):
        accumulator.gradient(batch, infinite)
    with pytest.raises(EmptyWindowError):
        accumulator.gradient(batch, lambda model, microbatch: None)
    assert all(torch.equal(each, before[name]) for name, each in gradients_of(model).items())


def test_a_window_that_is_skipped_leaves_no_gradient() -> None:
    model, batch = make_model(), make_batch()
    accumulator = mb.Accumulator(model, microbatch_size=3, nonfinite="skip")
    accumulator.gradient(batch, squares)
    accumulator.gradient(batch, infinite)
    assert not gradients_of(model)
    assert accumulator.skipped == 1


@pytest.mark.parametrize("overflows", [False, True])
def test_a_scaler_steps_with_it_by_itself(overflows: bool) -> None:
    model, batch = make_model().float(), {name: each.float() for name, each in make_batch().items()}
    batch["class"] = batch["class"].long()
    twin = copy.deepcopy(model)
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**10)
    optimizer = SGD(model.parameters(), lr=0.5)
    mb.Accumulator(model, optimizer, microbatch_size=2, grad_scaler=scaler).gradient(
        batch, infinite if overflows else squares
    )
    scaler.step(optimizer)
    scaler.update()
    if overflows:
        assert all(torch.equal(a, b) for a, b in zip(model.parameters(), twin.parameters(), strict=True))
        assert scaler.get_scale() == 2.0**9
    else:
        squares(twin, batch).backward()
        SGD(twin.parameters(), lr=0.5).step()
        for mine, theirs in zip(model.parameters(), twin.parameters(), strict=True):
            torch.testing.assert_close(mine, theirs)


def test_a_scaler_unscales_every_gradient_and_a_failure_keeps_what_it_had_unscaled() -> None:
    model, batch = make_model().float(), {name: each.float() for name, each in make_batch().items()}
    batch["class"] = batch["class"].long()
    scaler, optimizer = torch.amp.GradScaler("cpu", init_scale=2.0**10), SGD(model.parameters(), lr=0.5)
    accumulator = mb.Accumulator(model, optimizer, microbatch_size=2, grad_scaler=scaler)
    with pytest.raises(EmptyWindowError):
        accumulator.gradient(batch, lambda model, microbatch: None)  # the scaler has scaled nothing yet
    for _ in range(2):  # without update() in between
        accumulator.gradient(batch, squares)
    with pytest.raises(ValueError, match="here"):
        accumulator.gradient(batch, raises)
    before = [each.detach().clone() for each in model.parameters()]
    wanted = full_batch(model, squares, batch)
    scaler.step(optimizer)  # which does not unscale once more
    scaler.update()
    for old, new, gradient in zip(before, model.parameters(), wanted.values(), strict=True):
        torch.testing.assert_close(new, (old.double() - 0.5 * gradient).float())


def raises(model: nn.Module, batch: Batch) -> Tensor:
    raise ValueError("here")


# -- in use --------------------------------------------------------------------------------------------------------


def test_lbfgs_takes_the_same_way_as_on_the_full_batch() -> None:
    model, batch = make_model(), make_batch(9)
    twin = copy.deepcopy(model)
    accumulator = mb.Accumulator(model, microbatch_size=2)
    mine, theirs = (
        LBFGS(each.parameters(), lr=0.5, max_iter=6, line_search_fn="strong_wolfe") for each in (model, twin)
    )

    def closure() -> float:
        return accumulator.gradient(batch, weighted).loss.item()

    def plain() -> float:
        twin.zero_grad()
        loss = weighted_mean(twin, batch)
        loss.backward()
        return loss.item()

    for _ in range(3):
        mine.step(closure)
        theirs.step(plain)
    for a, b in zip(model.parameters(), twin.parameters(), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-9)


def sam(model: nn.Module, optimizer: SGD, gradient: Callable[[], object], *, radius: float = 0.05) -> None:
    """Sharpness-aware minimization: climb to the worst neighbour, and step with the gradient there."""
    gradient()
    grads = [each.grad for each in model.parameters() if each.grad is not None]
    norm = torch.stack([grad.norm() for grad in grads]).norm()
    moves = [radius * grad / norm for grad in grads]
    with torch.no_grad():
        for parameter, move in zip(model.parameters(), moves, strict=True):
            parameter.add_(move)
    gradient()
    with torch.no_grad():
        for parameter, move in zip(model.parameters(), moves, strict=True):
            parameter.sub_(move)
    optimizer.step()


def test_sam_takes_two_gradients_and_one_step() -> None:
    model, batch = make_model(), make_batch(9)
    twin = copy.deepcopy(model)
    accumulator = mb.Accumulator(model, microbatch_size=2)

    def plain() -> None:
        twin.zero_grad()
        weighted_mean(twin, batch).backward()

    mine, theirs = SGD(model.parameters(), lr=0.1), SGD(twin.parameters(), lr=0.1)
    for _ in range(3):
        sam(model, mine, lambda: accumulator.gradient(batch, weighted))
        sam(twin, theirs, plain)
    for a, b in zip(model.parameters(), twin.parameters(), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-12)


def test_clipped_by_value_and_by_group() -> None:
    model, batch = make_model(), make_batch(9)
    twin = copy.deepcopy(model)
    mb.Accumulator(model, microbatch_size=2).gradient(batch, weighted)
    weighted_mean(twin, batch).backward()
    for each in (model, twin):
        nn.utils.clip_grad_value_(each[0].parameters(), 0.01)
        nn.utils.clip_grad_norm_(each[2].parameters(), 0.02)
    assert relative_error(gradients_of(model), gradients_of(twin)) <= EXACT


def surgery(first: dict[str, Tensor], second: dict[str, Tensor]) -> dict[str, Tensor]:
    """Take out of each task's gradient what points against the other's (PCGrad, for two tasks)."""
    dot = torch.stack([(first[name] * second[name]).sum() for name in first]).sum()
    sizes = [torch.stack([each.square().sum() for each in task.values()]).sum() for task in (first, second)]
    if dot >= 0:
        return {name: first[name] + second[name] for name in first}
    return {n: first[n] * (1 - dot / sizes[0]) + second[n] * (1 - dot / sizes[1]) for n in first}


def against(model: nn.Module, batch: Batch) -> Tensor:
    return F.mse_loss(model(batch["x"]), -batch["y"])


def test_gradient_surgery_over_two_tasks() -> None:
    model, batch = make_model(), make_batch(9)
    accumulator = mb.Accumulator(model, microbatch_size=4)
    found: list[dict[str, Tensor]] = []
    for task in (squares, against):
        accumulator.gradient(batch, task)
        found.append(gradients_of(model))
    reference = surgery(full_batch(model, squares, batch), full_batch(model, against, batch))
    assert relative_error(surgery(*found), reference) <= EXACT


def test_a_moving_average_of_the_weights() -> None:
    model, batch = make_model(), make_batch(9)
    twin = copy.deepcopy(model)
    accumulator = mb.Accumulator(model, microbatch_size=2)
    averages = [AveragedModel(each, multi_avg_fn=get_ema_multi_avg_fn(0.9)) for each in (model, twin)]
    mine, theirs = AdamW(model.parameters(), lr=0.01), AdamW(twin.parameters(), lr=0.01)
    for _ in range(4):
        accumulator.gradient(batch, weighted)
        mine.step()
        twin.zero_grad()
        weighted_mean(twin, batch).backward()
        theirs.step()
        for average, each in zip(averages, (model, twin), strict=True):
            average.update_parameters(each)
    for a, b in zip(averages[0].parameters(), averages[1].parameters(), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-12)


def test_several_optimizers_stepped_at_different_times() -> None:
    model, batch = make_model(), make_batch(9)
    twin = copy.deepcopy(model)
    accumulator = mb.Accumulator(model, microbatch_size=2)

    def train(each: nn.Module, gradient: Callable[[], object]) -> None:
        assert isinstance(each, nn.Sequential)
        body, head = SGD(each[0].parameters(), lr=0.1), AdamW(each[2].parameters(), lr=0.01)
        schedule = ExponentialLR(body, 0.9)
        for index in range(6):
            gradient()
            head.step()
            if index % 3 == 2:  # the body follows every third gradient
                body.step()
                schedule.step()

    def plain() -> None:
        twin.zero_grad()
        weighted_mean(twin, batch).backward()

    train(model, lambda: accumulator.gradient(batch, weighted))
    train(twin, plain)
    for a, b in zip(model.parameters(), twin.parameters(), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-12)


def test_without_an_optimizer_there_is_no_step() -> None:
    model, batch = make_model(), make_batch()
    accumulator = mb.Accumulator(model, microbatch_size=2)
    for use in (
        lambda: accumulator.step(batch, squares),
        accumulator.window,
        lambda: accumulator.windows([batch], microbatches=1),
    ):
        with pytest.raises(ConfigError, match="without an optimizer"):
            use()


def test_gradients_inside_the_momentum_cannot_be_left() -> None:
    model, batch = make_model(), make_batch()
    optimizer = SGD(model.parameters(), lr=0.1, momentum=0.9)
    accumulator = mb.Accumulator(model, optimizer, microbatch_size=2, sums=mb.Sums(buffer="none", dtype=torch.float64))
    with pytest.raises(ConfigError, match=r"there is no \.grad"):
        accumulator.gradient(batch, squares)
    with pytest.raises(ConfigError, match=r"gradient\(batch, loss_fn\)"):
        mb.Accumulator(model, LBFGS(model.parameters()), microbatch_size=2)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16], ids=str)
def test_a_loss_is_reported_as_it_was_whatever_is_written_to_it_later(dtype: torch.dtype) -> None:
    model, x = nn.Linear(3, 2).to(dtype), torch.randn(6, 3).to(dtype)
    total = list[Tensor]()

    def loss(model: nn.Module, rows: Tensor) -> Tensor:
        found = model(rows).square().mean()
        if total:
            total[0] += found.detach()  # the first microbatch's own number
        else:
            total.append(found.detach())
        return found

    step = mb.Accumulator(model, microbatch_size=2).gradient(x, loss)
    each = [model(rows).square().mean().item() for rows in x.split(2)]
    assert step.loss.dtype == torch.promote_types(dtype, torch.float32)
    assert step.loss.item() == pytest.approx(sum(each) / 3, rel=1e-12 if dtype is torch.float64 else 1e-6)
    assert total[0].item() == pytest.approx(sum(each), rel=1e-2)


def test_a_loss_above_what_float32_holds_is_reported_as_infinite() -> None:
    def loss(model: nn.Module, rows: Tensor) -> dict[str, Tensor]:
        found = 0 * model(rows).mean() + 3e38
        return {"one": found, "other": found}

    step = mb.Accumulator(nn.Linear(3, 1), microbatch_size=1).gradient(torch.ones(2, 3), loss)
    assert step.loss.item() == math.inf
    assert step.terms["one"].item() == pytest.approx(3e38)
    assert step.grad_norm.item() == 0


class Elsewhere(Tensor):
    pass


def test_losses_that_are_kept_in_two_ways_add_up_in_full() -> None:
    model, x, calls = nn.Linear(3, 2).double(), torch.randn(6, 3).double(), list[int]()

    def loss(model: nn.Module, rows: Tensor) -> Tensor:
        calls.append(1)
        found = model(rows).square().mean()
        return found.as_subclass(Elsewhere) if len(calls) % 2 else found

    step = mb.Accumulator(model, microbatch_size=2).gradient(x, loss)
    assert step.loss.item() == pytest.approx(model(x).square().mean().item(), rel=1e-14)


# -- several batches as one, and numbers beside the loss -----------------------------------------------------------


@few
@given(
    lengths=st.lists(st.lists(st.integers(1, 6), min_size=1, max_size=5), min_size=1, max_size=4),
    size=st.integers(1, 4),
)
def test_batches_of_different_padding_are_one_batch(lengths: list[list[int]], size: int) -> None:
    model, batches = make_model(), [tokens(each) for each in lengths]
    step = mb.Accumulator(model, microbatch_size=size).gradient(mb.Batches(batches), token_loss)
    total, count = 0.0, sum(map(sum, lengths))
    twin = copy.deepcopy(model)
    for each in batches:
        loss = token_loss(twin, each).sum / count
        loss.backward()
        total += loss.item()
    assert relative_error(gradients_of(model), gradients_of(twin)) <= EXACT
    assert step.loss.item() == pytest.approx(total, rel=1e-12)
    assert step.samples == sum(map(len, lengths))
    assert step.count == step.metrics["tokens"].item() == count
    assert step.microbatches == sum(-(-len(each) // size) for each in lengths)


def test_batches_are_cut_by_length_each() -> None:
    model, batches = make_model(), [tokens([6, 1, 5, 2]), tokens([3, 3, 1])]
    mb.Accumulator(model, microbatch_size=2, lengths="mask").gradient(mb.Batches(batches), token_loss)
    twin = copy.deepcopy(model)
    for each in batches:
        (token_loss(twin, each).sum / 21).backward()
    assert relative_error(gradients_of(model), gradients_of(twin)) <= EXACT


def test_batches_for_a_loss_that_couples_samples() -> None:
    model, batches = make_model(), [tokens([6, 1, 5]), tokens([2, 3])]

    def encode(model: nn.Module, microbatch: Batch) -> Tensor:
        mask = microbatch["mask"][..., None]
        return (model(microbatch["x"]) * mask).sum(1) / mask.sum(1)

    def spread(model: nn.Module, z: Tensor) -> Tensor:
        return z.var(0).sum() + z[0].sum()  # the order of the rows matters, too

    mb.Accumulator(model, microbatch_size=2).gradient(mb.Batches(batches), spread, encode=encode)
    twin = copy.deepcopy(model)
    spread(twin, torch.cat([encode(twin, each) for each in batches])).backward()
    assert relative_error(gradients_of(model), gradients_of(twin)) <= EXACT


def test_counts_are_added_up_over_batches() -> None:
    model, batches = make_model(), [tokens([6, 1, 5]), tokens([2, 3])]
    step = mb.Accumulator(model, microbatch_size=2).gradient(
        mb.Batches(batches), lambda m, b: {"tokens": token_loss(m, b)}, counts=lambda b: {"tokens": b["mask"].sum()}
    )
    assert step.counts == {"tokens": 17}


def test_no_batches_are_refused() -> None:
    with pytest.raises(mb.MicrobatchError, match="one or more batches"):
        mb.Batches([])


def test_metrics_are_sums_over_the_window_whatever_the_cut() -> None:
    model, batch = make_model(), make_batch(9)

    def loss(model: nn.Module, microbatch: Batch) -> mb.Loss:
        out = model(microbatch["x"])
        right = (out.argmax(-1) == microbatch["class"]).sum()
        total = F.cross_entropy(out, microbatch["class"], reduction="sum")
        return mb.Loss(sum=total, count=len(out), metrics={"correct": right, "rows": len(out)})

    right = (model(batch["x"]).argmax(-1) == batch["class"]).sum().item()
    for size in (1, 2, 4, 9):
        step = mb.Accumulator(model, microbatch_size=size).gradient(batch, loss)
        assert {name: value.item() for name, value in step.metrics.items()} == {"correct": right, "rows": 9}


def test_a_metric_is_one_number() -> None:
    with pytest.raises(mb.MicrobatchError, match="metric 'correct'"):
        mb.Loss(sum=torch.ones(()), count=1, metrics={"correct": torch.ones(2)})


def test_the_record_as_a_dict_and_as_one_line() -> None:
    model, batch = make_model(), make_batch()
    accumulator = mb.Accumulator(model, AdamW(model.parameters()), microbatch_size=3)
    step = accumulator.step(batch, weighted)
    told = step.as_dict()
    assert told["loss"] == step.loss.item()
    assert told["metrics/weight"] == step.metrics["weight"].item()
    assert all(value is None or isinstance(value, int | float | bool | str) for value in told.values())
    assert "\n" not in repr(step)
    assert "7 samples in 3 microbatches of 3" in repr(step)
    assert repr(accumulator) == "Accumulator(Sequential, AdamW, microbatch_size=3)"


def test_batches_do_not_go_with_numbered_microbatches() -> None:
    model, batches = make_model(), [tokens([6, 1, 5]), tokens([2, 3])]
    accumulator = mb.Accumulator(model, microbatch_size=2, ranks=mb.Ranks(deterministic=True))
    with pytest.raises(ConfigError, match="pad the batches to one"):
        accumulator.gradient(mb.Batches(batches), token_loss)
