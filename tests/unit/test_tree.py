"""The tree of sums: whoever adds up which run of parts, the bits are the same."""

from itertools import pairwise

import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from microbatch.gradients.sum_tree import Node, Tree, shape_of, total


def parts(number: int, seed: int) -> list[list[Tensor | None]]:
    generator = torch.Generator().manual_seed(seed)
    scale = torch.logspace(-4, 4, 6)
    made: list[list[Tensor | None]] = []
    for index in range(number):
        second = None if (index + seed) % 3 == 0 else torch.randn(2, generator=generator)
        made.append([torch.randn(6, generator=generator) * scale, second])
    return made


def copied(each: list[Tensor | None]) -> list[Tensor | None]:
    return [None if tensor is None else tensor.clone() for tensor in each]


def nodes(some: list[list[Tensor | None]], first: int) -> list[Node]:
    tree = Tree(first)
    for each in some:
        tree.add(copied(each))
    return tree.nodes


@given(number=st.integers(1, 19), seed=st.integers(0, 99), cuts=st.lists(st.integers(0, 19), max_size=3))
def test_the_sum_does_not_depend_on_who_adds_what(number: int, seed: int, cuts: list[int]) -> None:
    made = parts(number, seed)
    whole = total(nodes(made, 0))
    ends = [0, *sorted(min(cut, number) for cut in cuts), number]
    runs = [nodes(made[a:b], a) for a, b in pairwise(ends)]
    again = total([node for run in runs for node in run])
    for one, other in zip(whole, again, strict=True):
        assert (one is None) == (other is None)
        assert one is None or other is None or torch.equal(one, other)
    for run, (a, b) in zip(runs, pairwise(ends), strict=True):
        assert [(node.level, node.index) for node in run] == shape_of(a, b - a)


def test_adding_up_in_a_row_would_be_seen() -> None:
    """The control: the comparison above tells one order from another."""
    made = parts(13, 1)
    straight = sum((each[0] for each in made if each[0] is not None), torch.zeros(6))
    whole = total(nodes(made, 0))[0]
    assert whole is not None
    assert not torch.equal(whole, straight)
    torch.testing.assert_close(whole, straight)
