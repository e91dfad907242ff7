"""Gradients that add up inside the optimizer's momentum: the same weights, no gradient buffer, nothing lost."""

import copy
import math
from collections.abc import Callable, Iterable
from typing import Any

import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.optim import Optimizer

import microbatch as mb
from microbatch.errors import ConfigError, NonfiniteError
from microbatch.gradients import fused_matmul

from .reference import (
    EXACT,
    WRONG,
    Batch,
    Door,
    few,
    filled,
    moved,
    numbers,
    on_each_device,
    points,
    regressor,
    relative_error,
    sentences,
    squared,
    tagger,
    through_each_door,
    token_loss,
    token_mean,
)
from .reference import Subject as It

SEEDS = st.integers(0, 2**16)
STEPS = 20


def folded(
    model: nn.Module,
    make: Callable[[Iterable[Tensor]], Optimizer],
    *,
    size: int = 2,
    buffer: Any = "none",
    dtype: torch.dtype = torch.float32,
    how: str = "plain",
    **settings: Any,
) -> It:
    twin = copy.deepcopy(model)
    optimizer = make(twin.parameters())
    sums = mb.Sums(buffer=buffer, dtype=dtype, how=how)
    accumulator = mb.Accumulator(twin, optimizer, microbatch_size=size, sums=sums, **settings)
    return It(twin, optimizer, accumulator, [])


def plain_step(model: nn.Module, optimizer: Optimizer, loss: Callable[..., Tensor], batch: Batch) -> None:
    """Take one ordinary step on the full batch."""
    optimizer.zero_grad()
    loss(model, moved(batch, model, next(model.parameters()).dtype)).backward()
    optimizer.step()


def weights(model: nn.Module) -> dict[str, Tensor]:
    return {name: each.detach().clone() for name, each in model.named_parameters()}


def states(it: It) -> list[Tensor]:
    """Return the momentum of the parameters that have one."""
    held = it.optimizer.state
    return [held[each]["momentum_buffer"] for each in it.model.parameters() if each in held]


# -- the same weights ----------------------------------------------------------------------------------------------


@through_each_door
@on_each_device
@settings(max_examples=4)
@given(
    momentum=st.sampled_from([0.5, 0.9, 0.99]),
    dampening=st.sampled_from([0.0, 0.3]),
    decay=st.sampled_from([0.0, 0.1]),
    maximize=st.booleans(),
    foreach=st.booleans(),
    rows=st.integers(1, 7),
    size=st.integers(1, 4),
    seed=SEEDS,
)
@example(momentum=0.9, dampening=0.3, decay=0.1, maximize=True, foreach=True, rows=7, size=3, seed=0)
def test_twenty_steps_of_sgd(
    door: Door,
    device: str,
    momentum: float,
    dampening: float,
    decay: float,
    maximize: bool,
    foreach: bool,
    rows: int,
    size: int,
    seed: int,
) -> None:
    def make(parameters: Iterable[Tensor]) -> Optimizer:
        return torch.optim.SGD(
            parameters,
            lr=0.01,
            momentum=momentum,
            dampening=dampening,
            weight_decay=decay,
            maximize=maximize,
            foreach=foreach,
        )

    model = regressor(seed, device)
    it = folded(model, make, size=size)
    plain = make(model.parameters())
    for step in range(STEPS):
        batch = points(seed + step, rows + step % 3)  # the count changes from step to step
        door(it, batch, squared, size=size)
        plain_step(model, plain, squared, batch)
    assert relative_error(weights(it.model), weights(model)) <= EXACT
    momenta = {name: plain.state[each]["momentum_buffer"] for name, each in model.named_parameters()}
    assert relative_error(dict(zip(momenta, states(it), strict=True)), momenta) <= EXACT
    assert all(each.grad is None for each in it.model.parameters())


def sgd(parameters: Iterable[Tensor]) -> Optimizer:
    return torch.optim.SGD(parameters, lr=0.05, momentum=0.9, weight_decay=0.01)


@on_each_device
@few
@given(size=st.integers(1, 4), counts=st.booleans(), seed=SEEDS)
def test_counts_that_nobody_knows_before_the_end(device: str, size: int, counts: bool, seed: int) -> None:
    model = tagger(seed, device)
    it = folded(model, sgd, size=size)
    plain = sgd(model.parameters())
    for step in range(STEPS):
        batch = sentences(seed + step, [8, 1, 0, 5, 3][: 3 + step % 3])
        declared = (lambda batch: {"loss": (batch["labels"] >= 0).sum()}) if counts else None
        it.accumulator.step(batch, token_loss, counts=declared)
        plain_step(model, plain, token_mean, batch)
    assert relative_error(weights(it.model), weights(model)) <= EXACT


