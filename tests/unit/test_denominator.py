"""Whatever scale the backwards ran at, the finished gradient is that of the terms' means."""

from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn

from microbatch.loss.loss import Loss
from microbatch.step.accumulator import Accumulator

DTYPES = [torch.float64, torch.float32, torch.bfloat16]


def finished(model: nn.Module, batch: Tensor, loss_fn: Any, *, microbatch_size: int) -> Tensor:
    """Return the gradient that the optimizer sees."""
    optimizer = torch.optim.SGD(model.parameters(), lr=0.0)
    seen: list[Tensor] = []

    def look(*_: object) -> None:
        seen.extend(p.grad.clone() for p in model.parameters() if p.grad is not None)

    optimizer.register_step_pre_hook(look)
    Accumulator(model, optimizer, microbatch_size=microbatch_size).step(batch, loss_fn)
    return seen[0]


@pytest.mark.parametrize("first", DTYPES)
@pytest.mark.parametrize("second", DTYPES)
@given(rows=st.integers(1, 12), size=st.integers(1, 6))
def test_terms_of_any_two_dtypes(first: torch.dtype, second: torch.dtype, rows: int, size: int) -> None:
    model = nn.Linear(2, 2, bias=False)
    batch = torch.ones(rows, 2)  # in bf16 too every product here is exact, and every mean

    def terms(model: nn.Module, x: Tensor) -> dict[str, Tensor]:
        y = model(x)
        return {"a": y[:, 0].to(first).mean(), "b": y[:, 1].to(second).mean()}

    def whole(model: nn.Module, x: Tensor) -> Tensor:
        return model(x).mean(0).sum()

    whole(model, batch).backward()
    theirs = model.weight.grad
    assert theirs is not None
    # Far more than bf16's rounding of the seeds, and far less than a wrong denominator.
    torch.testing.assert_close(finished(model, batch, terms, microbatch_size=size), theirs, rtol=0.02, atol=0)


def counted(model: nn.Module, x: Tensor) -> Loss:
    return Loss(sum=model(x).sum(), count=len(x))


def test_a_sum_whose_count_nobody_knew_beforehand() -> None:
    model = nn.Linear(2, 1, bias=False)
    batch = torch.ones(6, 2)
    ours = finished(model, batch, counted, microbatch_size=4)
    assert torch.equal(ours, torch.ones(1, 2))
