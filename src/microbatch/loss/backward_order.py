"""Set the order in which one backward runs through the graphs of several microbatches."""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Sequence
from typing import Any

from torch import Tensor

# Our numbers are above those that threads count to, and below those of autograd's gradient accumulation nodes.
_FIRST_NUMBER = 1 << 48
_LAST_NUMBER = 1 << 63


class Order:
    """Number the autograd nodes of interleaved microbatches, so that backward runs one microbatch after the other.

    Of the nodes that are ready, autograd runs the one with the highest sequence number, and each thread numbers its
    nodes by itself. So one backward over several microbatches would run through all of them at once, with all their
    gradients in memory.

    This class numbers the nodes section by section, where a section ends at a sync point of the microbatches. Within a
    section, the nodes are numbered microbatch by microbatch. Backward then runs one section of one microbatch after the
    other.

    A numbered node belongs to a known microbatch. So a microbatch that uses a tensor of another microbatch is detected.

    Sequence numbers are private to torch. Where they cannot be set, the gradient is the same, but backward needs more
    memory.
    """

    def __init__(self) -> None:
        self._next = _FIRST_NUMBER
        self._starts: list[int] = []
        self._owners: list[int | None] = []

    def stamp(self, tensors: Sequence[Tensor], owner: int | None) -> int | None:
        """Number all nodes that lead to ``tensors`` and have no number yet.

        Args:
            tensors: Tensors whose graphs are numbered.
            owner: Index of the microbatch that computed the tensors; `None` for a result of all microbatches.

        Returns:
            Index of another microbatch that owns a node in these graphs; `None` if there is none, as it should be.
        """
        new_nodes: dict[Any, int] = {}
        other_owners: set[int] = set()
        to_visit: list[Any] = [each.grad_fn for each in tensors if each.grad_fn is not None]
        if not all(hasattr(node, "_set_sequence_nr") for node in to_visit):
            return None
        while to_visit:
            node = to_visit.pop()
            number = node._sequence_nr()
            if number >= _FIRST_NUMBER:
                if number < _LAST_NUMBER and (node_owner := self._owner(number)) is not None:
                    other_owners.add(node_owner)
            elif node not in new_nodes:
                new_nodes[node] = number
                to_visit += [each for each, _ in node.next_functions if each is not None]
        self._starts.append(self._next)
        self._owners.append(owner)
        for number, node in enumerate(sorted(new_nodes, key=new_nodes.__getitem__), start=self._next):
            node._set_sequence_nr(number)
        self._next += len(new_nodes)
        return next(iter(sorted(other_owners - {owner})), None) if owner is not None else None

    def _owner(self, number: int) -> int | None:
        return self._owners[bisect_right(self._starts, number) - 1]
