"""What the guide's stage shows of one step, measured for each way to cut the batch: gradients and live memory."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor, nn

from microbatch.guide.experiments import BATCH, KINDS, Reference
from microbatch.guide.truth import gradient_of, relative_error
from microbatch.memory.ledger import Timeline
from microbatch.memory.meter import MemoryMeter
from microbatch.step.accumulator import Accumulator
from microbatch.step.events import Event, MicrobatchDone

CUTS = (1, 2, 4, 8)
"""How many microbatches the stage cuts the batch into."""

SHOWN = "blocks.0.mlp_norm.weight"
"""The parameter whose gradient is shown: its largest entries have both signs."""

NUMBERS = 7
"""How many entries of it are shown."""

MOVING = ("gradients", "activations")
"""The categories that come and go inside a step; parameters and optimizer state stay as they are."""

POINTS = 10
"""Points of a microbatch's forward, and of its backward, that the memory's curve has."""


def shares(wanted: Sequence[int] = CUTS) -> dict[str, Any]:
    """Measure a few numbers of the gradient: each microbatch's share of them, and the whole batch's.

    Args:
        wanted: How many microbatches the batch is cut into, one after the other.

    Returns:
        ``"name"`` of the parameter; ``"entries"``, those with the largest magnitude in the whole batch's gradient, in
        their order; ``"whole"``, the whole batch's gradient there; ``"cuts"``: for each number of microbatches, the
        ``"shares"`` in the order of the microbatches, and ``"apart"``, the relative difference between the finished
        gradient of all parameters and the whole batch's.

    Cost:
        One forward and backward of the whole batch, and two for each cut.
    """
    whole = Reference()
    whole.loss(whole.model, whole.batch).backward()
    truth = gradient_of(whole.model.parameters())
    shown = _shown(whole.model)
    entries = shown.abs().topk(NUMBERS).indices.sort().values
    cuts = {str(cut): _cut(cut, entries, truth) for cut in wanted}
    return {"name": SHOWN, "entries": entries.tolist(), "whole": shown[entries].tolist(), "cuts": cuts}


def _shown(model: nn.Module) -> Tensor:
    return gradient_of([model.get_parameter(SHOWN)])


def _cut(microbatches: int, entries: Tensor, truth: Tensor) -> dict[str, Any]:
    """Take the shares by plain PyTorch, and the finished gradient by the accumulator."""
    plain = Reference()
    found: list[list[float]] = []
    before = torch.zeros(NUMBERS, dtype=torch.float64)
    for rows in plain.batch.chunk(microbatches):
        (plain.loss(plain.model, rows) / microbatches).backward()
        after = _shown(plain.model)[entries]
        found.append((after - before).tolist())
        before = after
    made = Reference()
    with made.held() as held:
        Accumulator(made.model, made.optimizer, microbatch_size=BATCH // microbatches).step(made.batch, made.loss)
    return {"shares": found, "apart": relative_error(held[0], truth)}


def traces() -> dict[str, Any]:
    """Record the live memory all through a step, for each way to cut the batch.

    Returns:
        For each number of microbatches, the first microbatch and the second one, as which all later ones are:
        ``"forward"`` and ``"backward"``, KiB of what comes and goes, at points that are equally far apart in
        operators. Of every stretch between two points the highest moment is kept, so that no peak is left out.
    """
    return {str(cut): trace(cut)[:2] for cut in CUTS}


def trace(microbatches: int) -> list[dict[str, Any]]:
    """Record the live memory all through a step of so many microbatches.

    Args:
        microbatches: Of the step; a divisor of the batch.

    Returns:
        For each microbatch, what `traces` keeps of two of them.
    """
    made = Reference()
    turns: list[int] = []  # operators that had run at the end of every forward and every backward
    meter = MemoryMeter(timeline=True)

    def passed() -> None:
        turns.append(len(meter.timeline.operators))

    def loss(model: nn.Module, rows: Tensor) -> Tensor:
        found = made.loss(model, rows)
        passed()
        return found

    def hear(event: Event) -> None:
        if isinstance(event, MicrobatchDone):
            passed()

    accumulator = Accumulator(
        made.model, made.optimizer, microbatch_size=BATCH // microbatches, memory_budget="none", listeners=[hear]
    )
    accumulator.step(made.batch, made.loss)
    turns.clear()
    meter.track(made.model, made.optimizer, made.batch)
    with meter:
        accumulator.step(made.batch, loss)
    line, starts = meter.timeline, [0, *turns]
    halves = [_points(line, start, end) for start, end in zip(starts, turns, strict=False)]
    return [
        {"forward": forward, "backward": backward} for forward, backward in zip(halves[::2], halves[1::2], strict=True)
    ]


def _points(line: Timeline, start: int, end: int) -> dict[str, list[int]]:
    edges = [start + (end - start) * point // POINTS for point in range(POINTS + 1)]
    moments = [max(range(first, last), key=lambda index: line.live[index]) for first, last in pairwise(edges)]
    parts = [line.parts(moment) for moment in moments]
    found = {kind: [round(part.get(kind, 0) / 1024) for part in parts] for kind in MOVING}
    found["other"] = [round(sum(size for kind, size in part.items() if kind not in KINDS) / 1024) for part in parts]
    return found
