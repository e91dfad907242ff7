"""What an engine of others is given: shares of one denominator, and as many passes on every rank."""

import sys
from types import ModuleType
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn

from microbatch.engines.deepspeed import DeepSpeed
from microbatch.engines.engine_denominator import EngineDenominator, engine_loss, graphs_of, silent_loss
from microbatch.errors import ConfigError, CountError, EmptyBatchError, MissingCountError, UnknownTermError
from microbatch.loss.loss import Loss, shares_of


def expecting(counts: dict[str, float] | None, *, rows: int = 1) -> EngineDenominator:
    denominator = EngineDenominator(counts)
    denominator.expect([{}], rows, begun=False, total=lambda own, counted: (own, counted))
    return denominator


def given_to_the_engine(said: object, denominator: EngineDenominator, *, divisor: int = 1, rows: int = 1) -> Tensor:
    shares = shares_of(said, rows=rows)
    return engine_loss([share.value for share in shares], denominator.seeds(shares), divisor=divisor)


@given(
    counts=st.lists(st.lists(st.integers(0, 5), min_size=0, max_size=4), min_size=1, max_size=4),
    divisor=st.integers(1, 4),
)
def test_the_mean_of_what_ranks_are_given_is_the_whole_batchs_loss(counts: list[list[int]], divisor: int) -> None:
    total, rows = sum(map(sum, counts)), sum(map(len, counts))
    if not total:
        return
    weight = torch.ones((), dtype=torch.float64, requires_grad=True)
    added = torch.zeros((), dtype=torch.float64)
    whole = weight * 0
    for rank, each in enumerate(counts):
        denominator = expecting({"tokens": float(total)}, rows=rows)
        for index, count in enumerate(each):
            tokens = weight * float(10 * rank + index) * count
            mean = weight**2 * (index + 1)
            said = {"tokens": Loss(sum=tokens, count=torch.tensor(count)), "samples": mean}
            added = added + given_to_the_engine(said, denominator, divisor=divisor)
            whole = whole + tokens / total + mean / rows
    got, want = (torch.autograd.grad(loss, weight, retain_graph=True)[0] for loss in (added, whole))
    assert float(got) / divisor == pytest.approx(float(want), rel=1e-12)


def test_a_term_that_nobody_declared_is_refused() -> None:
    loss = Loss(sum=torch.ones((), requires_grad=True), count=2)
    with pytest.raises(UnknownTermError, match="'router'"):
        given_to_the_engine({"router": loss}, expecting({"tokens": 2.0}))


def test_a_count_that_nobody_declared_is_refused_before_its_backward() -> None:
    loss = Loss(sum=torch.ones((), requires_grad=True), count=2)
    with pytest.raises(MissingCountError, match="Pass counts="):
        given_to_the_engine(loss, expecting(None))


def test_a_mean_is_over_all_rows_or_refused() -> None:
    denominator = expecting(None, rows=4)
    loss = torch.ones((), requires_grad=True)
    assert given_to_the_engine(loss, denominator, rows=3).item() == 0.75
    assert denominator.means
    assert denominator.factor({"loss": 4.0}) == 1.0
    with pytest.raises(MissingCountError, match="3 of 4 contributed"):
        denominator.factor({"loss": 3.0})
    with pytest.raises(CountError):
        denominator.factor({"loss": 5.0})
    with pytest.raises(EmptyBatchError, match="on every rank"):
        expecting(None, rows=0)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_narrow_losses_are_divided_in_float32(dtype: torch.dtype) -> None:
    denominator = expecting({"loss": 3e6})  # 1 / 3e6 is a subnormal number in float16
    loss = torch.tensor(30.0, dtype=dtype, requires_grad=True)
    got = given_to_the_engine(Loss(sum=loss, count=1), denominator)
    assert got.dtype == torch.float32
    assert got.item() == pytest.approx(1e-5, rel=1e-6)


def test_a_silent_loss_has_a_gradient_of_zero_where_the_loss_itself_has_none() -> None:
    model = nn.Linear(3, 4)
    y = model(torch.randn(2, 3))
    loss = F.cross_entropy(y, torch.full((2,), -100))  # a mean of nothing
    assert loss.isnan()
    silent = silent_loss(graphs_of({"logits": y, "name": "a model's"}), loss)
    assert silent is not None
    silent.backward()
    assert all(torch.equal(p.grad, torch.zeros_like(p)) for p in model.parameters() if p.grad is not None)
    assert all(p.grad is not None for p in model.parameters())


def test_a_silent_loss_needs_a_graph() -> None:
    assert silent_loss([], None) is None
    assert silent_loss([torch.ones(2)], Loss(sum=torch.ones(()), count=0)) is None
    weight = torch.ones((), requires_grad=True)
    silent = silent_loss([], {"a": Loss(sum=weight * 2, count=0), "b": None})
    assert silent is not None
    assert silent.requires_grad


def test_what_is_no_engine_is_refused_whether_or_not_deepspeed_is_there(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delitem(sys.modules, "deepspeed", raising=False)
    with pytest.raises(ConfigError, match=r"deepspeed\.initialize\(\.\.\.\) returned first, not a Linear"):
        DeepSpeed(nn.Linear(1, 1))
    imported: Any = ModuleType("deepspeed")
    imported.DeepSpeedEngine = nn.Bilinear
    monkeypatch.setitem(sys.modules, "deepspeed", imported)
    with pytest.raises(ConfigError, match="not a Linear"):
        DeepSpeed(nn.Linear(1, 1))
