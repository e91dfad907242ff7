"""Proofs about the order of work on a device: nothing waits for the host, copies overlap, graphs are captured."""

from __future__ import annotations

import copy
from collections.abc import Callable, Generator
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor, nn

import microbatch as mb
from benchmarks.gpu.exact_proofs import Say, full_batch, ours, sentences, token_sum
from benchmarks.gpu.here import Here, gradients, relative_error
from benchmarks.gpu.outcome import NotHereError, Numbers, require
from benchmarks.models import GPT


@contextmanager
def refused(here: Here) -> Generator[None]:
    """Make CUDA raise an error where the host would wait for it; other devices raise none."""
    if not here.cuda:
        yield
        return
    torch.cuda.set_sync_debug_mode("error")
    try:
        yield
    finally:
        torch.cuda.set_sync_debug_mode("default")


class Guard:
    """Refuse waits from a window's first backward to its last, as its events tell, once armed."""

    def __init__(self, here: Here) -> None:
        self.here, self.armed, self.guarded, self.on = here, False, 0, ExitStack()

    def __call__(self, event: object) -> None:
        """Switch on after the first microbatch, and off after the last."""
        if self.armed and isinstance(event, mb.MicrobatchDone):
            self.guarded += event.index > 0
            if event.index == 0:
                self.on.enter_context(refused(self.here))
            if event.index + 1 == event.microbatches:
                self.on.close()


