"""A function mode that is off while modules run whose calls it need not see."""

from __future__ import annotations

import threading
from collections import defaultdict
from collections.abc import Collection, Sequence
from contextlib import ExitStack

import torch
from torch import nn
from torch.overrides import TorchFunctionMode, _get_current_function_mode  # pyright: ignore[reportPrivateUsage]

# Two hooks on a module cost about as much as three calls of torch under a mode.
_WORTH = 4


def parts_without(model: nn.Module, parameters: Collection[int]) -> list[nn.Module]:
    """List the largest parts of a model that hold none of some parameters.

    Args:
        model: The model.
        parameters: The ids of the parameters.

    Returns:
        Modules with a forward of their own. Each has at least four modules, and parameters: a part without them may be
        a loss, which the mode may have to see.

    Cost:
        Some walks over all modules.
    """
    found: list[nn.Module] = []
    seen: set[int] = set()

    def search(module: nn.Module) -> None:
        if id(module) in seen or isinstance(module, torch.jit.ScriptModule):
            return
        seen.add(id(module))
        own = {id(each) for each in module.parameters()}
        runs = type(module).forward is not nn.Module.forward  # a ModuleList does not
        if runs and own and own.isdisjoint(parameters) and len(list(module.modules())) >= _WORTH:
            found.append(module)
        else:
            for child in module.children():
                search(child)

    search(model)
    return found


def enter_outside(mode: TorchFunctionMode, modules: Sequence[nn.Module], stack: ExitStack) -> None:
    """Enter a mode that is off while one of the modules runs forward.

    Args:
        mode: The mode. Every call of torch passes through an active mode, which takes about 2 microseconds.
        modules: The modules; they have two hooks until the stack closes.
        stack: Closes the mode.
    """
    stack.enter_context(mode)
    paused: defaultdict[int, list[bool]] = defaultdict(list)  # modes belong to a thread

    # Functions, which a copy of a module shares. The compiler traces hooks, so they ask for it first.
    def pause(*_: object) -> None:
        if torch.compiler.is_compiling():
            return
        active = _get_current_function_mode() is mode  # another mode above this one stays where it is
        paused[threading.get_ident()].append(active)
        if active:
            mode.__exit__(None, None, None)

    def resume(*_: object) -> None:
        if torch.compiler.is_compiling():
            return
        calls = paused[threading.get_ident()]
        if calls and calls.pop():  # empty if another hook raised before `pause`
            mode.__enter__()

    for module in modules:
        stack.callback(module.register_forward_pre_hook(pause, prepend=True).remove)
        stack.callback(module.register_forward_hook(resume, always_call=True).remove)

    def end() -> None:
        # A signal ends a forward without the second hook.
        if any(paused[threading.get_ident()]):
            mode.__enter__()

    stack.callback(end)
