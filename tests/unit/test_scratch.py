"""Memory that is used again: never while anybody holds it."""

import ctypes
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.optim import SGD

import microbatch as mb
from microbatch.memory import scratch
from microbatch.memory.scratch import Scratch


@pytest.fixture(autouse=True)
def everything_is_large(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(scratch, "SMALLEST", 1)
    monkeypatch.setattr("microbatch.gradients.fused_functions._MANY_OUTPUTS", 8)
    monkeypatch.setattr("microbatch.gradients.fused_matmul.SMALLEST", 1)
    monkeypatch.setattr("microbatch.loss.tiled_cross_entropy._IN_CACHE", 16)


LIKE = torch.zeros(1)


def kept() -> Scratch:
    made = Scratch()
    made.keep()
    return made


@settings(deadline=None, max_examples=60)
@given(st.lists(st.tuples(st.sampled_from(["make", "view", "drop"]), st.integers(1, 6)), max_size=30))
def test_what_is_alive_is_never_written_over(moves: list[tuple[str, int]]) -> None:
    memory, alive, value = kept(), list[tuple[Tensor, float]](), 0.0
    for move, number in moves:
        if move == "make":
            value += 1
            alive.append((memory.empty((number, 2), like=LIKE).fill_(value), value))
        elif alive and move == "view":
            tensor, of = alive[number % len(alive)]
            alive.append((tensor[:1].detach(), of))
        elif alive:
            alive.pop(number % len(alive))
        assert all(bool((tensor == of).all()) for tensor, of in alive)


@pytest.mark.parametrize("way", ["an array", "a storage", "a view"])
def test_it_is_used_again_when_nothing_holds_it(way: str) -> None:
    memory = kept()
    first = memory.empty((4, 5), like=LIKE)
    before, holder = first.data_ptr(), ways_to_hold()[way](first)
    del first
    second = memory.empty((5, 4), like=LIKE)
    at = second.data_ptr()
    assert at != before
    del second, holder
    third = memory.empty((2, 9), like=LIKE)
    assert third.data_ptr() == at
    assert third.is_contiguous()
    assert third.shape == (2, 9)


def test_nothing_is_kept_before_and_after() -> None:
    memory = Scratch()
    for keep in (False, True, False):
        if keep:
            memory.keep()
        else:
            memory.forget()
        held = memory.empty((64, 1024), like=LIKE)
        assert (memory._kept is not None) == keep
        del held


class Head(nn.Module):
    """Enough for logits that are large here."""

    def __init__(self) -> None:
        super().__init__()
        self.head = nn.Linear(4, 16, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(x)


def ways_to_hold() -> dict[str, Callable[[Tensor], Any]]:
    return {
        "itself": lambda logits: logits,
        "detached": lambda logits: logits.detach(),
        "a view": lambda logits: logits.view(-1)[:3],
        "an array": lambda logits: logits.detach().numpy(),
        "a capsule": lambda logits: logits.detach().__dlpack__(),
        "a storage": lambda logits: logits.untyped_storage(),
        "a closure": lambda logits: lambda: logits,
        "nothing": lambda logits: None,
    }


@pytest.mark.parametrize("shaped", ["whole", "as a view"])
@pytest.mark.parametrize("way", ways_to_hold())
def test_logits_that_somebody_holds_stay_as_they_were(way: str, shaped: str) -> None:
    torch.manual_seed(0)
    model = Head()
    accumulator = mb.Accumulator(model, SGD(model.parameters(), lr=0.1), microbatch_size=2)
    held: list[tuple[Any, int, Tensor]] = []

    def loss_fn(model: nn.Module, microbatch: dict[str, Tensor]) -> Tensor:
        logits = model(microbatch["x"])
        held.append((ways_to_hold()[way](logits), logits.data_ptr(), logits.detach().clone()))
        return F.cross_entropy(logits.view(2, 16) if shaped == "as a view" else logits, microbatch["y"])

    batch = {"x": torch.randn(16, 4), "y": torch.randint(16, (16,))}
    step = accumulator.step(batch, loss_fn)
    assert step.fused == 1
    assert step.microbatches == 8
    if way == "nothing":
        assert len({at for _, at, _ in held[2:]}) == 1  # their memory is used again and again
        return
    for _, at, then in held:
        now = (ctypes.c_float * then.numel()).from_address(at)
        assert torch.equal(torch.tensor(list(now)).view(2, 16), then)


@pytest.mark.parametrize("double", [False, True])
def test_the_gradient_takes_the_place_of_the_logits(double: bool) -> None:
    """Unless the graph is needed once more: in the loss itself, or by another node."""
    torch.manual_seed(0)
    model = Head()
    accumulator = mb.Accumulator(model, SGD(model.parameters(), lr=0.0), microbatch_size=2)
    places: list[tuple[int, int]] = []

    def loss_fn(model: nn.Module, microbatch: dict[str, Tensor]) -> Tensor:
        logits = model(microbatch["x"])
        at = logits.data_ptr()
        loss = F.cross_entropy(logits, microbatch["y"])
        if double:
            torch.autograd.grad(loss, logits, retain_graph=True)
        logits.grad_fn.register_prehook(lambda grads: places.append((at, grads[0].data_ptr())))
        return loss

    batch = {"x": torch.randn(4, 4), "y": torch.randint(16, (4,))}
    accumulator.step(batch, loss_fn)
    assert all(logits == gradient for logits, gradient in places)
    assert len(places) == 2


def test_another_node_that_saved_the_logits_finds_them() -> None:
    torch.manual_seed(0)
    model, plain = Head(), Head()
    plain.load_state_dict(model.state_dict())
    batch = {"x": torch.randn(6, 4), "y": torch.randint(16, (6,))}

    def loss_fn(model: nn.Module, microbatch: dict[str, Tensor]) -> Tensor:
        logits = model(microbatch["x"])
        late = logits.square().mean()  # made before, so its backward comes after
        return F.cross_entropy(logits, microbatch["y"]) + late

    loss_fn(plain, batch).backward()
    seen: list[Tensor] = []
    optimizer = SGD(model.parameters(), lr=0.0)

    def look(*_: object) -> None:
        assert model.head.weight.grad is not None
        seen.append(model.head.weight.grad.clone())

    optimizer.register_step_pre_hook(look)
    mb.Accumulator(model, optimizer, microbatch_size=2).step(batch, loss_fn)
    torch.testing.assert_close(seen[0], plain.head.weight.grad)


def test_a_graph_that_is_walked_twice_finds_the_logits() -> None:
    torch.manual_seed(0)
    model, plain = Head(), Head()
    plain.load_state_dict(model.state_dict())
    batch = {"x": torch.randn(6, 4), "y": torch.randint(16, (6,))}

    def loss_fn(model: nn.Module, microbatch: dict[str, Tensor]) -> Tensor:
        x = microbatch["x"].requires_grad_()
        loss = F.cross_entropy(model(x), microbatch["y"])
        torch.autograd.grad(loss, x, retain_graph=True)
        return loss

    loss_fn(plain, batch).backward()
    optimizer = SGD(model.parameters(), lr=1.0)
    mb.Accumulator(model, optimizer, microbatch_size=2).step(batch, loss_fn)
    assert plain.head.weight.grad is not None
    torch.testing.assert_close(model.head.weight.detach(), plain.head.weight.detach() - plain.head.weight.grad)
