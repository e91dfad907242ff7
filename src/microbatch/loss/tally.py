"""The one denominator: what the window's losses add up to, and what each backward is divided by meanwhile."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field

import torch
from torch import Tensor

from microbatch.errors import CountError, MissingCountError, UnknownTermError
from microbatch.loss.loss import Share, wide_dtype


@dataclass(slots=True)
class _Term:
    """The shares of one term so far; tensors stay on the device, unread."""

    expected: float
    values: list[Tensor] = field(default_factory=list[Tensor])
    weights: list[float] = field(default_factory=list[float])
    counts: list[int | float | Tensor] = field(default_factory=list["int | float | Tensor"])
    microbatches: list[int | None] = field(default_factory=list[int | None])


class Tally:
    r"""Keep a window's sums and counts without reading them.

    The gradient is ``sum_i grad S_i / sum_i c_i``, and the counts are known only at the end. So backward runs on
    ``S_i / expected``, and one factor ``expected / sum_i c_i`` over the finished gradient makes it exact whatever was
    expected. Where the count is not known beforehand, ``expected`` is a power of two, which loses nothing.

    Several terms with counts of their own have no common factor: their denominators must be ``declared`` before the
    first backward, and are held against what was counted at the end.

    Args:
        estimate: What the count will be, roughly; only a scale, never part of the result.
        declared: Denominators by term, over all ranks, or `None`.

    Attributes:
        shared: Whether the ranks' gradients meet before they are normalised, so that all of them expect the same.

    Source:
        Laws N1 to N9.
    """

    def __init__(self, *, estimate: float, declared: Mapping[str, float] | None = None) -> None:
        self.estimate = estimate
        self.rows: int | None = None
        self.declared = declared
        self._terms: dict[str, _Term] = {}
        self.shared = False
        self._means = False
        self._constants: dict[tuple[float, torch.dtype, torch.device], Tensor] = {}
        if declared is not None:
            self._terms = {name: _Term(expected=count) for name, count in declared.items()}

    @property
    def names(self) -> list[str]:
        """The terms, in the order they came."""
        return list(self._terms)

    @property
    def spoke(self) -> bool:
        """Whether any microbatch contributed."""
        return any(term.values for term in self._terms.values())

    @property
    def dtype(self) -> torch.dtype:
        """The dtype in which the window's loss is reported: the losses' own, at least float32."""
        values = [value for term in self._terms.values() for value in term.values[:1]]
        return torch.promote_types(values[0].dtype, torch.float32) if values else torch.float32

    def seeds(self, shares: list[Share]) -> list[Tensor]:
        """Give backward's first gradient for each share: ``weight / expected``.

        Args:
            shares: One microbatch's shares.

        Returns:
            0-d tensors of the shares' dtypes and devices.

        Raises:
            UnknownTermError: A term that the window's first microbatch, or ``counts``, did not have.
            MissingCountError: Several terms with counts of their own, and no ``counts``.

        Cost:
            No host synchronisation.
        """
        if not self._terms:
            self._begin(shares)
        return [self._seed(share) for share in shares]

    def add(self, shares: list[Share], *, microbatch: int | None) -> None:
        """Remember one microbatch's shares, detached.

        Args:
            shares: What `seeds` was given.
            microbatch: Index of the microbatch in its window, from 0; `None` for a loss of the whole batch.
        """
        for share in shares:
            term = self._terms[share.name]
            # A copy: some losses of torch (mse_loss, smooth_l1_loss, binary_cross_entropy) return one number in the
            # storage of a tensor as large as their input, which would be held until the window ends.
            term.values.append(share.value.detach().clone())
            term.weights.append(share.weight)
            term.counts.append(share.count)
            term.microbatches.append(microbatch)

    def totals(self, device: torch.device) -> Tensor:
        """Add up every term.

        Args:
            device: Where the result should be.

        Returns:
            Rows of (sum, count), one for each term in the order of `names`; shape ``(terms, 2)``, float64 where the
            device has it.

        Cost:
            A few scalar operations; no host synchronisation.
        """
        dtype = wide_dtype(device)
        total = torch.zeros(len(self._terms), 2, dtype=dtype, device=device)
        for row, term in zip(total, self._terms.values(), strict=True):
            if not term.values:
                continue
            counts = _stack(term.counts, dtype, device)
            # A negative count could hide behind the others in the sum; NaN cannot.
            counts = torch.where(counts < 0, torch.nan, counts)
            sums = _stack([*term.values], dtype, device) * _stack([*term.weights], dtype, device)
            # 0 targets contribute 0, also where their mean was 0/0.
            row[0] = torch.where(counts == 0, 0.0, sums).sum()
            row[1] = counts.sum()
        return total

    def parts(self, name: str) -> list[tuple[int, float, float]]:
        """List what the microbatches gave to one term.

        Args:
            name: The term.

        Returns:
            Of each microbatch its index in the window, its sum and its count.

        Cost:
            Reads every loss of the window: a host synchronisation.
        """
        term = self._terms.get(name)
        if term is None:
            return []
        counts = [float(count) for count in term.counts]
        sums = [float(v) * w if c else 0.0 for v, w, c in zip(term.values, term.weights, counts, strict=True)]
        return [(index or 0, s, count) for index, s, count in zip(term.microbatches, sums, counts, strict=True)]

    def factor(self, counts: Mapping[str, float]) -> float:
        """Turn the accumulated gradient into the mean's: ``expected / count``.

        Args:
            counts: What was counted, by term, over all ranks.

        Returns:
            The factor that the finished gradient has to be multiplied with.

        Raises:
            CountError: A count is negative or not finite, or not what was declared, or terms without declared
                counts turn out to have different ones.
        """
        for name, count in counts.items():
            if not math.isfinite(count) or count < 0:
                wrong = [number for number in self._counts_of(name) if not math.isfinite(number) or number < 0]
                raise CountError(
                    f"a count of the term {name!r} is {wrong[0] if wrong else count:g}; counts must be finite and at "
                    "least 0"
                )
        if self.declared is not None:
            self._check_declared(counts)
            return 1.0
        if len(set(counts.values())) > 1:
            listed = ", ".join(f"{name!r} has {count:g}" for name, count in counts.items())
            raise CountError(
                f"the terms of the loss were counted over different numbers of samples: {listed}; each needs its own "
                "denominator before the first backward: pass counts=, a function of the whole batch that returns them"
            )
        name, count = next(iter(counts.items()))
        if name in self._terms:
            return self._terms[name].expected / count
        # A rank without microbatches has no terms: it has nothing to scale either, unless it has part of the sum.
        return _power_of_two(self.estimate) / count if self.shared else 1.0

    def outlook(self, *, ranks: int = 1) -> float:
        """Foretell `factor`, after the first `seeds`.

        Args:
            ranks: How many there are, each with about as many rows.

        Returns:
            The factor itself where the count is known beforehand; otherwise what it would be for the estimate.
        """
        if self.declared is not None:
            return 1.0
        count = float(self.rows * ranks) if self._means and self.rows else self.estimate
        return next(iter(self._terms.values())).expected / count if self._terms else 1.0

    def first_nonfinite(self) -> int | None:
        """Find the first microbatch whose loss is infinite or NaN.

        Returns:
            Its index in the window, or `None`.

        Cost:
            Reads every loss of the window: a host synchronisation, for the error path only.
        """
        found = [
            index
            for term in self._terms.values()
            for index, value, count in zip(term.microbatches, term.values, term.counts, strict=True)
            if index is not None and not torch.isfinite(value) and float(count) != 0
        ]
        return min(found, default=None)

    def _counts_of(self, name: str) -> list[float]:
        term = self._terms.get(name)
        return [] if term is None else [float(count) for count in term.counts]

    def _begin(self, shares: list[Share]) -> None:
        own = [share.name for share in shares if not share.is_mean]
        if len(shares) > 1 and own:
            raise MissingCountError(
                f"the loss has the terms {', '.join(repr(share.name) for share in shares)}, and {own[0]!r} has a count "
                "of its own: each term's denominator is needed before the first backward; pass counts=, a function of "
                f"the whole batch that returns them, for example counts=lambda batch: {{{own[0]!r}: ...}}"
            )
        self._means = not own
        # One number for all terms, since one factor is to correct them all.
        exact = all(share.is_mean and share.value.dtype in {torch.float32, torch.float64} for share in shares)
        expected = float(self.rows) if exact and self.rows else _power_of_two(self.estimate)
        self._terms = {share.name: _Term(expected=expected) for share in shares}

    def _seed(self, share: Share) -> Tensor:
        term = self._terms.get(share.name)
        if term is None and self.declared is not None and share.is_mean and self.rows:
            # A mean over samples needs no declaration: the rows of the batch are its denominator.
            term = self._terms[share.name] = _Term(expected=float(self.rows))
        if term is None:
            raise UnknownTermError(
                f"the loss has a term {share.name!r}, and this window's terms are "
                f"{', '.join(repr(name) for name in self._terms)}: every term has to be in the first microbatch's "
                "loss, or in what counts= returns"
            )
        if not term.expected > 0:
            raise CountError(f"counts= declared 0 for the term {share.name!r}, and a microbatch contributed to it")
        seed = self._constant(share.weight / term.expected, like=share.value)
        if isinstance(share.count, Tensor):
            # A count on the device is not read: a count of 0 turns the gradient off instead.
            seed = torch.where(share.count.to(seed.device) == 0, torch.zeros_like(seed), seed)
        return seed

    def _constant(self, number: float, *, like: Tensor) -> Tensor:
        # All microbatches of one size have the same seed, and making a tensor costs more than finding one.
        key = (number, like.dtype, like.device)
        if key not in self._constants:
            self._constants[key] = torch.full((), number, dtype=like.dtype, device=like.device)
        return self._constants[key]

    def _check_declared(self, counts: Mapping[str, float]) -> None:
        declared = dict(self.declared or {})
        for name in {**declared, **counts}:
            expected, counted = declared.get(name, float(self.rows or 0)), counts.get(name, 0.0)
            if not math.isclose(counted, expected, rel_tol=1e-9):
                raise CountError(
                    f"counts= declared {expected:g} for the term {name!r}, and the "
                    f"microbatches counted {counted:g}; both must count the same targets"
                )


def _stack(numbers: list[int | float | Tensor], dtype: torch.dtype, device: torch.device) -> Tensor:
    if any(isinstance(number, Tensor) for number in numbers):
        return torch.stack([torch.as_tensor(number, device=device).detach().to(dtype) for number in numbers])
    return torch.tensor(numbers, dtype=dtype, device=device)


def _power_of_two(number: float) -> float:
    return 2.0 ** round(math.log2(number)) if number > 0 else 1.0
