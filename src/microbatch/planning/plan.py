"""What a plan is: the microbatch size to take, what every other one would take, and what that means in words."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from dataclasses import fields as dataclass_fields
from typing import Any, Self

from microbatch.memory.budget import format_bytes
from microbatch.planning.money import Price
from microbatch.planning.run_costs import MEASURED, RunCost, as_price, steps_of_run
from microbatch.planning.scaling import Scaling
from microbatch.planning.text_table import aligned, fitting
from microbatch.planning.time_words import format_time

_BAR = 24
KEPT, CHECKPOINTED, OFFLOADED = "kept", "checkpointed", "offloaded"
"""What becomes of activations between forward and backward."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Candidate:
    """Say what one microbatch size takes.

    Attributes:
        microbatch_size: Rows that go through the model at once.
        microbatches: Microbatches of the batch.
        predicted_bytes: Predicted peak, which has to fit; `None` where nothing could be rehearsed.
        counted_bytes: Of this, what whoever measures will count: on the CPU the meter, and so tensors alone, without
            what operators allocate inside themselves; on CUDA the allocator, and so all of it.
        measured_bytes: Measured peak; `None` where it was not run, or nobody counted.
        fits: Whether the prediction is within the budget; `None` where either is unknown.
        seconds: Seconds of a step, as timed; `None` where it was not run.
    """

    microbatch_size: int
    microbatches: int
    predicted_bytes: int | None
    counted_bytes: int | None
    measured_bytes: int | None
    fits: bool | None
    seconds: float | None

    @property
    def error(self) -> float | None:
        """By which part of the measured peak the prediction of what is counted is above it (or, negative, below it)."""
        if self.counted_bytes is None or not self.measured_bytes:
            return None
        return self.counted_bytes / self.measured_bytes - 1


@dataclass(frozen=True, slots=True, kw_only=True)
class Way:
    """Say what a step takes with activations kept, computed again, or offloaded, at the size that suits it.

    Attributes:
        name: ``"kept"``, ``"checkpointed"`` or ``"offloaded"``.
        microbatch_size: Rows that go through the model at once.
        microbatches: Microbatches of the batch.
        blocks: Blocks that are computed again.
        predicted_bytes: Predicted peak; `None` where nothing could be rehearsed.
        measured_bytes: Measured peak; `None` where nobody counted.
        seconds: Seconds of a step, as timed; `None` where it was not run.
    """

    name: str
    microbatch_size: int
    microbatches: int
    blocks: tuple[str, ...]
    predicted_bytes: int | None
    measured_bytes: int | None
    seconds: float | None

    @property
    def peak_bytes(self) -> int | None:
        """Peak in bytes: measured, or else predicted; `None` where neither is known."""
        return self.measured_bytes or self.predicted_bytes


