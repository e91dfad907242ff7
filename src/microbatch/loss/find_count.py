"""Find out what a model's loss is a mean over, by asking the model for the losses of a few rows."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from typing import Any, TypeAlias

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.overrides import TorchFunctionMode

from microbatch.errors import LossError
from microbatch.loss.counted_labels import CHOICES, IGNORED, NAMES, ROWS, Fields, count_in, rows_in, take

_TRIALS = 8  # most sets of rows and labels that a model is asked about
_CLEAR = 10.0  # how many times further off every other count must be
_FINE = 1e-6  # relative error of a float32 mean
_ROWS = 3  # most rows that a model is asked about at once

# What a model raises that is given a label or a keyword that it does not know.
_NOT_TAKEN = (IndexError, RuntimeError, TypeError, ValueError)

LossOf: TypeAlias = Callable[[Fields, bool], float]
"""Returns the loss of a microbatch: its mean, or with True as second argument its sum (``num_items_in_batch=1``)."""


@dataclass(frozen=True, slots=True)
class Found:
    """What a model's loss is a mean over.

    Attributes:
        count: One of `NAMES`.
        takes_items: Whether the model divides by the ``num_items_in_batch`` that it is given.
    """

    count: str
    takes_items: bool


@dataclass(frozen=True, slots=True)
class _Trial:
    """Rows whose loss is compared with that of its two parts."""

    whole: Fields
    parts: Sequence[Fields]
    twice: Fields  # the first part two times: whatever a mean is over, it stays as it is


@dataclass(slots=True)
class _Fit:
    """How far each count is off, over all trials so far.

    Attributes:
        errors: The largest relative error of each count.
        precision: Relative rounding error of one loss.
        noise: The largest relative difference between equal means.
        spread: The largest relative difference between the losses of two parts.
        sums: Whether the losses of the parts added up to that of the whole.
    """

    errors: dict[str, float]
    precision: float
    noise: float = 0.0
    spread: float = 0.0
    sums: bool = True

    @property
    def slack(self) -> float:
        """Relative error that rounding explains."""
        return max(_FINE, self.precision, 2 * self.noise)

    def add(self, trial: _Trial, loss_of: LossOf) -> None:
        """Compare the loss of the whole with those of its parts."""
        whole, twice = loss_of(trial.whole, False), loss_of(trial.twice, False)
        parts = [loss_of(part, False) for part in trial.parts]
        scale = max(abs(whole), 1e-30)
        self.noise = max(self.noise, abs(twice - parts[0]) / scale)
        self.spread = max(self.spread, abs(parts[0] - parts[1]) / scale)
        self.sums = self.sums and abs(sum(parts) - whole) <= 1e-3 * scale
        for name in self.errors:
            counts = [float(count_in(part, name)) for part in trial.parts]
            mean = sum(loss * count for loss, count in zip(parts, counts, strict=True)) / max(sum(counts), 1e-30)
            error = abs(mean - whole) / scale
            self.errors[name] = max(self.errors[name], error if math.isfinite(error) else math.inf)

    def winner(self) -> str | None:
        """Return the count that fits, if every other one is clearly off and the losses could have shown it."""
        name = min(self.errors, key=self.errors.__getitem__)
        others = [error for other, error in self.errors.items() if other != name]
        clear = _CLEAR * max(self.errors[name], self.slack)
        if self.errors[name] > self.slack * 3 or self.spread < clear:
            return None
        return name if all(error > clear for error in others) else None


def find_count(
    loss_of: LossOf, batch: Fields, *, takes_items: bool, ignores: bool = False, precision: float = 0.0
) -> Found | None:
    """Find the count by which the losses of parts make the loss of their union.

    A model that divides by ``num_items_in_batch`` tells its count: its sum over its mean. Any other model is asked for
    the losses of some rows and of their two parts. Labels of these rows are left out at random, so that counts that
    are equal in the batch become unequal.

    Args:
        loss_of: Returns losses, without a graph and without random numbers.
        batch: A microbatch, with at least one label if it has labels.
        takes_items: Whether the model may be given ``num_items_in_batch``.
        ignores: Whether the loss is known to ignore labels of -100.
        precision: Relative rounding error of a loss, in the precision that the model computes in.

    Returns:
        The count; `None` for a microbatch without a single target, which shows nothing.

    Raises:
        LossError: No count fits, or several fit; with the choices.

    Cost:
        Some ten forward passes of at most three rows, once.
    """
    labels, name = _labels_of(batch)
    if labels is not None and not bool((labels != IGNORED).any()):
        return None
    counts = [each for each in NAMES if _is_countable(batch, each)] if labels is not None else [ROWS]
    if labels is not None and labels.ndim < 2:
        counts = counts[:2]
    trials = _natural(batch)
    if labels is not None:
        # On a device, a label that the loss does not know would end the process.
        safe = ignores or _ignores(loss_of, take(batch, [0])) or labels.device.type == "cpu"
        if safe or bool((labels == IGNORED).any()):
            trials = [*_relabelled(batch, labels, name), *trials]
    if takes_items and (told := _told(loss_of, trials[:3] or [_Trial(batch, [], batch)], counts)) is not None:
        return told
    return Found(_fitted(loss_of, trials, _Fit(dict.fromkeys(counts, 0.0), precision)), takes_items=False)


def _fitted(loss_of: LossOf, trials: Sequence[_Trial], fit: _Fit) -> str:
    problem = ""
    for index, trial in enumerate(trials[:_TRIALS]):
        try:
            fit.add(trial, loss_of)
        except (torch.OutOfMemoryError, LossError):
            raise
        except _NOT_TAKEN as error:
            problem = f" ({type(error).__name__}: {error!s:.100})"
            continue
        if index and (winner := fit.winner()) is not None:
            return winner
    if fit.sums and fit.spread > _FINE:
        raise LossError(
            "the model's loss adds up over the rows, so it is no mean; configure it to be a mean (for CTC: "
            'config.ctc_loss_reduction = "mean"), or write a loss function that returns mb.Loss(sum=..., count=...)'
        )
    if not trials or fit.spread <= fit.slack:
        raise LossError(
            "what the model's loss is a mean over cannot be found out from this microbatch: its rows have no losses "
            f"that differ{problem}; {CHOICES}"
        )
    told = ", ".join(f"{name}: {error:.1e} off" for name, error in fit.errors.items())
    raise LossError(
        f"the model's loss is not clearly a mean over one of these counts ({told}); {CHOICES}. A loss of several terms "
        "needs a loss function that returns a dict with an mb.Loss for each"
    )


def _told(loss_of: LossOf, trials: Sequence[_Trial], counts: Sequence[str]) -> Found | None:
    """Return the count that a model tells by its sum over its mean; `None` if it ignores ``num_items_in_batch``."""
    fits, ignored = list(counts), True
    for trial in trials:
        try:
            rows = take(trial.whole, range(min(2, rows_in(trial.whole))))
            mean, total = loss_of(rows, False), loss_of(rows, True)
        except (torch.OutOfMemoryError, LossError):
            raise
        except _NOT_TAKEN:
            return None
        number = total / mean if mean else math.nan
        ignored = ignored and abs(number - 1) < 1e-3
        fits = [each for each in fits if abs(number - float(count_in(rows, each))) <= 1e-3 * abs(number)]
    if ignored:
        return None
    if len(fits) != 1:
        some = " and ".join(fits) or "none of them"
        raise LossError(f"the model divides by num_items_in_batch, and its own count fits {some}; {CHOICES}")
    return Found(fits[0], takes_items=True)


# -- the rows that a model is asked about ------------------------------------------------------------------------------


def _trial(rows: Fields) -> _Trial:
    number = rows_in(rows)
    index = range(number)
    return _Trial(rows, [take(rows, [0]), take(rows, index[1:])], take(rows, [0, 0]))


def _natural(batch: Fields) -> list[_Trial]:
    """Return trials of different rows of the batch, as they are."""
    number = rows_in(batch)
    orders = [[(first + each) % number for each in range(min(_ROWS, number))] for first in range(min(number, 3))]
    return [_trial(take(batch, order)) for order in orders] if number > 1 else []


def _relabelled(batch: Fields, labels: Tensor, name: str) -> list[_Trial]:
    """Return trials with labels that are left out at random, and with others of the batch's labels in their place."""
    random = torch.Generator().manual_seed(0)
    order = [each % rows_in(batch) for each in range(_ROWS)]
    pool = labels[labels != IGNORED].flatten()
    found: list[_Trial] = []
    for index in range(_TRIALS - 2):
        some = labels[torch.tensor(order, device=labels.device)]
        drawn = pool[torch.randint(len(pool), some.shape, generator=random).to(pool.device)]
        kept = _kept(some.shape, index, random).to(some.device)
        found.append(_trial(take(batch, order, **{name: drawn.where(kept, torch.full_like(some, IGNORED))})))
    return found


