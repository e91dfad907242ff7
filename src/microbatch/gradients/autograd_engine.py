"""Direct calls of the autograd engine, and a check that plain reverse-mode autograd is what runs."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.autograd import _make_grads  # pyright: ignore[reportPrivateUsage]
from torch.autograd.graph import _engine_run_backward  # pyright: ignore[reportPrivateUsage]


def run_engine(
    tensors: tuple[Any, ...],
    grads: tuple[Any, ...],
    *,
    keep: bool,
    create: bool,
    inputs: tuple[Any, ...],
    unused: bool,
    accumulate: bool,
) -> Any:
    """Run `torch.autograd.backward` or `torch.autograd.grad` so that the active function mode stays on.

    Both are functions that a mode intercepts, and a mode is off while its handler runs. Called from a handler, they
    would run without the mode, and so would the forward passes that checkpoints recompute. The engine's own entry point
    is not intercepted.

    Args:
        tensors: The roots of the graph.
        grads: A gradient for each root; `None` for 1.
        keep: Whether to retain the graph.
        create: Whether to create a graph of the gradient.
        inputs: Leaves or tensors to differentiate by; empty for all leaves.
        unused: Whether inputs may be unreachable.
        accumulate: Whether to add to `.grad` instead of returning gradients.

    Returns:
        The gradients of ``inputs``, or nothing useful if they were accumulated.
    """
    return _engine_run_backward(
        tensors,
        _make_grads(tensors, grads, is_grads_batched=False),
        keep,
        create,
        inputs,
        allow_unreachable=unused,
        accumulate_grad=accumulate,
    )


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
