"""What the loss of some rows depends on beside these rows: the others, how many count, and their places."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial
from itertools import starmap
from typing import Any

import torch
from torch import Tensor

from microbatch.batch.cut import cut
from microbatch.checking.accumulating import COUNTS, COUPLING, ROW_ORDER, Slopes, Term, outputs_of, slopes_at
from microbatch.checking.boundary import trace
from microbatch.checking.gradient import Gradient, fit, relative_error
from microbatch.checking.trial_runs import Play, Stage
from microbatch.devices.backend import to_host_in_float64, to_wide
from microbatch.loss.loss import shares_of

TOLERANCE = 1e-7
"""Relative difference that the order of summation does not make in float64."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Found:
    """Say one thing that was found out about samples.

    Attributes:
        kind: A cause's.
        words: What was seen.
        where: Modules or terms; empty where neither is known.
        in_loss: Whether it is in what the loss function does with the model's outputs, so that it can be switched off.
    """

    kind: str
    words: str
    where: tuple[str, ...] = ()
    in_loss: bool = True


@dataclass(frozen=True, slots=True)
class _Share:
    """Say by which count the accumulator weighs one microbatch's mean, and whether that is its rows."""

    count: float
    is_mean: bool


_NOTHING = _Share(0.0, is_mean=True)


