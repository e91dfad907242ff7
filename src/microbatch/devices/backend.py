"""Functions of a device's backend, which are the same calls for CUDA, ROCm, MPS, XPU, NPU and HPU.

A backend is torch's module of a device type, such as `torch.cuda` or `torch.xpu`. ROCm's is `torch.cuda` too. A
function that a backend lacks is looked up in `torch.accelerator`, if the device is the current accelerator.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from functools import cache
from typing import Any

import torch
from torch import Tensor

from microbatch.errors import ConfigError

# Whether these have float64 is known without asking them.
_HAS_FLOAT64 = {"cpu": True, "cuda": True, "meta": True, "mps": False}


def backend_of(kind: str) -> Any:
    """Return torch's module of a device type.

    Args:
        kind: A type of device, such as ``"cuda"``.

    Returns:
        The module, such as `torch.cuda`; `None` if this PyTorch has none.
    """
    return getattr(torch, kind, None)


def accelerator() -> str | None:
    """Return the type of this machine's accelerator.

    Returns:
        A type of device, such as ``"cuda"`` or ``"mps"``; `None` if there is only the CPU.
    """
    found = torch.accelerator.current_accelerator(check_available=True)
    return None if found is None else found.type


def function_of(device: torch.device, *names: str) -> Callable[..., Any] | None:
    """Find a function of a device's backend.

    Args:
        device: The device.
        names: Names of the function; the first one that exists is taken.

    Returns:
        The function, which takes its own arguments but no device; `None` if neither the backend nor `torch.accelerator`
        has it.
    """
    backend = backend_of(device.type)
    for name in names:
        if callable(found := getattr(backend, name, None)):
            return _with_device(found, device)
    for name in names:
        if callable(found := getattr(torch.accelerator, name, None)) and device.type == accelerator():
            return _or_lacking(_with_device(found, device))
    return None


def ask(device: torch.device, *names: str, otherwise: Any = None) -> Any:
    """Call a function of a device's backend that takes nothing but the device.

    Args:
        device: The device.
        names: Names of the function; the first one that exists is taken.
        otherwise: What to return if the backend has no such function, or does not implement it.

    Returns:
        The function's result.
    """
    function = function_of(device, *names)
    try:
        return otherwise if function is None else function()
    except (NotImplementedError, AttributeError):
        return otherwise


def synchronize(device: torch.device) -> None:
    """Wait until a device has done its work.

    Args:
        device: The device; on the CPU there is nothing to wait for.
    """
    if device.type != "cpu":
        ask(device, "synchronize")


def set_current(device: torch.device) -> None:
    """Make a device the current one of its type, where a type may have several.

    Args:
        device: The device.
    """
    if device.type != "cpu":
        ask(device, "set_device", "set_device_index")


def name_of(device: torch.device) -> str:
    """Return the name of the hardware.

    Args:
        device: The device.

    Returns:
        The name, such as ``"NVIDIA H200"``; empty if the backend does not know it.
    """
    return "" if device.type == "cpu" else str(ask(device, "get_device_name", otherwise=""))


def random_state(device: torch.device) -> Tensor | None:
    """Copy the state of a device's random generator.

    Args:
        device: The device.

    Returns:
        The state; `None` for the CPU, and for a backend without a generator that can be read.
    """
    return None if device.type == "cpu" else ask(device, "get_rng_state")


def set_random_state(device: torch.device, state: Tensor) -> None:
    """Set the state of a device's random generator.

    Args:
        device: The device.
        state: What `random_state` returned.
    """
    function = function_of(device, "set_rng_state")
    if function is not None:
        function(state)


def wide_dtype(device: torch.device) -> torch.dtype:
    """Return the widest floating dtype that a device supports, for sums of scalars.

    Args:
        device: Device of the scalars.

    Returns:
        float64, or float32 on a device without float64, such as MPS.

    Cost:
        For a type of device that is not known here, one small operator at the first call.
    """
    known = _HAS_FLOAT64.get(device.type)
    return torch.float64 if (_adds_float64(device.type) if known is None else known) else torch.float32


def to_wide(tensor: Tensor) -> Tensor:
    """Convert a tensor to the widest floating dtype of its device.

    Args:
        tensor: Of any dtype.

    Returns:
        The tensor in float64, or in float32 on a device without float64.
    """
    return tensor.to(wide_dtype(tensor.device))


def to_host_in_float64(tensor: Tensor) -> Tensor:
    """Copy a tensor to the host, in float64; a device without float64 cannot convert it itself.

    Args:
        tensor: Of any dtype.

    Returns:
        A copy that shares no memory with the tensor.
    """
    return tensor.detach().to("cpu").to(torch.float64, copy=True)


def check_autocast(device: torch.device, dtype: torch.dtype) -> None:
    """Refuse autocast where a device's backend does not have it.

    Args:
        device: The device.
        dtype: Of the forward passes.

    Raises:
        ConfigError: PyTorch has no autocast for this type of device, or the hardware has no bfloat16.
    """
    if not torch.amp.is_autocast_available(device.type):
        raise ConfigError(f"autocast: PyTorch has none for {device.type!r}; leave it out, or train in {dtype} itself")
    if dtype is torch.bfloat16 and device.type != "cpu" and not ask(device, "is_bf16_supported", otherwise=True):
        raise ConfigError(f"autocast: {name_of(device) or device} has no bfloat16; use torch.float16, or leave it out")


def is_recording() -> bool:
    """Return whether the current stream records a graph of the accelerator, so that no value can be read.

    Returns:
        Whether it does; False without an accelerator, or if its backend records no graphs.
    """
    kind = accelerator()
    recording = None if kind is None else getattr(backend_of(kind), "is_current_stream_capturing", None)
    return recording is not None and bool(recording())


def foreach_is_default(device: torch.device) -> bool:
    """Return whether an optimizer updates all its parameters at once by default, which takes temporary memory.

    Args:
        device: The device of the parameters.

    Returns:
        Whether it does.
    """
    from torch.utils._foreach_utils import (  # noqa: PLC0415 - private, and for dry runs only
        _get_foreach_kernels_supported_devices,  # pyright: ignore[reportPrivateUsage]
    )

    return device.type in _get_foreach_kernels_supported_devices()


def _with_device(function: Callable[..., Any], device: torch.device) -> Callable[..., Any]:
    """Pass the device to a function that takes one; MPS has one device, and some of its functions take none."""
    return (lambda *args: function(*args, device)) if _takes_device(function) else function


def _or_lacking(function: Callable[..., Any]) -> Callable[..., Any]:
    """Turn the RuntimeError of a function of `torch.accelerator`, which a backend does not support, into our word."""

    def supported(*args: Any) -> Any:
        try:
            return function(*args)
        except RuntimeError as error:
            raise NotImplementedError(str(error)) from error

    return supported


@cache
def _takes_device(function: Callable[..., Any]) -> bool:
    try:
        names = list(inspect.signature(function).parameters)
    except (TypeError, ValueError):  # a function of C++
        return False
    return bool(names) and names[-1] in {"device", "device_index"}


@cache
def _adds_float64(kind: str) -> bool:
    """Return whether a device adds float64 numbers; some refuse the dtype, and others the operator."""
    try:
        return float(torch.ones(2, dtype=torch.float64, device=kind).sum()) == 2
    except (TypeError, RuntimeError):
        return False
