"""The gradient noise scale: right on per-sample gradients, unbiased, and in its interval as often as that says."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Mapping
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.func import functional_call, grad, vmap
from torch.optim import SGD
from torch.utils.checkpoint import checkpoint

import microbatch as mb
from microbatch.errors import ConfigError, NonfiniteError
from microbatch.gradients.noise_estimate import Measured, interval_of, measure, scale_of

Batch = Mapping[str, Tensor]
Loss = Callable[[nn.Module, Any], Any]


class Net(nn.Module):
    def __init__(self, dtype: torch.dtype = torch.float64) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.body = nn.Sequential(nn.Linear(3, 6), nn.Tanh())
        self.head = nn.Linear(6, 2)
        self.to(dtype)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.body(x))


def rows(number: int = 20, *, seed: int = 1, dtype: torch.dtype = torch.float64) -> Batch:
    draw = torch.Generator().manual_seed(seed)
    return {
        "x": torch.randn(number, 3, generator=draw, dtype=torch.float64).to(dtype),
        "y": torch.randn(number, 2, generator=draw, dtype=torch.float64).to(dtype),
    }


def squares(model: nn.Module, batch: Batch) -> Tensor:
    return F.mse_loss(model(batch["x"]), batch["y"])


def summed(model: nn.Module, batch: Batch) -> mb.Loss:
    """The same loss, summed over two numbers for each row, and counted on the device."""
    return mb.Loss(
        sum=F.mse_loss(model(batch["x"]), batch["y"], reduction="sum"), count=torch.tensor(batch["y"].numel())
    )


def per_sample(model: nn.Module, batch: Batch) -> Tensor:
    """Return the gradient of each row by itself, as a matrix: rows times parameters; in float64."""
    weights = {name: each.detach().double() for name, each in model.named_parameters()}

    def loss(weights: Any, x: Tensor, y: Tensor) -> Tensor:
        return F.mse_loss(functional_call(model, weights, (x,)), y)

    found = vmap(grad(loss), in_dims=(None, 0, 0))(weights, batch["x"].double(), batch["y"].double())
    return torch.cat([each.flatten(1) for each in found.values()], dim=1)


def by_hand(gradients: Tensor, sizes: list[int]) -> Measured:
    """Return covariance and gradient of rows that come in groups: from the spread of the groups around their mean."""
    whole = gradients.mean(0)
    apart = [len(each) * (each.mean(0) - whole).square().sum() for each in gradients.split(sizes)]
    noise = float(torch.stack(apart).sum()) / (len(sizes) - 1)
    return Measured(noise, float(whole.square().sum()) - noise / len(gradients))


def accumulator(model: nn.Module, *, lr: float = 0.0, momentum: float = 0.0, **options: Any) -> mb.Accumulator:
    """Make an accumulator that reads every microbatch of every window."""
    given: dict[str, Any] = {"microbatch_size": 6, "noise_scale": mb.NoiseScale(every=1, microbatches=100)} | options
    return mb.Accumulator(model, SGD(model.parameters(), lr=lr, momentum=momentum), **given)


def counting(hooks: list[int]) -> Loss:
    """Return `squares` that notes, in the backward of each microbatch, the number of hooks on the weights."""

    def loss_fn(model: nn.Module, batch: Batch) -> Tensor:
        loss = squares(model, batch)
        loss.register_hook(lambda _: hooks.append(sum(len(each._backward_hooks or ()) for each in model.parameters())))
        return loss

    return loss_fn


def windows_of(it: mb.Accumulator) -> list[Measured]:
    """Return what each measured window told, over all parameters."""
    return [Measured(*groups[0]) for groups in it.state_dict()["noise"]["windows"]]


def close(found: Measured, right: Measured, *, rel: float = 1e-9) -> None:
    assert found.noise == pytest.approx(right.noise, rel=rel)
    assert found.signal == pytest.approx(right.signal, rel=rel, abs=rel * right.noise)


# -- the formula, against per-sample gradients -------------------------------------------------------------------------

SIZES = {1: [1] * 20, 6: [6, 6, 6, 2], 7: [7, 7, 6], 19: [19, 1]}


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("loss", [squares, summed])
def test_it_is_the_spread_of_the_microbatches_gradients(size: int, loss: Loss) -> None:
    model, batch = Net(), rows()
    step = accumulator(model, microbatch_size=size).step(batch, loss)
    right = by_hand(per_sample(model, batch), SIZES[size])
    assert (
        step.noise_scale is None
        if right.signal <= 0
        else step.noise_scale == pytest.approx(right.noise / right.signal, rel=1e-9)
    )
    it = accumulator(model, microbatch_size=size)
    it.step(batch, loss)
    close(windows_of(it)[0], right)


def test_with_one_row_in_a_microbatch_it_is_the_sample_covariance() -> None:
    model, batch = Net(), rows()
    it = accumulator(model, microbatch_size=1)
    it.step(batch, squares)
    assert windows_of(it)[0].noise == pytest.approx(float(per_sample(model, batch).var(0).sum()), rel=1e-9)


OPTIONS: dict[str, dict[str, Any]] = {
    "clip": {"max_grad_norm": 1e-3},
    "deterministic": {"ranks": mb.Ranks(deterministic=True)},
    "bufferless": {"sums": mb.Sums(buffer="none"), "momentum": 0.9},
    "by row": {"dropout": "by_row"},
    "checkpoint": {"checkpoint": ["body"]},
    "offload": {"offload": "activations"},
    "unfused": {"sums": mb.Sums(fuse=False)},
    "by group": {"noise_scale": mb.NoiseScale(every=1, by_group=True)},
}


@pytest.mark.parametrize("name", OPTIONS)
def test_it_is_the_same_however_gradients_add_up(name: str) -> None:
    model = Net()
    it = accumulator(model, lr=0.1, **OPTIONS[name])
    for seed in range(3):
        batch = rows(seed=seed)
        right = by_hand(per_sample(model, batch), SIZES[6])
        it.step(batch, squares)
        close(windows_of(it)[seed], right)


@pytest.mark.parametrize("how", ["plain", "compensated"])
def test_sums_of_narrow_parameters_do_not_disturb_it(how: str) -> None:
    model, batch = Net(torch.bfloat16), rows(dtype=torch.bfloat16)
    dtype = torch.bfloat16 if how == "compensated" else torch.float32
    it = accumulator(model, sums=mb.Sums(how=how, dtype=dtype))
    it.step(batch, squares)
    close(windows_of(it)[0], by_hand(per_sample(model, batch), SIZES[6]), rel=0.02)


def test_a_loss_scaler_does_not_scale_it() -> None:
    model, batch = Net(torch.float32), rows(dtype=torch.float32)
    scaler = torch.amp.GradScaler("cpu", init_scale=1024.0)
    it = accumulator(model, grad_scaler=scaler, nonfinite="skip")
    assert it.step(batch, squares).applied
    close(windows_of(it)[0], by_hand(per_sample(model, batch), SIZES[6]), rel=1e-4)
    batch["x"][3] = torch.inf
    assert not it.step(batch, squares).applied
    assert len(windows_of(it)) == 1  # an overflow is no gradient


def test_large_weights_whose_gradients_are_added_in_the_product() -> None:
    torch.manual_seed(0)
    model, draw = nn.Linear(512, 512, bias=False), torch.Generator().manual_seed(2)
    batch = {"x": torch.randn(12, 512, generator=draw), "y": torch.randn(12, 512, generator=draw)}
    fusing = accumulator(model, noise_scale=mb.NoiseScale(every=2))
    assert fusing.step(batch, squares).fused == 1  # the control: such a weight is fused in other windows
    assert fusing.step(batch, squares).fused == 0
    close(windows_of(fusing)[0], by_hand(per_sample(model, batch), [6, 6]), rel=1e-3)


def test_a_long_sum_of_squares_is_not_rounded_down() -> None:
    model = nn.Embedding(1, 2_000_000)
    batch = {"x": 0.01 + 0.01 * torch.randn(4, 2_000_000, generator=torch.Generator().manual_seed(3))}
    it = accumulator(model, microbatch_size=1)
    it.step(batch, lambda model, batch: (model.weight * batch["x"]).sum() / len(batch["x"]))
    close(windows_of(it)[0], by_hand(batch["x"].double(), [1] * 4), rel=1e-4)


def test_sparse_gradients_have_each_row_once() -> None:
    dense, sparse = (nn.Embedding(5, 3, sparse=each, dtype=torch.float64) for each in (False, True))
    sparse.load_state_dict(dense.state_dict())
    batch = torch.tensor([[0, 1, 1], [2, 2, 2], [4, 0, 1], [3, 3, 4]])
    found: list[Measured] = []
    for model in (dense, sparse):
        it = accumulator(model, microbatch_size=2)
        it.step(batch, lambda model, batch: model(batch).square().mean())
        found += windows_of(it)
    close(found[1], found[0])


def test_a_gradient_that_the_loss_function_asks_for_is_no_part_of_it() -> None:
    def flat(model: nn.Module, batch: Batch) -> Tensor:
        loss = squares(model, batch)
        torch.autograd.grad(loss, list(model.parameters()), retain_graph=True)
        return loss

    model, batch = Net(), rows()
    it = accumulator(model)
    it.step(batch, flat)
    close(windows_of(it)[0], by_hand(per_sample(model, batch), SIZES[6]))


def test_parameters_that_no_optimizer_steps_are_left_out() -> None:
    model, batch = Net(), rows()
    it = mb.Accumulator(model, SGD(model.head.parameters(), lr=0.0), microbatch_size=6, noise_scale=mb.NoiseScale(1))
    with pytest.warns(mb.MicrobatchWarning, match="body"):
        it.step(batch, squares)
    number = sum(each.numel() for each in model.body.parameters())
    close(windows_of(it)[0], by_hand(per_sample(model, batch)[:, number:], SIZES[6]))


def test_a_loop_by_hand_a_loader_and_a_gradient_alone_are_measured() -> None:
    model, batch = Net(), rows()
    right = by_hand(per_sample(model, batch), SIZES[6])
    it = accumulator(model)
    with it.window() as window:
        for microbatch in window.split(batch):
            window.backward(squares(model, microbatch))
    for each in it.windows(mb.cut(batch, 6), microbatches=4):
        for microbatch in each:
            each.backward(squares(model, microbatch))
    it.gradient(batch, squares)
    assert len(windows_of(it)) == 3
    for found in windows_of(it):
        close(found, right)


# -- some of many microbatches -----------------------------------------------------------------------------------------


def by_hand_from_some(gradients: Tensor, sizes: list[int], read: list[int]) -> Measured:
    """Solve the two expectations for noise and gradient: that of the groups that are read, and that of all rows."""
    groups = [gradients.split(sizes)[k] for k in read]
    some, number = sum(len(each) * float(each.mean(0).square().sum()) for each in groups), sum(map(len, groups))
    everything = len(gradients) * float(gradients.mean(0).square().sum())
    # some = number * signal + len(groups) * noise, everything = len(gradients) * signal + noise
    equations = torch.tensor([[len(groups), number], [1, len(gradients)]], dtype=torch.float64)
    noise, signal = torch.linalg.solve(equations, torch.tensor([some, everything], dtype=torch.float64)).tolist()
    return Measured(noise, signal)


@pytest.mark.parametrize("most", [2, 3, 4, 7, 19, 20])
@pytest.mark.parametrize("size", [1, 3])
def test_some_of_many_microbatches_are_read_and_the_result_is_that_of_their_spread(most: int, size: int) -> None:
    model, sizes = Net(), [size] * (20 // size) + [20 % size] * (20 % size > 0)
    it = accumulator(model, microbatch_size=size, noise_scale=mb.NoiseScale(every=1, microbatches=most))
    for seed in range(3):
        hooks: list[int] = []
        it.step(rows(seed=seed), counting(hooks))
        read = [k for k, number in enumerate(hooks) if number]
        assert len(hooks) == len(sizes)
        assert len(read) == min(most, len(sizes))
        gaps = [b - a for a, b in zip(read, [*read[1:], read[0] + len(sizes)], strict=True)]
        assert max(gaps) - min(gaps) <= 1  # evenly, from one window to the next
        close(windows_of(it)[seed], by_hand_from_some(per_sample(model, rows(seed=seed)), sizes, read))


def test_over_the_windows_every_microbatch_is_read_as_often() -> None:
    noise, times = mb.NoiseScale(every=10, microbatches=3), [0] * 7
    for window in range(5, 705, 10):
        for k in range(7):
            times[k] += noise.reads(k, microbatches=7, window=window)
    assert times == [30] * 7


def test_in_a_loop_of_unknown_length_the_first_microbatches_are_read() -> None:
    model, hooks, batch = Net(), list[int](), rows()
    it = accumulator(model, noise_scale=mb.NoiseScale(every=1, microbatches=2))
    with it.window() as window:
        for microbatch in mb.cut(batch, 5):
            window.backward(counting(hooks)(model, microbatch), count=len(microbatch["x"]))
    assert [number > 0 for number in hooks] == [True, True, False, False]
    close(windows_of(it)[0], by_hand_from_some(per_sample(model, batch), [5] * 4, [0, 1]))


def test_the_other_microbatches_are_added_in_the_product() -> None:
    torch.manual_seed(0)
    model = nn.Linear(512, 512, bias=False)
    batch = {"x": torch.randn(6, 512), "y": torch.randn(6, 512)}
    for most, fused in ((2, 1), (3, 0)):
        it = accumulator(model, microbatch_size=2, noise_scale=mb.NoiseScale(every=1, microbatches=most))
        assert it.step(batch, squares).fused == fused


# -- what is counted ---------------------------------------------------------------------------------------------------


def test_targets_are_turned_into_samples() -> None:
    """Rows of equally many targets: the same gradients as a mean over rows, so the same noise scale, in samples."""
    model, batch = Net(), rows()
    scales: list[float | None] = []
    for loss in (squares, summed):
        it = accumulator(model)
        scales += [it.step(rows(seed=seed), loss).noise_scale for seed in range(5)][-1:]
    assert scales[0] == pytest.approx(scales[1], rel=1e-9)
    assert accumulator(model).step(batch, summed).count == 40  # the control: the loss counts twice as many


def ragged(model: nn.Module, batch: Batch) -> mb.Loss:
    errors = (model(batch["x"]) - batch["y"]).square().mean(1) * batch["targets"]
    return mb.Loss(sum=errors.sum(), count=batch["targets"].sum())


def test_a_microbatch_weighs_what_it_counts_and_an_empty_one_nothing() -> None:
    model, batch = Net(), rows(8)
    targets = torch.tensor([8, 1, 2, 5, 0, 0, 3, 7])
    it = accumulator(model, microbatch_size=2)
    step = it.step({**batch, "targets": targets}, ragged)
    gradients = per_sample(model, batch)
    counts = [9, 7, 0, 10]
    sums = [(gradients * targets[:, None]).split(2)[k].sum(0) for k in (0, 1, 3)]
    whole = torch.stack(sums).sum(0) / 26
    parts = [n * (each / n - whole).square().sum() for n, each in zip((9, 7, 10), sums, strict=True)]
    noise = float(torch.stack(parts).sum()) / 2
    right = Measured(noise / (26 / 8), float(whole.square().sum()) - noise / 26)  # 26 targets in 8 samples
    assert step.count == sum(counts)
    close(windows_of(it)[0], right)


def test_rows_grouped_by_length_are_measured_in_their_groups() -> None:
    model, batch = Net(), rows(12)
    lengths = torch.tensor([3, 1, 2, 3, 1, 2, 3, 1, 2, 3, 1, 2])
    it = accumulator(model, microbatch_size=4, lengths=mb.Lengths(of="lengths", keys=["words"]))
    step = it.step({**batch, "lengths": lengths, "words": torch.zeros(12, 3)}, squares)
    grouped = per_sample(model, batch)[lengths.argsort(stable=True)]
    assert step.microbatches == 3
    close(windows_of(it)[0], by_hand(grouped, [4, 4, 4]))


def test_terms_that_count_different_things_weigh_by_rows() -> None:
    def both(model: nn.Module, batch: Batch) -> dict[str, mb.Loss]:
        loss = summed(model, batch)
        return {"a": loss, "b": mb.Loss(sum=loss.sum, count=len(batch["x"]))}

    model, batch = Net(), rows()
    it = accumulator(model)
    it.step(batch, both, counts=lambda batch: {"a": batch["y"].numel(), "b": len(batch["x"])})
    right = by_hand(3 * per_sample(model, batch), SIZES[6])  # once as it is, and twice: half as many are counted
    close(windows_of(it)[0], right)


class Unknown:
    """A microbatch whose rows nobody knows."""

    def __init__(self, batch: Batch) -> None:
        self.batch = batch

    def to(self, *_: object, **__: object) -> Unknown:
        return self


def test_without_known_rows_the_unit_is_what_the_loss_counts() -> None:
    model, batch = Net(), rows()
    it = accumulator(model)
    for window in it.windows([Unknown(each) for each in mb.cut(batch, 6)], microbatches=4):
        for microbatch in window:
            window.backward(summed(model, microbatch.batch))
        assert window.step.samples == 0
    right = by_hand(per_sample(model, batch), SIZES[6])
    close(windows_of(it)[0], right._replace(noise=2 * right.noise))  # two targets in a row


# -- unbiased, and as sure as it says ----------------------------------------------------------------------------------

DRAWS, LENGTH = 20_000, 10


def drawn(
    sizes: list[int],
    *,
    number: int,
    length: int = LENGTH,
    scale: float = 16.0,
    read: int | None = None,
    seed: int = 0,
) -> list[Measured]:
    """Measure windows of gradients from a normal distribution: covariance 1 for each of ``length`` parameters.

    The first ``read`` microbatches are read.
    """
    draw = torch.Generator().manual_seed(seed)
    n = torch.tensor(sizes, dtype=torch.float64)
    noise = torch.randn(number, len(sizes), length, generator=draw, dtype=torch.float64) / n.sqrt()[:, None]
    means = math.sqrt(1 / scale) + noise  # |G|^2 = length / scale, S = length
    whole = (means * n[:, None]).sum(1) / n.sum()
    parts = (means.square().sum(2) * n)[:, :read].sum(1)
    pairs = zip(parts.tolist(), whole.square().sum(1).tolist(), strict=True)
    count, some = float(n.sum()), float(n[:read].sum())
    return [measure(p, w, count=count, microbatches=len(sizes[:read]), read=some) for p, w in pairs]


def is_mean(values: Tensor, right: float) -> bool:
    return abs(float(values.mean()) - right) < 4 * float(values.std()) / math.sqrt(len(values))


@pytest.mark.parametrize("sizes", [[8, 8], [8, 3, 1, 5], [1] * 6])
def test_both_are_unbiased_however_ragged_the_microbatches(sizes: list[int]) -> None:
    noise, signal = torch.tensor(drawn(sizes, number=DRAWS), dtype=torch.float64).unbind(1)
    assert is_mean(noise, LENGTH)
    assert is_mean(signal, LENGTH / 16)


@pytest.mark.parametrize("sizes", [[8, 8, 8], [8, 3, 1, 5], [1, 9, 4, 4, 2]])
def test_both_are_unbiased_if_only_two_are_read(sizes: list[int]) -> None:
    noise, signal = torch.tensor(drawn(sizes, number=DRAWS, read=2), dtype=torch.float64).unbind(1)
    assert is_mean(noise, LENGTH)
    assert is_mean(signal, LENGTH / 16)


def test_by_hand_some_microbatches_taken_for_the_whole_window_are_biased() -> None:
    """The formula for all microbatches, with the window's own gradient beside four of eight."""
    found = torch.tensor(drawn([4] * 8, number=DRAWS, read=4), dtype=torch.float64)
    parts = found[:, 0] * (4 - 0.5) + 16 * (found[:, 1] + found[:, 0] / 32)
    assert not is_mean((parts - 16 * (found[:, 1] + found[:, 0] / 32)) / 3, LENGTH)


