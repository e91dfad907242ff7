"""Evaluate a model on held-out data without touching anything that training depends on."""

from __future__ import annotations

from collections.abc import Generator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, cast

import torch
from torch import nn

from microbatch.batch.prefetch import feed
from microbatch.errors import DataError, RankError
from microbatch.loss.loss import Loss
from microbatch.loss.representations import Representations, put_together, taken_apart
from microbatch.ranks.fsdp import fully_sharded, gather_roots, reshard
from microbatch.ranks.pipeline import Pipeline
from microbatch.ranks.process_group import RankGroup
from microbatch.step.passes.stage_run import Scored
from microbatch.step.saved_state import Snapshot
from microbatch.train.data import fetch, in_order, length_of
from microbatch.train.job import Job
from microbatch.train.place import Place


@contextmanager
def untouched(model: nn.Module, device: torch.device, *, training: bool) -> Generator[None]:
    """Put random state, buffers and every module's training flag back when the block ends.

    Args:
        model: The module that the block may run.
        device: Where it is.
        training: Mode of the whole model inside the block.

    Yields:
        Nothing.

    Source:
        Law B3.
    """
    snapshot = Snapshot(model, device)
    modes = [(module, module.training) for module in model.modules()]
    model.train(training)
    try:
        yield
    finally:
        for module, mode in modes:
            # Not train(mode), which would also set the children.
            module.training = mode
        snapshot.restore()


