"""The losses over all pairs: exact against the plain formulas, and never a whole similarity matrix."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import example, given, settings
from hypothesis import strategies as st
from torch import Tensor

import microbatch as mb
from microbatch.errors import LossError

EXACT = 1e-12


def plain_info_nce(x: Tensor, y: Tensor, s: Tensor, b: Tensor) -> Tensor:
    return F.cross_entropy(s * x @ y.T, torch.arange(len(x)), reduction="sum") + 0 * b


def plain_clip(x: Tensor, y: Tensor, s: Tensor, b: Tensor) -> Tensor:
    logits, diagonal = s * x @ y.T, torch.arange(len(x))
    both = F.cross_entropy(logits, diagonal, reduction="sum") + F.cross_entropy(logits.T, diagonal, reduction="sum")
    return both / 2 + 0 * b


def plain_siglip(x: Tensor, y: Tensor, s: Tensor, b: Tensor) -> Tensor:
    signs = 2 * torch.eye(len(x), dtype=x.dtype) - 1
    return -F.logsigmoid(signs * (s * x @ y.T + b)).sum()


def info_nce(x: Tensor, y: Tensor, s: Tensor, b: Tensor, **tile: Any) -> Tensor:
    return mb.losses.info_nce(x, y, temperature=1 / s, **tile).sum + 0 * b


def clip(x: Tensor, y: Tensor, s: Tensor, b: Tensor, **tile: Any) -> Tensor:
    return mb.losses.clip(x, y, scale=s, **tile).sum + 0 * b


def siglip(x: Tensor, y: Tensor, s: Tensor, b: Tensor, **tile: Any) -> Tensor:
    return mb.losses.siglip(x, y, scale=s, bias=b, **tile).sum


PAIRS: dict[str, tuple[Callable[..., Tensor], Callable[..., Tensor]]] = {
    "info_nce": (info_nce, plain_info_nce),
    "clip": (clip, plain_clip),
    "siglip": (siglip, plain_siglip),
}
each_loss = pytest.mark.parametrize("name", sorted(PAIRS))


def inputs(rows: int, columns: int, *, scale: float = 1.7, dtype: torch.dtype = torch.float64) -> list[Tensor]:
    generator = torch.Generator().manual_seed(rows + 100 * columns)
    made = [torch.randn(number, 5, dtype=torch.float64, generator=generator) for number in (rows, columns)]
    numbers = [torch.tensor(scale), torch.tensor(-2.0)]
    return [each.to(dtype).requires_grad_() for each in [*made, *numbers]]


def off(ours: Tensor, theirs: Tensor) -> float:
    return float((ours.detach() - theirs.detach()).norm() / theirs.detach().norm().clamp(min=1e-3))


@each_loss
@settings(max_examples=30)
@given(rows=st.integers(1, 12), more=st.integers(0, 5), tile=st.integers(1, 13), scale=st.floats(0.1, 100))
@example(rows=1, more=2, tile=1, scale=14.0)  # a small loss of large logits
def test_value_and_every_gradient_are_those_of_the_plain_formula(
    name: str, rows: int, more: int, tile: int, scale: float
) -> None:
    ours, theirs = PAIRS[name]
    tensors = inputs(rows, rows + more * (name == "info_nce"), scale=scale)
    mine, whole = ours(*tensors, tile=tile), theirs(*tensors)
    assert off(mine, whole) <= EXACT
    # As an outer loss does: times something.
    for a, b in zip(torch.autograd.grad(mine * 3, tensors), torch.autograd.grad(whole * 3, tensors), strict=True):
        assert off(a, b) <= EXACT


@each_loss
def test_a_gradient_of_another_tile_is_refused_by_the_same_comparison(name: str) -> None:
    ours, theirs = PAIRS[name]
    x, y, s, b = inputs(8, 8)
    per_tile = sum((ours(x[i : i + 4], y[i : i + 4], s, b) for i in (0, 4)), torch.zeros(()))
    wrong, right = (torch.autograd.grad(each, [x, s]) for each in (per_tile, theirs(x, y, s, b)))
    assert all(off(a, b) > 1e-3 for a, b in zip(wrong, right, strict=True))


@each_loss
def test_the_whole_matrix_is_never_held(name: str) -> None:
    rows, width = 256, 4
    x, y = (torch.randn(rows, width).requires_grad_() for _ in range(2))
    s, b = torch.tensor(2.0).requires_grad_(), torch.tensor(-1.0).requires_grad_()
    peaks: list[int] = []
    for function, how in [(PAIRS[name][0], {"tile": 16}), (PAIRS[name][1], {})]:
        with mb.MemoryMeter() as meter:
            function(x, y, s, b, **how).backward()
        peaks.append(meter.peak_bytes)
    tile, matrix = 16 * rows * 4, rows * rows * 4
    assert peaks[0] < 8 * tile
    assert peaks[1] > matrix


@each_loss
def test_second_derivatives(name: str) -> None:
    ours, _ = PAIRS[name]
    tensors = inputs(3, 3)
    assert torch.autograd.gradgradcheck(lambda *t: ours(*t, tile=2), tensors, fast_mode=True)


@each_loss
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_in_low_precision_no_worse_than_the_plain_formula(name: str, dtype: torch.dtype) -> None:
    ours, theirs = PAIRS[name]
    exact = inputs(16, 16)
    narrow = [each.detach().to(dtype).requires_grad_() for each in exact]
    wide = [each.detach().double().requires_grad_() for each in narrow]
    right = torch.autograd.grad(theirs(*wide), wide)
    mine, plain = (torch.autograd.grad(each(*narrow), narrow) for each in (ours, theirs))
    few_units = 4 * torch.finfo(dtype).eps  # the temperature is the inverse of an inverse, and rounded each time
    for a, b, c in zip(mine, plain, right, strict=True):
        assert off(a.double(), c) <= off(b.double(), c) + few_units


def test_under_autocast_similarities_are_not_rounded() -> None:
    x, y, s, b = inputs(16, 16, dtype=torch.float32)
    with torch.autocast("cpu", torch.bfloat16):
        inside = clip(x, y, s, b)
    assert torch.equal(inside, clip(x, y, s, b))


def test_what_needs_no_gradient_gets_none() -> None:
    x, y, _, _ = inputs(4, 4)
    loss = mb.losses.siglip(x, y.detach(), scale=2, bias=-1.0)
    loss.sum.backward()
    assert x.grad is not None
    assert loss.count == 4
    assert not mb.losses.clip(x.detach(), y.detach(), scale=1.0).sum.requires_grad


@pytest.mark.parametrize(
    ("shapes", "words"),
    [
        (((3,), (3, 2)), "do not fit"),
        (((3, 2), (3, 4)), "do not fit"),
        (((4, 2), (3, 2)), "do not fit"),
        (((0, 2), (0, 2)), "do not fit"),
        (((3, 2), (4, 2)), "there are 3 and 4"),
    ],
)
def test_shapes_that_do_not_fit_are_refused(shapes: tuple[tuple[int, ...], tuple[int, ...]], words: str) -> None:
    x, y = (torch.zeros(shape) for shape in shapes)
    with pytest.raises(LossError, match=words):
        mb.losses.clip(x, y, scale=1.0)
    with pytest.raises(LossError, match=words):
        mb.losses.siglip(x, y, scale=1.0, bias=0.0)


def test_other_mistakes_are_refused() -> None:
    x = torch.zeros(3, 2)
    with pytest.raises(LossError, match="tile must be at least 1"):
        mb.losses.info_nce(x, x, tile=0)
    with pytest.raises(LossError, match="floating point"):
        mb.losses.info_nce(x.long(), x.long())