def test_by_hand_without_the_sizes_it_is_biased() -> None:
    """The usual recipe: every microbatch has the mean size."""
    draw = torch.Generator().manual_seed(0)
    n = torch.tensor([8, 3, 1, 5], dtype=torch.float64)
    means = 0.25 + torch.randn(DRAWS, 4, LENGTH, generator=draw, dtype=torch.float64) / n.sqrt()[:, None]
    whole = (means * n[:, None]).sum(1) / 17
    noise = 4.25 / 3 * (means.square().sum((1, 2)) - 4 * whole.square().sum(1))
    assert not is_mean(noise, LENGTH)


@pytest.mark.parametrize(("windows", "scale"), [(32, 16.0), (32, 300.0), (8, 64.0), (4, 16.0)])
def test_the_interval_holds_the_truth_in_95_of_100_draws(windows: int, scale: float) -> None:
    found = drawn([8, 8, 8, 5], number=windows * 1000, length=40, scale=scale)
    draws = [found[k : k + windows] for k in range(0, len(found), windows)]
    bounds = [bound for each in draws if (bound := interval_of(each)) is not None]
    hits = sum(low <= scale <= high for low, high in bounds)
    assert len(bounds) == 1000
    assert 925 <= hits <= 975  # 950, and 3.6 standard deviations of such a count


