"""Losses that couple samples: collect the batch's representations, and send their gradients back to the microbatches.

A loss of the whole batch's representations ``z = (z_1, ..., z_n)`` is differentiated in two steps, because
``dL/dw = sum_k (dL/dz_k) (dz_k/dw)``. The first step computes ``dL/dz``, which needs only the values of ``z``. The
second step runs backward through the encoder, microbatch by microbatch.

Each ``dL/dz_k`` depends on the complete ``z``, so nothing is approximated. Parameters that the loss uses directly, such
as a temperature, get their gradient in the first step, once.

Gao, Zhang, Han, Callan 2021, "Scaling deep contrastive learning batch size under memory limited setup".
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_flatten, tree_map, tree_unflatten

from microbatch.devices.backend import to_wide
from microbatch.devices.captured_graphs import kept
from microbatch.errors import LossError, NoGraphError
from microbatch.kind_words import kind_of
from microbatch.loss.loss import Share


@dataclass(frozen=True, slots=True)
class Representations:
    """The tensors that an encoder returned for some rows, and the structure around them.

    Attributes:
        tensors: Tensors of shape ``(rows, ...)``. Only those of a floating dtype have a gradient.
        form: The structure that the encoder returned, with each tensor replaced by its index in ``tensors``.
    """

    tensors: list[Tensor]
    form: Any

    @property
    def structure(self) -> Any:
        """The structure that the encoder returned, with these tensors in it."""
        return tree_map(self.tensors.__getitem__, self.form)

    def copied(self) -> Representations:
        """Return copies without a graph; unlike views, the copies keep no larger tensor in memory."""
        return replace(self, tensors=[tensor.detach().clone() for tensor in self.tensors])

    def as_leaves(self) -> Representations:
        """Return detached tensors that are the leaves of a new graph and get gradients."""
        leaves = [tensor.detach().requires_grad_(tensor.is_floating_point()) for tensor in self.tensors]
        return replace(self, tensors=leaves)

    def gradients(self) -> list[Tensor | None]:
        """Return the leaves' gradients, which stay while the encoder runs again, and remove them from the leaves."""
        gradients = [None if tensor.grad is None else kept(tensor.grad) for tensor in self.tensors]
        for tensor in self.tensors:
            tensor.grad = None
        return gradients


def taken_apart(encoded: object, *, rows: int) -> Representations:
    """Flatten the result of an encoder for one microbatch into its tensors.

    Args:
        encoded: A tensor of shape ``(rows, ...)``, or nested dicts, lists and tuples of such tensors.
        rows: Number of rows of the microbatch.

    Returns:
        The tensors with their structure.

    Raises:
        LossError: ``encoded`` contains no tensor, a value that is not a tensor, or a tensor with another number of
            rows.

    Example:
        >>> found = taken_apart({"image": torch.zeros(2, 3), "text": (torch.ones(2, 4),)}, rows=2)
        >>> [tuple(tensor.shape) for tensor in found.tensors], found.form
        ([(2, 3), (2, 4)], {'image': 0, 'text': (1,)})
    """
    tensors, spec = tree_flatten(encoded)
    if not tensors:
        raise LossError(f"encode returned {encoded!r}, which has no tensor; return the representations of the rows")
    for tensor in tensors:
        if not isinstance(tensor, Tensor):
            raise LossError(
                f"encode returned {kind_of(tensor)} beside tensors. Return only the representations of the "
                "rows: a value that belongs to no row, such as a temperature, must come from the model in loss_fn"
            )
        if tensor.ndim == 0 or len(tensor) != rows:
            raise LossError(
                f"encode returned a tensor of shape {tuple(tensor.shape)} for a microbatch of {rows} rows; the first "
                "dimension must be the rows. A tensor that belongs to no row, such as a temperature, must come from "
                "the model in loss_fn"
            )
    return Representations(tensors, tree_unflatten(list(range(len(tensors))), spec))


def put_together(pieces: Sequence[Representations], in_order: Callable[[Sequence[Tensor]], Tensor]) -> Representations:
    """Join the representations of all microbatches, which must have one structure; ``in_order`` joins tensors."""
    first = pieces[0]
    for piece in pieces[1:]:
        if piece.form != first.form:
            raise LossError(
                f"encode returned different structures for microbatches of one batch: {first.form} and {piece.form}, "
                "where each number is a tensor; return the same structure for every microbatch"
            )
    columns = zip(*(piece.tensors for piece in pieces), strict=True)
    return replace(first, tensors=[in_order(column) for column in columns])


def seeds_for(piece: Representations, gradients: Sequence[Tensor | None]) -> tuple[list[Tensor], list[Tensor]]:
    """Return the tensors from which a microbatch's backward starts, and their gradients."""
    pairs = zip(piece.tensors, gradients, strict=True)
    with_gradient = [
        (tensor, grad.to(tensor.dtype)) for tensor, grad in pairs if grad is not None and tensor.requires_grad
    ]
    return [tensor for tensor, _ in with_gradient], [grad for _, grad in with_gradient]


def check_reached(leaves: Representations) -> None:
    """Refuse a loss that depends on no representation, because the encoder would get no gradient."""
    if all(tensor.grad is None for tensor in leaves.tensors):
        raise NoGraphError(
            "the loss has no gradient with respect to any representation: loss_fn(model, representations) detached "
            "the representations, or computed them again. Use the representations that are passed to loss_fn"
        )


def own_part(share: Share, *, own: int, whole: int) -> Share:
    """Return a loss that every rank computed over all rows, scaled to this rank's part of ``own / whole``.

    The parts add up to the loss. So sums, counts and gradients are summed over the ranks as for any other loss.
    """
    if own == whole:
        return share
    count = to_wide(share.count) if isinstance(share.count, Tensor) else share.count
    metrics = {name: value * own / whole for name, value in (share.metrics or {}).items()}
    return replace(share, weight=share.weight * own / whole, count=count * own / whole, metrics=metrics)


def stand_in(encoded: object) -> Tensor:
    """Return a placeholder loss of representations: their sum, for passes that only measure memory or time."""
    tensors = [leaf for leaf in tree_flatten(encoded)[0] if isinstance(leaf, Tensor) and leaf.is_floating_point()]
    return torch.stack([tensor.sum(dtype=torch.float32) for tensor in tensors]).sum()