def synchronisation(here: Here, say: Say) -> Numbers:
    """Take steps of several kinds while CUDA refuses every wait, and see that a read in a loss is refused."""
    form = {"vocabulary": 2048, "length": 32, "layers": 2, "heads": 4, "channels": 512}
    batch, rows = sentences(8, 32, 2048), 8
    kinds: dict[str, dict[str, Any]] = {
        "plain": {},
        "clipped": {"max_grad_norm": 0.1},
        "nonfinite skipped": {"nonfinite": "skip"},
        "autocast": {"autocast": torch.bfloat16},
        "not fused": {"sums": mb.Sums(fuse=False)},
        "spill": {"offload": "activations"},
        "lengths": {"lengths": mb.Lengths(of=lambda batch: (batch["labels"] != -100).sum(1))},
        "noise scale": {"noise_scale": mb.NoiseScale(every=1)},
    }

    def take(kind: str, dtype: torch.dtype, loss_fn: Callable[..., Any]) -> int:
        model = GPT(**form).to(here.device, dtype)
        guard = Guard(here)
        adam = torch.optim.AdamW(model.parameters())
        accumulator = mb.Accumulator(model, adam, microbatch_size=1, listeners=guard, **kinds[kind])
        accumulator.step(batch, token_sum)  # a library's first use may wait
        guard.armed = True
        with guard.on:
            accumulator.step(batch, loss_fn)
        return guard.guarded

    def reading(model: nn.Module, piece: dict[str, Tensor]) -> mb.Loss:
        loss = token_sum(model, piece)
        loss.sum.item()
        return loss

    failed: list[str] = []
    for kind in here.size(list(kinds), ["plain", "lengths"]):
        for dtype in (torch.float32, torch.bfloat16):
            name = f"{kind}, {dtype}".replace("torch.", "")
            try:
                guarded = take(kind, dtype, token_sum)
            except RuntimeError as error:
                failed.append(name)
                say(case=name, note=str(error)[:500])
                continue
            require(guarded >= rows // 2, f"{name}: only {guarded} microbatches were guarded")
    here.rest("set_sync_debug_mode")
    try:
        take("plain", torch.float32, reading)
    except RuntimeError:
        pass
    else:
        require(held=False, words="a read in a loss function was not refused: no negative control")
    require(not failed, f"waits for the host: {', '.join(failed)}")
    return {"kinds": 2 * len(kinds)}


def prefetch(here: Here, _say: Say) -> Numbers:
    """Compare a window of rows in pinned memory with one of rows on the device, and with the copies alone."""
    rows, width = 12, here.size(1 << 24, 1 << 10)
    batch = torch.rand(rows, width)
    weight = nn.Parameter(torch.ones((), device=here.device))
    holder = nn.Module()
    holder.register_parameter("weight", weight)
    square = torch.randn(here.size(4096, 64), here.size(4096, 64), device=here.device)
    products = 1

    def mean(model: Any, x: Tensor) -> Tensor:
        for _ in range(products):
            torch.mm(square, square)
        return (model.weight * x).mean()

    accumulator = mb.Accumulator(holder, microbatch_size=1, memory_budget="none")
    there = batch.to(here.device)
    reference = full_batch(holder, lambda model, piece: mean(model, piece["x"]), {"x": batch})
    error = relative_error(ours(holder, mean, batch, microbatch_size=1), reference)
    require(error < 1e-3, f"the gradient is {error:.1e} off")
    pinned = batch.pin_memory() if here.cuda else batch
    landing = torch.empty_like(there[0])

    def copies() -> None:
        for row in pinned:
            landing.copy_(row, non_blocking=True)

    def window(rows_from: Tensor) -> float:
        accumulator.gradient(rows_from, mean)
        return min(here.seconds(lambda: accumulator.gradient(rows_from, mean)) for _ in range(3))

    copies()
    copying = min(here.seconds(copies) for _ in range(3))
    bare = window(there)
    one = min(here.seconds(lambda: torch.mm(square, square)) for _ in range(5))
    products = 1 + int(max(0.0, 2 * copying - bare) / rows / one)
    computing, together, pageable = window(there), window(pinned), window(batch)
    here.rest("copies on a stream of their own")
    shown = (together - computing) / copying
    require(shown <= 0.35, f"{shown:.0%} of the copies' time is added to the window's")
    return {
        "copies, ms": 1000 * copying,
        "window of rows on the device, ms": 1000 * computing,
        "of pinned rows, ms": 1000 * together,
        "of pageable rows, ms": 1000 * pageable,
    }


def graphs(here: Here, _say: Say) -> Numbers:
    """Compile with CUDA graphs, see that graphs are launched, and compare the gradient with the full batch's."""
    if here.cuda and not _has_triton():
        raise NotHereError("torch.compile needs Triton, which is not installed")
    form = {"vocabulary": 1024, "length": 64, "layers": 2, "heads": 4, "channels": 256}
    model = GPT(**form).to(here.device)
    tokens = torch.randint(1024, (8, 64))
    batch = {"tokens": tokens, "labels": tokens.roll(-1, 1)}

    def mean(model: nn.Module, piece: dict[str, Tensor]) -> Tensor:
        return nn.functional.cross_entropy(model(piece["tokens"]).flatten(0, 1), piece["labels"].flatten())

    reference = full_batch(copy.deepcopy(model).double(), mean, batch)
    own = relative_error(full_batch(model, mean, batch), reference)
    accumulator = mb.Accumulator(
        model, microbatch_size=2, compile=here.cuda and "reduce-overhead", memory_budget="none"
    )
    errors: list[float] = []
    for _ in range(4):  # the first ones warm up and record
        step = accumulator.gradient(batch, token_sum)  # whose count is a result of the graph, too
        require(step.count == tokens.numel(), f"the count is {step.count}, not {tokens.numel()}")
        errors.append(relative_error(gradients(model), reference))
    require(max(errors) <= 4 * own + 1e-5, f"errors of {errors}; the full batch in float32 is {own:.1e} off")
    require(accumulator.eager == 0, f"{accumulator.eager} microbatches ran uncompiled")
    with torch.profiler.profile(activities=list(torch.profiler.supported_activities())) as profiled:
        accumulator.gradient(batch, token_sum)
        here.wait()
    launches = sum(each.count for each in profiled.key_averages() if "GraphLaunch" in each.key)
    compiled = here.seconds(lambda: accumulator.gradient(batch, token_sum))
    plain = mb.Accumulator(copy.deepcopy(model), microbatch_size=2, memory_budget="none")
    plain.gradient(batch, token_sum)
    eager = here.seconds(lambda: plain.gradient(batch, token_sum))
    theirs = copy.deepcopy(model)
    if here.cuda:
        theirs.compile(mode="reduce-overhead")
    user = mb.Accumulator(theirs, microbatch_size=2, memory_budget="none")
    for _ in range(4):
        user.gradient(batch, token_sum)
        error = relative_error(gradients(theirs), reference)
        require(error <= 4 * own + 1e-5, f"a model that the user compiled: {error:.1e} off")
    here.rest("CUDA graphs")
    require(launches > 0, "no graph was launched: the compiler left CUDA graphs out")
    return {"graph launches in a window": launches, "error": max(errors), "time": f"{compiled / eager:.2f} of eager"}


def _has_triton() -> bool:
    from torch.utils._triton import has_triton

    return has_triton()
