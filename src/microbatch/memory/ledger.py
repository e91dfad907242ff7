"""What is known of every storage: what it is, who made it, from when to when it lived."""

from __future__ import annotations

import weakref
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn
from torch.optim import Optimizer
from torch.utils._pytree import tree_leaves

from microbatch.memory.meter_report import MemoryReport, Part
from microbatch.memory.module_of_op import BACKWARD, FORWARD, Where, current_node, is_accumulating

PARAMETERS, BUFFERS, GRADIENTS = "parameters", "buffers", "gradients"
OPTIMIZER_STATE, INPUTS = "optimizer state", "inputs"
ACTIVATIONS, TEMPORARIES = "activations", "temporaries"
CATEGORIES = (PARAMETERS, BUFFERS, GRADIENTS, OPTIMIZER_STATE, ACTIVATIONS, INPUTS, TEMPORARIES)


class Storage(weakref.ref[Any]):
    """A storage that is alive, or was; the fields after ``size`` are a ledger's to write.

    Attributes:
        key: The storage's own identity: its data pointer is shared by empty ones.
        size: Bytes.
        category: What it is; one of `CATEGORIES`.
        module: Path of the module that made it, or the name of a parameter or buffer.
        operator: The operator that made it; empty for what was there before.
        born: Operators that had run when it was made, that one included.
        died: Operators that had run when it was freed, or `None`.
    """

    __slots__ = ("born", "category", "died", "key", "module", "operator", "size")

    key: int
    size: int
    category: str
    module: str
    operator: Any
    born: int
    died: int | None


@dataclass(frozen=True, slots=True, kw_only=True)
class Timeline:
    """The live bytes of a run, operator by operator.

    Attributes:
        operators: What ran, as the dispatcher names it.
        live: Bytes alive after each of them.
        storages: Everything that lived, as (bytes, category, operators that had run when it was made, and when it was
            freed or `None`).
    """

    operators: Sequence[str]
    live: Sequence[int]
    storages: Sequence[tuple[int, str, int, int | None]]

    @property
    def peak_bytes(self) -> int:
        """Most bytes alive at once; 0 for a run without operators."""
        return max(self.live, default=0)

    def parts(self, index: int) -> dict[str, int]:
        """Split what was alive after one operator by category.

        Args:
            index: Which operator, from 0.

        Returns:
            Bytes by category, which add up to ``live[index]``.
        """
        found = Counter[str]()
        for size, category, born, died in self.storages:
            if born <= index + 1 and (died is None or died > index):
                found[category] += size
        return dict(found)


