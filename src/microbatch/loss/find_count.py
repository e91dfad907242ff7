"""Find out what a model's loss is a mean over, by asking the model for the losses of a few rows."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from typing import Any, NoReturn, TypeAlias

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.overrides import TorchFunctionMode

from microbatch.errors import LossError
from microbatch.loss.asked_rows import Trial, changed_trials, natural_trials, relabelled_trials
from microbatch.loss.counted_labels import (
    CHOICES,
    IGNORED,
    LABELS,
    NAMES,
    NEXT_LABELS,
    ROWS,
    Fields,
    count_in,
    rows_in,
    take,
)
from microbatch.pages import page

_CLEAR = 10.0  # how many times further off every other count must be
_FINE = 1e-6  # relative error of a float32 mean
_LATER = 10.0  # how many times the rounding error shows, in a later window, that a count was wrong
_MOST_NOISE = 1e-2  # largest difference between equal means that rounding explains
_HANDED = 3  # trials of a model that tells its count

_OTHER_COUNT = (
    "pass count= a function that returns what the loss of a microbatch is a mean over: with a mask, such as "
    "lambda b: b['attention_mask'].sum(); with class weights, lambda b: weights[b['labels']].sum()"
)
_TERMS = "A loss of several terms needs a loss function that returns a dict with an mb.Loss for each"
_COMPARES = (
    "nor over weights of the rows: it compares rows with one another (such as CLIP and other contrastive losses, hard "
    "mining, or a term of the batch's mean), or adds several means. For a loss that compares rows, pass encode= to "
    "accumulator.step in a loop of your own, and compute the loss from the whole batch ({page})"
)

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


@dataclass(slots=True)
class _Fit:
    """How far each count is off, over all trials so far.

    Attributes:
        errors: The largest relative error of each count.
        precision: Relative rounding error of one loss.
        least: The smallest loss that errors are relative to.
        noise: The largest relative difference between equal means.
        spread: The largest relative difference between the losses of two parts.
        sums: Whether the losses of the parts added up to that of the whole.
    """

    errors: dict[str, float]
    precision: float
    least: float = 1e-30
    noise: float = 0.0
    spread: float = 0.0
    sums: bool = True

    @property
    def slack(self) -> float:
        """Relative error that rounding explains."""
        return max(_FINE, self.precision, 2 * min(self.noise, _MOST_NOISE))

    def add(self, trial: Trial, loss_of: LossOf) -> None:
        """Compare the loss of the whole with those of its parts."""
        whole, twice = loss_of(trial.whole, False), loss_of(trial.twice, False)
        parts = [loss_of(part, False) for part in trial.parts]
        if trial.changed and not math.isfinite(whole):
            return  # a copy that this loss has no value for
        scale = max(abs(whole), self.least)
        self.noise = max(self.noise, abs(twice - parts[0]) / scale)
        self.spread = max(self.spread, abs(parts[0] - parts[1]) / scale)
        self.sums = self.sums and abs(sum(parts) - whole) <= 1e-3 * scale
        for name in self.errors:
            counts = [float(count_in(part, name)) for part in trial.parts]
            if not sum(counts):
                continue  # a mean over nothing
            mean = sum(loss * count for loss, count in zip(parts, counts, strict=True) if count) / sum(counts)
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
        Some thirty forward passes of at most three rows.
    """
    if takes_items and not _is_countable(batch, ROWS):  # packed: only the whole batch can be asked about
        labels = [each for each in (LABELS, NEXT_LABELS) if _is_countable(batch, each)]
        if labels and (told := _told(loss_of, [Trial(batch, [], batch)], labels)) is not None:
            return told
    asked = _asked(loss_of, batch, ignores=ignores)
    if asked is None:
        return None
    trials, needed, counts = asked
    if takes_items and (told := _told(loss_of, trials[:_HANDED] or [Trial(batch, [], batch)], counts)) is not None:
        fit = _Fit({told.count: 0.0}, max(precision, _LATER * _FINE))
        _ask_all(loss_of, trials[:_HANDED], fit)
        if fit.errors[told.count] > _LATER * fit.slack:
            _refuse(loss_of, trials, fit)
        return told
    return Found(
        _fitted(loss_of, trials, _Fit(dict.fromkeys(counts, 0.0), precision), needed=needed), takes_items=False
    )


