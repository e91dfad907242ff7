"""No gradient buffer: gradients add up inside of the optimizer's momentum."""

from __future__ import annotations

from collections.abc import Callable, Generator, Iterable, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.optim import SGD, Optimizer

from microbatch.errors import ConfigError

Group = Mapping[str, Any]
# Puts a tensor's values away, and returns what brings a copy of them back.
PutAside = Callable[[Tensor], Callable[[], Tensor]]


class _Coefficients(NamedTuple):
    decay: float
    take: float
    weight: float


@dataclass(frozen=True, slots=True, kw_only=True)
class LinearState:
    """Describe an optimizer that sees the gradient through one tensor of state, linear in it, and nothing else.

    Attributes:
        state: The name of that tensor in the optimizer's state.
        coefficients: ``coefficients(group, begun)`` returns ``(decay, take, weight)`` of one step, for a parameter
            group: the next state is ``decay * state + take * gradient + weight * parameter``. ``begun`` tells whether
            there is a state already; ``take`` is not 0.
        stepping: What to write into the parameter groups while the optimizer steps, so that, given the new state as
            the gradient, it takes it as it is.
        hindrance: Says of a parameter group why it cannot be described so; empty where it can.

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
    """Find how an optimizer of torch keeps its momentum.

    Args:
        optimizer: Any.

    Returns:
        Its description.

    Raises:
        ConfigError: It sees the gradient in another way too, or nobody has described it.
    """
    kind = type(optimizer)
    if kind in _KNOWN:
        return _KNOWN[kind]
    if kind.__module__.startswith("torch.optim"):
        raise ConfigError(
            f'gradient_buffer="none" is not for {kind.__name__}, which needs the whole gradient at once, as for its '
            "square: adding microbatches up inside its state would be another method. SGD with momentum, and Muon "
            "without Nesterov, see the gradient through one linear state"
        )
    raise ConfigError(
        f'gradient_buffer="none" does not know {kind.__name__}; if it sees the gradient through one linear state '
        "alone, describe it: gradient_buffer=mb.LinearState(...)"
    )


def check_folds(optimizer: Optimizer, rule: LinearState) -> None:
    """Refuse an optimizer whose settings make more of the gradient than one linear state.

    Args:
        optimizer: The optimizer.
        rule: Its description.

    Raises:
        ConfigError: Why, and what to change.
    """
    for index, group in enumerate(optimizer.param_groups):
        if why := rule.hindrance(group):
            raise ConfigError(
                f'gradient_buffer="none" cannot fold gradients into group {index} of {type(optimizer).__name__}: {why}'
            )


@dataclass(slots=True)
class _Entry:
    """One parameter whose gradients add up in its optimizer's state."""

    optimizer: Optimizer
    parameter: Tensor
    rule: LinearState
    of: _Coefficients
    held: Tensor | None = None  # the state; `None` where there is none yet
    kept: Callable[[], Tensor] | None = None  # what it was
    share: float = 0.0  # of that, what the sum began with
    version: int = -1

    @property
    def sum(self) -> Tensor | None:
        return self.parameter.grad


