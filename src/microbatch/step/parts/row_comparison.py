"""Find out in a loss's graph whether it compares the rows of a microbatch with each other."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from microbatch.step.parts.loss_graph import nodes_behind, nodes_of_loss

_NODES = 24  # nodes of a graph that are looked at, on each way
_STEPS = (
    "Add Sub Mul Div Neg Sum Mean Stack ToCopy View Squeeze Unsqueeze Permute T Transpose UnsafeView ReshapeAlias "
    "LogSoftmax NllLoss"
)
# What may lie between a loss and the product of two matrices that its cross entropy reads.
_THROUGH = frozenset(f"{name}Backward{number}" for name in _STEPS.split() for number in range(2))
_PRODUCTS = frozenset({"MmBackward0", "BmmBackward0"})
# Nodes that a value computed from a batch has, and a weight that was normalised or scaled has not.
_OF_DATA = _PRODUCTS | {
    "AddmmBackward0",
    "ConvolutionBackward0",
    "EmbeddingBackward0",
    "EmbeddingBagBackward0",
    "NativeLayerNormBackward0",
    "_LinearBackward",
    "_EmbeddingBackward",
}


def compares_rows(loss: Tensor, rows: float) -> bool:
    """Return whether a loss is a cross entropy over the similarities of a microbatch's own rows.

    Its logits are the product of two matrices that were both computed from data. They have as many columns as rows, or
    a multiple. Consecutive rows have consecutive columns as their targets.

    Args:
        loss: The loss of a microbatch, before its backward.
        rows: The microbatch's rows.

    Returns:
        Whether it is one; False also where the graph does not show it.

    Cost:
        Some ten microseconds. One host synchronisation if all but the targets is so.
    """
    if rows < 2:
        return False
    found = list(nodes_of_loss(loss, _THROUGH, most=_NODES))
    if not any(type(node).__name__ in _PRODUCTS and _is_of_data(node) for node in found):
        return False
    return any(type(node).__name__ == "NllLossBackward0" and _has_own_targets(node, rows) for node in found)


def _is_of_data(product: Any) -> bool:
    """Return whether both factors of a product were computed from data."""
    return all(
        any(type(node).__name__ in _OF_DATA for node in nodes_behind(factor, None, most=_NODES))
        for factor, _ in product.next_functions[:2]
    )


def _has_own_targets(node: Any, rows: float) -> bool:
    """Return whether a cross entropy has columns for its rows, and the rows in order as targets."""
    logits, targets = (getattr(getattr(node, f"_raw_saved_{name}", None), "data", None) for name in ("self", "target"))
    if not isinstance(logits, Tensor) or not isinstance(targets, Tensor) or logits.ndim != 2 or targets.ndim != 1:
        return False
    if len(logits) % rows or logits.shape[1] % len(logits):
        return False
    # The targets of each view of the rows are consecutive columns.
    return int((targets.diff() != 1).sum()) < len(targets) / rows
