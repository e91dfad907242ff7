"""Sums in bfloat16 that do not stall, with an extra byte for each element."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

# Elements added at a time; their float32 temporaries stay in the CPU's cache.
PIECE = 1 << 16


class Compensated:
    """A bfloat16 sum with 8 extra bits in an int8 tensor: the precision of a 24-bit float, in 3 bytes an element.

    In a plain bfloat16 addition, the sum is rounded to 8 significant bits. A gradient smaller than half a unit in the
    sum's last place is then lost every time, and the sum stops growing.

    The upper 16 bits of a float32, rounded, are a bfloat16. The extra 8 bits hold that rounding's error, from -128 to
    127 in units of 1/256 of the last place. So each addition runs in float32, and the result is rounded to 24 bits and
    split again. The error of one addition is at most 2^-17 of the sum; in plain bfloat16 it is 2^-9.

    Args:
        first: The first gradient, dense bfloat16; its memory becomes the sum.

    Attributes:
        total: The sum, which the optimizer uses without a cast.

    Example:
        >>> total = Compensated(torch.tensor([256.0], dtype=torch.bfloat16))
        >>> for _ in range(4):
        ...     total.add_(torch.tensor([1.0], dtype=torch.bfloat16))
        >>> total.total.item(), (torch.tensor([256.0], dtype=torch.bfloat16) + 1).item()
        (260.0, 256.0)

    Source:
        Laws P1, P2; Kahan's compensation, as an integer.
    """

    def __init__(self, first: Tensor) -> None:
        self.total = first
        self._low = torch.zeros_like(first, dtype=torch.int8)

    def add_(self, part: Tensor, *, rows: slice = slice(None)) -> None:
        """Add a gradient, or some of its rows.

        Args:
            part: A dense tensor, bfloat16 or float32.
            rows: The rows of the sum that ``part`` belongs to; ignored for a 0-d sum.

        Cost:
            Temporary memory of three float32 numbers for each of 65,536 elements.
        """
        tensors = [each if each.ndim == 0 else each[rows] for each in (self.total, self._low)]
        for piece, high, low in _pieces(part, *tensors):
            _split_(_joined(high, low).add_(piece), high, low)

    def scale_(self, factor: float) -> None:
        """Multiply the 24-bit sum by a number, once, after the last addition."""
        for high, low in _pieces(self.total, self._low):
            _split_(_joined(high, low).mul_(factor), high, low)


def _joined(high: Tensor, low: Tensor) -> Tensor:
    """Join the upper 16 bits and the next 8 bits to a float32."""
    bits = high.view(torch.int16).to(torch.int32).mul_(256).add_(low).mul_(256)
    return bits.view(torch.float32)


def _split_(exact: Tensor, high: Tensor, low: Tensor) -> None:
    """Round a float32 to 24 bits and split it."""
    bits = _bits_of(exact)
    # Round half to even: sums of bfloat16 numbers have many ties, which would otherwise add up to a bias.
    even = bits.bitwise_right_shift(8).bitwise_and_(1).add_(127)
    bits.add_(even).bitwise_right_shift_(8)
    upper = bits.add(128).bitwise_right_shift_(8)
    low.copy_(bits.sub_(upper, alpha=256))
    high.copy_(upper.to(torch.int16).view(torch.bfloat16))


def _bits_of(exact: Tensor) -> Tensor:
    # Adding to the largest of the NaN bit patterns would overflow to zero, so every NaN gets the canonical pattern.
    return exact.masked_fill_(exact.isnan(), torch.nan).view(torch.int32)


def _pieces(*tensors: Tensor) -> Iterator[tuple[Tensor, ...]]:
    """Yield tensors of one shape piece by piece if they are contiguous, and otherwise as a whole."""
    if all(each.is_contiguous() for each in tensors):
        yield from zip(*(each.view(-1).split(PIECE) for each in tensors), strict=True)
    else:
        yield tensors
