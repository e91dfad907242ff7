"""Random state that is saved before a window: NumPy's, which is read again only where it has changed."""

# ruff: noqa: NPY002, S311 - the global generators are what is saved

import random
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch

from microbatch.step.saved_state import RandomState

CHANGES: dict[str, Callable[[], object]] = {
    "nothing": lambda: None,
    "a number": np.random.random,
    "one normal of a pair": np.random.standard_normal,
    "the other normal": lambda: np.random.standard_normal(2),
    "a seed": lambda: np.random.seed(7),
    "another generator": lambda: np.random.set_state(("MT19937", np.arange(624, dtype=np.uint32), 3, 1, 0.5)),
}


def drawn() -> list[float]:
    """Numbers of every kind: the normals take one that is kept from the pair before."""
    return [*np.random.standard_normal(3), *np.random.random(700), random.random(), torch.rand(()).item()]


@pytest.mark.parametrize("between", CHANGES)
@pytest.mark.parametrize("first", CHANGES)
def test_all_generators_go_back_to_where_they_were(first: str, between: str) -> None:
    np.random.seed(0)
    RandomState(torch.device("cpu"))
    for change in (first, between):
        CHANGES[change]()
        before = RandomState(torch.device("cpu"))
        then = drawn()
        before.restore()
        assert drawn() == then
        before.restore()


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
