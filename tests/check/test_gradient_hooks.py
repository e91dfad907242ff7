"""Hooks on gradients: carried to the copies that are checked, and named where they make a difference."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import microbatch as mb

SMALL = 0.002


def batch() -> dict[str, Tensor]:
    torch.manual_seed(0)
    return {"x": torch.randn(12, 5), "y": torch.randn(12, 1), "w": (torch.arange(12) % 5 < 2).float()}


class Clipped(nn.Module):
    """Clamp the gradient of an activation, as LSTMs with clipped cells do."""

    def forward(self, x: Tensor) -> Tensor:
        if x.requires_grad:
            x.register_hook(lambda gradient: gradient.clamp(-SMALL, SMALL))
        return x


def network(middle: nn.Module | None = None) -> Any:
    torch.manual_seed(1)
    return nn.Sequential(nn.Linear(5, 8), nn.Tanh(), middle or nn.Identity(), nn.Linear(8, 1))


def mean(model: nn.Module, batch: dict[str, Tensor]) -> Tensor:
    return F.mse_loss(model(batch["x"]), batch["y"])


def masked(model: nn.Module, batch: dict[str, Tensor]) -> mb.Loss:
    off = (model(batch["x"]) - batch["y"]).square().squeeze(1)
    return mb.Loss(sum=(off * batch["w"]).sum(), count=batch["w"].sum())


def counts(batch: dict[str, Tensor]) -> dict[str, Any]:
    return {"loss": batch["w"].sum()}


def found_in(model: nn.Module, loss_fn: Callable[..., Any], **more: Any) -> list[tuple[str, tuple[str, ...]]]:
    found = mb.check(model, loss_fn, batch(), microbatch_size=5, **more)
    assert found.ok == (not found.causes)
    return [(cause.kind, cause.where) for cause in found.causes]


@pytest.mark.parametrize(
    "hook", [lambda g: g.clamp(-SMALL, SMALL), lambda g: g + 1.0, lambda g: g / g.norm()], ids=["clamp", "add", "norm"]
)
def test_a_hook_on_a_weight_is_exact(hook: Callable[[Tensor], Tensor]) -> None:
    model = network()
    model[0].weight.register_hook(hook)
    before = model[0].weight._backward_hooks
    assert found_in(model, mean) == []
    assert model[0].weight._backward_hooks is before
    assert before is not None
    assert list(before.values()) == [hook]


def test_a_hook_that_multiplies_is_none() -> None:
    model = network()
    model[0].weight.register_hook(lambda gradient: gradient * torch.eye(8, 5, dtype=gradient.dtype))
    assert found_in(model, mean) == []


def test_a_hook_on_an_activation_depends_on_the_estimate_of_the_count() -> None:
    """With a plain mean, or with counts=, parts of the gradient are divided by the final count from the start."""
    model = network(Clipped())
    assert found_in(model, masked) == [("gradient_hooks", ("2",))]
    assert found_in(model, masked, counts=counts) == []
    assert found_in(model, mean) == []


def test_a_hook_on_a_module_is_named() -> None:
    model = network()
    model[3].register_full_backward_hook(lambda _module, inputs, _outputs: (inputs[0].clamp(-SMALL, SMALL),))
    assert found_in(model, masked) == [("gradient_hooks", ("3",))]
    assert len(model[3]._backward_hooks) == 1


def test_another_cause_beside_a_hook_is_told_apart() -> None:
    model = network(Clipped())
    found = found_in(model, lambda model, batch: masked(model, batch).mean)
    assert {kind for kind, _ in found} == {"gradient_hooks", "counts"}


def test_a_method_among_hooks_is_the_copys_own() -> None:
    """A hook that keeps something on its module keeps it on the copy."""

    class Keeping(nn.Linear):
        seen: Tensor | None = None

        def keep(self, gradient: Tensor) -> None:
            self.seen = gradient

    model = network()
    model[3] = Keeping(8, 1)
    keeping: Any = model[3]
    keeping.weight.register_hook(keeping.keep)
    assert found_in(model, mean) == []
    assert keeping.seen is None
