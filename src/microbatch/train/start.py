"""Begin a run or go on with one: from settings to a summary."""

from __future__ import annotations

import dataclasses
import itertools
import json
import time
import tomllib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from microbatch.devices.available_devices import lacking, resolve_device
from microbatch.devices.backend import set_current
from microbatch.errors import CheckpointError, ConfigError, MicrobatchError
from microbatch.ranks.process_group import RankGroup
from microbatch.step.saved_state import seed_everything
from microbatch.train.checkpoint_manifest import checkpoint_name
from microbatch.train.compare import Comparison, compare
from microbatch.train.config import Settings, flag_name, load_settings, read_toml
from microbatch.train.data import mix_seed
from microbatch.train.evaluate import untouched
from microbatch.train.find_job import call_job, find_job
from microbatch.train.first_rank import by_the_first
from microbatch.train.job import Job
from microbatch.train.launch import Launch, own_device
from microbatch.train.place import find_place
from microbatch.train.resolve import (
    check_data_path,
    check_memory,
    is_there,
    resolve,
    resolved_settings,
)
from microbatch.train.run_config import RunConfig
from microbatch.train.run_events import Comparing, Notice, RunEnded, RunEvent, RunListener, RunPlaced
from microbatch.train.run_lock import Claim
from microbatch.train.rundir import RunDirectory, jsonable
from microbatch.train.shard_model import spread
from microbatch.train.track import Tracked
from microbatch.train.training_loop import TrainingLoop

_FIXED = ("job", "data", "batch_size", "seed")
"""Settings that a resumed run keeps: with others it would be another run."""

_HARMLESS = (
    "checkpoint",
    "validate_every",
    "checkpoint_every",
    "keep_checkpoints",
    "best",
    "patience",
    "compare",
    "nonfinite",
    "async_checkpoints",
    "rank_timeout",
    "shard",
    "sync",
    "tracker",
)
"""Settings that a resumed run may change and still have the same losses."""

_SLOW_STEP = 20.0
"""Seconds of a step above which the comparison, some nine steps, would keep people waiting."""


@dataclass(frozen=True, slots=True)
class PreparedRun:
    """Hold a run that has been checked in every respect and has not begun.

    Attributes:
        job: The job.
        config: Its configuration.
        directory: Where its files go.
        loop: The loop, restored from a checkpoint if the run goes on.
        listeners: Who is told.
        launch: Which of the ranks this is.
        claim: The hold on the directory; another process that asks for it is refused until the run has ended.
    """

    job: Job
    config: RunConfig
    directory: RunDirectory
    loop: TrainingLoop
    listeners: tuple[RunListener, ...]
    launch: Launch
    claim: Claim

    def train(self) -> Mapping[str, Any]:
        """Train to the end, compare with the full batch, and write the summary.

        Returns:
            The summary, as in ``summary.json``; ``"stopped_by"`` names the signal if it did not come to the end.

        Raises:
            MicrobatchError: A step failed, or a checkpoint could not be written.
            KeyboardInterrupt: Ctrl-C came twice.
        """
        try:
            return self._train()
        finally:
            for listener in self.listeners:
                if isinstance(listener, Tracked):
                    listener.close()
            self.claim.release()

    def _train(self) -> Mapping[str, Any]:
        stopped_by = self.loop.run()
        compared = self._compare() if stopped_by is None and self.config.compare else None
        text = self._text() if stopped_by is None else None
        summary = self._summary(stopped_by=stopped_by, compared=compared, text=text)
        if self.launch.speaks:
            self.directory.write_summary(json.dumps(summary, indent=2, ensure_ascii=False) + "\n")
        self.tell(RunEnded(summary=summary))
        return summary

    def tell(self, event: RunEvent) -> None:
        """Tell every listener.

        Args:
            event: What happened.
        """
        for listener in self.listeners:
            listener(event)

    def _compare(self) -> Comparison | None:
        self.tell(Comparing())
        per_step = self.loop.progress.seconds / max(1, self.loop.progress.step)
        if per_step > _SLOW_STEP:
            self.tell(Notice(f"a step takes {per_step:.0f} s, so the comparison with the full batch was left out"))
            return None
        try:
            batch = self.loop.first_batch()
            config = dataclasses.replace(self.config, microbatch_size=self.loop.microbatch_size)
            return compare(self.job, batch, config=config, scaler_state=self.loop.scaler_state())
        except (MicrobatchError, torch.OutOfMemoryError) as error:
            # The training itself is done and stored; a measurement must not turn it into a failure.
            self.tell(Notice(f"the comparison with the full batch failed: {error}"))
            return None

    def _text(self) -> str | None:
        if self.job.show is None:
            return None
        # On every rank, although one is heard: a model that is spread over them takes all of them to run.
        with untouched(self.job.model, self.config.device, training=False):
            if self.launch.ranks > 1:  # alike, so that all of them make the same passes
                seed_everything(mix_seed(self.config.seed, "show"))
            return self.job.show(self.job.model)

    def _summary(self, *, stopped_by: str | None, compared: Comparison | None, text: str | None) -> dict[str, Any]:
        progress, config = self.loop.progress, self.config
        summary = {
            "job": config.job,
            "run": str(self.directory.path),
            "finished": stopped_by is None,
            "stopped_by": stopped_by,
            "step": progress.step,
            "steps": config.steps,
            "epoch": progress.position.epoch + (progress.position.start / config.samples if config.samples else 0),
            "loss": progress.loss,
            "validation": progress.validation,
            "best": self._best(),
            "stopped_early": self.loop.stopped_early,
            "facts": dict(self.job.facts),
            "unit": config.unit,
            "seconds": progress.seconds,
            "peak_bytes": progress.peak_bytes,
            "memory_budget": config.memory_budget,
            "communication": progress.communicated
            and dict(zip(("bytes", "calls"), progress.communicated, strict=True)),
            "comparison": dataclasses.asdict(compared) if compared is not None else None,
            "text": text,
        }
        return jsonable(summary)

    def _best(self) -> dict[str, Any] | None:
        best, folder = self.loop.progress.best, self.directory.checkpoints
        if best.value is None:
            return None
        return {
            "score": best.score,
            "value": best.value,
            "step": best.step,
            "checkpoint": str(folder / checkpoint_name(best.step)),
        }


