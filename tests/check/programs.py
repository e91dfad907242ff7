"""Small programs with planted causes: each alone, pairs of them, and none."""

from __future__ import annotations

import random
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import microbatch as mb

ROWS, SIZE, WIDTH = 16, 4, 6
NARROW_ROWS = 128


@dataclass(frozen=True)
class Program:
    """A model, a loss and a batch, and which causes were put into them.

    Attributes:
        model: The module.
        loss_fn: As for `Accumulator.step`.
        planted: Kinds of the causes, with a part of what ``where`` must say.
        batch: The whole batch.
        options: For `check`.
    """

    model: nn.Module
    loss_fn: Callable[..., Any]
    planted: Mapping[str, str]
    batch: dict[str, Any]
    options: dict[str, Any] = field(default_factory=dict[str, Any])


def batch(rows: int = ROWS) -> dict[str, Any]:
    """Rows with targets, classes, and a mask that counts differently in every microbatch."""
    generator = torch.Generator().manual_seed(1)
    counted = torch.arange(rows).unsqueeze(1) // SIZE % 3 + 1
    return {
        "x": torch.randn(rows, WIDTH, generator=generator),
        "y": torch.randn(rows, generator=generator),
        "mask": (torch.arange(WIDTH) < counted).float(),
    }


# -- models -------------------------------------------------------------------------------------------------------


def network(*middle: nn.Module, out: int = WIDTH) -> nn.Sequential:
    """Two linear layers, and something between them."""
    torch.manual_seed(2)
    return nn.Sequential(nn.Linear(WIDTH, 8), *middle, nn.Tanh(), nn.Linear(8, out))


class Scaled(nn.Module):
    """Normalise by a running scale that every forward pass moves: a state that the next one reads."""

    def __init__(self) -> None:
        super().__init__()
        self.scale: Tensor
        self.register_buffer("scale", torch.ones(()))
        self.calls = 0

    def forward(self, x: Tensor) -> Tensor:
        out = x / self.scale
        self.calls += 1  # which nothing reads
        self.scale = (0.7 * self.scale + 0.3 * x.detach().abs().amax()).detach()
        return out


class Warming(nn.Module):
    """Blend in a branch by how often the module was called: a state that is a plain number."""

    def __init__(self) -> None:
        super().__init__()
        self.step = 0

    def forward(self, x: Tensor) -> Tensor:
        self.step += 1
        return x * (1 + 0.5 * self.step)


class Counting(nn.Module):
    """Count calls, for nobody."""

    def __init__(self) -> None:
        super().__init__()
        self.calls: Tensor
        self.register_buffer("calls", torch.zeros((), dtype=torch.long))

    def forward(self, x: Tensor) -> Tensor:
        self.calls += 1
        return x


def own_mean(x: Tensor) -> Tensor:
    return x.mean(0)


class Centred(nn.Module):
    """Subtract the mean over the rows."""

    def __init__(self, mean: Callable[[Tensor], Tensor] = own_mean) -> None:
        super().__init__()
        self.mean = mean

    def forward(self, x: Tensor) -> Tensor:
        return x - self.mean(x)


class Placed(nn.Module):
    """Scale every row by its place among the others."""

    def forward(self, x: Tensor) -> Tensor:
        return x * torch.arange(1, len(x) + 1, dtype=x.dtype).unsqueeze(1) / 4


class Skipping(nn.Module):
    """Leave out a layer by Python's own random numbers."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = nn.Linear(8, 8)

    def forward(self, x: Tensor) -> Tensor:
        return x if random.random() < 0.5 else x + self.inner(x)  # noqa: S311


class Noisy(nn.Module):
    """Add noise."""

    def forward(self, x: Tensor) -> Tensor:
        return x + torch.randn_like(x)


class FunctionalNorm(nn.Module):
    """Normalise a residual branch by the function alone, without a module of torch's."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = nn.Linear(8, 8)

    def forward(self, x: Tensor) -> Tensor:
        return x + F.batch_norm(self.inner(x), None, None, training=True)


