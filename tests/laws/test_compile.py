"""compile=True: the same gradient, compiled once for the shapes that repeat."""

import sys
from collections.abc import Callable, Iterator
from types import ModuleType
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch._dynamo.utils import counters
from torch.func import functional_call

import microbatch as mb
from microbatch.errors import ConfigError

from .reference import (
    EXACT,
    WRONG,
    Batch,
    filled,
    full_batch,
    gradients_of,
    pieces_of,
    points,
    relative_error,
    squared,
    subject,
)

pytestmark = [  # of torch itself: when its compiler is imported, and when it looks at what goes into a function
    pytest.mark.filterwarnings("ignore:`torch.jit.*` is deprecated:DeprecationWarning"),
    pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf:UserWarning"),
]


@pytest.fixture(autouse=True)
def fresh() -> Iterator[None]:
    """Leave no compiled code to the next test, and find none."""
    torch._dynamo.reset()
    counters.clear()
    yield
    torch._dynamo.reset()


def network() -> nn.Module:
    return filled(nn.Sequential(nn.Linear(3, 8), nn.Tanh(), nn.Linear(8, 2)), 0, "cpu")


def summed(model: nn.Module, batch: Batch) -> mb.Loss:
    loss = squared(model, batch)
    return mb.Loss(sum=loss * len(batch["x"]), count=len(batch["x"]))


def compiled_graphs() -> int:
    return counters["stats"]["unique_graphs"]


LOSSES: dict[str, Callable[[nn.Module, Batch], Tensor | mb.Loss]] = {"mean": squared, "sum": summed}


@pytest.mark.parametrize("loss", LOSSES)
def test_batches_of_any_size_are_exact_and_tails_are_not_compiled_again_and_again(loss: str) -> None:
    model = network()
    it = subject(model, size=4, compile=True)
    for rows in (8, 9, 10, 11, 12, 13, 3):  # tails of 0, 1, 2, 3, 0, 1 and 3 rows
        batch = points(rows, rows)
        it.accumulator.step(batch, LOSSES[loss])
        assert relative_error(it.updates[-1], full_batch(model, squared, batch)) <= EXACT
    assert relative_error(it.updates[-1], it.updates[-2]) > WRONG
    assert compiled_graphs() == 2
    assert it.accumulator.eager == 3


def test_a_loss_function_made_anew_every_step_is_compiled_once() -> None:
    it = subject(network(), size=2, compile=True)
    for seed in range(3):
        it.accumulator.step(points(seed, 4), lambda model, batch: squared(model, batch) * 2)
    assert compiled_graphs() == 1
    assert it.accumulator.eager == 0


def test_without_it_nothing_is_compiled() -> None:
    it = subject(network(), size=2)
    it.accumulator.step(points(0, 4), squared)
    assert compiled_graphs() == 0
    assert it.accumulator.eager == 0


def test_an_unknown_mode_is_refused() -> None:
    model = network()
    with pytest.raises(ConfigError, match="reduce-overhead"):
        mb.Accumulator(model, torch.optim.SGD(model.parameters()), microbatch_size=2, compile="fast")


# -- CUDA graphs, whose results are in the same memory in every run ----------------------------------------------------


class InPlace(torch.autograd.Function):
    """Write a value, or its gradient, over that of the last run, as a captured graph does."""

    @staticmethod
    def forward(ctx: Any, value: Tensor, store: dict[str, Tensor], name: str) -> Tensor:
        ctx.store, ctx.name = store, name
        return in_place(store, name, value) if name.startswith("output") else value.view_as(value)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None, None]:
        if ctx.name.startswith("output"):
            return grads[0], None, None
        return in_place(ctx.store, ctx.name, grads[0]), None, None


def in_place(store: dict[str, Tensor], name: str, value: Tensor) -> Tensor:
    if name not in store:
        store[name] = torch.empty_like(value)
        torch._C._add_cached_tensor(store[name])  # autograd takes such a gradient over, although it is referred to here
    with torch.no_grad():
        return store[name].copy_(value).detach() if name.startswith("output") else store[name].copy_(value)


def captured(function: Callable[..., mb.Loss], **_: Any) -> Callable[[nn.Module, Batch], mb.Loss]:
    """Run a function as if from a captured graph."""
    store: dict[str, Tensor] = {}

    def run(model: nn.Module, batch: Batch) -> mb.Loss:
        def call(batch: Batch) -> mb.Loss:
            weights = {name: InPlace.apply(each, store, name) for name, each in model.named_parameters()}
            return function(lambda x: functional_call(model, weights, (x,)), batch)

        loss = call(batch)
        count, metric = (in_place(store, f"output {n}", torch.as_tensor(v)) for n, v in enumerate(told(loss)))
        return mb.Loss(sum=InPlace.apply(loss.sum, store, "output"), count=count, metrics={"rows": metric})

    return run


def told(loss: mb.Loss) -> tuple[float, float]:
    return float(loss.count), float(loss.metrics["rows"])