def prepare(
    flags: Mapping[str, Any],
    *,
    file: Path | None = None,
    run: Path | None = None,
    resume: bool = False,
    listeners: Sequence[RunListener] = (),
    launch: Launch | None = None,
) -> PreparedRun:
    """Check everything that can be wrong with a run, before any of its work starts.

    Args:
        flags: Keys of `microbatch.train.config.Settings`; `None` for what was not given.
        file: Configuration file, or `None`.
        run: Run directory; by default a new one under ``runs``, or when resuming the newest one there.
        resume: Whether to go on with a run.
        listeners: Called with every event.
        launch: Which of several ranks this is, where the group of them has been joined; all of them call this.

    Returns:
        The run, ready to train; its directory exists.

    Raises:
        ConfigError: A setting cannot work.
        DataError: The job's data cannot be used.
        CheckpointError: There is nothing to resume, or it does not fit.
        MissingDependencyError: The job or the tracker needs a package that is not installed.
    """
    ranks, launch = RankGroup.find(torch.device("cpu")), launch or Launch()
    claim = Claim()
    try:
        path, resume = by_the_first(
            ranks, lambda: _choose(flags, file=file, run=run, resume=resume, launch=launch, claim=claim)
        )
        for listener in listeners:
            listener(RunPlaced(path))
        prepared = _prepare(flags, file=file, path=path, resume=resume, listeners=listeners, launch=launch, claim=claim)
    except BaseException:
        claim.give_up()
        raise
    return prepared


def _prepare(
    flags: Mapping[str, Any],
    *,
    file: Path | None,
    path: Path,
    resume: bool,
    listeners: Sequence[RunListener],
    launch: Launch,
    claim: Claim,
) -> PreparedRun:
    """Prepare a run in a directory that has been claimed."""
    ranks, directory, notices = RankGroup.find(torch.device("cpu")), RunDirectory(path), claim.notices()
    if resume:
        before = load_settings(read_toml(directory.config))
        settings = load_settings(flags, file=file, base=before)
        notices += _check_changes(before, settings, directory=directory)
        if launch.ranks > 1 and flags.get("device") is None:
            # The kind alone: which one of its kind is not the run's to keep.
            settings = settings.model_copy(update={"device": settings.device.partition(":")[0]})
    else:
        settings = load_settings(flags, file=file)
    check_data_path(settings)
    tracked = _tracked(settings.tracker, tell=listeners, ranks=ranks)
    listeners = (*listeners, *tracked)
    device = resolve_device(own_device(settings.device, launch))
    set_current(device)
    if lacks := lacking(device):
        notices += (f"{device} has {'; '.join(lacks)}",)
    job = make_job(settings, device)
    place = find_place(job, ranks, patience=settings.rank_timeout)
    if settings.shard != "none" and launch.ranks > 1 and not place.stages:
        spread(job, how=settings.shard)
    config = resolve(settings, job, device=device, place=place)
    check_memory(settings, job, config)
    settings_text = resolved_settings(settings, config).toml()
    by_the_first(ranks, lambda: directory.start(config=settings_text, files=job.files))
    loop = TrainingLoop(job, config=config, run=directory, listeners=listeners, place=place)
    prepared = PreparedRun(job, config, directory, loop, tuple(listeners), launch, claim)
    for text in (*notices, *config.notices):
        prepared.tell(Notice(text))
    if resume:
        loop.restore()
    # Last, so that a run that cannot begin leaves nothing at the tracker.
    if settings.tracker != "none":
        by_the_first(ranks, lambda: tracked[0].begin(path, tomllib.loads(settings_text)))
    return prepared


