"""Common mistakes in a loss function are refused by name, and the user's own errors come out as they were raised."""

from __future__ import annotations

import copy
import gc
import threading
from collections.abc import Callable, Iterator
from contextlib import suppress
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import microbatch as mb
from microbatch.errors import BatchError, ConfigError, WeightsMovedError, WindowError
from microbatch.step.saved_state import Memory

X = torch.randn(6, 3, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
Loss = Callable[[nn.Module, Any], Any]


def network(*, frozen: bool = False) -> nn.Sequential:
    torch.manual_seed(1)
    model = nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 2)).double()
    model[0].requires_grad_(not frozen)
    return model


def square(model: nn.Module, x: Tensor) -> Tensor:
    return model(x).square().mean()


def accumulator(model: nn.Module, **options: Any) -> mb.Accumulator:
    more: dict[str, Any] = {"microbatch_size": 2} | options
    return mb.Accumulator(model, torch.optim.SGD(model.parameters(), lr=0.1), **more)


def is_exact(it: mb.Accumulator, model: nn.Module) -> bool:
    """Return whether the next window has the gradient of plain PyTorch."""
    twin = copy.deepcopy(model)
    twin.zero_grad()
    square(twin, X).backward()
    it.gradient(X, square)
    pairs = zip(model.parameters(), twin.parameters(), strict=True)
    return all(torch.allclose(ours.grad, plain.grad, rtol=1e-12) for ours, plain in pairs)  # pyright: ignore[reportArgumentType]


# -- errors of the user's ---------------------------------------------------------------------------------------------


def second(error: BaseException) -> Loss:
    """Return a loss function that raises in its second microbatch."""
    calls: list[int] = []

    def loss_fn(model: nn.Module, x: Tensor) -> Tensor:
        calls.append(0)
        if len(calls) == 2:
            raise error
        return square(model, x)

    return loss_fn


@pytest.mark.parametrize("kind", [StopIteration, StopAsyncIteration, GeneratorExit, KeyboardInterrupt, SystemExit])
@pytest.mark.parametrize("options", [{}, {"batch_norm": "exact"}, {"microbatch_size": "auto"}])
def test_b4_every_error_of_a_loss_function_reaches_the_caller(kind: type[BaseException], options: Any) -> None:
    model, error = network(), kind("mine")
    before = [each.detach().clone() for each in model.parameters()]
    it = accumulator(model, **options)
    with pytest.raises(kind) as caught:
        it.step(X, second(error))
    assert caught.value is error
    assert all(map(torch.equal, before, model.parameters()))
    assert is_exact(it, model)


def test_b4_a_loader_that_ends_inside_an_encoder_reaches_the_caller() -> None:
    def encode(model: nn.Module, x: Tensor) -> Tensor:
        return model(x) + next(loader)

    it, loader = accumulator(network()), iter([torch.zeros(2, 2)])
    with pytest.raises(StopIteration):
        it.step(X, lambda model, out: (out @ out.T).mean(), encode=encode)
    with pytest.raises(StopIteration), it.window() as window:
        window.encode(X, encode)


def test_b4_an_error_of_the_users_own_generator_stays_as_it_is() -> None:
    def numbers() -> Iterator[int]:
        yield next(iter(()))

    with pytest.raises(RuntimeError, match="generator raised StopIteration"):
        accumulator(network()).step(X, lambda model, x: square(model, x) * sum(numbers()))


# -- graphs that outlive their microbatch -----------------------------------------------------------------------------


def running_total() -> Loss:
    total: list[Any] = [0.0]

    def loss_fn(model: nn.Module, x: Tensor) -> Tensor:
        total[0] = total[0] + square(model, x)
        return total[0]

    return loss_fn


def hidden_state() -> Loss:
    state = [torch.zeros(2, 2, dtype=torch.float64)]

    def loss_fn(model: nn.Module, x: Tensor) -> Tensor:
        state[0] = torch.tanh(state[0] + model(x))
        return state[0].square().mean()

    return loss_fn


def cached() -> Loss:
    kept: list[Tensor] = []

    def loss_fn(model: nn.Module, x: Tensor) -> Tensor:
        if not kept:
            kept.append(model(X[:2]).tanh())
        return (model(x) * kept[0]).mean()

    return loss_fn


@pytest.mark.parametrize("make", [running_total, hidden_state, cached])
def test_a_graph_that_outlives_its_microbatch_is_named(make: Callable[[], Loss]) -> None:
    model = network()
    it = accumulator(model)
    with pytest.raises(WindowError, match=r"running total of losses.*detach\(\) on this tensor"):
        it.step(X, make())
    assert is_exact(it, model)


