"""Sums that are bitwise equal for any division of the work: a binary tree over numbered parts."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import TypeAlias

import torch
from torch import Tensor

Tensors: TypeAlias = Sequence[Tensor | None]


@dataclass(frozen=True, slots=True)
class Node:
    """The sum of ``2 ** level`` consecutive parts, from part ``index * 2 ** level`` on.

    Attributes:
        level: Height of the node; 0 for a single part.
        index: Position of the node in its level.
        tensors: The sum; `None` for each tensor that no part had.
    """

    level: int
    index: int
    tensors: Tensors


class Tree:
    """Add up consecutive parts pairwise: two neighbours, then two sums of two, and so on.

    The result of floating-point additions depends on their order. Here the order depends only on the numbers of the
    parts. A rank with some consecutive parts adds up the complete subtrees among them; `total` combines the subtrees of
    all ranks in the same order.

    Args:
        first: Number of the first part.

    Cost:
        Memory for as many sums as the number of parts has binary digits, or twice as many if ``first`` is not 0.

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
        """Add the next part's tensors, to which the tree adds in place."""
        self.nodes = _merged([*self.nodes, Node(0, self._next, tensors)])
        self._next += 1


def shape_of(first: int, parts: int) -> list[tuple[int, int]]:
    """Return level and index of the nodes that a tree has after consecutive ``parts`` from number ``first`` on.

    Example:
        >>> shape_of(0, 6), shape_of(3, 5)
        ([(2, 0), (1, 2)], [(0, 3), (2, 1)])
    """
    tree = Tree(first)
    for _ in range(parts):
        tree.add([])
    return [(node.level, node.index) for node in tree.nodes]


def total(nodes: Iterable[Node]) -> Tensors:
    """Add up nodes that together cover all parts, in order; their tensors are overwritten."""
    left: list[Node] = []
    for node in nodes:
        left = _merged([*left, node])
    # If the number of parts is no power of two, several nodes remain. Their order depends on that number only.
    found = left.pop().tensors
    while left:
        found = _added(left.pop().tensors, found)
    for each in found:
        if each is not None:
            each.add_(0.0)  # turns -0.0 into 0.0, as an addition with another part's zero would have done
    return found


def _merged(nodes: list[Node]) -> list[Node]:
    while len(nodes) > 1:
        left, right = nodes[-2:]
        if left.level != right.level or left.index % 2 or right.index != left.index + 1:
            break
        nodes[-2:] = [Node(left.level + 1, left.index // 2, _added(left.tensors, right.tensors))]
    return nodes


def _added(left: Tensors, right: Tensors) -> Tensors:
    """Add the right tensors to the left ones, in place if both exist."""
    pairs = list(zip(left, right, strict=True))
    both = [(a, b) for a, b in pairs if a is not None and b is not None]
    if both:
        # Private by name, but torch's own optimizers use it.
        torch._foreach_add_([a for a, _ in both], [b for _, b in both])  # pyright: ignore[reportPrivateUsage, reportPrivateImportUsage]
    return [b if a is None else a for a, b in pairs]
