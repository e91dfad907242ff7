"""Offloaded activations in a rehearsal on fake tensors, which have no bytes that could be moved away."""

from __future__ import annotations

from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks

from microbatch.loss.loss import LossLike
from microbatch.step.dry_run_copies import LossFunction

_SMALLEST = 1 << 16
"""Bytes of the smallest storage that `Spill` moves unless it is told otherwise."""


def absent() -> saved_tensors_hooks:
    """Let go of what autograd saves, and make new tensors of the same shapes when backward asks for it.

    Returns:
        A context manager for forward passes, to be entered again and again.
    """
    return saved_tensors_hooks(_pack, _unpack)


@dataclass(frozen=True, slots=True)
class Inside:
    """A loss function that runs inside a context.

    Attributes:
        loss_fn: The loss function.
        around: The context, entered for each microbatch.
    """

    loss_fn: LossFunction
    around: AbstractContextManager[object]

    def __call__(self, model: nn.Module, microbatch: Any) -> LossLike:
        """Compute a microbatch's loss.

        Args:
            model: As for the loss function.
            microbatch: Likewise.

        Returns:
            What the loss function returns.
        """
        with self.around:
            return self.loss_fn(model, microbatch)


@dataclass(frozen=True, slots=True)
class _Shape:
    size: torch.Size
    stride: tuple[int, ...]
    dtype: torch.dtype
    device: torch.device


def _pack(tensor: Tensor) -> Tensor | _Shape:
    root = tensor if tensor._base is None else tensor._base
    stays = root.is_leaf and root.requires_grad
    if stays or tensor.layout is not torch.strided or tensor.untyped_storage().nbytes() < _SMALLEST:
        return tensor
    return _Shape(tensor.size(), tensor.stride(), tensor.dtype, tensor.device)


def _unpack(held: Tensor | _Shape) -> Tensor:
    if isinstance(held, Tensor):
        return held
    return torch.empty_strided(held.size, held.stride, dtype=held.dtype, device=held.device)
