"""Measure one batch three ways: accumulated, whole, and with the hand-written loop."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer

from microbatch.batch.cut import cut
from microbatch.batch.prefetch import feed
from microbatch.devices.backend import random_state, synchronize
from microbatch.devices.device_memory import allocator_of
from microbatch.errors import MicrobatchError
from microbatch.memory.budget import format_bytes
from microbatch.memory.meter import MemoryMeter
from microbatch.train.baselines import Ways
from microbatch.train.evaluate import untouched
from microbatch.train.job import Job
from microbatch.train.kept import kept
from microbatch.train.run_config import RunConfig


@dataclass(frozen=True, slots=True, kw_only=True)
class Way:
    """Hold what was measured of one way to take a step on the batch.

    Attributes:
        relative_error: Norm of the difference between its gradient and the whole batch's, over the latter's norm.
        peak_bytes: Most memory in use at once: parameters, gradients, optimizer state and batch included.
        seconds: Median time of a step.
    """

    relative_error: float | None = None
    peak_bytes: int | None = None
    seconds: float | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Comparison:
    """Set the accumulated step beside the whole batch's and the hand-written loop's.

    Attributes:
        accumulated: This library's step; its error is against the whole batch's gradient.
        whole: One backward over the whole batch in plain PyTorch; every figure is `None` if it could not be run.
        hand_written: The usual loop: each microbatch's mean over the number of microbatches.
        samples: Rows of the batch.
        microbatch_size: Rows of a microbatch.
        microbatches: How many.
        rounds: Times that each way was timed, interleaved.
        notes: What could not be measured, and why.
    """

    accumulated: Way
    whole: Way
    hand_written: Way
    samples: int
    microbatch_size: int
    microbatches: int
    rounds: int
    notes: tuple[str, ...]


def compare(
    job: Job,
    batch: Any,
    *,
    config: RunConfig,
    scaler_state: Mapping[str, Any] | None = None,
    seconds: float = 10.0,
) -> Comparison:
    """Measure gradient, memory and time of one step on a batch, three ways, and leave no trace.

    Weights, buffers, gradients, optimizer state, random state and modes are as before afterwards.

    Args:
        job: Model, optimizer and loss, as they are now.
        batch: The whole batch, on the host.
        config: The run's configuration.
        scaler_state: State of the run's loss scaler, if it has one.
        seconds: Time after which no further round of timing begins.

    Returns:
        The measurements.

    Cost:
        Two to six steps of each way; copies of weights and optimizer state on the host.
    """
    return _Bench(job, batch, config=config, scaler_state=scaler_state).compare(seconds)


class _Bench:
    """The three ways, over one model that is put back after each."""

    def __init__(self, job: Job, batch: Any, *, config: RunConfig, scaler_state: Mapping[str, Any] | None) -> None:
        self.job, self.batch, self.config = job, batch, config
        self.device = config.device
        self.steps = Ways(job, batch, config=config, scaler_state=scaler_state)
        self.rows, self.optimizers, self.ways = self.steps.rows, self.steps.optimizers, self.steps.by_name()
        self.notes: list[str] = []

    def compare(self, limit: float) -> Comparison:
        started = time.perf_counter()
        with kept(self.job.model, self.optimizers), untouched(self.job.model, self.device, training=True):
            self._choose_mode()
            gradients, peaks = self._gradients()
            self.steps.max_grad_norm = self.config.max_grad_norm
            self.job.model.train()
            times = self._times(until=started + limit)
        self._note_scatter(times)
        whole = gradients.get("whole")
        measured = {
            name: Way(
                relative_error=_relative_error(gradients.get(name), whole) if name != "whole" else None,
                peak_bytes=peaks.get(name),
                seconds=statistics.median(times[name]) if times.get(name) else None,
            )
            for name in ("accumulated", "whole", "hand_written")
        }
        return Comparison(
            **measured,
            samples=self.rows,
            microbatch_size=min(self.config.microbatch_size, self.rows),
            microbatches=self.steps.microbatches,
            rounds=len(times["accumulated"]),
            notes=tuple(self.notes),
        )

    def _choose_mode(self) -> None:
        """Where the loss draws random numbers, two cuts draw different ones, and only evaluation mode compares."""
        if not self._draws_random_numbers():
            return
        self.job.model.eval()
        if self._draws_random_numbers():
            self.notes.append("the loss draws random numbers in any mode, so no two cuts have the same gradient")
        else:
            self.notes.append(
                "gradients and memory were compared in evaluation mode, because training draws random numbers"
            )

    @torch.no_grad()
    def _draws_random_numbers(self) -> bool:
        first = next(iter(feed(cut(self.batch, self.config.microbatch_size)[:1], self.device)))
        before = _generator_states(self.device)
        with self.steps.autocast():
            self.job.batch_loss(self.job.model, first)
        return any(not torch.equal(old, new) for old, new in zip(before, _generator_states(self.device), strict=True))

    def _gradients(self) -> tuple[dict[str, list[Tensor]], dict[str, int]]:
        """Take one step each way from the same weights, and keep the gradient that the optimizer was given."""
        gradients: dict[str, list[Tensor]] = {}
        peaks: dict[str, int] = {}
        for name in tuple(self.ways):
            if name == "whole" and not self._whole_fits(peaks.get("accumulated")):
                del self.ways[name]
                continue
            try:
                with kept(self.job.model, self.optimizers):
                    gradients[name], peak = self._recorded(self.ways[name])
            except (MicrobatchError, torch.OutOfMemoryError) as error:
                # The other two hold no promise to fit.
                if name == "accumulated":
                    raise
                what = "whole batch at once" if name == "whole" else "hand-written loop"
                self.notes.append(f"the {what} could not be run: {str(error).partition(chr(10))[0]}")
                del self.ways[name]
                continue
            if peak is not None:
                peaks[name] = peak
        return gradients, peaks

    def _recorded(self, way: Callable[[], None]) -> tuple[list[Tensor], int | None]:
        parameters = [p for optimizer in self.optimizers for group in optimizer.param_groups for p in group["params"]]
        # Made beforehand, on the host, so that keeping the gradient does not show in the peak.
        kept = [torch.zeros(p.shape, dtype=p.dtype) for p in parameters]

        def keep(optimizer: Optimizer, *_: Any) -> None:
            own_ones = {id(p) for group in optimizer.param_groups for p in group["params"]}
            for parameter, copy in zip(parameters, kept, strict=True):
                if id(parameter) in own_ones and parameter.grad is not None:
                    copy.copy_(parameter.grad)

        hooks = [optimizer.register_step_pre_hook(keep) for optimizer in self.optimizers]
        try:
            peak = self._peak(way)
        finally:
            for hook in hooks:
                hook.remove()
        return kept, peak

    def _peak(self, way: Callable[[], None]) -> int | None:
        allocator = allocator_of(self.device)
        if allocator is not None:
            synchronize(self.device)
            allocator.reset_peak()
            way()
            synchronize(self.device)
            return allocator.peak()
        with MemoryMeter() as meter:
            meter.track(self.job.model, *self.optimizers, self.batch)
            way()
        return meter.peak_bytes

    def _whole_fits(self, accumulated_peak: int | None) -> bool:
        """On the CPU, where the system would end the process, judge by the accumulated step before trying."""
        free = _free_host_bytes()
        if self.device.type != "cpu" or accumulated_peak is None or free is None:
            return True
        held = MemoryMeter()
        held.track(self.job.model, *self.optimizers, self.batch)
        microbatches = -(-self.rows // self.config.microbatch_size)
        needed = (accumulated_peak - held.live_bytes) * microbatches
        if needed <= 0.8 * free:
            return True
        self.notes.append(
            f"the whole batch was not run at once: it would need about {format_bytes(needed)}, and "
            f"{format_bytes(free)} are free"
        )
        return False

    def _times(self, *, until: float) -> dict[str, list[float]]:
        times: dict[str, list[float]] = {name: [] for name in self.ways}
        for round_index in range(5):
            if round_index >= 1 and time.perf_counter() > until:
                break
            for name, way in self.ways.items():
                synchronize(self.device)
                started = time.perf_counter()
                way()
                synchronize(self.device)
                times[name].append(time.perf_counter() - started)
        return times

    def _note_scatter(self, times: Mapping[str, list[float]]) -> None:
        if len(times["accumulated"]) == 1:
            self.notes.append("times are of one step each, because steps are slow here")
        scatter = max((max(taken) / min(taken) for taken in times.values() if taken), default=1.0)
        if scatter > 1.5:
            self.notes.append(
                f"times of one and the same step differ by a factor of {scatter:.1f}: is the machine busy?"
            )


def _relative_error(gradient: list[Tensor] | None, reference: list[Tensor] | None) -> float | None:
    if gradient is None or reference is None:
        return None
    squares = sum(float((a.double() - b.double()).square().sum()) for a, b in zip(gradient, reference, strict=True))
    norm = sum(float(b.double().square().sum()) for b in reference)
    return (squares / norm) ** 0.5 if norm > 0 else None


def _generator_states(device: torch.device) -> list[Tensor]:
    on_device = random_state(device)
    return [torch.get_rng_state()] + ([] if on_device is None else [on_device])


def _free_host_bytes() -> int | None:
    """Ask Linux how much memory can be had without swapping."""
    try:
        lines = Path("/proc/meminfo").read_text(encoding="ascii").splitlines()
    except OSError:
        return None
    return next((int(line.split()[1]) * 1024 for line in lines if line.startswith("MemAvailable:")), None)
