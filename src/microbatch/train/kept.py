"""Restore a job after steps that must leave no trace: weights, optimizer, data, and all that steps change."""

from __future__ import annotations

import copy
import random
import sys
from collections.abc import Generator, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.utils.data import DataLoader

from microbatch.interrupts import interrupts_here
from microbatch.train.encode import own
from microbatch.train.state import load_model, load_optimizer, model_tensors

_STATES = ("state", "param_groups")
_PYTHONS = random.Random  # noqa: S311 - the class, to find generators of the user's


class Kept:
    """Hold copies of weights, buffers and optimizer state, and the gradients themselves.

    Args:
        model: The model.
        optimizers: Its optimizers; they may hold parameters that are not the model's.

    Cost:
        A copy of weights, buffers and optimizer state on the host.
    """

    def __init__(self, model: nn.Module, optimizers: Sequence[Optimizer]) -> None:
        self._model, self._optimizers = model, optimizers
        tensors, self._extra = model_tensors(model)
        self._weights = {name: own(tensor) for name, tensor in tensors.items()}
        groups = [group for optimizer in optimizers for group in optimizer.param_groups]
        parameters = {id(each): each for each in model.parameters()}
        others = {id(each): each for group in groups for each in group["params"] if id(each) not in parameters}
        self._others = [(each, own(each)) for each in others.values()]
        self._gradients = [(each, each.grad, each.requires_grad) for each in (parameters | others).values()]
        self._states = [_copied(optimizer.state_dict()) for optimizer in optimizers]
        # Also what a state dict leaves out: tensors that hold a learning rate, and counters of the optimizer's own.
        self._hyperparameters = [{key: value for key, value in each.items() if key != "params"} for each in groups]
        self._attributes = [_without(vars(optimizer), _STATES) for optimizer in optimizers]

    @torch.no_grad()
    def restore(self) -> None:
        """Restore everything but the gradients, which are dropped."""
        load_model(self._model, self._weights, self._extra)
        for parameter, copied in self._others:
            parameter.copy_(copied)
        self.set_gradients_aside()
        for parameter, _, wanted in self._gradients:
            parameter.requires_grad_(wanted)
        for optimizer, state, attributes in zip(self._optimizers, self._states, self._attributes, strict=True):
            load_optimizer(optimizer, _copied(state))  # some of what is loaded is not copied, such as step counts
            _replace(vars(optimizer), attributes, but=_STATES)
        now = [group for optimizer in self._optimizers for group in optimizer.param_groups]
        for group, before in zip(now, self._hyperparameters, strict=True):
            for key, value in before.items():
                if isinstance(value, Tensor):
                    value.copy_(group[key])
                    group[key] = value

    def set_gradients_aside(self) -> None:
        """Leave the parameters without gradients."""
        for parameter, _, _ in self._gradients:
            parameter.grad = None

    def restore_gradients(self) -> None:
        """Put the gradients back: the same tensors, which nobody has written to."""
        for parameter, gradient, _ in self._gradients:
            parameter.grad = gradient


@contextmanager
def kept(model: nn.Module, optimizers: Sequence[Optimizer]) -> Generator[Kept]:
    """Restore weights, buffers, gradients and optimizers when the block ends, also by an error or Ctrl-C.

    Inside the block the parameters begin without gradients. Random state, and buffers that are replaced by other
    tensors, are restored by `microbatch.train.evaluate.untouched`; open that one inside.

    Args:
        model: The model.
        optimizers: Its optimizers.

    Yields:
        The copies, to restore from inside the block as well.
    """
    interrupts, copies = interrupts_here(), Kept(model, optimizers)
    held = interrupts.held
    # A signal that comes while a context is left, this one among them, waits until it has been left.
    interrupts.begin(copies)
    interrupts.held = held
    try:
        copies.set_gradients_aside()
        yield copies
    finally:
        try:
            copies.restore()
        finally:
            copies.restore_gradients()
            interrupts.end(copies, held=held)


class KeptData:
    """Hold where data stands: attributes, random generators, and state dicts of the data and of what it is made of.

    A data set that counts what it has read, and a sampler with a generator of its own, go on where they stood.

    Args:
        data: The data of a job.
    """

    def __init__(self, data: Any) -> None:
        parts: list[Any] = [data, *(getattr(data, name, None) for name in ("dataset", "sampler", "batch_sampler"))]
        parts.append(getattr(parts[-1], "sampler", None))
        found = {id(each): each for each in parts if hasattr(each, "__dict__")}
        self._parts = [(each, dict(vars(each))) for each in found.values()]
        self._generators = [each for _, held in self._parts for each in _generators(held)]
        # Not of a loader: asking it for its state begins a pass. Its attributes hold it.
        self._stateful = [
            (each, copy.deepcopy(each.state_dict()))
            for each in found.values()
            if not isinstance(each, DataLoader)
            and all(callable(getattr(each, name, None)) for name in ("state_dict", "load_state_dict"))
        ]

    def restore(self) -> None:
        """Go back to where the data stood."""
        for each, held in self._parts:
            _replace(vars(each), held)
        for generator, state in self._generators:
            if isinstance(generator, _PYTHONS):
                generator.setstate(state)
            elif isinstance(generator, torch.Generator):
                generator.set_state(state)
            else:
                generator.bit_generator.state = state
        for each, state in self._stateful:
            if not _equal(each.state_dict(), state):
                each.load_state_dict(copy.deepcopy(state))


@contextmanager
def kept_data(data: Any) -> Generator[None]:
    """Put the position in the data back when the block ends.

    Args:
        data: The data of a job.

    Yields:
        Nothing.
    """
    position = KeptData(data)
    try:
        yield
    finally:
        position.restore()


def _generators(held: dict[str, Any]) -> Iterator[tuple[Any, Any]]:
    """Yield the random generators among some attributes, each with its state."""
    numpy = sys.modules.get("numpy")
    for value in held.values():
        if isinstance(value, _PYTHONS):
            yield value, value.getstate()
        elif isinstance(value, torch.Generator):
            yield value, value.get_state()
        elif numpy is not None and isinstance(value, numpy.random.Generator):
            yield value, copy.deepcopy(value.bit_generator.state)


def _replace(now: dict[str, Any], before: dict[str, Any], *, but: Sequence[str] = ()) -> None:
    for name in [name for name in now if name not in before and name not in but]:
        del now[name]
    now.update(before)


def _without(values: dict[str, Any], names: Sequence[str]) -> dict[str, Any]:
    return {name: value for name, value in values.items() if name not in names}


def _equal(first: Any, second: Any) -> bool:
    try:
        return bool(first == second)
    except (RuntimeError, TypeError, ValueError):  # such as tensors of several numbers
        return False


def _copied(node: Any) -> Any:
    """Copy nested state, tensors to the host."""
    if isinstance(node, Tensor):
        return own(node)
    if isinstance(node, dict):
        return {key: _copied(value) for key, value in node.items()}
    if isinstance(node, list):
        return [_copied(value) for value in node]
    return node
