"""Find what each batch size of a sweep runs with: its microbatch size, its learning rates, its steps."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from importlib import import_module
from pathlib import Path
from typing import Any

from microbatch.errors import ConfigError, MicrobatchError
from microbatch.gradients.parameters import device_of
from microbatch.step.events import Event, PlanChosen
from microbatch.train.atomic_files import write_text
from microbatch.train.baselines import take_step
from microbatch.train.config import Settings
from microbatch.train.data import Position, length_of
from microbatch.train.job import Job
from microbatch.train.job_accumulator import accumulator_for
from microbatch.train.place import Place
from microbatch.train.rank_batches import batches_of
from microbatch.train.resolve import resolve
from microbatch.train.schedule import scale_learning_rates
from microbatch.train.state import optimizers_of
from microbatch.train.streams import is_stream, samples_in
from microbatch.tuning.sweep_runs import Jobs, apply_rule, scalings_for

ASKED = "sweep.json"
"""File of a sweep's folder that holds what was asked for and what was found for each batch size."""

_MOST_STEPS = 60
"""Steps in which ``microbatch_size="auto"`` has certainly chosen."""


class Setups:
    """What each batch size runs with, kept in the folder.

    Args:
        jobs: Where the jobs come from.
        folder: Folder of the sweep.
        asked: The arguments of the sweep.
        found: Called with each batch size and its learning rate when they are found.

    Attributes:
        notes: What the reader has to know.
    """

    def __init__(
        self, jobs: Jobs, folder: Path, asked: Mapping[str, Any], *, found: Callable[[int, float], object]
    ) -> None:
        self._jobs, self._folder, self._asked, self._found = jobs, folder, asked, found
        self.notes: list[str] = []

    def read_or_find(self) -> dict[int, dict[str, Any]]:
        """Find the microbatch size and the learning rates of each batch size, or read them again.

        Returns:
            What each batch size runs with.

        Raises:
            ConfigError: The folder was started with other values, or a batch size cannot run.
        """
        file = self._folder / ASKED
        before: dict[str, Any] = {}
        if file.exists():
            before = json.loads(file.read_text(encoding="utf-8"))
            changed = sorted(key for key, value in self._asked.items() if before["asked"].get(key) != value)
            if changed:
                raise ConfigError(
                    f"{self._folder} was started with other values of {', '.join(changed)}; repeat these to go on, or "
                    "name a new folder"
                )
        found: dict[str, Any] = before.get("batches", {})
        self.notes = list(before.get("notes", []))
        for size in self._asked["batch_sizes"]:
            if str(size) not in found:
                found[str(size)] = self._setup(size)
                write_text(file, json.dumps({"asked": self._asked, "batches": found, "notes": self.notes}) + "\n")
        return {int(size): setup for size, setup in found.items()}

    def _setup(self, size: int) -> dict[str, Any]:
        job, asked = self._jobs.fresh(0), self._asked
        samples, total = samples_of(job, asked["samples"]), _rows_in(job)
        if total and size > total:
            raise ConfigError(f"batch size {size:,} is more than the data has: {total:,} samples")
        if samples < size * asked["points"]:
            raise ConfigError(
                f"a batch of {size:,} takes fewer than {asked['points']} steps in {samples:,} samples, so its curve "
                f"has too few points; use at least {size * asked['points']:,} samples, or fewer points"
            )
        own = float(optimizers_of(job.optimizer)[0].param_groups[0]["lr"])
        try:
            scaling = scalings_for(job, size)[0]
        except MicrobatchError:
            if asked["lr"] == "rule":
                raise
            scaling = None
            self.note("no scaling rule was made for the optimizer: its hyperparameters stay as they are")
        warmup = job.warmup_steps if scaling is None else scaling.warmup_steps or 0
        rate = own if scaling is None else scaling.scaled[0].learning_rate
        places = points_of(samples, points=asked["points"], largest=asked["batch_sizes"][-1])
        ends = ends_of(places, batch_size=size, total=total)
        if warmup >= ends[-1]:
            self.note(f"batch {size:,}: the warm-up of {warmup:,} steps is too long for {ends[-1]:,}; a tenth is taken")
            warmup = ends[-1] // 10
        micro = asked["microbatch_size"]
        if micro == "auto":
            micro = find_microbatch_size(job, size, seed=0)
        if asked["lr"] == "auto":
            job = self._jobs.fresh(0)
            if scaling is not None:
                apply_rule(job, size)
                scale_learning_rates(optimizers_of(job.optimizer), rate)
            rate = self._found_rate(job, size, otherwise=rate, micro=min(int(micro), size))
        self._found(size, rate)
        factors = asked["grid"] if asked["lr"] == "grid" else [1.0]
        return {
            "microbatch_size": min(int(micro), size),
            "rates": [rate * factor for factor in factors],
            "warmup_steps": warmup,
            "ends": ends,
            "by_rule": scaling is not None,
        }

    def _found_rate(self, job: Job, size: int, *, otherwise: float, micro: int) -> float:
        finder = import_module("microbatch.tuning.find_rate")
        suggested = finder.find_learning_rate(job, batch_size=size, microbatch_size=micro).suggested
        if suggested is None:
            self.note(f"batch {size:,}: the finder suggests no learning rate, so the rule's {otherwise:.3g} is taken")
            return otherwise
        return float(suggested)

    def note(self, text: str) -> None:
        """Add a note, once.

        Args:
            text: The note.
        """
        if text not in self.notes:
            self.notes.append(text)


