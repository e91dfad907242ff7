"""Workspaces, which operators allocate and free internally, as a function of the microbatch size."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise

import torch
from torch import Tensor

_ROUNDING = 256  # bytes by which the allocator's rounding may move an allocation off its line
# The padding's step may be twice as high as observed, because all measured sizes may lie halfway up a step.
_UNSEEN = 2.0
# A third level is off the line because of padding if the deviation is at most this part of the growth between the two
# sizes. If the kernel has changed instead, the third level lies as close by chance, with about this probability.
_CHANCE = 0.01
# For each operator, the allocated bytes after each of its allocations.
Levels = Sequence[Sequence[float]]


@dataclass(frozen=True, slots=True)
class Hidden:
    """Bytes that operators hold above the curves of live tensors, for each allocation, by microbatch size.

    Within an operator, the peak is a maximum of straight lines too. For example, a reordered copy of the weight takes
    the same memory for any microbatch, but a reordered copy of the microbatch does not. So each allocation has its own
    line through two sizes, if the operator made the allocation at both.

    Kernels that pad rows to blocks turn the line into a staircase. With steps of height ``h``, each level lies 0 to
    ``h`` above the line. Then the line through two measured levels is off by at most ``h max(1, along, 1 - along)``,
    ``along`` of the way from one size to the other. The next sizes on either side give an estimate of ``h``. The bound
    allows for twice the estimate. Between two sizes, it is never above the larger level, because more rows take no less
    memory. The larger level is also the bound if the next sizes are so far off the line that the kernel may differ.

    If an operator used another kernel at the larger size, the bound is the level of the smaller size. It is the level
    of the larger size, scaled in proportion to the rows, if that is more.

    Attributes:
        sizes: Microbatch sizes, ascending; empty if nothing was measured.
        gaps: One for each pair of neighbouring sizes, and one for sizes beyond the largest. The last one starts at the
            largest size that is at most half of the largest, because neighbouring sizes determine a slope poorly.
    """

    sizes: Sequence[int]
    gaps: Sequence[_Gap]

    @classmethod
    def through(cls, sizes: Sequence[int], runs: Sequence[Levels]) -> Hidden:
        """Fit measured levels."""
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
        """Pairs of sizes between which an operator changed its kernel."""
        return [(gap.low, gap.high) for gap in self.gaps[:-1] if not bool(gap.kept.all())]

    def at(self, size: int) -> Tensor:
        """Return an upper bound of each operator's peak above the curves of live tensors, as `Curves.at` has them."""
        return self._highest(size, bound=True)

    def least(self, size: int) -> Tensor:
        """Return a lower bound of `at`: without padding, and with the smaller of two possible kernels."""
        return self._highest(size, bound=False)

    def levels(self, size: int) -> list[list[float]]:
        """Return upper bounds of the levels after each allocation of every operator, above the curves."""
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
    """Two measured sizes, with the levels of all allocations at both."""

    low: int
    high: int
    places: Tensor  # index of the operator of each allocation
    before: Tensor  # level of each allocation at the lower size
    after: Tensor  # level of each allocation at the higher size
    kept: Tensor  # whether the operator made the allocation at both sizes
    height: Tensor  # estimated height of padding steps on the line through both levels; infinite if unknown
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
                # A kernel that changes outside of the gap is no evidence of padding within it.
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
    """Return the least height of padding steps that explains a third level off the line through two."""
    along = (other[0] - low[0]) / (high[0] - low[0])
    off = other[1] - low[1] - along * (high[1] - low[1])
    return abs(off) / max(1.0, along, 1 - along)
