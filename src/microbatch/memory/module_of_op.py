"""Tracking of the module and the phase (forward, backward, optimizer step) in which an operator runs."""

from __future__ import annotations

import sys
from bisect import bisect_right
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import nn
from torch.nn.modules.module import register_module_forward_hook, register_module_forward_pre_hook
from torch.optim import Optimizer
from torch.optim.optimizer import (
    register_optimizer_step_post_hook,
    register_optimizer_step_pre_hook,
)
from torch.utils.hooks import RemovableHandle

# Returns the sequence number of the next autograd node. Private, without a public equivalent. Without this function,
# tensors made in backward are reported without a module.
_autograd: Any = getattr(getattr(torch, "_C", None), "_autograd", None)
_next_number: Any = getattr(_autograd, "_get_sequence_nr", None)

FORWARD, BACKWARD, STEP = "forward", "backward", "step"


class Where:
    """Track the running module and optimizer through torch's global hooks, without changes to the objects themselves.

    Backward runs outside of every module. But autograd numbers its nodes in the order of creation. This class records
    the current number whenever a module's forward starts or ends. So a node's number identifies the forward that made
    the node.

    Attributes:
        stepping: Whether an optimizer's step is running.
    """

    def __init__(self) -> None:
        self.stepping = False
        self._names: dict[int, str] = {}
        self._inside: list[tuple[int, str]] = []
        self._numbers: list[int] = []
        self._paths: list[str] = []
        self._handles: list[RemovableHandle] = []
        self._on_step: Callable[[Optimizer], None] | None = None

    def name(self, model: nn.Module) -> None:
        """Register the names of a model's modules."""
        self._names.update({id(module): path for path, module in model.named_modules()})

    def start(self, on_step: Callable[[Optimizer], None]) -> None:
        """Install the global hooks; ``on_step`` is called before and after each optimizer step."""
        self._on_step = on_step
        self._handles = [
            register_module_forward_pre_hook(self._enter),
            register_module_forward_hook(self._leave, always_call=True),
            register_optimizer_step_pre_hook(self._begin_step),
            register_optimizer_step_post_hook(self._end_step),
        ]

    def stop(self) -> None:
        """Remove the hooks, and reset the current module and phase."""
        for handle in self._handles:
            handle.remove()
        self._handles, self._inside, self._on_step, self.stepping = [], [], None, False

    def here(self) -> tuple[str, str]:
        """Return the module and the phase of the running operator.

        Returns:
            The module's path, empty outside of every registered module; and the phase. A forward that activation
            checkpointing recomputes in backward counts as forward.
        """
        if self._inside:
            return self._inside[-1][1], FORWARD
        if self.stepping:
            return "", STEP
        node = current_node()
        if node is None:
            return "", FORWARD
        found = bisect_right(self._numbers, node._sequence_nr())
        return (self._paths[found - 1] if found else ""), BACKWARD

    def _enter(self, module: nn.Module, _args: object) -> None:
        outer = self._inside[-1][1] if self._inside else ""
        self._inside.append((id(module), self._names.get(id(module), outer or type(module).__name__)))
        self._mark()

    def _leave(self, module: nn.Module, _args: object, _out: object) -> None:
        # After an exception, inner modules may have ended without a call of this hook.
        while self._inside and self._inside.pop()[0] != id(module):
            pass
        self._mark()

    def _mark(self) -> None:
        if _next_number is None:
            return
        self._numbers.append(_next_number())
        self._paths.append(self._inside[-1][1] if self._inside else "")

    def _begin_step(self, optimizer: Optimizer, _args: object, _kwargs: object) -> None:
        self._call_on_step(optimizer)
        self.stepping = True

    def _end_step(self, optimizer: Optimizer, _args: object, _kwargs: object) -> None:
        self.stepping = False
        self._call_on_step(optimizer)
        # The window's graphs are gone, so their numbers are no longer needed.
        self._numbers, self._paths = [], []

    def _call_on_step(self, optimizer: Optimizer) -> None:
        if self._on_step is not None:
            self._on_step(optimizer)


def current_node() -> Any:
    """Return the autograd node that is running, or `None` outside of backward."""
    return torch._C._current_autograd_node()  # pyright: ignore[reportPrivateUsage] -- no public equivalent


def is_accumulating(node: Any) -> bool:
    """Return whether a node is autograd's `AccumulateGrad`, which adds a gradient to `.grad`."""
    return node is not None and type(node).__name__ == "AccumulateGrad"


def running_module(models: Iterable[nn.Module]) -> str | None:
    """Find the innermost running module through the call stack; slow, for error messages only."""
    names = {id(module): path for model in models for path, module in model.named_modules()}
    frame = sys._getframe(1)  # pyright: ignore[reportPrivateUsage] -- the public inspect.stack reads source files
    while frame is not None:
        if "self" in frame.f_code.co_varnames[:1] and (path := names.get(id(frame.f_locals.get("self")))) is not None:
            return path
        frame = frame.f_back
    return None
