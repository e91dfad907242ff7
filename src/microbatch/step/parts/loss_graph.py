"""Walk the graph behind a loss, without running it."""

from __future__ import annotations

from collections.abc import Container, Iterator
from typing import Any

from torch import Tensor


def nodes_of_loss(loss: Tensor, through: Container[str], *, most: int) -> Iterator[Any]:
    """Yield the nodes behind a loss, the last one first; none for a root that only communicates, which has no graph."""
    return nodes_behind(getattr(loss, "grad_fn", None), through, most=most)


def nodes_behind(start: Any, through: Container[str] | None, *, most: int) -> Iterator[Any]:
    """Yield a node and the nodes behind it, until ``most`` are known.

    A node is known by its type: a function of the user's may keep a ``name`` of its own in its context.

    Args:
        start: The node; `None` yields nothing.
        through: Types of the nodes whose own inputs are yielded, too; `None` for all types.
        most: No further inputs are looked up once so many are known.
    """
    nodes = [start]
    for node in nodes:  # grows in the loop
        if node is None:
            continue
        yield node
        if (through is None or type(node).__name__ in through) and len(nodes) < most:
            nodes += [each for each, _ in node.next_functions]
