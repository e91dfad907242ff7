"""Every misuse of a window is a clear error, and leaves everything as it was before the window."""

import copy
import random
from collections.abc import Callable, Generator, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, cast

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from microbatch.errors import (
    ConfigError,
    CountError,
    EmptyBatchError,
    EmptyWindowError,
    GradientsTouchedError,
    LossShapeError,
    MicrobatchError,
    MissingCountError,
    NoGraphError,
    NonfiniteError,
    OutOfMemoryError,
    RowsDisagreeError,
    UnknownTermError,
    WindowClosedError,
    WindowError,
    WindowOpenError,
)
from microbatch.loss.loss import Loss
from microbatch.step.accumulator import Accumulator
from microbatch.step.events import MicrobatchDone, StepDone
from microbatch.step.options import Sums
from microbatch.step.window import Window
from microbatch.warned import MicrobatchWarning


class Noisy(nn.Module):
    """A model with everything that a forward pass may change: buffers, three random generators, gradients."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(3, 4)
        self.norm = nn.BatchNorm1d(4)
        self.drop = nn.Dropout(0.5)
        self.last = nn.Linear(4, 1)
        self.register_buffer("seen", torch.zeros(()))
        self.noise = True

    def forward(self, x: Tensor) -> Tensor:
        if self.noise:
            self.seen = self.seen + random.random() + np.random.rand()  # noqa: NPY002, S311 - the global generators
        hidden = self.norm(self.first(x))
        return self.last(self.drop(hidden) if self.noise else hidden).squeeze(-1)


@dataclass
class House:
    """A model, its optimizer and accumulator, with gradients of its user's in `.grad`."""

    model: Noisy
    optimizer: torch.optim.Optimizer
    accumulator: Accumulator
    batch: dict[str, Tensor]

    def loss(self, microbatch: dict[str, Tensor]) -> Tensor:
        return F.mse_loss(self.model(microbatch["x"]), microbatch["y"])

    def window(self, counts: Any = None) -> Window:
        return self.accumulator.window(counts=counts)


def build(**settings: Any) -> House:
    torch.manual_seed(1)
    model = Noisy()
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.1)
    settings.setdefault("microbatch_size", 2)
    accumulator = Accumulator(model, optimizer, batch_norm="microbatch", buffers="each", **settings)
    model.first.weight.grad = torch.full_like(model.first.weight, 7.0)  # the others have none
    return House(model, optimizer, accumulator, {"x": torch.randn(6, 3), "y": torch.randn(6)})


@pytest.fixture(autouse=True)
def generator_of_ones_own(monkeypatch: pytest.MonkeyPatch) -> None:
    """Keep Python's generator for the code under test: the checker of types draws from the one that is there."""
    generator = random.Random(1)  # noqa: S311 - as the one it stands for
    for name in ["random", "getstate", "setstate"]:
        monkeypatch.setattr(random, name, getattr(generator, name))


@pytest.fixture
def house() -> House:
    return build()


def picture(house: House) -> dict[str, Any]:
    """Return all that a window may change, by identity and by value."""
    model, found = house.model, {}
    for name, parameter in model.named_parameters():
        found[f"weight {name}"] = parameter.detach().clone()
        found[f"grad {name}"] = None if parameter.grad is None else (id(parameter.grad), parameter.grad.clone())
    for name, buffer in model.named_buffers():
        found[f"buffer {name}"] = (id(buffer), buffer.clone())
    found["optimizer"] = copy.deepcopy(house.optimizer.state_dict())
    kind, keys, *place = np.random.get_state()  # noqa: NPY002 - the global one
    found["random"] = (torch.get_rng_state(), str(random.getstate()), kind, keys, place)
    found["windows"] = house.accumulator.state_dict()
    return found


def differences(before: Any, after: Any, where: str = "") -> list[str]:
    """Name what is not exactly the same."""
    if isinstance(before, dict):
        keys = {**before, **cast("dict[Any, Any]", after)}
        return [d for key in keys for d in differences(before.get(key), after.get(key), f"{where}.{key}")]
    if isinstance(before, list | tuple):
        pairs = zip(cast("list[Any]", before), cast("list[Any]", after), strict=True)
        return [d for i, (b, a) in enumerate(pairs) for d in differences(b, a, f"{where}[{i}]")]
    if isinstance(before, Tensor):
        return [] if isinstance(after, Tensor) and torch.equal(before, after) else [where]
    if isinstance(before, np.ndarray):
        return [] if np.array_equal(before, after) else [where]
    return [] if before == after else [where]


