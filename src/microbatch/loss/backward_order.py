"""In which order one backward goes through the graphs of several microbatches."""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Sequence
from typing import Any

from torch import Tensor

# Above what any thread counts to, and below what autograd gives to the accumulation of gradients.
_FIRST = 1 << 48
_LAST = 1 << 63


class Order:
    """Number the nodes of microbatches that were run in turns, part by part.

    Autograd runs, of the nodes that are ready, the one with the highest number, and numbers are given by each thread
    for itself: one backward over several microbatches would run them all at once, with the gradients of all in memory.
    Numbered by the parts between two meetings, and in each part by microbatch, it goes through one part of one
    microbatch after the other.

    What is numbered is known to belong to a microbatch, so that a microbatch that uses what another one computed is
    found out.

    The numbers are private to torch. Where they cannot be set, the gradient is the same, and needs more memory.
    """

    def __init__(self) -> None:
        self._next = _FIRST
        self._starts: list[int] = []
        self._owners: list[int | None] = []

    def stamp(self, tensors: Sequence[Tensor], owner: int | None) -> int | None:
        """Number what has led to some tensors since the last time.

        Args:
            tensors: Where to begin.
            owner: The microbatch that computed them; `None` for what all of them did together.

        Returns:
            Another microbatch that some of it belongs to; `None` if, as it should be, there is none.
        """
        found: dict[Any, int] = {}
        strangers: set[int] = set()
        waiting: list[Any] = [each.grad_fn for each in tensors if each.grad_fn is not None]
        if not all(hasattr(node, "_set_sequence_nr") for node in waiting):
            return None
        while waiting:
            node = waiting.pop()
            number = node._sequence_nr()
            if number >= _FIRST:
                if number < _LAST and (other := self._owner(number)) is not None:
                    strangers.add(other)
            elif node not in found:
                found[node] = number
                waiting += [each for each, _ in node.next_functions if each is not None]
        self._starts.append(self._next)
        self._owners.append(owner)
        for number, node in enumerate(sorted(found, key=found.__getitem__), start=self._next):
            node._set_sequence_nr(number)
        self._next += len(found)
        return next(iter(sorted(strangers - {owner})), None) if owner is not None else None

    def _owner(self, number: int) -> int | None:
        return self._owners[bisect_right(self._starts, number) - 1]
