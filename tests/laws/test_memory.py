"""Law M5: memory does not grow with the number of microbatches, and no microbatch waits for the host."""

import copy
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import replace
from typing import Any
from weakref import WeakSet

import pytest
import torch
import torch.nn.functional as F
from tests.allocations import allocated_peak
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

import microbatch as mb

from .reference import (
    DOORS,
    Batch,
    Door,
    Subject,
    by_count,
    filled,
    full_batch,
    numbers,
    on_each_device,
    pieces_of,
    relative_error,
    sentences,
    subject,
    tagger,
    through_each_door,
    token_loss,
)

SIZE, FEW, MANY, FLAT = 8, 2, 16, 1.03

Run = Callable[[nn.Module, Batch], object]
Peak = Callable[[str, Run, int], int]


# -- the peak ------------------------------------------------------------------------------------------------------


def wide(device: str) -> nn.Module:
    """Make a network whose activations are most of what it takes."""
    layers = [nn.Linear(16, 64), nn.Tanh(), nn.Linear(64, 64), nn.Tanh(), nn.Linear(64, 4)]
    return filled(nn.Sequential(*layers), 0, device, torch.float32)


def long_rows(microbatches: int) -> Batch:
    rows = SIZE * microbatches
    return {"x": numbers(1, rows, 32, 16).float(), "y": numbers(2, rows, 32, 4).float()}


def fit(model: nn.Module, batch: Batch) -> Tensor:
    return (model(batch["x"]) - batch["y"]).square().mean()


def ours(door: Door) -> Run:
    def run(model: nn.Module, batch: Batch) -> None:
        optimizer = torch.optim.SGD(model.parameters(), lr=0.0)
        it = Subject(model, optimizer, mb.Accumulator(model, optimizer, microbatch_size=SIZE), [])
        door(it, batch, fit, size=SIZE)

    return run


def one_backward_for_all(model: nn.Module, batch: Batch) -> None:
    """Keep every microbatch's graph until the end, by adding up losses and not gradients."""
    pieces = pieces_of(batch, SIZE)
    device = next(model.parameters()).device
    moved = [{name: each.to(device) for name, each in piece.items()} for piece in pieces]
    total = sum((fit(model, piece) / len(pieces) for piece in moved), torch.zeros((), device=device))
    total.backward()


def metered(device: str, run: Run, microbatches: int) -> int:
    """Count by our own meter; the batch, which lives on the host, is left out."""
    model, batch = wide(device), long_rows(microbatches)
    with mb.MemoryMeter() as meter:
        meter.track(model, batch)
        before = meter.live_bytes
        run(model, batch)
    return meter.peak_bytes - before


def allocated(device: str, run: Run, microbatches: int) -> int:
    """Count by the allocator: on the host every allocation that the profiler saw, on CUDA its own figure."""
    model, batch = wide(device), long_rows(microbatches)
    if device == "cuda":
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        run(model, batch)
        return torch.cuda.max_memory_allocated() - before
    return allocated_peak(lambda: run(model, batch))


each_count = pytest.mark.parametrize("peak", [metered, allocated])


@pytest.mark.parametrize("loss", [F.mse_loss, F.smooth_l1_loss, F.binary_cross_entropy])
def test_m5_a_loss_whose_storage_is_as_large_as_its_input_is_not_held(loss: Callable[..., Tensor]) -> None:
    model = nn.Linear(16, 500)
    assert loss(model(torch.ones(2, 16)).sigmoid(), torch.ones(2, 500)).untyped_storage().nbytes() > 4  # as torch does

    def peak(microbatches: int) -> int:
        accumulator = mb.Accumulator(model, torch.optim.SGD(model.parameters(), lr=0.0), microbatch_size=4)
        with mb.MemoryMeter() as meter:
            accumulator.step(
                torch.ones(4 * microbatches, 16), lambda model, x: loss(model(x).sigmoid(), torch.ones(len(x), 500))
            )
        return meter.peak_bytes

    assert peak(32) - peak(2) < 30 * (4 * 16 * 4 + 64)  # the batch itself, and a few numbers


@through_each_door
@each_count
@on_each_device
def test_m5_the_peak_does_not_grow_with_the_number_of_microbatches(door: Door, peak: Peak, device: str) -> None:
    few, many = peak(device, ours(door), FEW), peak(device, ours(door), MANY)
    assert many <= FLAT * few
    assert few <= FLAT * many  # that is, both saw the same microbatch