def evaluate(
    job: Job,
    *,
    microbatch_size: int,
    device: torch.device,
    autocast: torch.dtype | None = None,
    ranks: RankGroup | None = None,
    place: Place | None = None,
) -> dict[str, float]:
    """Pool sums and counts over a job's held-out set, so that the result does not depend on how it was cut.

    Over several ranks each runs some of the microbatches, and all of them add up what each of these gave, in the order
    of the set: the sums have the same bits on any number of ranks.

    Args:
        job: Its model is evaluated in evaluation mode, without gradients, and left as it was.
        microbatch_size: Samples at once; at least 1. The same on every rank, or the first one's counts.
        device: Where the model is.
        autocast: Precision of the forward pass, or `None`.
        ranks: Who else evaluates it; `None` for a single process.
        place: Where this rank stands, for a pipeline; a single process has all of its stages.

    Returns:
        Means by name. What is minimised is ``"loss"``, the sum of its terms if it has several.

    Raises:
        DataError: The set is empty, or nothing in it was counted.
        RankError: The score failed on another rank of a pipeline.

    Cost:
        One forward pass over the set; one host synchronisation for each microbatch. With ``encode``, the
        representations of the whole set at once. Over several ranks one or two messages.
    """
    rows = length_of(job.validation, role="validation")
    size = microbatch_size if ranks is None else ranks.tell(microbatch_size)[0]
    lists = list(in_order(rows, microbatch_size=size))
    if isinstance(job.model, Pipeline):
        with untouched(job.model, device, training=False):
            piped = _through_stages(job, lists, autocast=autocast, ranks=ranks, place=place or Place())
        return _means(piped, job)
    own = lists if ranks is None else lists[ranks.index :: ranks.size]
    # Passes of a sharded model are made by all ranks together: who has fewer makes some that are not looked at.
    more = -(-len(lists) // ranks.size) - len(own) if ranks is not None and fully_sharded(job.model) else 0
    read = (job.collate(fetch(job.validation, indices)) for indices in [*own, *lists[:1] * more])
    microbatches = feed(read, device)
    score = job.evaluate or job.loss_fn
    found: list[dict[str, tuple[float, float]]] = []
    encoded: list[Representations] = []
    with (
        untouched(job.model, device, training=False),
        torch.no_grad(),
        torch.autocast(device.type, dtype=autocast, enabled=autocast is not None),
    ):
        if ranks is not None:
            # Running statistics are each rank's own; the first one's are those that a checkpoint keeps.
            ranks.copy_([*job.model.buffers()], source=0)
        for indices, microbatch in zip([*own, *[None] * more], microbatches, strict=True):
            if indices is None:
                (job.encode or score)(job.model, microbatch)
            elif job.encode is not None:
                encoded.append(taken_apart(job.encode(job.model, microbatch), rows=len(indices)))
            else:
                found.append(_numbers(named_losses(score(job.model, microbatch), rows=len(indices))))
        if job.encode is not None:
            gather_roots(job.model)  # which the score may take more from
            whole = put_together(_all_of(encoded, ranks, device), lambda column: torch.cat(list(column)))
            found = [_numbers(named_losses(score(job.model, whole.structure), rows=rows))]
        elif ranks is not None:
            found = _interleaved(ranks.tell(found))
    reshard(job.model)
    return _means(found, job)


def _through_stages(
    job: Job, lists: list[list[int]], *, autocast: torch.dtype | None, ranks: RankGroup | None, place: Place
) -> list[dict[str, tuple[float, float]]]:
    """Score the set's microbatches, of which each pipeline has some, and return what all last stages found."""
    model, size, score = cast("Pipeline", job.model), len(lists[0]), job.evaluate or job.loss_fn
    scored, found = Scored(model, autocast=autocast), dict[int, dict[str, tuple[float, float]]]()
    # So many that the stages work side by side, and that what they hand on fits where training does.
    at_once = 2 * model.stages[0].num_stages
    for start in range(place.share * at_once, len(lists), place.shares * at_once):
        group = lists[start : start + at_once]
        batch = job.collate(fetch(job.validation, [index for indices in group for index in indices]))
        for number, value in scored.score(batch, score, size=size).items():
            found[start + number] = _numbers(named_losses(value, rows=len(group[number])))
    told = [(found, "")] if ranks is None else ranks.tell((found, str(scored.failure or "")))
    if scored.failure is not None:
        raise scored.failure
    failed = {rank: error for rank, (_, error) in enumerate(told) if error}
    if failed:
        rank, error = next(iter(failed.items()))
        raise RankError(f"the validation score failed on rank {rank}: {error}")
    everything = {number: each for numbered, _ in told for number, each in numbered.items()}
    return [everything[number] for number in sorted(everything)]


def _means(found: Sequence[Mapping[str, tuple[float, float]]], job: Job) -> dict[str, float]:
    """Add sums and counts up."""
    sums: dict[str, float] = {}
    counts: dict[str, float] = {}
    for each in found:
        for name, (number, count) in each.items():
            sums[name] = sums.get(name, 0.0) + number
            counts[name] = counts.get(name, 0.0) + count
    empty = [name for name, count in counts.items() if count == 0]
    if empty or not counts:
        raise DataError(f"the validation set has nothing to count for {', '.join(empty) or 'any score'}")
    means = {name: sums[name] / counts[name] for name in sums}
    return means if job.evaluate is not None or "loss" in means else {"loss": sum(means.values()), **means}


def _numbers(losses: Mapping[str, Loss]) -> dict[str, tuple[float, float]]:
    return {name: (float(loss.sum), float(loss.count)) for name, loss in losses.items()}


def _interleaved(dealt: Sequence[Sequence[Any]]) -> list[Any]:
    """Undo the dealing out of every n-th to each of n."""
    return [each[index] for index in range(len(dealt[0])) for each in dealt if index < len(each)]


def _all_of(own: list[Representations], ranks: RankGroup | None, device: torch.device) -> list[Representations]:
    if ranks is None:
        return own
    # As numbers of the host: what is told is pickled.
    told = ranks.tell([([tensor.cpu() for tensor in each.tensors], each.form) for each in own])
    return [Representations([t.to(device) for t in tensors], form) for tensors, form in _interleaved(told)]


def named_losses(value: Any, *, rows: int) -> dict[str, Loss]:
    """Bring what a loss function may return to one form.

    Args:
        value: A 0-d mean over ``rows`` samples, a `Loss`, either of them by name, or `None` for nothing.
        rows: Samples in the microbatch.

    Returns:
        Sums and counts by name; a single loss is called ``"loss"``.
    """
    named = cast("Mapping[str, Any]", value) if isinstance(value, Mapping) else {"loss": value}
    return {
        name: loss if isinstance(loss, Loss) else Loss(sum=loss * rows, count=rows)
        for name, loss in named.items()
        if loss is not None
    }
