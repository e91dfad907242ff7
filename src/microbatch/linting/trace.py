"""What one run of the simulation saw: every step, its gradient as one weight for each microbatch, what touched it."""

import ast
from dataclasses import dataclass, field
from fractions import Fraction
from typing import Any

from microbatch.linting.values import Data

__all__ = ["Backward", "Gradients", "Mark", "StepTaken", "Trace"]


@dataclass(slots=True)
class Backward:
    """One backward: which microbatch ran it, and the loss that it went through."""

    node: ast.AST
    tick: int
    loss: Data
    synced: bool  # outside of `no_sync`


@dataclass(slots=True)
class Mark:
    """One other event: its kind ("clip", "schedule", "item", ...), its place and when it ran."""

    kind: str
    node: ast.AST
    tick: int
    name: str = ""
    value: Any = None
    detail: str = ""


@dataclass(slots=True)
class StepTaken:
    """One optimizer step, with the gradient that it took."""

    node: ast.AST
    tick: int
    epoch: int
    optimizer: str
    weights: dict[int, Fraction]
    since: list[int]  # microbatches with a backward since the step before
    lost: list[int]  # of these, the ones whose gradients were cleared
    scaled: bool
    prior: tuple[str, ...]  # what was done to the gradients since the last backward
    reduced: bool  # its last backward ran outside of `no_sync`
    loop: ast.AST | None = None  # the loop over microbatches that ran last
    sites: dict[tuple[int, ast.AST], Fraction] = field(default_factory=dict)  # the weights by the calls of backward
    after: int = 0  # so many backwards had run
    stale: frozenset[tuple[int, ast.AST]] = frozenset()  # of earlier steps: not cleared, and taken once more


@dataclass
class Gradients:
    """The gradients of one optimizer's weights."""

    weights: dict[int, Fraction] = field(default_factory=dict)
    per_site: dict[tuple[int, ast.AST], Fraction] = field(default_factory=dict)
    sites: dict[int, list[ast.AST]] = field(default_factory=dict)  # the calls of backward, by microbatch
    since: list[int] = field(default_factory=list)
    lost: list[int] = field(default_factory=list)
    prior: list[str] = field(default_factory=list)
    scaled: bool = False
    unscaled: bool = False
    last_synced: bool = True
    steps: int = 0
    maybe: set[int] = field(default_factory=set)  # microbatches that something may have cleared

    def copy(self) -> "Gradients":
        """Copy the state, so that the copy goes its own way."""
        return Gradients(
            dict(self.weights),
            dict(self.per_site),
            {m: list(nodes) for m, nodes in self.sites.items()},
            list(self.since),
            list(self.lost),
            list(self.prior),
            self.scaled,
            self.unscaled,
            self.last_synced,
            self.steps,
            set(self.maybe),
        )