class Fold:
    r"""Add gradients up inside the optimizer's momentum, so that they have no memory of their own.

    The state's next value is ``decay * state + take * f * sum_i g_i``, where ``f`` is the factor that finishes the
    gradient. So the sum begins as ``state * decay / (take * f)``, gradients are added to that, and ``take * f`` over
    the whole makes it the next state. ``f`` is known beforehand where the count is; where it turns out to be another,
    the state as it was is read again, and what is missing of it is added.

    Adding is not undone exactly by subtracting. So the state is put aside, off the device, before the first gradient
    is added, and comes back bit for bit when the window does not end in a step.

    Args:
        rules: The optimizers, each with its description.
        aside: Puts tensors aside.
        lead: Whether this rank brings the state; the sums of all the others begin with zero.

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
        """Let every sum begin with its share of the state.

        Args:
            parameters: The window's.
            factor: What the finished gradient will be multiplied with, as far as that is known.

        Raises:
            ConfigError: A state is not what gradients can be added to.

        Cost:
            A copy of the state off the device, and one pass over it.
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
            # Private by name, and what torch's own optimizers are made of.
            torch._foreach_mul_(  # pyright: ignore[reportPrivateUsage, reportPrivateImportUsage]
                [held for _, held in begun], [entry.share for entry, _ in begun]
            )
        for entry, held in begun:
            entry.parameter.grad, entry.version = held, held._version

    def holds(self, parameter: Tensor) -> bool:
        """Tell whether a parameter's gradients add up in a state that was there before.

        Args:
            parameter: Any.

        Returns:
            Whether they do.
        """
        entry = self._entries.get(id(parameter))
        return entry is not None and entry.held is not None

    def is_untouched(self, parameter: Tensor) -> bool:
        """Tell whether a sum is nothing but its share of the state, because no gradient came.

        Args:
            parameter: Any.

        Returns:
            False also where there is no such sum.
        """
        entry = self._entries.get(id(parameter))
        return entry is not None and entry.sum is not None and entry.sum._version == entry.version

    @torch.no_grad()
    def drop(self, parameter: Tensor) -> None:
        """Leave a parameter without a gradient, and its state as it was: the optimizer passes it over.

        Args:
            parameter: One that got no gradient.
        """
        self._restore(self._entries.pop(id(parameter)))
        parameter.grad = None

    @torch.no_grad()
    def settle(self, factor: float) -> None:
        """Mend the sums whose factor turned out to be another.

        Args:
            factor: What the finished gradient will be multiplied with.

        Cost:
            Nothing where the factor is what it was thought to be; otherwise the state comes back once.
        """
        for entry in self._entries.values():
            share = entry.of.decay / (entry.of.take * factor)
            if entry.kept is not None and entry.sum is not None and self._lead and share != entry.share:
                entry.sum.add_(entry.kept(), alpha=share - entry.share)

    @torch.no_grad()
    def finish(self) -> None:
        """Make every sum, now multiplied with its factor, the optimizer's next state."""
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
        """Let an optimizer step from its state as it is.

        Args:
            optimizer: Any; those that are not described step as ever.
        """
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
        """Put every state back as it was."""
        while self._entries:
            self._restore(self._entries.popitem()[1])

    def end(self) -> None:
        """Let go of what the states were."""
        self._entries.clear()

    def _begin(self, parameter: Tensor, optimizer: Optimizer, rule: LinearState, *, group: Group) -> None:
        held = optimizer.state.get(parameter, {}).get(rule.state)
        of = _Coefficients(*rule.coefficients(group, held is not None))
        entry = _Entry(optimizer, parameter, rule, of)
        if held is not None:
            if not isinstance(held, Tensor) or held.dtype != parameter.dtype or held.shape != parameter.shape:
                raise ConfigError(
                    f'gradient_buffer="none" needs a state {rule.state!r} of {parameter.dtype}, shape '
                    f"{tuple(parameter.shape)}, and the optimizer has {_described(held)}"
                )
            entry.held, entry.kept = held, self._aside(held)
        self._entries[id(parameter)] = entry

    def _restore(self, entry: _Entry) -> None:
        states, name = entry.optimizer.state, entry.rule.state
        if entry.held is not None and entry.kept is not None:
            states[entry.parameter][name] = entry.held.copy_(entry.kept())
        elif entry.parameter in states:
            states[entry.parameter].pop(name, None)
            if not states[entry.parameter]:
                del states[entry.parameter]


def _described(held: object) -> str:
    return f"one of {held.dtype}, shape {tuple(held.shape)}" if isinstance(held, Tensor) else f"a {type(held).__name__}"


def _sgd(group: Group, begun: bool) -> tuple[float, float, float]:  # noqa: FBT001 - one of two arguments that a rule takes
    share = 1.0 - float(group["dampening"]) if begun else 1.0
    take = -share if group["maximize"] else share
    return float(group["momentum"]), take, share * float(group["weight_decay"])


def _sgd_hindrance(group: Group) -> str:
    if not group["momentum"]:
        return "momentum is 0, so there is no state to add gradients to; plain SGD needs a gradient buffer"
    if group["nesterov"]:
        return "nesterov=True looks at the gradient beside the momentum; use nesterov=False, or a gradient buffer"
    if group["dampening"] == 1:
        return "dampening is 1, which keeps every gradient out"
    return "differentiable=True keeps the gradient's graph" if group["differentiable"] else ""


def _muon(group: Group, begun: bool) -> tuple[float, float, float]:  # noqa: FBT001 - as above
    del begun
    return float(group["momentum"]), 1.0 - float(group["momentum"]), 0.0


def _muon_hindrance(group: Group) -> str:
    if group["nesterov"]:
        return "nesterov=True, its default, looks at the gradient beside the momentum; say nesterov=False"
    return "momentum is 1, which keeps every gradient out" if group["momentum"] == 1 else ""


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
