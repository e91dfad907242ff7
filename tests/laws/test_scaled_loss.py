"""A loss that the user's own GradScaler has scaled is refused, and a loss with any other factor is not."""

import gc
import math
import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import microbatch as mb
from microbatch.errors import LossError

X = torch.randn(6, 4, generator=torch.Generator().manual_seed(0))
Y = torch.tensor([0, 1, 2, 0, 1, 2])
BATCH = {"x": X, "y": Y}


def network() -> nn.Linear:
    torch.manual_seed(1)
    return nn.Linear(4, 3)


def accumulator(model: nn.Module, **options: Any) -> mb.Accumulator:
    return mb.Accumulator(model, torch.optim.SGD(model.parameters(), lr=0.1), microbatch_size=2, **options)


def mean(model: nn.Module, batch: Any) -> Tensor:
    return F.cross_entropy(model(batch["x"]), batch["y"])


def full_batch() -> Tensor:
    model = network()
    mean(model, BATCH).backward()
    assert model.weight.grad is not None
    return model.weight.grad


SCALED: dict[str, Callable[[Any, Tensor, int], Any]] = {
    "as it is": lambda scale, loss, rows: scale(loss),
    "divided after": lambda scale, loss, rows: scale(loss) / 3,
    "weighted before and after": lambda scale, loss, rows: 0.5 * scale(loss * torch.tensor(2.0)),
    "a sum": lambda scale, loss, rows: mb.Loss(sum=scale(loss * rows), count=rows),
    "one of two terms": lambda scale, loss, rows: scale(loss) + 0.1 * loss,
    "each row": lambda scale, loss, rows: scale(loss.expand(rows)).mean(),
}


@pytest.mark.parametrize("how", SCALED)
@pytest.mark.parametrize("given", [False, True])
def test_a_loss_that_a_scaler_has_scaled_is_refused_and_nothing_changes(how: str, *, given: bool) -> None:
    model, scaler = network(), torch.amp.GradScaler("cpu")
    it = accumulator(model, grad_scaler=scaler) if given else accumulator(model)
    before = model.weight.detach().clone()
    with pytest.raises(LossError, match=r"multiplied it by 65536.*Return the loss without scaler\.scale") as caught:
        it.step(BATCH, lambda model, batch: SCALED[how](scaler.scale, mean(model, batch), len(batch["y"])))
    assert ("grad_scaler=scaler" in str(caught.value)) is not given
    assert torch.equal(model.weight, before)
    assert model.weight.grad is None
    it.step(BATCH, mean)  # what the text asks for


def test_a_hand_written_loop_is_refused_too() -> None:
    model, scaler = network(), torch.amp.GradScaler("cpu", init_scale=3.0)

    def loop() -> None:
        with accumulator(model).window() as window:
            for microbatch in window.split(BATCH):
                window.backward(scaler.scale(mean(model, microbatch)))

    with pytest.raises(LossError, match="by 3,"):
        loop()


def test_a_list_that_a_scaler_has_scaled_is_warned_of_once() -> None:
    model, scaler = network(), torch.amp.GradScaler("cpu")
    it = accumulator(model)

    def twice(model: nn.Module, batch: Any) -> Tensor:
        return torch.stack(list(scaler.scale([mean(model, batch), mean(model, batch)]))).sum()

    with pytest.warns(mb.MicrobatchWarning, match="probably scaled already"):
        it.step(BATCH, twice)
    it.step(BATCH, twice)  # pytest turns a second warning into an error


def test_a_gradient_that_the_caller_unscales_is_the_full_batchs() -> None:
    model, scaler = network(), torch.amp.GradScaler("cpu")
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    it = mb.Accumulator(model, optimizer, microbatch_size=2)
    it.gradient(BATCH, lambda model, batch: scaler.scale(mean(model, batch)))
    scaler.unscale_(optimizer)
    assert model.weight.grad is not None
    torch.testing.assert_close(model.weight.grad, full_batch())


class Named(torch.autograd.Function):
    """A loss of the user's own, which keeps a value called `name`, as torch's nodes call their method."""

    @staticmethod
    def forward(ctx: Any, loss: Tensor) -> Tensor:
        ctx.name = "mine"
        return loss.clone()

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Tensor:
        assert ctx.name == "mine"
        return grads[0]


SILENT: dict[str, Callable[[Tensor], Tensor]] = {
    "a half": lambda loss: loss * 0.5,
    "two": lambda loss: 2 * loss,
    "a large number": lambda loss: loss * 65536.0,
    "a weight": lambda loss: loss * torch.tensor(2.0),
    "a weight of one element": lambda loss: (loss * torch.tensor([8192.0])).sum(),
    "a learnt temperature": lambda loss: loss * nn.Parameter(torch.tensor(math.log(100.0))).exp(),
    "a share": lambda loss: loss / 4,
    "a function of the user's": lambda loss: Named.apply(loss) * 2,
    "a bare function of the user's": Named.apply,
    "a scaler that is off": torch.amp.GradScaler("cpu", enabled=False).scale,
}


@pytest.mark.parametrize("how", SILENT)
@pytest.mark.parametrize("given", [False, True])
def test_other_factors_are_silent(how: str, *, given: bool) -> None:
    model, scaler = network(), torch.amp.GradScaler("cpu", init_scale=1024.0)
    scaler.scale(X)  # makes its scale
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        it = accumulator(model, grad_scaler=scaler) if given else accumulator(model)
        it.step(BATCH, lambda model, batch: SILENT[how](mean(model, batch)))


def test_the_process_is_searched_for_scalers_in_few_windows_only(monkeypatch: pytest.MonkeyPatch) -> None:
    searches: list[int] = []
    find = gc.get_referrers
    monkeypatch.setattr(gc, "get_referrers", lambda *kinds: searches.append(1) or find(*kinds))
    for weight, most in ((torch.tensor(2.0), 2), (2.0, 0)):
        searches.clear()
        it = accumulator(network())
        for _ in range(4):
            it.step(BATCH, lambda model, batch, weight=weight: mean(model, batch) * weight)
        assert len(searches) == most
