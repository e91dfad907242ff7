"""Activations kept until backward, computed again, or offloaded: each at the microbatch size that suits it."""

from __future__ import annotations

import gc
import warnings
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import cache
from typing import Any

from microbatch.errors import SpillError
from microbatch.memory.out_of_memory import is_out_of_memory
from microbatch.memory.predict import WORKSPACES, Prediction
from microbatch.memory.recompute import blocks_of
from microbatch.memory.signal_errors import suppress_errors
from microbatch.planning.plan import CHECKPOINTED, OFFLOADED, Way
from microbatch.step.accumulator import Accumulator
from microbatch.step.options import Options, Sums
from microbatch.step.size.auto_checkpoint import by_worth, fewest, weigh
from microbatch.step.size.dry_run import dry_run_at
from microbatch.step.size.dry_run_copies import LossFunction, Scene, copies_of

_STEPS = 3
"""Real steps of a way: the first one warms up, and of the others the faster counts."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Stage:
    """What is run on copies to compare ways.

    Attributes:
        options: What the user asked for, without blocks or offload.
        loss_fn: As for `Accumulator.step`.
        batch: The whole batch.
        counts: As for `Accumulator.step`.
        rows: Rows of the batch; at least 1.
        budget: Bytes that a step may have in use; `None` where nothing limits it.
    """

    options: Options
    loss_fn: LossFunction
    batch: Any
    counts: Any
    rows: int
    budget: int | None

    def run(self, options: Options, size: int, *, steps: int = _STEPS) -> tuple[float, int | None] | None:
        """Take a few real steps on copies.

        Args:
            options: The options of the trial.
            size: Rows of a microbatch.
            steps: How many; at least 2.

        Returns:
            Seconds of the fastest but for the first, and the peak in bytes where somebody counted; `None` if memory
            ran out.
        """
        cast = copies_of(Scene(options, self.loss_fn, self.batch, []), how=None)
        accumulator = Accumulator(
            cast.options.model,
            cast.options.optimizers,
            microbatch_size=size,
            memory_budget=options.memory_budget,
            autocast=options.autocast,
            nonfinite="skip",
            sums=Sums(fuse=options.sums.fuse),
            lengths=options.lengths,
            offload=options.offload,
            checkpoint=options.checkpoint,
            batch_norm=options.batch_norm or "microbatch",  # without a warning
            buffers=options.buffers or "each",
        )
        gc.collect()
        try:
            found = [accumulator.step(self.batch, cast.loss_fn, counts=self.counts) for _ in range(steps)]
        except Exception as error:
            if is_out_of_memory(error):
                return None
            raise
        if any(step.retries for step in found):
            return None
        peaks = [step.peak_bytes for step in found if step.peak_bytes is not None]
        return min(step.seconds for step in found[1:]), max(peaks, default=None)


def ways(stage: Stage, kept: Way | None, *, prediction: Prediction, sizes: Sequence[int]) -> Iterator[Way]:
    """Try what needs less memory, where that lets larger microbatches fit, and at the same size where it does not.

    Args:
        stage: What is run.
        kept: The best size with everything kept; `None` if not even one row fits.
        prediction: Peaks with everything kept.
        sizes: Sizes worth trying, ascending.

    Yields:
        Each way, timed on real steps; ``kept`` is not among them.
    """
    now = 0 if kept is None else kept.microbatch_size
    largest = max((size for size in sizes if _fits(stage, prediction.peak_bytes(size))), default=0)
    # Where a smaller microbatch than the largest is the fastest, memory is not what limits.
    larger = [size for size in sizes if size > now] if now >= largest else []
    for foreseen in (_checkpointed, _offloaded):
        find = cache(foreseen(stage, prediction, limited=bool(larger)))
        at = [size for size in (_largest(find, larger), *larger[:1]) if size] if larger else [max(1, now)]
        # The largest that fits, and the next one, which needs less to be done.
        found = [way for size in dict.fromkeys(at) if (way := find(size)) is not None]
        timed = [way for each in found if (way := _timed(stage, each)) is not None]
        if timed:
            yield min(timed, key=lambda way: way.seconds or 0.0)


_Find = Callable[[int], Way | None]
"""Gives what a way takes at a size, foreseen; nothing where it does not fit although memory is what limits."""


def _largest(find: _Find, sizes: Sequence[int]) -> int:
    """Find the largest size that fits; 0 if none does."""
    fits, fails = -1, len(sizes)
    while fails - fits > 1:
        middle = (fits + fails) // 2
        fits, fails = (middle, fails) if find(sizes[middle]) is not None else (fits, middle)
    return 0 if fits < 0 else sizes[fits]


def _checkpointed(stage: Stage, prediction: Prediction, *, limited: bool) -> _Find:
    """Say with which checkpoints a size fits; or what all of them do to it, where memory is not what limits."""
    names = tuple(blocks_of(stage.options.bare_model))
    ranked: list[str] = []
    if limited and names:
        with suppress_errors():  # what cannot be rehearsed is taken as it comes
            ranked = [each.name for each in by_worth(weigh(stage.options, stage.loss_fn, batch=stage.batch))]

    def find(size: int) -> Way | None:
        if not names:
            return None
        if not limited or stage.budget is None:
            return _foreseen(stage, _way(stage, CHECKPOINTED, size, blocks=names), prediction)
        some = None
        with suppress_errors():
            some = fewest(
                stage.options,
                stage.loss_fn,
                batch=stage.batch,
                size=size,
                budget=stage.budget - _hidden(prediction, size),
                ranked=ranked or names,
            )
        return None if not some else _foreseen(stage, _way(stage, CHECKPOINTED, size, blocks=some), prediction)

    return find


def _offloaded(stage: Stage, prediction: Prediction, *, limited: bool) -> _Find:
    """Say whether a size fits with activations moved away."""

    def find(size: int) -> Way | None:
        way = _foreseen(stage, _way(stage, OFFLOADED, size), prediction)
        unknown = way.predicted_bytes is None
        return None if limited and (unknown or not _fits(stage, way.predicted_bytes or 0)) else way

    return find


def _way(stage: Stage, name: str, size: int, *, blocks: tuple[str, ...] = ()) -> Way:
    return Way(
        name=name,
        microbatch_size=size,
        microbatches=-(-stage.rows // size),
        blocks=blocks,
        predicted_bytes=None,
        measured_bytes=None,
        seconds=None,
    )


def _foreseen(stage: Stage, way: Way, prediction: Prediction) -> Way:
    with suppress_errors():  # what fake tensors cannot run is only measured
        peak = dry_run_at(_options(stage, way), stage.loss_fn, batch=stage.batch, size=way.microbatch_size)
        return replace(way, predicted_bytes=peak + _hidden(prediction, way.microbatch_size))
    return way


def _hidden(prediction: Prediction, size: int) -> int:
    """Say what operators allocate inside themselves at a size, as it was found with everything kept."""
    return max(0, prediction.parts(size).get(WORKSPACES, 0))


def _timed(stage: Stage, way: Way) -> Way | None:
    with warnings.catch_warnings():
        # Where spilled tensors would lie in memory, nothing is saved.
        warnings.filterwarnings("error", message=".* is a (tmpfs|ramfs), which is memory")
        try:
            found = stage.run(_options(stage, way), way.microbatch_size)
        except (UserWarning, SpillError):
            return None
    return None if found is None else replace(way, seconds=found[0], measured_bytes=found[1])


def _options(stage: Stage, way: Way) -> Options:
    return replace(stage.options, checkpoint=way.blocks, offload="activations" if way.name == OFFLOADED else None)


def _fits(stage: Stage, peak: int) -> bool:
    return stage.budget is None or peak <= stage.budget
