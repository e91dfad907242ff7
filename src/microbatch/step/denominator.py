"""The denominator of a window: how its loss is divided exactly once. This module is the central idea of the library.

The gradient of the effective batch is ``sum_i grad S_i / sum_i c_i``. Microbatch ``i`` has the summed loss ``S_i`` over
``c_i`` samples or targets. All counts are known only after the last microbatch.

1. Before the first backward, the window *expects* a count: the rows for a mean over rows, the declared ``counts=``, or
   an estimate: the last window's count. For narrow losses it is a power of two, so dividing by it rounds nothing.
2. Every backward starts from the *seed* ``weight / expected`` (`Denominator.seeds`). So the accumulated gradient is
   ``sum_i grad S_i / expected``.
3. At the end, over all ranks, one *factor* ``expected / count`` makes the gradient exact (`Denominator.factor`),
   whatever was expected. The gradient is multiplied by it in the same pass as for clipping.

Several terms with different counts have no common factor. Their denominators are declared before the first backward.
The factor is then 1, and the counted numbers must agree with the declared ones.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from operator import mul
from typing import Any, TypeAlias

import torch
from torch import Tensor

from microbatch.errors import CountError, MissingCountError, UnknownTermError, WindowError
from microbatch.kind_words import kind_of
from microbatch.loss.loss import Count, Share, check_number, wide_dtype
from microbatch.step.host_numbers import is_whole

Counts: TypeAlias = Mapping[str, Count] | Callable[..., Mapping[str, Count]]
Total: TypeAlias = Callable[[float, Mapping[str, float]], tuple[float, Mapping[str, float]]]
"""Adds up rows and counts over the ranks."""
_NUMBERS = {int, float}


@dataclass(slots=True)
class _Term:
    """The sums and counts of one term so far; tensors stay on the device.

    Attributes:
        expected: The expected count.
        added: For each microbatch the loss, its weight, its count, and the index of the microbatch.
        seeds: The seeds so far, by weight, dtype and device.
    """

    expected: float
    added: list[tuple[Tensor | float, float, Count, int | None]] = field(default_factory=list)
    seeds: dict[tuple[float, torch.dtype, torch.device], Tensor] = field(default_factory=dict)

    @property
    def counts(self) -> list[Count]:
        """The count of each microbatch."""
        return [count for _, _, count, _ in self.added]


class Denominator:
    """Collect the sums and counts of a window's loss without synchronisation, and compute the division by the count.

    Args:
        counts: The denominators by term: a dict, or a function of the whole batch. `None` divides by what was counted.
        estimate: The expected count; only a scale, never part of the result. `None` takes the rows of the batch.

    Attributes:
        rows: Rows of the window on this rank; `None` where all ranks expect the same count.
        declared: Denominators by term, over all ranks, once they are known; `None` without ``counts``.
        shared: Whether all ranks expect the same count, because their gradients are reduced before the division.
        metrics: Sum of each metric so far, by name, on the device.
        means: Whether every term is a plain mean over the rows of a microbatch.
        declares: Whether the user gave ``counts=``.

    Source:
        Laws N1 to N9.
    """

    def __init__(self, counts: Counts | None = None, *, estimate: float | None = None) -> None:
        self._counts, self._estimate, self.declares = counts, estimate, counts is not None
        self.rows: int | None = None
        self.declared: Mapping[str, float] | None = None
        self.shared = self.means = False
        self.metrics: dict[str, Tensor] = {}
        self._expected = estimate or 1.0
        self._terms: dict[str, _Term] = {}
        self._wide = False

    # -- before the first backward -------------------------------------------------------------------------------------

    def expect(self, batches: Sequence[Any], rows: int | None, *, begun: bool, total: Total) -> None:
        """Set the expected count from the window's batches.

        Args:
            batches: This rank's share of the effective batch.
            rows: Their rows; `None` if they are not known.
            begun: Whether a backward has run already.
            total: Adds up rows and counts over the ranks; called only with ``counts``.

        Raises:
            WindowError: A backward has run, and ``counts`` needs the whole batch before it.
            MissingCountError: ``counts`` is not, or does not return, a dict.
        """
        if self._counts is None:
            self.rows, self._expected = rows, self._estimate or float(rows or len(batches))
            return
        if begun:
            raise WindowError("counts= needs the whole batch before the first backward; call window.split once, first")
        self.declare(*total(float(rows or 0), _evaluated(self._counts, batches)))

    def declare(self, rows: float, counts: Mapping[str, float]) -> None:
        """Set the denominators over all ranks: ``rows`` for terms that are means over rows, ``counts`` for others."""
        self.rows, self.declared, self._expected = int(rows), counts, rows
        self._terms = {name: _Term(expected=count) for name, count in counts.items()}

    def share(self, rows: float) -> None:
        """Expect the rows of all ranks on every rank, because gradients are reduced before the division."""
        if self.declared is None:
            self.rows, self._expected, self.shared = None, self._estimate or rows, True

    def need(self, *, alone: bool) -> None:
        """Check before a backward that declared counts are known; `MissingCountError` if they need the whole batch."""
        if self._counts is None or self.declared is not None:
            return
        if callable(self._counts) or not alone:
            raise MissingCountError(
                "counts= is evaluated on the whole batch, on all ranks together, before the first backward; let "
                "window.split(batch) cut it"
            )
        self.declare(0.0, _evaluated(self._counts, []))

    def whole(self, shares: list[Share], *, rows: int) -> list[Share]:
        """Set the denominators from a loss of the whole batch, and return the shares with a count above 0."""
        if len(shares) > 1 and any(not share.is_mean for share in shares):
            counts = {share.name: _number(share.count, share.name) for share in shares}
            self.declare(float(rows), {name: count for name, count in counts.items() if count})
            return [share for share in shares if counts[share.name]]
        self.rows, self._expected = rows, self._estimate or float(rows)
        return shares

    # -- every backward ------------------------------------------------------------------------------------------------

    def seeds(self, shares: Sequence[Share]) -> list[Tensor]:
        """Return the first gradient of each share's backward: ``weight / expected``.

        Args:
            shares: The shares of one microbatch.

        Returns:
            0-d tensors of the shares' dtypes and devices.

        Raises:
            UnknownTermError: Neither the first microbatch's loss nor ``counts`` has the term.
            MissingCountError: Several terms have different counts, and ``counts`` is not given.
            CountError: A term contributes, but ``counts`` declares 0 for it.

        Cost:
            No host synchronisation.
        """
        if not self._terms:
            self._begin(shares)
        seeds: list[Tensor] = []
        for share in shares:
            term, value = self._terms.get(share.name) or self._new_term(share), share.value
            # Microbatches of one size have the same seed, and a lookup is faster than creating a tensor.
            key = share.weight, value.dtype, value.device
            seed = term.seeds.get(key)
            if seed is None:
                seed = term.seeds[key] = self._new_seed(share, term.expected)
            if isinstance(share.count, Tensor):
                # A count on the device is not read by the host, so a count of 0 sets the seed to 0 on the device.
                seed = torch.where(share.count.to(seed.device) == 0, torch.zeros_like(seed), seed)
            seeds.append(seed)
        return seeds

    def add(self, shares: Sequence[Share], microbatch: int | None) -> None:
        """Add the shares of one microbatch, detached; its index is `None` for a loss of the whole batch."""
        for share in shares:
            value = share.value
            # A copy, because some losses of torch (such as mse_loss) return a number in the storage of a tensor as
            # large as their input, and would keep this storage alive until the window ends. The CPU never waits for
            # a number of its own, and reading it takes a third of the time.
            kept = value.item() if type(value) is Tensor and value.is_cpu else value.data.clone()
            self._terms[share.name].added.append((kept, share.weight, share.count, microbatch))
            if share.metrics:
                for name, metric in share.metrics.items():
                    self.metrics[name] = self.metrics[name] + metric if name in self.metrics else metric

    def estimated_factor(self, *, ranks: int) -> float:
        """Estimate the final `factor`, exactly if the count is known; only a scale, never part of the result."""
        if self.declared is not None or not self._terms:
            return 1.0
        count = float(self.rows * ranks) if self.means and self.rows else self._expected
        return next(iter(self._terms.values())).expected / count

    # -- the end -------------------------------------------------------------------------------------------------------

    @property
    def names(self) -> list[str]:
        """Names of the terms, in order of appearance."""
        return list(self._terms)

    @property
    def contributed(self) -> bool:
        """Whether any microbatch contributed."""
        return any(term.added for term in self._terms.values())

    @property
    def dtype(self) -> torch.dtype:
        """The dtype in which the window's loss is reported: the dtype of the losses, at least float32."""
        return torch.float64 if self._wide else torch.float32

    def totals(self, device: torch.device) -> list[tuple[Tensor | float, Tensor | float]]:
        """Add up every term.

        Args:
            device: The device of the tensors.

        Returns:
            Sum and count of each term, in the order of `names`: numbers if they are on the host, otherwise 0-d tensors,
            float64 if the device has it.

        Cost:
            No host synchronisation.
        """
        dtype = wide_dtype(device)
        return [_total(term, dtype, device) for term in self._terms.values()]

    def factor(self, counts: Mapping[str, float]) -> float:
        """Return the factor that turns the accumulated gradient into the mean's gradient: ``expected / count``.

        Raises:
            CountError: A count is negative, not finite, or not equal to the declared one; or terms have different
                counts, and ``counts`` is not given.
        """
        for name, count in counts.items():
            if not math.isfinite(count) or count < 0:
                found = [float(number) for number in self._terms[name].counts] if name in self._terms else []
                wrong = [number for number in found if not math.isfinite(number) or number < 0]
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
        # A rank without microbatches has no terms, but it may hold a part of the reduced gradients to scale.
        return _power_of_two(self._expected) / count if self.shared else 1.0

    def per_microbatch(self, name: str) -> list[tuple[int, float, float]]:
        """Return index, sum and count of each microbatch for one term; reads every loss from the device."""
        term = self._terms.get(name)
        if term is None:
            return []
        read = [(index or 0, value, weight, float(count)) for value, weight, count, index in term.added]
        return [(index, float(value) * weight if count else 0.0, count) for index, value, weight, count in read]

    def first_nonfinite(self) -> int | None:
        """Return the index of the first microbatch whose loss is infinite or NaN, or `None`; reads every loss."""
        found = [
            index
            for term in self._terms.values()
            for value, _, count, index in term.added
            if index is not None and not math.isfinite(float(value)) and float(count) != 0
        ]
        return min(found, default=None)

    # -- how -----------------------------------------------------------------------------------------------------------

    def _begin(self, shares: Sequence[Share]) -> None:
        own = [share.name for share in shares if not share.is_mean]
        if own and len(shares) > 1:
            raise MissingCountError(
                f"the loss has the terms {', '.join(repr(share.name) for share in shares)}, and {own[0]!r} has a count "
                "of its own: each term's denominator is needed before the first backward. Pass counts=, a function of "
                f"the whole batch that returns them, for example counts=lambda batch: {{{own[0]!r}: ...}}"
            )
        self.means = not own
        # One number for all terms, as one factor corrects all. If it is the final count, activations' hooks are exact.
        expected = float(self.rows) if self.means and self.rows else self._expected
        guessed = self.shared or not (self._estimate or (self.means and self.rows))  # shared also without terms
        narrow = any(share.value.dtype not in {torch.float32, torch.float64} for share in shares)
        expected = _power_of_two(expected) if narrow or guessed else expected
        self._terms = {share.name: _Term(expected=expected) for share in shares}

    def _new_seed(self, share: Share, expected: float) -> Tensor:
        if not expected > 0:
            raise CountError(f"counts= declared 0 for the term {share.name!r}, and a microbatch contributed to it")
        value = share.value
        self._wide = self._wide or value.dtype is torch.float64
        return torch.full((), share.weight / expected, dtype=value.dtype, device=value.device)

    def _new_term(self, share: Share) -> _Term:
        if self.declared is not None and share.is_mean and self.rows:
            # A mean over samples needs no declared count: its denominator is the rows of the batch.
            return self._terms.setdefault(share.name, _Term(expected=float(self.rows)))
        raise UnknownTermError(
            f"the loss has a term {share.name!r}, and this window's terms are "
            f"{', '.join(repr(name) for name in self._terms)}: every term has to be in the first microbatch's "
            "loss, or in what counts= returns"
        )

    def _check_declared(self, counts: Mapping[str, float]) -> None:
        declared = dict(self.declared or {})
        for name in {**declared, **counts}:
            expected, counted = declared.get(name, float(self.rows or 0)), counts.get(name, 0.0)
            if not math.isclose(counted, expected, rel_tol=1e-9):
                raise CountError(
                    f"counts= declared {expected:g} for the term {name!r}, and the "
                    f"microbatches counted {counted:g}; both must count the same targets"
                )


