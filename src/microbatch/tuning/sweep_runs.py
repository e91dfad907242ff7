"""Train one run of a sweep a slice at a time, keep its state in a folder, and read its curve from there."""

from __future__ import annotations

import json
import statistics
from collections.abc import Callable, Generator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from microbatch.errors import ConfigError, NonfiniteError
from microbatch.gradients.parameters import device_of
from microbatch.planning.scaling import Scaling, scale_hyperparameters
from microbatch.step.saved_state import RandomState, seed_everything
from microbatch.train.config import Settings
from microbatch.train.data import mix_seed
from microbatch.train.evaluate import untouched
from microbatch.train.find_job import call_job
from microbatch.train.job import Job
from microbatch.train.kept import Kept, kept, kept_data
from microbatch.train.resolve import resolve
from microbatch.train.rundir import RunDirectory
from microbatch.train.schedule import scale_learning_rates
from microbatch.train.state import optimizers_of
from microbatch.train.training_loop import TrainingLoop
from microbatch.tuning.sweep_records import CurvePoint


@dataclass(frozen=True, slots=True, kw_only=True)
class RunPlan:
    """Hold what one run is trained with.

    Attributes:
        batch_size: Effective batch, in samples.
        microbatch_size: Samples that go through the model at once.
        learning_rate: Peak learning rate of the first parameter group.
        seed: Seed of the order of the data, and of the weights where the job takes one.
        ends: Steps after each point of the curve, rising.
        warmup_steps: Steps of linear warm-up.
        by_rule: Whether the other hyperparameters follow the scaling rule.
        accumulation: ``"exact"``, or ``"plain"`` to couple samples within each microbatch alone.
    """

    batch_size: int
    microbatch_size: int
    learning_rate: float
    seed: int
    ends: tuple[int, ...]
    warmup_steps: int
    by_rule: bool
    accumulation: str

    @property
    def name(self) -> str:
        """Name the run's folder."""
        return f"batch-{self.batch_size}-lr-{self.learning_rate:.6g}-seed-{self.seed}"


class Jobs:
    """Hand out the job of each seed, as it was at the beginning.

    Args:
        job: A job, or a function that makes one.
    """

    def __init__(self, job: Job | Callable[..., Job]) -> None:
        self._job, self._made = job, dict[int, tuple[Job, Kept]]()
        self._stack = ExitStack()

    @contextmanager
    def put_back(self) -> Generator[None]:
        """Restore every job when the block ends: weights, optimizer, gradients, buffers, modes and random state.

        Yields:
            Nothing.
        """
        before = RandomState(torch.device("cpu"))
        try:
            with self._stack:
                yield
        finally:
            before.restore()

    def fresh(self, seed: int) -> Job:
        """Return the job of a seed, with the weights and the optimizer state of the beginning and no gradients.

        Args:
            seed: The seed; a job that the caller made is the same for all of them.

        Returns:
            The job.
        """
        key = 0 if isinstance(self._job, Job) else seed
        if key not in self._made:
            if isinstance(self._job, Job):
                job = self._job
            else:
                seed_everything(mix_seed(seed, "job"))
                job = call_job(self._job, {"seed": seed}, name="the function that makes the job")
            self._check(job)
            copies = self._stack.enter_context(kept(job.model, optimizers_of(job.optimizer)))
            self._stack.enter_context(kept_data(job.data))
            self._stack.enter_context(untouched(job.model, device_of(job.model), training=True))
            self._made[key] = job, copies
        job, copies = self._made[key]
        copies.restore()
        return job

    @staticmethod
    def _check(job: Job) -> None:
        if job.scheduler is not None:
            raise ConfigError(
                "the job has its own scheduler, which counts the steps of one batch size; a sweep keeps the rate "
                "constant after the warm-up, so pass a job with scheduler=None"
            )
        if job.encode is not None and job.validation is None:
            raise ConfigError(
                "the job's loss couples samples, so its training loss depends on the batch size; "
                "give the job a validation set: mb.Job(validation=...)"
            )


