"""Memory that is used again: never while anybody holds it."""

import gc

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
    monkeypatch.setattr("microbatch.gradients.fuse._MANY_OUTPUTS", 8)
    monkeypatch.setattr("microbatch.gradients.fuse.SMALLEST", 1)
    monkeypatch.setattr("microbatch.loss.heads._IN_CACHE", 16)


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


def test_it_is_used_again_when_nothing_holds_it() -> None:
    memory = kept()
    first = memory.empty((4, 5), like=LIKE)
    at, array = first.data_ptr(), first.numpy()
    del first
    second = memory.empty((5, 4), like=LIKE)
    assert second.data_ptr() != at  # the array holds it
    del array
    gc.collect()
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
        assert len(memory._kept) == keep
        del held


class Head(nn.Module):
    """Enough for logits that are large here."""

    def __init__(self) -> None:
        super().__init__()
        self.head = nn.Linear(4, 16, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(x)


def test_logits_that_a_user_keeps_stay_as_they_were() -> None:
    torch.manual_seed(0)
    model = Head()
    accumulator = mb.Accumulator(model, SGD(model.parameters(), lr=0.1), microbatch_size=2)
    seen: list[tuple[Tensor, Tensor]] = []
    places: list[int] = []

    def loss_fn(model: nn.Module, microbatch: dict[str, Tensor]) -> Tensor:
        logits = model(microbatch["x"])
        places.append(logits.data_ptr())
        if len(places) in {2, 4}:
            seen.append((logits.detach(), logits.detach().clone()))
        return F.cross_entropy(logits, microbatch["y"])

    batch = {"x": torch.randn(16, 4), "y": torch.randint(16, (16,))}
    step = accumulator.step(batch, loss_fn)
    assert step.fused == 1
    assert step.microbatches == 8
    assert all(torch.equal(now, then) for now, then in seen)
    assert len(set(places[4:])) < len(places[4:])  # and those that nobody keeps share their memory
