"""Make a plan: rehearse every size, then let ``microbatch_size="auto"`` run on copies until it has chosen."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any, Protocol, runtime_checkable

import torch
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm  # pyright: ignore[reportPrivateUsage] - the one base of all of them
from torch.optim import Optimizer

from microbatch.batch.lengths import Lengths
from microbatch.batch.tree import rows_of
from microbatch.errors import ConfigError
from microbatch.memory.budget import parse_bytes
from microbatch.memory.predict import Prediction
from microbatch.planning.plan import Candidate, Plan, words_for
from microbatch.planning.scaling import Scaling, scale_hyperparameters
from microbatch.step.accumulator import Accumulator
from microbatch.step.copies import LossFunction, Scene, copies_of
from microbatch.step.events import Event, PlanChosen, StepDone
from microbatch.step.foresee import room_for
from microbatch.step.rehearse import rehearse
from microbatch.step.replay import Snapshot
from microbatch.step.search import sizes_for
from microbatch.step.settings import Settings

_MOST_STEPS = 60
"""Steps after which five probes must have ended, each with its warm-up and as many again for a meter and for noise."""


@runtime_checkable
class Plannable(Protocol):
    """What a plan reads of a job."""

    model: nn.Module
    optimizer: Optimizer | Sequence[Optimizer]
    loss_fn: LossFunction
    data: Any
    batch_size: int
    collate: Callable[[list[Any]], Any]
    lengths: Lengths | str | None
    counts: Callable[[Any], Mapping[str, Any]] | None
    microbatch_size: int | None
    autocast: torch.dtype | None
    memory_budget: int | str | None


def plan(
    job: Any,
    *,
    optimizer: Optimizer | Sequence[Optimizer] | None = None,
    loss_fn: LossFunction | None = None,
    batch: Any = None,
    memory_budget: int | str | None = None,
    autocast: torch.dtype | None = None,
    from_batch_size: int | None = None,
) -> Plan:
    """Find the microbatch size with the best throughput within a memory budget.

    Every cut gives the same gradient, so only memory and time differ. Peaks are predicted for all sizes by rehearsal
    and measured where a size is run; time is measured on at most five sizes, by real steps on copies. Nothing of the
    user's changes.

    Args:
        job: A `Job`, or a model with ``optimizer``, ``loss_fn`` and ``batch``.
        optimizer: Optimizer over the model's parameters, or several of them; a job has its own.
        loss_fn: As for `Accumulator.step`; a job has its own.
        batch: The whole batch, of this rank; by default the first one of the job's data.
        memory_budget: Bytes, or a text such as ``"6 GiB"``; `None` for the job's, or what the device really has.
        autocast: Precision of the forward pass; `None` for the job's.
        from_batch_size: Batch that the optimizer's hyperparameters were tuned for, in samples, to be told what goes
            with this one; `None` leaves them out.

    Returns:
        The plan; print it, or read ``microbatch_size``.

    Raises:
        ConfigError: Something is missing, or the model, optimizer or loss function cannot be copied.
        BatchError: The batch cannot be cut, or is empty.
        OutOfMemoryError: Not even one row fits.

    Cost:
        A copy of model and optimizer on the device; some ten to thirty steps.
    """
    model: Any = job
    if isinstance(job, Plannable):
        model, optimizer, loss_fn = job.model, optimizer or job.optimizer, loss_fn or job.loss_fn
        autocast = autocast or job.autocast
        memory_budget = job.memory_budget if memory_budget is None else memory_budget
        if batch is None:
            batch = job.collate([job.data[index] for index in range(min(job.batch_size, len(job.data)))])
    if not isinstance(model, nn.Module) or optimizer is None or loss_fn is None or batch is None:
        raise ConfigError("pass an mb.Job, or a model with optimizer=, loss_fn= and batch=")
    settings = _settings(model, optimizer, budget=memory_budget, autocast=autocast, lengths=_of(job, "lengths"))
    rows = rows_of(batch)
    snapshot = Snapshot(settings.bare_model, settings.device)
    prediction = rehearse(settings, loss_fn, batch=batch)
    try:
        trial = _Trial()
        chosen = trial.run(settings, loss_fn, batch=batch, counts=_of(job, "counts"))
    finally:
        snapshot.restore()
    budget = room_for(settings, batch)
    scaling = None
    if from_batch_size is not None:
        scaling = scale_hyperparameters(settings.optimizers[0], from_batch_size=from_batch_size, to_batch_size=rows)
    return _told(
        _plan(chosen, trial, prediction, rows=rows, budget=budget, scaling=scaling), model, _of(job, "microbatch_size")
    )


class _Trial:
    """Run "auto" on copies, and write down how long steps took and what they took."""

    def __init__(self) -> None:
        self.seconds: dict[int, float] = {}
        self.peaks: dict[int, int] = {}
        self.chosen: PlanChosen | None = None

    def run(self, settings: Settings, loss_fn: LossFunction, *, batch: Any, counts: Any) -> PlanChosen:
        cast = copies_of(Scene(settings, loss_fn, batch, []), how=None)
        accumulator = Accumulator(
            cast.settings.model,
            cast.settings.optimizers,
            microbatch_size="auto",
            memory_budget=settings.memory_budget,
            autocast=settings.autocast,
            nonfinite="skip",
            lengths=settings.lengths,
            listeners=(self._listen,),
        )
        for _ in range(_MOST_STEPS):
            accumulator.step(batch, cast.loss_fn, counts=counts)
            if self.chosen is not None:
                return self.chosen
        raise ConfigError(f"no microbatch size was found in {_MOST_STEPS} steps")

    def _listen(self, event: Event) -> None:
        if isinstance(event, PlanChosen):
            self.chosen = event
        if not isinstance(event, StepDone) or event.step.retries:
            return
        step, size = event.step, int(event.step.microbatch_size)
        self.seconds[size] = min(step.seconds, self.seconds.get(size, step.seconds))
        if step.peak_bytes is not None:
            self.peaks[size] = max(step.peak_bytes, self.peaks.get(size, 0))


def _plan(
    chosen: PlanChosen,
    trial: _Trial,
    prediction: Prediction,
    *,
    rows: int,
    budget: int | None,
    scaling: Scaling | None,
) -> Plan:
    candidates: list[Candidate] = []
    for size in sorted({*sizes_for(rows), chosen.microbatch_size}):
        peak = prediction.peak_bytes(size)
        candidates.append(
            Candidate(
                microbatch_size=size,
                microbatches=-(-rows // size),
                predicted_bytes=peak,
                measured_bytes=trial.peaks.get(size),
                fits=None if budget is None else peak <= budget,
                seconds=trial.seconds.get(size) if size in chosen.seconds else None,
            )
        )
    return Plan(
        batch_size=rows,
        microbatch_size=chosen.microbatch_size,
        decided=chosen.decided,
        why=chosen.why,
        budget=budget,
        candidates=tuple(candidates),
        words=(),
        rests_on=prediction.note,
        scaling=scaling,
    )


def _told(made: Plan, model: nn.Module, asked: int | None) -> Plan:
    norms = [name for name, module in model.named_modules() if isinstance(module, _BatchNorm)]
    offers = hasattr(model, "gradient_checkpointing_enable")
    words = words_for(made, asked=asked, batch_norms=norms, offers_checkpointing=offers)
    return replace(made, words=tuple(words))


def _settings(
    model: nn.Module,
    optimizer: Optimizer | Sequence[Optimizer],
    *,
    budget: int | str | None,
    autocast: torch.dtype | None,
    lengths: Lengths | str | None,
) -> Settings:
    return Settings(
        model=model,
        optimizers=[optimizer] if isinstance(optimizer, Optimizer) else list(optimizer),
        microbatch_size="auto",
        memory_budget=budget if budget is None or budget == "none" else parse_bytes(budget),
        max_grad_norm=None,
        autocast=autocast,
        grad_scaler=None,
        accumulate_dtype=torch.float32,
        nonfinite="skip",
        fuse=True,
        compile=False,
        lengths=Lengths(of=lengths) if isinstance(lengths, str) else lengths,
        listeners=[],
    )


def _of(job: Any, name: str) -> Any:
    return getattr(job, name) if isinstance(job, Plannable) else None
