"""Random state that is saved before a window: Python's and NumPy's are read again only where they have changed."""

# ruff: noqa: NPY002, S311 - the global generators are what is saved

import random
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from microbatch.step import saved_state
from microbatch.step.saved_state import RandomState, Snapshot

CHANGES: dict[str, Callable[[], object]] = {
    "nothing": lambda: None,
    "a number": np.random.random,
    "one normal of a pair": np.random.standard_normal,
    "the other normal": lambda: np.random.standard_normal(2),
    "a seed": lambda: np.random.seed(7),
    "another generator": lambda: np.random.set_state(("MT19937", np.arange(624, dtype=np.uint32), 3, 1, 0.5)),
    "a number of Python's": random.random,
    "a normal of Python's": lambda: random.gauss(0, 1),
    "two normals of Python's": lambda: (random.gauss(0, 1), random.gauss(0, 1)),
    "a seed of Python's": lambda: random.seed(7),
    "another state of Python's": lambda: random.setstate((3, (*range(624), 5), 0.5)),
}


def drawn() -> list[float]:
    """Numbers of every kind: the normals take one that is kept from the pair before."""
    python = [random.gauss(0, 1), *(random.random() for _ in range(700))]
    return [*np.random.standard_normal(3), *np.random.random(700), *python, torch.rand(()).item()]


@pytest.mark.parametrize("between", CHANGES)
@pytest.mark.parametrize("first", CHANGES)
def test_all_generators_go_back_to_where_they_were(first: str, between: str) -> None:
    np.random.seed(0)
    random.seed(0)
    RandomState(torch.device("cpu"))
    for change in (first, between):
        CHANGES[change]()
        before = RandomState(torch.device("cpu"))
        then = drawn()
        before.restore()
        assert drawn() == then
        before.restore()


def test_a_state_that_was_restored_is_read_again() -> None:
    np.random.seed(0)
    np.random.standard_normal()  # the other one of the pair is kept
    kept = RandomState(torch.device("cpu"))
    np.random.standard_normal()
    RandomState(torch.device("cpu"))
    kept.restore()
    again = RandomState(torch.device("cpu"))
    then = drawn()
    again.restore()
    assert drawn() == then


def test_another_bit_generator_goes_back_too() -> None:
    generators: Any = np.random
    usual = generators.get_bit_generator()
    generators.set_bit_generator(np.random.PCG64(3))
    try:
        before = RandomState(torch.device("cpu"))
        then = drawn()
        before.restore()
        assert drawn() == then
    finally:
        generators.set_bit_generator(usual)


def test_the_state_of_python_is_not_read_again_where_nothing_was_drawn() -> None:
    random.seed(0)
    first = RandomState(torch.device("cpu"))._python
    again = RandomState(torch.device("cpu"))._python
    assert again[1] is first[1]
    assert again == first == random.getstate()
    random.random()
    assert RandomState(torch.device("cpu"))._python == random.getstate() != first


def test_a_generator_whose_memory_looks_otherwise_is_read_each_time(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(saved_state, "_lies_behind_its_head", lambda _: False)
    random.seed(0)
    before = RandomState(torch.device("cpu"))
    assert before._python == random.getstate()
    then = drawn()
    before.restore()
    assert drawn() == then


class Shared(nn.Module):
    """Modules that are met twice, and a place without one."""

    def __init__(self) -> None:
        super().__init__()
        self.one = nn.Sequential(nn.Linear(2, 2), nn.Tanh())
        self.register_module("none", None)
        self.two = nn.ModuleDict({"again": self.one[0], "new": nn.Sequential(self.one, nn.Dropout())})


class Hidden(nn.Module):
    """A module with a walk of its own."""

    def named_modules(self, *args: Any, **kwargs: Any) -> Any:
        yield "", self

    def __init__(self) -> None:
        super().__init__()
        self.inner = nn.ReLU()


@pytest.mark.parametrize(
    "model",
    [Shared(), Hidden(), nn.Sequential(Hidden(), nn.ReLU()), nn.ReLU(), nn.TransformerDecoderLayer(8, 2, 16)],
    ids=lambda model: type(model).__name__,
)
def test_the_modules_of_a_model_are_torchs_in_torchs_order(model: nn.Module) -> None:
    assert list(map(id, Snapshot(model, torch.device("cpu")).modules)) == list(map(id, model.modules()))