@contextmanager
def refused(house: House, error: type[BaseException], *words: str) -> Generator[None]:
    """Expect an error whose message has these words, and everything as before; and the accumulator still works."""
    before = picture(house)
    with pytest.raises(error) as caught:
        yield
    assert caught.type is error
    assert [word for word in words if word not in str(caught.value)] == []
    assert differences(before, picture(house)) == []
    check_it_still_works(house)


def check_it_still_works(house: House) -> None:
    """Take one step, and compare its gradient with a full batch's."""
    house.model.noise = False
    house.model.norm.eval()
    twin = copy.deepcopy(house.model)
    for parameter in twin.parameters():
        parameter.grad = None
    F.mse_loss(twin(house.batch["x"]), house.batch["y"]).backward()
    seen: dict[str, Tensor] = {}

    def look(*_: object) -> None:
        seen.update((n, p.grad.clone()) for n, p in house.model.named_parameters() if p.grad is not None)

    with_hook = house.optimizer.register_step_pre_hook(look)
    step = house.accumulator.step(house.batch, lambda _, microbatch: house.loss(microbatch))
    with_hook.remove()
    assert step.applied
    for name, parameter in twin.named_parameters():
        torch.testing.assert_close(seen[name], parameter.grad, rtol=1e-5, atol=1e-6)
    assert all(parameter.grad is None for parameter in house.model.parameters())


def test_the_picture_sees_every_kind_of_change(house: House) -> None:
    before = picture(house)
    assert differences(before, picture(house)) == []
    house.loss(house.batch).backward()
    changed = " ".join(differences(before, picture(house)))
    for word in ["grad first.weight", "grad last.bias", "running_mean", "buffer seen", "random[0]", "random[1]"]:
        assert word in changed
    assert "random[3]" in changed or "random[4]" in changed
    house.optimizer.step()
    assert "weight first.weight" in " ".join(differences(before, picture(house)))


# -- the order of things ----------------------------------------------------------------------------------------------


def test_backward_after_the_window_closed(house: House) -> None:
    with house.window() as window:
        for microbatch in window.split(house.batch):
            window.backward(house.loss(microbatch))
    loss = house.loss(house.batch)
    with refused(house, WindowClosedError, "backward", "after it was closed", "`with` block"):
        window.backward(loss)


def test_backward_and_split_before_the_window_is_entered(house: House) -> None:
    window = house.window()
    loss = house.loss(house.batch)
    with refused(house, WindowClosedError, "backward", "before it was entered"):
        window.backward(loss, count=6)
    with refused(house, WindowClosedError, "split", "before it was entered"):
        window.split(house.batch)


def test_split_after_the_window_closed(house: House) -> None:
    with house.window() as window:
        for microbatch in window.split(house.batch):
            window.backward(house.loss(microbatch))
    with refused(house, WindowClosedError, "split", "after it was closed"):
        window.split(house.batch)


def test_a_microbatch_asked_for_after_the_window_closed(house: House) -> None:
    with pytest.warns(MicrobatchWarning, match="left by `break` after the backward of 1 of"), house.window() as window:  # noqa: PT031 - the warning comes when the block ends
        microbatches = window.split(house.batch)
        window.backward(house.loss(next(microbatches)))
    with refused(house, WindowClosedError, "take microbatches from", "after it was closed"):
        next(microbatches)


def test_a_window_used_twice(house: House) -> None:
    with house.window() as window:
        window.backward(house.loss(house.batch), count=6)
    with refused(house, WindowClosedError, "used once"), window:
        pass


def test_a_window_entered_inside_itself(house: House) -> None:
    with refused(house, WindowClosedError, "used once"), house.window() as window:
        window.backward(house.loss(house.batch), count=6)
        with window:
            pass


def test_two_windows_open(house: House) -> None:
    with refused(house, WindowOpenError, "another window"), house.window() as window:
        window.backward(house.loss(house.batch), count=6)
        with house.window():
            pass


def test_a_step_inside_a_window(house: House) -> None:
    with refused(house, WindowOpenError, "another window"), house.window() as window:
        window.backward(house.loss(house.batch), count=6)
        house.accumulator.step(house.batch, lambda _, microbatch: house.loss(microbatch))


def test_the_optimizers_step_inside_a_window(house: House) -> None:
    with refused(house, WindowOpenError, "optimizer.step()", "leaving the window"), house.window() as window:
        window.backward(house.loss(house.batch), count=6)
        house.optimizer.step()


def test_the_optimizers_step_inside_a_loss_function(house: House) -> None:
    def loss_fn(_: nn.Module, microbatch: dict[str, Tensor]) -> Tensor:
        loss = house.loss(microbatch)
        house.optimizer.step()
        return loss

    with refused(house, WindowOpenError, "optimizer.step()"):
        house.accumulator.step(house.batch, loss_fn)


