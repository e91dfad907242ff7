"""Simulate activation offloading in a dry run on fake tensors, which have no bytes to move."""

from __future__ import annotations

from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks

from microbatch.loss.loss import LossLike
from microbatch.step.size.dry_run_copies import LossFunction

_SMALLEST = 1 << 16
"""Bytes of the smallest storage that `Spill` offloads by default."""


def absent() -> saved_tensors_hooks:
    """Free the tensors that autograd saves, and create new ones of the same shapes when backward needs them."""
    return saved_tensors_hooks(_pack, _unpack)


@dataclass(frozen=True, slots=True)
class Inside:
    """A loss function that runs inside a context, which is entered for each microbatch."""

    loss_fn: LossFunction
    around: AbstractContextManager[object]

    def __call__(self, model: nn.Module, microbatch: Any) -> LossLike:
        """Compute a microbatch's loss."""
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