class Samples:
    """Find out how samples depend on one another, with all else switched off.

    Where the model returns a row for every row, model and loss are looked at apart: what the model returns for some
    rows when others change, and how the loss changes with what it returned. Else only whole gradients can tell.

    Args:
        stage: Where to play.
        off: What is switched off.
        size: Rows of a microbatch.
        tolerance: Relative difference above which two values differ.

    Attributes:
        terms: What has been found out about the terms of the loss, by name.
    """

    def __init__(self, stage: Stage, off: frozenset[str], *, size: int, tolerance: float = TOLERANCE) -> None:
        self._stage, self._off, self._size = stage, off, size
        self._tolerance = tolerance
        self.terms: dict[str, Term] = {}
        rows = stage.rows
        self._starts = range(0, rows, size)
        self._permuted = torch.randperm(rows, generator=torch.Generator().manual_seed(5)).tolist()
        if self._permuted == list(range(rows)):
            self._permuted.reverse()

    def find(self) -> list[Found]:
        """Look.

        Returns:
            What was found, in no order.
        """
        whole = self._play(outputs_of)
        pieces = self._play(self._outputs_of_pieces)
        if not self._is_by_row(whole, pieces):
            return list(self._from_gradients())
        return [*self._in_model(whole, pieces), *self._in_loss(whole)]

    # -- the model ----------------------------------------------------------------------------------------------------

    def _in_model(self, whole: list[Tensor], pieces: list[list[Tensor]]) -> Iterator[Found]:
        joined = [torch.cat([piece[k] for piece in pieces]) for k in range(len(whole))]
        if not self._differ(joined, whole):
            return
        coupled = any(
            self._differ(_taken(self._play(outputs_of, rows=rows), kept), _taken(whole, kept))
            for kept, rows in self._exchanges()
        )
        placed = self._differ(self._play(outputs_of, rows=self._permuted), _taken(whole, self._permuted))
        where = self._first_module()
        if coupled or not placed:
            words = (
                "what the model returns for a row depends on the other rows"
                if coupled
                else "what the model returns for a row depends on how many rows go with it"
            )
            yield Found(kind=COUPLING, words=words, where=where, in_loss=False)
        if placed:
            words = "what the model returns for a row depends on its place in the batch"
            yield Found(kind=ROW_ORDER, words=words, where=where, in_loss=False)

    def _outputs_of_pieces(self, play: Play) -> list[list[Tensor]]:
        return [outputs_of(play, piece) for piece in self._cut(play)]

    def _is_by_row(self, whole: list[Tensor], pieces: list[list[Tensor]]) -> bool:
        """Tell whether what depends on a parameter has a row for each row."""
        rows = [self._stage.rows, *(min(self._size, self._stage.rows - start) for start in self._starts)]
        shapes = [[(n, *each.shape[1:]) for each in whole] for n in rows]
        found = [[tuple(each.shape) for each in some] for some in (whole, *pieces)]
        return found == shapes and any(each.requires_grad for each in whole)

    def _first_module(self) -> tuple[str, ...]:
        """Name the first module that is given the same rows alone and among others, and returns something else."""
        rows, last = self._stage.rows, slice(self._starts[-1], None)
        alone = self._play(lambda play: trace(play.model, lambda: play.loss(self._cut(play)[-1])))
        among = self._play(lambda play: trace(play.model, lambda: play.loss(play.batch), rows=(last, rows)))
        for here, there in zip(alone, among, strict=False):
            if here.path != there.path:
                break
            if not self._differ(here.taken, there.taken) and self._differ(here.given, there.given):
                return (here.path or "the model itself",)
        return ()

    # -- the loss -----------------------------------------------------------------------------------------------------

    def _in_loss(self, whole: list[Tensor]) -> Iterator[Found]:
        shares: dict[str, list[_Share]] = self._play(self._shares)
        self.terms = {term: _as_taken(mine) for term, mine in shares.items()}
        told: dict[str, str] = {}
        for term, mine in shares.items():
            where = (term,) if len(shares) > 1 else ()
            at = partial(slopes_at, term=term)
            here = self._slopes(at, whole)
            coupled = any(
                self._is_coupled(at, whole, here=_taken(here, kept), kept=kept, rows=rows)
                for kept, rows in self._exchanges()
            )
            moved = self._slopes(at, _taken(whole, self._permuted), rows=self._permuted)
            placed = self._differ(moved, _taken(here, self._permuted))
            if coupled:
                words = "the loss of a row depends on the other rows"
                yield Found(kind=COUPLING, words=words, where=where)
            if placed:
                yield Found(kind=ROW_ORDER, words="the loss of a row depends on its place in the batch", where=where)
            if coupled or placed:
                self.terms[term] = replace(self.terms[term], by_slopes=True)
                continue
            pieces = self._play(partial(self._slopes_of_pieces, act=at, whole=whole))
            found = fit(_numbered(here), [_numbered(piece) for piece in pieces])
            if found.residual <= self._tolerance and self._is_other(found.weights, mine):
                told[term] = _counted(found.weights, mine)
                self.terms[term] = replace(self.terms[term], right=found.weights)
        if told:
            where = tuple(told) if len(shares) > 1 else ()
            yield Found(kind=COUNTS, words=next(iter(told.values())), where=where)

    def _is_coupled(
        self, at: Callable[..., Slopes], whole: list[Tensor], *, here: list[Tensor], kept: list[int], rows: list[int]
    ) -> bool:
        """Tell whether the slopes of some rows change when others are exchanged."""
        instead = _taken(whole, rows)
        if self._differ(_taken(self._slopes(at, instead), kept), here):
            return True
        # Other targets may count differently, and then all slopes are multiplied with one number: that is not coupling.
        exchanged = _taken(self._slopes(at, instead, rows=rows), kept)
        size = sum(float((each * each).sum()) for each in here)
        factor = sum(float((a * b).sum()) for a, b in zip(exchanged, here, strict=True)) / size if size else 1.0
        return math.isfinite(factor) and self._differ(exchanged, [each * factor for each in here])

    def _slopes(
        self, act: Callable[..., Slopes], outputs: list[Tensor], *, rows: list[int] | None = None
    ) -> list[Tensor]:
        return self._play(lambda play: act(play, outputs), rows=rows).outputs

    def _slopes_of_pieces(self, play: Play, *, act: Callable[..., Slopes], whole: list[Tensor]) -> list[list[Tensor]]:
        """Take each microbatch's slopes, in the place of its rows among zeros."""
        found: list[list[Tensor]] = []
        for start, piece in zip(self._starts, self._cut(play), strict=True):
            rows = slice(start, start + self._size)
            slopes = act(play, [each[rows] for each in whole], batch=piece)
            spread = [torch.zeros_like(each) for each in whole]
            for wide, slope in zip(spread, slopes.outputs, strict=True):
                wide[rows] = slope
            found.append(spread)
        return found

    def _shares(self, play: Play) -> dict[str, list[_Share]]:
        """Read how each microbatch counts for the accumulator, by term."""
        told: list[dict[str, _Share]] = []
        for piece, start in zip(self._cut(play), self._starts, strict=True):
            rows = float(min(self._size, self._stage.rows - start))
            shares = shares_of(play.loss(piece), rows=rows)
            told.append({share.name: _Share(float(share.count), share.is_mean) for share in shares})
        names = dict.fromkeys(name for each in told for name in each)
        return {name: [each.get(name, _NOTHING) for each in told] for name in names}

    # -- both at once -------------------------------------------------------------------------------------------------

    def _from_gradients(self) -> Iterator[Found]:
        stage, off = self._stage, self._off
        whole = stage.whole(off)
        if relative_error(stage.whole(off, rows=self._permuted), whole) > self._tolerance:
            words = "the gradient of the whole batch depends on the order of its rows"
            yield Found(kind=ROW_ORDER, words=words, in_loss=False)
            return
        slopes = self._play(lambda play: [play.slope(piece) for piece in self._cut(play)])
        found, shares = fit(whole, slopes), self._play(self._shares)
        of_loss = shares.get("loss", [])
        shared = math.isclose(sum(found.weights), 1, rel_tol=1e-6)
        summed = all(math.isclose(weight, 1, rel_tol=1e-6) for weight in found.weights)
        exact = found.residual <= self._tolerance and (shared or summed) and min(found.weights) > -1e-6
        if exact and len(of_loss) == len(found.weights) and len(shares) == 1:
            if self._is_other(found.weights, of_loss):
                self.terms = {"loss": replace(_as_taken(of_loss), right=found.weights)}
                yield Found(kind=COUNTS, words=_counted(found.weights, of_loss))
            return
        words = "the gradient of the whole batch is not made of its microbatches' gradients: rows depend on one another"
        yield Found(kind=COUPLING, words=words, in_loss=False)

    # -- how ----------------------------------------------------------------------------------------------------------

    def _play(self, act: Callable[[Play], Any], *, rows: Sequence[int] | None = None) -> Any:
        return self._stage.play(act, off=self._off, rows=rows)

    def _cut(self, play: Play) -> list[Any]:
        return cut(play.replica.given.batch, self._size)

    def _exchanges(self) -> Iterator[tuple[list[int], list[int]]]:
        """Yield ways to exchange some rows for others, and which rows stay.

        For every two rows, one stays and the other is exchanged in at least one of them: their numbers differ in a bit.
        """
        rows = self._stage.rows
        for bit in range((rows - 1).bit_length()):
            for value in (0, 1):
                kept = [row for row in range(rows) if (row >> bit & 1) == value]
                staying = set(kept)
                yield kept, [row if row in staying else (row + 1) % rows for row in range(rows)]

    def _is_other(self, weights: Sequence[float], shares: Sequence[_Share]) -> bool:
        """Tell whether the shares that are right are not those that the accumulator takes."""
        mine = _normalised(shares)
        room = 10 * self._tolerance * max(mine)
        return any(abs(one - other) > room for one, other in zip(weights, mine, strict=True))

    def _differ(self, found: Sequence[Tensor], expected: Sequence[Tensor]) -> bool:
        if len(found) != len(expected) or any(starmap(_shapes_differ, zip(found, expected, strict=True))):
            return True
        return any(_distance(one, other) > self._tolerance for one, other in zip(found, expected, strict=True))