class WithLoss(nn.Module):
    """Return the loss beside the logits, as many language models do."""

    def __init__(self) -> None:
        super().__init__()
        self.body = network()

    def forward(self, x: Tensor, mask: Tensor) -> dict[str, Tensor]:
        out = self.body(x)
        return {"loss": (out.square() * mask).sum() / mask.sum(), "logits": out}


class Temperature(nn.Module):
    """An encoder, with a temperature that only the loss uses."""

    def __init__(self) -> None:
        super().__init__()
        self.body = network()
        self.log_scale = nn.Parameter(torch.tensor(1.0))

    def forward(self, x: Tensor) -> Tensor:
        return F.normalize(self.body(x), dim=-1)


class Narrow(nn.Module):
    """Insist on float32 inside, so that there is no float64 to be had."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = nn.Linear(8, 8)

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x.to(torch.float32), self.inner.weight, self.inner.bias)


class Padded(nn.Module):
    """Take the mean over positions, with padding or without."""

    def __init__(self, *, masked: bool) -> None:
        super().__init__()
        self.embed = nn.Embedding(10, 4)
        self.masked = masked

    def forward(self, tokens: Tensor, mask: Tensor) -> Tensor:
        x = self.embed(tokens)
        if self.masked:
            x = x * mask.unsqueeze(-1) / mask.sum(1)[:, None, None]
            return x.sum((1, 2))
        return x.mean((1, 2))


# -- losses -------------------------------------------------------------------------------------------------------


def squared(model: nn.Module, batch: dict[str, Tensor]) -> Tensor:
    """A mean over rows."""
    return (model(batch["x"]).sum(-1) - batch["y"]).square().mean()


def summed(model: nn.Module, batch: dict[str, Tensor]) -> Tensor:
    """A sum over rows, which is none of what may be returned."""
    return (model(batch["x"]).sum(-1) - batch["y"]).square().sum()


def masked(model: nn.Module, batch: dict[str, Tensor]) -> Tensor:
    """A mean over what is not masked: the counts differ between microbatches."""
    return (model(batch["x"]).square() * batch["mask"]).sum() / batch["mask"].sum()


def counted(model: nn.Module, batch: dict[str, Tensor]) -> mb.Loss:
    """The same, said as it should be."""
    return mb.Loss(sum=(model(batch["x"]).square() * batch["mask"]).sum(), count=batch["mask"].sum())


def contrastive(model: nn.Module, batch: dict[str, Tensor]) -> Tensor:
    """Tell every row from all the others."""
    z = model(batch["x"])
    scale = model.log_scale.exp() if isinstance(model, Temperature) else 1.0
    return F.cross_entropy(z @ F.normalize(batch["x"], dim=-1).T * scale, torch.arange(len(z)))


def encoded(model: nn.Module, batch: dict[str, Tensor]) -> tuple[Tensor, Tensor]:
    """The two sides of a contrastive loss."""
    return model(batch["x"]), F.normalize(batch["x"], dim=-1)


def contrast(model: nn.Module, z: tuple[Tensor, Tensor]) -> Tensor:
    """The same, of the whole batch's representations."""
    scale = model.log_scale.exp() if isinstance(model, Temperature) else 1.0
    return F.cross_entropy(z[0] @ z[1].T * scale, torch.arange(len(z[0])))


def placed(model: nn.Module, batch: dict[str, Tensor]) -> Tensor:
    """Weigh every row by its place among the others."""
    errors = (model(batch["x"]).sum(-1) - batch["y"]).square()
    return (errors * torch.arange(1, len(errors) + 1)).mean()


def inside(model: nn.Module, batch: dict[str, Tensor]) -> Tensor:
    """The loss that the model returns."""
    return model(batch["x"], batch["mask"])["loss"]


def padded(model: nn.Module, batch: dict[str, Tensor]) -> Tensor:
    """A mean over rows of what is made of ragged ones."""
    return model(batch["tokens"], batch["mask"]).square().mean()


def two_terms(model: nn.Module, batch: dict[str, Tensor]) -> dict[str, Tensor]:
    """A mean over rows, and one over what is not masked."""
    out = model(batch["x"])
    tokens = (out.square() * batch["mask"]).sum() / batch["mask"].sum()
    return {"rows": (out.sum(-1) - batch["y"]).square().mean(), "tokens": tokens}


