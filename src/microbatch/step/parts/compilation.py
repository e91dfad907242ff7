"""Run loss functions through `torch.compile` for the two most frequent shapes of microbatches."""

from __future__ import annotations

import sys
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_map

from microbatch.batch.batch_tree import leaves
from microbatch.errors import RankAgainError
from microbatch.loss.loss import Loss
from microbatch.memory.out_of_memory import is_out_of_memory
from microbatch.step.part import Function, OpenWindow, Part

# Number of shapes to compile. A batch has one shape for full microbatches, and one for a shorter last microbatch. If
# the last one changes with every batch, it is not compiled again and again.
_SHAPES = 2
# Modes that capture CUDA graphs. A graph writes its results to the same memory in every run.
_CAPTURING = {"reduce-overhead", "max-autotune"}


class Compilation(Part):
    """Run a loss function, and the model in it, through `torch.compile` for the first two shapes.

    Args:
        mode: A mode of `torch.compile`, or `None`; ``"reduce-overhead"`` uses CUDA graphs where possible.

    Attributes:
        eager: Number of microbatches that ran uncompiled so far, because of their shapes.

    Cost:
        Compiling for a shape takes seconds to minutes. With CUDA graphs, the function's results are copied, because
        the next microbatch overwrites the originals.
    """

    def __init__(self, mode: str | None) -> None:
        self._mode = mode
        self._functions: dict[Function, Function] = {}
        self._shapes: set[tuple[Any, ...]] = set()
        self.eager = 0

    def call(self, window: OpenWindow, function: Function) -> Function:
        """Wrap a function, which is compiled for the first two shapes of microbatches."""

        def compiled(model: Any, microbatch: Any) -> Any:
            return self._call(function, model, microbatch)

        return compiled

    def put_back(self, window: OpenWindow, error: BaseException) -> None:
        """Compile for the next two shapes again if the microbatch size changes."""
        if is_out_of_memory(error) or isinstance(error, RankAgainError):
            self._shapes.clear()

    def _call(self, function: Function, model: nn.Module, microbatch: object) -> Any:
        shape = _shape(microbatch)
        if shape not in self._shapes and len(self._shapes) == _SHAPES:
            self.eager += 1
            return function(model, microbatch)
        self._shapes.add(shape)
        if function not in self._functions:
            # The compiler's cache is by code object: a lambda that is created in every step is compiled only once.
            self._functions = {function: torch.compile(function, dynamic=False, mode=self._mode)}
        result = self._functions[function](model, microbatch)
        return tree_map(_copy, result, is_leaf=_is_loss) if self._mode in _CAPTURING else result


def has_compiled(window: OpenWindow) -> bool:
    """Return whether a compiler has run in this process: a new mode or hook would make it compile again."""
    compiler: Any = sys.modules.get("torch._dynamo.utils")
    ran = compiler is not None and (compiler.counters["frames"]["total"] or compiler.counters["stats"]["unique_graphs"])
    return bool(window.options.compile or ran)


def _is_loss(value: object) -> bool:
    return isinstance(value, Loss)


def _copy(value: Any) -> Any:
    """Copy a tensor, or the tensors of a loss; autograd goes through the copy."""
    if isinstance(value, Loss):
        metrics = {name: _copy(each) for name, each in value.metrics.items()}
        return replace(value, sum=value.sum.clone(), count=_copy(value.count), metrics=metrics)
    return value.clone() if isinstance(value, Tensor) else value


def _shape(microbatch: object) -> tuple[Any, ...]:
    """Return the paths, shapes and dtypes of a microbatch, as a key."""
    return tuple(
        (path, tuple(leaf.shape), leaf.dtype) if isinstance(leaf, Tensor) else path for path, leaf in leaves(microbatch)
    )
