"""One run of the playground: the library trains a lesson, and every gradient is held against the full batch's."""

from __future__ import annotations

import copy
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any, TypeAlias, TypeVar

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from microbatch.errors import OutOfMemoryError
from microbatch.guide.lessons import lesson
from microbatch.guide.playground_settings import Settings
from microbatch.guide.truth import WholeBatch, flat, relative_error, scale_of, truth_of
from microbatch.guide.wrong import Divide
from microbatch.loss.loss import Loss
from microbatch.memory.meter import MemoryMeter
from microbatch.memory.meter_report import MemoryReport
from microbatch.planning.scaling import scale_hyperparameters
from microbatch.step.accumulator import Accumulator
from microbatch.step.events import BudgetPassed, Event, MicrobatchDone, PlanChosen, Retry, SizeChanged
from microbatch.step.options import Sums
from microbatch.step.record import Step

TUNED_FOR = 32
"""Effective batch, in samples, that the learning rate is given for."""

_Found = TypeVar("_Found")
Tell: TypeAlias = Callable[[str, Mapping[str, Any]], object]


def make_optimizer(model: nn.Module, name: str, *, lr: float, batch_size: int, rule: str = "fixed") -> Optimizer:
    """Make the optimizer of a run.

    Args:
        model: What it trains.
        name: ``"sgd"`` or ``"adamw"``.
        lr: Learning rate at an effective batch of `TUNED_FOR` samples.
        batch_size: Effective batch of the run, in samples.
        rule: ``"fixed"``, or a rule of `scale_hyperparameters`.

    Returns:
        The optimizer, scaled.

    Raises:
        ConfigError: The rule does not reach that far.
    """
    parameters = list(model.parameters())
    sgd = name == "sgd"
    optimizer = torch.optim.SGD(parameters, lr=lr, momentum=0.9) if sgd else torch.optim.AdamW(parameters, lr=lr)
    if rule != "fixed" and batch_size != TUNED_FOR:
        scaling = scale_hyperparameters(optimizer, from_batch_size=TUNED_FOR, to_batch_size=batch_size, rule=rule)
        scaling.apply_to(optimizer)
    return optimizer


