"""Tensors in the memory of captured CUDA graphs, which the next run of the graph overwrites."""

from __future__ import annotations

import sys

import torch
from torch import Tensor

# Imported by torch when it captures its first graph, and not before.
_CAPTURE = "torch._inductor.cudagraph_trees"


def graphs_are_captured() -> bool:
    """Return whether `torch.compile` may have captured a CUDA graph in this process."""
    return _CAPTURE in sys.modules


def graphs_can_be_captured() -> bool:
    """Return whether a CUDA graph is captured, or the next forward could capture the first one."""
    return graphs_are_captured() or torch.cuda.is_initialized()


def kept(tensor: Tensor) -> Tensor:
    """Return a tensor that stays as it is while other microbatches run.

    Args:
        tensor: A result of a forward or a backward.

    Returns:
        A copy where CUDA graphs are captured; otherwise the tensor itself.

    Source:
        https://github.com/pytorch/pytorch/issues/169545.
    """
    return tensor.clone() if graphs_are_captured() else tensor