@on_each_device
def test_by_hand_it_goes_wrong(device: str) -> None:
    # What one would write: the momentum times mu, and every microbatch's backward straight into it.
    model = tagger(0, device)
    twin = copy.deepcopy(model)
    plain, buffers = sgd(model.parameters()), [torch.zeros_like(each) for each in twin.parameters()]
    for step in range(STEPS):
        batch = sentences(step, [8, 1, 0, 5, 3][: 3 + step % 3])
        plain_step(model, plain, token_mean, batch)
        rows = [row for row in range(len(batch["labels"])) if (batch["labels"][row] >= 0).any()]
        for parameter, buffer in zip(twin.parameters(), buffers, strict=True):
            parameter.grad = buffer.mul_(0.9)
        for row in rows:
            piece = {name: each[row : row + 1].to(device) for name, each in batch.items()}
            (token_mean(twin, piece) / len(rows)).backward()
        with torch.no_grad():
            for parameter, buffer in zip(twin.parameters(), buffers, strict=True):
                buffer.add_(parameter, alpha=0.01)
                parameter.add_(buffer, alpha=-0.05)
    assert relative_error(weights(twin), weights(model)) > WRONG


@on_each_device
@pytest.mark.parametrize("way", ["twice", "keep"])
def test_a_loss_that_couples_samples(device: str, way: str) -> None:
    def spread(model: nn.Module, z: Tensor) -> Tensor:
        # With a parameter of its own, whose gradient comes before the encoder's.
        return (model.get_parameter("2.bias") - z.var(0)).square().sum()

    def whole(model: nn.Module, batch: Batch) -> Tensor:
        return spread(model, model(batch["x"]))

    model = regressor(0, device)
    it = folded(model, sgd, coupled=way)
    plain = sgd(model.parameters())
    for step in range(STEPS):
        it.accumulator.step(points(step, 5 + step % 3), spread, encode=lambda model, batch: model(batch["x"]))
        plain_step(model, plain, whole, points(step, 5 + step % 3))
    assert relative_error(weights(it.model), weights(model)) <= EXACT


class Sometimes(nn.Module):
    """A layer that only some batches use."""

    def __init__(self) -> None:
        super().__init__()
        self.always, self.rare = nn.Linear(3, 2), nn.Linear(3, 2)

    def forward(self, x: Tensor) -> Tensor:
        return self.always(x) + (self.rare(x) if x[0, 0] > 0 else 0)


@on_each_device
def test_a_parameter_without_a_gradient_keeps_its_momentum_and_its_place(device: str) -> None:
    def mean(model: Any, batch: Batch) -> Tensor:
        return (model(batch["x"]) - 1).square().mean()

    model = filled(Sometimes(), 0, device)
    it = folded(model, sgd)
    plain = sgd(model.parameters())
    for step in range(STEPS):
        x = numbers(step, 5, 3)
        x[:, 0] = x[:, 0].abs() * (1 if step % 3 == 1 else -1)
        it.accumulator.step({"x": x}, mean)
        plain_step(model, plain, mean, {"x": x})
    assert relative_error(weights(it.model), weights(model)) <= EXACT


@on_each_device
def test_inside_the_matrix_product(device: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fused_matmul, "SMALLEST", 1)
    model = tagger(1, device)
    it, held = folded(model, sgd), list[Tensor]()
    plain = sgd(model.parameters())
    for step in range(STEPS):
        batch = sentences(step, [8, 1, 2, 5])
        assert it.accumulator.step(batch, token_loss).fused == 2
        plain_step(model, plain, token_mean, batch)
        held += states(it)[:3] if step == 0 else []
        # The same tensors for ever: nothing took a copy on its way.
        assert all(a is b for a, b in zip(held, states(it)[:3], strict=True))
    assert relative_error(weights(it.model), weights(model)) <= EXACT


@on_each_device
def test_muon_without_nesterov(device: str) -> None:
    def muon(parameters: Iterable[Tensor]) -> Optimizer:
        return torch.optim.Muon(parameters, lr=0.01, momentum=0.9, nesterov=False)

    def tilted(model: Any, batch: Batch) -> Tensor:
        # Linear in the weights, so that what is rounded in one step does not reach the next one's gradient.
        return (model.weight * batch["x"]).sum((1, 2)).mean()

    model = filled(nn.Linear(4, 3, bias=False), 0, device)
    it = folded(model, muon)
    plain = muon(model.parameters())
    for step in range(STEPS):
        batch = {"x": numbers(step, 5, 3, 4)}
        it.accumulator.step(batch, tilted)
        plain_step(model, plain, tilted, batch)
    (ours,), (theirs,) = states(it), [plain.state[each]["momentum_buffer"] for each in model.parameters()]
    assert ((ours - theirs).norm() / theirs.norm()).item() <= EXACT
    # Muon itself works in bfloat16, where a difference in the last bit of float64 may turn a rounding.
    assert relative_error(weights(it.model), weights(model)) <= 1e-3


