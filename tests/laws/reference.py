"""What the laws are held against: plain PyTorch in float64, and the ways into the accumulator that must all obey."""

from __future__ import annotations

import copy
import math
import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypeAlias

import pytest
import torch
import torch.nn.functional as F
from hypothesis import settings
from torch import Tensor, nn
from torch.optim import Optimizer

import microbatch as mb

Batch: TypeAlias = dict[str, Tensor]
Gradients: TypeAlias = dict[str, Tensor]
PlainLoss: TypeAlias = Callable[[nn.Module, Batch], Tensor]
LossFunction: TypeAlias = Callable[[nn.Module, Any], Any]

EXACT = 1e-12  # relative error in float64 that only the order of summation explains
WRONG = 1e-6  # a hand-written recipe that is further off than this is wrong, not rounded

few = settings(max_examples=12)  # of each law, on each device and through each door, beside the law's own example
fewer = settings(max_examples=4)  # of a law that is also held under each of many names
ACCELERATOR = os.environ.get("MICROBATCH_TEST_ACCELERATOR", "cuda")  # `tests.devices.simulate` has another
on_each_device = pytest.mark.parametrize("device", ["cpu", pytest.param(ACCELERATOR, marks=pytest.mark.cuda)])


# -- the reference -------------------------------------------------------------------------------------------------


def gradients_of(model: nn.Module) -> Gradients:
    """Copy the gradients that a model has now; a parameter without one is left out."""
    return {name: each.grad.detach().clone() for name, each in model.named_parameters() if each.grad is not None}


def full_batch(model: nn.Module, loss: PlainLoss, batch: Batch, *, dtype: torch.dtype = torch.float64) -> Gradients:
    """Return the gradient of one backward over the whole batch, by plain PyTorch; `model` is left alone."""
    twin = copy.deepcopy(model).to(dtype)
    twin.zero_grad()
    loss(twin, moved(batch, model, dtype)).backward()
    return gradients_of(twin)


def moved(batch: Batch, model: nn.Module, dtype: torch.dtype) -> Batch:
    """Return a batch on a model's device, its floating-point tensors in `dtype`."""
    device = next(model.parameters()).device
    return {name: each.to(device, dtype if each.is_floating_point() else None) for name, each in batch.items()}


def relative_error(got: Gradients, reference: Gradients) -> float:
    """Return ``|got - reference| / |reference|`` over all parameters; infinite if one is missing or not finite."""
    if got.keys() != reference.keys():
        return math.inf
    differences = [got[name].to_dense().double() - each.to_dense().double() for name, each in reference.items()]
    off, size = norm(differences), norm(reference.values())
    if not math.isfinite(off):
        return math.inf
    return off / size if size else math.inf if off else 0.0


def norm(tensors: Any) -> float:
    """Return the Euclidean norm of all tensors together, in float64."""
    return math.sqrt(sum(tensor.to_dense().double().square().sum().item() for tensor in tensors))


def limit(model: nn.Module, loss: PlainLoss, batch: Batch, reference: Gradients) -> float:
    """Return the error that law P3 allows: the full batch's own in the model's precision, and one rounding unit.

    The unit is that of what is added up: where rows' gradients cancel, it is larger than their sum's.
    """
    dtype = next(model.parameters()).dtype
    if dtype == torch.float64:
        return EXACT
    own = relative_error(full_batch(model, loss, batch, dtype=dtype), reference)
    return own + torch.finfo(dtype).eps * cancellation(model, loss, batch, reference)


def cancellation(model: nn.Module, loss: PlainLoss, batch: Batch, reference: Gradients) -> float:
    """Return how much longer the rows' gradients are together than their sum; 1 where none of them cancel."""
    rows = pieces_of(batch, 1)
    counts = [(row["labels"] >= 0).sum().item() if "labels" in row else 1 for row in rows]
    lengths = [n * norm(full_batch(model, loss, row).values()) for n, row in zip(counts, rows, strict=True) if n]
    return max(1.0, sum(lengths) / sum(counts) / norm(reference.values()))


