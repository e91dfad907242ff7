"""Read the flags of ``plan`` that ask for time and money: ``--price``, ``--deadline``, ``--steps``, ``--samples``."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

from microbatch.errors import ConfigError
from microbatch.planning.money import Price, parse_deadline, parse_prices
from microbatch.planning.run_costs import RunCost

_Read = TypeVar("_Read")
COST_FLAGS = ("price", "deadline", "steps", "samples")


@dataclass(frozen=True, slots=True, kw_only=True)
class CostFlags:
    """Hold what was asked about time and money.

    Attributes:
        price: One price for every device, or a price for each name; `None` if none was given.
        deadline: Seconds within which the run has to end; `None` likewise.
        steps: Optimizer steps of the run; `None` for the job's own.
        samples: Samples of the run, instead of steps.
    """

    price: Price | Mapping[str, Price] | None = None
    deadline: float | None = None
    steps: int | None = None
    samples: int | None = None

    @property
    def any(self) -> bool:
        """Return whether anything was asked."""
        return self != CostFlags()

    def length(self, job_steps: int | None) -> dict[str, int | None]:
        """Return the length of the run, as `Plan.cost` takes it: given, or else the job's.

        Args:
            job_steps: Optimizer steps that the job asks for; `None` if it does not.

        Returns:
            ``steps`` and ``samples``.

        Raises:
            ConfigError: There is a deadline, and neither the flags nor the job say how long the run is.
        """
        steps = job_steps if self.steps is None and self.samples is None else self.steps
        if self.deadline is not None and steps is None and self.samples is None:
            raise ConfigError("--deadline needs the length of the run: --steps 1000, or --samples 64000")
        return {"steps": steps, "samples": self.samples}

    def price_here(self) -> Price | None:
        """Return the price of the one device that is here.

        Raises:
            ConfigError: ``--price`` names devices.
        """
        if isinstance(self.price, Mapping):
            raise ConfigError('--price names devices, and this plan is for the one here: write --price "2.50/h"')
        return self.price

    def price_of(self, devices: Sequence[str], find: Callable[[str], str]) -> dict[str, Price | None]:
        """Return the price of each device of a comparison.

        Args:
            devices: Full names of the devices.
            find: Turns a name as written into a full name.

        Returns:
            Prices by full name; `None` where ``--price`` was not given.

        Raises:
            ConfigError: ``--price`` leaves out a device, names another one or one twice, or has one price for several.
        """
        if not isinstance(self.price, Mapping):
            if self.price is not None and len(devices) > 1:
                form = ",".join(f"{name}=2.50/h" for name in devices)
                raise ConfigError(f'--price has one price for {len(devices)} devices: write --price "{form}"')
            return dict.fromkeys(devices, self.price)
        found: dict[str, Price | None] = {}
        for name, price in self.price.items():
            device = _read("--price", name, find)
            if device not in devices:
                raise ConfigError(
                    f"--price has a price for {name}, and no --device has this name; leave that price out"
                )
            if device in found:
                raise ConfigError(f"--price has two prices for {device}; keep one")
            found[device] = price
        for device in devices:
            if device not in found:
                raise ConfigError(f"--price has no price for {device}")
        return found


def read_cost_flags(flags: Mapping[str, Any]) -> CostFlags:
    """Read the flags.

    Args:
        flags: ``price``, ``deadline``, ``steps`` and ``samples``; `None` or left out for what was not given.

    Returns:
        What they ask for.

    Raises:
        ConfigError: One cannot be read, two contradict, or one needs another.

    Example:
        >>> read_cost_flags({"deadline": "6 h", "price": "2.50/h"}).deadline
        21600.0
    """
    told = {name: flags[name] for name in COST_FLAGS if flags.get(name) is not None}
    for name in ("steps", "samples"):
        if name in told and (not isinstance(told[name], int) or told[name] < 1):
            raise ConfigError(f"--{name} is {json.dumps(told[name])}: it must be a whole number, at least 1")
    if "steps" in told and "samples" in told:
        raise ConfigError("--steps and --samples are both the length of the run; keep one of them")
    if "deadline" in told and "price" not in told:
        raise ConfigError('--deadline finds the cheapest plan, so it needs the price of a device: --price "2.50/h"')
    if "price" in told:
        told["price"] = _read("--price", told["price"], parse_prices)
    if "deadline" in told:
        told["deadline"] = _read("--deadline", told["deadline"], parse_deadline)
    return CostFlags(**told)


def cost_as_dict(cost: RunCost, asked: CostFlags) -> dict[str, Any]:
    """Convert a cost, and whether it meets the deadline, to values that JSON can hold.

    Args:
        cost: The cost.
        asked: What was asked.

    Returns:
        The fields of the cost, ``deadline_seconds`` and ``meets_deadline``, which are `None` without a deadline.
    """
    meets = None if asked.deadline is None else cost.meets(asked.deadline)
    return {**cost.as_dict(), "deadline_seconds": asked.deadline, "meets_deadline": meets}


def _read(flag: str, text: str, parse: Callable[[str], _Read]) -> _Read:
    try:
        return parse(text)
    except ConfigError as error:
        raise ConfigError(f"{flag}: {error}") from error
