"""Gradient accumulation in the optimizer's momentum buffer, without a gradient buffer of its own."""

from __future__ import annotations

from collections.abc import Callable, Generator, Iterable, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.optim import SGD, Optimizer

from microbatch.errors import ConfigError
from microbatch.kind_words import kind_of

Group = Mapping[str, Any]
# Saves a tensor's values off the device, and returns a function that makes a copy of them on the device.
PutAside = Callable[[Tensor], Callable[[], Tensor]]


class _Coefficients(NamedTuple):
    decay: float
    take: float
    weight: float


@dataclass(frozen=True, slots=True, kw_only=True)
class LinearState:
    """Describe an optimizer that uses the gradient only through one state tensor, which is linear in the gradient.

    Attributes:
        state: Key of the tensor in the optimizer's state, such as ``"momentum_buffer"``.
        coefficients: ``coefficients(group, begun)`` returns ``(decay, take, weight)`` for a parameter group: the next
            state is ``decay * state + take * gradient + weight * parameter``. ``begun`` is whether the state exists
            already; ``take`` is not 0.
        stepping: Settings for the parameter groups during the optimizer's step. The optimizer is given the new state as
            the gradient, and must use it unchanged.
        hindrance: Returns why a parameter group cannot be described this way; an empty string if it can.

    Example:
        >>> signum = LinearState(  # sign(momentum * state + gradient)
        ...     state="momentum",
        ...     coefficients=lambda group, begun: (group["beta"], 1.0, 0.0),
        ...     stepping={"beta": 0.0},
        ... )
        >>> signum.coefficients({"beta": 0.9}, True)
        (0.9, 1.0, 0.0)
    """

    state: str
    coefficients: Callable[[Group, bool], tuple[float, float, float]]
    stepping: Mapping[str, Any]
    hindrance: Callable[[Group], str] = field(default=lambda group: "")


def linear_state(optimizer: Optimizer) -> LinearState:
    """Return the description of one of torch's optimizers; refuse those that use the gradient in other ways."""
    kind = type(optimizer)
    if kind in _KNOWN:
        return _KNOWN[kind]
    if kind.__module__.startswith("torch.optim"):
        raise ConfigError(
            f'Sums(buffer="none") does not support {kind.__name__}, which needs the whole gradient at once, for '
            "example to square it; adding up microbatches in its state would change the method. Use SGD with momentum "
            "or Muon with nesterov=False, or leave out buffer="
        )
    raise ConfigError(
        f'Sums(buffer="none") does not know {kind.__name__}; if this optimizer uses the gradient only through one '
        "state tensor that is linear in it, describe that: Sums(buffer=mb.LinearState(...))"
    )


def check_folds(optimizer: Optimizer, rule: LinearState) -> None:
    """Refuse an optimizer whose settings use the gradient other than through one linear state."""
    for index, group in enumerate(optimizer.param_groups):
        if why := rule.hindrance(group):
            raise ConfigError(
                f'Sums(buffer="none") cannot add gradients to the state of parameter group {index} of '
                f"{type(optimizer).__name__}: {why}"
            )


@dataclass(slots=True)
class _Entry:
    """A parameter whose gradients add up in its optimizer's state."""

    optimizer: Optimizer
    parameter: Tensor
    rule: LinearState
    of: _Coefficients
    held: Tensor | None = None  # the state tensor; `None` before the first step
    kept: Callable[[], Tensor] | None = None  # returns a copy of the state from before the window
    share: float = 0.0  # the multiple of that state with which the sum began
    version: int = -1  # version counter of the sum before the first gradient

    @property
    def sum(self) -> Tensor | None:
        return self.parameter.grad


