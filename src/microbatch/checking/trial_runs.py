"""Where experiments are played: on fresh copies, in one precision, with some things switched off."""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Generator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, nullcontext
from dataclasses import dataclass, replace
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from microbatch.batch.batch_tree import rows_of, slice_rows, take_rows
from microbatch.batch.cut import cut
from microbatch.batch.dropout_mode import ByRow, Shown
from microbatch.batch.random_masks import derive
from microbatch.checking.boundary import Boundary
from microbatch.checking.check_copies import Given, Jitter, Replica, replicate
from microbatch.checking.gradient import Gradient, norm, relative_error, taken
from microbatch.checking.gradient_hooks import Unhooked, hooked, remove_hooks
from microbatch.checking.survey import Survey, survey
from microbatch.checking.switches import Frozen, ModuleState, Still
from microbatch.errors import CheckError
from microbatch.failed_layer import explain_missing_kernel
from microbatch.kind_words import kind_of
from microbatch.loss.loss import Loss
from microbatch.loss.one_row_norm import ContiguousNorms
from microbatch.memory.module_of_op import Where
from microbatch.step.saved_state import RandomState, seed_everything
from microbatch.step.user_errors import backward_once

STATISTICS, RANDOMNESS, STATE, HOOKS = "batch_statistics", "randomness", "state", "gradient_hooks"
SWITCHES = frozenset({STATISTICS, RANDOMNESS, STATE, HOOKS})
"""Causes that change the whole batch's own gradient when they are switched off."""
REMEDIED = {STATISTICS: "batch_norm", RANDOMNESS: "dropout"}
"""Causes that an option of the accumulator is for."""
T = TypeVar("T")
_EVERYTHING_ON: frozenset[str] = frozenset()
_DRAWS = 4
_PASSES = 32


@dataclass(frozen=True, slots=True)
class Play:
    """Hold what one experiment runs on.

    Attributes:
        replica: The copies.
        boundary: The outermost calls of the model's modules.
        where: Which module runs.
        batch: The whole batch, as a loss function sees it.
        rows: Rows of it.
        autocast: Precision of forward passes, or `None` for the model's own.
    """

    replica: Replica
    boundary: Boundary
    where: Where
    batch: Any
    rows: int
    autocast: torch.dtype | None

    @property
    def model(self) -> nn.Module:
        """The copy of the model, without what wraps it."""
        return self.replica.model

    def loss(self, batch: Any) -> Any:
        """Call the loss function on some rows.

        Args:
            batch: The rows.

        Returns:
            What it returns.
        """
        device = self.replica.given.device.type
        with torch.autocast(device, self.autocast) if self.autocast is not None else nullcontext():
            return self.replica.loss_fn(self.model, batch)

    def slope(self, batch: Any) -> Gradient:
        """Take the gradient of the mean loss of some rows, by one backward of plain PyTorch.

        Args:
            batch: The rows.

        Returns:
            The gradient; empty where the rows have nothing to contribute.
        """
        self.model.zero_grad()
        mean = mean_of(self.loss(batch))
        if mean is not None and mean.requires_grad:
            mean.backward()
        return taken(self.model)