def coupled_and_counted(model: nn.Module, batch: dict[str, Tensor]) -> dict[str, Tensor]:
    """A contrastive term, and one over what is not masked."""
    tokens = (model(batch["x"]).square() * batch["mask"]).sum() / batch["mask"].sum()
    return {"contrast": contrastive(model, batch), "tokens": tokens}


# -- programs -----------------------------------------------------------------------------------------------------


def narrow_sums() -> dict[str, Any]:
    """What makes bfloat16 sums lose something: many microbatches, whose gradients have one direction."""
    return {
        "x": torch.rand(NARROW_ROWS, WIDTH, dtype=torch.bfloat16) + 1,
        "y": torch.zeros(NARROW_ROWS, dtype=torch.bfloat16),
    }


def positive() -> nn.Module:
    torch.manual_seed(3)
    model = nn.Linear(WIDTH, 4).to(torch.bfloat16)
    nn.init.uniform_(model.weight, 0.1, 0.2)
    return model


def ragged_rows() -> dict[str, Any]:
    """Rows of 1 to 8 tokens."""
    generator = torch.Generator().manual_seed(4)
    mask = (torch.arange(8) < torch.randint(1, 9, (ROWS, 1), generator=generator)).float()
    return {"tokens": torch.randint(0, 10, (ROWS, 8), generator=generator), "mask": mask}


EXACT = {"batch_norm": "exact"}
BY_ROW = {"dropout": "by_row"}
BFLOAT16 = {"sums": mb.Sums(dtype=torch.bfloat16), "microbatch_size": 1}


