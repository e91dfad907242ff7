"""Laws B1 to B6: where a window begins and ends, and what is left of it when something goes wrong inside."""

import copy
import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import assume, example, given
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.nn.utils import clip_grad_norm_

import microbatch as mb
from microbatch.errors import GradientsTouchedError, WindowOpenError

from .reference import (
    EXACT,
    WRONG,
    Batch,
    Door,
    Gradients,
    Subject,
    by_hand,
    few,
    filled,
    full_batch,
    gradients_of,
    joined,
    limit,
    moved,
    norm,
    on_each_device,
    pieces_of,
    points,
    regressor,
    relative_error,
    sentences,
    squared,
    steps_by_windows,
    subject,
    tagger,
    through_each_door,
    token_loss,
    token_mean,
)

SEEDS = st.integers(0, 2**16)
DTYPES = st.sampled_from([torch.float64, torch.float32])


# -- B1, B2: a loader that ends before its window does -------------------------------------------------------------


def counting_loop(model: nn.Module, epochs: Sequence[Sequence[Batch]], every: int) -> list[Gradients]:
    """Step after every so many microbatches of an epoch, as everyone does: a leftover stays in `.grad`."""
    twin, updates = copy.deepcopy(model), list[Gradients]()
    for loader in epochs:
        for index, piece in enumerate(loader):
            (squared(twin, moved(piece, twin, torch.float64)) / every).backward()
            if (index + 1) % every == 0:
                updates.append(gradients_of(twin))
                twin.zero_grad()
    return updates


@on_each_device
@few
@given(
    rows=st.integers(1, 14),
    size=st.integers(1, 3),
    microbatches=st.integers(1, 6),
    epochs=st.integers(1, 3),
    dtype=DTYPES,
    seed=SEEDS,
)
@example(rows=7, size=1, microbatches=4, epochs=2, dtype=torch.float64, seed=0)
@example(rows=3, size=1, microbatches=4, epochs=3, dtype=torch.float64, seed=0)
def test_b1_b2_every_epoch_is_stepped_whole_and_leaves_nothing(
    device: str, rows: int, size: int, microbatches: int, epochs: int, dtype: torch.dtype, seed: int
) -> None:
    model = regressor(seed, device, dtype)
    loaders = [pieces_of(points(seed + 10 * epoch, rows, dtype), size) for epoch in range(epochs)]
    it = subject(model)
    windows: list[Sequence[Batch]] = []
    for loader in loaders:
        steps = steps_by_windows(it, loader, squared, microbatches=microbatches)
        windows += (own := [loader[at : at + microbatches] for at in range(0, len(loader), microbatches)])
        assert len(steps) == len(own)
        assert gradients_of(it.model) == {}
    for update, window in zip(it.updates, windows, strict=True):
        batch = joined(window)
        reference = full_batch(model, squared, batch)
        assert relative_error(update, reference) <= limit(model, squared, batch, reference)


@on_each_device
@few
@given(microbatches=st.integers(2, 6), leftover=st.integers(1, 5), seed=SEEDS)
def test_b1_by_hand_the_leftover_leaks_into_the_next_epoch(
    device: str, microbatches: int, leftover: int, seed: int
) -> None:
    assume(leftover < microbatches)
    model = regressor(seed, device)
    one = points(seed, 1)
    alike = [one] * (microbatches + leftover)  # so that every right update is the same
    reference = full_batch(model, squared, one)
    it = subject(model)
    for _ in range(2):
        steps_by_windows(it, alike, squared, microbatches=microbatches)
    assert [relative_error(update, reference) <= EXACT for update in it.updates] == [True] * 4
    recipe = counting_loop(model, [alike, alike], microbatches)
    assert len(recipe) == 2  # of 4: the leftovers were never applied on their own
    assert norm(recipe[1].values()) / norm(reference.values()) == pytest.approx(1 + leftover / microbatches)
    assert relative_error(recipe[1], reference) > WRONG


