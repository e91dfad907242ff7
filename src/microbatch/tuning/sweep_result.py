"""What a sweep measured: curves, steps and samples to the target, and the critical batch size."""

from __future__ import annotations

import statistics
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

from microbatch.errors import ConfigError
from microbatch.planning.hyperparameters import is_number
from microbatch.tuning.sweep_fit import CriticalBatch
from microbatch.tuning.sweep_records import BatchResult, CurvePoint, SweepRun
from microbatch.tuning.sweep_words import reading, table, target_line


@dataclass(frozen=True, slots=True, kw_only=True)
class Sweep:
    """Hold the measurements of one job at several effective batches.

    Print it for a table and its reading.

    Attributes:
        batches: One record for each batch size, smallest first.
        runs: Every run with its curve.
        target: The loss that steps and samples are counted to; `None` if no run got anywhere.
        target_given: Whether the caller set the target. If not, it is the worst of the best losses of all runs.
        critical: The fit of the critical batch size; `None` with fewer than two batch sizes to fit.
        measure: What the curves show: ``"validation loss"`` or ``"training loss"``.
        unit: What the job's samples are counted as in words.
        notes: What the reader has to know: stopped runs, rules out of their range, what was left out.
        advice: What follows, in one or two sentences.
    """

    batches: tuple[BatchResult, ...]
    runs: tuple[SweepRun, ...]
    target: float | None
    target_given: bool
    critical: CriticalBatch | None
    measure: str
    notes: tuple[str, ...]
    advice: str
    unit: str = "samples"

    @property
    def noise_scale(self) -> float | None:
        """Return the noise scale over all batch sizes, the geometric mean; `None` where it was not measured."""
        found = [each.noise_scale for each in self.batches if each.noise_scale is not None]
        return statistics.geometric_mean(found) if found else None

    def costs(self, price_per_hour: float) -> dict[int, float | None]:
        """Compute what the way to the target costs on this machine.

        Args:
            price_per_hour: Price of the machine for an hour, in any currency; above 0.

        Returns:
            The cost by batch size, in the same currency; `None` where the target was not reached.

        Raises:
            ConfigError: The price is not a positive number.
        """
        if not is_number(price_per_hour) or price_per_hour <= 0:
            raise ConfigError(f"price_per_hour must be a positive number, not {price_per_hour!r}")
        return {
            each.batch_size: None if each.seconds is None else price_per_hour * each.seconds / 3600
            for each in self.batches
        }

    def as_dict(self) -> dict[str, Any]:
        """Convert everything to values that JSON can hold.

        Returns:
            One key for each field, and ``noise_scale``.
        """
        return asdict(self) | {
            "noise_scale": self.noise_scale,
            "batches": [asdict(each) | {"seconds": each.seconds} for each in self.batches],
        }

    @classmethod
    def from_dict(cls, told: Mapping[str, Any]) -> Sweep:
        """Make a sweep of what `as_dict` returned.

        Args:
            told: The values.

        Returns:
            The sweep.
        """
        runs = tuple(_run(each) for each in told["runs"])
        batches = tuple(BatchResult(**{k: v for k, v in each.items() if k != "seconds"}) for each in told["batches"])
        critical = None if told["critical"] is None else CriticalBatch(**told["critical"])
        own = {key: told[key] for key in ("target", "target_given", "measure", "advice", "unit")}
        return cls(runs=runs, batches=batches, critical=critical, notes=tuple(told["notes"]), **own)

    @property
    def goal(self) -> str:
        """Write what steps, samples and time are counted to."""
        return target_line(self.target, given=self.target_given, measure=self.measure)

    @property
    def sentences(self) -> tuple[str, ...]:
        """Write what follows: the advice, the fit, and the comparison with the noise scale."""
        return tuple(reading(self.advice, self.critical, self.noise_scale))

    def table(self, *, width: int | None = None) -> str:
        """Write one line for each batch size.

        Args:
            width: Columns that there are; `None` for no limit. Columns that do not fit are left out.

        Returns:
            Several lines, the first of them the headings.
        """
        return table(self.batches, width=width)

    def __str__(self) -> str:
        """Write the target, the table, what follows, and the notes."""
        return "\n".join([self.goal, "", self.table(), "", *self.sentences, *(f"! {note}" for note in self.notes)])


def _run(told: Mapping[str, Any]) -> SweepRun:
    given: dict[str, Any] = {**told, "curve": tuple(CurvePoint(**point) for point in told["curve"])}
    return SweepRun(**given)