class Stage:
    """Play experiments in one precision, each on fresh copies and from the same random state.

    Args:
        given: The user's own.
        dtype: Precision of the copies; `None` for the user's own.
        autocast: Precision of forward passes, as the accumulator has it; not with ``dtype``.
        remedied: Causes that the accumulator's options take away. Where it draws dropout's masks by row, the whole
            batch is given the same.

    Attributes:
        draw: How many times `redraw` was called.
    """

    def __init__(
        self,
        given: Given,
        *,
        dtype: torch.dtype | None,
        autocast: torch.dtype | None = None,
        remedied: frozenset[str] = _EVERYTHING_ON,
    ) -> None:
        self.given = given
        self.dtype = dtype
        self.remedied = remedied
        self.rows = rows_of(given.batch)
        self._autocast = None if dtype is not None else autocast
        self.draw = 0
        self._random = RandomState(given.device)
        self._surveys: dict[tuple[int, ...] | None, Survey] = {}
        self._gradients: dict[Any, Gradient] = {}

    @property
    def unit(self) -> torch.dtype:
        """The precision whose rounding unit counts: the narrowest that the forward pass computes in."""
        return self.survey().narrowest

    def redraw(self) -> None:
        """Start all further experiments from another random state.

        By luck, one random state may drop nothing in either of two gradients.
        """
        self.draw += 1
        seed_everything(self.draw)
        self._random = RandomState(self.given.device)
        self._gradients.clear()

    def play(
        self,
        act: Callable[[Play], T],
        *,
        off: frozenset[str] = _EVERYTHING_ON,
        rows: Sequence[int] | None = None,
        jitter: Jitter | None = None,
    ) -> T:
        """Run an experiment.

        Args:
            act: What to do.
            off: What is switched off, of `SWITCHES`.
            rows: Which rows of the batch, in which order; `None` for all of them.
            jitter: How weights and inputs are moved.

        Returns:
            What ``act`` returns.

        Raises:
            RuntimeError: What ``act`` raised; with a note where this processor cannot run a layer under autocast.
        """
        known = self.survey(rows).statistics if STATISTICS in off else None
        given = self.given
        given.progress()
        if rows is not None:
            given = replace(given, batch=take_rows(given.batch, rows, rows=self.rows, marked=True))
        self._random.restore()
        with ExitStack() as stack:
            stack.enter_context(_quiet())
            stack.enter_context(_default_dtype(self.dtype))
            stack.enter_context(torch.enable_grad())
            stack.enter_context(ContiguousNorms())
            replica = replicate(given, dtype=self.dtype, jitter=jitter)
            boundary, where = Boundary(replica.model), Where()
            where.name(replica.model)
            where.start(lambda _optimizer: None)
            stack.callback(where.stop)
            if STATE in off:
                state = ModuleState(replica.model)
                boundary.before.append(lambda _rows: state.restore())
            if RANDOMNESS in off:
                stack.enter_context(Still(boundary, given.device))
            if HOOKS in off:
                remove_hooks(replica.model)
                stack.enter_context(Unhooked(where))
            if known is not None:
                stack.enter_context(Frozen(where, known=known))
            count = rows_of(given.batch)
            whole = slice_rows(replica.given.batch, 0, count, rows=count)
            try:
                return act(Play(replica, boundary, where, whole, count, self._autocast))
            except RuntimeError as error:
                explain_missing_kernel(error, replica.model, autocast=self._autocast)
                raise

    def whole(
        self,
        off: frozenset[str] = _EVERYTHING_ON,
        *,
        rows: Sequence[int] | None = None,
        jitter: Jitter | None = None,
    ) -> Gradient:
        """Take the whole batch's gradient by one backward of plain PyTorch.

        Args:
            off: As for `play`.
            rows: As for `play`.
            jitter: As for `play`.

        Returns:
            The gradient.

        Raises:
            CheckError: It is 0, or not finite, so that nothing can be compared with it.
        """
        off &= SWITCHES
        key = ("whole", off, None if rows is None else tuple(rows), jitter)
        if key not in self._gradients:
            self._gradients[key] = self.play(self.masked(self._whole, off), off=off, rows=rows, jitter=jitter)
        return self._gradients[key]

    def masked(self, act: Callable[[Play], T], off: frozenset[str]) -> Callable[[Play], T]:
        """Give an experiment on the whole batch the masks that the accumulator draws, if it draws them by row.

        Args:
            act: What to do.
            off: What is switched off.

        Returns:
            The same, under those masks.
        """

        def under_masks(play: Play) -> T:
            with _masks_by_row(play.rows):
                return act(play)

        return under_masks if RANDOMNESS in self.remedied - off else act

    @staticmethod
    def _whole(play: Play) -> Gradient:
        mean = mean_of(play.loss(play.batch))
        if mean is None:
            raise CheckError("the loss function has nothing to contribute for the whole batch; pass other rows")
        if not mean.requires_grad:
            raise CheckError(
                "the loss does not depend on the model that the loss function is given: it was detached, or it comes "
                "from another model. Use the model that is passed in"
            )
        backward_once(torch.autograd.backward, mean)  # the tensor's method would run without the mode of the masks
        gradient = taken(play.model)
        size = norm(gradient)
        if not math.isfinite(size):
            raise CheckError("the whole batch's own gradient is infinite or NaN, so nothing can be compared with it")
        if size == 0:
            raise CheckError("the whole batch's gradient is 0, so nothing can be compared with it; pass other rows")
        return gradient

    def survey(self, rows: Sequence[int] | None = None) -> Survey:
        """Look at one forward pass over the whole batch.

        Args:
            rows: As for `play`.

        Returns:
            What it did.
        """
        key = None if rows is None else tuple(rows)
        if key not in self._surveys:
            self._surveys[key] = self.play(lambda play: survey(play.where, lambda: play.loss(play.batch)), rows=rows)
        return self._surveys[key]

    def hooks(self) -> list[str]:
        """Name where gradients are given to hooks of the user's.

        Returns:
            Parameters and modules with such hooks, and modules whose forward pass registers some on tensors.
        """

        def look(play: Play) -> list[str]:
            found = hooked(play.model)
            with Unhooked(play.where) as mode:
                play.loss(play.batch)
            return list(dict.fromkeys([*found, *mode.seen]))

        return self.play(look)

    def state(self, microbatch_size: int) -> list[str]:
        """Name what a forward pass changes in the model and the next one's gradient depends on.

        Args:
            microbatch_size: Rows of the two.

        Returns:
            Paths of buffers and attributes; statistics of batch normalisations, which no training pass reads, apart.
        """
        off = frozenset({STATISTICS, RANDOMNESS})
        return self.play(lambda play: self._state(play, cut(play.replica.given.batch, microbatch_size)), off=off)

    def _state(self, play: Play, pieces: Sequence[Any]) -> list[str]:
        clean = ModuleState(play.model)
        norms = self.survey().statistics

        def matters(names: set[str]) -> bool:
            clean.restore()
            used.restore(names=names)
            gradient = play.slope(pieces[-1])
            return norm(reference) > 0 and relative_error(gradient, reference) > 1e-9

        reference = play.slope(pieces[-1])
        clean.restore()
        # Some states move every few passes only, such as projections that are drawn again.
        for piece in pieces[:_PASSES]:
            with torch.no_grad():
                play.loss(piece)
            changed = [name for name in clean.changed() if name.rpartition(".")[0] not in norms]
            if not changed:
                continue
            used = ModuleState(play.model)
            if matters(set(changed)):
                return [name for name in changed if matters({name})] or changed
            clean.restore()
            used.restore()
        return []

    def rounding(self, off: frozenset[str], yardstick: Gradient, *, draws: int = _DRAWS) -> float:
        """Say how far the whole batch's own gradient is off when its numbers move by a rounding unit.

        A unit that sits at a kink, such as a rectifier's, within rounding may fall on either side of it, in the whole
        batch as in any cut: one run alone would not show it.

        Args:
            off: What is switched off.
            yardstick: The gradient in more precision.
            draws: How many times they are moved, beside the run in which they are not.

        Returns:
            The largest relative error.
        """
        unit = torch.finfo(self.unit).eps
        moves = [None, *(Jitter(seed, unit) for seed in range(1, draws + 1))]
        return max(relative_error(self.whole(off, jitter=move), yardstick) for move in moves)