def counted(model: Any, batch: Batch) -> mb.Loss:
    rows = len(batch["x"])
    return mb.Loss(sum=(model(batch["x"]) - batch["y"]).square().sum() / 2, count=rows, metrics={"rows": rows})


@pytest.fixture
def capturing(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Let torch seem to have captured a graph."""
    monkeypatch.setitem(sys.modules, "torch._inductor.cudagraph_trees", ModuleType("cudagraph_trees"))
    torch._C._set_cached_tensors_enabled(True)
    yield
    torch._C._set_cached_tensors_enabled(False)


@pytest.mark.usefixtures("capturing")
@pytest.mark.parametrize("mode", ["reduce-overhead", "max-autotune"])
def test_what_a_captured_graph_overwrites_was_copied(mode: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch, "compile", captured)
    model, batch = network(), points(1, 7)  # three microbatches of 2, and one of 1
    it = subject(model, size=2, compile=mode, memory_budget="none")
    step = it.accumulator.step(batch, counted)
    assert relative_error(it.updates[0], full_batch(model, squared, batch)) <= EXACT
    assert step.count == 7
    assert step.metrics["rows"].item() == 7


@pytest.mark.usefixtures("capturing")
def test_gradients_of_a_model_that_the_user_compiled_are_copied() -> None:
    model, batch = network(), points(1, 7)
    it, function = subject(model, size=2), captured(counted)
    it.accumulator.step(batch, lambda model, piece: mb.Loss(sum=function(model, piece).sum * 1, count=len(piece["x"])))
    assert relative_error(it.updates[0], full_batch(model, squared, batch)) <= EXACT


NARROW = torch.bfloat16
SUMS: dict[str, tuple[torch.dtype, dict[str, Any]]] = {
    ".grad": (torch.float64, {}),
    ".grad, narrow": (NARROW, {"sums": mb.Sums(dtype=NARROW)}),
    "wide": (NARROW, {}),
    "compensated": (NARROW, {"sums": mb.Sums(dtype=NARROW, how="compensated")}),
    "deterministic": (torch.float64, {"ranks": mb.Ranks(deterministic=True)}),
    "momentum": (torch.float64, {"sums": mb.Sums(buffer="none")}),
}


@pytest.mark.usefixtures("capturing")
@pytest.mark.parametrize("kind", SUMS)
def test_no_kind_of_sum_keeps_the_memory_of_a_captured_graph(kind: str) -> None:
    dtype, options = SUMS[kind]
    weights = []
    for function in (captured(counted), counted):

        def loss(model: nn.Module, piece: Batch, function: Any = function) -> mb.Loss:
            return mb.Loss(sum=function(model, piece).sum * 1, count=len(piece["x"]))

        model = network().to(dtype)
        optimizer = torch.optim.SGD(model.parameters(), lr=0.5, momentum=0.9)
        it = mb.Accumulator(model, optimizer, microbatch_size=2, **options)
        for seed in (1, 2):  # the first step has no momentum to add to
            it.step(points(seed, 7, dtype), loss)
        weights.append(torch.cat([each.detach().flatten() for each in model.parameters()]))
    assert torch.equal(*weights)


@pytest.mark.usefixtures("capturing")
def test_gradients_of_representations_outlive_the_graph_of_their_loss() -> None:
    model, batch, store = network(), points(1, 6), {}
    it = subject(model, size=2)

    def encode(model: nn.Module, piece: Batch) -> Tensor:
        for each in store.values():  # the memory of the loss is used again
            each.fill_(torch.nan)
        return model(piece["x"])

    def coupled(_: nn.Module, encoded: Tensor) -> Tensor:
        return InPlace.apply(encoded, store, "encoded").square().mean()

    it.accumulator.step(batch, coupled, encode=encode)
    expected = full_batch(model, lambda model, batch: model(batch["x"]).square().mean(), batch)
    assert relative_error(it.updates[0], expected) <= EXACT


@pytest.mark.usefixtures("capturing")
def test_by_hand_the_first_gradient_is_overwritten() -> None:
    model, batch, function = network(), points(1, 6), captured(counted)
    for piece in pieces_of(batch, 2):
        (function(model, piece).sum / 6).backward()
    assert relative_error(gradients_of(model), full_batch(model, squared, batch)) > WRONG


def test_windows_that_do_not_end_in_the_reverse_of_their_order_leave_the_compiler_as_it_was() -> None:
    """The first windows run under the memory meter, uncompiled; two accumulators' may take turns."""
    runs = [subject(network(), size=2) for _ in range(2)]
    loaders = [it.accumulator.windows([points(0, 2)] * 4, microbatches=2) for it in runs]
    for windows in zip(*loaders, strict=True):
        for it, window in zip(runs, windows, strict=True):
            for batch in window:
                window.backward(squared(it.model, batch))
    assert compiled_graphs() == 0
    assert torch.compile(lambda x: x + 1, backend="eager")(torch.ones(1)) == 2
    assert compiled_graphs() == 1
