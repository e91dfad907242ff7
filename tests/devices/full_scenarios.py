"""What must hold on an accelerator that has what CUDA has: ``python -m tests.devices.full_scenarios [NAME ...]``."""

import gc
import sys
import tempfile
import threading
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from tests.devices.scenario_parts import (
    EXACT,
    WRONG,
    Classifier,
    apart,
    batch_of,
    entropy,
    events,
    gradients,
    limited,
    on_device,
    peak_of,
    reference,
    run,
    scenario,
    trained,
)
from tests.devices.simulated_device import DEVICE, GIB, Full, Small
from torch import Tensor, nn

import microbatch as mb
from microbatch.batch.prefetch import feed
from microbatch.devices import available_devices, backend, copy_streams, device_memory
from microbatch.errors import ConfigError, OutOfMemoryError
from microbatch.loss.thread_state import ThreadState
from microbatch.memory.saved_values import Aside
from microbatch.train.state import random_states, set_random_states

# -- exact -------------------------------------------------------------------------------------------------------------


@scenario
def a_step_has_the_whole_batchs_gradient() -> None:
    rows = batch_of(18)
    for size in (1, 4, 18):
        model = on_device()
        step = trained(model, size).gradient(rows, entropy)
        assert step.microbatches == -(-18 // size)
        assert apart(gradients(model), reference(rows)) < EXACT
    model = on_device()  # the usual recipe: a mean of unequal microbatches
    for start in range(0, 18, 4):
        (entropy(model, {name: each[start : start + 4].to(DEVICE) for name, each in rows.items()}) / 5).backward()
    assert apart(gradients(model), reference(rows)) > WRONG


@scenario
def an_own_loop_and_a_coupled_loss_are_exact() -> None:
    rows, model = batch_of(16), on_device()
    accumulator = trained(model, 8)
    with accumulator.window() as window:
        for start in (0, 8):
            piece = {name: each[start : start + 8].to(DEVICE) for name, each in rows.items()}
            window.backward(mb.Loss(sum=entropy(model, piece) * 8, count=8))
        assert apart(gradients(model), reference(rows)) > WRONG  # not divided yet
    assert window.step.applied

    def encode(model: nn.Module, rows: dict[str, Tensor]) -> tuple[Tensor, Tensor]:
        return model(rows["x"]), model(rows["x"].flip(1))

    def contrast(_: nn.Module, pairs: tuple[Tensor, Tensor]) -> mb.Loss:
        one, other = pairs
        return mb.losses.info_nce(one, other, temperature=0.5)

    model, host = on_device(), Classifier(torch.float64)
    trained(model, 4).gradient(rows, contrast, encode=encode)
    contrast(host, encode(host, rows)).mean.backward()
    assert apart(gradients(model), gradients(host)) < EXACT


@scenario
def exact_batch_statistics_are_exact() -> None:
    def network(where: torch.device) -> nn.Module:
        torch.manual_seed(1)
        parts = [nn.Conv2d(2, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Flatten(), nn.Linear(4 * 16, 3)]
        return nn.Sequential(*parts).double().to(where)

    images = {"x": torch.randn(12, 2, 6, 6, dtype=torch.float64), "y": torch.randint(0, 3, (12,))}
    ours, plain, mine = network(DEVICE), network(torch.device("cpu")), network(DEVICE)
    trained(ours, 4, batch_norm="exact").gradient(images, entropy)
    entropy(plain, images).backward()
    assert apart(gradients(ours), gradients(plain)) < EXACT
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", mb.MicrobatchWarning)
        trained(mine, 4).gradient(images, entropy)
    assert apart(gradients(mine), gradients(plain)) > WRONG


@scenario
def autocast_of_the_device_is_used() -> None:
    rows, model = batch_of(16, torch.float32), on_device(torch.float32)
    seen = list[torch.dtype]()
    model.one.register_forward_hook(lambda _, __, out: seen.append(out.dtype))
    trained(model, 4, autocast=torch.bfloat16).gradient(rows, entropy)
    assert set(seen) == {torch.bfloat16}
    off = apart(gradients(model), reference(rows))
    assert 1e-5 < off < 3e-2, off


@scenario
def a_scaler_works() -> None:
    rows, model = batch_of(16, torch.float32), on_device(torch.float32)
    scaler = torch.amp.GradScaler("sim", init_scale=1024.0)
    step = trained(model, 4, grad_scaler=scaler).step(rows, entropy)
    assert step.applied
    infinite = {**rows, "x": rows["x"] * float("inf")}
    assert not trained(model, 4, grad_scaler=scaler).step(infinite, entropy).applied
    assert scaler.get_scale() == 512


# -- memory ------------------------------------------------------------------------------------------------------------


@scenario
def memory_is_counted() -> None:
    assert device_memory.total_bytes(DEVICE) == GIB
    held = torch.empty(1 << 20, device=DEVICE)
    assert device_memory.bytes_in_use(DEVICE) == Small.live >= 4 << 20
    assert device_memory.free_bytes(DEVICE) == (GIB) - Small.live
    counters = device_memory.allocator_of(DEVICE)
    assert counters is not None
    before = Small.live
    del held
    assert counters.peak() >= before
    counters.reset_peak()
    assert counters.peak() == Small.live == before - (4 << 20)


@scenario
def nothing_is_kept_between_steps() -> None:
    model, rows = on_device(), batch_of(16)
    accumulator = trained(model)
    accumulator.step(rows, entropy)
    gc.collect()
    before = Small.live
    for _ in range(3):
        accumulator.step(rows, entropy)
    gc.collect()
    assert Small.live == before


@scenario
def the_peak_is_the_allocators() -> None:
    model, rows = on_device(), batch_of(64)
    accumulator = trained(model, 8)
    accumulator.step(rows, entropy)
    step = accumulator.step(rows, entropy)
    assert step.peak_bytes == Small.peak
    assert peak_of(trained(model, 64).step(rows, entropy)) > peak_of(step)


def runs_out(where: str) -> None:
    """Run out of memory in a pass, and compare with a run that began at the size that fits."""
    rows, model, calls = batch_of(64), on_device(dropout=0.5), list[int]()

    def loss(model: nn.Module, piece: dict[str, Tensor]) -> Tensor:
        mean = entropy(model, piece)
        calls.append(len(piece["x"]))
        if where == "forward":
            return mean + torch.zeros(len(piece["x"]), 1 << 13, device=DEVICE, dtype=mean.dtype).sum() * 0
        return mean + mean.expand(len(piece["x"]), 1 << 13).exp().sum() * 0  # backward allocates it once more

    accumulator = trained(model, "auto")
    accumulator.gradient(rows, loss)  # the size is found while there is room
    calls.clear()
    Small.log.clear()
    torch.manual_seed(5)
    with limited(250_000 if where == "forward" else 400_000):  # 64 KiB a row
        step = accumulator.step(rows, loss)
    assert step.microbatch_size < calls[0], (calls, step)
    assert events("out of memory")
    assert events("empty_cache")
    found, after = [each.detach().cpu().clone() for each in model.parameters()], Small.state

    again = on_device(dropout=0.5)
    torch.manual_seed(5)
    trained(again, step.microbatch_size).step(rows, entropy)
    assert all(torch.equal(one, other.cpu()) for one, other in zip(found, again.parameters(), strict=True))
    assert torch.equal(after, Small.state)
    other = on_device(dropout=0.5)  # and the masks matter
    torch.manual_seed(6)
    trained(other, step.microbatch_size).step(rows, entropy)
    assert not all(torch.equal(one, two.cpu()) for one, two in zip(found, other.parameters(), strict=True))


@scenario
def memory_that_ends_in_forward_is_recovered_from() -> None:
    runs_out("forward")


@scenario
def memory_that_ends_in_backward_is_recovered_from() -> None:
    runs_out("backward")


@scenario
def a_row_that_does_not_fit_is_an_error_of_ours() -> None:
    model, rows = on_device(), batch_of(8)
    before = [each.detach().cpu().clone() for each in model.parameters()]
    state = Small.state
    with limited(600):
        with pytest.raises(OutOfMemoryError) as caught:
            trained(model, "auto").step(rows, entropy)
        assert caught.value.asked is not None
        assert caught.value.in_use is not None
        assert "smallest" in str(caught.value)
    assert all(torch.equal(one, other.cpu()) for one, other in zip(before, model.parameters(), strict=True))
    assert torch.equal(state, Small.state)
    assert not gradients(model)


@scenario
def a_budget_is_the_allocators_limit_while_a_window_is_open() -> None:
    model, rows = on_device(), batch_of(64)
    budget = 64 << 10
    seen = list[int]()

    def loss(model: nn.Module, piece: dict[str, Tensor]) -> Tensor:
        seen.append(Small.limit)
        return entropy(model, piece)

    accumulator = trained(model, "auto", memory_budget=budget)
    step = accumulator.step(rows, loss)
    assert seen[-1] == budget, seen
    assert Full.share == 1.0
    assert Small.limit == GIB
    assert 0 < peak_of(step) <= budget
    assert step.microbatch_size < 64
    Small.log.clear()
    trained(on_device()).step(rows, entropy)
    assert not events("limit")


@scenario
def a_prediction_is_the_allocators_peak() -> None:
    model, rows = on_device(torch.float32, width=256), batch_of(64, torch.float32)
    optimizer = torch.optim.AdamW(model.parameters())
    found = mb.plan(model, optimizer=optimizer, loss_fn=entropy, batch=rows)
    assert found.candidates
    for candidate in found.candidates:
        assert candidate.predicted_bytes is not None
        gc.collect()
        before = Small.live
        accumulator = trained(on_device(torch.float32, width=256), candidate.microbatch_size)
        peak = max(peak_of(accumulator.step(rows, entropy)) for _ in range(3)) - before
        del accumulator
        # What the plan's own model holds counts in its predictions, as this one's does here.
        assert peak <= 1.01 * candidate.predicted_bytes <= 1.16 * peak, (candidate, peak)


@scenario
def no_prediction_of_a_small_model_is_too_low() -> None:
    """Numbers kept of each microbatch, and blocks of the allocator, are most of what a small model takes."""
    rows, found = batch_of(16, torch.float32), dict[Any, float]()
    for block, most in ((1, 1.5), (512, 1.8)):
        Small.block = block
        try:
            model = on_device(torch.float32, width=4)  # 51 weights
            optimizer = torch.optim.AdamW(model.parameters())
            candidates = mb.plan(model, optimizer=optimizer, loss_fn=entropy, batch=rows).candidates
            for candidate in candidates:
                gc.collect()
                before = Small.live
                accumulator = trained(on_device(torch.float32, width=4), candidate.microbatch_size)
                peak = max(peak_of(accumulator.step(rows, entropy)) for _ in range(3)) - before
                del accumulator
                found[block, candidate.microbatch_size] = (candidate.predicted_bytes or 0) / peak
            del model, optimizer
        finally:
            gc.collect()
            Small.block = 1
        assert len(candidates) == 5
        assert all(1 <= each <= most for each in found.values()), found


# -- random state, streams, pinned memory, synchronisation ------------------------------------------------------------


@scenario
def an_error_puts_the_devices_random_state_back() -> None:
    model, rows = on_device(dropout=0.5), batch_of(16)
    calls = list[int]()

    def fails(model: nn.Module, piece: dict[str, Tensor]) -> Tensor:
        calls.append(1)
        loss = entropy(model, piece)
        if len(calls) == 3:
            raise ValueError("a fault of the user's")
        return loss

    before = Small.state
    with pytest.raises(ValueError, match="of the user"):
        trained(model).step(rows, fails)
    assert len(calls) == 3
    assert torch.equal(before, Small.state)
    model(rows["x"].to(DEVICE))
    assert not torch.equal(before, Small.state)


@scenario
def a_checkpoint_has_the_devices_random_state() -> None:
    states = random_states(DEVICE)
    assert torch.equal(states["sim"], Small.state)
    first = torch.rand(4, device=DEVICE).cpu()
    assert not torch.equal(first, torch.rand(4, device=DEVICE).cpu())
    set_random_states(states, DEVICE)
    assert torch.equal(first, torch.rand(4, device=DEVICE).cpu())


@scenario
def microbatches_are_copied_ahead_on_a_stream_of_their_own() -> None:
    sent = [{"x": torch.full((4,), float(index))} for index in range(4)]
    assert copy_streams.can_pin(DEVICE)
    Small.log.clear()
    seen = list[float]()
    for microbatch in feed(sent, DEVICE):
        assert microbatch["x"].device == DEVICE
        seen.append(float(microbatch["x"].mean()))
    assert seen == [0.0, 1.0, 2.0, 3.0]
    aside = next(each[1] for each in events("stream") if each[1] != 0)
    assert events("wait") == [("wait", aside, 0), ("wait", 0, aside)] * 4
    assert len(events("pin")) == 4
    copies = [index for index, each in enumerate(Small.log) if each[:3] == ("copy", "cpu", "sim")]
    reads = [index for index, each in enumerate(Small.log) if each == ("read",)]
    assert copies[1] < reads[0]  # the second is on its way before the first is used
    assert Full.now.stream_id == 0
    there = [torch.ones(3, device=DEVICE)]
    assert next(feed(there, DEVICE)).data_ptr() == there[0].data_ptr()


@scenario
def many_microbatches_take_no_more_memory_than_three() -> None:
    def peak(number: int) -> int:
        sent = [torch.zeros(1 << 14) for _ in range(number)]
        before = Small.peak = Small.live
        for _ in feed(sent, DEVICE):
            pass
        return Small.peak - before

    assert peak(3) == peak(16) == 3 * (4 << 14)


@scenario
def a_window_does_not_wait_for_the_device() -> None:
    model, rows = on_device(), batch_of(32)
    accumulator = trained(model)
    accumulator.step(rows, entropy)
    places = list[int]()

    def loss(model: nn.Module, piece: dict[str, Tensor]) -> Tensor:
        places.append(len(Small.log))
        return entropy(model, piece)

    Small.log.clear()
    accumulator.step(rows, loss)
    inside = Small.log[places[0] : places[-1]]
    assert len(places) == 8
    assert not [each for each in inside if each[0] in {"read", "synchronize"}]
    assert not [each for each in inside if each[:3] == ("copy", "sim", "cpu")]


@scenario
def timed_passes_wait_for_the_device() -> None:
    Small.log.clear()
    backend.synchronize(DEVICE)
    assert Small.log == [("synchronize",)]


@scenario
def another_thread_has_the_stream_and_the_modes() -> None:
    stream = copy_streams.new_stream(DEVICE)
    found = list[Any]()
    with copy_streams.on_stream(stream), torch.autocast("sim", torch.bfloat16), torch.no_grad():
        state = ThreadState(DEVICE)

    def run() -> None:
        with state.applied():
            found.append((Full.now.stream_id, torch.is_autocast_enabled("sim"), torch.is_grad_enabled()))

    thread = threading.Thread(target=run)
    thread.start()
    thread.join()
    assert found == [(stream.stream_id, True, False)]
    assert Full.now.stream_id == 0


@scenario
def what_is_offloaded_leaves_the_device_and_comes_back() -> None:
    torch.manual_seed(2)
    layers = [layer for _ in range(16) for layer in (nn.Linear(64, 64), nn.Tanh())]
    model = nn.Sequential(*layers).double().to(DEVICE)
    x = torch.randn(256, 64, dtype=torch.float64).to(DEVICE)
    model(x).sum().backward()
    plain = gradients(model)
    model.zero_grad()
    before = Small.live
    loss = model(x).sum()
    kept = Small.live - before
    del loss
    with mb.Spill(model, x) as spill:
        loss = model(x).sum()
    assert spill.bytes_held > 14 * 256 * 64 * 8
    assert Small.live - before < kept / 2
    loss.backward()
    assert all(torch.equal(one, other) for one, other in zip(gradients(model), plain, strict=True))
    copies = Aside()
    back = copies.put(x)
    before = x.cpu()
    x.zero_()
    assert torch.equal(back().cpu(), before)


@scenario
def a_graph_that_is_recorded_is_seen() -> None:
    assert not backend.is_recording()
    Full.capturing = True
    assert backend.is_recording()
    Full.capturing = False


# -- names -------------------------------------------------------------------------------------------------------------


@scenario
def the_device_has_a_name() -> None:
    assert available_devices.resolve_device("auto") == available_devices.resolve_device("sim") == DEVICE
    assert available_devices.resolve_device("sim:0") == DEVICE
    assert available_devices.devices_here() == ["cpu", "sim:0"]
    assert backend.name_of(DEVICE) == "Simulated 1 GiB"
    for name in ("sim:1", "cuda" if not torch.cuda.is_available() else "xpu", "nonsense"):
        with pytest.raises(ConfigError) as caught:
            available_devices.resolve_device(name)
        assert "here are cpu, sim:0" in str(caught.value)
        assert name in str(caught.value)


@scenario
def nothing_is_lacking() -> None:
    assert available_devices.lacking(DEVICE) == []


JOB = """
import torch
from torch import nn
import microbatch as mb

def small(*, device):
    model = nn.Sequential(nn.Linear(6, 6), nn.Tanh(), nn.Linear(6, 2)).to(device)
    data = [(x, (x.sum() > 0).long()) for x in torch.randn(40, 6)]
    return mb.Job(model=model, optimizer=torch.optim.AdamW(model.parameters(), lr=1e-2), loss_fn=loss_fn, data=data,
                  validation=data[:8], batch_size=8, microbatch_size=4, steps=3)

def loss_fn(model, microbatch):
    return nn.functional.cross_entropy(model(microbatch[0]), microbatch[1])
"""


@scenario
def every_command_runs_on_it() -> None:
    from microbatch.cli.main import main

    with tempfile.TemporaryDirectory() as folder:
        run, job = Path(folder) / "run", Path(folder) / "jobs.py"
        job.write_text(JOB, encoding="utf-8")
        name = f"{job}:small"
        assert command(main, "train", name, "--steps", "2", "--device", "auto", "--run", str(run)) == 0
        assert 'device = "sim:0"' in (run / "config.toml").read_text(encoding="utf-8")
        assert command(main, "train", "--resume", "--run", str(run), "--steps", "3") == 0
        assert command(main, "check", name, "--device", "sim") == 0
        assert command(main, "plan", name, "--device", "sim", "--no-cache") == 0
        assert command(main, "lr", name, "--steps", "20", "--device", "sim:0") in {
            0,
            1,
        }  # it may find no rate in so few
        sizes = ("--batch-size", "4,8", "--samples", "32", "--points", "2", "--seeds", "1")
        assert command(main, "sweep", name, *sizes, "--output", f"{folder}/sweep", "--device", "sim") in {0, 1}
        assert command(main, "check", name, "--device", "sim:1") == 2


def command(main: Callable[[], None], *arguments: str) -> Any:
    sys.argv[1:], before = arguments, sys.argv[1:]
    try:
        return main() or 0
    except SystemExit as error:
        return error.code or 0
    finally:
        sys.argv[1:] = before


if __name__ == "__main__":
    run(Full, dict(globals()))
