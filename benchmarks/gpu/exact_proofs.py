"""Proofs that compare gradients with plain PyTorch in float64, each beside the loop that people write."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import microbatch as mb
from benchmarks.gpu.here import Here, gradients, relative_error
from benchmarks.gpu.outcome import Numbers, require
from benchmarks.models import GPT, ResidualNetwork

EXACT, WRONG = 1e-12, 1e-6  # relative errors in float64: what rounding explains, and what it does not
IGNORED = -100
Batch = dict[str, Tensor]
Say = Callable[..., None]


def token_sum(model: nn.Module, batch: Batch) -> mb.Loss:
    """Return the cross-entropy of labelled tokens as a sum and its count."""
    labels = batch["labels"].flatten()
    logits = model(batch["tokens"]).flatten(0, 1)
    return mb.Loss(sum=F.cross_entropy(logits, labels, reduction="sum"), count=(labels != IGNORED).sum())


def token_mean(model: nn.Module, batch: Batch) -> Tensor:
    """Return the same as a mean."""
    return F.cross_entropy(model(batch["tokens"]).flatten(0, 1), batch["labels"].flatten())


def squared(model: nn.Module, batch: Batch) -> Tensor:
    """Return a mean over rows."""
    return (model(batch["x"]) - batch["y"]).square().mean()


def row_sum(model: nn.Module, x: Tensor) -> Tensor:
    """Return the mean over rows of the summed outputs."""
    return model(x).float().sum(1).mean()


def sentences(rows: int, length: int, vocabulary: int) -> Batch:
    """Return rows of tokens whose labels differ in number: from one to all of them."""
    tokens = torch.randint(vocabulary, (rows, length))
    used = torch.arange(length) < torch.tensor([1 + (3 * row) % length for row in range(rows)]).unsqueeze(1)
    return {"tokens": tokens, "labels": tokens.roll(-1, 1).masked_fill(~used, IGNORED)}


def full_batch(model: nn.Module, mean: Callable[[Any, Batch], Tensor], batch: Batch) -> list[Tensor]:
    """Return the gradient of one backward over the whole batch, by plain PyTorch."""
    twin = copy.deepcopy(model)
    mean(twin, sent(batch, model)).backward()
    return gradients(twin)


def by_hand(model: nn.Module, mean: Callable[[Any, Batch], Tensor], batch: Batch, *, size: int) -> list[Tensor]:
    """Return the mean of the microbatches' means: what many loops compute."""
    twin, rows = copy.deepcopy(model), len(next(iter(batch.values())))
    starts = range(0, rows, size)
    for start in starts:
        piece = {name: each[start : start + size] for name, each in batch.items()}
        (mean(twin, sent(piece, model)) / len(starts)).backward()
    return gradients(twin)


def sent(batch: Batch, model: nn.Module) -> Batch:
    """Move a batch to a model's device."""
    device = next(model.parameters()).device
    return {name: each.to(device) for name, each in batch.items()}


def ours(model: nn.Module, loss_fn: Any, batch: Any, *, encode: Any = None, **options: Any) -> list[Tensor]:
    """Return the gradient that an accumulator makes; the model is left alone."""
    twin = copy.deepcopy(model)
    accumulator = mb.Accumulator(twin, **options)
    accumulator.gradient(batch, loss_fn, encode=encode)
    return gradients(twin)


def laws(here: Here, say: Say) -> Numbers:
    """Hold windows of several models against the full batch, and see that the usual loop is another gradient."""
    form = {"vocabulary": 512, "length": 12, "layers": 2, "heads": 2, "channels": 512}
    text, points = sentences(10, 12, 512), {"x": torch.randn(10, 600).double(), "y": torch.randn(10, 600).double()}
    images = {"x": torch.randn(7, 3, 8, 8).double(), "y": torch.randn(7, 5).double()}
    perceptron = nn.Sequential(nn.Linear(600, 600), nn.Tanh(), nn.Linear(600, 600))  # large enough to be fused
    convolutions = ResidualNetwork(widths=(8, 16), classes=5, norm="group")
    cases: dict[str, tuple[nn.Module, Any, Any, Batch]] = {
        "tokens of ragged rows": (GPT(**form), token_sum, token_mean, text),
        "a mean over rows, and a tail": (perceptron, squared, squared, points),
        "convolutions": (convolutions, squared, squared, images),
    }
    worst = 0.0
    for name, (made, loss_fn, mean, batch) in cases.items():
        model = made.double().to(here.device)
        reference = full_batch(model, mean, batch)
        wrong = relative_error(by_hand(model, mean, batch, size=4), reference)
        require(wrong > WRONG, f"{name}: the negative control is only {wrong:.0e} off")
        for size in (1, 4):
            error = relative_error(ours(model, loss_fn, batch, microbatch_size=size), reference)
            say(case=name, microbatch_size=size, error=error, by_hand=wrong)
            require(error <= EXACT, f"{name}, microbatches of {size}: {error:.1e} off")
            worst = max(worst, error)
        limit = 0.1 * float(torch.linalg.vector_norm(torch.cat([each.flatten() for each in reference])))
        clipped = ours(model, loss_fn, batch, microbatch_size=4, max_grad_norm=limit)
        error = relative_error(clipped, [0.1 * each for each in reference])
        require(error <= 1e-5, f"{name}, clipped: {error:.1e} off")  # torch adds 1e-6 to the norm
    return {"worst error": worst}