def _kept(shape: torch.Size, index: int, random: torch.Generator) -> Tensor:
    """Draw which labels stay: the first row has few, and every part has at least one beside a first label."""
    if len(shape) == 1:
        return torch.tensor([each in {0, 1 + index % 2} for each in range(shape[0])])
    share = torch.tensor([0.1, 0.7, 0.4]).view(-1, *[1] * (len(shape) - 1))
    kept = torch.rand(shape, generator=random) < share
    for row in range(shape[0]):
        kept[row][..., 0] = (row + index) % 2 == 0
    kept[:2, ..., -1 - index % max(1, shape[-1] - 1)] = True
    return kept


def _labels_of(batch: Fields) -> tuple[Tensor | None, str]:
    """Return the classes that a loss is about, and their name; `None` for a batch without classes."""
    name = "labels" if batch.get("shift_labels") is None else "shift_labels"
    labels = batch.get(name)
    is_classes = isinstance(labels, Tensor) and labels.ndim and not labels.is_floating_point()
    return (labels if is_classes else None), name


def _is_countable(batch: Fields, name: str) -> bool:
    with suppress(LossError):
        return bool(count_in(batch, name) > 0)
    return False


class _IgnoredLabels(TorchFunctionMode):
    """Record which labels the cross-entropies inside the block ignore."""

    def __init__(self) -> None:
        super().__init__()
        self.found = set[int]()

    def __torch_function__(  # noqa: PLR0917 - torch calls it
        self, func: Any, types: Any, args: Any = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        given = kwargs or {}
        if func in {F.cross_entropy, F.nll_loss}:
            self.found.add(given.get("ignore_index", IGNORED))
        return func(*args, **given)


def _ignores(loss_of: LossOf, batch: Fields) -> bool:
    """Return whether the model's cross-entropies are seen, and ignore labels of -100.

    Raises:
        LossError: It ignores another label.
    """
    with _IgnoredLabels() as seen:
        loss_of(batch, False)
    others = seen.found - {IGNORED}
    if others:
        raise LossError(
            f"the model's loss ignores the label {others.pop()}, and the counts by name leave out {IGNORED}; pass "
            "count= a function that returns the count of a microbatch, such as lambda b: (b['labels'] != 255).sum()"
        )
    return bool(seen.found)
