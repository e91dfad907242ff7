"""The one training loop: it runs any job, and can be stopped and killed at any moment without losing its way."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch.optim.lr_scheduler import LRScheduler

from microbatch.errors import CheckpointError
from microbatch.memory.meter import MemoryMeter
from microbatch.step.accumulator import Accumulator
from microbatch.step.events import Event, MicrobatchDone, Retry, StepDone
from microbatch.step.record import Step
from microbatch.train.checkpoint import read_newest, write_checkpoint
from microbatch.train.data import BatchOrder, Position, fetch, mix_seed
from microbatch.train.evaluate import evaluate
from microbatch.train.events import (
    CheckpointWritten,
    Notice,
    RunEvent,
    RunListener,
    RunPlanned,
    StepLogged,
    Stopping,
    Validated,
)
from microbatch.train.job import Job
from microbatch.train.noise import NoiseScale
from microbatch.train.resolve import RunConfig
from microbatch.train.rundir import MetricsLog, RunDirectory
from microbatch.train.schedule import make_schedulers
from microbatch.train.state import (
    load_model,
    load_optimizer,
    model_tensors,
    optimizers_of,
    random_states,
    seed_everything,
    set_random_states,
)
from microbatch.train.stop import StopRequest
from microbatch.train.timeline import StepTimeline
from microbatch.train.ways import take_step

_METERED_EVERY = 20
"""The meter costs a few percent of a step on the CPU, and the peak of a step hardly ever changes."""


@dataclass(slots=True)
class Progress:
    """Hold what changes from step to step and goes into every checkpoint.

    Attributes:
        step: Optimizer steps taken, dropped windows among them.
        position: Where the data stands.
        seconds: Time spent in steps, over all processes that took part in the run.
        peak_bytes: Most memory that a measured step used, or `None`.
        loss: Last step's loss, in the loss function's unit.
        validation: Last validation's means by name; empty before the first.
    """

    step: int = 0
    position: Position = field(default_factory=Position)
    seconds: float = 0.0
    peak_bytes: int | None = None
    loss: float | None = None
    validation: dict[str, float] = field(default_factory=dict[str, float])


class TrainingLoop:
    """Take a job through its optimizer steps.

    What a step computes depends on the job, the configuration and the captured state alone, so a run that was stopped
    or killed and then resumed has the same losses, bit for bit, wherever the operators themselves are deterministic.
    """

    def __init__(
        self, job: Job, *, config: RunConfig, run: RunDirectory, listeners: Sequence[RunListener] = ()
    ) -> None:
        """Make what the run needs; nothing is trained or written yet.

        ``saved_step`` tells afterwards which step's checkpoint is the newest, `None` before the first.

        Args:
            job: Model, optimizer, loss and data.
            config: What `microbatch.train.resolve.resolve` returned for it.
            run: Where files go; it has been started.
            listeners: Called with every event.
        """
        self.job = job
        self.config = config
        self.run_directory = run
        self.progress = Progress()
        self._listeners = tuple(listeners)
        self._optimizers = optimizers_of(job.optimizer)
        self._set_learning_rate()
        self._schedulers = self._make_schedulers()
        self._order = BatchOrder(config.samples, batch_size=config.batch_size, seed=config.seed)
        self._scaler = torch.amp.GradScaler(config.device.type) if config.autocast is torch.float16 else None
        self._timeline = StepTimeline(self._optimizers)
        self._timed = self._timeline.of(job, plain=config.plain)
        self._noise = NoiseScale(job.model)
        # Where samples are coupled, what a microbatch adds is no sample of the gradient.
        self._independent = (job.encode is None or config.plain) and config.batch_norm != "exact"
        self._accumulator = Accumulator(
            job.model,
            job.optimizer,
            microbatch_size="auto" if config.auto else config.microbatch_size,
            memory_budget=config.memory_budget,
            max_grad_norm=config.max_grad_norm,
            autocast=config.autocast,
            grad_scaler=self._scaler,
            nonfinite=config.nonfinite,
            lengths=job.lengths,
            batch_norm=config.batch_norm,
            listeners=(self._on_core_event,),
        )
        self._stop = StopRequest()
        self._announced = False
        self._metered = 0
        self.saved_step: int | None = None

    @property
    def microbatch_size(self) -> int:
        """Rows that go through the model at once: as configured, or, where that is left to the run, as it has found."""
        return self._accumulator.microbatch_size or self.config.microbatch_size

    def run(self) -> str | None:
        """Train until the last step, or until somebody asks to stop.

        Returns:
            `None` when every step was taken, else the name of the signal that stopped it.

        Raises:
            CheckpointError: A checkpoint could not be written.
            MicrobatchError: A step failed; the newest checkpoint is still there.
            KeyboardInterrupt: Ctrl-C came a second time; nothing new was written.
        """
        if self.saved_step is None:
            seed_everything(mix_seed(self.config.seed, "train"))
        log = MetricsLog(self.run_directory.metrics, after_step=self.progress.step)
        self._tell(RunPlanned(config=self.config, path=self.run_directory.path, step=self.progress.step))
        try:
            with self._stop:
                # A state that cannot be stored is found now and not after hours, and a kill before the first regular
                # checkpoint leaves something to resume.
                self._save(log)
                self.job.model.train()
                while self.progress.step < self.config.steps and self._stop.signal is None:
                    self._one_step(log)
                self._save(log)
        finally:
            log.close()
        finished = self.progress.step >= self.config.steps
        return None if finished or self._stop.signal is None else self._stop.signal.name

    def restore(self) -> None:
        """Go on from the run directory's newest whole checkpoint.

        Raises:
            CheckpointError: There is nothing whole to resume from, or it belongs to another run.
        """
        checkpoint = read_newest(self.run_directory.checkpoints, notice=lambda text: self._tell(Notice(text)))
        state, config = checkpoint.state, self.config
        now = {"seed": config.seed, "batch_size": config.batch_size, "samples": config.samples}
        for key, value in now.items():
            if state["run"][key] != value:
                raise CheckpointError(
                    f"the run was started with {key} {state['run'][key]} and would go on with {value}; a resumed run "
                    "keeps its data, its batch and its seed"
                )
        if len(state["optimizers"]) != len(self._optimizers) or len(state["schedulers"]) != len(self._schedulers):
            raise CheckpointError(
                "the checkpoint has another number of optimizers or schedulers than the job now makes"
            )
        load_model(self.job.model, checkpoint.weights, state["extra"])
        for optimizer, saved in zip(self._optimizers, state["optimizers"], strict=True):
            load_optimizer(optimizer, saved)
        for scheduler, saved in zip(self._schedulers, state["schedulers"], strict=True):
            scheduler.load_state_dict(saved)
        if self._scaler is not None and state["scaler"] is not None:
            self._scaler.load_state_dict(state["scaler"])
        self._accumulator.load_state_dict(state["accumulator"])
        self.progress = Progress(
            step=checkpoint.step,
            position=Position(**state["position"]),
            seconds=state["seconds"],
            peak_bytes=state["peak_bytes"],
            loss=state["loss"],
            validation=state["validation"],
        )
        self.saved_step = checkpoint.step
        # Last: making the job again drew random numbers of its own.
        set_random_states(state["random"], config.device)

    def first_batch(self) -> Any:
        """Collate the batch that the run began with.

        Returns:
            The batch, on the host.
        """
        chosen, _ = self._order.take(Position())
        return self.job.collate(fetch(self.job.data, chosen))

    def scaler_state(self) -> Mapping[str, Any] | None:
        """Read the loss scaler's state.

        Returns:
            Its ``state_dict``, or `None` without a scaler.
        """
        return self._scaler.state_dict() if self._scaler is not None else None

    def _one_step(self, log: MetricsLog) -> None:
        progress, config = self.progress, self.config
        epoch = progress.position.epoch
        rates = [float(group["lr"]) for optimizer in self._optimizers for group in optimizer.param_groups]
        started = time.perf_counter()
        chosen, following = self._order.take(progress.position)
        batch = self.job.collate(fetch(self.job.data, chosen))
        self._timeline.begin(wait=time.perf_counter() - started)
        # In other steps than those that are metered, so that its copy of the gradients is in no one's figure.
        due = progress.step % _METERED_EVERY == _METERED_EVERY // 2
        self._noise.begin(due=due and self._independent)
        step, peak_bytes, memory = self._measured_step(batch)
        # Reading the loss waits for the device, so the time is that of work done and not of work queued.
        progress.loss = float(step.loss)
        seconds = time.perf_counter() - started
        if step.applied:
            # A dropped window changed no weight, so the schedule, which counts updates, stays where it is.
            for scheduler in self._schedulers:
                scheduler.step()
        progress.step += 1
        progress.position = following
        progress.seconds += seconds
        if peak_bytes is not None:
            progress.peak_bytes = max(peak_bytes, progress.peak_bytes or 0)
        last, timeline, noise = progress.step == config.steps, self._timeline.record(), self._noise.end(step)
        validated = self._validate() if last or progress.step % config.validate_every == 0 else {}
        metrics = {
            "step": progress.step,
            "epoch": epoch,
            "loss": progress.loss,
            **({"terms": {name: float(value) for name, value in step.terms.items()}} if step.terms else {}),
            "lr": rates[0],
            "grad_norm": float(step.grad_norm),
            "count": float(step.count),
            "samples": int(step.samples),
            "microbatches": step.microbatches,
            "microbatch_size": int(step.microbatch_size),
            "retries": step.retries,
            "applied": step.applied,
            "seconds": seconds,
            "per_second": float(step.count) / seconds,
            "peak_bytes": peak_bytes,
            **({"memory": memory} if memory else {}),
            **({"timeline": timeline} if timeline else {}),
            **({"noise_scale": noise} if noise else {}),
            **({"validation": validated} if validated else {}),
        }
        log.write(metrics)
        self._tell(StepLogged(metrics=metrics))
        if progress.step % config.checkpoint_every == 0:
            self._save(log)

    def _measured_step(self, batch: Any) -> tuple[Step, int | None, Mapping[str, int]]:
        """Take a step; on the CPU, where no allocator counts, meter the first two and every 20th by category."""
        # Two, because the first has no optimizer state yet.
        due = self._metered < 2 or self.progress.step % _METERED_EVERY == 0
        if self.config.device.type != "cpu" or not due:
            step = take_step(self._accumulator, self._timed, batch, plain=self.config.plain)
            return step, step.peak_bytes, {}
        self._metered += 1
        meter = MemoryMeter(detail=True)
        meter.track(self.job.model, *self._optimizers, batch)
        with meter:
            step = take_step(self._accumulator, self._timed, batch, plain=self.config.plain)
        if self.config.memory_budget is not None:
            # The window's own meter counted each attempt alone; this one has seen those that failed as well.
            return step, step.peak_bytes, {} if step.retries else meter.report().at_peak
        return step, meter.peak_bytes, meter.report().at_peak

    def _validate(self) -> dict[str, float]:
        if self.job.validation is None:
            return {}
        config = self.config
        values = evaluate(
            self.job, microbatch_size=self.microbatch_size, device=config.device, autocast=config.autocast
        )
        self.progress.validation = values
        self._tell(Validated(step=self.progress.step, values=values))
        return values

    def _save(self, log: MetricsLog) -> None:
        progress, config = self.progress, self.config
        if self.saved_step == progress.step:
            return
        log.sync()
        weights, extra = model_tensors(self.job.model)
        state = {
            "run": {"seed": config.seed, "batch_size": config.batch_size, "samples": config.samples},
            "position": {"epoch": progress.position.epoch, "start": progress.position.start},
            "seconds": progress.seconds,
            "peak_bytes": progress.peak_bytes,
            "loss": progress.loss,
            "validation": progress.validation,
            "extra": extra,
            "optimizers": [optimizer.state_dict() for optimizer in self._optimizers],
            "schedulers": [scheduler.state_dict() for scheduler in self._schedulers],
            "scaler": self.scaler_state(),
            "accumulator": self._accumulator.state_dict(),
            "random": random_states(config.device),
        }
        folder = self.run_directory.checkpoints
        path = write_checkpoint(folder, step=progress.step, weights=weights, state=state, keep=config.keep_checkpoints)
        self.saved_step = progress.step
        self._tell(CheckpointWritten(step=progress.step, path=path))

    def _set_learning_rate(self) -> None:
        """Bring the first group to the configured peak and every other one along in proportion."""
        first = float(self._optimizers[0].param_groups[0]["lr"])
        if self.config.learning_rate == first:
            return
        for group in (group for optimizer in self._optimizers for group in optimizer.param_groups):
            group["lr"] = group["lr"] * self.config.learning_rate / first if first else self.config.learning_rate

    def _make_schedulers(self) -> Sequence[LRScheduler]:
        if self.job.scheduler is not None:
            return [self.job.scheduler]
        config = self.config
        return make_schedulers(
            self._optimizers, kind=config.schedule, steps=config.steps, warmup_steps=config.warmup_steps
        )

    def _on_core_event(self, event: Event) -> None:
        if isinstance(event, StepDone):
            return
        if isinstance(event, MicrobatchDone):
            self._timeline.microbatch_done()
            self._noise.microbatch_done(event.rows)
        elif isinstance(event, Retry):
            self._timeline.start_over()
            self._noise.start_over()
        if self._stop.signal is not None and not self._announced:
            self._announced = True
            self._tell(Stopping(signal=self._stop.signal.name))
        self._tell(event)

    def _tell(self, event: RunEvent) -> None:
        for listener in self._listeners:
            listener(event)