@pytest.mark.parametrize("scale", [1.0, 16.0, 300.0])
@pytest.mark.parametrize("sizes", [[4] * 16, [8, 8, 1, 8, 8, 5]])
def test_the_interval_holds_it_as_often_if_only_four_are_read(sizes: list[int], scale: float) -> None:
    found = drawn(sizes, number=16_000, length=40, scale=scale, read=4)
    bounds = [interval_of(found[k : k + 16]) for k in range(0, len(found), 16)]
    hits = sum(each is not None and each[0] <= scale <= each[1] for each in bounds)
    assert 925 <= hits <= 975


@pytest.mark.parametrize("most", [2, 4, 8])
def test_where_noise_rules_the_interval_grows_by_no_more_than_is_said(most: int) -> None:
    """Its half width goes with the spread of ``|G|^2``, a quadratic form ``x Q x`` with the variance ``2 tr Q^2``."""
    whole, some = (
        float(torch.tensor(drawn([2] * 16, number=DRAWS, scale=1e4, read=read), dtype=torch.float64)[:, 1].std())
        for read in (16, most)
    )
    chosen = torch.diag((torch.arange(16) < most).double())
    form = (most / 16 - chosen) / (most - most / 16)
    assert some / whole == pytest.approx(math.sqrt(float(form.square().sum()) * 15 / 16), rel=0.02)
    assert some / whole < math.sqrt(1 + 1 / most)


