"""A process that holds contenders and runs one window at a time; and the handle by which it is told to."""

from __future__ import annotations

import gc
import importlib
import multiprocessing
import time
import traceback
import warnings
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass
from multiprocessing.connection import Connection
from typing import Any

import torch
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from benchmarks import contenders, peers
from benchmarks.cases import CASES, loss_sum
from benchmarks.contenders import Subject, Window, make_subject
from benchmarks.machine import matmul_flops_per_second
from benchmarks.memory import Peak, ResidentPeak, resident_bytes, warm_up_profiler

NATIVE: dict[str, Callable[[Subject], Window]] = {
    "full": contenders.full,
    "loop": contenders.loop,
    "trimmed": contenders.trimmed_loop,
    "microbatch": contenders.microbatch,
}
PEERS: dict[str, Callable[[Subject], Window]] = {
    "accelerate": peers.accelerate,
    "fabric": peers.fabric,
    "trainer": peers.trainer,
}
PACKAGES = {"accelerate": "accelerate", "fabric": "lightning_fabric", "trainer": "transformers.trainer"}


@dataclass(frozen=True, slots=True, kw_only=True)
class Spec:
    """What a worker holds.

    Attributes:
        case: A key of `CASES`.
        microbatch_size: Rows that go through at once.
        contenders: Names, of `NATIVE` and `PEERS`.
        device: ``"cpu"`` or ``"cuda"``.
        threads: Threads of torch's operators.
    """

    case: str
    microbatch_size: int
    contenders: tuple[str, ...]
    device: str
    threads: int


@dataclass(frozen=True, slots=True)
class Timing:
    """One window, in seconds: on the wall's clock, and of all the process's threads together."""

    seconds: float
    cpu_seconds: float


@dataclass(frozen=True, slots=True)
class Agreement:
    """How far a contender's first window is from the hand-written loop's, relative to the latter.

    Attributes:
        gradient_error: Of the gradient that the optimizer saw.
        update_error: Of the change of the weights, where the gradient is more than rounding.
    """

    gradient_error: float
    update_error: float


@dataclass(frozen=True, slots=True)
class Limit:
    """What a window's arithmetic could take at best.

    Attributes:
        flops: Floating-point operations of the full batch's forward and backward pass, matrix products alone.
        flops_per_second: Speed of one large matrix product here and now, in the case's precision.
    """

    flops: float
    flops_per_second: float


@dataclass(frozen=True, slots=True)
class Footprint:
    """Peak memory of one window.

    Attributes:
        peak_bytes: Most bytes that torch held at once.
        rss_bytes: Most bytes of the process in RAM, less those before the model was made; `None` if unknown.
    """

    peak_bytes: int
    rss_bytes: int | None


class Worker:
    """The handle of a worker process; only one worker may be computing at a time, and each waits for its turn.

    Args:
        spec: What it holds.
    """

    def __init__(self, spec: Spec) -> None:
        context = multiprocessing.get_context("spawn")
        self._connection, theirs = context.Pipe()
        self._process = context.Process(target=_serve, args=(theirs, spec), daemon=True)
        self._process.start()
        theirs.close()

    def window(self, name: str) -> Timing:
        """Run one window of a contender and say how long it took."""
        return self._ask("window", name)

    def agreement(self, name: str) -> Agreement:
        """Run a contender's first window, and hold it against the hand-written loop's."""
        return self._ask("agreement", name)

    def footprint(self, name: str) -> Footprint:
        """Measure a contender's memory; in a worker that holds no other."""
        return self._ask("footprint", name)

    def spent(self) -> float:
        """Return the CPU seconds that the process has taken so far, all its threads together."""
        return self._ask("spent", "")

    def limit(self) -> Limit:
        """Count the model's arithmetic, and measure how fast it could be done."""
        return self._ask("limit", "loop")

    def close(self) -> None:
        """End the process."""
        self._connection.close()
        self._process.terminate()
        self._process.join()

    def _ask(self, what: str, name: str) -> Any:
        self._connection.send((what, name))
        try:
            failed, answer = self._connection.recv()
        except EOFError:
            self._process.join()
            raise RuntimeError(
                f"the process of {name!r} ended with code {self._process.exitcode} during {what!r}"
            ) from None
        if failed:
            raise RuntimeError(f"{name!r} failed during {what!r}:\n{answer}")
        return answer


def _serve(connection: Connection, spec: Spec) -> None:
    warnings.simplefilter("ignore")  # the peers have advice about settings that do not matter here
    torch.set_num_threads(spec.threads)
    desk = _Desk(spec)
    while True:
        try:
            what, name = connection.recv()
        except EOFError:
            return
        try:
            connection.send((False, getattr(desk, what)(name)))
        except Exception:  # noqa: BLE001 - it is told to the process that asked
            connection.send((True, traceback.format_exc()))