def confirm_count(
    loss_of: LossOf, batch: Fields, found: Found, *, tolerance: float, least: float, ignores: bool = False
) -> None:
    """Compare the count that was found with a later microbatch.

    Args:
        loss_of: As for `find_count`.
        batch: A microbatch.
        found: What the loss was found to be a mean over.
        tolerance: Relative error that rounding may have in a later window.
        least: The smallest loss that errors are relative to: a trained model has small losses, and no smaller errors.
        ignores: As for `find_count`.

    Raises:
        LossError: The losses of parts no longer make the loss of their union.

    Cost:
        As for `find_count`.
    """
    asked = _asked(loss_of, batch, ignores=ignores)
    if asked is None:
        return
    trials, needed, _ = asked
    fit = _Fit({found.count: 0.0}, tolerance / _LATER, least)
    _ask_all(loss_of, trials[:needed], fit)
    if fit.errors[found.count] > _LATER * fit.slack:
        _refuse(
            loss_of, trials, fit, why=f"was taken for a mean over {found.count}, and this batch shows that it is not"
        )


def _asked(loss_of: LossOf, batch: Fields, *, ignores: bool) -> tuple[list[Trial], int, list[str]] | None:
    """Return the trials, how many of them must fit, and the counts; `None` without a target."""
    labels, name = labels_of(batch)
    if labels is not None and not bool((labels != IGNORED).any()):
        return None
    counts = [each for each in NAMES if _is_countable(batch, each)] if labels is not None else [ROWS]
    if labels is not None and labels.ndim < 2:
        counts = counts[:2]
    seen = None if labels is None or ignores else _cross_entropies(loss_of, take(batch, [0]))
    on_cpu = all(each.device.type == "cpu" for each in batch.values() if isinstance(each, Tensor))
    # On a device, a label that the loss does not know would end the process.
    safe = ignores or on_cpu or (seen is not None and bool(seen.found))
    trials = [
        *changed_trials(batch, name, labels, ignores=safe, classes=0 if seen is None else seen.classes),
        *natural_trials(batch),
    ]
    needed = len(trials)
    if labels is not None and (safe or bool((labels == IGNORED).any())):
        relabelled = relabelled_trials(batch, labels, name, classes=0 if seen is None else seen.classes)
        trials = [*relabelled[:2], *trials, *relabelled[2:]]
        needed += 2
    return trials, needed, counts


def _ask_all(loss_of: LossOf, trials: Sequence[Trial], fit: _Fit) -> str:
    """Add trials to a fit; return what the model raised where it did not take one."""
    problem = ""
    for trial in trials:
        try:
            fit.add(trial, loss_of)
        except (torch.OutOfMemoryError, LossError):
            raise
        except _NOT_TAKEN as error:
            problem = f" ({type(error).__name__}: {error!s:.100})"
    return problem


def _fitted(loss_of: LossOf, trials: Sequence[Trial], fit: _Fit, *, needed: int) -> str:
    problem = _ask_all(loss_of, trials[:needed], fit)
    for trial in (None, *trials[needed:]):
        if trial is not None:
            problem = _ask_all(loss_of, [trial], fit) or problem
        if (winner := fit.winner()) is not None:
            return winner
        if min(fit.errors.values()) > _LATER * fit.slack:
            break
    if fit.sums and fit.spread > _FINE:
        raise LossError(
            "the model's loss adds up over the rows, so it is no mean. Configure it to be a mean (for CTC: "
            'config.ctc_loss_reduction = "mean"), or write a loss function that returns mb.Loss(sum=..., count=...)'
        )
    if not trials or fit.spread <= fit.slack:
        one = bool(trials) and not any(not each.changed for each in trials)
        why = "it has one row, and a mean shows where rows differ" if one else "its rows have no losses that differ"
        raise LossError(
            f"what the model's loss is a mean over cannot be found out from this microbatch: {why}{problem}; {CHOICES}"
        )
    return _refuse(loss_of, trials, fit)


