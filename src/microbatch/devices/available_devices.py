"""The devices of this machine, by name, and what their backends lack."""

from __future__ import annotations

import torch

from microbatch.devices.backend import accelerator, ask, backend_of, function_of, wide_dtype
from microbatch.devices.copy_streams import can_pin, has_streams
from microbatch.devices.device_memory import allocator_of, total_bytes
from microbatch.errors import ConfigError


def resolve_device(name: str) -> torch.device:
    """Convert a device's name to a device that this machine has.

    Args:
        name: ``"auto"`` for the accelerator if there is one, otherwise the CPU; or a name that PyTorch knows, such as
            ``"cpu"``, ``"cuda"``, ``"cuda:1"``, ``"mps"`` or ``"xpu"``.

    Returns:
        The device; an accelerator with its index.

    Raises:
        ConfigError: PyTorch does not know the name, or this machine has no such device.

    Example:
        >>> resolve_device("cpu")
        device(type='cpu')
    """
    if name == "auto":
        name = accelerator() or "cpu"
    try:
        device = torch.device(name)
    except RuntimeError:
        raise ConfigError(f"--device {name!r} is not a device that this PyTorch knows; {_here()}") from None
    if device.type == "cpu":
        return torch.device("cpu")
    count = count_devices(device.type)
    if (device.index or 0) >= count:
        raise ConfigError(f"--device {name}: this PyTorch sees no such device; {_here()}")
    return torch.device(device.type, device.index or 0)


def count_devices(kind: str) -> int:
    """Count the devices of a type.

    Args:
        kind: A type of accelerator, such as ``"cuda"``.

    Returns:
        Their number; 0 if the backend is missing or not available.

    Example:
        >>> count_devices("meta")
        0
    """
    backend = backend_of(kind)
    if kind != accelerator() and not (hasattr(backend, "is_available") and backend.is_available()):
        return 0
    return int(backend.device_count()) if hasattr(backend, "device_count") else int(kind == accelerator())


def devices_here() -> list[str]:
    """Name the devices of this machine.

    Returns:
        Names for ``--device``, such as ``["cpu", "cuda:0", "cuda:1"]``.
    """
    kind = accelerator()
    return ["cpu"] + ([] if kind is None else [f"{kind}:{index}" for index in range(count_devices(kind))])


def lacking(device: torch.device) -> list[str]:
    """Name what a device's backend does not have, and what is done instead.

    Args:
        device: The device.

    Returns:
        A text for each; empty for the CPU, and for CUDA.
    """
    if device.type == "cpu":
        return []
    allocator = allocator_of(device)
    limited = function_of(device, "set_per_process_memory_fraction") is not None and total_bytes(device) is not None
    found = {
        "no counter of peak memory: tensors are counted one by one": allocator is not None,
        "no limit for memory: a memory budget is held by counting tensors": allocator is None or limited,
        "no streams: microbatches are copied when their turn comes": has_streams(device),
        "no pinned memory: copies from the host are slower": can_pin(device),
        "no float64: sums of losses are float32": wide_dtype(device) is torch.float64,
        "no random state that can be copied: a repeated pass draws other random numbers": (
            ask(device, "get_rng_state") is not None
        ),
    }
    return [text for text, has in found.items() if not has]


def _here() -> str:
    names = devices_here()
    return f"here {'is' if len(names) == 1 else 'are'} {', '.join(names)}; auto takes {names[min(1, len(names) - 1)]}"
