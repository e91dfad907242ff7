"""A module of one's own for each microbatch: the same parameters and buffers, other attributes."""

from __future__ import annotations

from collections.abc import Callable
from types import MethodType
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from microbatch.errors import BatchStatisticsError


class Replicas:
    """Make modules that share their parameters and buffers with a model, and nothing that a forward pass writes.

    A module may keep something on itself in its forward pass and read it later in the same pass, such as the loss of a
    router. Where several passes run in turns, each needs a module of its own for that. What the last microbatch left
    on its module is put on the model's in the end, as if the model had run the microbatches one after the other.

    Args:
        model: The model.
        kinds: Classes to give to replicas of other classes.
    """

    def __init__(self, model: nn.Module, *, kinds: dict[type[nn.Module], type[nn.Module]]) -> None:
        self._model = model
        self._kinds = kinds
        self._last: list[tuple[nn.Module, nn.Module, dict[str, Any]]] = []
        self._before = [(name, module, dict(module.__dict__)) for name, module in model.named_modules()]

    def make(self, own: Callable[[nn.Parameter], Tensor | None]) -> nn.Module:
        """Make a replica.

        Args:
            own: Returns what stands for a parameter in this replica; `None` for the parameter itself.

        Returns:
            The replica.
        """
        twins: dict[nn.Module, nn.Module] = {}
        for _, module, _ in self._before:
            # Scripted modules keep their state elsewhere.
            twins[module] = module if isinstance(module, torch.jit.ScriptModule) else _bare(module, self._kinds)
        pairs = [(module, twin) for module, twin in twins.items() if twin is not module]
        for _, twin in pairs:
            inside = twin.__dict__
            inside["_modules"] = {
                name: child if child is None else twins[child] for name, child in inside["_modules"].items()
            }
            for name, value in inside.items():
                if isinstance(value, MethodType) and isinstance(value.__self__, nn.Module):
                    inside[name] = MethodType(value.__func__, twins.get(value.__self__, value.__self__))
            parameters: dict[str, Any] = inside["_parameters"]
            stands = {
                name: stand
                for name, each in parameters.items()
                if each is not None and (stand := own(each)) is not None
            }
            if stands:
                inside["_parameters"] = parameters | stands
        self._last = [(module, twin, dict(twin.__dict__)) for module, twin in pairs]
        return twins[self._model]

    def put_back(self) -> None:
        """Give the model what the last replica's forward pass has written.

        Raises:
            BatchStatisticsError: A forward pass has written to the model itself, where no replica would find it.
        """
        for path, module, before in self._before:
            for name, value in module.__dict__.items():
                if before.get(name) is not value and any(isinstance(leaf, Tensor) for leaf in tree_leaves(value)):
                    raise BatchStatisticsError(
                        f"the forward pass kept a tensor on the model itself, as {name!r} of {path!r}: with "
                        'batch_norm="exact" each microbatch has a module of its own, the one that the loss function '
                        "is given. Use that one; and leave out what replaced its forward, such as a checkpoint or "
                        "the compiler, around a module that keeps something on itself"
                    )
        for module, twin, before in self._last:
            for name, value in twin.__dict__.items():
                if name not in before or before[name] is not value:
                    module.__dict__[name] = value
        self._last = []


def _bare(module: nn.Module, kinds: dict[type[nn.Module], type[nn.Module]]) -> nn.Module:
    kind = kinds.get(type(module), type(module))
    twin: nn.Module = object.__new__(kind)
    twin.__dict__.update(module.__dict__)
    return twin
