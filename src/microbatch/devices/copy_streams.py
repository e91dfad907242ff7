"""Streams, events and pinned host memory of an accelerator, for copies that run beside the computation."""

from __future__ import annotations

from contextlib import AbstractContextManager, ExitStack
from functools import cache
from typing import Any

import torch
from torch import Tensor

from microbatch.devices.backend import ask, backend_of

_NEEDED = ("Stream", "Event", "current_stream", "set_stream", "stream")


def has_streams(device: torch.device) -> bool:
    """Return whether a device's backend has streams, so that copies can run beside the computation.

    Args:
        device: The device.

    Returns:
        Whether it has; False for the CPU, and for MPS.
    """
    return device.type != "cpu" and _has_streams(device.type)


def new_stream(device: torch.device) -> Any:
    """Create a stream on a device that has streams.

    Args:
        device: The device.

    Returns:
        The stream.
    """
    return backend_of(device.type).Stream(device)


def new_event(device: torch.device) -> Any:
    """Create an event on a device that has streams.

    Args:
        device: The device.

    Returns:
        The event.
    """
    return backend_of(device.type).Event()


def current_stream(device: torch.device) -> Any:
    """Return the current stream of this thread.

    Args:
        device: The device.

    Returns:
        The stream; `None` on a device without streams.
    """
    return ask(device, "current_stream") if has_streams(device) else None


def on_stream(stream: Any) -> AbstractContextManager[object]:
    """Make a stream of its device current, inside a context.

    Args:
        stream: The stream.

    Returns:
        The context.
    """
    return backend_of(stream.device.type).stream(stream)


def set_stream(stream: Any) -> None:
    """Make a stream current in this thread.

    Args:
        stream: The stream.
    """
    backend_of(stream.device.type).set_stream(stream)


def enter_stream(stack: ExitStack, stream: Any) -> None:
    """Make a stream and its device current until a stack of contexts is left.

    Args:
        stack: The stack.
        stream: The stream.
    """
    backend = backend_of(stream.device.type)
    if hasattr(backend, "device"):
        stack.enter_context(backend.device(stream.device))
    stack.enter_context(backend.stream(stream))


@cache
def can_pin(device: torch.device) -> bool:
    """Return whether host memory can be pinned, so that copies to and from the device need no intermediate copy.

    Args:
        device: The device.

    Returns:
        Whether it can.

    Cost:
        One small pinned allocation at the first call.
    """
    if device.type == "cpu":
        return False
    try:
        return torch.zeros(1, dtype=torch.uint8).pin_memory().device.type == "cpu"
    except RuntimeError:
        return False


def pinned(tensor: Tensor, device: torch.device) -> Tensor:
    """Copy a host tensor to pinned memory.

    Args:
        tensor: Any tensor; one that is not on the host stays as it is.
        device: The accelerator that will read it.

    Returns:
        The copy; the tensor itself if the host's memory cannot be pinned for this device.
    """
    return tensor.pin_memory() if tensor.device.type == "cpu" and can_pin(device) else tensor


def empty_on_host(shape: Any, dtype: torch.dtype, device: torch.device) -> Tensor:
    """Allocate host memory for a copy from a device, pinned if possible.

    Args:
        shape: Shape of the tensor.
        dtype: Its dtype.
        device: The accelerator.

    Returns:
        A tensor with arbitrary values.
    """
    return torch.empty(shape, dtype=dtype, device="cpu", pin_memory=can_pin(device))


@cache
def _has_streams(kind: str) -> bool:
    backend = backend_of(kind)
    return all(callable(getattr(backend, name, None)) for name in _NEEDED)
