"""Losses that couple samples: the representations of a whole batch, and what goes back to each of its microbatches.

A loss of the whole batch's representations ``z = (z_1, ..., z_n)`` is differentiated in two parts, since
``dL/dw = sum_k (dL/dz_k) (dz_k/dw)``: first by ``z``, of which nothing but the numbers is needed, then microbatch by
microbatch by the weights. Each ``dL/dz_k`` comes from all of ``z``, so nothing is approximated; and parameters that the
loss uses itself, such as a temperature, get their gradient in the first part, once.

Gao, Zhang, Han, Callan 2021, "Scaling deep contrastive learning batch size under memory limited setup".
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_flatten, tree_map, tree_unflatten

from microbatch.errors import LossError, NoGraphError
from microbatch.loss.loss import Share


@dataclass(frozen=True, slots=True)
class Representations:
    """What an encoder returned for some rows.

    Attributes:
        tensors: Each of shape ``(rows, ...)``; those that are not floating point, such as labels, have no gradient.
        form: The structure that the encoder returned, with the tensors' numbers in their places.
    """

    tensors: list[Tensor]
    form: Any

    @property
    def structure(self) -> Any:
        """The structure that the encoder returned, with these tensors."""
        return tree_map(self.tensors.__getitem__, self.form)

    def copied(self) -> Representations:
        """Return copies without a graph, which keep nothing else in memory, as a view of all tokens' states would."""
        return replace(self, tensors=[tensor.detach().clone() for tensor in self.tensors])

    def as_leaves(self) -> Representations:
        """Return the same numbers as leaves of a new graph, which gradients can be asked for."""
        leaves = [tensor.detach().requires_grad_(tensor.is_floating_point()) for tensor in self.tensors]
        return replace(self, tensors=leaves)

    def gradients(self) -> list[Tensor | None]:
        """Return what a backward has left in leaves, and take it away."""
        found: list[Tensor | None] = [tensor.grad for tensor in self.tensors]
        for tensor in self.tensors:
            tensor.grad = None
        return found


def taken_apart(encoded: object, *, rows: int) -> Representations:
    """Take apart what an encoder returned for a microbatch.

    Args:
        encoded: A tensor of shape ``(rows, ...)``, or nested dicts, lists and tuples of such.
        rows: Rows of the microbatch.

    Returns:
        Its tensors.

    Raises:
        LossError: There is no tensor in it, or something else than tensors, or a tensor of another number of rows.

    Example:
        >>> found = taken_apart({"image": torch.zeros(2, 3), "text": (torch.ones(2, 4),)}, rows=2)
        >>> [tuple(tensor.shape) for tensor in found.tensors], found.form
        ([(2, 3), (2, 4)], {'image': 0, 'text': (1,)})
    """
    tensors, spec = tree_flatten(encoded)
    if not tensors:
        raise LossError(f"encode returned no tensor, but {encoded!r}; return the representations of the rows")
    for tensor in tensors:
        if not isinstance(tensor, Tensor):
            raise LossError(
                f"encode returned a {type(tensor).__name__} beside tensors; return the representations of the rows "
                "alone: what belongs to no row, such as a temperature, is taken from the model in loss_fn"
            )
        if tensor.ndim == 0 or len(tensor) != rows:
            raise LossError(
                f"encode returned a tensor of shape {tuple(tensor.shape)} for a microbatch of {rows} rows; the first "
                "dimension is the rows. What belongs to no row, such as a temperature, is taken from the model in "
                "loss_fn"
            )
    return Representations(tensors, tree_unflatten(list(range(len(tensors))), spec))


def put_together(pieces: Sequence[Representations], in_order: Callable[[Sequence[Tensor]], Tensor]) -> Representations:
    """Put the microbatches' representations together.

    Args:
        pieces: One for each microbatch; at least one.
        in_order: Joins one tensor of each microbatch to one of the whole batch.

    Returns:
        The whole batch's.

    Raises:
        LossError: The microbatches' representations have different structures.
    """
    first = pieces[0]
    for piece in pieces[1:]:
        if piece.form != first.form:
            raise LossError(
                f"encode returned different structures for microbatches of one batch: {first.form} and {piece.form}, "
                "where numbers stand for tensors"
            )
    columns = zip(*(piece.tensors for piece in pieces), strict=True)
    return replace(first, tensors=[in_order(column) for column in columns])


def seeds_for(piece: Representations, gradients: Sequence[Tensor | None]) -> tuple[list[Tensor], list[Tensor]]:
    """Say where a microbatch's backward begins, and with what.

    Args:
        piece: Its representations, with their graph.
        gradients: The loss's gradient with respect to each, or `None`.

    Returns:
        The tensors that lead to a parameter and whose gradient is known, and their gradients.
    """
    pairs = zip(piece.tensors, gradients, strict=True)
    known = [(tensor, grad.to(tensor.dtype)) for tensor, grad in pairs if grad is not None and tensor.requires_grad]
    return [tensor for tensor, _ in known], [grad for _, grad in known]


def check_reached(leaves: Representations) -> None:
    """Refuse a loss that does not depend on any representation: no encoder would learn from it.

    Args:
        leaves: What the loss was given, after its backward.

    Raises:
        NoGraphError: None of it has a gradient.
    """
    if all(tensor.grad is None for tensor in leaves.tensors):
        raise NoGraphError(
            "the loss has no gradient with respect to any representation: loss_fn(model, representations) detached "
            "them, or computed them again; use the representations that it is given"
        )


def own_part(share: Share, *, own: int, whole: int) -> Share:
    """Take a rank's part of the loss that every rank has computed of all ranks' rows.

    The parts add up to the loss, so that sums, counts and gradients can be added over the ranks as ever.

    Args:
        share: The loss of the whole batch.
        own: Rows of this rank.
        whole: Rows of all ranks.

    Returns:
        The share with its weight and its count times ``own / whole``.
    """
    if own == whole:
        return share
    count = share.count.double() if isinstance(share.count, Tensor) else share.count
    return replace(share, weight=share.weight * own / whole, count=count * own / whole)


def stand_in(encoded: object) -> Tensor:
    """Return some loss of representations, to learn what encoding and its backward take.

    Args:
        encoded: What an encoder returned.

    Returns:
        Their sum; shape ``()``.
    """
    tensors = [leaf for leaf in tree_flatten(encoded)[0] if isinstance(leaf, Tensor) and leaf.is_floating_point()]
    return torch.stack([tensor.sum(dtype=torch.float32) for tensor in tensors]).sum()
