"""Masks by row are as good as random ones: kept as often as asked, and independent of everything they should be."""

import math

import pytest
import torch
from torch import Tensor

from microbatch.batch.random_masks import _mixed, derive, row_mask

CPU = torch.device("cpu")
SHAPE = (64, 32, 48)


def drawn(
    keep: float = 0.5, *, seed: int = 0, first: int = 0, shape: tuple[int, ...] = SHAPE, from_end: bool = False
) -> Tensor:
    rows = torch.arange(first, first + shape[0])
    return row_mask(keep, shape, seed=seed, rows=rows, from_end=from_end, device=CPU)


def correlation(a: Tensor, b: Tensor) -> float:
    """Return the correlation of two masks in units of its standard deviation under independence."""
    a, b = a.double() - a.double().mean(), b.double() - b.double().mean()
    return ((a * b).mean() / (a.std() * b.std())).item() * math.sqrt(a.numel())


@pytest.mark.parametrize("keep", [1e-3, 0.1, 0.5, 0.9, 0.999])
def test_as_many_are_kept_as_was_asked(keep: float) -> None:
    for seed in range(3):
        mask = drawn(keep, seed=seed).double()
        spread = math.sqrt(keep * (1 - keep))
        assert abs(mask.mean().item() - keep) < 5 * spread / math.sqrt(mask.numel())
        # In no row, at no place, more than chance would have it.
        for dimensions in [(1, 2), (0, 1), (0, 2)]:
            means = mask.mean(dimensions)
            number = mask.numel() / means.numel()
            assert (means - keep).abs().max().item() < 6 * spread / math.sqrt(number) + 1 / number


@pytest.mark.parametrize("keep", [0.5, 0.9])
def test_rows_calls_steps_and_neighbours_know_nothing_of_each_other(keep: float) -> None:
    mask, above = drawn(keep), torch.triu_indices(32, 32, 1)
    others = {
        "the next row": (mask[:-1], mask[1:]),
        "the next place": (mask[:, :, :-1], mask[:, :, 1:]),
        "the next line": (mask[:, :-1], mask[:, 1:]),
        "the coordinates exchanged": (mask[:, above[0], above[1]], mask[:, above[1], above[0]]),
        "the next seed": (mask, drawn(keep, seed=1)),
        "a far row": (mask, drawn(keep, first=1 << 40)),
        "the next call": (drawn(keep, seed=derive(3, 0)), drawn(keep, seed=derive(3, 1))),
        "the next step": (drawn(keep, seed=derive(derive(3, 0), 0)), drawn(keep, seed=derive(derive(3, 1), 0))),
        "from the end": (mask, drawn(keep, from_end=True)),
    }
    found = {name: correlation(*pair) for name, pair in others.items()}
    assert {name: value for name, value in found.items() if abs(value) > 4.5} == {}


def test_pairs_of_elements_are_as_often_equal_as_chance_has_it() -> None:
    # Over many draws, every one of a few elements against every other.
    draws = torch.stack([drawn(seed=seed, shape=(4, 4, 4)).flatten() for seed in range(2000)]).double() * 2 - 1
    products = (draws.T @ draws / len(draws)).fill_diagonal_(0)
    assert products.abs().max().item() < 5.5 / math.sqrt(len(draws))


def test_runs_are_as_long_as_a_coins() -> None:
    flat = drawn().flatten().int()
    changes = int((flat[1:] != flat[:-1]).sum())
    assert abs(changes - flat.numel() / 2) < 5 * math.sqrt(flat.numel()) / 2


@pytest.mark.parametrize("shape", [(7,), (7, 5), (3, 4, 5, 6), (2, 300, 400)], ids=str)
def test_a_row_is_the_same_in_any_company_and_at_any_length(shape: tuple[int, ...]) -> None:
    whole = drawn(0.7, shape=shape)
    for row in range(shape[0]):
        assert torch.equal(drawn(0.7, first=row, shape=(1, *shape[1:])), whole[row : row + 1])
    if len(shape) > 1:
        shorter = (shape[0], shape[1] - 2, *shape[2:])
        assert torch.equal(drawn(0.7, shape=shorter), whole[:, :-2])
        ends = drawn(0.7, shape=shape, from_end=True)
        assert torch.equal(drawn(0.7, shape=shorter, from_end=True), ends[:, 2:])


def test_rows_in_step_part_by_their_second_words() -> None:
    # Two rows whose first words are alike, which is to be had by chance in one of four thousand million.
    bits, later = (
        torch.arange(4096, dtype=torch.int32).expand(2, -1).clone(),
        torch.tensor([[1], [2]], dtype=torch.int32),
    )
    kept = _mixed(bits, later) < 0
    assert 0.45 < (kept[0] == kept[1]).double().mean().item() < 0.55


def test_no_row_and_no_element_are_no_trouble() -> None:
    assert drawn(shape=(0, 3)).shape == (0, 3)
    assert drawn(shape=(3, 0, 2)).shape == (3, 0, 2)


def test_a_seed_depends_on_every_number_and_their_order() -> None:
    seeds = {derive(*numbers) for numbers in [(0,), (1,), (0, 0), (0, 1), (1, 0), (1, 1), (-1, 0), (1 << 63, 0)]}
    assert len(seeds) == 8
    assert all(0 <= seed < 1 << 63 for seed in seeds)