def test_an_interval_without_its_spread_holds_it_less_often() -> None:
    """The control: half as wide an interval is found out."""
    found = drawn([8, 8, 8, 5], number=8000, length=40)
    middle = [(scale_of(found[k : k + 8]), interval_of(found[k : k + 8])) for k in range(0, 8000, 8)]
    hits = sum(b is not None and s is not None and abs(16 - s) <= (b[1] - b[0]) / 4 for s, b in middle)
    assert hits < 800


def test_a_gradient_that_noise_hides_has_no_upper_bound() -> None:
    found = drawn([4, 4], number=8, scale=1e6)
    bounds = interval_of(found)
    assert bounds is not None
    assert bounds[1] == math.inf
    assert 0 < bounds[0] < 1e6


def test_too_few_windows_have_no_interval() -> None:
    found = drawn([8, 8, 8], number=4)
    assert interval_of(found[:3]) is None
    assert interval_of(found) is not None


def test_a_quadratic_whose_noise_is_known() -> None:
    """The loss is ``w A w / 2 - x w``: a row's gradient is ``A w - x``, with the covariance of ``x``."""
    a = torch.diag(torch.tensor([4.0, 1.0, 0.5], dtype=torch.float64))

    def quadratic(model: Any, x: Tensor) -> Tensor:
        return 0.5 * (model.weight @ a @ model.weight.T).sum() - model(x).mean()

    hits = 0
    for seed in range(20):
        model = nn.Linear(3, 1, bias=False, dtype=torch.float64)
        nn.init.constant_(model.weight, 0.5)
        truth = 3 * 4.0 / float((model.weight.detach() @ a).square().sum())  # the covariance of x is 4
        it, draw = accumulator(model), torch.Generator().manual_seed(seed)
        batches = [2 * torch.randn(23, 3, generator=draw, dtype=torch.float64) for _ in range(8)]
        step = [it.step(x, quadratic) for x in batches][-1]
        assert step.noise_interval is not None
        hits += step.noise_interval[0] <= truth <= step.noise_interval[1]
    assert hits >= 18