def test_the_optimizers_step_is_free_again_after_a_window(house: House) -> None:
    house.accumulator.step(house.batch, lambda _, microbatch: house.loss(microbatch))
    house.loss(house.batch).backward()
    before = house.model.last.bias.item()
    house.optimizer.step()
    assert house.model.last.bias.item() != before


def test_the_record_before_there_is_one(house: House) -> None:
    with refused(house, WindowClosedError, "no step yet"), house.window() as window:
        window.backward(house.loss(house.batch), count=6)
        assert window.step


def test_iterating_over_a_window_without_a_loader(house: House) -> None:
    with refused(house, WindowError, "no loader", "window.split(batch)"), house.window() as window:
        window.backward(house.loss(house.batch), count=6)
        next(iter(window))


def test_a_window_left_without_a_backward(house: House) -> None:
    with refused(house, EmptyWindowError, "without one backward"), house.window() as window:
        for microbatch in window.split(house.batch):
            house.loss(microbatch)


def test_the_scheduler_may_step_outside_and_weights_move_only_at_the_end(house: House) -> None:
    before = house.model.last.weight.detach().clone()
    with house.window() as window:
        for microbatch in window.split(house.batch):
            window.backward(house.loss(microbatch))
            assert torch.equal(house.model.last.weight, before)
    assert not torch.equal(house.model.last.weight, before)


# -- gradients that others touch --------------------------------------------------------------------------------------


def own_backward(house: House) -> None:
    house.loss(house.batch).backward()


TOUCHES: dict[str, Callable[[House], Any]] = {
    "zero_grad": lambda house: house.optimizer.zero_grad(),
    "zero_grad in place": lambda house: house.optimizer.zero_grad(set_to_none=False),
    "the model's zero_grad": lambda house: house.model.zero_grad(),
    "clip_grad_norm_": lambda house: nn.utils.clip_grad_norm_(house.model.parameters(), 0.1),
    "clip_grad_value_": lambda house: nn.utils.clip_grad_value_(house.model.parameters(), 0.1),
    "backward": own_backward,
}


@pytest.mark.parametrize("touch", TOUCHES)
def test_gradients_touched_between_two_backwards(house: House, touch: str) -> None:
    with (
        refused(house, GradientsTouchedError, "first.weight", "window.backward", "max_grad_norm="),
        house.window() as window,
    ):
        for microbatch in window.split(house.batch):
            window.backward(house.loss(microbatch))
            TOUCHES[touch](house)


@pytest.mark.parametrize("touch", TOUCHES)
def test_gradients_touched_after_the_last_backward(house: House, touch: str) -> None:
    with refused(house, GradientsTouchedError, "first.weight"), house.window() as window:
        window.backward(house.loss(house.batch), count=6)
        TOUCHES[touch](house)


def test_a_backward_of_ones_own_before_the_first_of_the_window(house: House) -> None:
    with refused(house, GradientsTouchedError, "window.backward"), house.window() as window:
        house.loss(house.batch).backward()
        window.backward(house.loss(house.batch), count=6)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_a_backward_of_ones_own_where_gradients_add_up_in_a_wider_dtype(dtype: torch.dtype) -> None:
    model = nn.Linear(2, 1, dtype=dtype)
    accumulator = Accumulator(model, torch.optim.SGD(model.parameters(), lr=1.0))
    x = torch.ones(3, 2, dtype=dtype)
    before = model.weight.detach().clone()

    def run() -> None:
        with accumulator.window() as window:
            window.backward(model(x).mean(), count=3)
            model(x).mean().backward()

    with pytest.raises(GradientsTouchedError):
        run()
    assert torch.equal(model.weight, before)
    assert model.weight.grad is None


def test_a_backward_of_ones_own_is_not_always_by_the_first_parameter(house: House) -> None:
    with refused(house, GradientsTouchedError, "window.backward"), house.window() as window:
        window.backward(house.loss(house.batch), count=6)
        house.model.last.bias.sum().backward()


# -- what a loss function may not return ------------------------------------------------------------------------------

