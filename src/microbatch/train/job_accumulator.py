"""Make the accumulator that takes a job's steps: one place for the training loop and for trials of it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from microbatch.gradients.noise_estimate import NoiseScale
from microbatch.step.accumulator import Accumulator
from microbatch.step.events import Listener
from microbatch.step.options import Ranks
from microbatch.train.job import Job
from microbatch.train.run_config import RunConfig


def scaler_for(config: RunConfig) -> torch.amp.GradScaler | None:
    """Make the loss scaler of a run.

    Args:
        config: The run's configuration.

    Returns:
        The scaler; `None` without float16 autocast.
    """
    return torch.amp.GradScaler(config.device.type) if config.autocast is torch.float16 else None


def accumulator_for(
    job: Job,
    config: RunConfig,
    *,
    grad_scaler: torch.amp.GradScaler | None,
    nonfinite: str | None = None,
    group: Any = None,
    noise_scale: NoiseScale | None = None,
    listeners: Sequence[Listener] = (),
) -> Accumulator:
    """Make the accumulator over a job's model and optimizers.

    Args:
        job: Model and optimizer.
        config: The run's configuration.
        grad_scaler: What `scaler_for` returned.
        nonfinite: What happens to a window whose loss or gradient is not finite; `None` for what the run does.
        group: Process group of the ranks that share the batch; `None` for all ranks.
        noise_scale: Which windows the gradient noise scale is measured in; `None` to leave it out.
        listeners: Called with every event of the accumulator.

    Returns:
        The accumulator.
    """
    return Accumulator(
        job.model,
        job.optimizer,
        microbatch_size="auto" if config.auto else config.microbatch_size,
        memory_budget=config.memory_budget,
        max_grad_norm=config.max_grad_norm,
        autocast=config.autocast,
        grad_scaler=grad_scaler,
        nonfinite=nonfinite or config.nonfinite,
        lengths=job.lengths,
        batch_norm=config.batch_norm,
        buffers=config.buffers,
        checkpoint=config.checkpoint,
        dropout=job.dropout,
        ranks=Ranks(sync=config.sync, group=group, deterministic=config.deterministic),
        noise_scale=noise_scale,
        listeners=listeners,
    )
