"""Sums that do not depend on who computed which part: one binary tree over numbered parts."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import TypeAlias

import torch
from torch import Tensor

Tensors: TypeAlias = Sequence[Tensor | None]


@dataclass(frozen=True, slots=True)
class Node:
    """The sum of ``2 ** level`` parts, from ``index * 2 ** level`` on.

    Attributes:
        level: Its height; 0 for one part.
        index: Which of its level.
        tensors: The sum; `None` where no part had anything.
    """

    level: int
    index: int
    tensors: Tensors


class Tree:
    """Add parts up, each to its neighbour, the sums of two to theirs, and so on.

    Floating-point addition depends on the order. Here it depends on the parts' numbers alone: whoever has a run of
    parts, from any number on, adds up what is whole in it, and what is left comes together in the same tree elsewhere.

    Args:
        first: Number of the first part.

    Cost:
        As many sums at once as the number of parts has binary digits, twice that where the run begins in the midst.

    Example:
        >>> numbers = [torch.tensor([x]) for x in (1e8, 1.0, -1e8, 1.0)]
        >>> whole, left, right = Tree(0), Tree(0), Tree(1)
        >>> for number in numbers:
        ...     whole.add([number.clone()])
        >>> left.add([numbers[0].clone()])
        >>> for number in numbers[1:]:
        ...     right.add([number.clone()])
        >>> total([*left.nodes, *right.nodes])[0].item() == total(whole.nodes)[0].item()
        True
    """

    def __init__(self, first: int) -> None:
        self._next = first
        self.nodes: list[Node] = []

    def add(self, tensors: Tensors) -> None:
        """Add the next part.

        Args:
            tensors: The part; its tensors are the tree's from now on.
        """
        self.nodes = _merged([*self.nodes, Node(0, self._next, tensors)])
        self._next += 1


def shape_of(first: int, parts: int) -> list[tuple[int, int]]:
    """Say which nodes a run of parts leaves.

    Args:
        first: Number of its first part.
        parts: How many.

    Returns:
        Levels and indices, in order.

    Example:
        >>> shape_of(0, 6), shape_of(3, 5)
        ([(2, 0), (1, 2)], [(0, 3), (2, 1)])
    """
    tree = Tree(first)
    for _ in range(parts):
        tree.add([])
    return [(node.level, node.index) for node in tree.nodes]


def total(nodes: Iterable[Node]) -> Tensors:
    """Bring the nodes of all parts together.

    Args:
        nodes: Of the whole, in order; what they hold may be written to.

    Returns:
        The sum.
    """
    left: list[Node] = []
    for node in nodes:
        left = _merged([*left, node])
    # Where the number of parts is no power of two, from the smallest up: a matter of their number alone, too.
    found = left.pop().tensors
    while left:
        found = _added(left.pop().tensors, found)
    for each in found:
        if each is not None:
            each.add_(0.0)  # or a zero that nobody had would have another sign than the sum of two
    return found


def _merged(nodes: list[Node]) -> list[Node]:
    while len(nodes) > 1:
        left, right = nodes[-2:]
        if left.level != right.level or left.index % 2 or right.index != left.index + 1:
            break
        nodes[-2:] = [Node(left.level + 1, left.index // 2, _added(left.tensors, right.tensors))]
    return nodes


def _added(left: Tensors, right: Tensors) -> Tensors:
    """Add the right to the left, in place where both are there."""
    pairs = list(zip(left, right, strict=True))
    both = [(a, b) for a, b in pairs if a is not None and b is not None]
    if both:
        # Private by name, and what torch's own optimizers are made of.
        torch._foreach_add_([a for a, _ in both], [b for _, b in both])  # pyright: ignore[reportPrivateUsage, reportPrivateImportUsage]
    return [b if a is None else a for a, b in pairs]
