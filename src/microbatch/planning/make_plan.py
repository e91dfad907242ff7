"""Make a plan: rehearse every size, then let ``microbatch_size="auto"`` run on copies until it has chosen."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any, Protocol, runtime_checkable

import torch
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm  # pyright: ignore[reportPrivateUsage] - the one base of all of them
from torch.optim import Optimizer

from microbatch.arguments import check_callable, is_text
from microbatch.batch.batch_tree import rows_of
from microbatch.batch.lengths import Lengths
from microbatch.errors import ConfigError, EmptyBatchError
from microbatch.memory.budget import parse_bytes
from microbatch.memory.kept_heap import heap_could_be_kept
from microbatch.memory.out_of_memory import is_out_of_memory
from microbatch.memory.predict import Prediction
from microbatch.memory.recompute import blocks_of
from microbatch.planning.memory_options import Stage, ways
from microbatch.planning.plan import KEPT, Candidate, Plan, Way
from microbatch.planning.plan_words import words_for
from microbatch.planning.scaling import scale_hyperparameters
from microbatch.step.accumulator import Accumulator
from microbatch.step.events import Event, PlanChosen, StepDone
from microbatch.step.options import Options, Sums
from microbatch.step.plain_optimizers import plain_optimizers
from microbatch.step.saved_state import Snapshot
from microbatch.step.size.dry_run import dry_run
from microbatch.step.size.dry_run_copies import LossFunction, Scene, copies_of
from microbatch.step.size.room import room_for
from microbatch.step.size.search import sizes_for
from microbatch.step.size.timing_search import MOST_PROBES

_METERED = "on the CPU, the columns counted and error are of tensors alone"
_MOST_STEPS = 60
"""Steps after which five probes must have ended, each with its warm-up and as many again for a meter and for noise."""
_DRY_RUN, _TIMED, _USUAL_STEPS = 0.15, 0.75, 22
"""Usual shares of the time after the dry run and after the trial, and usual steps of the trial; for `progress`."""
_CLEARLY = 1.03
"""Times as fast that another way has to be: all of them have a price that no timing shows."""
_MAPPED = 32 << 20  # bytes: glibc asks the system for every block above this size


@runtime_checkable
class Plannable(Protocol):
    """What a plan reads of a job."""

    model: nn.Module
    optimizer: Optimizer | Sequence[Optimizer]
    batch_loss: LossFunction
    lengths: Lengths | str | None
    counts: Callable[[Any], Mapping[str, Any]] | None
    microbatch_size: int | None
    autocast: torch.dtype | None
    memory_budget: int | str | None

    def first_batch(self) -> Any:
        """Collate the first rows of the data."""
        ...


def plan(
    job: Any,
    *,
    optimizer: Optimizer | Sequence[Optimizer] | None = None,
    loss_fn: LossFunction | None = None,
    batch: Any = None,
    memory_budget: int | str | None = None,
    autocast: torch.dtype | None = None,
    from_batch_size: int | None = None,
    progress: Callable[[str, float | None], object] | None = None,
) -> Plan:
    """Find the microbatch size with the best throughput within a memory budget, and whether to keep activations.

    Every cut gives the same gradient, so only memory and time differ. Peaks are predicted for all sizes by rehearsal
    and measured where a size is run; time is measured on at most five sizes, by real steps on copies. Then activation
    checkpoints and offloading are timed: at the sizes that they let fit where memory is what limits, else at the same
    size. Nothing of the user's changes.

    Args:
        job: A `Job`; an `Accumulator` with ``loss_fn`` and ``batch``; or a model with ``optimizer`` too.
        optimizer: Optimizer over the model's parameters, or several of them; a job and an accumulator have their own.
        loss_fn: As for `Accumulator.step`; a job has its own.
        batch: The whole batch, of this rank; by default the first one of the job's data.
        memory_budget: Bytes, or a text such as ``"6 GiB"``; `None` for the job's, or what the device really has.
        autocast: Precision of the forward pass; `None` for the job's.
        from_batch_size: Batch that the optimizer's hyperparameters were tuned for, in samples, to be told what goes
            with this one; `None` leaves them out.
        progress: Called with what is being done, and how much of the plan is done, from 0 to 1, as an
            estimate; `None` while nobody knows.

    Returns:
        The plan; print it, or read ``microbatch_size``, ``checkpoint`` and ``offload``.

    Raises:
        ConfigError: Something is missing, or the model, optimizer or loss function cannot be copied.
        BatchError: The batch cannot be cut.
        EmptyBatchError: It has no rows.
        OutOfMemoryError: Not even one row fits, whatever is done.

    Cost:
        A copy of model and optimizer on the device; some twenty to forty steps.
    """
    counts = asked = None
    if isinstance(job, Plannable):
        optimizer, loss_fn = optimizer or job.optimizer, loss_fn or job.batch_loss
        counts, asked = job.counts, job.microbatch_size
        if batch is None:
            batch = job.first_batch()
    elif isinstance(job, Accumulator):
        optimizer, size = job.options.optimizers, job.options.microbatch_size
        asked = size if isinstance(size, int) else None
    if optimizer is None or loss_fn is None or batch is None:
        raise ConfigError("pass an mb.Job, an mb.Accumulator with loss_fn= and batch=, or a model with optimizer= too")
    check_callable("loss_fn", loss_fn, "loss_fn(model, microbatch)")
    options = _options(job, optimizer, budget=memory_budget, autocast=autocast)
    rows = rows_of(batch)
    if not rows:
        raise EmptyBatchError("the batch to plan for has 0 rows")
    snapshot = Snapshot(options.bare_model, options.device)
    try:
        made = _made(options, loss_fn, batch=batch, counts=counts, asked=asked, progress=progress or _nobody)
    finally:
        snapshot.restore()
    if from_batch_size is not None:
        scaled = scale_hyperparameters(options.optimizers[0], from_batch_size=from_batch_size, to_batch_size=rows)
        made = replace(made, scaling=scaled)
    norms = [name for name, module in options.bare_model.named_modules() if isinstance(module, _BatchNorm)]
    words = words_for(
        made,
        asked=asked,
        batch_norms=norms,
        blocks=len(blocks_of(options.bare_model)),
        # Not for a job: `microbatch train` keeps the heap anyway.
        heap=not isinstance(job, Plannable) and _is_large_on_cpu(options.bare_model) and heap_could_be_kept(),
    )
    return replace(made, words=tuple(words))


def _is_large_on_cpu(model: nn.Module) -> bool:
    """Return whether a weight is so large that glibc gets the memory of each of its gradients from the system."""
    return any(each.nbytes > _MAPPED for each in model.parameters() if each.requires_grad and each.device.type == "cpu")


class _Trial:
    """Run "auto" on copies, and write down how long steps took and what they took."""

    def __init__(self, progress: Callable[[str, float | None], object]) -> None:
        self._progress, self._steps = progress, 0
        self.seconds: dict[int, float] = {}
        self.peaks: dict[int, int] = {}
        self.chosen: PlanChosen | None = None

    def run(self, options: Options, loss_fn: LossFunction, *, batch: Any, counts: Any) -> PlanChosen:
        cast = copies_of(Scene(options, loss_fn, batch, []), how=None)
        accumulator = Accumulator(
            cast.options.model,
            cast.options.optimizers,
            microbatch_size="auto",
            memory_budget=options.memory_budget,
            autocast=options.autocast,
            nonfinite="skip",
            sums=Sums(fuse=options.sums.fuse),
            lengths=options.lengths,
            batch_norm="microbatch",
            buffers="each",
            listeners=(self._listen,),
        )
        for _ in range(_MOST_STEPS):
            accumulator.step(batch, cast.loss_fn, counts=counts)
            if self.chosen is not None:
                return self.chosen
        raise ConfigError(f"no microbatch size was found in {_MOST_STEPS} steps")

    def write(self, size: int, found: tuple[float, int | None] | None) -> None:
        if found is None:
            return
        seconds, peak = found
        self.seconds[size] = min(seconds, self.seconds.get(size, seconds))
        if peak is not None:
            self.peaks[size] = max(peak, self.peaks.get(size, 0))

    def _listen(self, event: Event) -> None:
        if isinstance(event, StepDone):
            self._steps += 1
            share = _DRY_RUN + (_TIMED - _DRY_RUN) * min(1.0, self._steps / _USUAL_STEPS)
            self._progress(f"timing microbatches of {event.step.microbatch_size}", share)
        if isinstance(event, PlanChosen):
            self.chosen = event
        elif isinstance(event, StepDone) and not event.step.retries:
            self.write(int(event.step.microbatch_size), (event.step.seconds, event.step.peak_bytes))


def _nobody(doing: str, share: float | None) -> None:
    pass


def _made(
    options: Options,
    loss_fn: LossFunction,
    *,
    batch: Any,
    counts: Any,
    asked: int | None,
    progress: Callable[[str, float | None], object],
) -> Plan:
    rows, budget = rows_of(batch), room_for(options, batch)
    stage = Stage(options=options, loss_fn=loss_fn, batch=batch, counts=counts, rows=rows, budget=budget)
    progress("predicting memory", None)
    prediction = dry_run(options, loss_fn, batch=batch)
    trial, chosen, failure = _Trial(progress), None, None
    try:
        chosen = trial.run(options, loss_fn, batch=batch, counts=counts)
    except Exception as error:
        if not is_out_of_memory(error):
            raise
        failure = error
    timed = set(chosen.seconds) if chosen else set[int]()
    if chosen is not None and chosen.decided:
        # What had no rival was not timed; and what the user has now is worth a word.
        for size in {chosen.microbatch_size, min(asked or chosen.microbatch_size, rows)}:
            if size not in timed and len(timed) < MOST_PROBES and _may_fit(prediction, size, budget):
                timed.add(size)
                trial.write(size, stage.run(options, size))
    named = {size for size in (asked, chosen and chosen.microbatch_size) if size is not None and size <= rows}
    sizes = sorted({*sizes_for(rows), *named})
    candidates = tuple(_candidate(stage, trial, prediction, size=size, timed=size in timed) for size in sizes)
    kept = None if chosen is None else _kept(candidates, chosen.microbatch_size)
    found = [] if kept is None else [kept]
    if chosen is None or chosen.decided:  # else the machine is too busy to compare anything
        progress("timing checkpoints and offloading", _TIMED)
        found += ways(stage, kept, prediction=prediction, sizes=sizes_for(rows))
    if not found and failure is not None:
        raise failure
    best = _best(found, kept)
    return Plan(
        batch_size=rows,
        microbatch_size=best.microbatch_size,
        decided=chosen is None or chosen.decided,
        why=_why(chosen, best),
        budget=budget,
        candidates=candidates,
        words=(),
        rests_on=prediction.note if options.device.type != "cpu" else f"{prediction.note}; {_METERED}",
        ways=tuple(found),
        way=best.name,
        microbatch_tokens=_tokens(chosen, best),
    )


def _may_fit(prediction: Prediction, size: int, budget: int | None) -> bool:
    return budget is None or prediction.peak_bytes(size) <= budget


def _candidate(stage: Stage, trial: _Trial, prediction: Prediction, *, size: int, timed: bool) -> Candidate:
    peak = prediction.peak_bytes(size)
    return Candidate(
        microbatch_size=size,
        microbatches=-(-stage.rows // size),
        predicted_bytes=peak,
        # On the CPU the meter measures, which sees no workspaces.
        counted_bytes=prediction.metered_bytes(size) if stage.options.device.type == "cpu" else peak,
        measured_bytes=trial.peaks.get(size),
        fits=None if stage.budget is None else peak <= stage.budget,
        seconds=trial.seconds.get(size) if timed else None,
    )


def _kept(candidates: Sequence[Candidate], size: int) -> Way:
    each = next(each for each in candidates if each.microbatch_size == size)
    return Way(
        name=KEPT,
        microbatch_size=size,
        microbatches=each.microbatches,
        blocks=(),
        predicted_bytes=each.predicted_bytes,
        measured_bytes=each.measured_bytes,
        seconds=each.seconds,
    )


def _best(found: Sequence[Way], kept: Way | None) -> Way:
    """Take the fastest way; at the same size, and where little is gained, it is to keep everything."""
    least = 0 if kept is None else kept.microbatch_size
    timed = [each for each in found if each.seconds and each.microbatch_size > least]
    best = min(timed, key=lambda each: each.seconds or 0.0, default=found[0])
    if kept is None or (kept.seconds and best.seconds and kept.seconds >= _CLEARLY * best.seconds):
        return best
    return kept


def _tokens(chosen: PlanChosen | None, best: Way) -> int | None:
    """Turn rows into tokens, where rows are ragged."""
    if chosen is None or chosen.microbatch_tokens is None:
        return None
    return chosen.microbatch_tokens // chosen.microbatch_size * best.microbatch_size


def _why(chosen: PlanChosen | None, best: Way) -> str:
    if best.name == KEPT and chosen is not None:
        return chosen.why
    return (
        f"larger microbatches fit with activations {best.name}, and are faster"
        if chosen
        else (f"not even one row fits unless activations are {best.name}")
    )


def _options(
    job: Any, optimizer: Optimizer | Sequence[Optimizer], *, budget: int | str | None, autocast: torch.dtype | None
) -> Options:
    if isinstance(job, Accumulator):
        base = job.options
    else:
        planned = isinstance(job, Plannable)
        lengths = job.lengths if planned else None
        base = Options(
            model=job.model if planned else job,
            optimizers=plain_optimizers(optimizer),
            microbatch_size="auto",
            memory_budget=job.memory_budget if planned else None,
            autocast=job.autocast if planned else None,
            nonfinite="skip",
            lengths=Lengths(of=lengths) if isinstance(lengths, str) else lengths,
        )
    limit = base.memory_budget if budget is None else budget
    return replace(
        base,
        microbatch_size="auto",
        memory_budget=limit if limit is None or is_text(limit, "none") else parse_bytes(limit),
        autocast=base.autocast if autocast is None else autocast,
        grad_scaler=None,
        compile=False,
        listeners=[],
        offload=None,
        checkpoint=None,
    )