# -- the loop that everyone writes ---------------------------------------------------------------------------------


def by_hand(model: nn.Module, loss: PlainLoss, pieces: Sequence[Batch], *, divide_by: float) -> Gradients:
    """Add up the gradients of every microbatch's mean loss over a configured number: right only if all are alike."""
    twin = copy.deepcopy(model)
    twin.zero_grad()
    for piece in pieces:
        (loss(twin, moved(piece, twin, next(twin.parameters()).dtype)) / divide_by).backward()
    return gradients_of(twin)


def pieces_of(batch: Batch, size: int) -> list[Batch]:
    """Cut a batch by plain slicing."""
    rows = len(next(iter(batch.values())))
    return [{name: each[at : at + size] for name, each in batch.items()} for at in range(0, rows, size)]


def joined(pieces: Sequence[Batch]) -> Batch:
    """Put microbatches together again."""
    return {name: torch.cat([piece[name] for piece in pieces]) for name in pieces[0]}


# -- the ways in ---------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Subject:
    """A model under an accumulator, and the gradients that its optimizer was given, one entry a step."""

    model: nn.Module
    optimizer: Optimizer
    accumulator: mb.Accumulator
    updates: list[Gradients]


def subject(model: nn.Module, optimizer: Optimizer | None = None, *, size: int = 1, **settings: Any) -> Subject:
    """Put a copy of a model under an accumulator; without an optimizer its weights stay where they are."""
    if optimizer is None:
        model = copy.deepcopy(model)
        optimizer = torch.optim.SGD(model.parameters(), lr=0.0)
    updates: list[Gradients] = []

    def keep(*_: Any) -> None:
        updates.append(gradients_of(model))

    optimizer.register_step_pre_hook(keep)
    settings = {"batch_norm": "microbatch", **settings}  # without a warning
    return Subject(model, optimizer, mb.Accumulator(model, optimizer, microbatch_size=size, **settings), updates)


def by_step(it: Subject, batch: Batch, loss_fn: LossFunction, *, size: int, counts: Any = None) -> mb.Step:
    """Take the step with `accumulator.step`, which cuts by the accumulator's own size."""
    return it.accumulator.step(batch, loss_fn, counts=counts)


def by_window(it: Subject, batch: Batch, loss_fn: LossFunction, *, size: int, counts: Any = None) -> mb.Step:
    """Take the step with a hand-written loop over `window.split`."""
    with it.accumulator.window(counts=counts) as window:
        for microbatch in window.split(batch):
            window.backward(loss_fn(it.model, microbatch))
    return window.step


def by_windows(it: Subject, batch: Batch, loss_fn: LossFunction, *, size: int, counts: Any = None) -> mb.Step:
    """Take the step with a loader that yields the microbatches."""
    loader = pieces_of(batch, size)
    (step,) = steps_by_windows(it, loader, loss_fn, microbatches=len(loader), counts=counts)
    return step


def by_count(it: Subject, batch: Batch, loss_fn: LossFunction, *, size: int, counts: Any = None) -> mb.Step:
    """Take the step with microbatches that the window did not hand out, saying their rows."""
    device = next(it.model.parameters()).device
    with it.accumulator.window(counts=counts) as window:
        for piece in pieces_of(batch, size):
            there = {name: each.to(device) for name, each in piece.items()}
            window.backward(loss_fn(it.model, there), count=len(next(iter(there.values()))))
    return window.step


def steps_by_windows(
    it: Subject, loader: Sequence[Batch], loss_fn: LossFunction, *, microbatches: int, counts: Any = None
) -> list[mb.Step]:
    """Go through a whole loader in windows and return every step."""
    steps: list[mb.Step] = []
    for window in it.accumulator.windows(loader, microbatches=microbatches, counts=counts):
        for microbatch in window:
            window.backward(loss_fn(it.model, microbatch))
        steps.append(window.step)
    return steps