def test_a_network_whose_rows_are_all_known() -> None:
    """Rows drawn from 400: covariance and gradient of all of them are the truth."""
    model, everything = Net(), rows(400, seed=9)
    everything["y"][:] += 1.0
    gradients = per_sample(model, everything)
    truth = float(gradients.var(0, correction=0).sum() / gradients.mean(0).square().sum())
    hits = 0
    for seed in range(20):
        it, draw = accumulator(model, microbatch_size=5), torch.Generator().manual_seed(seed)
        chosen = [torch.randint(400, (17,), generator=draw) for _ in range(8)]
        step = [it.step({name: each[k] for name, each in everything.items()}, squares) for k in chosen][-1]
        assert step.noise_interval is not None
        hits += step.noise_interval[0] <= truth <= step.noise_interval[1]
    assert hits >= 18


# -- when it is known, and what is kept --------------------------------------------------------------------------------


def test_one_microbatch_tells_nothing() -> None:
    it = accumulator(Net(), microbatch_size=20)
    step = it.step(rows(), squares)
    assert (step.noise_scale, step.noise_interval, windows_of(it)) == (None, None, [])


def test_every_tenth_window_is_measured_and_the_others_tell_the_latest_estimate() -> None:
    model, hooks = Net(), list[int]()

    it = accumulator(model, noise_scale=mb.NoiseScale(every=10))
    steps = [it.step(rows(seed=seed), counting(hooks)) for seed in range(17)]
    per_step = [sum(hooks[4 * k : 4 * k + 4]) for k in range(17)]
    assert [k for k, number in enumerate(per_step) if number] == [5, 15]
    assert len(windows_of(it)) == 2
    assert {each.noise_scale for each in steps[:5]} == {None}
    assert len({each.noise_scale for each in steps[5:15]}) == 1
    assert all(each._backward_hooks in (None, {}) for each in model.parameters())


