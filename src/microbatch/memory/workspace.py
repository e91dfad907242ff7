"""What operators allocate and free inside themselves, as a function of the microbatch size."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise

import torch
from torch import Tensor

_ROUNDING = 256  # bytes that an allocation may be off its line
_UNSEEN = 2.0
"""Heights of a padding's step that are allowed for, for each that was seen: the sizes may all have met it halfway."""
_CHANCE = 0.01
"""Of what a level grows by from one size to the next, how far off a third one is taken to be padding. Where the kernel
changes in between, the third one may lie there too: by a chance of about this."""
# For each operator, the levels after each of its allocations.
Levels = Sequence[Sequence[float]]


@dataclass(frozen=True, slots=True)
class Hidden:
    """What operators hold beside what the curves tell, allocation by allocation, by microbatch size.

    Inside an operator, too, the highest level is a maximum of straight lines: a weight put into another order takes
    the same for any microbatch, a microbatch put into another order does not. So each allocation has its own line
    through two sizes, where it was made at both.

    Rows that are padded to blocks put a staircase on that line. With steps of height ``h`` each level is 0 to ``h``
    above it, so that the line through two levels, ``along`` of the way from one to the other, is at most
    ``h max(1, along, 1 - along)`` off. That is turned round to learn ``h`` from the next sizes on either side, and
    twice as much is allowed for, but no more than that further rows take no less: between two sizes, the larger level.
    That is the bound, too, where the next sizes are so far off that the kernel may be another one.

    Where an operator took another kernel at the larger size, its level is the smaller size's, or the larger one's in
    proportion, if that is more.

    Attributes:
        sizes: Ascending; empty where nothing was measured.
        gaps: From each size to the next; and, for what lies beyond the largest, to it from the largest of at most half
            of it, since two sizes side by side tell little of a slope.
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
        held = list(zip(sizes, runs, strict=True))
        gaps = [
            _Gap.between(low, high, near=[held[i] for i in (at - 1, at + 2) if 0 <= i < len(held)])
            for at, (low, high) in enumerate(pairwise(held))
        ]
        if held:
            start = max((at for at, size in enumerate(sizes) if 2 * size <= sizes[-1]), default=0)
            near = [each for at, each in enumerate(held[:-1]) if at >= start - 1 and at != start]
            gaps.append(_Gap.between(held[start], held[-1], near=near))
        return cls(sizes, gaps)

    @property
    def changes(self) -> list[tuple[int, int]]:
        """Between which sizes some operators took another kernel."""
        return [(gap.low, gap.high) for gap in self.gaps[:-1] if not bool(gap.kept.all())]

    def at(self, size: int) -> Tensor:
        """Return each operator's highest level above what the curves tell, at most.

        Args:
            size: Rows; at least 1.

        Returns:
            Float64; what can be added to `Curves.at`.
        """
        return self._highest(size, bound=True)

    def least(self, size: int) -> Tensor:
        """Return the same at the least: without padding, and with the smaller kernel where two are in question.

        Args:
            size: Rows; at least 1.

        Returns:
            Float64, of the same shape.
        """
        return self._highest(size, bound=False)

    def levels(self, size: int) -> list[list[float]]:
        """Return every operator's levels above what the curves tell, at most.

        Args:
            size: Rows; at least 1.

        Returns:
            For each operator its allocations'; empty where nothing was measured.
        """
        if not self.gaps:
            return []
        gap = self._gap(size)
        found: list[list[float]] = [[] for _ in range(gap.operators)]
        for place, level in zip(gap.places.tolist(), gap.at(size, bound=True).tolist(), strict=True):
            found[place].append(level)
        return found

    def _highest(self, size: int, *, bound: bool) -> Tensor:
        if not self.gaps:
            return torch.zeros(1, dtype=torch.float64, device="cpu")
        gap = self._gap(size)
        highest = torch.zeros(gap.operators, dtype=torch.float64, device="cpu")
        return highest.scatter_reduce(0, gap.places, gap.at(size, bound=bound), "amax", include_self=False)

    def _gap(self, size: int) -> _Gap:
        return next((gap for gap in self.gaps if size <= gap.high), self.gaps[-1])


@dataclass(frozen=True, slots=True)
class _Gap:
    """Two sizes and what lies between them."""

    low: int
    high: int
    places: Tensor  # which operator each allocation belongs to
    before: Tensor  # its level at the lower size
    after: Tensor  # and at the higher one
    kept: Tensor  # whether it was made at both
    height: Tensor  # of the steps of a staircase on the line through both, as far as seen; without end if there is none
    operators: int

    @classmethod
    def between(
        cls, lower: tuple[int, Levels], higher: tuple[int, Levels], *, near: Sequence[tuple[int, Levels]]
    ) -> _Gap:
        (low, before), (high, after) = lower, higher
        columns: list[tuple[int, float, float, bool, float]] = []
        for place, (a, b) in enumerate(zip(before, after, strict=True)):
            if len(a) != len(b):
                columns.append((place, max(a), max(b), False, 0.0))
                continue
            others = [(size, levels[place]) for size, levels in near if len(levels[place]) == len(a)]
            for index, (x, y) in enumerate(zip(a, b, strict=True)):
                heights = [_height((low, x), (high, y), (size, levels[index])) for size, levels in others]
                # A kernel that changes on one side says nothing of what lies between.
                near_enough = [each for each in heights if each <= max(_ROUNDING, _CHANCE * abs(y - x))]
                height = max(near_enough, default=math.inf) if heights else 0.0
                columns.append((place, x, y, True, height))
        places, x, y, kept, height = zip(*columns, strict=True) if columns else ((),) * 5
        return cls(
            low,
            high,
            places=torch.tensor(places, dtype=torch.int64, device="cpu"),
            before=torch.tensor(x, dtype=torch.float64, device="cpu"),
            after=torch.tensor(y, dtype=torch.float64, device="cpu"),
            kept=torch.tensor(kept, dtype=torch.bool, device="cpu"),
            height=torch.tensor(height, dtype=torch.float64, device="cpu"),
            operators=len(before),
        )

    def at(self, size: int, *, bound: bool) -> Tensor:
        proportional = self.after * (size / self.high)
        if self.low == self.high:
            return torch.maximum(self.after, proportional)
        along = (size - self.low) / (self.high - self.low)
        line = torch.lerp(self.before, self.after, along)
        if not bound:
            return torch.where(self.kept, line, torch.minimum(self.before, self.after))
        changed = torch.maximum(self.before if size < self.high else self.after, proportional)
        most = torch.maximum(changed, self.after) if size > self.low else self.before
        padded = line + _UNSEEN * max(1.0, along, 1 - along) * self.height
        return torch.where(self.kept, torch.maximum(line, torch.minimum(padded, most)), changed)


def _height(low: tuple[int, float], high: tuple[int, float], other: tuple[int, float]) -> float:
    """Tell how high steps are at the least, if a third level is not on the line through two."""
    along = (other[0] - low[0]) / (high[0] - low[0])
    off = other[1] - low[1] - along * (high[1] - low[1])
    return abs(off) / max(1.0, along, 1 - along)
