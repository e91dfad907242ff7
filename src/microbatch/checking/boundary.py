"""The outermost calls of a model's modules: where a loss function meets the model, and where it can be watched."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.module import (
    _global_forward_hooks_with_kwargs,  # pyright: ignore[reportPrivateUsage]
    register_module_forward_hook,
)
from torch.utils._pytree import tree_leaves

from microbatch.batch.batch_tree import leaves, map_tensors
from microbatch.memory.module_of_op import current_node


class Boundary:
    """Be called before and after every outermost call of a model's modules, of a copy that is thrown away afterwards.

    What a checkpoint computes again inside backward is left out.

    Args:
        model: The copy.

    Attributes:
        inside: Whether one of them runs.
        before: Called with the rows of the first tensor that the module was given (`None` if there is none).
        after: Called with what the module returned; its result takes the place of that.
    """

    def __init__(self, model: nn.Module) -> None:
        self.before: list[Callable[[int | None], None]] = []
        self.after: list[Callable[[Any], Any]] = []
        self._depth = 0
        for module in model.modules():
            if not isinstance(module, torch.jit.ScriptModule):  # takes no hooks; its caller does
                module.register_forward_pre_hook(self._enter, with_kwargs=True)
                module.register_forward_hook(self._leave, always_call=True)

    @property
    def inside(self) -> bool:
        """Whether a module runs now."""
        return self._depth > 0

    def _enter(self, _module: nn.Module, args: Any, kwargs: Any) -> None:
        if current_node() is not None:
            return
        self._depth += 1
        if self._depth == 1:
            found = [leaf for _, leaf in leaves([args, kwargs]) if isinstance(leaf, Tensor) and leaf.ndim]
            for act in self.before:
                act(found[0].shape[0] if found else None)

    def _leave(self, _module: nn.Module, _args: Any, output: Any) -> Any:
        if current_node() is not None:
            return output
        if self._depth == 1 and output is not None:
            for act in self.after:
                output = act(output)
        self._depth -= 1
        return output


class Outputs:
    """Keep, or replace, what the outermost calls return: the representations that a loss is computed from.

    Args:
        boundary: Of the model's copy.
        instead: Tensors to return in the place of those that are computed, in their order; `None` to keep these.

    Attributes:
        found: The floating-point tensors that were returned, in order, with their graphs.
    """

    def __init__(self, boundary: Boundary, *, instead: list[Tensor] | None = None) -> None:
        self.found: list[Tensor] = []
        self._instead = instead
        boundary.after.append(self._after)

    def _after(self, output: Any) -> Any:
        return map_tensors(self._tensor, output)

    def _tensor(self, tensor: Tensor) -> Tensor:
        if not tensor.is_floating_point():
            return tensor
        index = len(self.found)
        self.found.append(tensor)
        if self._instead is None or index >= len(self._instead):
            return tensor
        return self._instead[index]


@dataclass(frozen=True, slots=True)
class Call:
    """Hold one call of a module.

    Attributes:
        path: Of the module in the model.
        taken: Tensors that it was given.
        given: Tensors that it returned.
    """

    path: str
    taken: list[Tensor]
    given: list[Tensor]


def trace(model: nn.Module, forward: Callable[[], object], *, rows: tuple[slice, int] | None = None) -> list[Call]:
    """Write down what every module takes and gives.

    Args:
        model: A copy that is thrown away afterwards.
        forward: Runs it.
        rows: Which rows to keep of tensors that have as many as the number says; `None` for all.

    Returns:
        The calls in the order in which they end, so that a module's own parts come before it.
    """
    calls: list[Call] = []
    names = {id(module): path for path, module in model.named_modules()}

    def some(value: Any) -> list[Tensor]:
        found = [each.detach() for each in tree_leaves(value) if isinstance(each, Tensor)]
        if rows is None:
            return found
        return [each[rows[0]] if each.ndim and each.shape[0] == rows[1] else each for each in found]

    def hook(module: nn.Module, *call: Any) -> None:
        *taken, output = call  # its arguments, by place and by name
        if id(module) in names:
            calls.append(Call(names[id(module)], some(taken), some(output)))

    # A global hook, because hooks of the copy's modules are put back where state is switched off.
    handle = register_module_forward_hook(hook, with_kwargs=True)
    try:
        with torch.no_grad():
            forward()
    finally:
        handle.remove()
        # The handle forgets this entry; torch 2.14 compiles no model while it is there.
        _global_forward_hooks_with_kwargs.pop(handle.id, None)
    return calls