def test_only_the_latest_windows_count() -> None:
    model = Net()
    it = accumulator(model, noise_scale=mb.NoiseScale(every=1, windows=3, microbatches=100))
    step = [it.step(rows(100, seed=seed), squares) for seed in range(5)][-1]
    sizes = [6] * 16 + [4]
    latest = [by_hand(per_sample(model, rows(100, seed=seed)), sizes) for seed in (2, 3, 4)]
    assert step.noise_scale is not None
    assert step.noise_scale == pytest.approx(scale_of(latest), rel=1e-9)


def test_weights_are_the_same_to_the_bit_as_without_it() -> None:
    found: list[Tensor] = []
    for noise in (None, mb.NoiseScale(every=2)):
        model = Net(torch.float32)
        it = accumulator(model, lr=0.1, noise_scale=noise, max_grad_norm=0.5)
        steps = [it.step(rows(seed=seed, dtype=torch.float32), squares) for seed in range(4)]
        found.append(torch.cat([each.detach().flatten() for each in model.parameters()]))
        assert (steps[-1].noise_scale is None) == (noise is None)
    assert torch.equal(*found)


def test_a_window_that_runs_again_is_measured_once_in_its_smaller_microbatches() -> None:
    model, batch, failed = Net(), rows(), list[bool]()

    def failing(model: nn.Module, microbatch: Batch) -> Tensor:
        if len(microbatch["x"]) == 2 and not failed:  # the last of them, after three backward passes
            failed.append(True)
            raise torch.OutOfMemoryError("out of memory")
        return squares(model, microbatch)

    it = accumulator(model)
    assert it.step(batch, failing).retries == 1
    assert len(windows_of(it)) == 1
    close(windows_of(it)[0], by_hand(per_sample(model, batch), [3] * 6 + [2]))


