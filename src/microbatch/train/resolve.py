"""Combine a user's settings with a job into the configuration of a run, and check that every value can work."""

from __future__ import annotations

import math
import os
from pathlib import Path

import torch
from torch.optim.lr_scheduler import ReduceLROnPlateau
from torch.utils.data import DataLoader

from microbatch.devices.backend import check_autocast
from microbatch.errors import ConfigError
from microbatch.kind_words import kind_of
from microbatch.memory.budget import parse_bytes
from microbatch.memory.least_memory import least_memory
from microbatch.ranks.fsdp import fully_sharded
from microbatch.ranks.pipeline import Pipeline
from microbatch.step.size.search import middle_size, sizes_for
from microbatch.train.config import Settings
from microbatch.train.data import length_of
from microbatch.train.job import Job
from microbatch.train.jobs import BUILT_IN
from microbatch.train.place import Place, check_piped_job
from microbatch.train.run_config import RunConfig
from microbatch.train.schedule import learning_rate_of
from microbatch.train.state import optimizers_of
from microbatch.train.streams import is_stream, samples_in

_DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16}


def check_data_path(settings: Settings) -> None:
    """Check that the path of the data exists, before anything is read.

    Args:
        settings: The user's settings.

    Raises:
        ConfigError: The path does not exist.
    """
    if settings.data is not None and not is_there(Path(settings.data).expanduser(), flag="--data"):
        raise ConfigError(f"--data {settings.data}: there is no such file or folder")


def is_there(path: Path, *, flag: str) -> bool:
    """Look whether there is a file or folder.

    Args:
        path: Its path.
        flag: The flag that was given the path.

    Returns:
        Whether there is one.

    Raises:
        ConfigError: The file system refuses the path: it is too long, or no folder may be read on the way.
    """
    try:
        return path.exists()
    except (OSError, ValueError) as error:
        why = getattr(error, "strerror", None) or error
        raise ConfigError(f"{flag} {os.fspath(path)[:60]!r}: this path cannot be used: {why}") from None


def check_memory(settings: Settings, job: Job, config: RunConfig) -> None:
    """Check that a step can keep to the memory budget, before a window is run.

    Args:
        settings: The user's settings.
        job: The job.
        config: The configuration that both gave.

    Raises:
        ConfigError: Weights, gradients and optimizer state alone take more.
    """
    if config.memory_budget is not None:
        least = least_memory(job.model, optimizers_of(job.optimizer), device=config.device)
        if refusal := least.refusal(config.memory_budget):
            asked = "the job's memory budget" if settings.memory is None else f"--memory {settings.memory}"
            raise ConfigError(f"{asked}: {refusal}")