def test_a_backward_of_the_loss_functions_own_is_named_by_a_check() -> None:
    def loss_fn(model: nn.Module, x: Tensor) -> Tensor:
        loss = square(model, x)
        loss.backward()
        return loss

    with pytest.raises(WindowError, match=r"the loss function calls backward\(\) itself"):
        mb.check(network(), loss_fn, X, microbatch_size=2)


def test_a_batch_that_was_computed_with_a_graph_is_named() -> None:
    encoder = nn.Linear(3, 3).double()
    it = accumulator(network())
    with pytest.raises(WindowError, match="computed outside of the loss function"):
        it.step(encoder(X), square)
    assert it.step(encoder(X).detach(), square).applied


# -- functions of other arguments -------------------------------------------------------------------------------------


class Losses:
    """Losses as methods."""

    def right(self, model: nn.Module, x: Tensor) -> Tensor:
        """Take what is given."""
        return square(model, x)

    def wrong(self, x: Tensor) -> Tensor:
        """Take one argument."""
        return x.mean()

    def __call__(self, model: nn.Module, x: Tensor) -> Tensor:
        """Take what is given."""
        return square(model, x)


@pytest.mark.parametrize(
    "loss_fn",
    [
        lambda x: x.mean(),
        lambda: 0,
        lambda model, x, y: 0,
        lambda model, x, *, y: 0,
        Losses().wrong,
        Losses,
        network(),
        nn.MSELoss(),
        nn.functional.cross_entropy,
    ],
)
def test_a_loss_function_of_other_arguments_is_refused_before_anything_runs(loss_fn: Any) -> None:
    it = accumulator(network())
    with pytest.raises(
        ConfigError, match=r"loss_fn (is|must be a function that is) called as loss_fn\(model, microbatch\)"
    ):
        it.step(X, loss_fn)
    with pytest.raises(ConfigError, match=r"encode\(model, microbatch\)"):
        it.step(X, square, encode=loss_fn)


@pytest.mark.parametrize(
    "loss_fn",
    [
        lambda model, x, y=1: square(model, x) * y,
        lambda model, x, *, y=1: square(model, x) * y,
        lambda *both: square(*both) + 1,
        Losses().right,
        Losses(),
        torch.enable_grad()(square),
    ],
)
def test_a_loss_function_with_more_that_has_a_default_is_fine(loss_fn: Any) -> None:
    assert accumulator(network()).step(X, loss_fn).applied


# -- weights that change inside a window ------------------------------------------------------------------------------


def replaced(model: nn.Module) -> None:
    weight = model.get_parameter("0.weight")
    weight.data = weight.data * 2


def from_a_vector(model: nn.Module) -> None:
    nn.utils.vector_to_parameters(nn.utils.parameters_to_vector(model.parameters()) * 2, model.parameters())


@pytest.mark.parametrize("change", [replaced, from_a_vector, lambda model: model.float()])
def test_s4_weights_that_are_replaced_inside_a_window_are_refused(change: Callable[[nn.Module], object]) -> None:
    model = network()

    def loss_fn(model: nn.Module, x: Tensor) -> Tensor:
        change(model)
        return model(x.to(next(model.parameters()).dtype)).square().mean()

    with pytest.raises(WeightsMovedError, match=r"'0\.weight'.*replaced inside the window"):
        accumulator(model).step(X, loss_fn)


@pytest.mark.parametrize("frozen", [False, True])
def test_s4_a_weight_whose_freed_memory_is_used_again_is_found(*, frozen: bool) -> None:
    model = network(frozen=frozen)
    weight = model.get_parameter("0.weight")
    first, calls = weight.data_ptr(), list[int]()

    def loss_fn(model: nn.Module, x: Tensor) -> Tensor:
        others = [weight.data.clone() for _ in range(100 if calls else 1)]
        weight.data = next((each for each in others if each.data_ptr() == first), others[0])
        calls.append(0)
        return square(model, x)

    it = accumulator(model, microbatch_size=3)
    if frozen:
        with pytest.warns(mb.MicrobatchWarning, match=r"weights with requires_grad=False move.*0\.weight"):
            it.step(X, loss_fn)
    else:
        with pytest.raises(WeightsMovedError, match=r"'0\.weight'.*replaced inside the window"):
            it.step(X, loss_fn)
    assert weight.data_ptr() != first


def memory() -> list[Memory]:
    return [each for each in gc.get_objects() if isinstance(each, Memory)]


