"""Run the training loop of any job: steps, validations, checkpoints, and a clean stop at any moment."""

from __future__ import annotations

import signal
import time
from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch.optim.lr_scheduler import LRScheduler

from microbatch.ranks.lost_ranks import (
    BEGINNING,
    CHECKPOINTING,
    COMPUTING,
    DONE,
    READING,
    VALIDATING,
    WAITING,
    missing_ranks_named,
)
from microbatch.ranks.process_group import RankGroup
from microbatch.step.events import Event, MicrobatchDone, StepDone
from microbatch.train.background import CheckpointWriter
from microbatch.train.checkpoint import read_newest
from microbatch.train.evaluate import evaluate
from microbatch.train.heartbeat import Heartbeat
from microbatch.train.job import Job
from microbatch.train.job_accumulator import accumulator_for, scaler_for
from microbatch.train.measured_steps import MeasuredSteps
from microbatch.train.place import Place
from microbatch.train.rank_batches import batches_of
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
from microbatch.train.run_state import Progress, RunState
from microbatch.train.rundir import MetricsLog, RunDirectory
from microbatch.train.schedule import make_schedulers, scale_learning_rates
from microbatch.train.state import optimizers_of, same_bits
from microbatch.train.stop import StopRequest


class TrainingLoop:
    """Run a job's optimizer steps.

    The result of a step depends only on the job, the configuration and the captured state. So a run that was stopped
    or killed and then resumed has the same losses, bit for bit, where the operators themselves are deterministic.
    Random numbers are a function of the seed, the step and the rank.

    With several ranks, each rank runs this loop on its share of the same batches. The ranks of one pipeline hold the
    model's stages and run on the same share. Rank 0 writes the files of the run; all ranks write the checkpoints.
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
        """Make the objects of the run. No step is taken, and no file is written yet.

        Afterwards ``saved_step`` is the step of the newest checkpoint; it is `None` before the first.

        Args:
            job: Model, optimizer, loss and data.
            config: The configuration that `microbatch.train.resolve.resolve` returned for the job.
            run: The run's directory, which has been started.
            listeners: Called with every event.
            place: This rank's place, as `microbatch.train.place.find_place` returned it; `None` for a single process.
        """
        self.job = job
        self.config = config
        self.run_directory = run
        self.progress = Progress()
        self._listeners = tuple(listeners)
        # For the loop's own messages, which are on the CPU; the accumulator has its own group for gradients.
        self._ranks = RankGroup.find(torch.device("cpu"))
        self._rank = 0 if self._ranks is None else self._ranks.index
        self._place = place or Place()
        self._heartbeat = None if self._ranks is None else Heartbeat(run.logs, self._rank)
        self._optimizers = optimizers_of(job.optimizer)
        scale_learning_rates(self._optimizers, config.learning_rate)
        self._schedulers = self._make_schedulers()
        self._batches = batches_of(job, config=config, place=self._place, rank=self._rank)
        self._steps = MeasuredSteps(job, config=config, optimizers=self._optimizers)
        scaler = scaler_for(config)
        self._accumulator = accumulator_for(
            job,
            config,
            grad_scaler=scaler,
            group=self._place.group,
            noise_scale=self._steps.noise_scale,
            listeners=(self._on_core_event,),
        )
        self._state = RunState(
            job=job,
            config=config,
            place=self._place,
            optimizers=self._optimizers,
            schedulers=self._schedulers,
            scaler=scaler,
            accumulator=self._accumulator,
        )
        self._writer = CheckpointWriter(
            run.checkpoints,
            keep=config.keep_checkpoints,
            ranks=self._ranks,
            background=config.async_checkpoints,
            patience=config.rank_timeout,
            written=self._written,
        )
        self._stop = StopRequest(ranks=1 if self._ranks is None else self._ranks.size)
        self._stopped_by: signal.Signals | None = None
        self._announced = False
        self._handed: int | None = None
        self.saved_step: int | None = None

    @property
    def microbatch_size(self) -> int:
        """Return the rows that go through the model at once: the size that the run found, or the configured one."""
        return self._accumulator.microbatch_size or self.config.microbatch_size

    @property
    def stopped_early(self) -> bool:
        """Whether the last ``patience`` validations were no better than one before them."""
        patience = self.config.patience
        return patience is not None and self.progress.best.waited >= patience

    def run(self) -> str | None:
        """Train until the last step, until validations stop getting better, or until a signal asks to stop.

        Returns:
            `None` when every step was taken, else the name of the signal that stopped the run.

        Raises:
            CheckpointError: A checkpoint could not be written.
            MicrobatchError: A step failed; the newest checkpoint is still there.
            RankError: Another rank failed, died, or did not arrive.
            KeyboardInterrupt: Ctrl-C came a second time; nothing new was written.
        """
        if self.saved_step is None:
            self._batches.seed(self.progress.step)
        log = MetricsLog(self.run_directory.metrics, after_step=self.progress.step) if self._rank == 0 else None
        self._tell(RunPlanned(config=self.config, path=self.run_directory.path, step=self.progress.step))
        try:
            with self._stop, self._named_errors(), same_bits(self.config.device, wanted=self.config.deterministic):
                # A first checkpoint shows now, and not after hours, whether the state can be stored. And a run that
                # is killed early has something to resume from.
                self._save(log)
                self.job.model.train()
                while self.progress.step < self.config.steps and not self._asked_to_stop() and not self.stopped_early:
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
        """Restore the run from the newest whole checkpoint in its directory.

        Raises:
            CheckpointError: There is no whole checkpoint, or it belongs to another run.
        """
        checkpoint = read_newest(
            self.run_directory.checkpoints,
            notice=lambda text: self._tell(Notice(text)),
            ranks=self._ranks,
            check=self._state.check,
        )
        self.progress = self._state.restore(checkpoint)
        self._batches.load(checkpoint.state.get("data"), step=self.progress.step, position=self.progress.position)
        self.saved_step = self._handed = checkpoint.step

    def first_batch(self) -> Any:
        """Collate the batch that the run began with.

        Returns:
            The batch, on the host.
        """
        return self._batches.first()

    def scaler_state(self) -> Mapping[str, Any] | None:
        """Read the state dict of the loss scaler.

        Returns:
            The state dict; `None` without a scaler.
        """
        return self._state.scaler_state()

    def _named_errors(self) -> AbstractContextManager[None]:
        """Make the context in which an error of a collective names the missing ranks."""
        if self._heartbeat is None or self._ranks is None:
            return nullcontext()
        return missing_ranks_named(partial(self._heartbeat.name, ranks=self._ranks.size, rank=self._rank))

    def _at(self, stage: int, detail: str = "") -> None:
        """Record the current stage of this rank in its heartbeat."""
        if self._heartbeat is not None:
            # The number of the current step, counted from 1.
            self._heartbeat.at(self.progress.step + (stage in {BEGINNING, READING, COMPUTING, WAITING}), stage, detail)

    def _asked_to_stop(self) -> bool:
        """Agree with the other ranks on whether to stop; if one rank was asked to, all stop after the same step."""
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

    def _one_step(self, log: MetricsLog | None) -> None:
        """Take one step, write its line of metrics, and validate and save where they are due."""
        progress, config = self.progress, self.config
        self._batches.seed(progress.step)
        epoch = progress.position.epoch
        rate = float(self._optimizers[0].param_groups[0]["lr"])
        started = time.perf_counter()
        self._at(READING)
        batch, following = self._batches.take(progress.step, progress.position)
        self._at(COMPUTING)
        measured = self._steps.take(self._accumulator, batch, index=progress.step, started=started)
        step = measured.step
        if step.applied:
            # A dropped window changed no weight, so the schedule, which counts updates, does not move.
            for scheduler in self._schedulers:
                scheduler.step()
        progress.step += 1
        progress.position = following
        progress.loss = measured.loss
        progress.seconds += measured.seconds
        if measured.peak_bytes is not None:
            progress.peak_bytes = max(measured.peak_bytes, progress.peak_bytes or 0)
        progress.communicated = (step.comm_bytes, step.comm_calls) if step.comm_calls else None
        due = progress.step == config.steps or progress.step % config.validate_every == 0
        validated = self._validate() if due else {}
        is_best = due and self._is_best(validated)
        metrics = measured.metrics(index=progress.step, epoch=epoch, rate=rate, validation=validated)
        if log is not None:
            log.write(metrics)
        self._tell(StepLogged(metrics=metrics))
        self._writer.look()
        if is_best or progress.step % config.checkpoint_every == 0:
            self._save(log)

    def _validate(self) -> dict[str, float]:
        """Evaluate the held-out set, where the job has one."""
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

    def _is_best(self, values: Mapping[str, float]) -> bool:
        """Compare a validation with the best one so far."""
        asked, progress = self.config.best, self.progress
        if not values or (asked is None and self.config.patience is None):
            return False
        return progress.best.look(values, score=asked or "min:loss", step=progress.step)

    def _save(self, log: MetricsLog | None) -> None:
        """Write a checkpoint, unless this step's checkpoint has been written or begun already."""
        if self._handed == self.progress.step:
            return
        self._at(CHECKPOINTING)
        if log is not None:
            log.sync()
        weights, state = self._state.capture(self.progress)
        if (data := self._batches.state()) is not None:
            state["data"] = data
        self._handed = self.progress.step
        self._writer.save(step=self.progress.step, weights=weights, state=state, best=self.progress.best.step or None)

    def _written(self, step: int, path: Path) -> None:
        self.saved_step = step
        self._tell(CheckpointWritten(step=step, path=path))

    def _make_schedulers(self) -> Sequence[LRScheduler]:
        if self.job.scheduler is not None:
            return [self.job.scheduler]
        config = self.config
        return make_schedulers(
            self._optimizers, kind=config.schedule, steps=config.steps, warmup_steps=config.warmup_steps
        )

    def _on_core_event(self, event: Event) -> None:
        """Pass an event of the accumulator on to the measurements, the heartbeat and the listeners."""
        if isinstance(event, StepDone):
            return
        self._steps.heard(event)
        if isinstance(event, MicrobatchDone):
            last = event.index + 1 == event.microbatches
            self._at(WAITING if last else COMPUTING, f"after microbatch {event.index + 1} of {event.microbatches}")
        if self._stop.signal is not None:
            self._announce(self._stop.signal)
        self._tell(event)

    def _tell(self, event: RunEvent) -> None:
        for listener in self._listeners:
            listener(event)