@on_each_device
@few
@given(rows=st.integers(1, 6), more=st.integers(1, 4), seed=SEEDS)
def test_b2_by_hand_an_epoch_shorter_than_a_window_never_steps(device: str, rows: int, more: int, seed: int) -> None:
    model, batch = regressor(seed, device), points(seed, rows)
    loader = pieces_of(batch, 1)
    it = subject(model)
    (step,) = steps_by_windows(it, loader, squared, microbatches=rows + more)
    reference = full_batch(model, squared, batch)
    assert (step.applied, len(it.updates)) == (True, 1)
    assert relative_error(it.updates[0], reference) <= EXACT
    assert counting_loop(model, [loader], rows + more) == []
    assert relative_error(by_hand(model, squared, loader, divide_by=rows + more), reference) > WRONG


# -- B3: validation in the middle of a window ----------------------------------------------------------------------


def validated(it: Subject, batch: Batch, evaluate: Callable[[nn.Module], object], *, after: int) -> None:
    """Take one step by `window`, with an evaluation after so many microbatches."""
    with it.accumulator.window() as window:
        for index, microbatch in enumerate(window.split(batch)):
            if index == after:
                evaluate(it.model)
            window.backward(squared(it.model, microbatch))


def evaluation(model: nn.Module) -> float:
    model.eval()
    with torch.no_grad():
        batch = moved(points(99, 4), model, next(model.parameters()).dtype)
        loss = squared(model, batch).item()
    model.train()
    return loss


