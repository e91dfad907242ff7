"""Where an operator runs: in which module, and in forward, backward or the optimizer's step."""

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

# The number that the next autograd node will get. Private, with nothing public in its place; without it, what backward
# makes has no module.
_autograd: Any = getattr(getattr(torch, "_C", None), "_autograd", None)
_next_number: Any = getattr(_autograd, "_get_sequence_nr", None)

FORWARD, BACKWARD, STEP = "forward", "backward", "step"


class Where:
    """Follow the modules and the optimizers as they run, through torch's global hooks; none is touched.

    Backward runs outside of every module. Autograd numbers its nodes as it makes them, so the numbers that were current
    whenever a module was entered or left say which module's forward made the node that runs now.

    Attributes:
        stepping: Whether an optimizer's step runs.
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
        """Learn what the modules of a model are called.

        Args:
            model: The module whose own path is empty.
        """
        self._names.update({id(module): path for path, module in model.named_modules()})

    def start(self, on_step: Callable[[Optimizer], None]) -> None:
        """Begin to follow.

        Args:
            on_step: Called before and after each step of an optimizer, outside of it.
        """
        self._on_step = on_step
        self._handles = [
            register_module_forward_pre_hook(self._enter),
            register_module_forward_hook(self._leave, always_call=True),
            register_optimizer_step_pre_hook(self._begin_step),
            register_optimizer_step_post_hook(self._end_step),
        ]

    def stop(self) -> None:
        """End, and forget where one was."""
        for handle in self._handles:
            handle.remove()
        self._handles, self._inside, self._on_step, self.stepping = [], [], None, False

    def here(self) -> tuple[str, str]:
        """Say where the running operator is.

        Returns:
            The path of its module, empty outside of every named one, and the phase. What a checkpoint computes again
            inside backward is forward.
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
        # An exception may have left modules further inside without telling.
        while self._inside and self._inside.pop()[0] != id(module):
            pass
        self._mark()

    def _mark(self) -> None:
        if _next_number is None:
            return
        self._numbers.append(_next_number())
        self._paths.append(self._inside[-1][1] if self._inside else "")

    def _begin_step(self, optimizer: Optimizer, _args: object, _kwargs: object) -> None:
        self._tell(optimizer)
        self.stepping = True

    def _end_step(self, optimizer: Optimizer, _args: object, _kwargs: object) -> None:
        self.stepping = False
        self._tell(optimizer)
        # The window is over, and so are its graphs.
        self._numbers, self._paths = [], []

    def _tell(self, optimizer: Optimizer) -> None:
        if self._on_step is not None:
            self._on_step(optimizer)


def current_node() -> Any:
    """Return the autograd node that runs now, or `None` outside of backward."""
    return torch._C._current_autograd_node()  # pyright: ignore[reportPrivateUsage] -- nothing public tells


def is_accumulating(node: Any) -> bool:
    """Tell whether a node is autograd's own, which adds a gradient up.

    Args:
        node: What `current_node` returned.

    Returns:
        False outside of backward too.
    """
    return node is not None and "AccumulateGrad" in node.name()


def running_module(models: Iterable[nn.Module]) -> str | None:
    """Find the innermost module whose forward runs now, by the call stack; slow, for an error's words.

    Args:
        models: Modules whose parts have names.

    Returns:
        Its path in the model, or `None` where none of them runs, as in backward.
    """
    names = {id(module): path for model in models for path, module in model.named_modules()}
    frame = sys._getframe(1)  # pyright: ignore[reportPrivateUsage] -- the stack's public face reads source files
    while frame is not None:
        if "self" in frame.f_code.co_varnames[:1] and (path := names.get(id(frame.f_locals.get("self")))) is not None:
            return path
        frame = frame.f_back
    return None
