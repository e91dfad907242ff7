"""Proofs about memory: recovery where it ends, predictions, activations on the host."""

from __future__ import annotations

import copy
import tempfile
from typing import Any, cast

import torch
from torch import Tensor, nn

import microbatch as mb
from benchmarks.contenders import loss_sum
from benchmarks.gpu.exact_proofs import EXACT, Say, full_batch, sentences, squared, token_sum
from benchmarks.gpu.here import Here, gradients, nbytes, relative_error
from benchmarks.gpu.outcome import Numbers, require
from benchmarks.models import GPT, ResidualNetwork
from microbatch.errors import OutOfMemoryError
from microbatch.memory.out_of_memory import is_out_of_memory
from microbatch.step.options import Options
from microbatch.step.size.dry_run import dry_run

CLOSE, SCALARS = 0.01, 1e-4  # of a predicted peak, relative; the latter are numbers that no one counts
EPSILON = 1e-3  # of AdamW: so large that a rounded gradient is not a whole step
ENDED: list[str] = []  # where memory ended, in order


def _take(like: Tensor, times: int, where: str) -> None:
    """Take so many times a tensor's memory for a moment."""
    try:
        like.new_empty(times * like.numel()).fill_(0)
    except Exception as error:
        if is_out_of_memory(error):
            ENDED.append(where)
        raise


class Hungry(torch.autograd.Function):
    """The identity, which needs many times its input's memory in forward, in backward or in none of them."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, *how: Any) -> Tensor:
        """Return the input."""
        ctx.times, ctx.where = how
        if ctx.where == "forward":
            _take(x, ctx.times, ctx.where)
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None, None]:
        """Return the gradient."""
        if ctx.where == "backward":
            _take(grads[0], ctx.times, ctx.where)
        return grads[0], None, None


class Eater(nn.Module):
    """A perceptron with `Hungry` in the middle."""

    def __init__(self, width: int, where: str) -> None:
        super().__init__()
        self.first, self.last = nn.Linear(width, width), nn.Linear(width, width)
        self.where, self.times = where, 0

    def forward(self, x: Tensor) -> Tensor:
        """Return outputs of the input's shape."""
        return self.last(cast("Tensor", Hungry.apply(self.first(x).tanh(), self.times, self.where)))


def recovery(here: Here, _say: Say, *, where: str) -> Numbers:
    """Run out of memory at one place, and compare the step that was taken all the same with the full batch's."""
    width, rows, times = here.size(1024, 64), 64, 1000
    model = Eater(width, where).double().to(here.device)
    batch = {"x": torch.randn(rows, width).double(), "y": torch.randn(rows, width).double()}
    reference = [each.cpu() for each in full_batch(model, squared, batch)]
    model.times = times
    twin = copy.deepcopy(model)
    optimizer = torch.optim.SGD(twin.parameters(), lr=0.0)
    seen: list[list[Tensor]] = []

    def look(*_: Any) -> None:
        seen.append([each.cpu() for each in gradients(twin)])

    optimizer.register_step_pre_hook(look)
    warm_up = mb.Accumulator(twin, microbatch_size=1, memory_budget="none")
    warm_up.gradient({name: each[:2] for name, each in batch.items()}, squared)  # libraries take memory at first use
    twin.zero_grad()
    ENDED.clear()
    # Enough for the gradients, and for what eight rows need where memory ends.
    more = 4 * nbytes(twin) + 10 * times * width * 8
    with here.at_most(more, beside=nbytes(twin, *batch.values())) as options:
        accumulator = mb.Accumulator(twin, optimizer, microbatch_size=rows, **options)
        step = accumulator.step(batch, squared)
        again = accumulator.step(batch, squared)
    require(ENDED, "memory did not end")
    require(set(ENDED) == {where}, f"memory ended in {ENDED}")
    require(step.retries >= 1, "no retry was counted")
    require(again.retries == 0, f"the next step ran out of memory {again.retries} times more")
    errors = [relative_error(each, reference) for each in seen]
    require(len(errors) == 2, f"{len(errors)} optimizer steps instead of 2")
    require(max(errors) <= EXACT, f"the gradient is {max(errors):.1e} off")
    require(step.microbatch_size < rows, f"the size is still {step.microbatch_size}")
    here.rest("the device's own end of memory")
    return {"retries": step.retries, "microbatch size": f"{rows} to {step.microbatch_size}", "error": max(errors)}