class _Desk:
    """The worker's side of `Worker`."""

    def __init__(self, spec: Spec) -> None:
        self._spec = spec
        self._subjects: dict[str, Subject] = {}
        self._windows: dict[str, Window] = {}
        self._before: list[Tensor] = []
        self._reference: tuple[list[Tensor], list[Tensor]] | None = None

    def window(self, name: str) -> Timing:
        window = self._window(name)
        gc.collect()
        self._synchronize()
        wall, cpu = time.perf_counter(), time.process_time()
        window(nullcontext())
        self._synchronize()
        return Timing(time.perf_counter() - wall, time.process_time() - cpu)

    def spent(self, _: str) -> float:
        return time.process_time()

    def limit(self, _: str) -> Limit:
        subject = self._make_subject()
        one = Subject(subject.model, subject.optimizer, {k: v[:1] for k, v in subject.batch.items()}, 1)
        with FlopCounterMode(display=False) as counter:
            loss_sum(one.model, one.send(one.batch)).backward()
        speed = matmul_flops_per_second(subject.device, CASES[self._spec.case].precision)
        return Limit(float(counter.get_total_flops() * subject.rows), speed)

    def footprint(self, name: str) -> Footprint:
        if name in PACKAGES:
            # Its code is not what a window needs.
            importlib.import_module(PACKAGES[name])
        # A first optimizer step imports a good part of torch, which is not what a window needs either.
        NATIVE.get(name, NATIVE["loop"])(make_subject("tiny", 1, device=self._spec.device))(nullcontext())
        before = resident_bytes()
        window = self._window(name)
        window(nullcontext())  # makes the optimizer's state, as every window but the first one finds it
        gc.collect()
        warm_up_profiler()
        resident = ResidentPeak()
        window(resident)
        gc.collect()
        peak = Peak(self._subjects[name])
        window(peak)
        if before is None or resident.bytes is None:
            return Footprint(peak.bytes, None)
        return Footprint(peak.bytes, resident.bytes - before)

    def agreement(self, name: str) -> Agreement:
        if self._reference is None:
            subject = self._make_subject()
            self._before = [parameter.detach().clone() for parameter in subject.model.parameters()]
            self._reference = _observe(NATIVE["loop"](subject), subject, self._before)
        window = self._window(name)
        subject = self._subjects[name]
        gradients, updates = _observe(window, subject, self._before)
        theirs, their_updates = self._reference
        told = [gradient.abs() > 1e-3 * _rms(theirs) for gradient in theirs]
        errors = Agreement(
            _relative_error(gradients, theirs),
            _relative_error(
                [each[mask] for each, mask in zip(updates, told, strict=True)],
                [each[mask] for each, mask in zip(their_updates, told, strict=True)],
            ),
        )
        if name in NATIVE:
            self._start_again(subject)
        return errors

    def _start_again(self, subject: Subject) -> None:
        """Let the next contender on the same model start where this one did."""
        with torch.no_grad():
            for parameter, value in zip(subject.model.parameters(), self._before, strict=True):
                parameter.copy_(value)
        subject.optimizer.state.clear()

    def _window(self, name: str) -> Window:
        if name not in self._windows:
            subject = self._make_subject()
            self._subjects[name] = subject
            self._windows[name] = (NATIVE | PEERS)[name](subject)
        return self._windows[name]

    def _make_subject(self) -> Subject:
        return make_subject(self._spec.case, self._spec.microbatch_size, device=self._spec.device)

    def _synchronize(self) -> None:
        if self._spec.device == "cuda":
            torch.cuda.synchronize()


def _observe(window: Window, subject: Subject, before: list[Tensor]) -> tuple[list[Tensor], list[Tensor]]:
    """Run one window; return the gradient that its optimizer saw, and what it changed."""
    parameters = list(subject.model.parameters())
    seen: list[list[Tensor]] = []

    def look(*_: Any) -> None:
        seen.append([torch.zeros_like(each) if each.grad is None else each.grad.clone() for each in parameters])

    hook = subject.optimizer.register_step_pre_hook(look)
    window(nullcontext())
    hook.remove()
    if len(seen) != 1:
        raise RuntimeError(f"a window took {len(seen)} optimizer steps instead of 1")
    return seen[0], [each.detach() - value for each, value in zip(parameters, before, strict=True)]


def _relative_error(mine: list[Tensor], theirs: list[Tensor]) -> float:
    difference = sum(float((a - b).double().square().sum()) for a, b in zip(mine, theirs, strict=True))
    return (difference / sum(float(b.double().square().sum()) for b in theirs)) ** 0.5


def _rms(tensors: list[Tensor]) -> float:
    total = sum(float(each.double().square().sum()) for each in tensors)
    return (total / sum(each.numel() for each in tensors)) ** 0.5
