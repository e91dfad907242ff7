"""Compile the microbatch step once: the cut fixes the shapes, and what has others runs as it is."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from microbatch.batch.batch_tree import leaves
from microbatch.loss.loss import LossLike

LossFunction = Callable[[nn.Module, Any], LossLike]
Function = Callable[[nn.Module, Any], Any]

# Shapes that are compiled for. A batch of any size has one for its full microbatches and at most one tail, and tails
# that change with every batch would be compiled again and again.
_SHAPES = 2


class Compiled:
    """Run a loss function, and the model in it, through `torch.compile` where microbatches repeat their shapes.

    Args:
        mode: A mode of `torch.compile`, or `None`; ``"reduce-overhead"`` captures CUDA graphs where it can.

    Attributes:
        eager: Microbatches that ran uncompiled so far, because their shapes were not among the first two.
    """

    def __init__(self, mode: str | None) -> None:
        self._mode = mode
        self._functions: dict[Function, Function] = {}
        self._shapes: set[tuple[Any, ...]] = set()
        self.eager = 0

    def start_over(self) -> None:
        """Compile for the next two shapes again: microbatches have another size from now on."""
        self._shapes.clear()

    def __call__(self, function: Function, model: nn.Module, microbatch: object) -> Any:
        """Compute a microbatch's loss, or its representations.

        Args:
            function: As for `Accumulator.step`, which is given one for each.
            model: What it is called with.
            microbatch: Likewise, on the device.

        Returns:
            What ``function`` returns.

        Cost:
            The first microbatch of a shape is compiled, which takes seconds to minutes.
        """
        shape = _shape(microbatch)
        if shape not in self._shapes and len(self._shapes) == _SHAPES:
            self.eager += 1
            return function(model, microbatch)
        self._shapes.add(shape)
        if function not in self._functions:
            # The compiler keeps its code by the function's code, so that a lambda made anew at every step is compiled
            # once; only the last one is held.
            self._functions = {function: torch.compile(function, dynamic=False, mode=self._mode)}
        return self._functions[function](model, microbatch)


def _shape(microbatch: object) -> tuple[Any, ...]:
    """Tell two microbatches apart that the compiler would."""
    return tuple(
        (path, tuple(leaf.shape), leaf.dtype) if isinstance(leaf, Tensor) else path for path, leaf in leaves(microbatch)
    )