def _tracked(kind: str, *, tell: Sequence[RunListener], ranks: RankGroup | None) -> list[Tracked]:
    """Return the run's tracker, on the first rank, which alone sends metrics."""
    made: list[Tracked] = []

    def tell_all(text: str) -> None:
        for listener in tell:
            listener(Notice(text))

    if kind != "none":
        by_the_first(ranks, lambda: made.append(Tracked(kind, tell=tell_all)))
    return made


def _choose(
    flags: Mapping[str, Any],
    *,
    file: Path | None,
    run: Path | None,
    resume: bool,
    launch: Launch,
    claim: Claim,
) -> tuple[Path, bool]:
    """Choose and claim the run directory, and decide whether to go on with what is in it."""
    if launch.restartable and run is None and not resume:
        raise ConfigError(
            "the launcher may restart the ranks (--max-restarts): pass --run DIR, so that they find the run again"
        )
    if run is not None:
        is_there(run, flag="--run")
    if launch.restartable and run is not None and RunDirectory(run).has_checkpoints:
        resume = True
    if resume:
        directory = RunDirectory(run if run is not None else _newest_run(flags.get("job")))
        directory.check_resumable()
        claim.take(directory.path, restarted=launch.restarts > 0)
        return directory.path, resume
    settings = load_settings(flags, file=file)
    if run is None:
        return claim.take_new(_run_names(settings.job)), resume
    directory = RunDirectory(run)
    if not run.is_dir():
        directory.check_new()
    claim.take(run, restarted=launch.restarts > 0)
    directory.check_new()  # in this order: what a run that trains there now has left so far, the user cannot mend
    return run, resume


def make_job(settings: Settings, device: torch.device) -> Job:
    """Call the function of the job that the settings name.

    Args:
        settings: The user's.
        device: What `resolve_device` returned.

    Returns:
        The job.

    Raises:
        ConfigError: There is no such job, or it does not take what the user gave.
    """
    make = find_job(settings.job)
    # A job that does not seed its own weights still gets the same ones every time.
    seed_everything(mix_seed(settings.seed, "job"))
    offered = {
        "seed": settings.seed,
        "device": device,
        "data": None if settings.data is None else Path(settings.data).expanduser(),
        "batch_size": settings.batch_size,
    }
    return call_job(make, offered, name=settings.job)


def _check_changes(before: Settings, after: Settings, *, directory: RunDirectory) -> list[str]:
    notices: list[str] = []
    for key in Settings.model_fields:
        old, new = getattr(before, key), getattr(after, key)
        if old == new or key in _HARMLESS or (key in ("job", "data") and _same_place(old, new)):
            continue
        if key in _FIXED:
            raise ConfigError(
                f"{directory.path} was started with {key} {old!r}, and a resumed run keeps it; leave out "
                f"{flag_name(key)}, or start a new run"
            )
        notices.append(f"{key} changes from {old} to {new}, so from here on this is not the run that was interrupted")
    return notices


def _same_place(old: str | None, new: str | None) -> bool:
    """Tell whether two paths, with or without a function's name, are the same from here."""
    if old is None or new is None:
        return False
    (old_path, _, old_name), (new_path, _, new_name) = (name.partition(".py:") for name in (old, new))
    return old_name == new_name and Path(old_path).resolve() == Path(new_path).expanduser().resolve()


def _run_names(job: str) -> Iterator[Path]:
    stem = Path(job.rpartition(":")[0] or job).stem
    name = f"{stem}-{time.strftime('%Y%m%d-%H%M%S')}"
    yield Path("runs") / name
    for number in itertools.count(2):
        yield Path("runs") / f"{name}-{number}"


def _newest_run(job: str | None) -> Path:
    stem = Path(job.rpartition(":")[0] or job).stem if job is not None else ""
    found = [path.parent for path in Path("runs").glob("*/config.toml") if path.parent.name.startswith(stem)]
    if not found:
        raise CheckpointError("there is no run under runs/ to resume; pass the run with --run DIR")
    return max(found, key=lambda path: (path / "config.toml").stat().st_mtime)
