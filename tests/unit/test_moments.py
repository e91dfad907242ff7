"""Moments of each channel, in every way that they are measured."""

from __future__ import annotations

import pytest
import torch

from microbatch.loss.channel_stats import merged, moments_of


@pytest.mark.parametrize("shape", [(5, 3), (2, 3, 7), (4, 6, 8, 8), (1, 4, 70), (2, 3, 5, 4, 6)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
@pytest.mark.parametrize("last", [False, True])
def test_as_good_as_in_more_digits(shape: tuple[int, ...], dtype: torch.dtype, last: bool) -> None:
    """Also where values are a thousand deviations from zero, and channels lie last."""
    torch.manual_seed(0)
    x = (torch.randn(shape, dtype=torch.float64) + 1e3).to(dtype)
    if last:
        x = x.movedim(1, -1).contiguous().movedim(-1, 1)
    mean, squares = moments_of(x)
    assert mean.dtype == squares.dtype == torch.promote_types(dtype, torch.float32)
    over = [0, *range(2, x.dim())]
    exact = x.double()
    expected = exact.mean(over)
    around = (exact - expected.view(-1, *[1] * (x.dim() - 2))).square().sum(over)
    rounding = torch.finfo(mean.dtype).eps
    torch.testing.assert_close(mean.double(), expected, rtol=4 * rounding, atol=0)
    torch.testing.assert_close(squares.double(), around, rtol=100 * rounding, atol=1e-9)


def test_parts_are_merged_in_the_widest_dtype() -> None:
    torch.manual_seed(0)
    x = torch.randn(9, 4, 8, 8) + 100
    count, mean, squares = merged([(part.numel() // 4, *moments_of(part)) for part in x.split([2, 3, 4])])
    whole_mean, whole_squares = moments_of(x.double())
    assert count == 9 * 64
    assert mean.dtype == squares.dtype == torch.float64
    torch.testing.assert_close(mean, whole_mean, rtol=1e-7, atol=0)
    torch.testing.assert_close(squares, whole_squares, rtol=1e-6, atol=0)
    alone = merged([(64.0, *moments_of(x[:1]))])
    assert alone[1].dtype == torch.float64


def test_a_mean_of_many_is_rounded_once() -> None:
    torch.manual_seed(2)
    x = torch.randn(32, 2, 128, 128) + 1e3
    mean, _ = moments_of(x)
    exact = x.double().mean((0, 2, 3))
    assert ((mean.double() - exact).abs() / exact).max() <= 0.3 * torch.finfo(torch.float32).eps