def mean_of(returned: Any) -> Tensor | None:
    """Read what a loss function returned as one mean.

    Args:
        returned: As a loss function may return it.

    Returns:
        The mean, or the sum of the terms' means, with its graph; `None` where nothing contributed.

    Raises:
        CheckError: It is none of what a loss function may return.
    """
    if isinstance(returned, Mapping):
        means = [mean for each in returned.values() if (mean := mean_of(each)) is not None]
        return torch.stack(means).sum() if means else None
    if isinstance(returned, Loss):
        return returned.mean if float(returned.count) else None
    if returned is not None and not (isinstance(returned, Tensor) and returned.ndim == 0):
        raise CheckError(
            f"the loss function returned {kind_of(returned)}; return a 0-d tensor (the mean over the rows), "
            "mb.Loss(sum=..., count=...), or a dict of these"
        )
    return returned


@contextmanager
def _masks_by_row(rows: int) -> Generator[None]:
    """Draw the masks that the first window of an accumulator draws."""
    mode = ByRow(derive(torch.initial_seed(), 0))
    mode.show(Shown(torch.arange(rows, device="cpu")))
    with mode:
        yield


@contextmanager
def _default_dtype(dtype: torch.dtype | None) -> Generator[None]:
    """Let tensors that the model or the loss makes be of the precision that is played in."""
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype or before)
    try:
        yield
    finally:
        torch.set_default_dtype(before)


@contextmanager
def _quiet() -> Generator[None]:
    """Keep warnings for the training itself: here every experiment would tell them again."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield
