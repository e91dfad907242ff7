"""The trainable parameters of a window, with the names that error messages use."""

from __future__ import annotations

import operator
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import chain
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

_VALUES = operator.methodcaller("values")


@dataclass(slots=True)  # not frozen: one is made for every parameter and window
class Named:
    """A trainable parameter and its name in error messages.

    Attributes:
        name: The name.
        parameter: The parameter.
        held: Whether an optimizer steps it, or there is no optimizer.
    """

    name: str
    parameter: nn.Parameter | Tensor
    held: bool = True


@dataclass(slots=True)
class Frozen:
    """A parameter without ``requires_grad``, and the module that holds it under a name."""

    module: nn.Module
    name: str
    parameter: Tensor


def first_parameter(model: nn.Module) -> nn.Parameter | None:
    """Return what ``next(model.parameters(), None)`` returns, without the generators of a walk over all modules."""
    for parameter in model._parameters.values():  # pyright: ignore[reportPrivateUsage]
        if parameter is not None:
            return parameter
    for child in model._modules.values():  # pyright: ignore[reportPrivateUsage]
        if child is not None and (found := first_parameter(child)) is not None:
            return found
    return None


def device_of(model: nn.Module) -> torch.device:
    """Return the device of a model's first parameter; the CPU for a model without parameters."""
    first = first_parameter(model)
    return torch.device("cpu") if first is None else first.device


class Trainable:
    """List the trainable parameters of each window, again only where something has changed since the last one.

    Attributes:
        frozen: Each parameter of the modules without ``requires_grad``, once.
    """

    def __init__(self) -> None:
        self._seen: list[object] = []
        self._named: list[Named] = []
        self._tables: list[Any] = []
        self._entries: list[object] = []
        self._by_name: dict[str, nn.Parameter] = {}
        self.frozen: list[Frozen] = []

    def __call__(
        self, model: nn.Module, optimizers: Iterable[Optimizer], modules: Iterable[nn.Module]
    ) -> Sequence[Named]:
        """Return what `trainable` returns; ``modules`` are the model's, of which a window has a list already."""
        # All that the list depends on, as objects to compare by identity: names, modules, parameters, and whether each
        # is trained.
        found: list[Any] = [
            each for optimizer in optimizers for group in optimizer.param_groups for each in group["params"]
        ]
        seen: list[object] = []
        for module in modules:
            own: Any = module._parameters  # pyright: ignore[reportPrivateUsage]
            found += own.values()
            seen.append(module)
            seen += own.keys()
            seen += module._modules.keys()  # pyright: ignore[reportPrivateUsage]
        seen += found
        seen += [None if each is None else each.requires_grad for each in found]
        if len(seen) != len(self._seen) or not all(map(operator.is_, seen, self._seen)):
            self._seen, self._named = seen, trainable(model, optimizers)
            self._by_name = dict(model.named_parameters(remove_duplicate=False))
            self._list(modules)
        return self._named

    def _list(self, modules: Iterable[nn.Module]) -> None:
        frozen: dict[int, Frozen] = {}
        self._tables = []
        for module in modules:
            own: Any = module._parameters  # pyright: ignore[reportPrivateUsage]
            self._tables += [each for each in (own, module._modules) if each]  # pyright: ignore[reportPrivateUsage]
            for name, each in own.items():
                if each is not None and not each.requires_grad:
                    frozen.setdefault(id(each), Frozen(module, name, each))
        self._entries, self.frozen = self._entries_now(), list(frozen.values())

    def _entries_now(self) -> list[object]:
        return list(chain.from_iterable(map(_VALUES, self._tables)))

    def replaced(self, model: nn.Module) -> dict[str, nn.Parameter]:
        """Return, by name, the parameters that the model no longer has under their names, since they were listed."""
        now = self._entries_now()
        if len(now) == len(self._entries) and all(map(operator.is_, now, self._entries)):
            return {}
        found = dict(model.named_parameters(remove_duplicate=False))
        return {name: each for name, each in self._by_name.items() if found.get(name) is not each}


def trainable(model: nn.Module, optimizers: Iterable[Optimizer]) -> list[Named]:
    """List the parameters that a window accumulates gradients for: the model's and the optimizers', each once.

    Args:
        model: The model. Its parameters come first.
        optimizers: Their parameters come next. They may hold some that the model does not, such as the temperature of a
            loss module.

    Returns:
        Every parameter with ``requires_grad`` set, in a fixed order; a tied parameter appears once.
    """
    places = {
        id(parameter): (parameter, o, g, p)
        for o, optimizer in enumerate(optimizers)
        for g, group in enumerate(optimizer.param_groups)
        for p, parameter in enumerate(group["params"])
    }
    any_stepped = bool(places)
    found: list[Named] = []
    for name, parameter in model.named_parameters():  # each once, tied ones too
        held = places.pop(id(parameter), None) is not None or not any_stepped
        if parameter.requires_grad:
            found.append(Named(name, parameter, held=held))
    rest = [each for each in places.values() if each[0].requires_grad]
    return found + [Named(f"optimizer {o}, group {g}, parameter {p}", each) for each, o, g, p in rest]