LOSSES: dict[str, tuple[Callable[[Tensor], Any], type[Exception], tuple[str, ...]]] = {
    "one loss per row": (lambda y: y**2, LossShapeError, ("'loss'", "(2,)", "loss.sum()")),
    "of shape (1,)": (lambda y: y.mean().reshape(1), LossShapeError, ("'loss'", "(1,)")),
    "of integers": (lambda y: torch.tensor(3), LossShapeError, ("'loss'", "torch.int64", "floating point")),
    "of complex numbers": (lambda y: y.mean() * 1j, LossShapeError, ("'loss'", "torch.complex64")),
    "detached": (lambda y: y.mean().detach(), NoGraphError, ("'loss'", "no graph", "detached", "Return None")),
    "a metric beside it": (
        lambda y: {"loss": y.mean(), "accuracy": (y > 0).float().mean()},
        NoGraphError,
        ("'accuracy'", "metrics={'accuracy'", "step.metrics"),
    ),
    "a metric beside a Loss": (
        lambda y: {"loss": Loss(sum=y.sum(), count=2), "accuracy": Loss(sum=y.sum().detach(), count=2)},
        NoGraphError,
        ("'accuracy'", "metrics={'accuracy'"),
    ),
    "a dict without any graph": (lambda y: {"a": y.mean().detach()}, NoGraphError, ("'a'", "Return None")),
    "a sum of one per row": (lambda y: Loss(sum=y**2, count=2), LossShapeError, ("Loss.sum", "(2,)")),
    "a sum of integers": (lambda y: Loss(sum=torch.tensor(2), count=2), LossShapeError, ("Loss.sum", "torch.int64")),
    "a sum without graph": (lambda y: Loss(sum=y.sum().detach(), count=2), NoGraphError, ("'loss'", "no graph")),
    "a negative count": (lambda y: Loss(sum=y.sum(), count=-2), CountError, ("Loss.count", "at least 0", "-2")),
    "a NaN count": (lambda y: Loss(sum=y.sum(), count=float("nan")), CountError, ("Loss.count", "finite", "nan")),
    "an infinite count": (lambda y: Loss(sum=y.sum(), count=float("inf")), CountError, ("Loss.count", "inf")),
    "a truth value as count": (lambda y: Loss(sum=y.sum(), count=True), CountError, ("Loss.count", "True")),
    "a count per row": (lambda y: Loss(sum=y.sum(), count=torch.ones(2)), CountError, ("Loss.count", "(2,)")),
    "a NaN count on the device": (
        lambda y: Loss(sum=y.sum(), count=torch.tensor(float("nan"))),
        CountError,
        ("'loss'", "nan", "finite"),
    ),
    "a negative count on the device": (
        lambda y: Loss(sum=y.sum(), count=torch.tensor(-2)),
        CountError,
        ("'loss'", "-2", "at least 0"),
    ),
    "every count 0": (lambda y: Loss(sum=y.sum(), count=0), EmptyWindowError, ("every count was 0", "skip")),
    "every count 0 on the device": (
        lambda y: Loss(sum=y.sum(), count=torch.tensor(0)),
        EmptyWindowError,
        ("every count was 0",),
    ),
    "nothing at all": (lambda y: None, EmptyWindowError, ("contributed",)),
    "an empty dict": (lambda y: {}, EmptyWindowError, ("contributed",)),
    "a term that is not 0-d": (lambda y: {"a": y.mean(), "b": y}, LossShapeError, ("'b'", "(2,)")),
    "several terms without counts": (
        lambda y: {"tokens": Loss(sum=y.sum(), count=5), "router": y.mean()},
        MissingCountError,
        ("'tokens'", "'router'", "counts=", "lambda batch"),
    ),
    "not finite": (lambda y: y.mean() / 0, NonfiniteError, ("microbatch 0", 'nonfinite="skip"')),
}


@pytest.mark.parametrize("name", LOSSES)
def test_a_loss_that_cannot_be_used(house: House, name: str) -> None:
    make, error, words = LOSSES[name]
    with refused(house, error, *words):
        house.accumulator.step(house.batch, lambda model, microbatch: make(model(microbatch["x"])))


# The other two are no faults of one microbatch: nothing is wrong when the others contribute, or say what the terms are.
LATE = [name for name, (_, error, _) in LOSSES.items() if error not in {EmptyWindowError, MissingCountError}]


@pytest.mark.parametrize("name", LATE)
def test_the_same_loss_only_in_the_last_microbatch(house: House, name: str) -> None:
    make, error, words = LOSSES[name]
    terms = ["a", "b"] if name == "a term that is not 0-d" else ["loss"]

    def loss_fn(model: nn.Module, microbatch: dict[str, Tensor]) -> Any:
        y = model(microbatch["x"])
        last = torch.equal(microbatch["x"], house.batch["x"][4:])
        return make(y) if last else {term: y.mean() for term in terms}

    # Counts on the device are known as a sum only, and a loss by its microbatch.
    with refused(house, error, *(word.replace("microbatch 0", "microbatch 2") for word in words if word != "-6")):
        house.accumulator.step(house.batch, loss_fn)


def test_a_loss_of_a_frozen_model(house: House) -> None:
    with refused(house, NoGraphError, "depends on no parameter"), torch.no_grad():
        house.accumulator.step(house.batch, lambda _, microbatch: house.loss(microbatch))


