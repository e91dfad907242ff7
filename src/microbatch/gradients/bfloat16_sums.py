"""Sums in bfloat16 that go on growing: with one byte more a number, or rounded at random."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator

import torch
from torch import Tensor

# Elements that are added at once: what is made of them on the way, in float32, stays in cache.
PIECE = 1 << 16


class NarrowSum(ABC):
    """A sum of gradients of a bfloat16 parameter, in bfloat16.

    Added up as torch does, each number is rounded to the nearest of 8 bits, so that what is smaller than half a unit of
    the sum's last place is lost every time, and the sum stops growing.

    Attributes:
        total: The sum; what the optimizer is given, without a cast.
    """

    total: Tensor

    def add_(self, part: Tensor, *, rows: slice = slice(None)) -> None:
        """Add one gradient, or some rows of one.

        Args:
            part: Dense, bfloat16 or float32.
            rows: Which rows of the first dimension it is; a sum without dimensions has none.

        Cost:
            Three float32 numbers for each of at most 65,536 elements at once.
        """
        tensors = [each if each.ndim == 0 else each[rows] for each in self._tensors()]
        for piece, *held in _pieces(part, *tensors):
            self._add_piece_(piece, held)

    @abstractmethod
    def scale_(self, factor: float) -> None:
        """Multiply with a number, once, when all has been added.

        Args:
            factor: Normalisation and clipping.
        """

    @abstractmethod
    def _tensors(self) -> list[Tensor]:
        """List what is held for every element, the sum first."""

    @abstractmethod
    def _add_piece_(self, part: Tensor, held: list[Tensor]) -> None: ...


class Compensated(NarrowSum):
    """A sum whose next 8 bits are kept beside it: as a float of 24 bits would add up, in 3 bytes.

    A float32's upper 16 bits, rounded, are a bfloat16; the next 8 are what that rounding left, from -128 to 127 parts
    of 256 of its last place. So a number is added in float32, rounded to 24 bits and taken apart again. The error of
    one addition is at most 2^-17 of the sum, where bfloat16's is 2^-9.

    Args:
        first: The first gradient, which becomes the sum: bfloat16, dense.

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

    def scale_(self, factor: float) -> None:
        """Multiply all 24 bits, and round to bfloat16 once."""
        for high, low in _pieces(self.total, self._low):
            _split_(_joined(high, low).mul_(factor), high, low)

    def _tensors(self) -> list[Tensor]:
        return [self.total, self._low]

    def _add_piece_(self, part: Tensor, held: list[Tensor]) -> None:
        high, low = held
        _split_(_joined(high, low).add_(part), high, low)


class Stochastic(NarrowSum):
    """A sum that is rounded up or down at random, with the odds that make its mean right.

    A float32 is cut to its upper 16 bits after a random number of 16 bits has been added to the lower: it goes up with
    a chance of what is cut off, in units of the last place. So a gradient of a thousandth of a unit moves the sum once
    in a thousand times: no error is repeated, and after K additions they have grown as the root of K.

    Args:
        first: The first gradient, which becomes the sum: bfloat16, dense.
        generator: Where the random numbers come from, on the device of ``first``; nobody else's are used.

    Example:
        >>> total = Stochastic(torch.full((4096,), 256.0, dtype=torch.bfloat16), torch.Generator().manual_seed(0))
        >>> for _ in range(100):
        ...     total.add_(torch.ones(4096, dtype=torch.bfloat16))
        >>> round(total.total.float().mean().item())  # each of them is 356 give or take a few units of 2
        356

    Source:
        Laws P1, P2.
    """

    def __init__(self, first: Tensor, generator: torch.Generator) -> None:
        self.total = first
        self._generator = generator

    def scale_(self, factor: float) -> None:
        """Multiply, and round at random."""
        for (total,) in _pieces(self.total):
            self._round_(total.float().mul_(factor), total)

    def _tensors(self) -> list[Tensor]:
        return [self.total]

    def _add_piece_(self, part: Tensor, held: list[Tensor]) -> None:
        (total,) = held
        self._round_(total.float().add_(part), total)

    def _round_(self, exact: Tensor, total: Tensor) -> None:
        # One draw of 64 bits is four numbers of 16, from -32768 on.
        draws = torch.empty(-(-exact.numel() // 4), dtype=torch.int64, device=exact.device)
        noise = draws.random_(-(2**63), None, generator=self._generator).view(torch.int16)[: exact.numel()]
        bits = _bits_of(exact).add_(noise.view(exact.shape)).add_(1 << 15)
        total.copy_(bits.bitwise_right_shift_(16).to(torch.int16).view(torch.bfloat16))


def _joined(high: Tensor, low: Tensor) -> Tensor:
    """Put 16 and 8 bits together to a float32."""
    bits = high.view(torch.int16).to(torch.int32).mul_(256).add_(low).mul_(256)
    return bits.view(torch.float32)


def _split_(exact: Tensor, high: Tensor, low: Tensor) -> None:
    """Round a float32 to 24 bits and take it apart."""
    bits = _bits_of(exact)
    # To the even one of two that are equally near, or the many ties between bfloat16 numbers would add up to a bias.
    even = bits.bitwise_right_shift(8).bitwise_and_(1).add_(127)
    bits.add_(even).bitwise_right_shift_(8)
    upper = bits.add(128).bitwise_right_shift_(8)
    low.copy_(bits.sub_(upper, alpha=256))
    high.copy_(upper.to(torch.int16).view(torch.bfloat16))


def _bits_of(exact: Tensor) -> Tensor:
    # Of the many bit patterns that are NaN, the largest would become a zero when something is added to it.
    return exact.masked_fill_(exact.isnan(), torch.nan).view(torch.int32)


def _pieces(*tensors: Tensor) -> Iterator[tuple[Tensor, ...]]:
    """Go through tensors of one shape a piece at a time, where they are laid out alike."""
    if all(each.is_contiguous() for each in tensors):
        yield from zip(*(each.view(-1).split(PIECE) for each in tensors), strict=True)
    else:
        yield tensors
