"""Three ways to take one step on a batch: accumulated, whole, and the hand-written loop."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import nn

from microbatch.batch.batch_tree import rows_of
from microbatch.batch.cut import cut
from microbatch.batch.prefetch import feed
from microbatch.step.accumulator import Accumulator
from microbatch.step.record import Step
from microbatch.train.evaluate import named_losses
from microbatch.train.job import Job
from microbatch.train.run_config import RunConfig
from microbatch.train.state import optimizers_of


def take_step(accumulator: Accumulator, job: Job, batch: Any, *, plain: bool = False) -> Step:
    """Take a job's step on a batch.

    Args:
        accumulator: Over the job's model and optimizer.
        job: Its loss.
        batch: The whole batch, on the host.
        plain: Whether samples are coupled within each microbatch alone.

    Returns:
        What the step did.
    """
    if job.encode is None or plain:
        return accumulator.step(batch, job.batch_loss, counts=job.counts)
    return accumulator.step(batch, job.loss_fn, encode=job.encode)


class Ways:
    """Take a step on one batch in any of three ways, each with the optimizers and the precision of the run.

    Args:
        job: Model, optimizer and loss.
        batch: The whole batch, on the host.
        config: The run's configuration.
        scaler_state: State of the run's loss scaler, if it has one; every step starts from it.

    Attributes:
        rows: Rows of the batch.
        microbatches: Microbatches of an accumulated step; of ragged rows, as the last such step counted them.
        optimizers: The job's optimizers.
        max_grad_norm: What the finished gradient is clipped to; `None` at first, so that it can be compared.
    """

    def __init__(
        self, job: Job, batch: Any, *, config: RunConfig, scaler_state: Mapping[str, Any] | None = None
    ) -> None:
        self.rows = rows_of(batch)
        self.optimizers = optimizers_of(job.optimizer)
        self.max_grad_norm: float | None = None
        self.microbatches = -(-self.rows // config.microbatch_size)
        self._job, self._batch, self._config = job, batch, config
        self._scaler_state = scaler_state

    def by_name(self) -> dict[str, Callable[[], None]]:
        """List the ways.

        Returns:
            ``"accumulated"``, ``"hand_written"`` and ``"whole"``, each taking one step when called.
        """
        return {"accumulated": self._accumulated, "hand_written": self._hand_written, "whole": self._whole}

    def autocast(self) -> torch.autocast:
        """Make the context that the run's forward passes are in.

        Returns:
            A context manager that does nothing where the run has no autocast.
        """
        dtype = self._config.autocast
        return torch.autocast(self._config.device.type, dtype=dtype, enabled=dtype is not None)

    def _accumulated(self) -> None:
        config = self._config
        accumulator = Accumulator(
            self._job.model,
            self._job.optimizer,
            microbatch_size=config.microbatch_size,
            memory_budget=config.memory_budget,
            max_grad_norm=self.max_grad_norm,
            autocast=config.autocast,
            grad_scaler=self._scaler(),
            nonfinite="skip",
            lengths=self._job.lengths,
            batch_norm=config.batch_norm or "microbatch",
            buffers=config.buffers or "each",
            checkpoint=config.checkpoint,
        )
        self.microbatches = take_step(accumulator, self._job, self._batch, plain=config.plain).microbatches

    def _whole(self) -> None:
        scaler = self._scaler()
        self._backward(next(iter(feed([self._batch], self._config.device))), self.rows, share=1.0, scaler=scaler)
        self._apply(scaler)

    def _hand_written(self) -> None:
        scaler = self._scaler()
        microbatches = cut(self._batch, self._config.microbatch_size)
        for index, microbatch in enumerate(feed(microbatches, self._config.device)):
            rows = min(self._config.microbatch_size, self.rows - index * self._config.microbatch_size)
            self._backward(microbatch, rows, share=1 / len(microbatches), scaler=scaler)
        self._apply(scaler)

    def _backward(self, batch: Any, rows: int, *, share: float, scaler: torch.amp.GradScaler | None) -> None:
        with self.autocast():
            losses = named_losses(self._job.batch_loss(self._job.model, batch), rows=rows)
            loss = torch.stack([loss.mean for loss in losses.values()]).sum() * share
        (loss if scaler is None else scaler.scale(loss)).backward()

    def _apply(self, scaler: torch.amp.GradScaler | None) -> None:
        if scaler is not None:
            for optimizer in self.optimizers:
                scaler.unscale_(optimizer)
        if self.max_grad_norm is not None:
            nn.utils.clip_grad_norm_(self._job.model.parameters(), self.max_grad_norm)
        for optimizer in self.optimizers:
            optimizer.step() if scaler is None else scaler.step(optimizer)
            optimizer.zero_grad()

    def _scaler(self) -> torch.amp.GradScaler | None:
        if self._scaler_state is None:
            return None
        scaler = torch.amp.GradScaler(self._config.device.type)
        scaler.load_state_dict(dict(self._scaler_state))
        return scaler
