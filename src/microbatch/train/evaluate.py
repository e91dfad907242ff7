"""Evaluate a model on held-out data without touching anything that training depends on."""

from __future__ import annotations

from collections.abc import Generator, Mapping
from contextlib import contextmanager
from typing import Any, cast

import torch
from torch import nn

from microbatch.batch.feed import feed
from microbatch.errors import DataError
from microbatch.loss.coupled import Representations, put_together, taken_apart
from microbatch.loss.loss import Loss
from microbatch.step.replay import Snapshot
from microbatch.train.data import fetch, in_order, length_of
from microbatch.train.job import Job


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
    job: Job, *, microbatch_size: int, device: torch.device, autocast: torch.dtype | None = None
) -> dict[str, float]:
    """Pool sums and counts over a job's held-out set, so that the result does not depend on how it was cut.

    Args:
        job: Its model is evaluated in evaluation mode, without gradients, and left as it was.
        microbatch_size: Samples at once; at least 1.
        device: Where the model is.
        autocast: Precision of the forward pass, or `None`.

    Returns:
        Means by name. What is minimised is ``"loss"``, the sum of its terms if it has several.

    Raises:
        DataError: The set is empty, or nothing in it was counted.

    Cost:
        One forward pass over the set; one host synchronisation for each microbatch. With ``encode``, the
        representations of the whole set at once.
    """
    sums: dict[str, float] = {}
    counts: dict[str, float] = {}
    rows = length_of(job.validation, role="validation")
    lists = list(in_order(rows, microbatch_size=microbatch_size))
    microbatches = feed((job.collate(fetch(job.validation, indices)) for indices in lists), device)
    score = job.evaluate or job.loss_fn
    encoded: list[Representations] = []
    with (
        untouched(job.model, device, training=False),
        torch.no_grad(),
        torch.autocast(device.type, dtype=autocast, enabled=autocast is not None),
    ):
        for indices, microbatch in zip(lists, microbatches, strict=True):
            if job.encode is not None:
                encoded.append(taken_apart(job.encode(job.model, microbatch), rows=len(indices)))
                continue
            for name, loss in named_losses(score(job.model, microbatch), rows=len(indices)).items():
                sums[name] = sums.get(name, 0.0) + float(loss.sum)
                counts[name] = counts.get(name, 0.0) + float(loss.count)
        if encoded:
            scores = score(job.model, put_together(encoded, lambda column: torch.cat(list(column))).structure)
            for name, loss in named_losses(scores, rows=rows).items():
                sums[name], counts[name] = float(loss.sum), float(loss.count)
    empty = [name for name, count in counts.items() if count == 0]
    if empty or not counts:
        raise DataError(f"the validation set has nothing to count for {', '.join(empty) or 'any score'}")
    means = {name: sums[name] / counts[name] for name in sums}
    return means if job.evaluate is not None or "loss" in means else {"loss": sum(means.values()), **means}


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
