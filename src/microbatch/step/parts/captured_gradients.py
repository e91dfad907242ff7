"""Copy gradients that lie in the memory of a captured CUDA graph, before the graph runs again."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import Any

from torch import Tensor

from microbatch.devices.captured_graphs import graphs_are_captured, graphs_can_be_captured, kept
from microbatch.step.part import OpenWindow, Part, Run


class CapturedGradients(Part):
    """Copy the first gradient of each parameter, if `torch.compile` captures CUDA graphs in this process.

    A captured graph writes its results to the same memory in every run. Autograd takes over a parameter's first
    gradient without a copy. So the next microbatch would overwrite the gradient that it should add to: torch raises an
    error, or the sum is wrong. Both ``compile=`` and a model that the user compiled can capture graphs. A sum outside
    of `.grad` copies its first gradient by itself.

    Cost:
        With CUDA graphs, one copy of the gradients in each window; otherwise none.

    Source:
        Law N2; https://github.com/pytorch/pytorch/issues/169545.
    """

    def backward(self, window: OpenWindow, run: Run) -> Run:
        """Copy gradients that are new after a backward, where a forward of this window could capture a graph."""
        return partial(self._copied, window, run) if graphs_can_be_captured() else run

    def _copied(self, window: OpenWindow, run: Run, tensors: Sequence[Any], seeds: Sequence[Tensor]) -> None:
        if not graphs_are_captured():
            run(tensors, seeds)
            return
        new = [each.parameter for each in window.gradients.named if each.parameter.grad is None]
        run(tensors, seeds)
        for parameter in new:
            if parameter.grad is not None:
                parameter.grad = kept(parameter.grad)