@on_each_device
@few
@given(
    rows=st.integers(2, 9),
    size=st.integers(1, 3),
    after=st.integers(0, 8),
    autocast=st.sampled_from([None, torch.bfloat16]),
    seed=SEEDS,
)
@example(rows=4, size=1, after=2, autocast=None, seed=0)
@example(rows=4, size=1, after=0, autocast=torch.bfloat16, seed=0)
def test_b3_validation_keeps_the_gradients(
    device: str, rows: int, size: int, after: int, autocast: torch.dtype | None, seed: int
) -> None:
    dtype = torch.float64 if autocast is None else torch.float32
    model, batch = regressor(seed, device, dtype), points(seed, rows, dtype)
    with_, without = (subject(model, size=size, autocast=autocast) for _ in range(2))
    validated(with_, batch, evaluation, after=after % -(-rows // size))
    validated(without, batch, lambda _: None, after=0)
    assert relative_error(with_.updates[0], without.updates[0]) == 0.0
    if autocast is None:
        assert relative_error(with_.updates[0], full_batch(model, squared, batch)) <= EXACT


@on_each_device
@few
@given(rows=st.integers(2, 9), after=st.integers(1, 8), seed=SEEDS)
def test_b3_by_hand_validation_that_zeroes_erases(device: str, rows: int, after: int, seed: int) -> None:
    after = min(after, rows - 1)
    model, batch = regressor(seed, device), points(seed, rows)
    reference = full_batch(model, squared, batch)
    rest = by_hand(model, squared, pieces_of(batch, 1)[after:], divide_by=rows)
    assert relative_error(rest, reference) > WRONG
    it = subject(model, size=1)
    with pytest.raises(GradientsTouchedError, match="zero_grad"):
        validated(it, batch, lambda model: model.zero_grad(), after=after)
    assert it.updates == []
    assert gradients_of(it.model) == {}


# -- B4: an exception inside ---------------------------------------------------------------------------------------


MANY = 300
RANDOM = {"torch's random state", "numpy's random state", "python's random state"}


class Fault(Exception):  # noqa: N818 - what a user's own code raises
    """What goes wrong."""


class FaultInBackward(torch.autograd.Function):
    """Pass a tensor through, and fail on the way back."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, fault: BaseException) -> Tensor:
        ctx.fault = fault
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, *_: Any) -> Any:
        raise ctx.fault


class Noisy(nn.Module):
    """Draw random numbers and change buffers while going forward, and fail when told to."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.norm = nn.Linear(3, 4), nn.BatchNorm1d(4)
        self.dropout, self.last = nn.Dropout(0.5), nn.Linear(4, 2)
        self.register_buffer("seen", torch.zeros(()))
        self.fault: BaseException | None = None
        self.where = "nowhere"

    def forward(self, x: Tensor) -> Tensor:
        """Return outputs of shape ``(rows, 2)``."""
        self.seen = self.seen + 1  # replaced, not changed in place
        noise = sum(random.random() for _ in range(MANY)) / MANY + np.random.rand()  # noqa: NPY002, S311 - global ones
        hidden = self.first(x).tanh() + noise
        if self.fault is not None and self.where == "backward":  # when the last layer has its gradient, the first not
            hidden = FaultInBackward.apply(hidden, self.fault)
        hidden = self.dropout(self.norm(hidden))
        if self.fault is not None and self.where == "forward":
            raise self.fault
        return self.last(hidden)


def draws_between(before: tuple[Any, ...], after: tuple[Any, ...]) -> int:
    """Count the numbers drawn between two states of Python's generator, up to many."""
    # Equality would be too much to ask: to check a list's items, beartype draws which, from this same generator.
    generator = random.Random()  # noqa: S311 - not for secrets
    generator.setstate(before)
    for drawn in range(MANY):
        if generator.getstate() == after:
            return drawn
        generator.getrandbits(32)
    return MANY


@dataclass(frozen=True)
class State:
    """All that a window may change, as it is now."""

    gradients: Gradients
    identities: list[int]
    weights: list[Tensor]
    buffers: list[Tensor]
    torch_random: list[Tensor]
    numpy_random: list[Any]
    python_random: tuple[Any, ...]

    @classmethod
    def of(cls, model: nn.Module) -> "State":
        device = next(model.parameters()).device
        backend = torch.get_device_module(device)
        return cls(
            gradients_of(model),
            [id(each.grad) for each in model.parameters()],
            [each.detach().clone() for each in model.parameters()],
            [each.detach().clone() for each in model.buffers()],
            [torch.get_rng_state(), *([] if device.type == "cpu" else [backend.get_rng_state(device)])],
            [np.asarray(part).tolist() for part in np.random.get_state()],  # noqa: NPY002 - the global one
            random.getstate(),
        )

    def changes(self, model: nn.Module) -> set[str]:
        """Return what is not as it was."""
        now = State.of(model)
        same = {
            "gradients": relative_error(now.gradients, self.gradients) == 0 and now.identities == self.identities,
            "weights": all(map(torch.equal, now.weights, self.weights)),
            "buffers": all(map(torch.equal, now.buffers, self.buffers)),
            "torch's random state": all(map(torch.equal, now.torch_random, self.torch_random)),
            "numpy's random state": now.numpy_random == self.numpy_random,
            "python's random state": draws_between(self.python_random, now.python_random) < MANY,
        }
        return {name for name, is_same in same.items() if not is_same}


def failing(model: Noisy, fault: BaseException, *, where: str, at: int) -> Callable[[nn.Module, Batch], Tensor]:
    calls = 0

    def loss_fn(_: nn.Module, batch: Batch) -> Tensor:
        nonlocal calls
        model.fault, model.where = (fault if calls == at else None), where
        calls += 1
        loss = squared(model, batch)
        if where == "loss" and calls - 1 == at:
            raise fault
        return loss

    return loss_fn


def reseed(seed: int) -> None:
    torch.manual_seed(seed)
    random.seed(seed)
    np.random.seed(seed)  # noqa: NPY002 - the global one


def noisy(seed: int, device: str) -> Noisy:
    model = Noisy()
    filled(model, seed, device)
    return model


@through_each_door
@on_each_device
@few
@given(
    where=st.sampled_from(["forward", "backward", "loss"]),
    at=st.integers(0, 3),
    kind=st.sampled_from([Fault, KeyboardInterrupt]),  # for running out of memory see test_recovery.py
    had=st.booleans(),
    seed=SEEDS,
)
@example(where="backward", at=0, kind=Fault, had=True, seed=0)
@example(where="forward", at=3, kind=Fault, had=False, seed=0)
def test_b4_everything_is_put_back(
    door: Door, device: str, where: str, at: int, kind: type[BaseException], had: bool, seed: int
) -> None:
    model, batch = noisy(seed, device), points(seed, 8)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    it = subject(model, optimizer, size=2, buffers="each")
    if had:  # a gradient of the user's own, on some of the parameters
        model.last.weight.grad = torch.ones_like(model.last.weight)
    before, fault = State.of(model), kind("as it was")
    with pytest.raises(kind) as caught:
        door(it, batch, failing(model, fault, where=where, at=at), size=2)
    assert caught.value is fault
    assert before.changes(model) == set()
    assert (it.updates, dict(optimizer.state)) == ([], {})
    # And the next window is not the worse for it: as if there had been no fault.
    model.fault = None
    twin = noisy(seed, device)
    other = subject(twin, torch.optim.SGD(twin.parameters(), lr=0.1, momentum=0.9), size=2, buffers="each")
    reseed(seed)
    door(it, batch, squared, size=2)
    reseed(seed)
    door(other, batch, squared, size=2)
    assert relative_error(it.updates[0], other.updates[0]) == 0.0
    assert all(map(torch.equal, model.state_dict().values(), twin.state_dict().values()))


@on_each_device
@few
@given(where=st.sampled_from(["forward", "backward", "loss"]), at=st.integers(1, 3), seed=SEEDS)
@example(where="backward", at=1, seed=0)
def test_b4_by_hand_half_a_gradient_stays(device: str, where: str, at: int, seed: int) -> None:
    model = noisy(seed, device)
    before, loss_fn = State.of(model), failing(model, Fault(), where=where, at=at)

    def recipe() -> None:
        for piece in pieces_of(points(seed, 8), 2):
            (loss_fn(model, moved(piece, model, torch.float64)) / 4).backward()

    with pytest.raises(Fault):
        recipe()
    assert before.changes(model) == {"gradients", "buffers", *RANDOM}


@on_each_device
def test_b4_leaving_the_loop_over_windows_leaves_no_half_a_gradient(device: str) -> None:
    model = noisy(0, device)
    it = subject(model, torch.optim.SGD(model.parameters(), lr=0.1), size=2, buffers="each")
    before = State.of(model)

    def stopped() -> None:
        windows: Any = it.accumulator.windows(pieces_of(points(0, 8), 2), microbatches=4)
        for window in windows:
            for microbatch in window:
                window.backward(squared(model, microbatch))
                windows.close()  # what Python does to an abandoned generator
                return

    stopped()
    assert before.changes(model) == set()
    assert it.updates == []
    it.accumulator.step(points(0, 8), squared)
    assert len(it.updates) == 1


# -- B5: clipped once ----------------------------------------------------------------------------------------------


def clipped(model: nn.Module, gradients: Gradients, most: float) -> Gradients:
    """Clip a gradient with PyTorch's own function."""
    twin = copy.deepcopy(model).double()
    for name, parameter in twin.named_parameters():
        parameter.grad = gradients[name].double().clone() if name in gradients else None
    clip_grad_norm_(twin.parameters(), most)
    return gradients_of(twin)


@through_each_door
@on_each_device
@few
@given(
    targets=st.lists(st.integers(0, 8), min_size=1, max_size=8).filter(any),
    size=st.integers(1, 5),
    most=st.floats(1e-3, 10),
    seed=SEEDS,
)
@example(targets=[8, 1, 2, 5], size=1, most=0.01, seed=0)
def test_b5_clipped_once_when_finished(
    door: Door, device: str, targets: list[int], size: int, most: float, seed: int
) -> None:
    model, batch = tagger(seed, device), sentences(seed, targets)
    reference = full_batch(model, token_mean, batch)
    it = subject(model, size=size, max_grad_norm=most)
    step = door(it, batch, token_loss, size=size)
    assert relative_error(it.updates[0], clipped(model, reference, most)) <= EXACT
    assert step.grad_norm.item() == pytest.approx(norm(reference.values()), rel=EXACT)  # before clipping


@on_each_device
@few
@given(rows=st.integers(2, 8), most=st.floats(1e-3, 0.05), seed=SEEDS)
@example(rows=4, most=0.01, seed=0)
def test_b5_by_hand_clipping_every_microbatch_is_another_gradient(
    device: str, rows: int, most: float, seed: int
) -> None:
    model, batch = regressor(seed, device), points(seed, rows)
    right = clipped(model, full_batch(model, squared, batch), most)
    assume(norm(right.values()) > 0.99 * most)  # that is, it was clipped
    twin, running = copy.deepcopy(model), copy.deepcopy(model)
    total = {name: torch.zeros_like(each) for name, each in twin.named_parameters()}
    for piece in pieces_of(batch, 1):
        (squared(running, moved(piece, running, torch.float64)) / rows).backward()
        clip_grad_norm_(running.parameters(), most)  # clips what has added up, over and over
        own = full_batch(twin, squared, piece)
        total = {name: total[name] + each / rows for name, each in clipped(twin, own, most).items()}
    assert relative_error(total, right) > WRONG
    assert relative_error(gradients_of(running), right) > WRONG
    it = subject(model, size=1, max_grad_norm=most)
    it.accumulator.step(batch, squared)
    assert relative_error(it.updates[0], right) <= EXACT


# -- B6: the scaler found infinities -------------------------------------------------------------------------------


def scaler_for(device: str, **settings: Any) -> torch.amp.GradScaler:
    return torch.amp.GradScaler(device, init_scale=2.0**10, **settings)


def overflowing(at: int | None) -> Callable[[nn.Module, Batch], Tensor]:
    """Make a loss whose gradient, not itself, passes float16's range in one microbatch."""
    calls = 0

    def loss_fn(model: nn.Module, batch: Batch) -> Tensor:
        nonlocal calls
        out = model(batch["x"])
        if calls == at:
            out = out + (out * 1e-3).half().mul(6e4).float()  # on the way back float16 has no such number
        calls += 1
        return (out - batch["y"]).square().mean()

    return loss_fn


@dataclass(frozen=True)
class Ledger:
    """What must not move when the update is dropped, and the scale, which must, once."""

    weights: list[Tensor]
    momenta: list[Tensor]
    scheduled: int
    scale: float

    @classmethod
    def of(cls, model: nn.Module, optimizer: torch.optim.Optimizer, schedule: Any, scaler: Any) -> "Ledger":
        states = (state["momentum_buffer"] for state in optimizer.state.values())
        weights = [each.detach().clone() for each in model.parameters()]
        return cls(weights, [each.clone() for each in states], schedule.last_epoch, scaler.get_scale())

    def dropped_cleanly(self, later: "Ledger") -> bool:
        return (
            all(map(torch.equal, self.weights, later.weights))
            and all(map(torch.equal, self.momenta, later.momenta))
            and (later.scheduled, later.scale) == (self.scheduled, self.scale / 2)
        )


def scaled(seed: int, device: str) -> tuple[nn.Module, torch.optim.Optimizer, Any, torch.amp.GradScaler]:
    model = regressor(seed, device, torch.float32)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    return model, optimizer, torch.optim.lr_scheduler.StepLR(optimizer, 1), scaler_for(device)


@through_each_door
@on_each_device
@few
@given(at=st.integers(0, 3), seed=SEEDS)
def test_b6_an_overflow_moves_the_scale_once_and_nothing_else(door: Door, device: str, at: int, seed: int) -> None:
    model, optimizer, schedule, scaler = scaled(seed, device)
    it = subject(model, optimizer, size=2, grad_scaler=scaler)
    batch = points(seed, 8, torch.float32)
    for overflow in (None, at, None):
        before = Ledger.of(model, optimizer, schedule, scaler)
        step = door(it, batch, overflowing(overflow), size=2)
        if step.applied:
            schedule.step()
        after = Ledger.of(model, optimizer, schedule, scaler)
        assert step.applied is (overflow is None)
        assert before.dropped_cleanly(after) is (overflow is not None)
        assert gradients_of(model) == {}
    assert len(it.updates) == 2
    assert it.accumulator.skipped == 1


@on_each_device
@few
@given(at=st.integers(0, 3), seed=SEEDS)
def test_b6_by_hand_the_counters_move_anyway(device: str, at: int, seed: int) -> None:
    pieces = pieces_of(points(seed, 8, torch.float32), 2)
    for updating in ("window", "microbatch"):
        model, optimizer, schedule, scaler = scaled(seed, device)
        loss_fn = overflowing(at)
        optimizer.step()  # or the schedule warns that it goes first
        before = Ledger.of(model, optimizer, schedule, scaler)
        for piece in pieces:
            scaler.scale(loss_fn(model, moved(piece, model, torch.float32)) / 4).backward()
            if updating == "microbatch":
                scaler.step(optimizer)
                scaler.update()
        if updating == "window":
            scaler.step(optimizer)
            scaler.update()
            schedule.step()
        assert not before.dropped_cleanly(Ledger.of(model, optimizer, schedule, scaler))


@on_each_device
@few
@given(microbatches=st.integers(1, 5), windows=st.integers(1, 5), interval=st.integers(1, 3))
def test_b6_the_scale_grows_with_windows_not_with_microbatches(
    device: str, microbatches: int, windows: int, interval: int
) -> None:
    model = regressor(0, device, torch.float32)
    scaler = scaler_for(device, growth_interval=interval)
    it = subject(model, size=1, grad_scaler=scaler)
    for _ in range(windows):
        it.accumulator.step(points(0, microbatches, torch.float32), squared)
    assert scaler.get_scale() == 2.0 ** (10 + windows // interval)
    by_microbatch = 2.0 ** (10 + windows * microbatches // interval)
    assert (by_microbatch == scaler.get_scale()) is (windows * microbatches // interval == windows // interval)


# -- what would break them -----------------------------------------------------------------------------------------


def test_the_optimizer_is_refused_inside_a_window() -> None:
    it = subject(regressor(0, "cpu"), size=2)
    before = State.of(it.model)
    with pytest.raises(WindowOpenError, match=r"optimizer.step\(\)"):
        validated(it, points(0, 4), lambda _: it.optimizer.step(), after=1)
    assert before.changes(it.model) == set()


@pytest.mark.parametrize("touch", ["zero_grad", "clip", "backward", "replace"])
def test_the_gradients_are_the_windows_own(touch: str) -> None:
    def meddle(model: nn.Module) -> None:
        weight = next(model.parameters())
        if touch == "zero_grad":
            model.zero_grad(set_to_none=False)
        elif touch == "clip":
            clip_grad_norm_(model.parameters(), 1e-3)
        elif touch == "backward":
            squared(model, points(1, 2)).backward()
        else:
            weight.grad = torch.zeros_like(weight)

    it = subject(regressor(0, "cpu"), size=2)
    with pytest.raises(GradientsTouchedError):
        validated(it, points(0, 6), meddle, after=2)
    assert it.updates == []
    assert gradients_of(it.model) == {}


@pytest.mark.parametrize("after", range(1, 6))
def test_what_touches_every_gradient_is_seen_between_any_two_microbatches(after: int) -> None:
    layers = [nn.Linear(3, 3), nn.Linear(3, 3), nn.Linear(3, 3), nn.Linear(3, 3), nn.Linear(3, 2)]
    deep = nn.Sequential(*layers).double()  # more parameters than are watched from the third window on
    it = subject(deep)
    with pytest.raises(GradientsTouchedError):
        validated(it, points(0, 6), lambda model: model.zero_grad(), after=after)
    assert gradients_of(it.model) == {}


@pytest.mark.parametrize("after", range(6))
def test_one_gradient_of_many_is_seen_anywhere_in_the_first_windows(after: int) -> None:
    it = subject(nn.Sequential(*[nn.Linear(3, 3) for _ in range(9)], nn.Linear(3, 2)).double(), size=1)
    last: Any = list(it.model.parameters())[-1]

    def loop() -> None:
        with it.accumulator.window() as window:
            for index, microbatch in enumerate(window.split(points(0, 6))):
                window.backward(squared(it.model, microbatch))
                if index == after:
                    last.grad.zero_()

    with pytest.raises(GradientsTouchedError, match=r"'9\.bias'"):
        loop()
    assert gradients_of(it.model) == {}


@pytest.mark.parametrize("place", [0, 7, 19])
def test_one_gradient_of_many_is_seen_later_in_one_of_a_few_windows(place: int) -> None:
    it = subject(nn.Sequential(*[nn.Linear(3, 3) for _ in range(9)], nn.Linear(3, 2)).double(), size=1)
    written: Any = list(it.model.parameters())[place]
    for _ in range(2):
        it.accumulator.step(points(0, 6), squared)

    def loop() -> None:
        for _ in range(4):  # each of them watches 12 of 20
            with it.accumulator.window() as window:
                for microbatch in window.split(points(0, 6)):
                    window.backward(squared(it.model, microbatch))
                    written.grad.mul_(1)

    with pytest.raises(GradientsTouchedError, match="was changed inside the window"):
        loop()
    assert gradients_of(it.model) == {}


@pytest.mark.parametrize("microbatches", [4, 8])  # 4 times 2 are the 8 gradients
@pytest.mark.parametrize("place", range(8))
def test_one_gradient_is_seen_later_however_many_microbatches_a_window_has(microbatches: int, place: int) -> None:
    it = subject(nn.Sequential(*[nn.Linear(3, 3) for _ in range(3)], nn.Linear(3, 2)).double(), size=1)
    written: Any = list(it.model.parameters())[place]
    for _ in range(2):
        it.accumulator.step(points(0, microbatches), squared)

    def loop() -> None:
        for _ in range(24):  # each of them watches 2 of 8 after its last backward
            with it.accumulator.window() as window:
                for microbatch in window.split(points(0, microbatches)):
                    window.backward(squared(it.model, microbatch))
                written.grad.mul_(1)

    with pytest.raises(GradientsTouchedError, match="was changed inside the window"):
        loop()


@pytest.mark.parametrize("after", range(1, 4))
def test_zeroing_is_seen_at_once_where_most_weights_have_no_gradient(after: int) -> None:
    unused = nn.ModuleList(nn.Linear(3, 3) for _ in range(9))
    it = subject(nn.ModuleList([nn.Linear(3, 2), unused]).double(), size=1)
    used: Any = it.model[0]  # pyright: ignore[reportIndexIssue]
    for _ in range(6):
        it.accumulator.step(points(0, 6), lambda _, rows: squared(used, rows))

    def loop() -> None:
        with it.accumulator.window() as window:
            for index, microbatch in enumerate(window.split(points(0, 6))):
                window.backward(squared(used, microbatch))
                if index == after:
                    it.model.zero_grad()

    with pytest.raises(GradientsTouchedError):
        loop()


def test_the_step_is_done_when_the_inner_loop_ends() -> None:
    it = subject(regressor(0, "cpu"))
    seen: list[mb.Step] = []
    for window in it.accumulator.windows(pieces_of(points(0, 5), 1), microbatches=2):
        for microbatch in window:
            window.backward(squared(it.model, microbatch))
        assert len(it.updates) == len(seen) + 1
        seen.append(window.step)
    assert [step.samples for step in seen] == [2, 2, 1]
