"""A direct call of the autograd engine, and a check that plain reverse-mode autograd is what runs."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.autograd.graph import _engine_run_backward  # pyright: ignore[reportPrivateUsage]


def run_backward(tensors: Sequence[Any], grads: Sequence[Tensor]) -> None:
    """Run `torch.autograd.backward` on roots whose gradients are given and known to fit.

    Args:
        tensors: The roots of the graph; at least one.
        grads: A gradient for each root, of its shape and dtype.

    Cost:
        One backward, without the checks of `torch.autograd.backward`, which take longer than a tiny backward.
    """
    _engine_run_backward(tuple(tensors), tuple(grads), False, False, (), allow_unreachable=True, accumulate_grad=True)


def is_plain_autograd() -> bool:
    """Return whether neither `torch.func` nor forward-mode differentiation is active."""
    functional = torch._C._are_functorch_transforms_active()  # pyright: ignore[reportPrivateUsage]
    return not functional and torch.autograd.forward_ad._current_level < 0  # pyright: ignore[reportPrivateUsage]