def fused(here: Here, _say: Say) -> Numbers:
    """Add up many small bf16 gradients: fused products must round once, where bf16 sums lose most of them."""
    width, rows = here.size(4096, 512), here.size(1024, 256)
    layer = nn.Linear(width, width, bias=False, device=here.device, dtype=torch.bfloat16)
    # Powers of two everywhere, so that products are exact and the sum's rounding is all that is left.
    batch = torch.exp2(torch.randint(-3, 1, (rows, width)).float()).bfloat16()

    reference = batch.double().mean(0).expand(width, width).to(here.device)

    def error(of: Tensor) -> float:
        return relative_error([of], [reference])

    accumulator = mb.Accumulator(layer, microbatch_size=1)
    step = accumulator.gradient(batch, row_sum)
    require(accumulator.fusion()["weight"] == "fused", f"not fused: {accumulator.fusion()}")
    require(step.fused == 1, f"{step.fused} weights fused")
    mine = error(gradients(layer)[0])
    layer.weight.grad = None
    for row in batch.split(1):
        (row_sum(layer, row.to(here.device)) / rows).backward()
    plain = error(gradients(layer)[0])
    require(mine <= 2.0**-8, f"{mine:.1e} off, more than one rounding to bf16")
    require(plain > 4 * mine, f"sums in bf16 are only {plain:.1e} off: no negative control")
    found: Numbers = {"error": mine, "error of bf16 sums": plain}
    if here.cuda:  # on the CPU, such products run in pieces
        saved = _peak(here, layer, batch[:4], fuse=False) - _peak(here, layer, batch[:4], fuse=True)
        weight = 2 * width * width
        require(saved > weight / 2, f"fused, the peak is {saved} bytes lower; a bf16 gradient has {weight}")
        found["bytes saved"] = saved
    return found


def _peak(here: Here, layer: nn.Module, batch: Tensor, *, fuse: bool) -> int:
    """Return the most bytes on the device before a window's last microbatch has ended: what comes then is not fused."""
    twin, peaks = copy.deepcopy(layer), [0]

    def look(event: object) -> None:
        if isinstance(event, mb.MicrobatchDone):
            peaks.append(torch.cuda.max_memory_allocated(here.device))

    accumulator = mb.Accumulator(twin, microbatch_size=1, sums=mb.Sums(fuse=fuse), listeners=look)
    accumulator.gradient(batch, row_sum)
    twin.zero_grad()
    here.clean()
    before = here.held()
    torch.cuda.reset_peak_memory_stats(here.device)
    peaks.clear()
    accumulator.gradient(batch, row_sum)
    return max(peaks) - before


def batch_norm(here: Here, _say: Say) -> Numbers:
    """Hold exact batch normalisation against the full batch: gradient and running statistics."""
    model = ResidualNetwork(widths=here.size((32, 64), (8, 16)), classes=5, norm="batch").double().to(here.device)
    rows, side = here.size((32, 32), (6, 8))
    batch = {"x": torch.randn(rows, 3, side, side).double(), "y": torch.randn(rows, 5).double()}
    whole, twin = copy.deepcopy(model), copy.deepcopy(model)
    squared(whole, sent(batch, whole)).backward()
    mb.Accumulator(twin, microbatch_size=2, batch_norm="exact").gradient(batch, squared)
    error = relative_error(gradients(twin), gradients(whole))
    statistics = relative_error(
        [each for each in twin.buffers() if each.is_floating_point()],
        [each for each in whole.buffers() if each.is_floating_point()],
    )
    usual = relative_error(by_hand(model, squared, batch, size=2), gradients(whole))
    require(error <= 1e-10, f"the gradient is {error:.1e} off")
    require(statistics <= 1e-10, f"running statistics are {statistics:.1e} off")
    require(usual > 1e-3, f"each microbatch's statistics: only {usual:.1e} off, no negative control")
    return {"error": error, "error of running statistics": statistics, "error of the usual loop": usual}


def coupled(here: Here, _say: Say) -> Numbers:
    """Hold a contrastive loss against the full batch, each way of encoding."""
    width = here.size(256, 16)
    model = nn.ModuleDict({"a": nn.Linear(width, 32), "b": nn.Linear(width, 32)}).double().to(here.device)
    batch = {name: torch.randn(24, width).double() for name in ("a", "b")}

    def encode(model: Any, piece: Batch) -> tuple[Tensor, Tensor]:
        return F.normalize(model["a"](piece["a"]), dim=1), F.normalize(model["b"](piece["b"]), dim=1)

    def loss(_model: object, both: tuple[Tensor, Tensor]) -> mb.Loss:
        return mb.losses.clip(*both, scale=torch.tensor(10.0, dtype=torch.float64, device=both[0].device))

    def mean(model: nn.Module, piece: Batch) -> Tensor:
        return loss(model, encode(model, piece)).sum / len(piece["a"])

    reference, worst = full_batch(model, mean, batch), 0.0
    for way in ("twice", "keep", "spill"):
        error = relative_error(ours(model, loss, batch, encode=encode, microbatch_size=5, coupled=way), reference)
        require(error <= 1e-10, f"coupled={way!r}: {error:.1e} off")
        worst = max(worst, error)
    usual = relative_error(by_hand(model, mean, batch, size=6), reference)
    require(usual > 1e-3, f"each microbatch's own negatives: only {usual:.1e} off, no negative control")
    return {"worst error": worst, "error of the usual loop": usual}