@each_count
@on_each_device
def test_m5_by_hand_adding_up_losses_keeps_every_graph(peak: Peak, device: str) -> None:
    few, many = peak(device, one_backward_for_all, FEW), peak(device, one_backward_for_all, MANY)
    assert many > 4 * few


def test_m5_the_two_counts_agree() -> None:
    run = ours(DOORS["step"])
    assert metered("cpu", run, FEW) == pytest.approx(allocated("cpu", run, FEW), rel=0.02)


@pytest.mark.cuda
def test_m5_waiting_inputs_stay_on_the_host() -> None:
    bytes_of_all = sum(each.numel() * each.element_size() for each in long_rows(64).values())
    few, many = (allocated("cuda", ours(DOORS["step"]), number) for number in (FEW, 64))
    assert many - few < bytes_of_all / 10


# -- no waiting for the host ---------------------------------------------------------------------------------------

READS = {
    "_local_scalar_dense",
    "item",
    "is_nonzero",
    "nonzero",
    "masked_select",
    "unique",
    "_unique2",
    "equal",
}
READING_METHODS = {
    "item",
    "tolist",
    "numpy",
    "cpu",
    "nonzero",
    "__bool__",
    "__float__",
    "__int__",
    "__index__",
    "__array__",
    "__contains__",
}


class HostReadError(AssertionError):
    """A value was read back inside the window."""


class NoDispatchedReads(TorchDispatchMode):
    """Refuse the operators that wait for a value on the device."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func.overloadpacket.__name__ in READS:
            raise HostReadError(str(func))
        return func(*args, **(kwargs or {}))


class NoReads(TorchFunctionMode):
    """Refuse the methods that do so; on the host some of them never reach the dispatcher."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if getattr(func, "__name__", "") in READING_METHODS:
            raise HostReadError(str(func))
        return func(*args, **(kwargs or {}))


class FromFirstToLast:
    """Refuse reads from a window's first backward to its last, as its events tell."""

    def __init__(self, last: int, modes: Sequence[Any]) -> None:
        self.last, self.modes, self.armed, self.guarded = last, modes, False, 0
        self.on = ExitStack()

    def __call__(self, event: object) -> None:
        """Switch on after the first microbatch, and off after the last."""
        if self.armed and isinstance(event, mb.MicrobatchDone):
            self.guarded += event.index > 0
            if event.index == 0:
                for mode in self.modes:
                    self.on.enter_context(mode)
            if event.index == self.last:
                self.on.close()


class CudaWaits:
    """Let CUDA itself refuse to wait."""

    def __enter__(self) -> None:
        torch.cuda.set_sync_debug_mode("error")

    def __exit__(self, *_: object) -> None:
        torch.cuda.set_sync_debug_mode("default")


TARGETS = [8, 1, 0, 2, 5, 3]

SETTINGS: dict[str, dict[str, Any]] = {
    "plain": {},
    "clip": {"max_grad_norm": 0.1},
    "skip": {"nonfinite": "skip"},
    "autocast": {"autocast": torch.bfloat16},
    "budget": {"memory_budget": "1 GiB"},
    "noise": {"noise_scale": mb.NoiseScale(every=1)},
}
each_setting = pytest.mark.parametrize("name", SETTINGS)


class Elsewhere(Tensor):
    """A loss that is kept as one on a device: a plain number of the CPU is read at once, and nothing waits for it."""


def elsewhere(model: nn.Module, batch: Batch) -> mb.Loss:
    """The loss of the tagger."""
    loss = token_loss(model, batch)
    return replace(loss, sum=loss.sum.as_subclass(Elsewhere))


def guarded_step(
    door: Door, device: str, modes: Sequence[Any], *, dtype: torch.dtype, loss_fn: Any = token_loss, **settings: Any
) -> int:
    """Take two steps of the tagger, the second one guarded, and return how many microbatches were."""
    model, batch = tagger(0, device, dtype), sentences(0, TARGETS)
    if door is by_count:  # where sending the inputs is the user's own affair
        batch = {name: each.to(device) for name, each in batch.items()}
    guard = FromFirstToLast(len(TARGETS) - 1, modes)
    it = subject(model, size=1, listeners=[guard], **settings)
    door(it, batch, token_loss, size=1)  # the first use of a device's libraries may wait
    guard.armed = True
    with guard.on:
        door(it, batch, loss_fn, size=1)
    return guard.guarded