Door: TypeAlias = Callable[..., mb.Step]
DOORS: Mapping[str, Door] = {"step": by_step, "window": by_window, "windows": by_windows, "count": by_count}
through_each_door = pytest.mark.parametrize("door", [pytest.param(each, id=name) for name, each in DOORS.items()])


# -- two small problems --------------------------------------------------------------------------------------------


def numbers(seed: int, *shape: int) -> Tensor:
    """Return standard normal numbers in float64; the same on every device."""
    return torch.randn(shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def filled(model: nn.Module, seed: int, device: str, dtype: torch.dtype = torch.float64) -> nn.Module:
    """Give a model smooth random weights, drawn in float64, on a device and in a dtype."""
    with torch.no_grad():
        for index, parameter in enumerate(model.parameters()):
            parameter.copy_(numbers(1000 * seed + index, *parameter.shape) / 2)
    return model.to(device, dtype)


def regressor(seed: int, device: str, dtype: torch.dtype = torch.float64) -> nn.Module:
    """Make a smooth network of 3 inputs and 2 outputs."""
    return filled(nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 2)), seed, device, dtype)


def points(seed: int, rows: int, dtype: torch.dtype = torch.float64) -> Batch:
    """Draw a batch for the regressor, on the host."""
    return {"x": numbers(seed + 1, rows, 3).to(dtype), "y": numbers(seed + 2, rows, 2).to(dtype)}


def squared(model: nn.Module, batch: Batch) -> Tensor:
    """Return the mean squared error: a plain mean over the rows."""
    return (model(batch["x"]) - batch["y"]).square().mean()


class Tagger(nn.Module):
    """Give every token one of 5 labels, and route every row."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(7, 4)
        self.head = nn.Linear(4, 5)
        self.router = nn.Linear(4, 3)

    def forward(self, tokens: Tensor) -> Tensor:
        """Return logits of the labels; shape ``(rows, tokens, 5)``."""
        return self.head(self.embedding(tokens).tanh())


def tagger(seed: int, device: str, dtype: torch.dtype = torch.float64) -> Tagger:
    """Make a tagger with random weights."""
    model = Tagger()
    filled(model, seed, device, dtype)
    return model


def sentences(seed: int, targets: Sequence[int], *, width: int = 8) -> Batch:
    """Draw a batch for the tagger, on the host: `targets[i]` labels in row i, the others masked."""
    generator = torch.Generator().manual_seed(seed)
    tokens = torch.randint(0, 7, (len(targets), width), generator=generator)
    labels = torch.randint(0, 5, (len(targets), width), generator=generator)
    masked = torch.arange(width) >= torch.tensor(targets).unsqueeze(1)
    return {"tokens": tokens, "labels": labels.masked_fill(masked, -100)}


def token_mean(model: nn.Module, batch: Batch) -> Tensor:
    """Return the mean cross-entropy over the labels that are not masked; NaN if all of them are."""
    return F.cross_entropy(model(batch["tokens"]).flatten(0, 1), batch["labels"].flatten())


def token_loss(model: nn.Module, batch: Batch) -> mb.Loss:
    """Return the same as a sum and a count, which stays on the device."""
    logits, labels = model(batch["tokens"]).flatten(0, 1), batch["labels"].flatten()
    return mb.Loss(sum=F.cross_entropy(logits, labels, reduction="sum"), count=(labels >= 0).sum())


# Parameters and autocast: every precision in which one trains.
NARROW: dict[str, tuple[torch.dtype, torch.dtype | None]] = {
    "float32": (torch.float32, None),
    "bfloat16": (torch.bfloat16, None),
    "float16": (torch.float16, None),
    "autocast to bfloat16": (torch.float32, torch.bfloat16),
    "autocast to float16": (torch.float32, torch.float16),
}
