"""The accumulator as what is checked: its gradient, with some causes switched off."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import count
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.optim import SGD

from microbatch.checking.boundary import Outputs
from microbatch.checking.check_report import Cause
from microbatch.checking.gradient import Gradient, plain, taken
from microbatch.checking.survey import draw_apart
from microbatch.checking.trial_runs import REMEDIED, Play, Stage, mean_of
from microbatch.errors import BatchStatisticsError, NonfiniteError
from microbatch.loss.loss import Count, Loss, shares_of
from microbatch.loss.one_row_norm import size_without_one_row
from microbatch.step.accumulator import Accumulator

COUNTS, COUPLING, ROW_ORDER, LENGTHS = "counts", "coupling", "row_order", "lengths"
ONE_ROW = "one_row"
_WIDE_TAKES = ("lengths", "batch_norm", "buffers", "dropout", "ranks")
"""Options that say what is computed; the others say in which precision, where, or how fast."""
_BY_SLOPES = frozenset({COUPLING, ROW_ORDER})
LossFunction = Callable[[nn.Module, Any], Any]


@dataclass(frozen=True, slots=True)
class Slopes:
    """Hold how the whole batch's loss changes with what the model returned, and with parameters that it uses itself.

    Attributes:
        outputs: One for each tensor that the model returned, of its shape.
        parameters: By name.
    """

    outputs: list[Tensor]
    parameters: dict[str, Tensor]


@dataclass(frozen=True, slots=True, kw_only=True)
class Term:
    """Say what is known of one term of the loss.

    Attributes:
        taken: Share of each microbatch's mean in the accumulator's.
        right: The share that it should have.
        by_slopes: Whether its rows depend on one another or on their places.
    """

    taken: Sequence[float]
    right: Sequence[float]
    by_slopes: bool = False


class Accumulating:
    """Take the gradient that the accumulator hands to the optimizer.

    Args:
        size: Rows of a microbatch.
        options: The accumulator's arguments.
        step: The arguments of its ``step``.

    Attributes:
        terms: What is known of the loss's terms, by name: what switching a cause in the loss off rests on.
        repairs: Whether causes in the loss can be switched off.
    """

    repairs = True

    def __init__(self, *, size: int, options: Mapping[str, Any], step: Mapping[str, Any]) -> None:
        self.size = size
        self.terms: Mapping[str, Term] = {}
        self._options = {name: value for name, value in options.items() if name != "max_grad_norm"}
        self._step = step
        self._found: dict[tuple[int, int, frozenset[str]], Gradient] = {}

    def gradient(self, stage: Stage, off: frozenset[str] = frozenset()) -> Gradient:
        """Run one window on copies.

        Args:
            stage: Where.
            off: Causes that are switched off.

        Returns:
            The gradient that the optimizer was given; all infinite where it was not finite.
        """
        key = (id(stage), stage.draw, off)
        if key not in self._found:
            slopes: Slopes | None = None
            if off & _BY_SLOPES and (names := [name for name, term in self.terms.items() if term.by_slopes]):
                slopes = stage.play(stage.masked(partial(_slopes_of, names=names), off), off=off)
            self._found[key] = stage.play(lambda play: self._window(play, stage, off, slopes=slopes), off=off)
        return self._found[key]

    def _window(self, play: Play, stage: Stage, off: frozenset[str], *, slopes: Slopes | None) -> Gradient:
        options, step = dict(self._options), dict(self._step)
        if stage.dtype is not None:
            options = {name: value for name, value in options.items() if name in _WIDE_TAKES}
        for cause, option in REMEDIED.items():  # what is switched off needs no remedy, and would be at odds with it
            if cause in off:
                options.pop(option, None)
        given = play.replica.given
        loss_fn: LossFunction = given.loss_fn
        if given.encode is not None:
            step["encode"] = given.encode
        if slopes is not None or (COUNTS in off and self.terms):
            loss_fn, step = _repaired(play, self.terms, slopes, size=self.size, counts=COUNTS in off), {}
        if LENGTHS in off or loss_fn is not given.loss_fn:  # repairs know microbatches by their place
            options.pop("lengths", None)
        draw_apart(given.device)
        gradient: Gradient = {}
        optimizer = SGD([each for each in play.model.parameters() if each.requires_grad], lr=0.0)
        optimizer.register_step_pre_hook(partial(_keep, gradient, play.model))
        accumulator = Accumulator(
            play.model, optimizer, microbatch_size=self.size, memory_budget="none", nonfinite="raise", **options
        )
        try:
            accumulator.step(given.batch, loss_fn, **step)
        except NonfiniteError:
            named = play.model.named_parameters()
            return {name: torch.full_like(plain(each), math.inf) for name, each in named}
        return gradient


def with_possible_cut(
    stage: Stage, *, size: int, options: Mapping[str, Any], step: Mapping[str, Any]
) -> tuple[Accumulating, list[Cause]]:
    """Make what is checked; with another size if batch normalisation cannot normalise a microbatch of one row.

    Args:
        stage: Where one window is run to see.
        size: Rows of a microbatch that were asked for.
        options: The accumulator's arguments.
        step: The arguments of its ``step``.

    Returns:
        The accumulating to check, and a cause that names the microbatch of one row, if there is one.

    Raises:
        BatchStatisticsError: Every cut of these rows leaves a microbatch of one row.
    """
    subject = Accumulating(size=size, options=options, step=step)
    try:
        subject.gradient(stage)
    except BatchStatisticsError as error:
        other = size_without_one_row(stage.rows, size)
        if other is None:
            raise
        words = str(error).partition(" Take ")[0]
        words += f" `Accumulator.step` refuses this batch, so the gradient of microbatches of {other} rows was compared"
        remedy = f'take microbatch_size={other}, or batch_norm="exact" or "frozen", which normalise a single row too'
        found = Cause(kind=ONE_ROW, words=words, where=("batch normalisation",), remedy=remedy)
        return Accumulating(size=other, options=options, step=step), [found]
    return subject, []


# -- repairs ----------------------------------------------------------------------------------------------------------


def _repaired(play: Play, terms: Mapping[str, Term], slopes: Slopes | None, *, size: int, counts: bool) -> LossFunction:
    """Make a loss function of which some causes are taken out."""
    # Terms that couple rows are replaced by what has the whole batch's gradient at the model's outputs; the others are
    # weighed as the accumulator does, or, with `counts`, as they should be.
    places, microbatches, outputs = count(), -(-play.rows // size), Outputs(play.boundary)

    def loss_fn(model: nn.Module, microbatch: Any) -> Any:
        place = next(places)
        outputs.found.clear()
        sums: list[Tensor] = []
        for share in shares_of(play.replica.loss_fn(model, microbatch), rows=1.0):
            term = terms[share.name]
            weight = (term.right if counts else term.taken)[place]
            if weight and not (slopes is not None and term.by_slopes):  # without weight, its mean of nothing may be NaN
                sums.append(share.value / _number(share.count) * weight)
        if slopes is not None:
            rows = slice(place * size, (place + 1) * size)
            pairs = zip(outputs.found, slopes.outputs, strict=True)
            sums += [(output * slope[rows]).sum() for output, slope in pairs if output.requires_grad]
            named = dict(model.named_parameters()) if place == 0 else {}
            sums += [(named[name] * slope).sum() for name, slope in slopes.parameters.items() if name in named]
        return Loss(sum=torch.stack(sums).sum(), count=1.0 / contributing) if sums else None

    silent = [all(not term.right[place] for term in terms.values()) for place in range(microbatches)]
    contributing = microbatches if slopes is not None else max(1, microbatches - sum(silent))
    return loss_fn


def _slopes_of(play: Play, *, names: Sequence[str]) -> Slopes:
    """Take the slopes of some terms together."""
    outputs = outputs_of(play)
    found = [slopes_at(play, outputs, term=name) for name in names]
    parameters: dict[str, Tensor] = {}
    for each in found:
        for name, slope in each.parameters.items():
            parameters[name] = parameters[name] + slope if name in parameters else slope
    return Slopes(
        [torch.stack(same).sum(0) for same in zip(*(each.outputs for each in found), strict=True)], parameters
    )


def outputs_of(play: Play, batch: Any = None) -> list[Tensor]:
    """Return what the model returns for some rows.

    Args:
        play: Where.
        batch: The rows; `None` for all.

    Returns:
        The floating-point tensors that the outermost calls returned, in order; those that depend on a parameter say so.
    """
    outputs = Outputs(play.boundary)
    play.loss(play.batch if batch is None else batch)
    play.boundary.after.clear()
    return [each.detach().requires_grad_(each.requires_grad) for each in outputs.found]


def slopes_at(play: Play, outputs: Sequence[Tensor], *, batch: Any = None, term: str | None = None) -> Slopes:
    """Take the loss's gradient with respect to what the model returned.

    Args:
        play: Where.
        outputs: What it returned, as `outputs_of` does.
        batch: The rows; `None` for all.
        term: Which term of the loss; `None` for the sum of them.

    Returns:
        The gradient; 0 where the rows have nothing to contribute.
    """
    leaves = [each.detach().requires_grad_(each.requires_grad) for each in outputs]
    Outputs(play.boundary, instead=leaves)
    returned = play.loss(play.batch if batch is None else batch)
    play.boundary.after.clear()
    mean = mean_of(returned.get(term) if term is not None and isinstance(returned, Mapping) else returned)
    named = {name: each for name, each in play.model.named_parameters() if each.requires_grad}
    if mean is None or not mean.requires_grad:
        return Slopes([torch.zeros_like(leaf) for leaf in leaves], {})
    wanted = [each for each in leaves if each.requires_grad]
    sources = [*wanted, *named.values()]
    found = cast("Sequence[Tensor | None]", torch.autograd.grad(mean, sources, allow_unused=True))
    slopes = {id(leaf): slope for leaf, slope in zip(wanted, found, strict=False) if slope is not None}
    direct = zip(named, found[len(wanted) :], strict=True)
    return Slopes(
        [slopes.get(id(leaf), torch.zeros_like(leaf)) for leaf in leaves],
        {name: slope for name, slope in direct if slope is not None},
    )


def _keep(gradient: Gradient, model: nn.Module, *_: object) -> None:
    gradient.update(taken(model))


def _number(value: Count) -> float:
    return float(value.item() if isinstance(value, Tensor) else value)
