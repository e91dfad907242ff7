"""Put a tensor's values aside while the tensor itself is written over."""

from __future__ import annotations

import tempfile
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor

from microbatch.memory.offload_targets import File
from microbatch.memory.tensor_store import is_movable


class Aside:
    """Copies off the device: of CPU tensors in a file without a name, of CUDA tensors in pinned host memory.

    Args:
        directory: Where the file lies; `None` for `tempfile.gettempdir`. It may be memory: see `File`.

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
        """Copy a tensor's values.

        Args:
            tensor: Any; it may be written to at once.

        Returns:
            What brings a copy back: of the same shape, dtype, device and values, as often as it is called. The copy off
            the device is given up with it.

        Raises:
            SpillError: The disk is full, or the file cannot be made or written.

        Cost:
            On the CPU a write to the file, which lives in the system's cache first; on CUDA a copy over the link, in
            the order of the current stream.
        """
        device = tensor.device
        if not is_movable(tensor):
            copy = tensor.detach().clone()
            return lambda: copy
        if device.type == "cuda":
            host = torch.empty_like(tensor, device="cpu", pin_memory=True)
            host.copy_(tensor.detach(), non_blocking=True)
            return lambda: host.to(device, non_blocking=True)
        if self._file is None:
            self._file = File(self._directory or tempfile.gettempdir())
        dtype, shape = tensor.dtype, tensor.shape
        piece = self._file.put(tensor.detach().contiguous().view(-1).view(torch.uint8))
        return lambda: piece.fetch().view(dtype).view(shape)