@pytest.mark.parametrize("where", ["loss", "optimizer", "not finite"])
def test_a_window_that_fails_leaves_the_estimate_as_it_was(where: str) -> None:
    model = Net()
    it = accumulator(model)
    before = [it.step(rows(seed=seed), squares) for seed in range(5)][-1]
    kept, bad, calls = it.state_dict(), dict(rows(seed=5)), list[int]()

    def failing(model: nn.Module, batch: Batch) -> Tensor:
        calls.append(1)
        if where == "loss" and len(calls) == 3:
            raise ValueError("in the third microbatch")
        return squares(model, batch)

    def fails(*_: object) -> None:
        raise ValueError("in the optimizer")

    if where == "not finite":
        bad["x"] = bad["x"].clone().fill_(torch.nan)
    hook = it.options.optimizers[0].register_step_pre_hook(fails) if where == "optimizer" else None
    with pytest.raises((ValueError, NonfiniteError)):
        it.step(bad, failing)
    if hook is not None:
        hook.remove()
    assert it.state_dict() == kept
    assert all(each._backward_hooks in (None, {}) for each in model.parameters())
    after = accumulator(Net(), noise_scale=mb.NoiseScale(every=1))
    after.load_state_dict(kept)
    right, found = after.step(rows(seed=6), squares), it.step(rows(seed=6), squares)
    assert (found.noise_scale, found.noise_interval) == (right.noise_scale, right.noise_interval)
    assert before.noise_scale != found.noise_scale


def test_a_resumed_run_continues_the_estimate() -> None:
    whole = accumulator(Net(), noise_scale=mb.NoiseScale(every=2, by_group=True))
    steps = [whole.step(rows(seed=seed), squares) for seed in range(12)]
    first, second = (accumulator(Net(), noise_scale=mb.NoiseScale(every=2, by_group=True)) for _ in range(2))
    for seed in range(5):
        first.step(rows(seed=seed), squares)
    second.load_state_dict(json.loads(json.dumps(first.state_dict())))
    again = [second.step(rows(seed=seed), squares) for seed in range(5, 12)]
    for found, right in zip(again, steps[5:], strict=True):
        assert (found.noise_scale, found.noise_interval) == (right.noise_scale, right.noise_interval)
        assert found.noise_scale_by_group == right.noise_scale_by_group
    assert second.state_dict()["noise"] == whole.state_dict()["noise"]


