"""Add weight gradients inside the matrix product; this part runs backward itself, so it is the innermost."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from microbatch.gradients.fused_matmul import Fuse
from microbatch.gradients.paused_mode import enter_outside, parts_without
from microbatch.loss.tiled_cross_entropy import cross_entropy
from microbatch.memory.scratch import Scratch
from microbatch.step.cutting import Cutting
from microbatch.step.part import OpenWindow, Part, Run
from microbatch.step.parts.compilation import has_compiled

# A model that compiles itself has done so after this many windows.
_FIRST = 3


class Fused(Part):
    """Replace products with weights, and large-vocabulary cross-entropy, by versions that add to the gradient in place.

    Args:
        weights: Whether weights may be fused.
        always: Whether to run backward under the window's modes even if no weight can be fused. Checkpoints, which run
            forward again inside backward, need this under `RowDropout`.
    """

    def __init__(self, *, weights: bool = True, always: bool = False) -> None:
        self._weights, self._always = weights, always
        self._fuse: Fuse | None = None
        self._known: tuple[object, list[nn.Module]] | None = None

    def open(self, window: OpenWindow, stack: ExitStack) -> None:
        """Enter the mode, if there is something to fuse."""
        self._scratch = scratch = Scratch()
        spill = window.options.spill
        self._fuse = fuse = Fuse(
            window.gradients.named if self._weights else [],
            window.gradients,
            modules=len(window.undo.snapshot.modules),
            empty=scratch.empty,
            keep=None if spill is None else spill.leave,
        )
        if fuse.useful or self._always:
            in_place = scratch.places(final=fuse.is_final)
            fuse.replace(torch.nn.functional.cross_entropy, partial(cross_entropy, place=in_place))
            stack.callback(fuse.forget)
            stack.callback(scratch.forget)
            enter_outside(fuse, self._others(window, fuse), stack)

    def _others(self, window: OpenWindow, fuse: Fuse) -> Sequence[nn.Module]:
        """Return the parts of the model without a weight to fuse; none if hooks would make a compiler run again."""
        if not fuse.useful or window.setup.history.here < _FIRST or has_compiled(window):
            return ()
        key = fuse.weights, window.undo.snapshot.modules
        if self._known is None or self._known[0] != key:
            self._known = key, parts_without(window.model, fuse.weights)
        return self._known[1]

    def cut(self, window: OpenWindow, batch: object, cutting: Cutting) -> None:
        """Keep casts of weights if the graphs of several microbatches are alive at the same time."""
        if window.keeps_graphs and self._fuse is not None:
            self._fuse.keep_casts()

    def backward(self, window: OpenWindow, run: Run) -> Run:
        """Run backward with additions in place."""
        fuse, scratch = self._fuse, self._scratch
        assert fuse is not None  # noqa: S101 - `open` comes before
        if not fuse.useful and not self._always:
            return run  # otherwise, the mode itself calls autograd
        return partial(_run_fused, fuse, scratch)

    def figures(self, window: OpenWindow) -> Mapping[str, Any]:
        """Return the number of fused weights."""
        return {} if self._fuse is None else {"fused": self._fuse.fused}

    def report(self) -> Mapping[str, str]:
        """Return for each parameter ``"fused"``, or why the last window did not add its gradients in place."""
        return {} if self._fuse is None or not self._weights else self._fuse.report()


def _run_fused(fuse: Fuse, scratch: Scratch, tensors: Sequence[Any], seeds: Sequence[Tensor]) -> None:
    fuse.run_backward(tensors, seeds)
    scratch.keep()
