"""Records of every storage for a detailed memory meter: its category, its origin and its lifetime."""

from __future__ import annotations

import weakref
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import accumulate
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
    """A weak reference to a storage, with a record of it; a `Ledger` writes the fields after ``size``.

    Attributes:
        key: Identity of the storage; not its data pointer, which all empty storages share.
        size: Bytes.
        category: One of `CATEGORIES`.
        module: Path of the module that made the storage, or the name of a parameter or buffer.
        operator: The operator that made the storage; empty if the storage is older than the meter.
        born: Number of operators that had run when the storage was made, including its own.
        died: Number of operators that had run when the storage was freed; `None` if it is alive.
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
        operators: Names of the operators that ran, as the dispatcher has them.
        live: Bytes alive after each operator.
        storages: A tuple for each storage: bytes, category, `Storage.born` and `Storage.died`.
    """

    operators: Sequence[str]
    live: Sequence[int]
    storages: Sequence[tuple[int, str, int, int | None]]

    @property
    def peak_bytes(self) -> int:
        """Most bytes alive at once; 0 for a run without operators."""
        return max(self.live, default=0)

    @property
    def most_storages(self) -> int:
        """Most storages alive at once."""
        changes = Counter[int]()
        for _, _, born, died in self.storages:
            changes[born] += 1
            if died is not None:
                changes[died + 1] -= 1
        return max(accumulate(changes[at] for at in sorted(changes)), default=0)

    def parts(self, index: int) -> dict[str, int]:
        """Split the bytes alive after one operator by category."""
        found = Counter[str]()
        for size, category, born, died in self.storages:
            if born <= index + 1 and (died is None or died > index):
                found[category] += size
        return dict(found)


class Ledger:
    """Record the storages that a detailed meter sees.

    The storages alive at the peak are known without a copy of the list at each new peak. Freed storages that were alive
    at the highest peak so far stay on record until there is a higher peak.

    Args:
        keep: Whether to keep records of all storages, for a `Timeline`.
    """

    def __init__(self, *, keep: bool) -> None:
        self.tracker = Where()
        self._clock = 0  # number of operators that have run
        self._peak_clock = 0
        self._dead: list[Storage] = []  # freed storages that were alive at the peak
        self._all: list[Storage] | None = [] if keep else None
        self._operators: list[Any] = []
        self._live: list[int] = []
        self._in_backward = False
        self._here = ("", FORWARD, None)

    # -- called by the meter ------------------------------------------------------------------------------------------

    def ran(self, operator: Any) -> bool:
        """Record that an operator has run, and return whether a backward has ended since the operator before."""
        self._clock += 1
        module, phase = self.tracker.here()
        self._here = module, phase, operator
        was, self._in_backward = self._in_backward, current_node() is not None
        return was and not self._in_backward

    def recorded(self, live_bytes: int) -> None:
        """Record the live bytes after the operator."""
        if self._all is not None:
            self._operators.append(self._here[2])
            self._live.append(live_bytes)

    def born(self, storage: Storage) -> None:
        """Record a storage that an operator made."""
        storage.module, phase, storage.operator = self._here
        if phase == FORWARD:
            storage.category = ACTIVATIONS
        elif phase == BACKWARD and is_accumulating(current_node()):
            storage.category = GRADIENTS
        else:
            storage.category = TEMPORARIES
        self._keep(storage)

    def found(self, storage: Storage, category: str, name: str) -> None:
        """Record a storage that is older than the meter."""
        storage.category, storage.module, storage.operator = category, name, ""
        self._keep(storage)

    def named(self, storage: Storage, category: str, name: str) -> None:
        """Change the category of a recorded storage, and its name unless the new one is empty."""
        storage.category = category
        storage.module = name or storage.module

    def died(self, storage: Storage) -> None:
        """Record that a storage was freed."""
        storage.died = self._clock
        if storage.born <= self._peak_clock:
            self._dead.append(storage)

    def peaked(self) -> None:
        """Record a new peak of the live bytes."""
        self._peak_clock = self._clock
        self._dead.clear()

    # -- results ------------------------------------------------------------------------------------------------------

    def timeline(self) -> Timeline:
        """Return the timeline so far."""
        return Timeline(
            operators=[str(each) for each in self._operators],
            live=list(self._live),
            storages=[(each.size, each.category, each.born, each.died) for each in self._all or []],
        )

    def report(self, alive: Iterable[Storage], *, peak_bytes: int, live_bytes: int) -> MemoryReport:
        """Summarise the storages that are alive now, and those that were alive at the peak."""
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
    """List the tensors of nested modules, optimizers and tensors, with their categories and names."""
    if isinstance(thing, nn.Module):
        named = [(tensor, PARAMETERS, name) for name, tensor in thing.named_parameters()]
        grads = [(each.grad, GRADIENTS, name) for each, _, name in named if each.grad is not None]
        return [*named, *((tensor, BUFFERS, name) for name, tensor in thing.named_buffers()), *grads]
    if isinstance(thing, Optimizer):
        held = [each for state in thing.state.values() for each in described(state)]
        return [(tensor, OPTIMIZER_STATE, "") for tensor, _, _ in held]
    if isinstance(thing, Tensor):
        return [(thing, PARAMETERS if isinstance(thing, nn.Parameter) else INPUTS, "")]
    # torch's tree_leaves does not know every kind of Mapping.
    children = list(thing.values()) if isinstance(thing, Mapping) else tree_leaves(thing)
    return [each for child in children if child is not thing for each in described(child)]


def _by_category(storages: Iterable[Storage]) -> dict[str, int]:
    found = Counter[str]()
    for each in storages:
        found[each.category] += each.size
    return {category: found[category] for category in CATEGORIES if found[category]}
