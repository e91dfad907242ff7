"""What a plan is: the microbatch size to take, what every other one would take, and what that means in words."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from dataclasses import fields as dataclass_fields
from typing import Any, Self

from microbatch.memory.budget import format_bytes
from microbatch.planning.scaling import Scaling

_BAR = 24


@dataclass(frozen=True, slots=True, kw_only=True)
class Candidate:
    """Say what one microbatch size takes.

    Attributes:
        microbatch_size: Rows that go through the model at once.
        microbatches: Microbatches of the batch.
        predicted_bytes: Predicted peak; `None` where nothing could be rehearsed.
        measured_bytes: Measured peak; `None` where it was not run, or nobody counted.
        fits: Whether the prediction is within the budget; `None` where either is unknown.
        seconds: Seconds of a step, as timed; `None` where it was not run.
    """

    microbatch_size: int
    microbatches: int
    predicted_bytes: int | None
    measured_bytes: int | None
    fits: bool | None
    seconds: float | None

    @property
    def error(self) -> float | None:
        """By which part of the measured peak the prediction is above it (or, negative, below it)."""
        if self.predicted_bytes is None or not self.measured_bytes:
            return None
        return self.predicted_bytes / self.measured_bytes - 1


@dataclass(frozen=True, slots=True, kw_only=True)
class Plan:
    """Say how a batch is best cut on this machine.

    Attributes:
        batch_size: Rows of the batch.
        microbatch_size: Rows that should go through the model at once: the fastest size that fits.
        decided: Whether speed was measured; if not, the size is a default, and ``why`` says what was in the way.
        why: Why this size, in words.
        budget: Bytes that a step may have in use; `None` where nothing limits it.
        candidates: What each size takes, smallest first.
        words: What follows, in sentences.
        rests_on: What the prediction rests on, in words.
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
    scaling: Scaling | None = None

    @property
    def chosen(self) -> Candidate:
        """The candidate of the chosen size."""
        return next(each for each in self.candidates if each.microbatch_size == self.microbatch_size)

    @property
    def microbatches(self) -> int:
        """Microbatches of the batch."""
        return self.chosen.microbatches

    @property
    def peak_bytes(self) -> int | None:
        """Peak at the chosen size, in bytes: measured, or else predicted; `None` where neither is known."""
        return self.chosen.measured_bytes or self.chosen.predicted_bytes

    @property
    def seconds(self) -> float | None:
        """Seconds of a step at the chosen size; `None` if it was not timed."""
        return self.chosen.seconds

    def table(self) -> str:
        """Write the candidates for people.

        Returns:
            A line for each size: the chosen one is marked.
        """
        head = ["", "microbatch", "microbatches", "predicted", "measured", "error", "fits", "step", "rows/s"]
        rows = [head, *(self._cells(each) for each in self.candidates)]
        widths = [max(len(row[column]) for row in rows) for column in range(len(head))]
        lines = ("  ".join(cell.rjust(width) for cell, width in zip(row, widths, strict=True)) for row in rows)
        return "\n".join(line.rstrip() for line in lines)

    def chart(self) -> str:
        """Draw the speeds that were measured.

        Returns:
            A bar for each size that was timed, the fastest of full width; empty if none was.
        """
        timed = [(each, self.batch_size / each.seconds) for each in self.candidates if each.seconds]
        best = max((speed for _, speed in timed), default=0.0)
        width = len(str(self.batch_size))
        return "\n".join(
            f"{each.microbatch_size:>{width}}  {'█' * max(1, round(_BAR * speed / best)):<{_BAR}}  {speed:,.4g} rows/s"
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
        names = ("batch_size", "microbatch_size", "decided", "why", "budget", "rests_on")
        fields = [field.name for field in dataclass_fields(Candidate)]
        candidates = tuple(Candidate(**{name: each[name] for name in fields}) for each in found["candidates"])
        return cls(**{name: found[name] for name in names}, candidates=candidates, words=tuple(found["words"]))

    def __str__(self) -> str:
        """Write the whole plan."""
        told = [self.table(), self.chart(), "\n".join(self.words)]
        if self.scaling is not None:
            told.append(self.scaling.table())
        return "\n\n".join(part for part in told if part)

    def _cells(self, each: Candidate) -> list[str]:
        seconds = each.seconds
        return [
            ">" if each.microbatch_size == self.microbatch_size else "",
            str(each.microbatch_size),
            str(each.microbatches),
            "-" if each.predicted_bytes is None else format_bytes(each.predicted_bytes),
            "-" if each.measured_bytes is None else format_bytes(each.measured_bytes),
            "-" if each.error is None else f"{each.error:+.1%}",
            "-" if each.fits is None else "yes" if each.fits else "no",
            "-" if seconds is None else f"{seconds:.2f} s" if seconds >= 1 else f"{seconds * 1000:.3g} ms",
            "-" if not seconds else f"{self.batch_size / seconds:,.4g}",
        ]


def words_for(plan: Plan, *, asked: int | None, batch_norms: Sequence[str], offers_checkpointing: bool) -> list[str]:
    """Say in sentences what follows from a plan.

    Args:
        plan: It; its own words are not looked at.
        asked: Microbatch size that the user has now; `None` if none.
        batch_norms: Names of the modules that take statistics of their microbatch.
        offers_checkpointing: Whether the model has a switch for activation checkpointing.

    Returns:
        Sentences, without a full stop.
    """
    return list(_words(plan, asked, batch_norms=batch_norms, offers_checkpointing=offers_checkpointing))


def _words(plan: Plan, asked: int | None, *, batch_norms: Sequence[str], offers_checkpointing: bool) -> Iterator[str]:
    size = plan.microbatch_size
    if plan.microbatches == 1:
        yield "the whole batch fits and is fastest: do not accumulate" if plan.decided else "the whole batch fits"
    else:
        yield f"microbatches of {size} rows, {plan.microbatches} of them: {plan.why}"
    by_size = {each.microbatch_size: each for each in plan.candidates}
    share = None if plan.peak_bytes is None or not plan.budget else plan.peak_bytes / plan.budget
    now = by_size.get(asked or 0)
    if share is not None:
        at = f"memory is at {share:.0%} of the budget of {format_bytes(plan.budget or 0)}"
        yield f"{at}: one more step down is safer" if share > 0.95 and size > 1 else at
    if now is not None and now.seconds and plan.seconds and now.microbatch_size != size:
        yield f"a microbatch of {size} is {now.seconds / plan.seconds:.1f} times as fast as the {asked} asked for"
    larger = [each for each in plan.candidates if each.microbatch_size > size and each.seconds]
    if larger and plan.seconds and plan.decided:
        slow = larger[-1]
        yield (
            f"a microbatch of {slow.microbatch_size} fits too and is slower: "
            f"{(slow.seconds or 0) / plan.seconds:.2f} times the time of a step"
        )
    if batch_norms and size < 8 and plan.microbatches > 1:
        yield (
            f"BatchNorm ({batch_norms[0]}{' and others' if len(batch_norms) > 1 else ''}) takes statistics of "
            f"microbatches of {size} rows: under 8 they are noisy"
        )
    yield (
        "the model has a switch for activation checkpointing (gradient_checkpointing_enable), which was left as it is: "
        "plan again with it on to compare"
        if offers_checkpointing
        else "the model has no switch for activation checkpointing, so nothing is said about it"
    )