def programs() -> dict[str, Callable[[], Program]]:
    """Programs by name, made when they are asked for."""

    def planted(model: Callable[[], nn.Module], loss_fn: Callable[..., Any], **causes: str) -> Callable[[], Program]:
        return lambda: Program(model(), loss_fn, causes, batch())

    def ragged(model: Callable[[], nn.Module], loss_fn: Callable[..., Any]) -> Callable[[], Program]:
        return lambda: Program(model(), loss_fn, {}, batch(ROWS - 3))

    def low(loss_fn: Callable[..., Any], **causes: str) -> Callable[[], Program]:
        return lambda: Program(positive(), loss_fn, causes, narrow_sums(), dict(BFLOAT16))

    def norm() -> nn.Module:
        return network(nn.BatchNorm1d(8))

    def dropped(p: float = 0.3) -> nn.Module:
        return network(nn.Dropout(p), nn.Tanh(), nn.Dropout(p))

    return {
        # none
        "nothing, a mean over rows": ragged(network, squared),
        "nothing, a sum and its count": ragged(lambda: network(nn.LayerNorm(8)), counted),
        "nothing, batch normalisation in evaluation mode": ragged(lambda: norm().eval(), squared),
        "nothing, dropout in evaluation mode": ragged(lambda: dropped().eval(), squared),
        "nothing, a state that nobody reads": ragged(lambda: network(Counting()), squared),
        "nothing, float32 by force": ragged(lambda: network(Narrow()), squared),
        "nothing, rectifiers": ragged(lambda: network(nn.ReLU(), nn.Linear(8, 8), nn.ReLU()), squared),
        "nothing, bfloat16 added up in float32": lambda: Program(
            positive(), squared, {}, narrow_sums(), {"microbatch_size": 1}
        ),
        "nothing, ragged rows": lambda: Program(Padded(masked=True), padded, {}, ragged_rows(), {"lengths": "mask"}),
        "nothing, dropout by row": lambda: Program(dropped(), squared, {}, batch(ROWS - 3), dict(BY_ROW)),
        "nothing, exact batch statistics": lambda: Program(norm(), squared, {}, batch(ROWS - 3), dict(EXACT)),
        "nothing, exact batch statistics and coupled rows that are encoded first": lambda: Program(
            norm(), contrast, {}, batch(), {"encode": encoded, **EXACT}
        ),
        "nothing, a mean over the rows of the whole batch": lambda: Program(
            network(Centred(lambda x: mb.batch_mean(x.mean(0)))), squared, {}, batch(ROWS - 3), dict(EXACT)
        ),
        "nothing, coupled rows that are encoded first": lambda: Program(
            Temperature(), contrast, {}, batch(ROWS - 3), {"encode": encoded}
        ),
        # one
        "batch statistics": planted(norm, squared, batch_statistics="1"),
        "batch statistics by a function": planted(lambda: network(FunctionalNorm()), squared, batch_statistics="1"),
        "counts": planted(network, masked, counts="the loss"),
        "counts inside the model": planted(WithLoss, inside, counts="the loss"),
        "counts of one term": planted(network, two_terms, counts="tokens"),
        "counts, float32 by force": planted(lambda: network(Narrow()), masked, counts="the loss"),
        "a sum for a mean": planted(network, summed, counts="the loss"),
        "coupling in the loss": planted(Temperature, contrastive, coupling="the loss"),
        "coupling in the model": planted(lambda: network(Centred()), squared, coupling="1"),
        "dropout": planted(dropped, squared, randomness="1"),
        "random depth": planted(lambda: network(Skipping()), squared, randomness="random"),
        "state in a buffer": planted(lambda: network(Scaled()), squared, state="1.scale"),
        "state in an attribute": planted(lambda: network(Warming()), squared, state="1.step"),
        "row order in the loss": planted(network, placed, row_order="the loss"),
        "row order in the model": planted(lambda: network(Placed()), squared, row_order="1"),
        "padding that counts": lambda: Program(
            Padded(masked=False), padded, {"lengths": ""}, ragged_rows(), {"lengths": "mask"}
        ),
        "precision": low(squared, precision=""),
        "batch statistics, with coupled rows that are encoded first": lambda: Program(
            norm(), contrast, {"batch_statistics": "1"}, batch(), {"encode": encoded}
        ),
        "batch statistics, with dropout by row": lambda: Program(
            network(nn.BatchNorm1d(8), nn.Dropout(0.3), nn.Tanh(), nn.Dropout(0.3)),
            squared,
            {"batch_statistics": "1"},
            batch(),
            dict(BY_ROW),
        ),
        "counts and dropout, with exact batch statistics": lambda: Program(
            network(nn.BatchNorm1d(8), nn.Dropout(0.3), nn.Tanh(), nn.Dropout(0.3)),
            masked,
            {"counts": "the loss", "randomness": "2"},
            batch(),
            dict(EXACT),
        ),
        "batch statistics that were frozen": lambda: Program(
            norm(), squared, {"batch_statistics": "1"}, batch(), {"batch_norm": "frozen"}
        ),
        "coupling in the loss, with dropout by row": lambda: Program(
            dropped(0.5), contrastive, {"coupling": "the loss"}, batch(), dict(BY_ROW)
        ),
        "noise that masks by row do not reach": lambda: Program(
            network(Noisy()), squared, {"randomness": "1"}, batch(), dict(BY_ROW)
        ),
        # two
        "batch statistics and counts": planted(norm, masked, batch_statistics="1", counts="the loss"),
        "batch statistics and coupling": planted(norm, contrastive, batch_statistics="1", coupling="the loss"),
        "batch statistics and dropout": planted(
            lambda: network(nn.BatchNorm1d(8), nn.Dropout(0.3), nn.Tanh(), nn.Dropout(0.3)),
            squared,
            batch_statistics="1",
            randomness="2",
        ),
        "batch statistics and row order": planted(norm, placed, batch_statistics="1", row_order="the loss"),
        # A half is the default of what draws masks, and not among the arguments that it is seen with.
        "counts and dropout": planted(lambda: dropped(0.5), masked, counts="the loss", randomness="1"),
        "counts and state": planted(lambda: network(Scaled()), masked, counts="the loss", state="1.scale"),
        "counts and coupling, in two terms": planted(
            network, coupled_and_counted, counts="tokens", coupling="contrast"
        ),
        "counts and coupling in the model": planted(
            lambda: network(Centred()), masked, counts="the loss", coupling="1"
        ),
        "state and dropout": planted(
            lambda: network(Warming(), nn.Dropout(0.3), nn.Tanh(), nn.Dropout(0.3)),
            squared,
            state="1.step",
            randomness="2",
        ),
        "precision and a sum for a mean": low(summed, precision="", counts="the loss"),
    }
