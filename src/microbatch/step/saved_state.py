"""What a window has to put back when it does not end in a step: random state and buffers."""

from __future__ import annotations

import random
import sys
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer


@dataclass(frozen=True, slots=True)
class _Buffer:
    module: nn.Module
    name: str
    tensor: Tensor
    copy: Tensor


class Snapshot:
    """Hold the random state and the model's buffers of this moment.

    The generators are torch's on the CPU and on ``device``, Python's ``random``, and NumPy's global one if NumPy is
    in use. Buffers are copied each time: a version counter would miss a model that writes through ``.data``.

    Args:
        model: The module whose buffers forward passes may change.
        device: The device whose generator they may draw from.

    Cost:
        A copy of the buffers and a few kilobytes; no host synchronisation.

    Source:
        Laws B4, M1.
    """

    def __init__(self, model: nn.Module, device: torch.device) -> None:
        self._random = RandomState(device)
        self._buffers = [
            _Buffer(module, name, tensor, tensor.detach().clone())
            for module in model.modules()
            for name, tensor in module.named_buffers(recurse=False)
        ]

    def restore(self) -> None:
        """Put the random state and the buffers back."""
        self._random.restore()
        self.restore_buffers()

    @torch.no_grad()
    def restore_buffers(self) -> None:
        """Put the buffers back, also those that were replaced by other tensors."""
        for buffer in self._buffers:
            if getattr(buffer.module, buffer.name) is not buffer.tensor:
                setattr(buffer.module, buffer.name, buffer.tensor)
            buffer.tensor.copy_(buffer.copy)


def forget_unscaled(scaler: torch.amp.GradScaler, optimizers: Iterable[Optimizer]) -> None:
    """Let a scaler unscale once more: the gradients that it has unscaled in this window are dropped.

    Args:
        scaler: Which would refuse a second time before its next update.
        optimizers: The window's.
    """
    # Private by name; without it nothing could be taken back, and nothing was.
    stages: dict[int, Any] = getattr(scaler, "_per_optimizer_states", {})
    for optimizer in optimizers:
        stages.pop(id(optimizer), None)


def seed_everything(seed: int) -> None:
    """Seed Python, PyTorch on every device, and NumPy where it is in use.

    Args:
        seed: Any number in ``[0, 2**63)``.
    """
    random.seed(seed)
    torch.manual_seed(seed)
    if "numpy" in sys.modules:
        sys.modules["numpy"].random.seed(seed % 2**32)


class RandomState:
    """Hold the state of every global generator of this moment.

    Args:
        device: The device whose generator is held beside the CPU's.
        before: An earlier state, whose parts are shared where they have not changed since; `None` shares nothing.

    Cost:
        A few kilobytes, most of them for Python's generator; no host synchronisation.
    """

    def __init__(self, device: torch.device, before: RandomState | None = None) -> None:
        self._device = device
        self._cpu = torch.get_rng_state()
        self._on_device = torch.cuda.get_rng_state(device) if device.type == "cuda" else None
        now = random.getstate()
        self._python = before._python if before is not None and before._python == now else now
        self._numpy: Any = sys.modules["numpy"].random.get_state() if "numpy" in sys.modules else None

    def restore(self) -> None:
        """Put every generator back."""
        torch.set_rng_state(self._cpu)
        if self._on_device is not None:
            torch.cuda.set_rng_state(self._on_device, self._device)
        random.setstate(self._python)
        if self._numpy is not None:
            sys.modules["numpy"].random.set_state(self._numpy)