def resolve(settings: Settings, job: Job, *, device: torch.device, place: Place | None = None) -> RunConfig:
    """Combine the settings with the job's defaults, and check that the values work together.

    Args:
        settings: The user's settings, which take precedence.
        job: The job, with its own defaults.
        device: The device that `resolve_device` returned.
        place: This rank's place in the run; `None` for a single process.

    Returns:
        The run's configuration.

    Raises:
        ConfigError: A value cannot work with this job, this data or this machine.
        DataError: The data has no length or no samples.
    """
    piped, place = isinstance(job.model, Pipeline), place or Place()
    if piped and not place.stages:
        raise ConfigError(
            "the job's model is a Pipeline, whose stages are on several ranks. This command runs on one device: let "
            "the job return the whole model here"
        )
    if piped:
        check_piped_job(settings, job)
    notices: list[str] = []
    stream = is_stream(job.data)
    samples = samples_in(job.data) if stream else length_of(job.data, role="data")
    batch_size = settings.batch_size or job.batch_size
    if batch_size < 1:
        raise ConfigError(f"the job's batch_size is {batch_size}: it must be at least 1")
    if 0 < samples < batch_size:
        notices.append(f"the data has {samples} samples, so every batch holds {samples} instead of {batch_size}")
    steps, epochs = _length(settings, job, batches_per_epoch=-(-samples // batch_size))
    if stream:
        _check_stream(settings, job)
    every = max(1, -(-steps // 10))
    if settings.deterministic:
        _check_deterministic(settings, job, notices=notices)
    sharded = bool(fully_sharded(job.model))
    compare = settings.compare and place.ranks == 1 and not sharded and not piped
    if settings.compare and not compare:
        notices.append("the comparison with the full batch is left out: it is of one process, and a whole model")
    if job.validation is None and (settings.best or settings.patience):
        asked = "--patience" if settings.patience else "--best"
        raise ConfigError(f"{asked}: the job has no validation set to compare by; pass mb.Job(validation=...)")
    parameters = [parameter for parameter in job.model.parameters() if parameter.requires_grad]
    if not parameters and not place.parameters:
        raise ConfigError("the job's model has no trainable parameters, so there is nothing to optimise")
    return RunConfig(
        job=settings.job,
        device=device,
        batch_size=batch_size,
        microbatch_size=_microbatch_size(settings, job, batch=min(batch_size, samples or batch_size), notices=notices),
        memory_budget=_memory(settings, job),
        steps=steps,
        epochs=epochs,
        samples=samples,
        validation_samples=length_of(job.validation, role="validation") if job.validation is not None else 0,
        seed=settings.seed,
        autocast=_autocast(settings, job, device),
        learning_rate=_learning_rate(settings, job),
        schedule=_schedule(settings, job),
        warmup_steps=_warmup(settings, job, steps=steps, notices=notices),
        max_grad_norm=None if settings.max_grad_norm == "none" else settings.max_grad_norm or job.max_grad_norm,
        nonfinite=settings.nonfinite,
        validate_every=settings.validate_every or every,
        checkpoint_every=settings.checkpoint_every or every,
        keep_checkpoints=settings.keep_checkpoints,
        best=settings.best,
        patience=settings.patience,
        compare=compare,
        parameters=place.parameters or sum(parameter.numel() for parameter in parameters),
        unit=job.unit,
        plain=_is_plain(settings, job),
        batch_norm="microbatch" if settings.accumulation == "plain" and job.batch_norm else job.batch_norm,
        buffers=settings.buffers or job.buffers,
        checkpoint=None if settings.checkpoint == "none" else settings.checkpoint,
        auto=_is_auto(settings, job) and not settings.deterministic,
        ragged=job.lengths is not None,
        ranks=place.ranks,
        pipelines=place.shares if piped else None,
        deterministic=settings.deterministic,
        async_checkpoints=settings.async_checkpoints,
        rank_timeout=settings.rank_timeout,
        shard=_shard(settings, job, ranks=place.ranks, notices=notices),
        sync=settings.sync,
        notices=tuple(notices),
    )


def resolved_settings(settings: Settings, config: RunConfig) -> Settings:
    """Convert a configuration back to settings that give the same run, from any folder.

    Args:
        settings: The user's settings.
        config: The configuration that they gave.

    Returns:
        Settings in which every value is set.
    """
    job = settings.job
    if job not in BUILT_IN:
        path, _, function = job.rpartition(":")
        job = f"{Path(path).expanduser().resolve()}:{function}"
    names = {dtype: name for name, dtype in _DTYPES.items()}
    return settings.model_copy(
        update={
            "job": job,
            "data": None if settings.data is None else str(Path(settings.data).expanduser().resolve()),
            "batch_size": config.batch_size,
            "microbatch_size": "auto" if config.auto else config.microbatch_size,
            "memory": f"{config.memory_budget} B" if config.memory_budget is not None else "none",
            "steps": config.steps,
            "epochs": None,
            # Each of several ranks has its own device.
            "device": str(config.device) if config.ranks == 1 else config.device.type,
            "autocast": names[config.autocast] if config.autocast is not None else "none",
            "warmup_steps": config.warmup_steps,
            "max_grad_norm": config.max_grad_norm if config.max_grad_norm is not None else "none",
            "buffers": config.buffers,
            "validate_every": config.validate_every,
            "checkpoint_every": config.checkpoint_every,
        }
    )


def _length(settings: Settings, job: Job, *, batches_per_epoch: int) -> tuple[int, float]:
    steps, epochs = settings.steps, settings.epochs
    if steps is None and epochs is None:
        steps, epochs = job.steps, job.epochs
    if steps is None and epochs is None:
        raise ConfigError("neither the job nor the settings set the end of the run; pass --steps or --epochs")
    if steps is None and not batches_per_epoch:
        raise ConfigError("--epochs: the job's data has no known number of samples; pass --steps")
    if steps is None:
        steps = max(1, math.ceil(round((epochs or 0) * batches_per_epoch, 6)))
    if steps < 1:
        raise ConfigError(f"the job's steps is {steps}: it must be at least 1")
    return steps, steps / batches_per_epoch if batches_per_epoch else 0.0


def _check_stream(settings: Settings, job: Job) -> None:
    # Not of a loader: its iterator draws from its generator, and starts its workers.
    if not isinstance(job.data, DataLoader) and iter(job.data) is job.data:
        raise ConfigError(
            f"the job's data is {kind_of(job.data)}, which can be read once only; pass an IterableDataset, whose "
            "__iter__ begins again"
        )
    if settings.deterministic:
        raise ConfigError(
            "--deterministic: the job's data is read in its own order, and not by index. Use a map-style data set, or "
            "leave out --deterministic"
        )
    if isinstance(job.data, DataLoader) and job.data.batch_size is None:
        raise ConfigError("the job's DataLoader has no batch_size, so it hands out single samples; give it one")


def _microbatch_size(settings: Settings, job: Job, *, batch: int, notices: list[str]) -> int:
    asked = settings.microbatch_size
    if _is_auto(settings, job):
        return middle_size(sizes_for(batch))
    size = asked if isinstance(asked, int) else job.microbatch_size or 0
    if size < 1:
        raise ConfigError(f"the job's microbatch_size is {size}: it must be at least 1")
    if size > batch:
        if isinstance(asked, int):
            notices.append(f"a microbatch of {size} is more than the batch of {batch}: the batch goes through whole")
        size = batch
    return size


def _check_deterministic(settings: Settings, job: Job, *, notices: list[str]) -> None:
    for given, why in [
        (job.encode is not None, "its loss is computed from the whole batch, and is no sum over microbatches"),
        (job.lengths is not None, "which of its rows go together depends on the share that a rank has"),
        (job.batch_norm not in {None, "frozen"}, "its running statistics move with each rank's microbatches"),
    ]:
        if given:
            raise ConfigError(f"--deterministic cannot hold for this job: {why}; leave it out")
    if _is_auto(settings, job):
        notices.append(
            "each microbatch size has its own rounding, so a deterministic run cannot search for one; pass it with "
            "--microbatch-size"
        )


def _shard(settings: Settings, job: Job, *, ranks: int, notices: list[str]) -> str:
    if settings.shard != "none" and ranks == 1:
        notices.append(f"--shard {settings.shard}: one process holds everything; start several with torchrun")
        return "none"
    if settings.shard == "none" and fully_sharded(job.model):
        return "job"
    return settings.shard


def _is_plain(settings: Settings, job: Job) -> bool:
    if settings.accumulation == "plain" and job.encode is None and job.batch_norm is None:
        raise ConfigError(
            "--accumulation plain: neither this job's loss nor its model couples samples, so its gradient is the same "
            "either way; leave it out"
        )
    return settings.accumulation == "plain"


def _is_auto(settings: Settings, job: Job) -> bool:
    return settings.microbatch_size == "auto" or (settings.microbatch_size is None and job.microbatch_size is None)


def _memory(settings: Settings, job: Job) -> int | None:
    asked = settings.memory if settings.memory is not None else job.memory_budget
    return None if asked is None or asked == "none" else parse_bytes(asked)


def _autocast(settings: Settings, job: Job, device: torch.device) -> torch.dtype | None:
    if settings.autocast is None:
        return job.autocast
    if settings.autocast == "none":
        return None
    dtype = _DTYPES[settings.autocast]
    check_autocast(device, dtype)
    return dtype


def _learning_rate(settings: Settings, job: Job) -> float:
    optimizers = optimizers_of(job.optimizer)
    if not optimizers:
        raise ConfigError("the job has no optimizer; pass one, or several, to mb.Job(optimizer=...)")
    if settings.learning_rate is None:
        return learning_rate_of(optimizers[0], optimizers[0].param_groups[0])
    if job.scheduler is not None:
        raise ConfigError("--lr: the job has its own scheduler, which read the learning rates when it was created")
    return settings.learning_rate


def _schedule(settings: Settings, job: Job) -> str:
    if job.scheduler is None:
        return settings.schedule
    if isinstance(job.scheduler, ReduceLROnPlateau):
        raise ConfigError(
            "the job's ReduceLROnPlateau needs a validation loss at every step; use a scheduler that counts steps"
        )
    return "job"


def _warmup(settings: Settings, job: Job, *, steps: int, notices: list[str]) -> int:
    if settings.warmup_steps is not None:
        if settings.warmup_steps >= steps:
            raise ConfigError(
                f"warmup_steps is {settings.warmup_steps} and the run has {steps} steps, so it would never reach its "
                "learning rate; use fewer"
            )
        return settings.warmup_steps
    if job.warmup_steps >= steps:
        shorter = steps // 10
        notices.append(f"the job's warm-up of {job.warmup_steps} steps does not fit into {steps}: it takes {shorter}")
        return shorter
    return job.warmup_steps