class Starved(torch.optim.AdamW):
    """AdamW that has no memory for its state while it is told so: the CPU's stand-in for a full device."""

    starved = False

    def step(self, closure: Any = None) -> Any:
        """Take a step, or run out of memory before anything is written."""
        if self.starved:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 1.00 GiB")
        return super().step(closure)


def optimizer(here: Here, _say: Say) -> Numbers:
    """Run out of memory where the optimizer makes its state: nothing changes, and the step can be taken later."""
    width = here.size(8192, 64)
    model = nn.Sequential(nn.Linear(width, width), nn.Tanh(), nn.Linear(width, 1)).to(here.device)
    batch = {"x": torch.randn(8, width), "y": torch.randn(8, 1)}
    before = [each.detach().cpu().clone() for each in model.parameters()]
    plain = copy.deepcopy(model)
    adam = torch.optim.AdamW(plain.parameters(), lr=0.1, eps=EPSILON)
    squared(plain, {name: each.to(here.device) for name, each in batch.items()}).backward()
    adam.step()
    wanted = [each.detach().cpu().clone() for each in plain.parameters()]
    plain.to("cpu")
    del adam, plain
    mb.Accumulator(model, microbatch_size=2, memory_budget="none").gradient(batch, squared)
    model.zero_grad()
    starved = Starved(model.parameters(), lr=0.1, eps=EPSILON)
    accumulator = mb.Accumulator(model, starved, microbatch_size=2, memory_budget="none")
    starved.starved = not here.cuda
    message = ""
    # Enough for the gradients, their sums and the passes; the optimizer's state takes twice the weights.
    with here.at_most(int(1.5 * nbytes(model)), beside=0):
        try:
            accumulator.step(batch, squared)
        except OutOfMemoryError as error:
            message = str(error)
    require(message, "memory did not end")
    require("no weight was changed" in message, f"another error: {message[:300]}")
    same = all(torch.equal(a, b.detach().cpu()) for a, b in zip(before, model.parameters(), strict=True))
    require(same, "weights changed")
    starved.starved = False
    here.clean()
    step = accumulator.step(batch, squared)
    require(step.applied, "the step after it was not applied")
    error = relative_error([each.detach().cpu() for each in model.parameters()], wanted)
    require(error <= 1e-5, f"the step after it is {error:.1e} off")
    here.rest("the device's own end of memory")
    return {"error of the step after it": error}


