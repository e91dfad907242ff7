"""Live bytes as functions of the microbatch size: one for each operator, or bounds where operators do not match."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Protocol, runtime_checkable

import torch
from torch import Tensor

from microbatch.memory.align import spans
from microbatch.memory.ledger import ACTIVATIONS, INPUTS, TEMPORARIES, Timeline

# What grows with the microbatch; parameters, buffers, gradients and the optimizer's state do not.
_GROWS = (ACTIVATIONS, INPUTS, TEMPORARIES)


@runtime_checkable
class Curves(Protocol):
    """Live bytes by microbatch size."""

    def at(self, size: int) -> Tensor:
        """Return the bytes alive after each operator, float64.

        Args:
            size: Rows; at least 1.
        """
        ...

    def parts(self, size: int, index: int) -> dict[str, float]:
        """Split the bytes alive after one operator by category.

        Args:
            size: Rows; at least 1.
            index: Which operator.
        """
        ...


@dataclass(frozen=True, slots=True)
class Fitted:
    """A polynomial for each operator, through the nearest sizes: a line through two, a parabola through three.

    Parabolas are for runs with the same operators; where loops differ, rounding to whole turns would bend them. And
    there the peak may have been at other operators in each run, so it is not taken to be lower than on the line through
    the peaks of the two nearest runs.

    Attributes:
        sizes: Ascending.
        runs: At these sizes.
        moments: For each run, which of its operators stands for each of the fitted ones.
        live: Bytes alive then; float64, shape ``(sizes, operators)``.
        points: Sizes that each polynomial goes through, at most.
        same: Whether all runs ran the same operators.
    """

    sizes: Sequence[int]
    runs: Sequence[Timeline]
    moments: Sequence[Sequence[int]]
    live: Tensor
    points: int
    same: bool

    @classmethod
    def through(
        cls, sizes: Sequence[int], runs: Sequence[Timeline], places: Sequence[Sequence[int]], *, bent: bool = True
    ) -> Fitted:
        """Fit runs whose operators have been matched.

        Args:
            sizes: Ascending.
            runs: At these sizes.
            places: What `align` returned for them.
            bent: Whether three sizes may make a parabola.

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
        return cls(sizes, runs, moments, table, points=3 if same and bent else 2, same=same)

    def at(self, size: int) -> Tensor:
        """Return the bytes alive after each operator.

        Args:
            size: Rows; at least 1.

        Returns:
            Float64, one for each operator that all runs have.
        """
        found = _polynomial(self.sizes, list(self.live), size, points=self.points)
        if not self.same:
            line = _polynomial(self.sizes, list(self.live.amax(dim=1)), size, points=2)
            highest = int(found.argmax())
            found[highest] = torch.maximum(found[highest], line)
        return found

    def parts(self, size: int, index: int) -> dict[str, float]:
        """Split the bytes alive after one operator by category.

        Args:
            size: Rows; at least 1.
            index: Which of the fitted operators.

        Returns:
            Bytes by category.
        """
        found = [run.parts(each[index]) for run, each in zip(self.runs, self.moments, strict=True)]
        names = {name: None for each in found for name in each}
        tables = [torch.tensor([each.get(name, 0) for name in names], dtype=torch.float64) for each in found]
        found = _polynomial(self.sizes, tables, size, points=self.points)
        return dict(zip(names, found.clamp(min=0).tolist(), strict=True))


@dataclass(frozen=True, slots=True)
class Bounded:
    """Bounds of the peak alone, as a single operator.

    A maximum of straight lines bends upwards, so between two sizes it lies below its chord. Beyond the largest size,
    what grows is taken to grow in proportion.

    Attributes:
        sizes: Ascending.
        runs: At these sizes.
    """

    sizes: Sequence[int]
    runs: Sequence[Timeline]

    def at(self, size: int) -> Tensor:
        """Return the bound.

        Args:
            size: Rows; at least 1.

        Returns:
            One number, float64.
        """
        peaks = [float(run.peak_bytes) for run in self.runs]
        bound = peaks[0]
        for (low, below), (high, above) in pairwise(zip(self.sizes, peaks, strict=True)):
            if low <= size <= high:
                bound = max(below, below + (above - below) * (size - low) / (high - low))
        if size > self.sizes[-1]:
            bound = max(sum(self._stretched(size, index).values()) for index in range(len(self.runs[-1].live)))
        return torch.tensor([bound], dtype=torch.float64, device="cpu")

    def parts(self, size: int, index: int) -> dict[str, float]:
        """Split the bound by category, as the peak of the next larger run was, or the largest one's.

        Args:
            size: Rows; at least 1.
            index: 0.

        Returns:
            Bytes by category.
        """
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


def _polynomial(sizes: Sequence[int], values: Sequence[Tensor], size: int, *, points: int) -> Tensor:
    """Evaluate the polynomial through the nearest sizes, two or three, in Newton's form."""
    near = sorted(sorted(range(len(sizes)), key=lambda i: (abs(sizes[i] - size), sizes[i]))[:points])
    x, y = [sizes[i] for i in near], [values[i] for i in near]
    first = (y[1] - y[0]) / (x[1] - x[0])
    found = y[0] + first * (size - x[0])
    if len(near) > 2:
        second = ((y[2] - y[1]) / (x[2] - x[1]) - first) / (x[2] - x[0])
        found = found + second * ((size - x[0]) * (size - x[1]))
    return found