def test_an_unknown_term(house: House) -> None:
    def loss_fn(model: nn.Module, microbatch: dict[str, Tensor]) -> dict[str, Tensor]:
        y = model(microbatch["x"])
        last = torch.equal(microbatch["x"], house.batch["x"][4:])
        return {"a": y.mean(), "late": y.mean()} if last else {"a": y.mean()}

    with refused(house, UnknownTermError, "'late'", "'a'", "counts="):
        house.accumulator.step(house.batch, loss_fn)


def test_a_term_that_counts_did_not_declare(house: House) -> None:
    with refused(house, UnknownTermError, "'b'", "'a'", "counts="):
        house.accumulator.step(
            house.batch,
            lambda model, microbatch: {"b": Loss(sum=model(microbatch["x"]).sum(), count=2)},
            counts={"a": 6},
        )


def test_means_and_counts_of_different_denominators_without_counts(house: House) -> None:
    def loss_fn(model: nn.Module, microbatch: dict[str, Tensor]) -> Any:
        y = model(microbatch["x"])
        first = torch.equal(microbatch["x"], house.batch["x"][:2])
        return {"a": y.mean(), "b": y.mean()} if first else {"a": y.mean()}

    with refused(house, CountError, "'a' has 6", "'b' has 2", "counts="):
        house.accumulator.step(house.batch, loss_fn)


def six(_: Any) -> Any:
    return 6


def missing(batch: Any) -> Any:
    return batch["z"]


@pytest.mark.parametrize(
    ("counts", "error", "words"),
    [
        pytest.param({"a": 7}, CountError, ("declared 7", "'a'", "counted 6"), id="do not match"),
        pytest.param({"a": 6, "b": 3}, CountError, ("declared 3", "'b'", "counted 0"), id="a term that never came"),
        pytest.param({"a": -6}, CountError, ("count of 'a'", "-6"), id="negative"),
        pytest.param({"a": float("nan")}, CountError, ("count of 'a'", "nan"), id="NaN"),
        pytest.param({"a": torch.tensor(float("nan"))}, CountError, ("count of 'a'", "nan"), id="NaN in a tensor"),
        pytest.param({"a": 0}, CountError, ("declared 0", "'a'"), id="0, and something contributed"),
        pytest.param(six, MissingCountError, ("dict of term to count", "int"), id="no dict"),
        pytest.param(missing, KeyError, ("'z'",), id="a fault of its own"),
    ],
)
def test_counts_that_cannot_be_used(house: House, counts: Any, error: type[Exception], words: tuple[str, ...]) -> None:
    def loss_fn(model: nn.Module, microbatch: dict[str, Tensor]) -> Any:
        return {"a": Loss(sum=model(microbatch["x"]).sum(), count=2)}

    with refused(house, error, *words):
        house.accumulator.step(house.batch, loss_fn, counts=counts)


def test_counts_of_a_batch_that_comes_after_the_first_backward(house: House) -> None:
    with refused(house, WindowError, "counts=", "before the first backward"), house.window({"loss": 12}) as window:
        for _ in range(2):
            for microbatch in window.split(house.batch):
                window.backward(Loss(sum=house.loss(microbatch) * 2, count=2))


# -- what was counted, and by whom ------------------------------------------------------------------------------------


def test_a_plain_mean_for_a_microbatch_that_the_window_did_not_hand_out(house: House) -> None:
    with (
        refused(house, MissingCountError, "plain mean", "does not come from the window", "count=rows"),
        house.window() as window,
    ):
        window.backward(house.loss(house.batch))


def test_two_backwards_for_one_microbatch(house: House) -> None:
    with refused(house, MissingCountError, "has been counted already", "count=rows"), house.window() as window:
        for microbatch in window.split(house.batch):
            window.backward(house.loss(microbatch))
            window.backward(house.loss(microbatch))


def test_a_plain_mean_after_the_last_microbatch(house: House) -> None:
    with refused(house, MissingCountError, "does not come from the window"), house.window() as window:
        for microbatch in window.split(house.batch):
            house.loss(microbatch)
        window.backward(house.loss(house.batch))


@pytest.mark.parametrize("count", [-1.0, float("nan"), float("inf"), True])
def test_a_count_that_is_none(house: House, count: float) -> None:
    with refused(house, CountError, "count must be", str(count)), house.window() as window:
        window.backward(house.loss(house.batch), count=count)


@pytest.mark.parametrize("inner", ["window", "outside"])
def test_one_graph_backward_twice(house: House, inner: str) -> None:
    with refused(house, WindowError, "backward through the graph a second time"), house.window() as window:
        loss = house.loss(house.batch)
        if inner == "outside":
            torch.autograd.grad(loss, list(house.model.parameters()))
        else:
            window.backward(loss, count=6)
        window.backward(loss, count=6)


