"""Live bytes as functions of the microbatch size: one curve for each operator, or bounds if operators do not match."""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import TypeAlias

import torch
from torch import Tensor

from microbatch.memory.ledger import ACTIVATIONS, INPUTS, TEMPORARIES, Timeline
from microbatch.memory.match_operators import spans

_ROUNDING = 256  # bytes by which the allocator's rounding may move an allocation off its curve
_BENT = 0.1  # a parabola is accepted if its error is at most this part of the line's error
# Categories that grow with the microbatch; parameters, buffers, gradients and optimizer state do not.
_GROWS = (ACTIVATIONS, INPUTS, TEMPORARIES)


@dataclass(frozen=True, slots=True)
class Fitted:
    """A polynomial for each operator through the nearest sizes: a line through two, or a parabola through three.

    Parabolas are used only if all runs have the same operators. If loops have different numbers of iterations,
    rounding to whole iterations would distort a parabola. In that case, the peak may also be at different operators in
    each run. So the predicted peak is at least that of the line through the peaks of the two nearest runs.

    In real runs, kernels that pad rows would distort a parabola too. There, an operator has a parabola only if it
    predicts a further measured size as well. Otherwise it has the line from the smallest to the largest size.

    Attributes:
        sizes: Microbatch sizes, ascending.
        runs: The run at each size.
        moments: For each run, the index of its operator that stands for each fitted one.
        live: Bytes alive after these operators; float64, shape ``(sizes, operators)``.
        bent: Whether each operator has a parabola.
        same: Whether all runs have the same operators.
    """

    sizes: Sequence[int]
    runs: Sequence[Timeline]
    moments: Sequence[Sequence[int]]
    live: Tensor
    bent: Tensor
    same: bool

    @classmethod
    def through(
        cls, sizes: Sequence[int], runs: Sequence[Timeline], places: Sequence[Sequence[int]], *, real: bool = False
    ) -> Fitted:
        """Fit runs whose operators have been matched.

        Args:
            sizes: Microbatch sizes, ascending.
            runs: The run at each size.
            places: The result of `align` for these runs.
            real: Whether the runs are of real tensors, on kernels that may pad rows.

        Returns:
            The curves.
        """
        moments = [
            [max(span, key=run.live.__getitem__) for span in spans(each, len(run.live))]
            for run, each in zip(runs, places, strict=True)
        ]
        live = [[run.live[moment] for moment in each] for run, each in zip(runs, moments, strict=True)]
        same = all(len(each) == len(run.live) == len(runs[0].live) for run, each in zip(runs, moments, strict=True))
        table = torch.tensor(live, dtype=torch.float64, device="cpu")
        bent = torch.full((table.shape[1],), same and len(sizes) > 2, dtype=torch.bool, device="cpu")
        if real and same and len(sizes) > 2:
            three = [0, len(sizes) // 2, len(sizes) - 1]
            bent &= _confirmed(sizes, table, three)
            sizes, runs, moments = [sizes[i] for i in three], [runs[i] for i in three], [moments[i] for i in three]
            table = table[three]
            # Without a parabola, the middle size lies on the line from the smallest to the largest.
            between = torch.lerp(table[0], table[2], (sizes[1] - sizes[0]) / (sizes[2] - sizes[0]))
            table[1] = torch.where(bent, table[1], between)
        return cls(sizes, runs, moments, table, bent, same=same)

    @property
    def operators(self) -> Sequence[str]:
        """Names of the operators that all runs have."""
        return [self.runs[0].operators[moment] for moment in self.moments[0]]

    def at(self, size: int) -> Tensor:
        """Return the bytes alive after each operator."""
        rows = list(self.live)
        line = _polynomial(self.sizes, rows, size, points=2)
        found = torch.where(self.bent, _polynomial(self.sizes, rows, size, points=3), line)
        if not self.same:
            line = _polynomial(self.sizes, list(self.live.amax(dim=1)), size, points=2)
            highest = int(found.argmax())
            found[highest] = torch.maximum(found[highest], line)
        return found

    def least(self, size: int) -> Tensor:
        """Return a lower bound of the bytes alive after each operator.

        A convex function lies below its chord between two sizes, and above the extended chords on either side.

        Args:
            size: Rows; at least 1.

        Returns:
            Float64, of the shape of `at`. Equal to `at`, except between two sizes whose loops differ.
        """
        found, above = self.at(size), bisect_left(self.sizes, size)
        if self.same or not 0 < above < len(self.sizes):
            return found
        lines = [
            _polynomial(self.sizes[start : start + 2], list(self.live[start : start + 2]), size, points=2)
            for start in (above - 2, above)
            if 0 <= start < len(self.sizes) - 1
        ]
        return torch.minimum(found, torch.stack(lines).amax(dim=0)) if lines else found

    def parts(self, size: int, index: int) -> dict[str, float]:
        """Split the bytes alive after one operator by category."""
        found = [run.parts(each[index]) for run, each in zip(self.runs, self.moments, strict=True)]
        names = {name: None for each in found for name in each}
        tables = [torch.tensor([each.get(name, 0) for name in names], dtype=torch.float64) for each in found]
        found = _polynomial(self.sizes, tables, size, points=3 if bool(self.bent[index]) else 2)
        return dict(zip(names, found.clamp(min=0).tolist(), strict=True))


@dataclass(frozen=True, slots=True)
class Bounded:
    """Upper bounds of the peak, presented as a single operator.

    A maximum of straight lines is convex, so between two sizes it lies below its chord. Beyond the largest size, the
    categories that grow with the microbatch are scaled in proportion.

    Attributes:
        sizes: Microbatch sizes, ascending.
        runs: The run at each size.
    """

    sizes: Sequence[int]
    runs: Sequence[Timeline]

    @property
    def operators(self) -> Sequence[str]:
        """A single name that stands for all operators."""
        return ["any"]

    def at(self, size: int) -> Tensor:
        """Return the upper bound of the peak."""
        peaks = [float(run.peak_bytes) for run in self.runs]
        bound = peaks[0]
        for (low, below), (high, above) in pairwise(zip(self.sizes, peaks, strict=True)):
            if low <= size <= high:
                bound = max(below, below + (above - below) * (size - low) / (high - low))
        if size > self.sizes[-1]:
            bound = max(sum(self._stretched(size, index).values()) for index in range(len(self.runs[-1].live)))
        return torch.tensor([bound], dtype=torch.float64, device="cpu")

    def least(self, size: int) -> Tensor:
        """Return the largest peak among the runs with at most as many rows, which is a lower bound."""
        peaks = [float(run.peak_bytes) for at, run in zip(self.sizes, self.runs, strict=True) if at <= size]
        return torch.tensor([max(peaks, default=0.0)], dtype=torch.float64, device="cpu")

    def parts(self, size: int, index: int) -> dict[str, float]:
        """Split the bound by category, in the proportions of the next larger run's peak, or of the largest run's."""
        del index
        run = next((run for at, run in zip(self.sizes, self.runs, strict=True) if at >= size), self.runs[-1])
        found = run.parts(max(range(len(run.live)), key=run.live.__getitem__))
        total = float(self.at(size)[0])
        fixed = sum(bytes_ for name, bytes_ in found.items() if name not in _GROWS)
        factor = (total - fixed) / max(1, sum(found.values()) - fixed)
        return {name: bytes_ * (factor if name in _GROWS else 1) for name, bytes_ in found.items()}

    def _stretched(self, size: int, index: int) -> dict[str, float]:
        found = self.runs[-1].parts(index)
        return {name: each * (size / self.sizes[-1] if name in _GROWS else 1) for name, each in found.items()}


Curves: TypeAlias = Fitted | Bounded
"""Live bytes by microbatch size."""


def _polynomial(sizes: Sequence[int], values: Sequence[Tensor], size: int, *, points: int) -> Tensor:
    """Evaluate the polynomial through the two or three nearest sizes, in Newton's form."""
    at = min(max(1, bisect_left(sizes, size)), len(sizes) - 1)
    near = [at - 1, at]
    if points > 2 and len(sizes) > 2:
        beside = [i for i in (at - 2, at + 1) if 0 <= i < len(sizes)]
        near = sorted([*near, min(beside, key=lambda i: abs(sizes[i] - size))])
    x, y = [sizes[i] for i in near], [values[i] for i in near]
    first = (y[1] - y[0]) / (x[1] - x[0])
    found = y[0] + first * (size - x[0])
    if len(near) > 2:
        second = ((y[2] - y[1]) / (x[2] - x[1]) - first) / (x[2] - x[0])
        found = found + second * ((size - x[0]) * (size - x[1]))
    return found


def _confirmed(sizes: Sequence[int], live: Tensor, three: Sequence[int]) -> Tensor:
    """Return, for each operator, whether a parabola predicts the other sizes far better than a line does."""
    rest = [i for i in range(len(sizes)) if i not in three]
    if not rest:
        return torch.zeros(live.shape[1], dtype=torch.bool, device="cpu")
    off = torch.zeros(2, live.shape[1], dtype=torch.float64, device="cpu")
    for degree, chosen in enumerate((three, [three[0], three[-1]])):
        for i in rest:
            found = _polynomial([sizes[j] for j in chosen], [live[j] for j in chosen], sizes[i], points=3)
            off[degree] = torch.maximum(off[degree], (found - live[i]).abs())
    return off[0] <= (_BENT * off[1]).clamp(min=_ROUNDING)
