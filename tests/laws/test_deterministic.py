"""deterministic=True: the large batch's gradient as ever, added up in an order that is nobody's but the batch's."""

import random
from functools import partial
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from microbatch.errors import ConfigError, NonfiniteError, WindowError
from microbatch.loss.loss import Loss
from microbatch.step.accumulator import Accumulator
from microbatch.step.options import Ranks, Sums


def accumulator(model: nn.Module, **more: Any) -> tuple[Accumulator, list[dict[str, Tensor | None]]]:
    seen: list[dict[str, Tensor | None]] = []
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)

    def look(*_: object) -> None:
        grads = {name: parameter.grad for name, parameter in model.named_parameters()}
        seen.append({name: None if grad is None else grad.clone() for name, grad in grads.items()})

    optimizer.register_step_pre_hook(look)
    wanted: dict[str, Any] = {"ranks": Ranks(deterministic=True), "microbatch_size": 2, **more}
    return Accumulator(model, optimizer, **wanted), seen


@settings(max_examples=15)
@given(rows=st.integers(1, 13), size=st.integers(1, 5), seed=st.integers(0, 99))
def test_it_is_the_large_batchs_gradient(rows: int, size: int, seed: int) -> None:
    torch.manual_seed(seed)
    model = nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 2)).double()
    x, counted = torch.randn(rows, 3, dtype=torch.float64), torch.rand(rows) < 0.7
    counted[0] = True

    def loss_fn(model: nn.Module, microbatch: Any) -> Loss:
        each = model(microbatch[0]).square().sum(1)
        return Loss(sum=each[microbatch[1]].sum(), count=int(microbatch[1].sum()))

    expected = torch.autograd.grad(loss_fn(model, (x, counted)).mean, list(model.parameters()))
    made, seen = accumulator(model, microbatch_size=size)
    step = made.step((x, counted), loss_fn)
    for found, wanted in zip(seen[0].values(), expected, strict=True):
        assert found is not None
        assert (found - wanted).norm() <= 1e-12 * max(1.0, float(wanted.norm()))
    assert step.count == int(counted.sum())
    assert step.samples == rows


def test_random_numbers_are_the_microbatchs_own_and_leave_the_others_as_they_were() -> None:
    """A mask does not depend on what was drawn before it, and no stream moves."""
    masks: list[Tensor] = []

    def loss_fn(model: nn.Module, x: Tensor, *, more: int) -> Tensor:
        masks.append(nn.functional.dropout(torch.ones(9), 0.5) + random.random())  # noqa: S311 - a stream, no secret
        torch.rand(more)
        return model(x).mean()

    model = nn.Linear(3, 1)
    state, own = torch.get_rng_state(), random.getstate()
    for more in (0, 5):
        made, _ = accumulator(model)
        made.step(torch.randn(6, 3, generator=torch.Generator().manual_seed(0)), partial(loss_fn, more=more))
        assert torch.equal(torch.get_rng_state(), state)
        assert random.getstate() == own
    assert all(torch.equal(one, other) for one, other in zip(masks[:3], masks[3:], strict=True))
    assert not torch.equal(masks[0], masks[1])


def test_sums_of_narrow_gradients_are_wide_and_what_is_missing_is_nothing() -> None:
    model = nn.ModuleDict({"a": nn.Linear(1, 1, bias=False), "b": nn.Linear(1, 1, bias=False)}).to(torch.bfloat16)
    calls: list[int] = []

    def loss_fn(model: nn.Module, x: Tensor) -> Loss:
        calls.append(1)
        name = "a" if len(calls) < 257 else "b"
        assert isinstance(model, nn.ModuleDict)
        return Loss(sum=model[name](x).sum(), count=1)

    made, seen = accumulator(model, microbatch_size=1)
    step = made.step(torch.ones(258, 1, dtype=torch.bfloat16), loss_fn)
    assert step.count == 258
    # 256 and 2 of 258; in bfloat16 the first would be right by chance, and the wide sum is rounded once.
    assert float(seen[0]["a.weight"]) == float(torch.tensor(256 / 258, dtype=torch.bfloat16))  # type: ignore[arg-type]
    assert float(seen[0]["b.weight"]) == float(torch.tensor(2 / 258, dtype=torch.bfloat16))  # type: ignore[arg-type]


def test_a_window_that_fails_leaves_everything_as_it_was() -> None:
    model = nn.Linear(2, 1)
    made, _ = accumulator(model)
    x = torch.tensor([[1.0, 1.0]] * 3 + [[float("nan")] * 2])
    before, state = model.weight.detach().clone(), torch.get_rng_state()
    with pytest.raises(NonfiniteError):
        made.step(x, lambda model, x: model(x).mean())
    assert torch.equal(model.weight, before)
    assert model.weight.grad is None
    assert torch.equal(torch.get_rng_state(), state)
    assert made.step(x[:3], lambda model, x: model(x).mean()).applied


@pytest.mark.parametrize(
    ("more", "why"),
    [
        ({"microbatch_size": "auto"}, "a number"),
        ({"lengths": "mask"}, "lengths="),
        ({"compile": True}, "compile="),
        ({"sums": Sums(buffer="none")}, 'Sums\\(buffer="none"\\)'),
        ({"grad_scaler": torch.amp.GradScaler("cpu")}, "grad_scaler="),
        ({"sums": Sums(how="compensated", dtype=torch.bfloat16)}, 'Sums\\(how="compensated"\\)'),
    ],
)
def test_what_depends_on_the_share_is_refused(more: dict[str, Any], why: str) -> None:
    with pytest.raises(ConfigError, match=why):
        accumulator(nn.Linear(2, 1), **more)


def test_batch_statistics_are_refused_unless_frozen() -> None:
    model = nn.Sequential(nn.Linear(2, 2), nn.BatchNorm1d(2))
    with pytest.raises(ConfigError, match="batch_norm="):
        accumulator(model)
    made, _ = accumulator(model, batch_norm="frozen")
    assert made.step(torch.randn(4, 2), lambda model, x: model(x).square().mean()).applied


def test_what_has_no_number_is_refused() -> None:
    made, _ = accumulator(nn.Linear(2, 1))
    with pytest.raises(ConfigError, match="encode="):
        made.step(torch.ones(2, 2), lambda model, z: z.mean(), encode=lambda model, x: model(x))
    with pytest.raises(ConfigError, match=r"window\.split"):
        made.windows([torch.ones(2, 2)], microbatches=1)
    with pytest.raises(WindowError, match=r"what window\.split hands out"):
        hand_written(made, torch.ones(3, 2))


def hand_written(made: Accumulator, x: Tensor) -> None:
    with made.window() as window:
        for microbatch in window.split(x):
            window.backward(made.options.model(microbatch).mean())
        window.backward(made.options.model(x).mean(), count=len(x))
