"""The curve of each run of a sweep, and what each batch size took to the target."""

from __future__ import annotations

import math
import statistics
from dataclasses import dataclass

from microbatch.tuning.sweep_fit import crossing

FINISHED, REACHED, BEATEN, DIVERGED = "finished", "reached the target", "beaten", "diverged"
"""Why a run ended."""


@dataclass(frozen=True, slots=True, kw_only=True)
class CurvePoint:
    """Hold one point of a run's curve.

    Attributes:
        steps: Optimizer steps taken.
        samples: Samples learned from.
        loss: Validation loss, or the training loss since the last point where the job has no validation.
        noise_scale: Gradient noise scale measured last, in samples; `None` where it is not known.
    """

    steps: int
    samples: int
    loss: float
    noise_scale: float | None


@dataclass(frozen=True, slots=True, kw_only=True)
class SweepRun:
    """Hold one run: a batch size, a learning rate and a seed.

    Attributes:
        batch_size: Effective batch, in samples.
        microbatch_size: Samples that went through the model at once.
        learning_rate: Peak learning rate of the first parameter group.
        seed: Seed of the run.
        ended: ``"finished"``, ``"reached the target"``, ``"beaten"`` by another learning rate, or ``"diverged"``.
        curve: Its points, at rising numbers of samples.
        seconds_per_sample: Median time of a step over its samples; `None` before the first step.
    """

    batch_size: int
    microbatch_size: int
    learning_rate: float
    seed: int
    ended: str
    curve: tuple[CurvePoint, ...]
    seconds_per_sample: float | None

    @property
    def well(self) -> bool:
        """Return whether the run was neither beaten nor diverged."""
        return self.ended not in {BEATEN, DIVERGED}

    @property
    def best_loss(self) -> float:
        """Return the lowest loss of the curve; infinite without points."""
        return min((point.loss for point in self.curve), default=math.inf)

    def early(self, target: float) -> bool:
        """Return whether the first point is at the target already, so that nobody knows when it was reached.

        Args:
            target: The loss to reach.

        Returns:
            Whether it is.
        """
        return bool(self.curve) and self.curve[0].loss <= target

    def to_target(self, target: float) -> tuple[float, float] | None:
        """Find what the run took to a target.

        Args:
            target: The loss to reach.

        Returns:
            Steps and samples, read between the points; `None` if the target was not reached, or before the first point.
        """
        if self.early(target):
            return None
        losses = [point.loss for point in self.curve]
        steps = crossing(losses, [point.steps for point in self.curve], target)
        samples = crossing(losses, [point.samples for point in self.curve], target)
        return None if steps is None or samples is None else (steps, samples)

    def noise_scale(self, samples: float) -> float | None:
        """Average the noise scales that were measured on the way.

        Args:
            samples: Samples up to which they count.

        Returns:
            The geometric mean, in samples; `None` where none was measured.
        """
        found = [point.noise_scale for point in self.curve if point.noise_scale and point.samples <= samples]
        return statistics.geometric_mean(found) if found else None


@dataclass(frozen=True, slots=True, kw_only=True)
class BatchResult:
    """Hold what one batch size took, at the best of its learning rates.

    Attributes:
        batch_size: Effective batch, in samples.
        microbatch_size: Samples that went through the model at once.
        learning_rate: Peak learning rate of the first parameter group.
        rates: Learning rates that were tried.
        seeds: Runs at this rate that ended well.
        best_loss: Mean over these of the lowest loss; `None` if none ended well.
        reached: Runs that reached the target after the first point.
        steps: Steps to the target, the geometric mean over the seeds; `None` if not every seed did.
        samples: Samples to the target, likewise.
        spread: Standard deviation over the seeds of the logarithm of the samples; `None` with fewer than two.
        seconds_per_sample: Median time of a step over its samples.
        noise_scale: Gradient noise scale on the way to the target, in samples; `None` where it was not measured.
    """

    batch_size: int
    microbatch_size: int
    learning_rate: float
    rates: int
    seeds: int
    best_loss: float | None
    reached: int
    steps: float | None
    samples: float | None
    spread: float | None
    seconds_per_sample: float | None
    noise_scale: float | None

    @property
    def seconds(self) -> float | None:
        """Return the time of steps to the target, without validation; `None` where it is not known."""
        if self.samples is None or self.seconds_per_sample is None:
            return None
        return self.samples * self.seconds_per_sample


@dataclass(frozen=True, slots=True, kw_only=True)
class SweepProgress:
    """Hold what has just been done of a sweep.

    Attributes:
        point: Points of the curves that this run has reached; 0 while sizes and rates are being found.
        points: Points of a whole curve.
        batch_size: Effective batch of the run.
        learning_rate: Its peak learning rate.
        seed: Its seed; `None` while sizes and rates are being found.
        loss: Its loss at the point; `None` before the first.
        running: Runs that go on.
        share: How much of the whole sweep is done, from 0 to 1, if no more runs end early.
    """

    point: int
    points: int
    batch_size: int
    learning_rate: float
    seed: int | None = None
    loss: float | None = None
    running: int = 0
    share: float = 0.0