class Runs:
    """Train the runs of a sweep, each in a folder of its own.

    Args:
        jobs: Where the jobs come from.
        folder: Folder of the sweep.
    """

    def __init__(self, jobs: Jobs, folder: Path) -> None:
        self._jobs, self._folder = jobs, folder

    def directory(self, plan: RunPlan) -> RunDirectory:
        """Name a run's files.

        Args:
            plan: The run.

        Returns:
            Its directory, which may be missing.
        """
        return RunDirectory(self._folder / "runs" / plan.name)

    def advance(self, plan: RunPlan, point: int) -> bool:
        """Train a run up to a point of its curve, from where its newest checkpoint is.

        Args:
            plan: The run.
            point: The point, from 0.

        Returns:
            Whether the run is well; false if its loss or gradient became infinite or NaN.

        Raises:
            KeyboardInterrupt: A signal asked to stop; the run's state is in its folder.
        """
        directory, end = self.directory(plan), plan.ends[point]
        saved = [int(path.name.removeprefix("step-")) for path in directory.checkpoints.glob("step-*")]
        if saved and max(saved) >= end:
            return True
        job = self._jobs.fresh(plan.seed)
        if plan.by_rule:
            apply_rule(job, plan.batch_size)
        scale_learning_rates(optimizers_of(job.optimizer), plan.learning_rate)
        settings = settings_of(plan)
        config = replace(
            resolve(settings, job, device=device_of(job.model)),
            steps=end,
            validate_every=end,
            checkpoint_every=end,
            warmup_steps=plan.warmup_steps,
            metered=False,
        )
        if not saved:
            directory.start(config=settings.toml(), files={})
        loop = TrainingLoop(job, config=config, run=directory)
        if saved:
            loop.restore()
        try:
            stopped = loop.run()
        except NonfiniteError:
            return False
        if stopped is not None:
            raise KeyboardInterrupt
        return True

    def curve(self, plan: RunPlan, *, points: int) -> list[CurvePoint]:
        """Read a run's curve from its folder.

        Args:
            plan: The run.
            points: Points to read at most.

        Returns:
            The points that were reached.
        """
        records, samples, start, curve = self._records(plan), 0, 0, list[CurvePoint]()
        noise: float | None = None
        for end in plan.ends[:points]:
            if len(records) < end:
                break
            part = records[start:end]
            seen = sum(int(each["samples"]) for each in part)
            validation: Mapping[str, Any] = part[-1].get("validation", {})
            trained = sum(float(each["loss"]) * int(each["samples"]) for each in part) / max(1, seen)
            noise = next((found for each in reversed(part) if (found := noise_of(each)) is not None), noise)
            samples, start = samples + seen, end
            loss = float(validation.get("loss", trained))
            curve.append(CurvePoint(steps=end, samples=samples, loss=loss, noise_scale=noise))
        return curve

    def seconds_per_sample(self, plan: RunPlan) -> float | None:
        """Read how long the steps of a run took.

        Args:
            plan: The run.

        Returns:
            The median of a step's time over its samples. The first step of each slice, which warms up, counts only
            where a slice has no other.
        """
        records = self._records(plan)
        first = {0, *plan.ends}
        kept = [each for index, each in enumerate(records) if index not in first] or records
        return statistics.median(each["seconds"] / each["samples"] for each in kept) if kept else None

    def validates_loss(self, plan: RunPlan) -> bool:
        """Return whether the validation of a run that has a point has a ``"loss"``.

        Args:
            plan: The run.

        Returns:
            Whether it has.
        """
        return any("loss" in each.get("validation", {}) for each in self._records(plan))

    def _records(self, plan: RunPlan) -> list[dict[str, Any]]:
        try:
            lines = self.directory(plan).metrics.read_text(encoding="utf-8").splitlines()
        except FileNotFoundError:
            return []
        return [json.loads(line) for line in lines if line.endswith("}")]


def noise_of(record: Mapping[str, Any]) -> float | None:
    """Read the gradient noise scale of a line of metrics.

    Args:
        record: The line.

    Returns:
        The noise scale, in samples; `None` where it was not measured.
    """
    found = record.get("noise_scale")
    return None if found is None else float(found)


def settings_of(plan: RunPlan) -> Settings:
    """Write a run's settings.

    Args:
        plan: The run.

    Returns:
        The settings of the whole run.
    """
    return Settings.model_validate(
        {
            "job": "sweep",
            "batch_size": plan.batch_size,
            "microbatch_size": plan.microbatch_size,
            "learning_rate": plan.learning_rate,
            "steps": plan.ends[-1],
            "seed": plan.seed,
            "schedule": "constant",
            "warmup_steps": plan.warmup_steps,
            "accumulation": plan.accumulation,
            "keep_checkpoints": 1,
            "compare": False,
        }
    )


def scalings_for(job: Job, batch_size: int) -> list[Scaling]:
    """Scale the hyperparameters of each optimizer of a job from the job's own batch to another one.

    Args:
        job: The job.
        batch_size: Effective batch of the run, in samples.

    Returns:
        One record for each optimizer.
    """
    return [
        scale_hyperparameters(
            optimizer, from_batch_size=job.batch_size, to_batch_size=batch_size, warmup_steps=job.warmup_steps
        )
        for optimizer in optimizers_of(job.optimizer)
    ]


def apply_rule(job: Job, batch_size: int) -> None:
    """Write the scaled hyperparameters into a job's optimizers.

    Args:
        job: The job, whose optimizers hold its own values.
        batch_size: Effective batch of the run, in samples.
    """
    for scaling, optimizer in zip(scalings_for(job, batch_size), optimizers_of(job.optimizer), strict=True):
        scaling.apply_to(optimizer)
