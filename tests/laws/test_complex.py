"""Law P1 for complex weights: their gradients add up in a complex buffer, and a check compares both parts of them."""

import copy
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import microbatch as mb

from .reference import Batch, gradients_of, subject

ROUNDING = 1e-6


class Waves(nn.Module):
    """Multiply by complex weights, between layers of real ones."""

    def __init__(self, *, normed: bool = False) -> None:
        super().__init__()
        torch.manual_seed(1)
        self.first = nn.Linear(4, 6)
        self.norm = nn.BatchNorm1d(6) if normed else nn.Identity()
        self.turn = nn.Parameter(torch.randn(6, 6, dtype=torch.complex64))
        self.last = nn.Linear(6, 1)

    def forward(self, x: Tensor) -> Tensor:
        h = torch.tanh(self.norm(self.first(x))).to(self.turn.dtype) @ self.turn
        return self.last((h.real * h.imag).to(self.last.weight.dtype))


def batch() -> Batch:
    torch.manual_seed(0)
    return {"x": torch.randn(12, 4), "y": torch.randn(12, 1)}


def squared(model: nn.Module, batch: Batch) -> Tensor:
    return F.mse_loss(model(batch["x"]), batch["y"])


def masked(model: nn.Module, batch: Batch) -> Tensor:
    kept = (batch["x"][:, :1] > 0).to(batch["x"].dtype)
    return (model(batch["x"]) * kept).square().sum() / kept.sum()


def off(got: Tensor, wanted: Tensor) -> float:
    assert got.dtype == wanted.dtype
    return float((got - wanted).abs().max() / wanted.abs().max())


@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"sums": mb.Sums(dtype=torch.float64)},
        {"sums": mb.Sums(dtype=torch.float64), "max_grad_norm": 0.01},
        {"sums": mb.Sums(dtype=torch.bfloat16, how="compensated")},
        {"sums": mb.Sums(dtype=torch.float64), "ranks": mb.Ranks(deterministic=True)},
        {"sums": mb.Sums(dtype=torch.float64), "batch_norm": "exact"},
    ],
    ids=["own", "wide", "clipped", "compensated", "deterministic", "exact"],
)
def test_complex_gradients_add_up(settings: dict[str, Any]) -> None:
    model = Waves(normed=settings.get("batch_norm") == "exact")
    whole = copy.deepcopy(model)
    squared(whole, batch()).backward()
    norm = torch.nn.utils.clip_grad_norm_(whole.parameters(), settings.get("max_grad_norm", float("inf")))
    it = subject(model, size=5, **settings)
    step = it.accumulator.step(batch(), squared)
    for name, wanted in gradients_of(whole).items():
        if name != "first.bias" or "batch_norm" not in settings:  # which a normalisation makes 0
            assert off(it.updates[-1][name], wanted) <= ROUNDING
    assert float(step.grad_norm) == pytest.approx(float(norm), rel=ROUNDING)


def test_a_wide_buffer_keeps_what_the_weights_own_precision_loses() -> None:
    """The negative control: many small parts beside a large one vanish where they add up in complex64."""

    def loss_fn(model: Any, batch: Batch) -> Tensor:
        return (model.turn.imag * batch["x"][:, :1].sum()).sum() / len(batch["x"])

    many = {"x": torch.full((512, 1), 1e-3)}
    many["x"][0] = 3e4
    wanted = float(many["x"].double().sum() / 512)
    errors: list[float] = []
    for dtype in (torch.float32, torch.float64):
        it = subject(Waves(), size=1, sums=mb.Sums(dtype=dtype))
        it.accumulator.step(many, loss_fn)
        errors.append(abs(float(it.updates[-1]["turn"].imag.mean()) / wanted - 1))
    assert errors[1] < 1e-7
    assert errors[0] > 1e-6


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_a_check_compares_both_parts(dtype: torch.dtype) -> None:
    good = mb.check(Waves(), squared, batch(), microbatch_size=5, sums=mb.Sums(dtype=dtype))
    assert good.ok
    assert good.notes == ()
    assert good.yardstick == "float64"
    bad = mb.check(Waves(), masked, batch(), microbatch_size=5, sums=mb.Sums(dtype=dtype))
    assert [cause.kind for cause in bad.causes] == ["counts"]


def test_a_check_sees_an_error_in_the_imaginary_part_alone() -> None:
    """The negative control: a loss whose gradient is imaginary, and whose counts are wrong."""

    def imaginary(model: Any, batch: Batch) -> Tensor:
        kept = (batch["x"][:, :1] > 0).to(batch["x"].dtype)
        return ((batch["x"] @ model.turn.imag[:4]).square() * kept).sum() / kept.sum()

    found = mb.check(Waves(), imaginary, batch(), microbatch_size=5)
    assert [cause.kind for cause in found.causes] == ["counts"]