@through_each_door
@each_setting
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_m5_no_value_is_read_between_the_first_and_the_last_backward(door: Door, name: str, dtype: torch.dtype) -> None:
    modes = [NoReads(), NoDispatchedReads()]
    seen = guarded_step(door, "cpu", modes, dtype=dtype, loss_fn=elsewhere, **SETTINGS[name])
    assert seen == len(TARGETS) - 1


@pytest.mark.cuda
@through_each_door
@pytest.mark.parametrize("name", [name for name in SETTINGS if name != "budget"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_m5_cuda_never_waits_between_the_first_and_the_last_backward(door: Door, name: str, dtype: torch.dtype) -> None:
    assert guarded_step(door, "cuda", [CudaWaits()], dtype=dtype, **SETTINGS[name]) == len(TARGETS) - 1


HAND_WRITTEN: dict[str, Callable[[mb.Loss], object]] = {
    "loss.item()": lambda loss: loss.sum.item(),
    "float(loss)": lambda loss: float(loss.sum.detach()),
    "if isnan": lambda loss: 1 if loss.sum.isnan() else 0,
    "count.tolist()": lambda loss: loss.count.tolist() if isinstance(loss.count, Tensor) else 0,
    "nonzero": lambda loss: torch.nonzero(loss.sum),
    "where": lambda loss: torch.where(loss.sum > 0),
    "select": lambda loss: loss.sum[loss.sum > 0],
}


@through_each_door
@pytest.mark.parametrize("read", HAND_WRITTEN)
def test_m5_by_hand_reading_a_value_is_seen(door: Door, read: str) -> None:
    def reading(model: nn.Module, batch: Batch) -> mb.Loss:
        loss = token_loss(model, batch)
        HAND_WRITTEN[read](loss)
        return loss

    with pytest.raises(HostReadError):
        guarded_step(door, "cpu", [NoReads(), NoDispatchedReads()], dtype=torch.float32, loss_fn=reading)


@pytest.mark.cuda
def test_m5_by_hand_cuda_sees_a_read() -> None:
    with pytest.raises(RuntimeError, match="synchroniz"), CudaWaits():
        torch.zeros((), device="cuda").item()


@on_each_device
def test_m5_what_was_guarded_is_still_exact(device: str) -> None:
    model, batch = wide(device).double(), {name: each.double() for name, each in long_rows(3).items()}
    it = subject(copy.deepcopy(model), size=SIZE)
    it.accumulator.step(batch, fit)
    assert relative_error(it.updates[0], full_batch(model, fit, batch)) <= 1e-12


class Rows:
    """A batch that slices itself, and counts which of its microbatches are alive when another one is made."""

    def __init__(self, x: Tensor, seen: list[int], alive: "WeakSet[Rows]") -> None:
        self.x, self.seen, self.alive = x, seen, alive

    def __len__(self) -> int:
        return len(self.x)

    def __getitem__(self, rows: slice) -> "Rows":
        return Rows(self.x[rows], self.seen, self.alive)

    def clone(self) -> "Rows":
        self.seen.append(len(self.alive))
        made = Rows(self.x.clone(), self.seen, self.alive)
        self.alive.add(made)
        return made


def of_rows(model: nn.Module, microbatch: Rows) -> Tensor:
    return model(microbatch.x).mean()


@pytest.mark.parametrize("way", ["step", "split", "encode"])
def test_m5_a_microbatch_is_made_after_the_one_before_it_is_gone(way: str) -> None:
    model, batch = nn.Linear(2, 1), Rows(torch.randn(6, 2), [], WeakSet())
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    accumulator = mb.Accumulator(model, optimizer, microbatch_size=2, coupled="twice")
    if way == "split":
        with accumulator.window() as window:
            for microbatch in window.split(batch):
                window.backward(of_rows(model, microbatch))
                del microbatch
    elif way == "encode":
        accumulator.step(batch, lambda model, z: z.mean(), encode=lambda model, rows: model(rows.x))
    else:
        accumulator.step(batch, of_rows)
    assert len(batch.seen) >= 3
    assert max(batch.seen) == 0
