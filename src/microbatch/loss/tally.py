"""Sum the losses and counts of a window, and divide its gradient by one denominator."""

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
    """The shares of one term so far; tensors stay on the device and are not read."""

    expected: float
    values: list[Tensor] = field(default_factory=list[Tensor])
    weights: list[float] = field(default_factory=list[float])
    counts: list[int | float | Tensor] = field(default_factory=list["int | float | Tensor"])
    microbatches: list[int | None] = field(default_factory=list[int | None])


class Tally:
    r"""Collect the losses and counts of a window without a host synchronisation.

    The gradient is ``sum_i grad S_i / sum_i c_i``, and the counts are known only at the end. So backward runs on
    ``S_i / expected``, and the finished gradient is multiplied once by ``expected / sum_i c_i``. The result is exact
    whatever ``expected`` is. Where the count is not known in advance, ``expected`` is a power of two, so that the
    division does not round.

    Several terms with their own counts have no common factor. Their denominators must be ``declared`` before the first
    backward, and are compared with the counts at the end.

    Args:
        estimate: Estimate of the final count. It only sets a scale, and does not change the result.
        declared: Denominators by term, over all ranks; or `None`.

    Attributes:
        estimate: Estimate of the final count.
        rows: Number of rows of this rank's batch; `None` if it is not known.
        declared: Denominators by term, or `None`.
        shared: Whether gradients are summed over the ranks before they are scaled, so that all ranks need the same
            ``expected``.

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
        """The names of the terms, in the order of their first share."""
        return list(self._terms)

    @property
    def spoke(self) -> bool:
        """Whether any microbatch has contributed."""
        return any(term.values for term in self._terms.values())

    @property
    def dtype(self) -> torch.dtype:
        """The dtype of the reported loss: the dtype of the losses, at least float32."""
        values = [value for term in self._terms.values() for value in term.values[:1]]
        return torch.promote_types(values[0].dtype, torch.float32) if values else torch.float32

    def seeds(self, shares: list[Share]) -> list[Tensor]:
        """Return the gradient with which backward starts at each share: ``weight / expected``.

        Args:
            shares: The shares of one microbatch.

        Returns:
            One 0-d tensor per share, of the share's dtype and device.

        Raises:
            UnknownTermError: A share belongs to a term that neither the first microbatch nor ``declared`` has.
            MissingCountError: Several terms have their own counts, and ``declared`` is `None`.
            CountError: A share belongs to a term whose declared denominator is 0.

        Cost:
            No host synchronisation.
        """
        if not self._terms:
            self._create_terms(shares)
        return [self._seed(share) for share in shares]

    def add(self, shares: list[Share], *, microbatch: int | None) -> None:
        """Record the shares of one microbatch, detached.

        Args:
            shares: The same shares that `seeds` got.
            microbatch: Index of the microbatch in its window, from 0; `None` for a loss of the whole batch.
        """
        for share in shares:
            term = self._terms[share.name]
            # Copied, because some losses of torch (mse_loss, smooth_l1_loss, binary_cross_entropy) return one number
            # in the storage of a tensor as large as their input, which would stay in memory until the window ends.
            term.values.append(share.value.detach().clone())
            term.weights.append(share.weight)
            term.counts.append(share.count)
            term.microbatches.append(microbatch)

    def totals(self, device: torch.device) -> Tensor:
        """Sum the losses and the counts of each term.

        Args:
            device: Device of the result.

        Returns:
            One row (sum, count) per term, in the order of `names`; shape ``(terms, 2)``, float64 (float32 on MPS). A
            negative count makes the term's count NaN.

        Cost:
            A few scalar operations; no host synchronisation.
        """
        dtype = wide_dtype(device)
        total = torch.zeros(len(self._terms), 2, dtype=dtype, device=device)
        for row, term in zip(total, self._terms.values(), strict=True):
            if not term.values:
                continue
            counts = _stack(term.counts, dtype, device)
            # In the sum, a negative count could go unnoticed; NaN cannot.
            counts = torch.where(counts < 0, torch.nan, counts)
            sums = _stack([*term.values], dtype, device) * _stack([*term.weights], dtype, device)
            # A microbatch without targets contributes 0, also if its mean is 0/0.
            row[0] = torch.where(counts == 0, 0.0, sums).sum()
            row[1] = counts.sum()
        return total

    def parts(self, name: str) -> list[tuple[int, float, float]]:
        """List each microbatch's contribution to one term.

        Args:
            name: Name of the term.

        Returns:
            For each contribution, the microbatch's index in the window, the sum and the count.

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
        """Return the factor that turns the accumulated gradient into the gradient of the mean: ``expected / count``.

        Args:
            counts: The final counts by term, over all ranks.

        Returns:
            The factor for the finished gradient.

        Raises:
            CountError: A count is negative, not finite, or not as declared. Or several terms without declared counts
                have different counts.
        """
        for name, count in counts.items():
            if not math.isfinite(count) or count < 0:
                invalid = [number for number in self._counts_of(name) if not math.isfinite(number) or number < 0]
                raise CountError(
                    f"a count of the term {name!r} is {invalid[0] if invalid else count:g}; counts must be finite and "
                    "at least 0"
                )
        if self.declared is not None:
            self._check_declared(counts)
            return 1.0
        if len(set(counts.values())) > 1:
            listed = ", ".join(f"{name!r} has {count:g}" for name, count in counts.items())
            raise CountError(
                f"the terms of the loss were counted over different numbers of samples: {listed}; each term needs its "
                "own denominator before the first backward: pass counts=, a function of the whole batch that returns "
                "the denominators by term"
            )
        name, count = next(iter(counts.items()))
        if name in self._terms:
            return self._terms[name].expected / count
        # A rank without microbatches has no terms. It has no gradient to scale either, unless it holds a part of a
        # gradient that was summed over the ranks.
        return _power_of_two(self.estimate) / count if self.shared else 1.0

    def outlook(self, *, ranks: int = 1) -> float:
        """Estimate the result of `factor`, after the first call of `seeds`.

        Args:
            ranks: World size; every rank is assumed to have as many rows as this one.

        Returns:
            The exact factor if the count is known in advance; else the factor for the estimated count.
        """
        if self.declared is not None:
            return 1.0
        count = float(self.rows * ranks) if self._means and self.rows else self.estimate
        return next(iter(self._terms.values())).expected / count if self._terms else 1.0

    def first_nonfinite(self) -> int | None:
        """Find the first microbatch whose loss is infinite or NaN.

        Returns:
            Index of the microbatch in the window, or `None`.

        Cost:
            Reads every loss of the window: a host synchronisation. Only used after an error.
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

    def _create_terms(self, shares: list[Share]) -> None:
        own = [share.name for share in shares if not share.is_mean]
        if len(shares) > 1 and own:
            raise MissingCountError(
                f"the loss has the terms {', '.join(repr(share.name) for share in shares)}, and {own[0]!r} has its "
                "own count: each term's denominator is needed before the first backward; pass counts=, a function of "
                "the whole batch that returns the denominators by term, for example "
                f"counts=lambda batch: {{{own[0]!r}: ...}}"
            )
        self._means = not own
        # One number for all terms, because one factor corrects them all.
        exact = all(share.is_mean and share.value.dtype in {torch.float32, torch.float64} for share in shares)
        expected = float(self.rows) if exact and self.rows else _power_of_two(self.estimate)
        self._terms = {share.name: _Term(expected=expected) for share in shares}

    def _seed(self, share: Share) -> Tensor:
        term = self._terms.get(share.name)
        if term is None and self.declared is not None and share.is_mean and self.rows:
            # A mean over samples needs no declared count, because its denominator is the number of rows.
            term = self._terms[share.name] = _Term(expected=float(self.rows))
        if term is None:
            raise UnknownTermError(
                f"the loss has a term {share.name!r}, and this window's terms are "
                f"{', '.join(repr(name) for name in self._terms)}: every term must be in the first microbatch's loss, "
                "or in the result of counts="
            )
        if not term.expected > 0:
            raise CountError(
                f"counts= declared 0 for the term {share.name!r}, and a microbatch contributed to this term; both must "
                "count the same targets"
            )
        seed = self._constant(share.weight / term.expected, like=share.value)
        if isinstance(share.count, Tensor):
            # A count on the device is not read, which would synchronise; where it is 0, the seed becomes 0.
            seed = torch.where(share.count.to(seed.device) == 0, torch.zeros_like(seed), seed)
        return seed

    def _constant(self, number: float, *, like: Tensor) -> Tensor:
        # All microbatches of one size have the same seed, and a look-up costs less than a new tensor.
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
