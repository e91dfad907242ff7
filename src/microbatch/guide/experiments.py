"""The experiments behind every number of the guide, each a function that returns plain numbers."""

from __future__ import annotations

import copy
import time
from collections.abc import Generator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from microbatch.batch.cut import cut
from microbatch.guide.lessons import Lesson, lesson
from microbatch.guide.truth import gradient_of, relative_error, scale_of
from microbatch.guide.wrong import DIVISIONS, Divide
from microbatch.memory.meter import MemoryMeter
from microbatch.planning.arithmetic import divide_batch
from microbatch.step.accumulator import Accumulator
from microbatch.train.jobs.transformer import Shape, Transformer

BATCH, MICROBATCH, LENGTH, SEED = 64, 8, 64, 0
SIZES = (1, 2, 4, 8, 16, 32, 64)
KINDS = ("parameters", "optimizer state", "gradients", "activations")


class Reference:
    """The transformer that the guide measures: four layers on bytes, a batch of random rows, AdamW."""

    def __init__(self, *, dtype: torch.dtype = torch.float32, batch_size: int = BATCH) -> None:
        """Make it, the same every time.

        Args:
            dtype: Of the weights.
            batch_size: Rows of the batch.
        """
        with torch.random.fork_rng(devices=[]):
            torch.default_generator.manual_seed(SEED)
            shape = Shape(vocabulary=256, length=LENGTH, layers=4, heads=4, channels=128)
            self.model = Transformer(shape).to(dtype)
            self.batch = torch.randint(0, 256, (batch_size, LENGTH + 1))
        self.optimizer = torch.optim.AdamW(self.model.parameters(), lr=1e-3)

    @staticmethod
    def loss(model: nn.Module, rows: Tensor) -> Tensor:
        """Compute the mean cross-entropy of every next byte.

        Args:
            model: Tokens to logits.
            rows: Shape ``(B, LENGTH + 1)``, int64.

        Returns:
            In nats per byte; shape ``()``.
        """
        return F.cross_entropy(model(rows[:, :-1]).flatten(0, 1), rows[:, 1:].flatten())

    @contextmanager
    def held(self) -> Generator[list[Tensor], None, None]:
        """Keep the gradients that the optimizer is given.

        Yields:
            A list that holds, after a step, the gradient: 1-d, float64.
        """
        found: list[Tensor] = []

        def hold(*_: object) -> None:
            found.append(gradient_of(self.model.parameters()))

        handle = self.optimizer.register_step_pre_hook(hold)
        try:
            yield found
        finally:
            handle.remove()


def agreement() -> dict[str, Any]:
    """Compare the gradient of one step in microbatches with that of the whole batch.

    Returns:
        ``"error"`` of the cut gradient and ``"own_error"`` of the whole batch's, both in float32 and relative to the
        whole batch's in float64; ``"apart"``, the two float32 gradients' relative difference.
    """
    exact = Reference(dtype=torch.float64)
    exact.loss(exact.model, exact.batch).backward()
    truth = gradient_of(exact.model.parameters())
    whole, cut = Reference(), Reference()
    whole.loss(whole.model, whole.batch).backward()
    own = gradient_of(whole.model.parameters())
    with cut.held() as found:
        Accumulator(cut.model, cut.optimizer, microbatch_size=MICROBATCH).step(cut.batch, cut.loss)
    return {
        "batch": BATCH,
        "microbatch": MICROBATCH,
        "microbatches": BATCH // MICROBATCH,
        "length": LENGTH,
        "parameters": sum(parameter.numel() for parameter in cut.model.parameters()),
        "error": relative_error(found[0], truth),
        "own_error": relative_error(own, truth),
        "apart": relative_error(found[0], own),
    }


def memory(sizes: Sequence[int] = SIZES) -> dict[str, Any]:
    """Measure the peak of a training step by category, for microbatches of several sizes.

    Args:
        sizes: Rows of a microbatch.

    Returns:
        ``"window"``: by size, the bytes of each category at the peak of a window of two such microbatches or more;
        ``"alone"``: the same for a batch of that many rows that goes through at once. The step is the second one, so
        that the optimizer's state is there.
    """
    return {
        "window": {str(size): _at_peak(2 * size, size) for size in sizes},
        "alone": {str(size): _at_peak(size, size) for size in sizes},
    }


def _at_peak(batch_size: int, size: int) -> dict[str, int]:
    made = Reference(batch_size=batch_size)
    accumulator = Accumulator(made.model, made.optimizer, microbatch_size=size)
    accumulator.step(made.batch, made.loss)
    meter = MemoryMeter(detail=True)
    meter.track(made.model, made.optimizer, made.batch)
    with meter:
        accumulator.step(made.batch, made.loss)
    report = meter.report()
    return {**{kind: report.at_peak.get(kind, 0) for kind in KINDS}, "total": report.peak_bytes}


def cuts() -> dict[str, Any]:
    """Cut two batches, one that divides and one that does not.

    Returns:
        Rows, microbatch size, microbatches, and the rows of the last, of each.
    """
    found: dict[str, Any] = {}
    for name, rows in (("even", BATCH), ("tail", 50)):
        division = divide_batch(rows, microbatch_size=MICROBATCH)
        last = len(cut(torch.zeros(rows, 1), MICROBATCH)[-1])
        found[name] = {"batch": rows, "microbatch": MICROBATCH, "microbatches": division.microbatches, "last": last}
    return found


