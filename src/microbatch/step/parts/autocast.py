"""Autocast for forward passes; backward runs outside, in the dtypes that forward recorded."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import ExitStack
from typing import Any

import torch
from torch import Tensor

from microbatch.devices.backend import check_autocast
from microbatch.step.part import OpenWindow, Part, Run


class Autocast(Part):
    """Run forward passes under autocast."""

    def __init__(self, dtype: torch.dtype) -> None:
        self._dtype, self._checked = dtype, False

    def open(self, window: OpenWindow, stack: ExitStack) -> None:
        """Enter autocast without its weight cache, which would live until the window ends."""
        if not self._checked:
            check_autocast(window.device, self._dtype)
            self._checked = True
        stack.enter_context(torch.autocast(window.device.type, self._dtype, cache_enabled=False))

    def backward(self, window: OpenWindow, run: Run) -> Run:
        """Run backward without autocast, which would cast products in float32."""
        kind = window.device.type

        def outside(tensors: Sequence[Any], seeds: Sequence[Tensor]) -> None:
            with torch.autocast(kind, enabled=False):
                run(tensors, seeds)

        return outside
