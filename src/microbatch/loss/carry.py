"""What torch keeps for each thread, taken from one thread to others."""

from __future__ import annotations

from collections.abc import Generator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch.overrides import (
    TorchFunctionMode,
    _get_current_function_mode_stack,  # pyright: ignore[reportPrivateUsage]
)
from torch.utils._python_dispatch import (
    TorchDispatchMode,
    _get_current_dispatch_mode_stack,  # pyright: ignore[reportPrivateUsage]
)


@dataclass(frozen=True, slots=True)
class _Autocast:
    kind: str
    enabled: bool
    dtype: torch.dtype
    cache: bool


class Carried:
    """The state of this moment and thread that a forward pass depends on.

    Grad and inference mode, autocast, function and dispatch modes, and the CUDA device and stream are each thread's
    own in torch, and a new thread begins with the defaults: without them a forward pass would record another graph, in
    another precision, uncounted.

    Args:
        device: Where the model is.
    """

    def __init__(self, device: torch.device) -> None:
        self._grad, self._inference = torch.is_grad_enabled(), torch.is_inference_mode_enabled()
        cache = torch.is_autocast_cache_enabled()
        self._autocasts = [
            _Autocast(kind, torch.is_autocast_enabled(kind), torch.get_autocast_dtype(kind), cache)
            for kind in sorted({"cpu", device.type})
        ]
        self._function_modes: list[Any] = _get_current_function_mode_stack()
        self._dispatch_modes: list[Any] = _get_current_dispatch_mode_stack()
        self._stream = torch.cuda.current_stream(device) if device.type == "cuda" else None

    @contextmanager
    def here(self) -> Generator[None]:
        """Put another thread into the state.

        Yields:
            Nothing.
        """
        with ExitStack() as stack:
            if self._stream is not None:
                stack.enter_context(torch.cuda.device(self._stream.device))
                stack.enter_context(torch.cuda.stream(self._stream))
            # Pushed, and not entered: what else a mode does when it is entered was done once, by who entered it.
            for mode in self._dispatch_modes:
                _push(stack, mode, TorchDispatchMode)
            for mode in self._function_modes:
                _push(stack, mode, TorchFunctionMode)
            for each in self._autocasts:
                if each.enabled:
                    stack.enter_context(torch.autocast(each.kind, each.dtype, cache_enabled=each.cache))
            stack.enter_context(torch.inference_mode(self._inference))
            stack.enter_context(torch.set_grad_enabled(self._grad))
            yield


def _push(stack: ExitStack, mode: Any, base: Any) -> None:
    base.__enter__(mode)
    stack.callback(base.__exit__, mode, None, None, None)