# -- the batch --------------------------------------------------------------------------------------------------------


def test_rows_that_disagree(house: House) -> None:
    batch = {"x": torch.ones(6, 3), "y": torch.ones(5)}
    with refused(house, RowsDisagreeError, "batch['x'] has 6", "batch['y'] has 5", "mb.Whole("):
        house.accumulator.step(batch, lambda _, microbatch: house.loss(microbatch))


def test_a_batch_of_0_rows(house: House) -> None:
    with refused(house, EmptyBatchError, "0 rows", "skip"):
        house.accumulator.step({"x": torch.ones(0, 3)}, lambda _, microbatch: house.loss(microbatch))


def test_a_fault_while_an_automatic_microbatch_size_is_sought() -> None:
    house = build(microbatch_size="auto")
    before = picture(house)

    def broken(model: nn.Module, microbatch: Any) -> Any:
        raise KeyError("labels")

    with pytest.raises(KeyError, match="labels"):
        house.accumulator.step(house.batch, broken)
    assert differences(before, picture(house)) == []
    assert house.accumulator.step(house.batch, lambda _, microbatch: house.loss(microbatch)).samples == 6


def test_an_automatic_microbatch_size_is_not_needed_by_a_loop_that_splits_itself() -> None:
    house = build(microbatch_size="auto")
    with house.window() as window:
        window.backward(house.loss(house.batch), count=6)
    assert window.step.samples == 6


# -- exceptions of the user's own -------------------------------------------------------------------------------------


@pytest.mark.parametrize("error", [ValueError, KeyboardInterrupt, SystemExit, GeneratorExit])
@pytest.mark.parametrize("after", [0, 1, 2])
def test_an_exception_in_the_block(house: House, error: type[BaseException], after: int) -> None:
    with refused(house, error, "mine"), house.window() as window:
        for index, microbatch in enumerate(window.split(house.batch)):
            loss = house.loss(microbatch)
            if index == after:
                raise error("mine")
            window.backward(loss)


def test_an_exception_in_the_middle_of_a_backward(house: House) -> None:
    def fail(_: Tensor) -> None:
        raise ValueError("mine")

    with refused(house, ValueError, "mine"), house.window() as window:
        for index, microbatch in enumerate(window.split(house.batch)):
            hidden = house.model.first(microbatch["x"])
            loss = house.model.last(hidden).mean()
            if index == 1:  # the last layer has its gradient already, and the first has not
                hidden.register_hook(fail)
            window.backward(loss)


def test_an_exception_in_a_listener_of_microbatches() -> None:
    def listener(event: MicrobatchDone | StepDone) -> None:
        if isinstance(event, MicrobatchDone) and event.index == 1 and event.step == 0 and failing:
            raise ValueError("mine")

    failing = [True]
    house = build(listeners=[listener])
    before = picture(house)
    with pytest.raises(ValueError, match="mine"):
        house.accumulator.step(house.batch, lambda _, microbatch: house.loss(microbatch))
    assert differences(before, picture(house)) == []
    failing.clear()
    check_it_still_works(house)


def test_an_exception_in_a_listener_of_steps_comes_after_the_step() -> None:
    def listener(event: MicrobatchDone | StepDone) -> None:
        if isinstance(event, StepDone) and event.step.index == 0:
            raise ValueError("mine")

    house = build(listeners=[listener])
    before = house.model.last.weight.detach().clone()
    with pytest.raises(ValueError, match="mine"):
        house.accumulator.step(house.batch, lambda _, microbatch: house.loss(microbatch))
    assert not torch.equal(house.model.last.weight, before)
    assert house.accumulator.state_dict()["windows"] == 1
    check_it_still_works(house)


def test_an_exception_in_an_optimizer(house: House) -> None:
    def fail(*_: object) -> None:
        raise ValueError("mine")

    hook = house.optimizer.register_step_pre_hook(fail)
    before = picture(house)
    with pytest.raises(ValueError, match="mine"):
        house.accumulator.step(house.batch, lambda _, microbatch: house.loss(microbatch))
    hook.remove()
    assert differences(before, picture(house)) == []
    check_it_still_works(house)


def test_running_out_of_the_memory_budget() -> None:
    house = build(memory_budget="4 KiB")
    house.model.last = nn.Linear(4, 64)
    house.model.norm.eval()  # it would not take the single row that is tried at last
    before = picture(house)
    with pytest.raises(OutOfMemoryError, match=r"4\.00 KiB"):
        house.accumulator.step({"x": torch.ones(64, 3)}, lambda model, microbatch: model(microbatch["x"]).mean())
    assert differences(before, picture(house)) == []