def samples_of(job: Job, asked: int | None) -> int:
    """Count the samples that each run learns from.

    Args:
        job: The job.
        asked: What the caller asked for; `None` for what the job itself would learn from.

    Returns:
        The number of samples.

    Raises:
        ConfigError: Neither says when to stop.
    """
    if asked is not None:
        return asked
    if job.steps is not None:
        return job.steps * job.batch_size
    total = _rows_in(job)
    if job.epochs is None or not total:
        raise ConfigError("neither the job nor the call has an end; pass samples=")
    return max(1, round(job.epochs * total))


def _rows_in(job: Job) -> int:
    return samples_in(job.data) if is_stream(job.data) else length_of(job.data, role="data")


def points_of(samples: int, *, points: int, largest: int) -> list[int]:
    """Place the points of the curves: at equal factors of samples, because losses fall by factors.

    Args:
        samples: Samples of a whole run.
        points: How many points.
        largest: The largest batch size, which cannot be looked at earlier than after one step.

    Returns:
        Samples at each point, rising up to ``samples``.

    Example:
        >>> points_of(3200, points=6, largest=16)
        [100, 200, 400, 800, 1600, 3200]
    """
    first = max(largest, samples / 32)
    return [round(first * (samples / first) ** (point / (points - 1))) for point in range(points)]


def ends_of(places: Sequence[int], *, batch_size: int, total: int) -> list[int]:
    """Compute the steps after which a run has reached each point.

    Args:
        places: Samples at each point.
        batch_size: Effective batch, in samples.
        total: Samples in the data; 0 if it is not known.

    Returns:
        Steps at each point, rising.
    """
    ends: list[int] = []
    for wanted in places:
        epochs, rest = divmod(wanted, total) if total else (0, wanted)
        # The last batch of an epoch is short.
        steps = epochs * -(-total // batch_size) - (-rest // batch_size)
        ends.append(max(steps, ends[-1] + 1 if ends else 1))
    return ends


def find_microbatch_size(job: Job, batch_size: int, *, seed: int) -> int:
    """Take steps of a job with ``microbatch_size="auto"`` until a size is chosen.

    Args:
        job: The job; its weights move, and the caller puts them back.
        batch_size: Effective batch, in samples.
        seed: Seed of the order of the data.

    Returns:
        The chosen size; of a search that did not end, the size of its last step.
    """
    settings = Settings(job="sweep", batch_size=batch_size, microbatch_size="auto", steps=_MOST_STEPS, seed=seed)
    config = replace(resolve(settings, job, device=device_of(job.model)), warmup_steps=0)
    chosen: list[int] = []

    def listen(event: Event) -> None:
        if isinstance(event, PlanChosen):
            chosen.append(event.microbatch_size)

    accumulator = accumulator_for(job, config, grad_scaler=None, nonfinite="skip", listeners=(listen,))
    # In a throwaway place: a stream is read from its beginning again by the runs.
    batch, _ = batches_of(job, config=config, place=Place(), rank=0).take(0, Position())
    job.model.train()
    size = config.microbatch_size
    for _ in range(_MOST_STEPS):
        size = int(take_step(accumulator, job, batch).microbatch_size)
        if chosen:
            return chosen[0]
    return size


def rule_warnings(job: Job, batch_sizes: Sequence[int]) -> list[str]:
    """Collect where the scaling rule leaves the range that it was made for.

    Args:
        job: The job.
        batch_sizes: The batch sizes of the sweep.

    Returns:
        One sentence for each warning and batch size; empty where no rule was made for the optimizer.
    """
    try:
        found = {size: scalings_for(job, size) for size in batch_sizes}
    except MicrobatchError:
        return []
    return [
        f"batch {size:,}: {text}"
        for size, scalings in found.items()
        for text in dict.fromkeys(text for scaling in scalings for text in scaling.warnings)
    ]