class Signum(Optimizer):
    """Steps by the sign of the momentum."""

    def __init__(self, parameters: Iterable[Tensor]) -> None:
        super().__init__(parameters, {"lr": 0.01, "beta": 0.9})

    @torch.no_grad()
    def step(self, closure: Any = None) -> Any:
        for group in self.param_groups:
            for parameter in group["params"]:
                if parameter.grad is None:
                    continue
                state = self.state[parameter]
                mean = state.setdefault("mean", torch.zeros_like(parameter))
                mean.lerp_(parameter.grad, 1 - group["beta"])
                parameter.sub_(mean.sign(), alpha=group["lr"])
        return closure


SIGNUM = mb.LinearState(
    state="mean", coefficients=lambda group, begun: (group["beta"], 1 - group["beta"], 0.0), stepping={"beta": 0.0}
)


@on_each_device
def test_an_optimizer_of_ones_own_can_be_described(device: str) -> None:
    model = regressor(0, device)
    it = folded(model, Signum, buffer=SIGNUM)
    plain = Signum(model.parameters())
    for step in range(STEPS):
        it.accumulator.step(points(step, 5), squared)
        plain_step(model, plain, squared, points(step, 5))
    assert relative_error(weights(it.model), weights(model)) <= EXACT
    with pytest.raises(ConfigError, match="LinearState"):
        folded(model, Signum)


@on_each_device
def test_one_optimizer_folds_and_the_other_does_not(device: str) -> None:
    def both(model: Any) -> list[Optimizer]:
        return [torch.optim.SGD(model[0].parameters(), lr=0.1, momentum=0.9), torch.optim.Adam(model[2].parameters())]

    model = regressor(0, device)
    twin = copy.deepcopy(model)
    accumulator = mb.Accumulator(twin, both(twin), microbatch_size=2, sums=mb.Sums(buffer=["none", "own"]))
    plain = both(model)
    for step in range(STEPS):
        accumulator.step(points(step, 5), squared)
        for optimizer in plain:
            optimizer.zero_grad()
        squared(model, moved(points(step, 5), model, torch.float64)).backward()
        for optimizer in plain:
            optimizer.step()
    assert relative_error(weights(twin), weights(model)) <= EXACT


# -- nothing is lost -------------------------------------------------------------------------------------------------


class Broken(Exception):  # noqa: N818
    pass


def fail_at(at: int, error: BaseException) -> Callable[[nn.Module, Batch], Tensor]:
    """Make a loss whose backward fails in one microbatch, once."""
    turn = iter(range(10**6))

    def loss_fn(model: nn.Module, batch: Batch) -> Tensor:
        loss = squared(model, batch)
        if next(turn) == at:

            def fails(gradient: Tensor) -> Tensor:
                handle.remove()
                raise error

            # In the middle of backward: later layers have their gradients by now.
            handle = model.get_parameter("0.weight").register_hook(fails)
        return loss

    return loss_fn


@on_each_device
@pytest.mark.parametrize("at", [0, 1, 2])
@pytest.mark.parametrize("steps", [0, 2])
def test_an_exception_leaves_the_momentum_to_the_bit(device: str, at: int, steps: int) -> None:
    it = folded(regressor(0, device), sgd)
    for step in range(steps):
        it.accumulator.step(points(step, 5), squared)
    before, tensors = copy.deepcopy(it.optimizer.state_dict()["state"]), states(it) if steps else []
    kept = weights(it.model)
    with pytest.raises(Broken):
        it.accumulator.step(points(9, 5), fail_at(at, Broken()))
    after = it.optimizer.state_dict()["state"]
    assert before.keys() == after.keys()
    for key, state in before.items():
        assert torch.equal(state["momentum_buffer"], after[key]["momentum_buffer"])
    assert not steps or all(a is b for a, b in zip(tensors, states(it), strict=True))
    assert relative_error(weights(it.model), kept) == 0
    assert all(each.grad is None for each in it.model.parameters())


