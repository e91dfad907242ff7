"""Compute the time and the money of a run on one or several setups, and find the cheapest that meets a deadline."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from microbatch.errors import ConfigError
from microbatch.memory.byte_amounts import format_bytes
from microbatch.planning.money import Money, Price
from microbatch.planning.text_table import aligned, fitting
from microbatch.planning.time_words import format_time

MEASURED, PREDICTED = "measured", "predicted"


@dataclass(frozen=True, slots=True, kw_only=True)
class RunCost:
    """Hold what a run takes on one setup, in time and money.

    Attributes:
        where: The devices, in words, such as ``"4 x h100-80gb"``.
        devices: Devices that are paid for; at least 1.
        microbatch_size: Rows that go through the model at once.
        microbatches: Microbatches of a step, on the rank with the most.
        peak_bytes: Peak memory of a device; `None` where it is not known.
        fits: Whether the peak fits; `None` where it is not known.
        step_seconds: Seconds of a step: the longest that is expected; `None` where it is not known.
        least_step_seconds: Seconds of a step in which communication is hidden behind arithmetic as far as it can be.
        steps: Optimizer steps of the run; `None` where nobody said how long it is.
        price: Price of a device; `None` where nobody said.
        limit: What limits the speed, or the size: ``"memory"``, ``"arithmetic"`` or ``"network"``; `None` where it is
            not known.
        basis: ``"measured"`` for a step that was timed here, ``"predicted"`` for hardware that is not here.
    """

    where: str
    devices: int
    microbatch_size: int
    microbatches: int
    peak_bytes: int | None
    fits: bool | None
    step_seconds: float | None
    least_step_seconds: float | None
    steps: int | None
    price: Price | None
    limit: str | None
    basis: str

    @property
    def step_cost(self) -> Money | None:
        """Cost of a step on all devices; `None` where it does not fit, or its time or the price is not known."""
        return self._cost(self.step_seconds)

    @property
    def run_seconds(self) -> float | None:
        """Seconds of the run: steps * seconds of a step; `None` where it does not fit, or one is not known."""
        if self.fits is False or self.step_seconds is None or self.steps is None:
            return None
        return self.step_seconds * self.steps

    @property
    def run_cost(self) -> Money | None:
        """Cost of the run on all devices; `None` where its time or the price is not known."""
        return self._cost(self.run_seconds)

    def meets(self, deadline: float) -> bool | None:
        """Compare the run's time with a deadline.

        Args:
            deadline: Seconds.

        Returns:
            Whether the run ends in time; `None` where its time is not known.
        """
        return None if self.run_seconds is None else self.run_seconds <= deadline

    def words(self) -> str:
        """Write the time and the cost of a step and of the run.

        Returns:
            One line.
        """
        at = "" if self.price is None else f", at {self.price} a device"
        if self.fits is False:
            return f"cost on {self.where}{at}: not known, because it does not fit"
        if self.step_seconds is None:
            return f"cost on {self.where}{at}: not known, because the time of a step is not known"
        told = [f"a step {_time_and_money(self.step_seconds, self.step_cost)}"]
        if self.run_seconds is not None:
            told.append(f"{_steps(self.steps or 0)} {_time_and_money(self.run_seconds, self.run_cost)}")
        return f"cost on {self.where}{at}, {self.basis}: {'; '.join(told)}"

    def as_dict(self) -> dict[str, Any]:
        """Convert everything to values that JSON can hold.

        Returns:
            One key for each field and property; amounts of money as exact decimal texts.
        """
        step, run = self.step_cost, self.run_cost
        return {
            "where": self.where,
            "devices": self.devices,
            "microbatch_size": self.microbatch_size,
            "microbatches": self.microbatches,
            "peak_bytes": self.peak_bytes,
            "fits": self.fits,
            "step_seconds": self.step_seconds,
            "least_step_seconds": self.least_step_seconds,
            "steps": self.steps,
            "run_seconds": self.run_seconds,
            "price": None if self.price is None else str(self.price),
            "currency": None if self.price is None else self.price.currency,
            "step_cost": None if step is None else f"{step.amount:f}",
            "run_cost": None if run is None else f"{run.amount:f}",
            "limit": self.limit,
            "basis": self.basis,
        }

    def _cost(self, seconds: float | None) -> Money | None:
        if self.fits is False or self.price is None or seconds is None:
            return None
        return self.price.cost(seconds, devices=self.devices)


def as_price(price: Price | str | None) -> Price | None:
    """Parse a price that is still text.

    Args:
        price: The price, its text, or `None`.

    Returns:
        The price; `None` for `None`.

    Raises:
        ConfigError: The text is not a price.
    """
    return Price.parse(price) if isinstance(price, str) else price


def steps_of_run(batch_size: int, *, steps: int | None, samples: int | None) -> int | None:
    """Compute the optimizer steps of a run.

    Args:
        batch_size: Effective batch, in samples; at least 1.
        steps: Optimizer steps, if they are given; at least 1.
        samples: Samples to train on, if they are given instead; at least 1.

    Returns:
        Steps: as given, or ``ceil(samples / batch_size)``; `None` where neither is given.

    Raises:
        ConfigError: Both are given, or one is below 1.

    Example:
        >>> steps_of_run(64, steps=None, samples=1000)
        16
    """
    if steps is not None and samples is not None:
        raise ConfigError(f"steps={steps} and samples={samples} are both the length of the run; keep one of them")
    for name, number in (("steps", steps), ("samples", samples)):
        if number is not None and number < 1:
            raise ConfigError(f"{name} must be at least 1, not {number}")
    return steps if samples is None else -(-samples // batch_size)


def cheapest(costs: Sequence[RunCost], *, deadline: float | None = None) -> RunCost | None:
    """Find the setup on which the run costs least; of equal ones the fastest.

    Args:
        costs: What the run takes on each setup.
        deadline: Seconds within which the run has to end; `None` for no deadline.

    Returns:
        The cheapest one; `None` where none fits with a known cost, or none meets the deadline.
    """
    known: list[tuple[Any, float, RunCost]] = []
    for each in costs:
        # Without the length of a run the cheapest step is asked for; all have the same effective batch.
        money, seconds = (
            (each.step_cost, each.step_seconds) if each.steps is None else (each.run_cost, each.run_seconds)
        )
        if money is not None and seconds is not None and (deadline is None or each.meets(deadline)):
            known.append((money.amount, seconds, each))
    return min(known, key=lambda each: each[:2])[2] if known else None


def deadline_words(costs: Sequence[RunCost], deadline: float) -> str:
    """Write which setup meets a deadline at the lowest cost.

    Args:
        costs: What the run takes on each setup.
        deadline: Seconds within which the run has to end.

    Returns:
        One sentence, which names the fastest setup where none meets the deadline.
    """
    within, best = format_time(deadline), cheapest(costs, deadline=deadline)
    if best is not None and best.run_seconds is not None:
        told = _time_and_money(best.run_seconds, best.run_cost)
        name = f"cheapest within {within}: {best.where}" if len(costs) > 1 else f"within {within}: yes"
        return f"{name}, {told} ({best.basis})"
    timed = [each for each in costs if each.run_seconds is not None]
    if not timed:
        return f"within {within}: not known, because the time of no run is known"
    fastest = min(timed, key=lambda each: each.run_seconds or 0.0)
    told = _time_and_money(fastest.run_seconds or 0.0, fastest.run_cost)
    which = f"none of these; the fastest is {fastest.where}" if len(costs) > 1 else "no; the run takes"
    return f"within {within}: {which}{',' if len(costs) > 1 else ''} {told} ({fastest.basis})"


def costs_table(costs: Sequence[RunCost], *, best: RunCost | None = None, width: int | None = None) -> str:
    """Write a table of setups.

    Args:
        costs: What the run takes on each setup.
        best: The setup to mark.
        width: Columns that there are; `None` for no limit. Columns that do not fit are left out.

    Returns:
        A line for each setup. Columns of which nothing is known are left out.
    """
    head = ["", "devices", "cut", "peak", "fits", "step", "run", "step costs", "run costs", "limited by"]
    rows = [head, *(_cells(each, marked=each is best) for each in costs)]
    empty = [name for column, name in enumerate(head) if name and all(row[column] == "-" for row in rows[1:])]
    for name in empty:
        rows = [[cell for cell, title in zip(row, rows[0], strict=True) if title != name] for row in rows]
    spare = [name for name in ("step costs", "cut", "peak", "fits", "limited by") if name not in empty]
    return aligned(fitting(rows, spare, width))


def _cells(each: RunCost, *, marked: bool) -> list[str]:
    fits = each.fits is not False
    return [
        ">" if marked else "",
        each.where,
        f"{each.microbatches} x {each.microbatch_size}",
        "-" if each.peak_bytes is None else format_bytes(each.peak_bytes),
        "-" if each.fits is None else "yes" if each.fits else "no",
        "-" if each.step_seconds is None or not fits else format_time(each.step_seconds),
        "-" if each.run_seconds is None else format_time(each.run_seconds),
        "-" if each.step_cost is None else str(each.step_cost),
        "-" if each.run_cost is None else str(each.run_cost),
        each.limit or "-",
    ]


def _time_and_money(seconds: float, money: Money | None) -> str:
    return format_time(seconds) if money is None else f"{format_time(seconds)}, {money}"


def _steps(steps: int) -> str:
    return "1 step" if steps == 1 else f"{steps:,} steps"