# -- windows over a loader --------------------------------------------------------------------------------------------


def loader(house: House, microbatches: int = 6) -> Iterator[dict[str, Tensor]]:
    for index in range(microbatches):
        yield {"x": house.batch["x"][index : index + 1], "y": house.batch["y"][index : index + 1]}


@pytest.mark.parametrize("microbatches", [0, -2, True])
def test_windows_of_no_microbatches(house: House, microbatches: int) -> None:
    with refused(house, ConfigError, "microbatches must be", repr(microbatches)):
        house.accumulator.windows(loader(house), microbatches=microbatches)


def test_an_exception_in_the_loader(house: House) -> None:
    def failing() -> Iterator[dict[str, Tensor]]:
        yield from loader(house, 2)
        raise ValueError("mine")

    house.model.norm.eval()
    with refused(house, ValueError, "mine"):
        for window in house.accumulator.windows(failing(), microbatches=4):
            for microbatch in window:
                window.backward(house.loss(microbatch))


def test_an_exception_in_the_inner_loop(house: House) -> None:
    house.model.norm.eval()
    with refused(house, ValueError, "mine"):
        for window in house.accumulator.windows(loader(house), microbatches=3):
            for index, microbatch in enumerate(window):
                window.backward(house.loss(microbatch))
                if index == 1:
                    raise ValueError("mine")


def test_leaving_the_inner_loop_early_steps_on_what_was_done(house: House) -> None:
    house.model.noise = False
    house.model.norm.eval()
    twin = copy.deepcopy(house.model)
    twin.zero_grad()
    F.mse_loss(twin(house.batch["x"][:2]), house.batch["y"][:2]).backward()
    seen: list[Tensor | None] = []

    def look(*_: object) -> None:
        seen.append(None if house.model.last.weight.grad is None else house.model.last.weight.grad.clone())

    house.optimizer.register_step_pre_hook(look)
    window = None
    with pytest.warns(MicrobatchWarning, match="left by `break` after the backward of 2 of 3"):  # noqa: PT031 - the warning comes when the block ends
        for window in house.accumulator.windows(loader(house), microbatches=3):
            for index, microbatch in enumerate(window):
                window.backward(house.loss(microbatch))
                if index == 1:
                    break
    assert window is not None
    assert window.step.samples == 2
    assert len(seen) == 2
    torch.testing.assert_close(seen[0], twin.last.weight.grad)


def test_leaving_the_outer_loop_inside_a_window_drops_it(house: House) -> None:
    house.model.norm.eval()
    before = picture(house)
    window = None
    with pytest.warns(MicrobatchWarning, match="over windows was left at the same time"):  # noqa: PT031 - as above
        for window in house.accumulator.windows(loader(house), microbatches=3):
            for microbatch in window:
                window.backward(house.loss(microbatch))
                break
            break
    assert differences(before, picture(house)) == []
    assert window is not None
    with pytest.raises(WindowClosedError):
        assert window.step
    check_it_still_works(house)


def test_leaving_the_outer_loop_after_a_window_keeps_its_step(house: House) -> None:
    house.model.norm.eval()
    window = None
    for window in house.accumulator.windows(loader(house), microbatches=3):
        for microbatch in window:
            window.backward(house.loss(microbatch))
        break
    assert window is not None
    assert window.step.samples == 3
    assert house.accumulator.state_dict()["windows"] == 1
    check_it_still_works(house)


def test_a_window_that_nobody_iterates_over(house: House) -> None:
    with refused(house, EmptyWindowError, "without one backward"):
        for _ in house.accumulator.windows(loader(house), microbatches=3):
            pass


def test_two_iterators_of_windows_interleaved(house: House) -> None:
    house.model.norm.eval()
    first = house.accumulator.windows(loader(house), microbatches=3)
    second = house.accumulator.windows(loader(house), microbatches=3)
    before = picture(house)
    window = next(first)
    window.backward(house.loss(house.batch), count=6)
    with pytest.raises(WindowOpenError, match="another window"):
        next(second)
    del first, window
    assert differences(before, picture(house)) == []


# -- the accumulator's own arguments ----------------------------------------------------------------------------------