def _shapes_differ(one: Tensor, other: Tensor) -> bool:
    return one.shape != other.shape


def _distance(one: Tensor, other: Tensor) -> float:
    """Return the relative distance of two tensors; numbers that are not finite have to be in the same places."""
    one, other = to_wide(one.detach()), to_wide(other.detach())
    if not torch.equal(one.isfinite(), other.isfinite()):
        return math.inf
    one, other = one.nan_to_num(0.0, 0.0, 0.0), other.nan_to_num(0.0, 0.0, 0.0)
    size = max(float(other.norm()), float(one.norm()))
    return 0.0 if size == 0 else float((one - other).norm()) / size


def _numbered(tensors: Sequence[Tensor]) -> Gradient:
    return {str(index): to_host_in_float64(each) for index, each in enumerate(tensors)}


def _taken(tensors: Sequence[Tensor], rows: Sequence[int]) -> list[Tensor]:
    return [each[list(rows)] for each in tensors]


def _normalised(shares: Sequence[_Share]) -> tuple[float, ...]:
    total = sum(share.count for share in shares)
    return tuple(share.count / total if total else 0.0 for share in shares)


def _as_taken(shares: Sequence[_Share]) -> Term:
    taken = _normalised(shares)
    return Term(taken=taken, right=taken)


def _counted(weights: Sequence[float], shares: Sequence[_Share]) -> str:
    """Say what the counts have to do with it."""
    if len(weights) > 1 and all(math.isclose(weight, 1, rel_tol=1e-6) for weight in weights):
        return "the loss is a sum over its rows, and was returned as if it were their mean"
    squares = zip(weights, _normalised(shares), strict=True)
    if all(math.isclose(weight, share**2, rel_tol=1e-6) for weight, share in squares):
        return (
            "the sum in mb.Loss(sum=..., count=...) is a mean: it is divided by the count already, and the accumulator "
            "divides by the count once more"
        )
    listed = ", ".join(f"{weight:.3g}" for weight in weights[:6]) + (", ..." if len(weights) > 6 else "")
    given = "rows" if shares[0].is_mean else "the counts that were given"
    words = f"the loss is a mean over counts that differ between microbatches (their shares are {listed})"
    return f"{words}, and not over {given}"
