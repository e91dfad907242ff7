"""The one training loop: it runs any job, and can be stopped and killed at any moment without losing its way."""

from __future__ import annotations

import signal
import time
from collections.abc import Generator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch.optim.lr_scheduler import LRScheduler

from microbatch.batch.batch_tree import slice_rows
from microbatch.errors import CheckpointError, MicrobatchError, RankError
from microbatch.memory.meter import MemoryMeter
from microbatch.ranks.pipeline import Pipeline
from microbatch.ranks.process_group import Ranks
from microbatch.step.accumulator import Accumulator
from microbatch.step.events import Event, MicrobatchDone, Retry, StepDone
from microbatch.step.record import Step
from microbatch.step.saved_state import seed_everything
from microbatch.train.background import CheckpointWriter
from microbatch.train.baselines import take_step
from microbatch.train.checkpoint import read_newest
from microbatch.train.data import BatchOrder, Position, fetch, mix_seed
from microbatch.train.evaluate import evaluate
from microbatch.train.heartbeat import (
    BEGINNING,
    CHECKPOINTING,
    COMPUTING,
    DONE,
    READING,
    VALIDATING,
    WAITING,
    Heartbeat,
    is_of_the_group,
    who_is_missing,
)
from microbatch.train.job import Job
from microbatch.train.noise import NoiseScale
from microbatch.train.place import STAGES, Place, named_by_rank, named_by_stage, own_state
from microbatch.train.run_config import RunConfig
from microbatch.train.run_events import (
    CheckpointWritten,
    Notice,
    RunEvent,
    RunListener,
    RunPlanned,
    StepLogged,
    Stopping,
    Validated,
)
from microbatch.train.rundir import MetricsLog, RunDirectory
from microbatch.train.schedule import make_schedulers
from microbatch.train.share import share
from microbatch.train.state import (
    load_model,
    load_optimizer,
    model_tensors,
    optimizers_of,
    random_states,
    same_bits,
    set_random_states,
)
from microbatch.train.stop import StopRequest
from microbatch.train.timeline import StepTimeline

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
        communicated: Bytes that left this rank in the last step, and the collectives that they went by; `None` where
            there is no other rank. No checkpoint has it.
    """

    step: int = 0
    position: Position = field(default_factory=Position)
    seconds: float = 0.0
    peak_bytes: int | None = None
    loss: float | None = None
    validation: dict[str, float] = field(default_factory=dict[str, float])
    communicated: tuple[int, int] | None = None


class TrainingLoop:
    """Take a job through its optimizer steps.

    What a step computes depends on the job, the configuration and the captured state alone, so a run that was stopped
    or killed and then resumed has the same losses, bit for bit, wherever the operators themselves are deterministic.
    Random numbers are a function of the seed, the step and the rank.

    Over several ranks each of them runs this loop on its share of the same batches; those of a pipeline, which have the
    model's stages between them, on the same share. The first one writes what the run leaves; all of them write the
    checkpoints.
    """

    def __init__(
        self,
        job: Job,
        *,
        config: RunConfig,
        run: RunDirectory,
        listeners: Sequence[RunListener] = (),
        place: Place | None = None,
    ) -> None:
        """Make what the run needs; nothing is trained or written yet.

        ``saved_step`` tells afterwards which step's checkpoint is the newest, `None` before the first.

        Args:
            job: Model, optimizer, loss and data.
            config: What `microbatch.train.resolve.resolve` returned for it.
            run: Where files go; it has been started.
            listeners: Called with every event.
            place: Where this rank stands, as `microbatch.train.place.find_place` said; `None` for a single process.
        """
        self.job = job
        self.config = config
        self.run_directory = run
        self.progress = Progress()
        self._listeners = tuple(listeners)
        # Of what the loop itself says, which is on the CPU; gradients are the accumulator's.
        self._ranks = Ranks.find(torch.device("cpu"))
        self._rank = 0 if self._ranks is None else self._ranks.index
        self._place = place or Place()
        self._pipeline = job.model if isinstance(job.model, Pipeline) else None
        self._heartbeat = None if self._ranks is None else Heartbeat(run.logs, self._rank)
        self._optimizers = optimizers_of(job.optimizer)
        self._set_learning_rate()
        self._schedulers = self._make_schedulers()
        self._order = BatchOrder(config.samples, batch_size=config.batch_size, seed=config.seed)
        self._scaler = torch.amp.GradScaler(config.device.type) if config.autocast is torch.float16 else None
        self._timeline = StepTimeline(self._optimizers)
        self._timed = self._timeline.of(job, plain=config.plain)
        self._noise = NoiseScale(job.model)
        # Where samples are coupled, what a microbatch adds is no sample of the gradient; nor where the ranks add theirs
        # up in each.
        alone = (job.encode is None or config.plain) and config.batch_norm != "exact"
        self._independent = alone and config.shard == "none" and self._pipeline is None
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
            dropout=job.dropout,
            deterministic=config.deterministic,
            sync=config.sync,
            process_group=self._place.group,
            listeners=(self._on_core_event,),
        )
        self._writer = CheckpointWriter(
            run.checkpoints,
            keep=config.keep_checkpoints,
            ranks=self._ranks,
            background=config.async_checkpoints,
            patience=config.rank_timeout,
            written=self._written,
        )
        # A launcher repeats what the terminal has said to all of its processes already.
        self._stop = StopRequest(insist=self._ranks is None)
        self._stopped_by: signal.Signals | None = None
        self._announced = False
        self._metered = 0
        self._handed: int | None = None
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
            RankError: Another rank failed, died, or did not come.
            KeyboardInterrupt: Ctrl-C came a second time; nothing new was written.
        """
        if self.saved_step is None:
            self._seed()
        log = MetricsLog(self.run_directory.metrics, after_step=self.progress.step) if self._rank == 0 else None
        self._tell(RunPlanned(config=self.config, path=self.run_directory.path, step=self.progress.step))
        try:
            with self._stop, self._told_apart(), same_bits(self.config.device, wanted=self.config.deterministic):
                # A state that cannot be stored is found now and not after hours, and a kill before the first regular
                # checkpoint leaves something to resume.
                self._save(log)
                self.job.model.train()
                while self.progress.step < self.config.steps and not self._asked_to_stop():
                    self._one_step(log)
                self._save(log)
                self._writer.wait()
                self._at(DONE)
        finally:
            if log is not None:
                log.close()
            if self._heartbeat is not None:
                self._heartbeat.close()
        return None if self._stopped_by is None else self._stopped_by.name

    def restore(self) -> None:
        """Go on from the run directory's newest whole checkpoint.

        Raises:
            CheckpointError: There is nothing whole to resume from, or it belongs to another run.
        """
        checkpoint = read_newest(
            self.run_directory.checkpoints, notice=lambda text: self._tell(Notice(text)), ranks=self._ranks
        )
        state, config = checkpoint.state, self.config
        now = {"seed": config.seed, "batch_size": config.batch_size, "samples": config.samples}
        for key, value in now.items():
            if state["run"][key] != value:
                raise CheckpointError(
                    f"the run was started with {key} {state['run'][key]} and would go on with {value}; a resumed run "
                    "keeps its data, its batch and its seed"
                )
        own, weights = own_state(state, self._place), checkpoint.weights
        if len(own["optimizers"]) != len(self._optimizers) or len(own["schedulers"]) != len(self._schedulers):
            raise CheckpointError(
                "the checkpoint has another number of optimizers or schedulers than the job now makes"
            )
        if self._pipeline is not None:
            weights = named_by_rank(self._pipeline, weights)
        load_model(self.job.model, weights, own["extra"])
        for optimizer, saved in zip(self._optimizers, own["optimizers"], strict=True):
            load_optimizer(optimizer, saved)
        for scheduler, saved in zip(self._schedulers, own["schedulers"], strict=True):
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
        self.saved_step = self._handed = checkpoint.step
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

    @contextmanager
    def _told_apart(self) -> Generator[None]:
        """Tell an error of this rank's own from the loss of another one, and name that."""
        try:
            yield
        except Exception as error:
            if self._heartbeat is None or self._ranks is None:
                raise
            if isinstance(error, MicrobatchError) or not is_of_the_group(error):
                self._heartbeat.failed(error)
                raise
            found = who_is_missing(self._heartbeat.folder, ranks=self._ranks.size, rank=self._rank)
            told = RankError(f"{found}; its own log is in {self._heartbeat.folder}")
            self._heartbeat.failed(told)
            raise told from error

    def _at(self, stage: int, detail: str = "") -> None:
        if self._heartbeat is not None:
            # Of the step that is being taken, which people count from 1.
            self._heartbeat.at(self.progress.step + (stage in {BEGINNING, READING, COMPUTING, WAITING}), stage, detail)

    def _asked_to_stop(self) -> bool:
        """Agree with the other ranks on whether to stop: whoever was asked to, all stop after the same step."""
        asked = 0 if self._stop.signal is None else int(self._stop.signal)
        if self._ranks is not None:
            self._at(BEGINNING)
            asked = max(int(each) for each in self._ranks.gather(torch.tensor(asked)))
        if asked:
            self._stopped_by = signal.Signals(asked)
            self._announce(self._stopped_by)
        return asked > 0

    def _announce(self, asked: signal.Signals) -> None:
        if not self._announced:
            self._announced = True
            self._tell(Stopping(signal=asked.name))

    def _seed(self) -> None:
        """Seed a step, so that its random numbers do not depend on how often the run was interrupted before it."""
        seed_everything(mix_seed(self.config.seed, "step", self.progress.step, self._place.share))

    def _seed_stage(self) -> None:
        """Seed a pipeline's stages apart: they read the same rows, and their layers draw masks of their own."""
        if self._pipeline is not None:
            seed_everything(mix_seed(self.config.seed, "stage", self.progress.step, self._rank))

    def _own_share(self, chosen: list[int]) -> Any:
        """Collate this rank's part of a batch."""
        size = self.config.microbatch_size if self.config.deterministic else 1
        rows = share(len(chosen), ranks=self._place.shares, rank=self._place.share, unit=size)
        own = [chosen[row] for row in rows]
        if own and self.config.deterministic:
            samples = [sample for start in rows[::size] for sample in self._seeded(chosen, start, size)]
            self._seed()
            return self.job.collate(samples)
        if own:
            return self.job.collate(fetch(self.job.data, own))
        # Of the same form, without a row: with more ranks than rows some only take part in what is agreed on.
        return slice_rows(self.job.collate(fetch(self.job.data, chosen[:1])), 0, 0, rows=1)

    def _seeded(self, chosen: list[int], start: int, size: int) -> list[Any]:
        """Read a virtual microbatch's samples, whose random numbers are then no matter of who reads them."""
        seed_everything(mix_seed(self.config.seed, "samples", self.progress.step, start))
        return fetch(self.job.data, chosen[start : start + size])

    def _one_step(self, log: MetricsLog | None) -> None:
        progress, config = self.progress, self.config
        self._seed()
        epoch = progress.position.epoch
        rates = [float(group["lr"]) for optimizer in self._optimizers for group in optimizer.param_groups]
        started = time.perf_counter()
        self._at(READING)
        chosen, following = self._order.take(progress.position)
        batch = self._own_share(chosen)
        self._seed_stage()
        self._at(COMPUTING)
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
        progress.communicated = (step.comm_bytes, step.comm_calls) if step.comm_calls else None
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
            **({"comm_bytes": step.comm_bytes, "comm_calls": step.comm_calls} if step.comm_calls else {}),
            **({"sync": step.sync} if step.sync else {}),
            **({"memory": memory} if memory else {}),
            **({"timeline": timeline} if timeline else {}),
            **({"noise_scale": noise} if noise else {}),
            **({"validation": validated} if validated else {}),
        }
        if log is not None:
            log.write(metrics)
        self._tell(StepLogged(metrics=metrics))
        self._writer.look()
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
        self._at(VALIDATING)
        values = evaluate(
            self.job,
            microbatch_size=self.microbatch_size,
            device=config.device,
            autocast=config.autocast,
            ranks=self._ranks,
            place=self._place,
        )
        self.progress.validation = values
        self._tell(Validated(step=self.progress.step, values=values))
        return values

    def _save(self, log: MetricsLog | None) -> None:
        progress, config = self.progress, self.config
        if self._handed == progress.step:
            return
        self._at(CHECKPOINTING)
        if log is not None:
            log.sync()
        weights, extra = model_tensors(self.job.model)
        own = {
            "extra": extra,
            "optimizers": [optimizer.state_dict() for optimizer in self._optimizers],
            "schedulers": [scheduler.state_dict() for scheduler in self._schedulers],
        }
        if self._pipeline is not None:
            weights, own = named_by_stage(self._pipeline, weights), {STAGES: {self._place.stages: own}}
        state = {
            "run": {"seed": config.seed, "batch_size": config.batch_size, "samples": config.samples},
            "position": {"epoch": progress.position.epoch, "start": progress.position.start},
            "seconds": progress.seconds,
            "peak_bytes": progress.peak_bytes,
            "loss": progress.loss,
            "validation": progress.validation,
            **own,
            "scaler": self.scaler_state(),
            "accumulator": self._accumulator.state_dict(),
            "random": random_states(config.device),
        }
        self._handed = progress.step
        self._writer.save(step=progress.step, weights=weights, state=state)

    def _written(self, step: int, path: Path) -> None:
        self.saved_step = step
        self._tell(CheckpointWritten(step=step, path=path))

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
            last = event.index + 1 == event.microbatches
            self._at(WAITING if last else COMPUTING, f"after microbatch {event.index + 1} of {event.microbatches}")
            self._noise.microbatch_done(event.rows)
        elif isinstance(event, Retry):
            self._timeline.start_over()
            self._noise.start_over()
        if self._stop.signal is not None:
            self._announce(self._stop.signal)
        self._tell(event)

    def _tell(self, event: RunEvent) -> None:
        for listener in self._listeners:
            listener(event)