class Ledger:
    """Keep the books of a detailed meter.

    What was alive at the peak is known without a copy at every new peak: of what dies, that which lived at the highest
    peak so far is kept until there is a higher one.

    Args:
        keep: Whether to keep everything, for a `Timeline`.
    """

    def __init__(self, *, keep: bool) -> None:
        self.where = Where()
        self._clock = 0  # operators that have run
        self._peak_clock = 0
        self._dead: list[Storage] = []  # which lived at the peak
        self._all: list[Storage] | None = [] if keep else None
        self._operators: list[Any] = []
        self._live: list[int] = []
        self._in_backward = False
        self._here = ("", FORWARD, None)

    # -- what the meter tells -----------------------------------------------------------------------------------------

    def ran(self, operator: Any) -> bool:
        """Note that an operator has run.

        Args:
            operator: The dispatcher's.

        Returns:
            Whether a backward has ended since the one before, so that gradients should be looked for.
        """
        self._clock += 1
        module, phase = self.where.here()
        self._here = module, phase, operator
        was, self._in_backward = self._in_backward, current_node() is not None
        return was and not self._in_backward

    def recorded(self, live_bytes: int) -> None:
        """Note what was alive after the operator.

        Args:
            live_bytes: Bytes.
        """
        if self._all is not None:
            self._operators.append(self._here[2])
            self._live.append(live_bytes)

    def born(self, storage: Storage) -> None:
        """Describe a storage that an operator made.

        Args:
            storage: Fresh.
        """
        storage.module, phase, storage.operator = self._here
        if phase == FORWARD:
            storage.category = ACTIVATIONS
        elif phase == BACKWARD and is_accumulating(current_node()):
            storage.category = GRADIENTS
        else:
            storage.category = TEMPORARIES
        self._keep(storage)

    def found(self, storage: Storage, category: str, name: str) -> None:
        """Describe a storage that was there before.

        Args:
            storage: Fresh.
            category: What it is.
            name: What it is called.
        """
        storage.category, storage.module, storage.operator = category, name, ""
        self._keep(storage)

    def named(self, storage: Storage, category: str, name: str) -> None:
        """Say what a known storage turned out to be.

        Args:
            storage: Known.
            category: What it is.
            name: What it is called; empty to leave it as it was.
        """
        storage.category = category
        storage.module = name or storage.module

    def died(self, storage: Storage) -> None:
        """Note that a storage was freed.

        Args:
            storage: Known.
        """
        storage.died = self._clock
        if storage.born <= self._peak_clock:
            self._dead.append(storage)

    def peaked(self) -> None:
        """Note that more is alive than ever before."""
        self._peak_clock = self._clock
        self._dead.clear()

    # -- what it says -------------------------------------------------------------------------------------------------

    def timeline(self) -> Timeline:
        """Return what was recorded so far."""
        return Timeline(
            operators=[str(each) for each in self._operators],
            live=list(self._live),
            storages=[(each.size, each.category, each.born, each.died) for each in self._all or []],
        )

    def report(self, alive: Iterable[Storage], *, peak_bytes: int, live_bytes: int) -> MemoryReport:
        """Say what there is now, and what there was at the peak.

        Args:
            alive: The storages that are alive.
            peak_bytes: Most bytes alive at once.
            live_bytes: Bytes alive.

        Returns:
            The report.
        """
        now = list(alive)
        then = [*(each for each in now if each.born <= self._peak_clock), *self._dead]
        sizes, counts = Counter[tuple[str, str, str]](), Counter[tuple[str, str, str]]()
        for each in then:
            key = each.category, each.module, str(each.operator)
            sizes[key] += each.size
            counts[key] += 1
        return MemoryReport(
            peak_bytes=peak_bytes,
            live_bytes=live_bytes,
            at_peak=_by_category(then),
            live=_by_category(now),
            parts=[
                Part(category=key[0], module=key[1], operator=key[2], bytes=size, storages=counts[key])
                for key, size in sizes.most_common()
            ],
        )

    def _keep(self, storage: Storage) -> None:
        storage.born, storage.died = self._clock, None
        if self._all is not None:
            self._all.append(storage)


def described(thing: object) -> list[tuple[Tensor, str, str]]:
    """List the tensors of something with what they are.

    Args:
        thing: Modules, optimizers and tensors, nested as you like.

    Returns:
        Triples of tensor, category and name.
    """
    if isinstance(thing, nn.Module):
        named = [(tensor, PARAMETERS, name) for name, tensor in thing.named_parameters()]
        grads = [(each.grad, GRADIENTS, name) for each, _, name in named if each.grad is not None]
        return [*named, *((tensor, BUFFERS, name) for name, tensor in thing.named_buffers()), *grads]
    if isinstance(thing, Optimizer):
        held = [each for state in thing.state.values() for each in described(state)]
        return [(tensor, OPTIMIZER_STATE, "") for tensor, _, _ in held]
    if isinstance(thing, Tensor):
        return [(thing, PARAMETERS if isinstance(thing, nn.Parameter) else INPUTS, "")]
    # torch's own walk does not know every Mapping.
    children = list(thing.values()) if isinstance(thing, Mapping) else tree_leaves(thing)
    return [each for child in children if child is not thing for each in described(child)]


def _by_category(storages: Iterable[Storage]) -> dict[str, int]:
    found = Counter[str]()
    for each in storages:
        found[each.category] += each.size
    return {category: found[category] for category in CATEGORIES if found[category]}
