"""Hooks of the user's on gradients: carried to copies, found, and switched off."""

from __future__ import annotations

import copy
from collections import OrderedDict
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils.hooks import RemovableHandle

from microbatch.memory.module_of_op import Where
from microbatch.step.parts.weight_hooks import comes_from

_OF_MODULES = ("_backward_hooks", "_backward_pre_hooks")


def carry_hooks(model: nn.Module, memo: dict[int, Any]) -> None:
    """Register the hooks of a model's parameters on the copies of these parameters, which `copy.deepcopy` leaves out.

    Hooks that run after a gradient is accumulated are left out: they may step an optimizer of the user's.

    Args:
        model: The user's own.
        memo: Of the copy, by the original's identity.
    """
    for parameter in model.parameters():
        for hook in _hooks(parameter).values():
            memo[id(parameter)].register_hook(copy.deepcopy(hook, memo))


def remove_hooks(model: nn.Module) -> None:
    """Remove the hooks on gradients of a copy's parameters and modules.

    Args:
        model: The copy.
    """
    for parameter in model.parameters():
        _hooks(parameter).clear()
    for module in model.modules():
        for name in _OF_MODULES:
            getattr(module, name, {}).clear()


def hooked(model: nn.Module) -> list[str]:
    """List the parameters and modules that have hooks on gradients.

    Args:
        model: A copy, with its hooks.

    Returns:
        Paths, in the model's order.
    """
    found = [path for path, module in model.named_modules() if any(getattr(module, name, {}) for name in _OF_MODULES)]
    return found + [name for name, parameter in model.named_parameters() if _hooks(parameter)]


class Unhooked(TorchFunctionMode):
    """Ignore the hooks that a forward pass registers on tensors, and write down where it does.

    Args:
        where: Which module runs.

    Attributes:
        seen: The modules; ``"the loss or the model itself"`` for what is outside of all submodules.
    """

    def __init__(self, where: Where) -> None:
        super().__init__()
        self.seen: dict[str, None] = {}
        self._where = where

    def __torch_function__(  # noqa: PLR0917 - torch calls it by position
        self, func: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        """Return a handle of nothing where a hook would be registered; run every other call."""
        if func is not Tensor.register_hook or comes_from(args[1], "microbatch.") or torch.compiler.is_compiling():
            return func(*args, **(kwargs or {}))
        self.seen[self._where.here()[0] or "the loss or the model itself"] = None
        return RemovableHandle(OrderedDict[int, Any]())


def _hooks(tensor: Tensor) -> dict[int, Any]:
    found: dict[int, Any] | None = tensor._backward_hooks
    return {} if found is None else found