def prediction(here: Here, say: Say) -> Numbers:
    """Predict peaks by dry runs, then measure them with the allocator; none may be underestimated."""
    form = here.size(
        {"vocabulary": 8192, "length": 256, "layers": 4, "heads": 8, "channels": 512},
        {"vocabulary": 512, "length": 16, "layers": 2, "heads": 2, "channels": 64},
    )
    sizes = (3, 6, 24)
    rows = 2 * max(sizes)  # two microbatches at least: the second one runs beside the first one's gradients
    text = sentences(rows, form["length"], form["vocabulary"])
    side, widths = here.size((64, (64, 128)), (16, (16, 32)))
    images = {"inputs": torch.randn(rows, 3, side, side), "labels": torch.randint(10, (rows,))}

    def image_loss(model: nn.Module, piece: dict[str, Tensor]) -> mb.Loss:
        return mb.Loss(sum=loss_sum(model, piece), count=len(piece["labels"]))

    cases: dict[str, tuple[Any, Any, Any, torch.dtype | None]] = {
        "GPT, fp32": (lambda: GPT(**form), token_sum, text, None),
        "GPT, bf16 autocast": (lambda: GPT(**form), token_sum, text, torch.bfloat16),
        "residual network": (
            lambda: ResidualNetwork(widths=widths, classes=10, norm="group"), image_loss, images, None,
        ),
    }  # fmt: skip
    if here.tiny:
        del cases["GPT, fp32"], cases["residual network"]  # each takes some seconds
    errors: list[float] = []
    for name, (make, loss_fn, batch, autocast) in cases.items():

        def steps(size: int) -> None:
            model = make().to(here.device)  # noqa: B023 - called at once
            adam = torch.optim.AdamW(model.parameters())
            one = mb.Accumulator(model, adam, microbatch_size=size, autocast=autocast, memory_budget="none")  # noqa: B023
            some = {key: each[: 4 * size] for key, each in batch.items()}  # noqa: B023
            for _ in range(2):
                one.step(some, loss_fn)  # noqa: B023

        steps(sizes[0])  # the libraries' own memory comes with their first use, and stays
        model = make().to(here.device)
        adam = torch.optim.AdamW(model.parameters())
        options = Options(model=model, optimizers=[adam], microbatch_size=1, autocast=autocast)
        predicted = dry_run(options, loss_fn, batch=batch)
        beside = 0 if here.cuda else nbytes(*batch.values())  # on the CPU, the batch is where the model is
        del model, adam, options
        for size in sizes:
            here.clean()
            measured = here.peak(lambda size=size: steps(size)) + beside
            errors.append(predicted.peak_bytes(size) / measured - 1)
            say(case=name, microbatch_size=size, predicted=predicted.peak_bytes(size), measured=measured)
    under = [each for each in errors if each < -SCALARS]
    require(max(map(abs, errors)) <= CLOSE, f"errors of {min(errors):+.2%} to {max(errors):+.2%}")
    require(not under, f"{len(under)} of {len(errors)} peaks are underestimated, by up to {-min(errors):.3%}")
    return {"predictions": len(errors), "errors": f"{min(errors):+.3%} to {max(errors):+.3%}"}


def spill(here: Here, _say: Say) -> Numbers:
    """Move activations to the host: the same gradient to the last bit, and a lower peak."""
    width, rows = here.size((2048, 16384), (64, 256))
    layers = [layer for _ in range(12) for layer in (nn.Linear(width, width), nn.Tanh())]
    model = nn.Sequential(*layers).to(here.device)
    batch = {"x": torch.randn(rows, width), "y": torch.zeros(rows, width)}
    found: dict[bool, tuple[int, float, list[Tensor], int]] = {}
    with tempfile.TemporaryDirectory() as folder:
        for moved in (False, True):
            offload = mb.Spill(model, directory=folder, smallest=1 << 12) if moved else None
            accumulator = mb.Accumulator(model, microbatch_size=rows // 2, memory_budget="none", offload=offload)
            step = accumulator.gradient(batch, squared)
            mine = gradients(model)
            model.zero_grad()
            peak = here.peak(lambda one=accumulator: one.gradient(batch, squared))
            seconds = min(here.seconds(lambda one=accumulator: one.gradient(batch, squared)) for _ in range(3))
            found[moved] = peak, seconds, mine, step.spilled_bytes
            model.zero_grad()
    (plain, fast, wanted, _), (lower, slow, got, moved_bytes) = found[False], found[True]
    require(moved_bytes > 0, "nothing was moved")
    require(all(torch.equal(a, b) for a, b in zip(got, wanted, strict=True)), "the gradient has other bits")
    activation = rows // 2 * width * 4
    require(lower <= plain - 3 * activation, f"the peak is {lower} bytes, {plain} without")
    here.rest("pinned host memory")
    return {"peak": f"{lower / plain:.2f} of it", "time": f"{slow / fast:.2f} of it", "bytes moved": moved_bytes}