@dataclass(frozen=True, slots=True, kw_only=True)
class Plan:
    """The best way to cut a batch on this machine, and what each way takes.

    Attributes:
        batch_size: Rows of the batch.
        microbatch_size: Rows that should go through the model at once: the fastest size that fits. Where rows are
            ragged, the size is ``microbatch_tokens``, and these are as many rows of the longest length.
        decided: Whether speed was measured exactly; if not, the size is a default or a choice from noisy times, and
            ``why`` says what was in the way.
        why: Why this size, in words.
        budget: Bytes that a step may have in use; `None` where nothing limits it.
        candidates: What each size takes, smallest first.
        words: What follows, in sentences.
        rests_on: What the prediction rests on, in words.
        ways: What a step takes with activations kept, computed again and offloaded, as far as they were tried.
        way: Which of them to take.
        microbatch_tokens: For ragged rows, the tokens that should go through the model at once, padding included.
        scaling: Hyperparameters for this batch, where they were asked for.
    """

    batch_size: int
    microbatch_size: int
    decided: bool
    why: str
    budget: int | None
    candidates: tuple[Candidate, ...]
    words: tuple[str, ...]
    rests_on: str
    ways: tuple[Way, ...]
    way: str
    microbatch_tokens: int | None = None
    scaling: Scaling | None = None

    @property
    def chosen(self) -> Way:
        """The way to take."""
        return next(each for each in self.ways if each.name == self.way)

    @property
    def microbatches(self) -> int:
        """Microbatches of the batch."""
        return self.chosen.microbatches

    @property
    def peak_bytes(self) -> int | None:
        """Peak of the chosen way, in bytes: measured, or else predicted; `None` where neither is known."""
        return self.chosen.peak_bytes

    @property
    def seconds(self) -> float | None:
        """Seconds of a step of the chosen way; `None` if it was not timed."""
        return self.chosen.seconds

    @property
    def checkpoint(self) -> tuple[str, ...]:
        """What to pass as ``checkpoint=``: blocks that are to be computed again; none where that does not pay."""
        return self.chosen.blocks

    @property
    def offload(self) -> str | None:
        """What to pass as ``offload=``: ``"activations"`` where that pays, else `None`."""
        return "activations" if self.way == OFFLOADED else None

    def cost(
        self, price: Price | str | None, *, steps: int | None = None, samples: int | None = None, device: str = "device"
    ) -> RunCost:
        """Compute the time and the money of a step and of a run on this device.

        The time is the measured one of the chosen way. A plan that timed nothing has no cost: its fields are `None`.

        Args:
            price: Price of the device, such as ``"2.50 EUR/h"``; `None` for the time alone.
            steps: Optimizer steps of the run; `None` for a step alone.
            samples: Samples of the run, instead of steps.
            device: Name of the device, for the words.

        Returns:
            Time and cost.

        Raises:
            ConfigError: The price is not one, both ``steps`` and ``samples`` are given, or one is below 1.
        """
        smaller = [each.microbatch_size for each in self.candidates if each.fits is not False]
        full = any(each.fits is False for each in self.candidates) and self.microbatch_size >= max(smaller, default=0)
        return RunCost(
            where=f"1 x {device}",
            devices=1,
            microbatch_size=self.chosen.microbatch_size,
            microbatches=self.microbatches,
            peak_bytes=self.peak_bytes,
            fits=True,
            step_seconds=self.seconds,
            least_step_seconds=self.seconds,
            steps=steps_of_run(self.batch_size, steps=steps, samples=samples),
            price=as_price(price),
            limit="memory" if full else "arithmetic",
            basis=MEASURED,
        )

    def table(self, *, width: int | None = None) -> str:
        """Write the candidates for people.

        Args:
            width: Columns that there are; `None` for no limit. Columns that do not fit are left out.

        Returns:
            A line for each size: the chosen one is marked.
        """
        head = ["", "microbatch", "microbatches", "predicted", "counted", "measured", "error", "fits", "step", "rows/s"]
        rows = [head, *(self._cells(each) for each in self.candidates)]
        return aligned(fitting(rows, ["counted", "error", "microbatches", "fits", "rows/s"], width))

    def ways_table(self, *, width: int | None = None) -> str:
        """Write what becomes of activations, for people.

        Args:
            width: Columns that there are; `None` for no limit. Columns that do not fit are left out.

        Returns:
            A line for each way that was tried: the chosen one is marked.
        """
        head = ["", "activations", "microbatch", "predicted", "measured", "step", "rows/s"]
        rows = [head]
        for each in self.ways:
            name = f"{each.name}, {len(each.blocks)} blocks" if each.blocks else each.name
            rows.append(
                [
                    ">" if each.name == self.way else "",
                    name,
                    str(each.microbatch_size),
                    *_told(each, self.batch_size),
                ]
            )
        return aligned(fitting(rows, ["predicted", "microbatch", "rows/s"], width))

    def chart(self) -> str:
        """Draw the speeds that were measured.

        Returns:
            A bar for each size that was timed, the fastest of full width; empty if none was.
        """
        timed = [(each, self.batch_size / each.seconds) for each in self.candidates if each.seconds]
        best = max((speed for _, speed in timed), default=0.0)
        width, bar = len(str(self.batch_size)), _BAR / best if best else 0.0
        return "\n".join(
            f"{each.microbatch_size:>{width}}  {'█' * max(1, round(bar * speed)):<{_BAR}}  {_speed(speed)} rows/s"
            f"{'  <' if each.microbatch_size == self.microbatch_size else ''}"
            for each, speed in timed
        )

    def as_dict(self) -> dict[str, Any]:
        """Return everything as plain values, for JSON.

        Returns:
            Nested dicts and lists; bytes and seconds as numbers.
        """
        found = {
            "batch_size": self.batch_size,
            "microbatch_size": self.microbatch_size,
            "microbatches": self.microbatches,
            "peak_bytes": self.peak_bytes,
            "seconds": self.seconds,
            "decided": self.decided,
            "why": self.why,
            "budget": self.budget,
            "candidates": [{**asdict(each), "error": each.error} for each in self.candidates],
            "words": list(self.words),
            "rests_on": self.rests_on,
            "ways": [asdict(each) for each in self.ways],
            "way": self.way,
            "checkpoint": self.checkpoint,
            "offload": self.offload,
            "microbatch_tokens": self.microbatch_tokens,
            "scaling": None if self.scaling is None else asdict(self.scaling),
        }
        return json.loads(json.dumps(found))

    @classmethod
    def from_dict(cls, found: Mapping[str, Any]) -> Self:
        """Make a plan of what `as_dict` returned, less its hyperparameters.

        Args:
            found: It.

        Returns:
            The plan.

        Raises:
            KeyError: It is of another version.
        """
        names = ("batch_size", "microbatch_size", "decided", "why", "budget", "rests_on", "way", "microbatch_tokens")
        fields = [field.name for field in dataclass_fields(Candidate)]
        candidates = tuple(Candidate(**{name: each[name] for name in fields}) for each in found["candidates"])
        ways = tuple(_way_from(each) for each in found["ways"])
        told = {name: found[name] for name in names}
        return cls(**told, candidates=candidates, ways=ways, words=tuple(found["words"]))

    def __str__(self) -> str:
        """Write the whole plan."""
        told = [self.table(), self.chart(), self.ways_table(), "\n".join(self.words)]
        if self.scaling is not None:
            told.append(self.scaling.table())
        return "\n\n".join(part for part in told if part)

    def _cells(self, each: Candidate) -> list[str]:
        predicted, measured, *speed = _told(each, self.batch_size)
        return [
            ">" if each.microbatch_size == self.microbatch_size and self.way == KEPT else "",
            str(each.microbatch_size),
            str(each.microbatches),
            predicted,
            "-" if each.counted_bytes is None else format_bytes(each.counted_bytes),
            measured,
            "-" if each.error is None else f"{each.error:+.1%}",
            "-" if each.fits is None else "yes" if each.fits else "no",
            *speed,
        ]


def _way_from(found: Mapping[str, Any]) -> Way:
    names = [field.name for field in dataclass_fields(Way)]
    values: dict[str, Any] = {name: found[name] for name in names} | {"blocks": tuple(found["blocks"])}
    return Way(**values)


def _speed(rows: float) -> str:
    return f"{rows:,.0f}" if rows >= 100 else f"{rows:.3g}"


def _told(each: Candidate | Way, rows: int) -> list[str]:
    """Write predicted and measured bytes, seconds of a step, and rows per second."""
    seconds = each.seconds
    return [
        "-" if each.predicted_bytes is None else format_bytes(each.predicted_bytes),
        "-" if each.measured_bytes is None else format_bytes(each.measured_bytes),
        "-" if seconds is None else format_time(seconds),
        "-" if not seconds else _speed(rows / seconds),
    ]
