"""Transfer the state that torch keeps per thread, such as grad mode and autocast, to another thread or fiber."""

from __future__ import annotations

from collections.abc import Generator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import overrides
from torch.overrides import (
    TorchFunctionMode,
    _get_current_function_mode_stack,  # pyright: ignore[reportPrivateUsage]
)
from torch.utils import _python_dispatch
from torch.utils._python_dispatch import (
    TorchDispatchMode,
    _get_current_dispatch_mode_stack,  # pyright: ignore[reportPrivateUsage]
)

from microbatch.devices.copy_streams import current_stream, enter_stream, set_stream
from microbatch.interrupts import unbroken

_AUTOGRAD: Any = getattr(torch, "_C")._autograd  # noqa: B009 - torch._C._autograd is private and has no types


@dataclass(frozen=True, slots=True)
class _Autocast:
    """The autocast state of one device type."""

    kind: str
    enabled: bool
    dtype: torch.dtype
    cache: bool


class ThreadState:
    """Copy the current thread's torch state, to apply it on another thread.

    The state is grad mode, inference mode, autocast, function and dispatch modes, and the device and stream of the
    accelerator. Torch keeps it per thread, and a new thread has the defaults. Without this state, a forward pass on
    another thread would record another graph, in another precision, and would not be measured.

    Args:
        device: The model's device.
    """

    def __init__(self, device: torch.device) -> None:
        self._grad, self._inference = torch.is_grad_enabled(), torch.is_inference_mode_enabled()
        self._autocasts = _autocasts(device)
        self._function_modes: list[Any] = _get_current_function_mode_stack()
        self._dispatch_modes: list[Any] = _get_current_dispatch_mode_stack()
        self._stream = current_stream(device)

    @contextmanager
    def applied(self) -> Generator[None]:
        """Apply the state on the current thread, inside the context."""
        with ExitStack() as stack:
            if self._stream is not None:
                enter_stream(stack, self._stream)
            # Modes are pushed and not entered, because their own __enter__ has already run on the other thread.
            for mode in self._dispatch_modes:
                _push_until_exit(stack, mode, TorchDispatchMode)
            for mode in self._function_modes:
                _push_until_exit(stack, mode, TorchFunctionMode)
            for each in self._autocasts:
                if each.enabled:
                    stack.enter_context(torch.autocast(each.kind, each.dtype, cache_enabled=each.cache))
            stack.enter_context(torch.inference_mode(self._inference))
            stack.enter_context(torch.set_grad_enabled(self._grad))
            yield


class RemovedThreadState:
    """Remove the current thread's torch state, to restore it later on the same thread.

    The state also contains the hooks for saved tensors. Afterwards, the thread has no modes and no hooks.

    Args:
        device: The model's device.
    """

    @unbroken
    def __init__(self, device: torch.device) -> None:
        self._grad, self._autocasts = torch.is_grad_enabled(), _autocasts(device)
        self._function_modes: list[Any] = [
            overrides._pop_mode()  # pyright: ignore[reportPrivateUsage]
            for _ in range(torch._C._len_torch_function_stack())  # pyright: ignore[reportPrivateUsage]
        ]
        self._dispatch_modes: list[Any] = [
            _python_dispatch._pop_mode()  # pyright: ignore[reportPrivateUsage]
            for _ in range(len(_get_current_dispatch_mode_stack()))
        ]
        self._hooks: list[tuple[Any, Any]] = []
        while (pair := _AUTOGRAD._top_saved_tensors_default_hooks(True)) is not None:
            self._hooks.append(pair)
            _AUTOGRAD._pop_saved_tensors_default_hooks()
        self._stream = current_stream(device)

    @unbroken
    def restore(self) -> None:
        """Restore the state on a thread that has no modes and no hooks."""
        if self._stream is not None:
            set_stream(self._stream)
        for mode in reversed(self._dispatch_modes):
            _python_dispatch._push_mode(mode)  # pyright: ignore[reportPrivateUsage]
        for mode in reversed(self._function_modes):
            overrides._push_mode(mode)  # pyright: ignore[reportPrivateUsage]
        for pair in reversed(self._hooks):
            _AUTOGRAD._push_saved_tensors_default_hooks(*pair)
        for each in self._autocasts:
            torch.set_autocast_enabled(each.kind, each.enabled)
            torch.set_autocast_dtype(each.kind, each.dtype)
            torch.set_autocast_cache_enabled(each.cache)
        torch.set_grad_enabled(self._grad)


def _autocasts(device: torch.device) -> list[_Autocast]:
    cache = torch.is_autocast_cache_enabled()
    return [
        _Autocast(kind, torch.is_autocast_enabled(kind), torch.get_autocast_dtype(kind), cache)
        for kind in sorted({"cpu", device.type})
    ]


def _push_until_exit(stack: ExitStack, mode: Any, base: Any) -> None:
    base.__enter__(mode)
    stack.callback(base.__exit__, mode, None, None, None)