class Training:
    """Train one run of the playground.

    Args:
        settings: Of the run.
        tell: Called with the kind and the values of everything that happens.
        rest: Called after every forward and every backward, for slow motion.

    Raises:
        ConfigError: The settings do not work together.
        MissingDependencyError: The lesson's data comes with a package that is not installed.
    """

    def __init__(self, settings: Settings, tell: Tell, *, rest: Callable[[], object] = lambda: None) -> None:
        self._settings, self._tell, self._rest = settings, tell, rest
        norm = "group" if settings.norm == "group" else "batch"
        made = lesson(settings.model, batch_size=settings.batch, seed=settings.seed, norm=norm)
        if settings.precision.startswith("bfloat16"):
            made.model.to(torch.bfloat16)
        self._lesson = made
        self._optimizer = self._make_optimizer(made.model)
        self._optimizer.register_step_pre_hook(self._hold_gradients)
        self._coupled = settings.coupling == "coupled"
        loss_fn = made.loss_fn if self._coupled else self._loss
        self._divide = Divide(settings.divide, loss_fn, batch_size=settings.batch)
        self._meter: _Meter | None = None
        self._report = MemoryReport(peak_bytes=0, live_bytes=0, at_peak={}, live={}, parts=[])
        self._gradients: list[Tensor] = []
        self._index = self._encoded = self._forwards = 0
        self._batch: dict[str, Tensor] = {}
        self._times = (0.0, 0.0)  # when the microbatch's forward began and ended
        self._size = settings.microbatch  # that the newest attempt began with
        self._needed: dict[str, Any] = {}
        self._accumulator = self._make_accumulator(
            made.model, self._optimizer, size=settings.microbatch, budget=settings.budget, listeners=[self._on_event]
        )
        model = copy.deepcopy(made.model)
        whole = WholeBatch(made, model, optimizer=self._make_optimizer(model), precision=settings.precision)
        self._whole = whole if settings.compare == "yes" else None

    def run(self) -> None:
        """Take every step.

        Raises:
            MicrobatchError: A step failed.
        """
        model = self._lesson.model
        self._tell(
            "ready",
            {
                "parameters": sum(parameter.numel() for parameter in model.parameters()),
                "samples": self._lesson.samples,
                "lr": float(self._optimizer.param_groups[0]["lr"]),
                "budget": self._settings.budget,
            },
        )
        torch.manual_seed(self._settings.seed)
        try:
            for index in range(self._settings.steps):
                self._one_step(self._lesson.batch(index))
        except OutOfMemoryError as error:
            report = self._report
            told = {"peak_bytes": report.peak_bytes, "memory": dict(report.at_peak), "budget": self._settings.budget}
            self._tell("overflow", {**told, **self._needed, "error": str(error)})
            return
        self._tell("done", {"steps": self._settings.steps})

    def _make_optimizer(self, model: nn.Module) -> Optimizer:
        chosen = self._settings
        return make_optimizer(model, chosen.optimizer, lr=chosen.lr, batch_size=chosen.batch, rule=chosen.rule)

    def _make_accumulator(
        self,
        model: nn.Module,
        optimizer: Optimizer,
        *,
        size: int | str,
        budget: int | str | None,
        listeners: Sequence[Callable[[Event], object]] = (),
    ) -> Accumulator:
        settings = self._settings
        return Accumulator(
            model,
            optimizer,
            microbatch_size=size,
            memory_budget=budget,
            autocast=torch.bfloat16 if settings.precision == "autocast" else None,
            sums=Sums(dtype=torch.bfloat16 if settings.precision == "bfloat16-sums" else torch.float32),
            batch_norm={"group": None, "batch": "microbatch", "exact": "exact"}[settings.norm],
            coupled="twice" if self._coupled else "auto",  # it saves the memory that a tank is about
            listeners=listeners,
        )

    def _measure_need(self, batch: dict[str, Tensor]) -> dict[str, Any]:
        """Measure what the attempt that overflowed needs: the same step on a copy of the model, without a budget."""
        made = self._lesson
        model = copy.deepcopy(made.model)
        optimizer = self._make_optimizer(model)
        optimizer.load_state_dict(copy.deepcopy(self._optimizer.state_dict()))
        size = self._size if isinstance(self._size, int) else self._settings.batch
        with torch.random.fork_rng(devices=[]):
            meter = _Meter(model, optimizer, batch)
            accumulator = self._make_accumulator(model, optimizer, size=size, budget="none")
            if self._coupled:
                accumulator.step(batch, made.loss_fn, encode=made.encode)
            else:
                accumulator.step(batch, made.loss)
            report = meter.stop()
        return {"need_bytes": report.peak_bytes, "need_memory": dict(report.at_peak), "rows": size}

    def _one_step(self, batch: dict[str, Tensor]) -> None:
        truth = truth_of(self._lesson, batch, precision=self._settings.precision)
        self._divide.begin()
        self._index = self._encoded = self._forwards = 0
        self._batch = batch
        self._meter = meter = _Meter(self._lesson.model, self._optimizer, batch)
        started = time.perf_counter()
        try:
            step = self._take_step(batch)
        except OutOfMemoryError:
            self._report = meter.stop()
            self._needed = self._measure_need(batch)
            raise
        report = self._report = meter.stop()
        seconds = time.perf_counter() - started
        found, self._gradients = flat(self._gradients), []
        self._tell(
            "step",
            {
                "step": step.index,
                "loss": self._divide.mean(),
                "reported": float(step.loss),
                "full_loss": truth.loss,
                "error": relative_error(found, truth.gradient),
                "own_error": truth.own_error,
                "tolerance": truth.tolerance,
                "scale": scale_of(found, truth.gradient),
                "grad_norm": float(step.grad_norm),
                "microbatches": step.microbatches,
                "microbatch_size": int(step.microbatch_size),
                "samples": int(step.samples),
                "retries": step.retries,
                "peak_bytes": report.peak_bytes,
                "memory": dict(report.at_peak),
                "seconds": seconds,
                "per_second": int(step.samples) / seconds,
                "whole": None if self._whole is None else self._whole.step(batch),
            },
        )

    def _take_step(self, batch: dict[str, Tensor]) -> Step:
        encode = self._encode if self._coupled else None
        if self._settings.recover == "yes":
            return self._accumulator.step(batch, self._divide, encode=encode)
        # A hand-written loop is told of the overflow: nobody can run it again from inside.
        with self._accumulator.window() as window:
            if encode is not None:
                window.backward(self._divide(self._lesson.model, window.encode(batch, encode)))
                return window.step
            for microbatch in window.split(batch):
                window.backward(self._divide(self._lesson.model, microbatch))
        return window.step

    def _loss(self, model: nn.Module, microbatch: Any) -> Loss:
        """Compute a microbatch's loss, and tell that its forward has ended."""
        index = self._index
        if self._settings.norm == "exact":  # all go forward, in turns, before any goes backward
            index, self._forwards = self._forwards, self._forwards + 1
        return self._forward("forward", index, lambda: self._lesson.loss(model, microbatch))

    def _encode(self, model: nn.Module, microbatch: Any) -> Any:
        """Encode a microbatch of a coupled loss: first without a graph, later, when the loss is known, with one."""
        encode = self._lesson.encode or self._lesson.loss
        if torch.is_grad_enabled():
            return self._forward("forward", self._index, lambda: encode(model, microbatch))
        self._encoded += 1
        return self._forward("encode", self._encoded - 1, lambda: encode(model, microbatch))

    def _forward(self, kind: str, index: int, compute: Callable[[], _Found]) -> _Found:
        began = time.perf_counter()
        found = compute()
        self._times = (began, time.perf_counter())
        self._tell(kind, {"index": index, "live_bytes": self._live_bytes()})
        self._rest()
        return found

    def _on_event(self, event: Event) -> None:
        match event:
            case MicrobatchDone():
                self._microbatch_done(event)
            case Retry():
                self._retry(event)
            case SizeChanged():
                self._tell("size", {"before": event.before, "after": event.after, "reason": event.reason})
            case PlanChosen():
                self._tell("plan", {"microbatch_size": event.microbatch_size, "why": event.why})
            case BudgetPassed():
                self._tell("passed", {"peak_bytes": event.peak_bytes, "budget": event.budget})
            case _:
                pass

    def _microbatch_done(self, event: MicrobatchDone) -> None:
        began, ended = self._times
        self._tell(
            "microbatch",
            {
                "step": event.step,
                "index": event.index,
                "microbatches": event.microbatches,
                "rows": event.rows,
                "forward": ended - began,
                "backward": time.perf_counter() - ended,
                "live_bytes": self._live_bytes(),
            },
        )
        self._index = event.index + 1
        self._rest()

    def _retry(self, event: Retry) -> None:
        # What the attempt that failed had in use says nothing of the one that follows: each is counted alone.
        report = self._meter.stop() if self._meter is not None else None
        self._size = event.before
        needed = self._measure_need(self._batch)
        if self._meter is not None:
            self._meter.start()
        self._tell(
            "retry",
            {
                "step": event.step,
                "index": event.index,
                "before": event.before,
                "after": event.after,
                "error": event.error,
                "peak_bytes": 0 if report is None else report.peak_bytes,
                "memory": {} if report is None else dict(report.at_peak),
                **needed,
            },
        )
        self._size = event.after
        self._divide.begin()
        self._index = self._encoded = self._forwards = 0
        self._rest()

    def _live_bytes(self) -> int:
        return 0 if self._meter is None else self._meter.live_bytes

    def _hold_gradients(self, *_: object) -> None:
        # The accumulator lets go of them after the step without changing them, and the optimizer only reads them.
        self._gradients = [each.grad for each in self._lesson.model.parameters() if each.grad is not None]


class _Meter:
    """Count a step's memory by category, attempt by attempt."""

    def __init__(self, *things: object) -> None:
        self._things = things
        self._now = self._start()

    @property
    def live_bytes(self) -> int:
        return self._now.live_bytes

    def stop(self) -> MemoryReport:
        self._now.__exit__(None, None, None)
        return self._now.report()

    def start(self) -> None:
        self._now = self._start()

    def _start(self) -> MemoryMeter:
        meter = MemoryMeter(detail=True)
        meter.track(*self._things)
        return meter.__enter__()