class Fold:
    r"""Add up gradients in the optimizer's momentum buffer, so that they need no memory of their own.

    The next value of the state is ``decay * state + take * f * sum_i g_i``, where ``f`` is the factor that finishes the
    gradient. So the sum starts as ``state * decay / (take * f)``, and gradients are added to it. Multiplied by
    ``take * f``, it is the next state. ``f`` is known beforehand if the count is. If ``f`` turns out to be different,
    the saved state is read again, and the missing multiple of it is added.

    In floating point, a subtraction does not undo an addition exactly. So the state is saved off the device before the
    first gradient is added. If the window does not end in a step, the saved state is restored, bitwise equal.

    Args:
        rules: The optimizers, each with its description.
        aside: Saves a tensor off the device.
        lead: Whether this rank's sums start from the state; on the other ranks they start from zero.

    Source:
        Laws B4, M1, R1.
    """

    def __init__(self, rules: Sequence[tuple[Optimizer, LinearState]], aside: PutAside, *, lead: bool = True) -> None:
        self._rules = rules
        self._aside = aside
        self._lead = lead
        self._entries: dict[int, _Entry] = {}

    @torch.no_grad()
    def begin(self, parameters: Iterable[Tensor], factor: float) -> None:
        """Save the states, and start every sum from its multiple of the state; ``factor`` may be an estimate.

        Raises:
            ConfigError: A state has another dtype or shape than its parameter, so gradients cannot be added to it.

        Cost:
            A copy of the states off the device, and one pass over them.
        """
        wanted = {id(parameter) for parameter in parameters}
        for optimizer, rule in self._rules:
            for group in optimizer.param_groups:
                for parameter in group["params"]:
                    if id(parameter) in wanted:
                        self._begin(parameter, optimizer, rule, group=group)
        begun = [(entry, entry.held) for entry in self._entries.values() if entry.held is not None]
        for entry, _ in begun:
            entry.share = entry.of.decay / (entry.of.take * factor) if self._lead else 0.0
        if begun:
            # Private by name, but torch's own optimizers use it.
            torch._foreach_mul_(  # pyright: ignore[reportPrivateUsage, reportPrivateImportUsage]
                [held for _, held in begun], [entry.share for entry, _ in begun]
            )
        for entry, held in begun:
            entry.parameter.grad, entry.version = held, held._version

    def holds(self, parameter: Tensor) -> bool:
        """Return whether a parameter's gradients add up in a state that its optimizer had before the window."""
        entry = self._entries.get(id(parameter))
        return entry is not None and entry.held is not None

    def is_untouched(self, parameter: Tensor) -> bool:
        """Return whether a parameter's gradients add up in a state, to which none has been added."""
        entry = self._entries.get(id(parameter))
        return entry is not None and entry.sum is not None and entry.sum._version == entry.version

    @torch.no_grad()
    def drop(self, parameter: Tensor) -> None:
        """Restore a parameter's state and set its `.grad` to `None`, so that the optimizer skips the parameter."""
        self._restore(id(parameter))
        parameter.grad = None

    @torch.no_grad()
    def settle(self, factor: float) -> None:
        """Correct the sums if the factor differs from the one given to `begin`; the saved states are copied back."""
        for entry in self._entries.values():
            share = entry.of.decay / (entry.of.take * factor)
            if entry.kept is not None and entry.sum is not None and self._lead and share != entry.share:
                entry.sum.add_(entry.kept(), alpha=share - entry.share)

    @torch.no_grad()
    def without_state(self, parameter: Tensor, total: Tensor, factor: float) -> Tensor:
        """Return a sum that began with the state, without it: a new tensor, or ``total`` if it began with none.

        Cost:
            A copy of the saved state to the device, and one tensor like it.
        """
        entry = self._entries.get(id(parameter))
        if entry is None or entry.kept is None:
            return total
        return total.sub(entry.kept(), alpha=entry.of.decay / (entry.of.take * factor))

    @torch.no_grad()
    def finish(self) -> None:
        """Turn every sum, which the factor has been applied to, into the optimizer's next state."""
        for entry in self._entries.values():
            if (total := entry.sum) is None:
                continue
            if total.is_sparse:
                total = entry.parameter.grad = total.to_dense()
            if entry.of.take != 1.0:
                total.mul_(entry.of.take)
            if entry.of.weight:
                total.add_(entry.parameter, alpha=entry.of.weight)
            entry.optimizer.state[entry.parameter][entry.rule.state] = total

    @contextmanager
    def stepping(self, optimizer: Optimizer) -> Generator[None]:
        """Change an optimizer's settings for one step, so that it uses the new state unchanged."""
        rule = next((rule for each, rule in self._rules if each is optimizer), None)
        before = [{name: group[name] for name in rule.stepping} if rule else {} for group in optimizer.param_groups]
        try:
            for group in optimizer.param_groups:
                group.update(rule.stepping if rule else {})
            yield
        finally:
            for group, was in zip(optimizer.param_groups, before, strict=True):
                group.update(was)

    @torch.no_grad()
    def put_back(self) -> None:
        """Restore every state from before the window."""
        for key in list(self._entries):
            self._restore(key)

    def end(self) -> None:
        """Free the saved states."""
        self._entries.clear()

    def _begin(self, parameter: Tensor, optimizer: Optimizer, rule: LinearState, *, group: Group) -> None:
        held = optimizer.state.get(parameter, {}).get(rule.state)
        of = _Coefficients(*rule.coefficients(group, held is not None))
        entry = _Entry(optimizer, parameter, rule, of)
        if held is not None:
            if not isinstance(held, Tensor) or held.dtype != parameter.dtype or held.shape != parameter.shape:
                raise ConfigError(
                    f'Sums(buffer="none") needs a state {rule.state!r} of {parameter.dtype} and shape '
                    f"{tuple(parameter.shape)}, like the parameter's, but the optimizer has {_described(held)}; leave "
                    "out buffer="
                )
            entry.held, entry.kept = held, self._aside(held)
        self._entries[id(parameter)] = entry

    def _restore(self, key: int) -> None:
        entry = self._entries[key]
        states, name = entry.optimizer.state, entry.rule.state
        if entry.held is not None and entry.kept is not None:
            states[entry.parameter][name] = entry.held.copy_(entry.kept())
        elif entry.parameter in states:
            states[entry.parameter].pop(name, None)
            if not states[entry.parameter]:
                del states[entry.parameter]
        del self._entries[key]  # last: what an error interrupts is restored by the next call