@pytest.mark.parametrize("fails", [False, True])
def test_s4_a_window_keeps_no_memory_of_weights_once_it_has_ended(*, fails: bool) -> None:
    model = network()
    model[0].requires_grad_(False)
    it, others = accumulator(model), memory()
    with suppress(ZeroDivisionError):
        it.step(X, second(ZeroDivisionError()) if fails else square)
    gc.collect()
    assert {id(each) for each in memory()} <= {id(each) for each in others}


def test_s4_each_of_many_weights_is_looked_at_within_a_few_windows() -> None:
    model = nn.Sequential(*[nn.Linear(3, 3) for _ in range(10)]).double()
    weight = model.get_parameter("7.bias")

    def loss_fn(model: nn.Module, x: Tensor) -> Tensor:
        weight.data = weight.data.clone()
        return square(model, x)

    def steps() -> None:
        for _ in range(4):
            it.step(X, loss_fn)

    it = accumulator(model)
    with pytest.raises(WeightsMovedError, match=r"'7\.bias'"):
        steps()


def test_s4_between_windows_and_for_a_look_at_other_weights_they_may_be_replaced() -> None:
    model = network()
    it = accumulator(model)
    for _ in range(2):
        with it.window() as window:
            for x in window.split(X):
                window.backward(square(model, x))
                kept = [each.data for each in model.parameters()]
                from_a_vector(model)
                for each, data in zip(model.parameters(), kept, strict=True):
                    each.data = data
        replaced(model)
    assert is_exact(it, model)


@pytest.mark.parametrize("when", [0, 2])
def test_s4_a_weight_that_is_thawed_inside_a_window_is_refused(when: int) -> None:
    model = network(frozen=True)
    it, done = accumulator(model), list[int]()

    def loss_fn(model: nn.Module, x: Tensor) -> Tensor:
        if len(done) == when:
            model.get_submodule("0").requires_grad_()
        done.append(0)
        return square(model, x)

    with pytest.raises(WindowError, match=r"'0\.weight' had requires_grad=False when the window opened"):
        it.step(X, loss_fn)
    assert all(each.grad is None for each in model.parameters())
    assert is_exact(it, model)  # thawed between two windows, they take part


def froze(model: nn.Module) -> None:
    model.get_parameter("0.weight").requires_grad_(False)


def assigned(model: Any) -> None:
    model[0].weight = nn.Parameter(model[0].weight.detach() * 2)


def other_layer(model: Any) -> None:
    model[0] = nn.Linear(3, 4).double()


def loaded(model: nn.Module) -> None:
    model.load_state_dict({name: each * 2 for name, each in model.state_dict().items()}, assign=True)


@pytest.mark.parametrize("change", [froze, assigned, other_layer, loaded])
@pytest.mark.parametrize("how", ["step", "gradient", "window"])
def test_s4_weights_that_are_frozen_or_replaced_inside_a_window_are_refused(change: Any, how: str) -> None:
    model = network()
    it, calls = accumulator(model), list[int]()

    def loss_fn(model: nn.Module, x: Tensor) -> Tensor:
        calls.append(0)
        if len(calls) == 2:
            change(model)
        return square(model, x)

    def by_hand() -> None:
        with it.window() as window:
            for x in window.split(X):
                window.backward(loss_fn(model, x))

    kept = list(model.parameters())
    before = [each.detach().clone() for each in kept]
    with pytest.raises(WindowError, match=r"'0\.weight'.* inside the window.* between windows"):
        by_hand() if how == "window" else getattr(it, how)(X, loss_fn)
    assert all(map(torch.equal, before, kept))
    assert all(each.grad is None for each in kept)
    change(model)  # between windows all this is allowed
    model.requires_grad_()
    assert is_exact(accumulator(model), model)


def test_s4_a_tied_weight_that_is_untied_inside_a_window_is_refused() -> None:
    model: Any = nn.Sequential(nn.Linear(3, 3), nn.Linear(3, 3)).double()
    model[1].weight = model[0].weight

    def loss_fn(model: Any, x: Tensor) -> Tensor:
        model[1].weight = nn.Parameter(model[0].weight.detach().clone())
        return square(model, x)

    with pytest.raises(WeightsMovedError, match=r"'1\.weight'"):
        accumulator(model).step(X, loss_fn)


