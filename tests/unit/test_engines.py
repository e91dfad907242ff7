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
from microbatch.engines.engine_passes import Passes, engine_loss, graphs_of, silent_loss
from microbatch.errors import ConfigError, UnknownTermError
from microbatch.loss.loss import Loss, shares_of
from microbatch.step.denominator import Denominator

CPU = torch.device("cpu")


def declared(counts: dict[str, float], *, rows: int = 0) -> Denominator:
    denominator = Denominator()
    denominator.declare(rows, counts)
    return denominator


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
        denominator = declared({"tokens": float(total)}, rows=rows)
        for index, count in enumerate(each):
            tokens = weight * float(10 * rank + index) * count
            mean = weight**2 * (index + 1)
            said = {"tokens": Loss(sum=tokens, count=torch.tensor(count)), "samples": mean}
            added = added + engine_loss(shares_of(said, rows=1), denominator, divisor=divisor)
            whole = whole + tokens / total + mean / rows
    got, want = (torch.autograd.grad(loss, weight, retain_graph=True)[0] for loss in (added, whole))
    assert float(got) / divisor == pytest.approx(float(want), rel=1e-12)


def test_a_term_that_nobody_declared_is_refused() -> None:
    loss = Loss(sum=torch.ones((), requires_grad=True), count=2)
    with pytest.raises(UnknownTermError, match="'router'"):
        engine_loss(shares_of({"router": loss}, rows=2), declared({"tokens": 2.0}), divisor=1)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_narrow_losses_are_divided_in_float32(dtype: torch.dtype) -> None:
    denominator = declared({"loss": 3e6})  # 1 / 3e6 is a subnormal number in float16
    loss = torch.tensor(30.0, dtype=dtype, requires_grad=True)
    got = engine_loss(shares_of(Loss(sum=loss, count=1), rows=1), denominator, divisor=1)
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


@given(rows=st.integers(1, 9), size=st.integers(1, 4), more=st.integers(0, 3))
def test_every_row_is_in_one_pass_and_fillers_count_for_nothing(rows: int, size: int, more: int) -> None:
    own = Passes.agree(None, torch.arange(rows), size=size, together=True)
    passes = Passes(own.batch, size, own.planned + more)
    handed: list[tuple[int, Tensor]] = list(passes.microbatches(CPU))
    assert torch.equal(torch.cat([piece for _, piece in handed]), torch.arange(rows))
    assert [number for number, _ in handed] == [len(piece) for _, piece in handed]
    assert len(handed) == passes.own == own.planned
    count, few = passes.filler(CPU)
    assert count == 0
    assert 1 <= len(few) <= 2


def test_a_rank_without_rows_runs_what_it_was_lent() -> None:
    passes = Passes(torch.zeros(0, 3), 2, 3, lent=torch.ones(2, 3))
    assert list(passes.microbatches(CPU)) == []
    count, few = passes.filler(CPU)
    assert (count, few.shape) == (0, (2, 3))


def test_what_is_no_engine_is_refused_whether_or_not_deepspeed_is_there(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delitem(sys.modules, "deepspeed", raising=False)
    with pytest.raises(ConfigError, match=r"deepspeed\.initialize\(\.\.\.\) returned first, not a Linear"):
        DeepSpeed(nn.Linear(1, 1))
    imported: Any = ModuleType("deepspeed")
    imported.DeepSpeedEngine = nn.Bilinear
    monkeypatch.setitem(sys.modules, "deepspeed", imported)
    with pytest.raises(ConfigError, match="not a Linear"):
        DeepSpeed(nn.Linear(1, 1))
