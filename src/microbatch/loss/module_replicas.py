"""Create a replica of the model for each microbatch, with the same parameters and buffers but its own attributes."""

from __future__ import annotations

from collections.abc import Callable
from types import MethodType
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from microbatch.errors import BatchStatisticsError


class Replicas:
    """Create replicas of a model that share its parameters and buffers, but no attribute that a forward pass sets.

    In a forward pass, a module may store a value on itself and read it later, such as the loss of a router. If several
    passes are interleaved, each pass needs its own module for such values. At the end, the model gets the values of the
    last microbatch, as if it had run the microbatches one after the other.

    Args:
        model: The model.
        kinds: Classes of replicas that differ from the class of their module, by the module's class.
    """

    def __init__(self, model: nn.Module, *, kinds: dict[type[nn.Module], type[nn.Module]]) -> None:
        self._model = model
        self._classes = kinds
        self._last: list[tuple[nn.Module, nn.Module, dict[str, Any]]] = []
        self._before = [(name, module, dict(module.__dict__)) for name, module in model.named_modules()]

    def make(self, own: Callable[[nn.Parameter], Tensor | None]) -> nn.Module:
        """Create a replica of the model.

        Args:
            own: Returns the tensor that replaces a parameter in this replica; `None` keeps the parameter itself.

        Returns:
            The replica.
        """
        replicas: dict[nn.Module, nn.Module] = {}
        for _, module, _ in self._before:
            # Scripted modules keep their state outside of Python, so they cannot be copied by their attributes.
            replicas[module] = (
                module if isinstance(module, torch.jit.ScriptModule) else _shallow_copy(module, self._classes)
            )
        pairs = [(module, replica) for module, replica in replicas.items() if replica is not module]
        for _, replica in pairs:
            attributes = replica.__dict__
            attributes["_modules"] = {
                name: child if child is None else replicas[child] for name, child in attributes["_modules"].items()
            }
            for name, value in attributes.items():
                if isinstance(value, MethodType) and isinstance(value.__self__, nn.Module):
                    attributes[name] = MethodType(value.__func__, replicas.get(value.__self__, value.__self__))
            parameters: dict[str, Any] = attributes["_parameters"]
            substitutes = {
                name: substitute
                for name, each in parameters.items()
                if each is not None and (substitute := own(each)) is not None
            }
            if substitutes:
                attributes["_parameters"] = parameters | substitutes
        self._last = [(module, replica, dict(replica.__dict__)) for module, replica in pairs]
        return replicas[self._model]

    def put_back(self) -> None:
        """Copy to the model the attributes that the last replica's forward pass has set.

        Raises:
            BatchStatisticsError: A forward pass has set a tensor on the model itself, where no replica can read it.
        """
        for path, module, before in self._before:
            for name, value in module.__dict__.items():
                if before.get(name) is not value and any(isinstance(leaf, Tensor) for leaf in tree_leaves(value)):
                    raise BatchStatisticsError(
                        f"the forward pass kept a tensor on the model itself, as {name!r} of {path!r}: with "
                        'batch_norm="exact" each microbatch has its own replica of the model, which is the model that '
                        "the loss function gets. Use this replica in the loss function, and do not wrap a module that "
                        "stores a tensor on itself in a checkpoint or in the compiler"
                    )
        for module, replica, before in self._last:
            for name, value in replica.__dict__.items():
                if name not in before or before[name] is not value:
                    module.__dict__[name] = value
        self._last = []


def _shallow_copy(module: nn.Module, kinds: dict[type[nn.Module], type[nn.Module]]) -> nn.Module:
    """Create a module with the same attributes, without running its constructor."""
    class_ = kinds.get(type(module), type(module))
    replica: nn.Module = object.__new__(class_)
    replica.__dict__.update(module.__dict__)
    return replica