class Trace:
    """The record of one run."""

    def __init__(self) -> None:
        self.tick = 0  # the microbatch at hand
        self.epoch = 0
        self.loop: ast.AST | None = None
        self.epoch_of: dict[int, int] = {}
        self.loop_of: dict[int, ast.AST | None] = {}
        self.last_ticks: set[int] = set()  # the last microbatch of each epoch
        self.backwards: list[Backward] = []
        self.steps: list[StepTaken] = []
        self.marks: list[Mark] = []
        self.opaque: dict[str, ast.AST] = {}
        self.groups: dict[str, Gradients] = {}
        self.fresh = Gradients()
        self.frameworks: set[str] = set()
        self.settings: dict[str, Any] = {}
        self.occasional = 0  # inside of a condition that is true now and then
        self.evaluating = 0  # inside of an evaluation
        self.cleared: set[ast.stmt] = set()  # the statements that cleared gradients

    @property
    def begun(self) -> bool:
        """Whether a microbatch is at hand."""
        return self.tick > 0

    def group(self, optimizer: str) -> Gradients:
        """Find the gradients of one optimizer, which begin as those of no optimizer."""
        if optimizer not in self.groups:
            self.groups[optimizer] = self.fresh.copy()
        return self.groups[optimizer]

    def every_group(self) -> list[Gradients]:
        """List the gradients of all optimizers, and those of the weights that no optimizer has yet."""
        return [self.fresh, *self.groups.values()]

    def mark(self, kind: str, node: ast.AST, name: str = "", *, value: Any = None, detail: str = "") -> None:
        """Record an event, unless it stands in an evaluation or does not happen in every microbatch."""
        if self.occasional and kind in ("sync", "empty_cache", "ema"):
            return  # now and then, not in every microbatch
        if self.evaluating and kind in ("sync", "empty_cache", "log", "sum"):
            return
        self.marks.append(Mark(kind, node, self.tick, name, value, detail))

    def backward(self, node: ast.AST, loss: Data, *, synced: bool) -> None:
        """Add the gradients of a loss."""
        self.backwards.append(Backward(node, self.tick, loss, synced))
        for group in self.every_group():
            for m, weight in loss.weights.items():
                before = group.per_site.get((m, node))
                group.per_site[m, node] = weight if before is None else before + weight
                nodes = group.sites.setdefault(m, [])
                if before is None:
                    nodes.append(node)
                group.weights[m] = max(group.per_site[m, each] for each in nodes)
                if m not in group.since:
                    group.since.append(m)
            group.prior.clear()
            group.scaled |= loss.scaled
            group.last_synced = synced

    def zero(self, node: ast.AST, optimizer: str | None) -> None:
        """Clear the gradients: those of one optimizer, or all."""
        self.mark("zero", node, optimizer or "")
        for group in self.every_group() if optimizer is None else [self.group(optimizer)]:
            group.lost += [m for m in group.weights if m not in group.lost]
            group.weights.clear()
            group.per_site.clear()
            group.sites.clear()
            group.prior.append("zero")
            group.scaled = False

    def may_clear(self) -> None:
        """Note that some gradients are cleared, or all: which, the file does not show."""
        for group in self.every_group():
            group.maybe.update(group.weights)

    def multiply(self, factor: Fraction) -> None:
        """Multiply the gradients in place."""
        for group in self.every_group():
            group.weights = {m: w * factor for m, w in group.weights.items()}
            group.per_site = {key: w * factor for key, w in group.per_site.items()}
            group.prior.append("multiply")

    def unscale_all(self) -> None:
        """Divide the gradients of all optimizers by the loss scale."""
        for group in self.every_group():
            group.scaled = False

    def unscale(self, node: ast.AST, optimizer: str) -> None:
        """Divide the gradients of one optimizer by the loss scale."""
        group = self.group(optimizer)
        self.mark("unscale", node, optimizer, detail="again" if group.unscaled else "")
        group.prior.append("unscale")
        group.unscaled, group.scaled = True, False

    def clip(self, node: ast.AST, name: str, *, handled: bool = False) -> None:
        """Clip the gradients. `handled` says that the call itself knows of the loss scale."""
        groups = [g for g in self.groups.values() if g.steps or g.unscaled] or [self.fresh]
        self.mark(
            "clip",
            node,
            name,
            value=not handled and all(g.scaled for g in groups),
            detail="pending" if any(g.weights for g in groups) else "",
        )
        for group in self.every_group():
            group.prior.append("clip")

    def step(self, node: ast.AST, optimizer: str, *, by_scaler: bool = False) -> None:
        """Take a step with the gradients that are there."""
        group = self.group(optimizer)
        self.steps.append(
            StepTaken(
                node,
                self.tick,
                self.epoch,
                optimizer,
                dict(group.weights),
                list(group.since),
                [m for m in group.lost if m in group.since and m not in group.weights],
                group.scaled and not by_scaler,
                tuple(group.prior),
                group.last_synced,
                self.loop,
                {key: w for key, w in group.per_site.items() if key[0] in group.since},
                len(self.backwards),
                frozenset(key for key in group.per_site if key[0] not in group.since and key[0] not in group.maybe),
            )
        )
        group.since.clear()
        group.lost.clear()
        group.prior.clear()
        group.steps += 1
        # The weights stay until they are cleared; a step that follows without clearing takes them again.
        if by_scaler:
            group.scaled = False

    def update(self, node: ast.AST) -> None:
        """Update the loss scale: the next gradients can be unscaled again."""
        self.mark("update", node)
        self.may_update()

    def may_update(self) -> None:
        """Note that the loss scale is updated, or may be: code that the file does not show has the scaler."""
        for group in self.every_group():
            group.unscaled = False