def test_a_state_from_without_it_begins_anew_and_the_other_way_round() -> None:
    without, with_it = accumulator(Net(), noise_scale=None), accumulator(Net())
    with_it.step(rows(), squares)
    without.load_state_dict(with_it.state_dict())
    assert without.step(rows(), squares).noise_scale is None
    with_it.load_state_dict(without.state_dict())
    assert windows_of(with_it) == []


def test_a_state_of_other_groups_begins_anew() -> None:
    one, two = accumulator(Net()), accumulator(Net(), noise_scale=mb.NoiseScale(every=1, by_group=True))
    one.step(rows(), squares)
    two.load_state_dict(one.state_dict())
    assert windows_of(two) == []
    with pytest.raises(ConfigError, match="state_dict"):
        two.load_state_dict({**one.state_dict(), "noise": {"windows": [["a"]]}})


def test_each_parameter_group_has_a_noise_scale() -> None:
    model = Net()
    groups: list[dict[str, Any]] = [
        {"params": list(model.body.parameters()), "name": "body"},
        {"params": [model.head.weight]},
        {"params": [model.head.bias]},
    ]
    it = mb.Accumulator(
        model, SGD(groups, lr=0.0), microbatch_size=6, noise_scale=mb.NoiseScale(every=1, by_group=True)
    )
    step = [it.step(rows(seed=seed), squares) for seed in range(6)][-1]
    sizes = [sum(each.numel() for each in group["params"]) for group in groups]
    columns = [per_sample(model, rows(seed=seed)).split(sizes, dim=1) for seed in range(6)]
    right = [scale_of([by_hand(each[k], SIZES[6]) for each in columns]) for k in range(3)]
    assert list(step.noise_scale_by_group) == ["body", "1", "2"]
    assert list(step.noise_scale_by_group.values()) == [scale and pytest.approx(scale, rel=1e-9) for scale in right]
    assert step.as_dict()["noise_scale_by_group/body"] == step.noise_scale_by_group["body"]


def test_the_record_is_plain_numbers() -> None:
    it = accumulator(Net())
    step = [it.step(rows(seed=seed), squares) for seed in range(6)][-1]
    assert step.noise_interval is not None
    assert step.noise_scale is not None
    told = step.as_dict()
    assert (told["noise_interval/lower"], told["noise_interval/upper"]) == step.noise_interval
    assert step.noise_interval[0] < step.noise_scale < step.noise_interval[1]
    without = accumulator(Net(), noise_scale=None).step(rows(), squares).as_dict()
    assert set(without) == set(told)


# -- what cannot be measured -------------------------------------------------------------------------------------------


def reentrant(model: nn.Module, batch: Batch, *, again: bool = True) -> Tensor:
    """One weight in two checkpoints, each with a backward of its own."""
    x: Any = batch["x"].requires_grad_()
    for _ in range(2):
        x = checkpoint(model, x, use_reentrant=again)
    return x.square().mean()


def test_a_gradient_in_pieces_is_not_measured_and_that_is_said_once() -> None:
    torch.manual_seed(0)
    model, batch = nn.Linear(3, 3).double(), {"x": rows()["x"]}
    it = accumulator(model)
    with pytest.warns(mb.MicrobatchWarning, match="use_reentrant=False") as caught:
        steps = [it.step(batch, reentrant) for _ in range(2)]
    assert len(caught) == 1
    assert [each.noise_scale for each in steps] == [None, None]
    found: list[Measured] = []
    for loss in (lambda model, batch: reentrant(model, batch, again=False), lambda m, b: m(m(b["x"])).square().mean()):
        it = accumulator(model)
        it.step(batch, loss)
        found += windows_of(it)
    close(found[0], found[1])


def test_exact_batch_statistics_are_refused() -> None:
    with pytest.raises(ConfigError, match=r"noise_scale= does not go with batch_norm=.exact."):
        accumulator(nn.Sequential(nn.Linear(3, 2), nn.BatchNorm1d(2)), batch_norm="exact")


def test_a_loss_that_couples_samples_is_refused() -> None:
    it = accumulator(Net())
    with pytest.raises(ConfigError, match="noise_scale= does not go with encode="):
        it.step(rows(), lambda model, z: z.var(0).sum(), encode=lambda model, batch: model(batch["x"]))


@pytest.mark.parametrize("given", [{"every": 0}, {"every": -3}, {"every": True}, {"windows": 1}, {"microbatches": 1}])
def test_values_that_cannot_work_are_refused(given: dict[str, Any]) -> None:
    with pytest.raises(ConfigError, match=f"NoiseScale: {next(iter(given))}"):
        mb.NoiseScale(**given)