def test_s4_weights_that_are_frozen_before_any_gradient_or_swapped_for_a_call_are_fine() -> None:
    model, twin = network(), network()

    def loss_fn(model: Any, x: Tensor) -> Tensor:
        model[2].requires_grad_(False)  # for every microbatch, as for a large batch
        doubled = {name: each * 2 for name, each in model.named_parameters()}
        return square(model, x) + torch.func.functional_call(model, doubled, (x,)).mean()

    for ours, plain in ((accumulator(model), None), (None, torch.optim.SGD(twin.parameters(), lr=0.1))):
        if ours is not None:
            assert ours.step(X, loss_fn).applied
        if plain is not None:
            loss_fn(twin, X).backward()
            plain.step()
    for ours, theirs in zip(model.parameters(), twin.parameters(), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-12, atol=1e-14)


def test_s4_a_discriminator_that_is_frozen_for_a_while_is_fine() -> None:
    model, other = network(), network()
    it = accumulator(model)

    def loss_fn(model: nn.Module, x: Tensor) -> Tensor:
        other.requires_grad_(False)
        loss = other(torch.cat([model(x), x[:, :1]], 1)).mean()
        other.requires_grad_(True)
        return loss

    assert it.step(X, loss_fn).applied


# -- microbatches that are edited in place ----------------------------------------------------------------------------


class Rows:
    """Slices itself, holds views of the batch, and cannot copy itself."""

    def __init__(self, x: Tensor, more: dict[str, Any]) -> None:
        self.x, self.more = x, more

    def __len__(self) -> int:
        """Return the number of rows."""
        return len(self.x)

    def __getitem__(self, pick: slice) -> Rows:
        """Return views."""
        return Rows(self.x[pick], {**self.more, "y": self.more["y"][pick]})


@pytest.mark.parametrize("how", ["step", "retry", "encode"])
def test_e8_an_object_of_views_that_is_edited_leaves_the_batch_as_it_was(how: str) -> None:
    x, y = X.clone(), np.ones((6, 1))
    model, calls, names = network(), list[int](), {"train"}
    plain = copy.deepcopy(model)
    out = plain(X * 2) * 2
    (out.var() if how == "encode" else out.mean()).backward()

    def edit(model: nn.Module, piece: dict[str, Any]) -> Tensor:
        calls.append(0)
        piece["rows"].x.mul_(2)
        piece["rows"].more["y"] *= 2
        piece["names"].add(len(calls))
        assert len(piece["names"]) == 2
        if how == "retry" and len(calls) == 2:
            raise MemoryError
        return model(piece["rows"].x) * torch.as_tensor(piece["rows"].more["y"])

    batch = {"rows": Rows(x, {"y": y, "name": "a"}), "names": names}
    it = mb.Accumulator(model, microbatch_size=2)
    if how == "encode":
        it.gradient(batch, lambda model, encoded: encoded.var(), encode=edit)
    else:
        it.gradient(batch, lambda model, piece: edit(model, piece).mean())
    assert torch.equal(x, X)
    assert (y == 1).all()
    assert names == {"train"}
    for ours, theirs in zip(model.parameters(), plain.parameters(), strict=True):
        torch.testing.assert_close(ours.grad, theirs.grad, rtol=1e-12, atol=1e-14)


def test_e8_an_object_of_views_that_cannot_be_copied_is_refused_by_name() -> None:
    it = accumulator(network())
    rows = Rows(X.clone(), {"y": X, "lock": threading.Lock()})
    with pytest.raises(BatchError, match=r"a Rows in the batch cannot be copied.*clone\(\)"):
        it.step(rows, lambda model, piece: square(model, piece.x))


class WithClosure(torch.optim.SGD):
    def step(self, closure: Any) -> None:  # pyright: ignore[reportIncompatibleMethodOverride]
        closure()


class WithOptions(torch.optim.SGD):
    def step(self, closure: Any = None, *, times: int = 1) -> None:
        for _ in range(times):
            super().step(closure)


def test_an_optimizer_that_needs_a_closure_or_records_its_step_is_refused_at_once() -> None:
    model = network()
    with pytest.raises(ConfigError, match=r"WithClosure.step\(\) needs a closure.*accumulator.gradient"):
        mb.Accumulator(model, WithClosure(model.parameters(), lr=0.1))
    with pytest.raises(ConfigError, match="SGD was made with differentiable=True"):
        mb.Accumulator(model, torch.optim.SGD(model.parameters(), lr=0.1, differentiable=True))
    optimizer = WithOptions(model.parameters(), lr=0.1)
    torch.optim.lr_scheduler.ConstantLR(optimizer)  # wraps the step
    assert mb.Accumulator(model, optimizer, microbatch_size=2).step(X, square).applied
