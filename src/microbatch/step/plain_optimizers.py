"""Take the plain optimizers out of what other libraries wrap around them, and check what they step."""

from __future__ import annotations

import inspect
from collections.abc import Sequence
from typing import Any

from torch import Tensor, nn
from torch.nn.parameter import is_lazy
from torch.optim import LBFGS, Optimizer
from torch.optim.lr_scheduler import LRScheduler

from microbatch.arguments import attribute, listed_of
from microbatch.errors import ConfigError
from microbatch.kind_words import kind_of, with_article

_DEPTH = 8  # wrappers around wrappers
_SCALE_OR_PLACE = frozenset(
    {  # the classes whose step() scales, synchronises or places, and adds nothing to the update
        "accelerate.optimizer.AcceleratedOptimizer",
        "lightning.fabric.wrappers._FabricOptimizer",
        "lightning_fabric.wrappers._FabricOptimizer",
        "lightning.pytorch.core.optimizer.LightningOptimizer",
        "pytorch_lightning.core.optimizer.LightningOptimizer",
    }
)
_REFUSED = (
    "optimizer must be a torch.optim.Optimizer, several of them in a list, or None for gradients without a step, not "
)


def plain_optimizers(given: object) -> list[Optimizer]:
    """List one optimizer or several, each without the wrappers of Accelerate, Fabric and Lightning.

    These wrappers scale, synchronise and skip steps by themselves. A window does this already, and calls the optimizer
    once. The ``step`` of any other wrapper may change the update, so such a wrapper is refused.

    Args:
        given: An optimizer, several of them, or `None` for none.

    Returns:
        The optimizers.

    Raises:
        ConfigError: Something else was given, or another wrapper.
    """
    if given is None:
        return []
    if isinstance(given, Optimizer) or _wrapped(given) is not None:
        return [_plain(given)]
    listed = None if isinstance(given, str | bytes | Tensor) else listed_of(given)
    if listed is None:
        raise ConfigError(_words(given))
    return [_plain(each) for each in listed]


def check_optimizers(model: nn.Module, optimizers: Sequence[Optimizer]) -> None:
    """Check that the optimizers step once in a window, parameters of this model, and each of them once."""
    if any(isinstance(each, LBFGS) for each in optimizers):
        raise ConfigError(
            "LBFGS changes the weights several times within one step, and a window needs constant weights: create "
            "mb.Accumulator(model) without an optimizer, and call accumulator.gradient(batch, loss_fn) in the closure "
            "of LBFGS.step"
        )
    for each in optimizers:
        name = type(each).__name__
        if _needs_closure(each):
            raise ConfigError(
                f"{name}.step() needs a closure, which computes gradients in the step: create mb.Accumulator(model) "
                "without an optimizer, and call accumulator.gradient(batch, loss_fn) in the closure"
            )
        if any(group.get("differentiable") for group in each.param_groups):
            raise ConfigError(
                f"{name} was made with differentiable=True, so its step is part of a graph, and weights that require "
                "a gradient cannot be written to: leave differentiable= out"
            )
    for name, parameter in model.named_parameters():
        if is_lazy(parameter):
            raise ConfigError(
                f"{name!r} has no shape yet, because its layer is lazy: run the model once on a few rows before the "
                "optimizer and the accumulator are created"
            )
        if parameter.is_inference():
            raise ConfigError(
                f"{name!r} was made inside torch.inference_mode(), so it cannot be trained; make the model outside"
            )
    stepped: dict[int, int] = {}
    for index, optimizer in enumerate(optimizers):
        for parameter in (each for group in optimizer.param_groups for each in group["params"]):
            if stepped.setdefault(id(parameter), index) != index:
                name = next((n for n, each in model.named_parameters() if each is parameter), "a parameter")
                raise ConfigError(
                    f"{name!r} is in two optimizers ({stepped[id(parameter)]} and {index} of the list), so every "
                    "step would update it twice; give each parameter to one optimizer"
                )
    own = {id(each): name for name, each in model.named_parameters() if each.requires_grad}
    if optimizers and own and not own.keys() & stepped.keys():
        raise ConfigError(
            f"the optimizer holds none of the model's {len(own)} trainable parameters (the first is "
            f"{next(iter(own.values()))!r}), so a step would change nothing. Create it from model.parameters(), "
            "after the last change to the model's layers (such as LoRA or a move to another device)"
        )


def _needs_closure(optimizer: Optimizer) -> bool:
    """Return whether an optimizer's step has an argument that must be given."""
    try:
        asked = inspect.signature(optimizer.step).parameters.values()
    except (TypeError, ValueError):  # not written in Python
        return False
    # A scheduler wraps the method, and the signature is then that of the function, with self.
    needed = [each for each in asked if each.default is each.empty and each.kind is each.POSITIONAL_OR_KEYWORD]
    return any(each.name != "self" for each in needed)


def _plain(given: Any) -> Optimizer:
    inner = given
    for _ in range(_DEPTH):
        if isinstance(inner, LRScheduler) or hasattr(inner, "get_last_lr"):
            raise ConfigError(
                f"optimizer is the scheduler {type(inner).__name__}; pass its optimizer, and call scheduler.step() "
                "yourself after each step"
            )
        # A wrapper may only look like an optimizer: one that was never initialised has no hooks.
        if isinstance(inner, Optimizer) and "_optimizer_step_pre_hooks" in vars(inner):
            return inner
        if not _only_scales(inner):
            break
        inner = _wrapped(inner)
    raise ConfigError(_words(given if inner is None else inner))


def _words(given: object) -> str:
    """Return the words about an object that is no optimizer, or a wrapper whose `step` may change the update."""
    name, inner = type(given).__name__, _wrapped(given)
    if "deepspeed" in type(given).__module__.split("."):
        return f"optimizer is {with_article(name)}, which the engine of DeepSpeed steps: use mb.DeepSpeed(engine)"
    if not isinstance(inner, Optimizer | LRScheduler):
        return f"{_REFUSED}{kind_of(given)}; if it wraps an optimizer, pass the optimizer inside"
    return (
        f"optimizer is {with_article(name)} around {with_article(type(inner).__name__)}. A window calls the step of "
        f"a torch.optim.Optimizer itself, so that {name}.step() would never run. Keep the wrapper, and take the step "
        "yourself: accumulator = mb.Accumulator(model), and for each batch accumulator.gradient(batch, loss_fn), then "
        f"wrapper.step(). If {name} changes nothing about the update, pass the optimizer inside"
    )


def _wrapped(given: object) -> object:
    """Return the optimizer or scheduler that an object holds as an attribute; `None` for none."""
    found = attribute(given, "optimizer")
    own = [] if isinstance(given, type | nn.Module) else list(attribute(given, "__dict__", {}).values())
    return found or next((each for each in own if isinstance(each, Optimizer | LRScheduler)), None)


def _only_scales(given: object) -> bool:
    """Return whether the class that defines the object's `step` is known to leave the update as it is."""
    owner = next((kind for kind in type(given).__mro__ if "step" in vars(kind)), object)
    return f"{owner.__module__}.{owner.__qualname__}" in _SCALE_OR_PLACE
