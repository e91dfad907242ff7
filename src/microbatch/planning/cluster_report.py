"""Hold a plan for a cluster: whether the model fits, where the bytes are, and which changes make it fit."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

from microbatch.memory.budget import format_bytes
from microbatch.planning.arithmetic import Division
from microbatch.planning.communication import Communication, Way
from microbatch.planning.money import Price
from microbatch.planning.run_costs import PREDICTED, RunCost, as_price, steps_of_run
from microbatch.planning.sharding import Setup


@dataclass(frozen=True, slots=True, kw_only=True)
class Alternative:
    """Hold a setup that fits, and how it differs from the planned one.

    Attributes:
        changes: The differences, in words.
        setup: The whole setup.
        microbatch_size: Rows of a microbatch: the size that was asked for, or the largest that fits.
        peak_bytes: Peak memory of the rank with the highest peak.
        host_bytes: Host memory of all ranks together.
    """

    changes: tuple[str, ...]
    setup: Setup
    microbatch_size: int
    peak_bytes: int
    host_bytes: int

    @property
    def words(self) -> str:
        """Describe the alternative in one line."""
        host = f", and {format_bytes(self.host_bytes)} of host memory" if self.host_bytes else ""
        return f"{'; '.join(self.changes)}: {format_bytes(self.peak_bytes)}{host}"


@dataclass(frozen=True, slots=True, kw_only=True)
class ClusterPlan:
    """Hold the memory and the communication that training takes on hardware that need not be here.

    Attributes:
        name: Name of the model.
        parameters: Number of the model's parameters.
        setup: Devices, ranks, and how the state is sharded.
        division: The effective batch, its shares of the ranks, and its microbatches.
        parts: Bytes at the peak by category, of the rank with the highest peak.
        where: The phase and the module in which the peak is.
        resident_bytes: Bytes of parameters, gradients and optimizer state, which no microbatch size changes.
        host_bytes: Host memory of all ranks together.
        largest: Rows of the largest microbatch that fits; 0 if none does.
        alternatives: Setups that fit, cheapest change first; empty where this one fits.
        warnings: Risks of this setup, one sentence each.
        communication: Bytes that the ranks exchange, and the time of it; `None` for one rank.
        arithmetic_seconds: Seconds of a step's arithmetic on the rank that has most; `None` where no speed is known.
        arithmetic_source: Where that comes from, in words.
    """

    name: str
    parameters: int
    setup: Setup
    division: Division
    parts: Mapping[str, int]
    where: str
    resident_bytes: int
    host_bytes: int
    largest: int
    alternatives: tuple[Alternative, ...]
    warnings: tuple[str, ...]
    communication: Communication | None = None
    arithmetic_seconds: float | None = None
    arithmetic_source: str = ""

    @property
    def peak_bytes(self) -> int:
        """Return the peak memory of a rank, in bytes."""
        return sum(self.parts.values())

    @property
    def fits(self) -> bool:
        """Return whether the peak is no more than the device's usable memory."""
        return self.peak_bytes <= self.setup.device.usable_bytes

    @property
    def way(self) -> Way | None:
        """Return the way to communicate that the setup's memory is of; `None` for one rank."""
        if self.communication is None:
            return None
        return self.communication.ways[self.setup.shares_gradients and self.setup.reduce == "window"]

    def cost(
        self, price: Price | str | None = None, *, steps: int | None = None, samples: int | None = None
    ) -> RunCost:
        """Compute the predicted time and money of a step and of a run on all ranks.

        The time is that of arithmetic and communication, with nothing beside one another. Not in it are the optimizer's
        own step, moves to the host, and waiting for data.

        Args:
            price: Price of a device, such as ``"2.50 EUR/h"``; `None` for the time alone.
            steps: Optimizer steps of the run; `None` for a step alone.
            samples: Samples of the run, instead of steps.

        Returns:
            Time and cost; `None` in them where it does not fit, or a speed is not known.

        Raises:
            ConfigError: The price is not one, both ``steps`` and ``samples`` are given, or one is below 1.
        """
        way, arithmetic = self.way, self.arithmetic_seconds
        least, most = (arithmetic, arithmetic) if way is None else (way.least_seconds, way.most_seconds)
        limit = None
        if not self.fits:
            limit = "memory"
        elif most is not None and arithmetic is not None:
            limit = "network" if way is not None and (way.seconds or 0.0) > arithmetic else "arithmetic"
        return RunCost(
            where=f"{self.setup.ranks} x {self.setup.device.name}",
            devices=self.setup.ranks,
            microbatch_size=self.division.microbatch_size,
            microbatches=self.division.microbatches,
            peak_bytes=self.peak_bytes,
            fits=self.fits,
            step_seconds=most,
            least_step_seconds=least,
            steps=steps_of_run(self.division.batch_size, steps=steps, samples=samples),
            price=as_price(price),
            limit=limit,
            basis=PREDICTED,
        )

    @property
    def words(self) -> str:
        """Describe the result in a few sentences."""
        device, precision = self.setup.device, self.setup.precision
        usable, peak = format_bytes(device.usable_bytes), format_bytes(self.peak_bytes)
        rows = f"microbatches of {self.division.microbatch_size}"
        if self.fits:
            larger = f"the largest microbatch that fits is {self.largest}"
            return f"It fits: {peak} of {usable} on each rank with {rows}; {larger}."
        resident = format_bytes(self.resident_bytes)
        said = f"It does not fit: {peak} on each rank with {rows}, where {device.name} has {usable}."
        if self.resident_bytes > device.usable_bytes:
            said += (
                f" Weights, gradients and optimizer state alone are {resident} ({precision.bytes} bytes of each of "
                f"{self.parameters:,} parameters, as they are shared): the number of microbatches changes none of it."
            )
        elif self.largest:
            said += f" A microbatch of {self.largest} fits, at the same effective batch."
        elif self.setup.checkpointing == "none":
            said += f" Of the state there are {resident}; even one row's activations do not fit beside it."
        if not self.alternatives:
            said += " No change that is known here makes it fit."
        return said

    def table(self) -> str:
        """Format the plan as text for people.

        Returns:
            Several lines: setup, batch, bytes by category, result, communication, and the setups that would fit.
        """
        peak, usable = self.peak_bytes, self.setup.device.usable_bytes
        lines = [
            f"{self.name}, {self.parameters:,} parameters",
            self.setup.words,
            self.division.describe().splitlines()[0],
            "",
            f"peak {format_bytes(peak)} on a rank, {peak / usable:.0%} of what it has, in {self.where}",
            *(f"  {size / max(1, peak):4.0%}  {format_bytes(size):>9}  {name}" for name, size in self.parts.items()),
        ]
        if self.host_bytes:
            lines.append(f"        {format_bytes(self.host_bytes):>9}  on the host, all ranks together")
        lines += ["", self.words]
        if self.communication is not None:
            lines += ["", *self.communication.lines()]
        if self.alternatives:
            lines += ["", "what fits, cheapest change first"]
            lines += [f"  {index}. {each.words}" for index, each in enumerate(self.alternatives, 1)]
        return "\n".join([*lines, *(f"! {each}" for each in self.warnings)])

    def as_dict(self) -> dict[str, Any]:
        """Convert the plan to values that JSON can hold.

        Returns:
            One key for each field, and ``peak_bytes``, ``fits`` and ``words``.
        """
        found = asdict(self)
        found["setup"] = _plain(self.setup)
        found["division"] = self.division.as_dict()
        for written, each in zip(found["alternatives"], self.alternatives, strict=True):
            written["setup"] = _plain(each.setup)
            written["changes"] = list(each.changes)
        found["alternatives"], found["warnings"] = list(found["alternatives"]), list(self.warnings)
        found["communication"] = None if self.communication is None else self.communication.as_dict()
        return {**found, "peak_bytes": self.peak_bytes, "fits": self.fits, "words": self.words}


def _plain(setup: Setup) -> dict[str, Any]:
    """Convert a setup to values that JSON can hold."""
    found = asdict(setup)
    found["precision"]["dtype"] = str(setup.precision.dtype).removeprefix("torch.")
    return found