def _evaluated(counts: Counts, batches: Sequence[Any]) -> dict[str, float]:
    """Evaluate ``counts`` on the batches of a window, and add up the results by term."""
    found = [counts(batch) for batch in batches] if callable(counts) else [counts]
    total: dict[str, float] = {}
    for each in found:
        if not isinstance(each, Mapping):
            raise MissingCountError(f"counts= must give a dict of term to count, not {kind_of(each)}")
        for name, count in each.items():
            total[str(name)] = total.get(str(name), 0.0) + _number(count, str(name))
    return total


def _number(count: Count, name: str) -> float:
    if isinstance(count, Tensor):
        if count.numel() != 1 or count.dtype.is_complex or count.is_meta:
            raise CountError(
                f"the count of {name!r} must be one number, not a tensor of shape {tuple(count.shape)}, {count.dtype}, "
                f"on {count.device}"
            )
        count = count.item()
    return check_number(count, f"the count of {name!r}")


def _total(term: _Term, dtype: torch.dtype, device: torch.device) -> tuple[Tensor | float, Tensor | float]:
    """Add up the sums and the counts of a term."""
    if not term.added:
        return 0.0, 0.0
    values, weights, counts, _ = zip(*term.added, strict=True)
    on_host = _NUMBERS.issuperset(map(type, counts))  # checked, and none is 0
    read = _NUMBERS.issuperset(map(type, values))
    if on_host and read:
        return float(sum(map(mul, values, weights))), float(sum(counts))
    as_tensor = partial(torch.tensor, dtype=dtype, device=device)
    if read:
        tensors = as_tensor(values)
    else:
        tensors = torch.stack([each.to(device) if isinstance(each, Tensor) else as_tensor(each) for each in values])
    if on_host and len(set(weights)) == 1:
        return tensors.sum(dtype=dtype) * weights[0], float(sum(counts))
    sums = tensors.to(dtype) * torch.tensor(weights, dtype=dtype, device=device)
    if on_host:
        return sums.sum(), float(sum(counts))
    whole = dtype is torch.float32 and all(map(is_whole, counts))  # without float64, they would be rounded
    kind = torch.int64 if whole else dtype
    counts = torch.stack([torch.as_tensor(count, device=device).detach().to(kind) for count in counts])
    # A sum could hide a negative count; it cannot hide NaN, or so low a number.
    counts = torch.where(counts < 0, -(1 << 40) if whole else torch.nan, counts)
    # A count of 0 contributes 0, even if its mean was 0/0.
    return torch.where(counts == 0, 0.0, sums).sum(), counts.sum()


def _power_of_two(number: float) -> float:
    return 2.0 ** round(math.log2(number)) if number > 0 else 1.0
