"""What operators allocate and free inside themselves, as a function of the microbatch size."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise

import torch
from torch import Tensor

_ROUNDING = 256  # bytes that an allocation may be off its line
# For each operator, the levels after each of its allocations.
Levels = Sequence[Sequence[float]]


@dataclass(frozen=True, slots=True)
class Hidden:
    """What operators hold beside what the curves tell, allocation by allocation, by microbatch size.

    Inside an operator, too, the highest level is a maximum of straight lines: a weight put into another order takes
    the same for any microbatch, a microbatch put into another order does not. So each allocation has its own line
    through two sizes, where it was made at both and a third size is on that line too. Where one is not, as when rows
    are padded to blocks, the level up to a size is taken to be that size's. Where an operator took another kernel at
    the larger size, its level is the smaller size's, or the larger one's in proportion, if that is more.

    Attributes:
        sizes: Ascending; empty where nothing was measured.
        gaps: From each size to the next; of one size, to itself.
    """

    sizes: Sequence[int]
    gaps: Sequence[_Gap]

    @classmethod
    def through(cls, sizes: Sequence[int], runs: Sequence[Levels]) -> Hidden:
        """Fit what was measured.

        Args:
            sizes: Ascending.
            runs: For each size the levels, less what the curves tell.

        Returns:
            The fit.
        """
        if len(runs) == 1:
            return cls(sizes, [_Gap.between(sizes[0], runs[0], sizes[0], runs[0], third=None)])
        held = list(zip(sizes, runs, strict=True))
        thirds = [*held[2:3], *held[:-2]] if len(held) > 2 else [None] * (len(held) - 1)
        pairs = zip(pairwise(held), thirds, strict=True)
        return cls(sizes, [_Gap.between(*low, *high, third=third) for (low, high), third in pairs])

    @property
    def changes(self) -> list[tuple[int, int]]:
        """Between which sizes some operators took another kernel."""
        return [(gap.low, gap.high) for gap in self.gaps if not bool(gap.kept.all())]

    def at(self, size: int) -> Tensor:
        """Return each operator's highest level above what the curves tell.

        Args:
            size: Rows; at least 1.

        Returns:
            Float64; what can be added to `Curves.at`.
        """
        if not self.gaps:
            return torch.zeros(1, dtype=torch.float64, device="cpu")
        return next((gap for gap in self.gaps if size <= gap.high), self.gaps[-1]).at(size)


@dataclass(frozen=True, slots=True)
class _Gap:
    """Two sizes and what lies between them."""

    low: int
    high: int
    places: Tensor  # which operator each allocation belongs to
    before: Tensor  # its level at the lower size
    after: Tensor  # and at the higher one
    kept: Tensor  # whether it was made at both
    straight: Tensor  # and a third size is not off the line through both
    operators: int

    @classmethod
    def between(  # noqa: PLR0917 - two pairs
        cls, low: int, before: Levels, high: int, after: Levels, *, third: tuple[int, Levels] | None
    ) -> _Gap:
        columns: list[tuple[int, float, float, bool, bool]] = []
        for place, (a, b) in enumerate(zip(before, after, strict=True)):
            if len(a) != len(b):
                columns.append((place, max(a), max(b), False, False))
                continue
            other = None if third is None or len(third[1][place]) != len(a) else third[1][place]
            for index, (x, y) in enumerate(zip(a, b, strict=True)):
                off = 0.0
                if third is not None and other is not None:
                    off = other[index] - x - (y - x) * (third[0] - low) / (high - low)
                columns.append((place, x, y, True, abs(off) <= _ROUNDING))
        return cls(
            low,
            high,
            places=torch.tensor([each[0] for each in columns], dtype=torch.int64, device="cpu"),
            before=torch.tensor([each[1] for each in columns], dtype=torch.float64, device="cpu"),
            after=torch.tensor([each[2] for each in columns], dtype=torch.float64, device="cpu"),
            kept=torch.tensor([each[3] for each in columns], dtype=torch.bool, device="cpu"),
            straight=torch.tensor([each[4] for each in columns], dtype=torch.bool, device="cpu"),
            operators=len(before),
        )

    def at(self, size: int) -> Tensor:
        proportional = self.after * (size / self.high)
        if self.low == self.high:
            levels = torch.maximum(self.after, proportional)
        else:
            line = self.before + (self.after - self.before) * ((size - self.low) / (self.high - self.low))
            other = torch.maximum(self.before if size < self.high else self.after, proportional)
            steps = torch.maximum(other, self.after) if size > self.low else self.before
            levels = torch.where(self.straight, line, torch.where(self.kept, steps, other))
        highest = torch.zeros(self.operators, dtype=torch.float64, device="cpu")
        return highest.scatter_reduce(0, self.places, levels, "amax", include_self=False)