@on_each_device
def test_out_of_memory_runs_again_with_the_same_result(device: str) -> None:
    small, large = (folded(regressor(0, device), sgd, size=size) for size in (1, 2))
    for it in (small, large):
        it.accumulator.step(points(0, 4), squared)
    small.accumulator.step(points(1, 4), squared)
    step = large.accumulator.step(points(1, 4), fail_at(1, torch.OutOfMemoryError("CUDA out of memory.")))
    assert (step.retries, step.microbatch_size) == (1, 1)
    assert relative_error(weights(large.model), weights(small.model)) <= EXACT


@on_each_device
def test_a_window_that_is_not_finite_is_dropped_whole(device: str) -> None:
    def poisoned(model: nn.Module, batch: Batch) -> Tensor:
        return squared(model, batch) * math.nan

    for nonfinite in ("raise", "skip"):
        it = folded(regressor(0, device), sgd, nonfinite=nonfinite)
        it.accumulator.step(points(0, 5), squared)
        before = [each.clone() for each in states(it)]
        if nonfinite == "raise":
            with pytest.raises(NonfiniteError):
                it.accumulator.step(points(1, 5), poisoned)
        else:
            assert not it.accumulator.step(points(1, 5), poisoned).applied
        assert all(map(torch.equal, before, states(it)))
        assert all(each.grad is None for each in it.model.parameters())


def test_groups_say_the_same_after_a_step_as_before() -> None:
    it = folded(regressor(0, "cpu"), sgd)
    before = [{key: value for key, value in group.items() if key != "params"} for group in it.optimizer.param_groups]
    it.accumulator.step(points(0, 5), squared)
    after = [{key: value for key, value in group.items() if key != "params"} for group in it.optimizer.param_groups]
    assert before == after


def test_peak_memory_is_one_gradient_less() -> None:
    peaks, gradient = dict[str, int](), 0
    for buffer in ("own", "none"):
        torch.manual_seed(0)
        model = nn.Sequential(nn.Linear(256, 512), nn.Tanh(), nn.Linear(512, 256))
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
        accumulator = mb.Accumulator(
            model, optimizer, microbatch_size=1, memory_budget="1 GiB", sums=mb.Sums(buffer=buffer)
        )
        steps = [accumulator.step(torch.ones(4, 256), lambda model, x: model(x).square().mean()) for _ in range(2)]
        assert steps[1].peak_bytes is not None
        peaks[buffer] = steps[1].peak_bytes
        gradient = sum(each.numel() * each.element_size() for each in model.parameters())
    saved = peaks["own"] - peaks["none"]
    assert 0.98 * gradient <= saved <= 1.02 * gradient


def test_the_norm_is_not_known_and_says_so() -> None:
    it = folded(regressor(0, "cpu"), sgd)
    assert math.isnan(it.accumulator.step(points(0, 5), squared).grad_norm.item())


@pytest.mark.parametrize(
    ("make", "settings", "words"),
    [
        (torch.optim.Adam, {}, "Adam, which needs the whole gradient"),
        (lambda p: torch.optim.SGD(p, lr=0.1), {}, "momentum is 0"),
        (lambda p: torch.optim.SGD(p, lr=0.1, momentum=0.9, nesterov=True), {}, "nesterov=True"),
        (lambda p: torch.optim.SGD(p, lr=0.1, momentum=0.9, dampening=1), {}, "dampening is 1"),
        (lambda p: torch.optim.Muon([next(iter(p))], lr=0.1), {}, "nesterov=False"),
        (sgd, {"max_grad_norm": 1.0}, "max_grad_norm="),
        (sgd, {"grad_scaler": torch.amp.GradScaler("cpu")}, "grad_scaler="),
        (sgd, {"dtype": torch.bfloat16, "how": "compensated"}, r'Sums\(how="compensated"\)'),
        (sgd, {"buffer": "momentum"}, 'buffer must be "own", a LinearState or "none"'),
        (sgd, {"buffer": ["none", "own"]}, "2 values for 1"),
    ],
)
def test_what_cannot_be_folded_is_refused_by_name(make: Any, settings: dict[str, Any], words: str) -> None:
    with pytest.raises(ConfigError, match=words):
        folded(regressor(0, "cpu"), make, **settings)


def test_a_narrow_momentum_is_the_users_decision() -> None:
    model = regressor(0, "cpu", torch.bfloat16)
    with pytest.raises(ConfigError, match=r"Pass dtype=torch\.bfloat16"):
        folded(model, sgd)
    it = folded(model, sgd, dtype=torch.bfloat16)
    for step in range(3):
        it.accumulator.step(points(step, 5, torch.bfloat16), squared)
    assert all(each.dtype == torch.bfloat16 for each in states(it))
