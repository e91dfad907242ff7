"""The ruler itself: it must accept what is right, and refuse each kind of wrong."""

import math

import pytest
import torch

from .reference import EXACT, full_batch, numbers, pieces_of, points, regressor, relative_error, squared

MODEL = regressor(0, "cpu")
REFERENCE = full_batch(MODEL, squared, points(0, 5))


def test_the_reference_is_the_derivative() -> None:
    batch, step = points(0, 5), 1e-6
    weight = next(MODEL.parameters())
    with torch.no_grad():
        weight[0, 0] += step
        above = squared(MODEL, batch)
        weight[0, 0] -= 2 * step
        below = squared(MODEL, batch)
        weight[0, 0] += step
    assert REFERENCE["0.weight"][0, 0].item() == pytest.approx(((above - below) / (2 * step)).item(), rel=1e-6)


def test_what_is_right_is_accepted() -> None:
    assert relative_error({name: each * (1 + 1e-15) for name, each in REFERENCE.items()}, REFERENCE) < EXACT


@pytest.mark.parametrize("scale", [0.0, 0.25, 0.999, 1.78, -1.0])
def test_a_wrong_scale_is_measured(scale: float) -> None:
    wrong = {name: each * scale for name, each in REFERENCE.items()}
    assert relative_error(wrong, REFERENCE) == pytest.approx(abs(scale - 1))


def test_one_wrong_entry_is_seen() -> None:
    wrong = {name: each.clone() for name, each in REFERENCE.items()}
    wrong["2.bias"][1] += 1e-9
    assert relative_error(wrong, REFERENCE) > EXACT


def test_a_missing_gradient_and_one_too_many_are_seen() -> None:
    fewer = {name: each for name, each in REFERENCE.items() if name != "2.bias"}
    assert relative_error(fewer, REFERENCE) == math.inf
    assert relative_error(REFERENCE, fewer) == math.inf


@pytest.mark.parametrize("poison", [math.nan, math.inf])
def test_what_is_not_finite_is_seen(poison: float) -> None:
    wrong = {**REFERENCE, "2.bias": REFERENCE["2.bias"] * poison}
    assert relative_error(wrong, REFERENCE) == math.inf


def test_a_piece_is_a_slice() -> None:
    batch = {"x": numbers(0, 7, 2)}
    assert [len(piece["x"]) for piece in pieces_of(batch, 3)] == [3, 3, 1]
    assert torch.equal(torch.cat([piece["x"] for piece in pieces_of(batch, 3)]), batch["x"])