def _described(held: object) -> str:
    if isinstance(held, Tensor):
        return f"one of {held.dtype} and shape {tuple(held.shape)}"
    return f"{kind_of(held)}"


def _sgd(group: Group, begun: bool) -> tuple[float, float, float]:  # noqa: FBT001 - LinearState.coefficients takes it by position
    share = 1.0 - float(group["dampening"]) if begun else 1.0
    take = -share if group["maximize"] else share
    return float(group["momentum"]), take, share * float(group["weight_decay"])


def _sgd_hindrance(group: Group) -> str:
    if not group["momentum"]:
        return "momentum is 0, so there is no state to add gradients to; leave out buffer= for plain SGD"
    if group["nesterov"]:
        return "nesterov=True uses the gradient itself too; pass nesterov=False, or leave out buffer="
    if group["dampening"] == 1:
        return "dampening is 1, so gradients never enter the state; pass a smaller dampening"
    return "differentiable=True needs the gradient's graph; leave it out" if group["differentiable"] else ""


def _muon(group: Group, begun: bool) -> tuple[float, float, float]:  # noqa: FBT001 - as above
    del begun
    return float(group["momentum"]), 1.0 - float(group["momentum"]), 0.0


def _muon_hindrance(group: Group) -> str:
    if group["nesterov"]:
        return "nesterov=True, the default, uses the gradient itself too; pass nesterov=False"
    return "momentum is 1, so gradients never enter the state; pass a smaller one" if group["momentum"] == 1 else ""


_KNOWN: dict[type[Optimizer], LinearState] = {
    SGD: LinearState(
        state="momentum_buffer",
        coefficients=_sgd,
        stepping={"momentum": 0.0, "dampening": 0.0, "weight_decay": 0.0, "nesterov": False, "maximize": False},
        hindrance=_sgd_hindrance,
    ),
    torch.optim.Muon: LinearState(
        state="momentum_buffer",
        coefficients=_muon,
        stepping={"momentum": 0.0, "nesterov": False},
        hindrance=_muon_hindrance,
    ),
}