def _refuse(
    loss_of: LossOf, trials: Sequence[Trial], fit: _Fit, *, why: str = "is not clearly a mean over one of these counts"
) -> NoReturn:
    """Raise the error for a loss that fits no count: does it weigh its rows, or compare them?"""
    told = ", ".join(f"{name}: {error:.1e} off" for name, error in fit.errors.items())
    if any(_compares(loss_of, each.whole, fit) for each in trials if not each.changed):
        raise LossError(f"the model's loss {why} ({told}), {_COMPARES.format(page=page('coupled'))}. {_TERMS}")
    clearly = min(fit.errors.values()) > _LATER * fit.slack
    raise LossError(f"the model's loss {why} ({told}); {_OTHER_COUNT if clearly else CHOICES}. {_TERMS}")


def _compares(loss_of: LossOf, rows: Fields, fit: _Fit) -> bool:
    """Return whether no weights of single rows explain the losses of pairs and of all three together."""
    if fit.noise > _CLEAR * _MOST_NOISE:
        return True  # the same row two times has another loss
    number = rows_in(rows)
    try:
        one = [loss_of(take(rows, [each]), False) for each in range(number)]
        weights = [1.0]
        for other in range(1, number):
            pair = loss_of(take(rows, [0, other]), False)
            if abs(one[0] - one[other]) <= _CLEAR * fit.slack * abs(pair):
                return False  # equal losses show no weight
            weights.append((one[0] - pair) / (pair - one[other]) if pair != one[other] else math.inf)
        whole = loss_of(rows, False)
    except _NOT_TAKEN:
        return False
    if not all(math.isfinite(each) for each in (*one, whole)):
        return False
    if not all(0 < each < math.inf for each in weights):
        return True
    mean = sum(loss * weight for loss, weight in zip(one, weights, strict=True)) / sum(weights)
    spread = (max(one) - min(one)) / max(abs(whole), 1e-30)
    # A small difference of two losses makes a weight less exact.
    exact = min(abs(one[0] - each) for each in one[1:]) / max(abs(whole), 1e-30)
    return abs(mean - whole) > _LATER * fit.slack * abs(whole) * max(1.0, spread / exact)


def _told(loss_of: LossOf, trials: Sequence[Trial], counts: Sequence[str]) -> Found | None:
    """Return the count that a model tells by its sum over its mean; `None` if it ignores ``num_items_in_batch``."""
    fits, ignored = list(counts), True
    for trial in trials:
        try:
            packed = not _is_countable(trial.whole, ROWS)
            rows = trial.whole if packed else take(trial.whole, range(min(2, rows_in(trial.whole))))
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


def labels_of(batch: Fields) -> tuple[Tensor | None, str]:
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
        self.found, self.classes = set[int](), 0

    def __torch_function__(  # noqa: PLR0917 - torch calls it
        self, func: Any, types: Any, args: Any = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        given = kwargs or {}
        if func in {F.cross_entropy, F.nll_loss}:
            self.found.add(given.get("ignore_index", IGNORED))
            scores = args[0] if args else given["input"]
            self.classes = scores.shape[min(1, scores.ndim - 1)]
        return func(*args, **given)


def _cross_entropies(loss_of: LossOf, batch: Fields) -> _IgnoredLabels:
    """Return the cross-entropies of a model that are seen; refuse those that ignore another label than -100."""
    with _IgnoredLabels() as seen:
        loss_of(batch, False)
    others = seen.found - {IGNORED}
    if others:
        raise LossError(
            f"the model's loss ignores the label {others.pop()}, and the counts by name leave out {IGNORED}. Pass "
            "count= a function that returns the count of a microbatch, such as lambda b: (b['labels'] != 255).sum()"
        )
    return seen