def denominators(rows: int = 32, microbatch: int = 4) -> dict[str, Any]:
    """Hold the usual denominators against the whole batch, on lines of Python's sources, ragged as they are.

    Args:
        rows: Of the batch.
        microbatch: Rows of a microbatch.

    Returns:
        By denominator, ``"error"`` and ``"scale"`` of the gradient, in float64; ``"tokens"`` of each microbatch.
    """
    made = lesson("transformer", batch_size=rows, seed=SEED)
    batch = made.batch(0)
    tokens = [int((labels >= 0).sum()) for labels in batch["labels"].split(microbatch)]
    found = {how: _divided(made, batch, how=how, microbatch=microbatch) for how in DIVISIONS}
    return {"rows": rows, "microbatch": microbatch, "microbatches": len(tokens), "tokens": tokens, **found}


def _divided(made: Lesson, batch: dict[str, Tensor], *, how: str, microbatch: int) -> dict[str, float]:
    whole = copy.deepcopy(made.model).double()
    made.mean_loss(whole, batch).backward()
    truth = gradient_of(whole.parameters())
    model = copy.deepcopy(made.model).double()
    found = _one_gradient(made, model, batch, microbatch=microbatch, how=how)
    return {"error": relative_error(found, truth), "scale": scale_of(found, truth)}


def _one_gradient(
    made: Lesson,
    model: nn.Module,
    batch: dict[str, Tensor],
    *,
    microbatch: int,
    how: str = "right",
    exact: bool = False,
) -> Tensor:
    """Take one step without a learning rate, and return the gradient that it was given; 1-d, float64."""
    optimizer = torch.optim.SGD(model.parameters(), lr=0.0)
    found: list[Tensor] = []

    def hold(*_: object) -> None:
        found.append(gradient_of(model.parameters()))

    optimizer.register_step_pre_hook(hold)
    if exact and made.encode is not None:
        accumulator = Accumulator(model, optimizer, microbatch_size=microbatch, coupled="twice")
        accumulator.step(batch, made.loss_fn, encode=made.encode)
    else:
        mode = "exact" if exact else "microbatch"
        accumulator = Accumulator(model, optimizer, microbatch_size=microbatch, batch_norm=mode)
        accumulator.step(batch, Divide(how, made.loss, batch_size=made.batch_size))
    return found[0]


def differences(
    name: str, *, norm: str = "group", exact: bool = False, sizes: Sequence[int] = (1, 2, 4, 8, 16, 32)
) -> dict[str, Any]:
    """Hold accumulation against the whole batch where rows may not be independent.

    Args:
        name: Of the lesson.
        norm: Of the convolutional network.
        exact: Whether to take what is made for it: the coupled step, or exact BatchNorm.
        sizes: Rows of a microbatch; the largest is the batch.

    Returns:
        ``"sizes"`` and ``"errors"``: relative errors of the gradient, in float64.
    """
    made = lesson(name, batch_size=max(sizes), seed=SEED, norm=norm)
    batch = made.batch(0)
    whole = copy.deepcopy(made.model).double()
    made.mean_loss(whole, batch).backward()
    truth = gradient_of(whole.parameters())
    errors = [
        relative_error(
            _one_gradient(made, copy.deepcopy(made.model).double(), batch, microbatch=size, exact=exact), truth
        )
        for size in sizes
    ]
    return {"sizes": list(sizes), "errors": errors}


def sums(counts: Sequence[int] = (8, 64, 512, 1024), *, length: int = 4096) -> dict[str, Any]:
    """Add up random gradients of bfloat16 weights, in bfloat16 and in float32.

    Args:
        counts: How many are added.
        length: Numbers of a gradient.

    Returns:
        Relative errors by precision of the sum, against float64, and what a sum of 4,096 ones comes to in each.
    """
    generator = torch.Generator().manual_seed(SEED)
    found: dict[str, list[float]] = {"bfloat16": [], "float32": []}
    for count in counts:
        rows = (torch.randn(count, length, generator=generator) + 0.2).to(torch.bfloat16)
        truth = rows.double().sum(0)
        for name, dtype in (("bfloat16", torch.bfloat16), ("float32", torch.float32)):
            total = torch.zeros(length, dtype=dtype)
            for row in rows:
                total += row.to(dtype)
            found[name].append(relative_error(total.double(), truth))
    ones = {name: _sum_of_ones(dtype) for name, dtype in (("bfloat16", torch.bfloat16), ("float32", torch.float32))}
    return {"counts": list(counts), **found, "ones": {"count": 4096, **ones}}


def _sum_of_ones(dtype: torch.dtype) -> float:
    total = torch.zeros((), dtype=dtype)
    for _ in range(4096):
        total += 1
    return float(total)


def speed(sizes: Sequence[int] = SIZES, *, rounds: int = 5) -> dict[str, Any]:
    """Time a step in microbatches of several sizes.

    Args:
        sizes: Rows of a microbatch.
        rounds: Steps of each size, one size after the other; the fastest is kept, as other jobs only make it slower.

    Returns:
        ``"per_second"``: rows a second, by size.
    """
    contenders = {size: _stepper(size) for size in sizes}
    times: dict[int, list[float]] = {size: [] for size in sizes}
    for round_ in range(rounds + 1):
        for size, (accumulator, made) in contenders.items():
            started = time.perf_counter()
            accumulator.step(made.batch, made.loss)
            if round_:  # the first is the warm-up
                times[size].append(time.perf_counter() - started)
    return {"sizes": list(sizes), "per_second": [BATCH / min(times[size]) for size in sizes]}


def _stepper(size: int) -> tuple[Accumulator, Reference]:
    made = Reference()
    return Accumulator(made.model, made.optimizer, microbatch_size=size, memory_budget="none"), made
