"""Take optimizer steps, and measure the time, the memory and the gradient noise scale of each."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from torch.optim import Optimizer

from microbatch.gradients.noise_estimate import NoiseScale
from microbatch.memory.meter import MemoryMeter
from microbatch.ranks.pipeline import Pipeline
from microbatch.step.accumulator import Accumulator
from microbatch.step.events import Event, MicrobatchDone, Retry
from microbatch.step.record import Step
from microbatch.train.baselines import take_step
from microbatch.train.job import Job
from microbatch.train.run_config import RunConfig
from microbatch.train.timeline import StepTimeline

_METERED_EVERY = 20
"""The meter costs a few percent of a step on the CPU, and the peak of a step hardly ever changes."""

_MEASURED_EVERY = 4
"""Steps between two measurements of the noise scale in a run whose memory is not metered."""


@dataclass(frozen=True, slots=True, kw_only=True)
class MeasuredStep:
    """Hold a step and its measurements.

    Attributes:
        step: The record of the step.
        loss: Its loss, read from the device.
        seconds: Time from the start of reading the batch to the end of the step's work.
        peak_bytes: Peak memory of the step; `None` where it was not measured.
        memory: Bytes at the peak by category; empty where the meter was off.
        timeline: Seconds of each part of the step; `None` for a step of too many microbatches.
        noise_scale: The gradient noise scale, in samples; `None` where it was not measured, or is not known yet.
        unit: What the job's loss counts, in the plural, such as ``"tokens"``.
    """

    step: Step
    loss: float
    seconds: float
    peak_bytes: int | None
    memory: Mapping[str, int]
    timeline: Mapping[str, Any] | None
    noise_scale: float | None
    unit: str

    def metrics(self, *, index: int, epoch: int, rate: float, validation: Mapping[str, float]) -> dict[str, Any]:
        """Convert the measurements to a line of metrics.

        Args:
            index: Optimizer steps taken, including this one.
            epoch: Epoch that the batch is from.
            rate: Learning rate of the first parameter group in this step.
            validation: Means of the validation after this step by name; empty where there was none.

        Returns:
            Plain values by name; optional ones only where they were measured.
        """
        step = self.step
        return {
            "step": index,
            "epoch": epoch,
            "loss": self.loss,
            **({"terms": {name: float(value) for name, value in step.terms.items()}} if step.terms else {}),
            "lr": rate,
            "grad_norm": float(step.grad_norm),
            "count": float(step.count),
            "samples": int(step.samples),
            "microbatches": step.microbatches,
            "microbatch_size": int(step.microbatch_size),
            "retries": step.retries,
            "applied": step.applied,
            "seconds": self.seconds,
            "per_second": float(step.count) / self.seconds,
            "unit": self.unit,
            "peak_bytes": self.peak_bytes,
            **({"comm_bytes": step.comm_bytes, "comm_calls": step.comm_calls} if step.comm_calls else {}),
            **({"sync": step.sync} if step.sync else {}),
            **({"memory": self.memory} if self.memory else {}),
            **({"timeline": self.timeline} if self.timeline else {}),
            **({"noise_scale": self.noise_scale} if self.noise_scale else {}),
            **({"validation": validation} if validation else {}),
        }


class MeasuredSteps:
    """Take a job's steps and measure each.

    Args:
        job: Model and loss.
        config: The run's configuration.
        optimizers: The job's optimizers.

    Attributes:
        noise_scale: How often the accumulator measures the gradient noise scale; `None` where it cannot.
    """

    def __init__(self, job: Job, *, config: RunConfig, optimizers: Sequence[Optimizer]) -> None:
        self._config, self._optimizers = config, optimizers
        self._timeline = StepTimeline(optimizers)
        self._job = self._timeline.of(job, plain=config.plain)
        # In a step that is not metered: weight gradients are not added inside the matrix product in a measured window,
        # so it takes more memory than the others.
        every = _METERED_EVERY if config.metered else _MEASURED_EVERY
        self.noise_scale = NoiseScale(every=every) if _has_samples(job, config) else None
        self._metered = 0

    def heard(self, event: Event) -> None:
        """Record an event of the step that is being taken.

        Args:
            event: An event of the accumulator.
        """
        if isinstance(event, MicrobatchDone):
            self._timeline.microbatch_done()
        elif isinstance(event, Retry):
            self._timeline.start_over()

    def take(self, accumulator: Accumulator, batch: Any, *, index: int, started: float) -> MeasuredStep:
        """Take one step and measure it.

        Args:
            accumulator: The accumulator over the job's model and optimizers; it reports its events to `heard`.
            batch: This rank's batch, on the host.
            index: Optimizer steps taken before.
            started: Reading of ``time.perf_counter()`` before the batch was read.

        Returns:
            The step and its measurements.
        """
        self._timeline.begin(wait=time.perf_counter() - started)
        step, peak_bytes, memory = self._metered_step(accumulator, batch, index)
        # Reading the loss waits for the device, so the time includes all work and not only the launches.
        loss = float(step.loss)
        seconds = time.perf_counter() - started
        measured = self.noise_scale is not None and self.noise_scale.due(step.index)
        return MeasuredStep(
            step=step,
            loss=loss,
            seconds=seconds,
            peak_bytes=peak_bytes,
            memory=memory,
            timeline=self._timeline.record(),
            noise_scale=step.noise_scale if measured else None,
            unit=self._config.unit,
        )

    def _metered_step(
        self, accumulator: Accumulator, batch: Any, index: int
    ) -> tuple[Step, int | None, Mapping[str, int]]:
        """Take a step; on the CPU, which has no allocator statistics, meter the first two and every 20th."""
        # The first two, because the optimizer has no state yet in the first.
        due = self._config.metered and (self._metered < 2 or index % _METERED_EVERY == 0)
        if self._config.device.type != "cpu" or not due:
            step = take_step(accumulator, self._job, batch, plain=self._config.plain)
            return step, step.peak_bytes, {}
        self._metered += 1
        meter = MemoryMeter(detail=True)
        meter.track(self._job.model, *self._optimizers, batch)
        with meter:
            step = take_step(accumulator, self._job, batch, plain=self._config.plain)
        if self._config.memory_budget is not None:
            # The window's own meter measures each attempt alone; this meter includes the attempts that failed.
            return step, step.peak_bytes, {} if step.retries else meter.report().at_peak
        return step, meter.peak_bytes, meter.report().at_peak


def _has_samples(job: Job, config: RunConfig) -> bool:
    """Return whether each microbatch of a job has a gradient of its own, which is on this rank as a whole."""
    alone = (job.encode is None or config.plain) and config.batch_norm != "exact"
    return alone and config.shard == "none" and not isinstance(job.model, Pipeline)
