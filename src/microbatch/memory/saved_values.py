"""Copies of a tensor's values off the device, taken before the tensor is overwritten."""

from __future__ import annotations

import tempfile
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor

from microbatch.devices.copy_streams import can_pin
from microbatch.memory.offload_targets import File
from microbatch.memory.tensor_store import is_movable


class Aside:
    """Copies off the device: CPU tensors in a temporary file, an accelerator's in pinned host memory.

    Args:
        directory: Where the file is created; `None` for `tempfile.gettempdir`. This directory may be in memory: see
            `File`.

    Example:
        >>> x = torch.tensor([1.0, 2.0])
        >>> was = Aside().put(x)
        >>> x.zero_(), was()
        (tensor([0., 0.]), tensor([1., 2.]))
    """

    def __init__(self, *, directory: str | Path | None = None) -> None:
        self._directory = directory
        self._file: File | None = None

    def put(self, tensor: Tensor) -> Callable[[], Tensor]:
        """Copy a tensor's values off the device.

        Args:
            tensor: Any tensor; it may be overwritten right after this call.

        Returns:
            A function that makes a tensor of the same shape, dtype, device and values, each time it is called. The copy
            off the device is freed together with the function.

        Raises:
            SpillError: The disk is full, or the file cannot be created or written.

        Cost:
            On the CPU a write to the file, which goes to the system's page cache first. On an accelerator a copy to the
            host, on the current stream.
        """
        device = tensor.device
        if not is_movable(tensor):
            copy = tensor.detach().clone()
            return lambda: copy
        if device.type != "cpu":
            host = torch.empty_like(tensor, device="cpu", pin_memory=can_pin(device))
            host.copy_(tensor.detach(), non_blocking=True)
            return lambda: host.to(device, non_blocking=True)
        if self._file is None:
            self._file = File(self._directory or tempfile.gettempdir())
        dtype, shape = tensor.dtype, tensor.shape
        piece = self._file.put(tensor.detach().contiguous().view(-1).view(torch.uint8))
        return lambda: piece.fetch().view(dtype).view(shape)