ARGUMENTS: dict[str, tuple[dict[str, Any], tuple[str, ...]]] = {
    "microbatch_size 0": ({"microbatch_size": 0}, ("microbatch_size", "0")),
    "microbatch_size -3": ({"microbatch_size": -3}, ("microbatch_size", "-3")),
    "microbatch_size True": ({"microbatch_size": True}, ("microbatch_size", "True")),
    "microbatch_size '8'": ({"microbatch_size": "8"}, ("microbatch_size", "'8'")),
    "memory_budget text": ({"memory_budget": "much"}, ("'much'", "6 GiB")),
    "memory_budget 0": ({"memory_budget": 0}, ("at least 1 byte", "0")),
    "max_grad_norm 0": ({"max_grad_norm": 0}, ("max_grad_norm", "0")),
    "max_grad_norm -1.0": ({"max_grad_norm": -1.0}, ("max_grad_norm", "-1.0")),
    "max_grad_norm nan": ({"max_grad_norm": float("nan")}, ("max_grad_norm", "nan")),
    "max_grad_norm inf": ({"max_grad_norm": float("inf")}, ("max_grad_norm", "inf", "None")),
    "autocast float64": ({"autocast": torch.float64}, ("autocast", "torch.float64", "torch.bfloat16")),
    "autocast int8": ({"autocast": torch.int8}, ("autocast", "torch.int8")),
    "nonfinite ignore": ({"nonfinite": "ignore"}, ("nonfinite", "'ignore'", '"raise"', '"skip"')),
}


def construct(**arguments: Any) -> Accumulator:
    model = arguments.pop("model", nn.Linear(2, 1))
    return Accumulator(model, arguments.pop("optimizer", torch.optim.SGD(model.parameters(), lr=0.1)), **arguments)


@pytest.mark.parametrize("name", ARGUMENTS)
def test_an_argument_that_cannot_work_is_named_with_its_value(name: str) -> None:
    arguments, words = ARGUMENTS[name]
    with pytest.raises(ConfigError) as caught:
        construct(**arguments)
    assert [word for word in words if word not in str(caught.value)] == []


def test_sums_in_a_dtype_without_fractions() -> None:
    with pytest.raises(ConfigError, match=r"Sums: dtype must be a floating-point torch\.dtype, not torch\.int64"):
        Sums(dtype=torch.int64)


@pytest.mark.parametrize("optimizer", [None, []])
def test_steps_without_an_optimizer(optimizer: list[torch.optim.Optimizer] | None) -> None:
    accumulator = Accumulator(nn.Linear(2, 1), optimizer)
    for step in [
        lambda: accumulator.step(torch.ones(4, 2), lambda model, x: model(x).mean()),
        accumulator.window,
        lambda: accumulator.windows([torch.ones(4, 2)], microbatches=1),
    ]:
        with pytest.raises(ConfigError, match=r"without an optimizer.*gradient\(batch, loss_fn\)"):
            step()


def test_the_same_arguments_with_values_that_can_work() -> None:
    accumulator = construct(
        microbatch_size=3,
        memory_budget="1 GiB",
        max_grad_norm=1,
        autocast=torch.bfloat16,
        sums=Sums(dtype=torch.float64),
        nonfinite="skip",
    )
    assert accumulator.step(torch.ones(4, 2), lambda model, x: model(x).float().mean()).applied


def test_an_optimizer_that_moves_the_weights_within_a_step() -> None:
    model = nn.Linear(2, 1)
    with pytest.raises(ConfigError, match=r"LBFGS changes the weights several times.*closure"):
        construct(model=model, optimizer=torch.optim.LBFGS(model.parameters()))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_a_gradient_scaler_with_narrow_parameters(dtype: torch.dtype) -> None:
    model = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 1, dtype=dtype))
    with pytest.raises(ConfigError, match=rf"'1\.weight' is {dtype}.*float32"):
        construct(model=model, grad_scaler=torch.amp.GradScaler("cpu"))


@pytest.mark.parametrize("key", ["windows", "skipped", "count"])
def test_a_state_without_one_of_its_keys(house: House, key: str) -> None:
    state = house.accumulator.state_dict()
    del state[key]
    with pytest.raises(ConfigError, match=rf"no '{key}'.*state_dict\(\)"):
        house.accumulator.load_state_dict(state)


def test_a_loss_function_with_swapped_parameters_is_explained() -> None:
    model = nn.Linear(2, 1)
    accumulator = Accumulator(model, torch.optim.SGD(model.parameters(), lr=0.1), microbatch_size=2)
    with pytest.raises(TypeError, match="not callable") as raised:
        accumulator.step(torch.ones(4, 2), lambda microbatch, model: model(microbatch).mean())
    assert any("loss_fn(model, microbatch)" in note for note in raised.value.__notes__)
    with pytest.raises(TypeError, match="mine") as raised:
        accumulator.step(torch.ones(4, 2), own_type_error)
    assert not getattr(raised.value, "__notes__", [])


def own_type_error(model: nn.Module, microbatch: Tensor) -> Tensor:
    raise TypeError("mine")


def test_every_error_of_this_page_is_ours() -> None:
    assert all(issubclass(error, MicrobatchError) for _, error, _ in LOSSES.values())
