"""Create a replica of the model for each microbatch, with the same parameters and buffers but its own attributes."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from types import MethodType
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from microbatch.errors import BatchStatisticsError

# What every module has: its parameters, buffers and submodules, and one dictionary for each kind of hook.
_REGISTRIES = tuple(name for name, value in vars(nn.Module()).items() if isinstance(value, dict | set))
_BY_ENTRY = frozenset({"_modules", "_parameters"})
"""Registries of which each replica has its own, since their values are other ones than the model's."""

# Buffers of more bytes are shared: large ones are masks and tables, to which no forward pass writes.
_SMALL = 1 << 20


class Replicas:
    """Create replicas of a model that share its parameters and buffers, but no attribute that a forward pass sets.

    In a forward pass, a module may store a value on itself and read it later, such as the loss of a router. It may also
    register hooks, buffers or submodules. If several passes are interleaved, each pass needs its own module for that.
    At the end, the model gets what the last microbatch has set and registered, as if it had run the microbatches one
    after the other.

    A buffer moves once in a window, and not once in each pass: the other replicas have copies of small buffers. So each
    pass computes with the buffers from the start of the window. Buffers of batch normalisation stay shared, because
    `ExactBatchNorm` updates their statistics once.

    The last replica therefore shares the model's own dictionaries of hooks and buffers, so that handles of these hooks
    work afterwards; each other replica has copies.

    Args:
        model: The model.
        kinds: Classes of replicas that differ from the class of their module, by the module's class.
    """

    def __init__(self, model: nn.Module, *, kinds: dict[type[nn.Module], type[nn.Module]]) -> None:
        self._model = model
        self._classes = kinds
        self._last: list[_Twin] = []
        # Scripted modules keep their state outside of Python, so they cannot be copied by their attributes.
        self._before = [(name, module, dict(module.__dict__)) for name, module in model.named_modules()]
        self._copied = [module for _, module, _ in self._before if not isinstance(module, torch.jit.ScriptModule)]
        self._registered = [(registry, _copy(registry)) for module in self._copied for registry in _shared(module)]

    def make(self, count: int, own: Callable[[nn.Parameter], Tensor | None]) -> Sequence[nn.Module]:
        """Create the replicas of ``count`` microbatches; where ``own`` returns `None`, they share the parameter."""
        return [self._make(own, last=index == count - 1) for index in range(count)]

    def _make(self, own: Callable[[nn.Parameter], Tensor | None], *, last: bool) -> nn.Module:
        twins = {module: _shallow_copy(module, self._classes) for module in self._copied}
        copies: dict[int, Tensor] = {}
        for module, replica in twins.items():
            attributes = replica.__dict__
            for name, value in attributes.items():
                attributes[name] = _rebound(value, twins)
            for name in _REGISTRIES:
                registry = attributes[name]
                if not (last and name not in _BY_ENTRY):
                    attributes[name] = registry = _copy(registry)
                if isinstance(registry, dict):
                    _rebind(registry, twins)
            parameters: dict[str, Any] = attributes["_parameters"]
            for name, each in parameters.items():
                if each is not None and (substitute := own(each)) is not None:
                    parameters[name] = substitute
            if not last and "num_batches_tracked" not in attributes["_buffers"]:
                _copy_small(attributes["_buffers"], copies)
            if last:
                self._last.append(_Twin(module, replica))
        return twins.get(self._model, self._model)

    def put_back(self) -> None:
        """Copy to the model what the last replica's forward pass has set and registered."""
        self._refuse_tensors_on_model()
        home: dict[nn.Module, nn.Module] = {twin.replica: twin.module for twin in self._last}
        for twin in self._last:
            for registry in _shared(twin.module):
                _rebind(registry, home)
            for name, value in twin.changed():
                twin.module.__dict__[name] = _rebound(value, home)
            for name in _BY_ENTRY:
                registry = twin.module.__dict__[name]
                added, removed = twin.changed_in(name)
                registry.update({key: _rebound(value, home) for key, value in added.items()})
                for key in removed:
                    registry.pop(key, None)
        self._last = []

    def drop(self) -> None:
        """Restore the dictionaries that the model shares with a replica, after an error."""
        for registry, before in self._registered:
            registry.clear()
            registry.update(before)
        self._last = []

    def _refuse_tensors_on_model(self) -> None:
        for path, module, before in self._before:
            for name, value in module.__dict__.items():
                if before.get(name) is not value and any(isinstance(leaf, Tensor) for leaf in tree_leaves(value)):
                    raise BatchStatisticsError(
                        f"the forward pass kept a tensor on the model itself, as {name!r} of {path!r}: with "
                        'batch_norm="exact" each microbatch has its own replica of the model, which is the model that '
                        "the loss function gets. Use this replica in the loss function, and do not wrap a module that "
                        "stores a tensor on itself in a checkpoint or in the compiler"
                    )


class _Twin:
    """A module, its replica, and what the replica had at the start."""

    def __init__(self, module: nn.Module, replica: nn.Module) -> None:
        self.module, self.replica = module, replica
        self._attributes = dict(replica.__dict__)
        self._entries = {name: dict(replica.__dict__[name]) for name in _BY_ENTRY}

    def changed(self) -> list[tuple[str, Any]]:
        """Return the attributes that a forward pass has set."""
        before = self._attributes
        return [(k, v) for k, v in self.replica.__dict__.items() if k not in before or before[k] is not v]

    def changed_in(self, name: str) -> tuple[dict[str, Any], list[str]]:
        """Return the entries of a registry that a forward pass has set, and the keys that it has removed."""
        before, now = self._entries[name], self.replica.__dict__[name]
        return {k: v for k, v in now.items() if before.get(k, now) is not v}, [k for k in before if k not in now]


def _shared(module: nn.Module) -> list[Any]:
    """Return the dictionaries of a module that the last replica shares."""
    return [module.__dict__[name] for name in _REGISTRIES if name not in _BY_ENTRY]


def _shallow_copy(module: nn.Module, kinds: dict[type[nn.Module], type[nn.Module]]) -> nn.Module:
    """Create a module with the same attributes, without running its constructor."""
    class_ = kinds.get(type(module), type(module))
    replica: nn.Module = object.__new__(class_)
    replica.__dict__.update(module.__dict__)
    return replica


def _copy(registry: Any) -> Any:
    return type(registry)(registry)


def _copy_small(buffers: dict[str, Any], copies: dict[int, Tensor]) -> None:
    """Replace small buffers by copies, the same copy for a buffer that several modules share."""
    for name, each in buffers.items():
        if isinstance(each, Tensor) and each.numel() * each.element_size() <= _SMALL and not each.requires_grad:
            copies.setdefault(id(each), each.clone())
            buffers[name] = copies[id(each)]


def _rebind(registry: Any, twins: Mapping[nn.Module, nn.Module]) -> None:
    """Replace modules, and methods of modules, among a registry's values."""
    if isinstance(registry, dict):
        entries = cast("dict[Any, Any]", registry)
        for key, value in entries.items():
            if (bound := _rebound(value, twins)) is not value:
                entries[key] = bound


def _rebound(value: Any, twins: Mapping[nn.Module, nn.Module]) -> Any:
    """Return a module's twin, or a method of the twin; any other value as it is."""
    if isinstance(value, nn.Module):
        return twins.get(value, value)
    if isinstance(value, MethodType) and isinstance(value.__self__, nn.Module) and value.__self__ in twins:
        return MethodType(value.__func__, twins[value.__self__])
    return value
