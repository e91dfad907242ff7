"""Take the plain optimizers out of what other libraries wrap around them, and check what they step."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import Tensor, nn
from torch.nn.parameter import is_lazy
from torch.optim import LBFGS, Optimizer
from torch.optim.lr_scheduler import LRScheduler

from microbatch.arguments import attribute, listed_of
from microbatch.errors import ConfigError
from microbatch.kind_words import kind_of

_DEPTH = 8  # wrappers around wrappers
_REFUSED = (
    "optimizer must be a torch.optim.Optimizer, several of them in a list, or None for gradients without a step, not "
    "{}; if it wraps an optimizer, pass the optimizer inside"
)


def plain_optimizers(given: object) -> list[Optimizer]:
    """List one optimizer or several, each without the wrappers of other libraries.

    A wrapper, such as the one of Accelerate, counts microbatches and skips steps by itself. A window does this already,
    and calls the optimizer once.

    Args:
        given: An optimizer, several of them, or `None` for none.

    Returns:
        The optimizers.

    Raises:
        ConfigError: Something else was given.
    """
    if given is None:
        return []
    if _is_one(given):
        return [_plain(given)]
    listed = None if isinstance(given, str | bytes | Tensor) else listed_of(given)
    if listed is None:
        raise ConfigError(_REFUSED.format(kind_of(given)))
    return [_plain(each) for each in listed]


def check_optimizers(model: nn.Module, optimizers: Sequence[Optimizer]) -> None:
    """Check that the optimizers step once in a window, parameters of this model, and each of them once.

    Args:
        model: The model.
        optimizers: The optimizers.

    Raises:
        ConfigError: They do not.
    """
    if any(isinstance(each, LBFGS) for each in optimizers):
        raise ConfigError(
            "LBFGS changes the weights several times within one step, and a window needs constant weights: create "
            "mb.Accumulator(model) without an optimizer, and call accumulator.gradient(batch, loss_fn) in the closure "
            "of LBFGS.step"
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


def _plain(given: Any) -> Optimizer:
    if isinstance(given, LRScheduler):
        raise ConfigError(
            f"optimizer is the scheduler {type(given).__name__}; pass its optimizer, and call scheduler.step() "
            "yourself after each step"
        )
    inner = given
    for _ in range(_DEPTH):
        # A wrapper may only look like an optimizer: one that was never initialised has no hooks.
        if isinstance(inner, Optimizer) and "_optimizer_step_pre_hooks" in vars(inner):
            return inner
        inner = attribute(inner, "optimizer")
    raise ConfigError(_REFUSED.format(kind_of(given)))


def _is_one(given: object) -> bool:
    return isinstance(given, Optimizer | LRScheduler) or attribute(given, "optimizer") is not None
