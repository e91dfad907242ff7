"""Find writes to weights and buffers inside a window, and move buffers once a window."""

from __future__ import annotations

from collections.abc import Generator, Sequence
from contextlib import ExitStack, contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm as BatchNorm  # pyright: ignore[reportPrivateUsage]

from microbatch.devices.backend import to_wide
from microbatch.errors import WeightsMovedError, WindowError
from microbatch.gradients.parameters import Named
from microbatch.step.part import OpenWindow, Part, Pass, Run
from microbatch.step.saved_state import Buffer

_NAMED = 4  # buffers that a warning names
_WINDOWS = 2  # windows in which the values of buffers are compared
_PLACES = 8  # weights whose places are compared in one window
_PLAIN = (nn.Parameter, Tensor)


class WatchedWeights(Part):
    """Refuse a window in which something writes to the weights, such as another optimizer.

    Every write by a torch operator raises a tensor's version counter; a write through ``.data`` does not. The counters
    are compared after each backward and before the step. An assignment to ``.data`` replaces a weight's memory: the
    places of a few weights in each window are compared before the step.

    Source:
        Law S4.
    """

    def __init__(self) -> None:
        self._versions: list[int] = []
        self._places: list[tuple[Named, int]] = []
        self._frozen: list[tuple[Tensor, Tensor | None]] = []

    def open(self, window: OpenWindow, stack: ExitStack) -> None:
        """Read the versions, and the places of a few weights."""
        self._versions = window.gradients.versions
        named, groups = window.gradients.named, [g for each in window.options.optimizers for g in each.param_groups]
        stride = len(named) // _PLACES + 1
        some = named[window.setup.history.windows % stride :: stride]
        self._places = [(each, each.parameter.data_ptr()) for each in some if type(each.parameter) in _PLAIN]
        self._frozen = [(p, p.grad) for group in groups for p in group["params"] if not p.requires_grad]

    def backward(self, window: OpenWindow, run: Run) -> Run:
        """Compare the versions after every backward."""
        return partial(self._watched, window, run)

    def check(self, window: OpenWindow) -> None:
        """Compare the versions and the places before the step, and refuse a weight that was thawed in the window."""
        self._compare(window)
        replaced = next((each.name for each, place in self._places if each.parameter.data_ptr() != place), None)
        if replaced is not None and not _flattens(window, replaced):
            raise WeightsMovedError(
                f"the values of the weight {replaced!r} were replaced inside the window (weight.data = ..., or "
                "model.to(...)), so its microbatches would have gradients of different weights; replace weights "
                "between windows"
            )
        thawed = [(parameter, grad) for parameter, grad in self._frozen if parameter.grad is not grad]
        for parameter, grad in thawed:
            parameter.grad = grad
        if thawed:
            names = {id(parameter): name for name, parameter in window.model.named_parameters()}
            raise WindowError(
                f"the weight {names.get(id(thawed[0][0]), 'of the optimizer')!r} had requires_grad=False when the "
                "window opened, and has got a gradient inside it, which is not the large batch's; thaw weights "
                "between windows"
            )

    def _watched(self, window: OpenWindow, run: Run, tensors: Sequence[Any], seeds: Sequence[Tensor]) -> None:
        run(tensors, seeds)
        self._compare(window)

    def _compare(self, window: OpenWindow) -> None:
        now = window.gradients.versions
        if now == self._versions:
            return
        renormed = {id(each.weight) for each in window.model.modules() if _renorms(each)}
        pairs = zip(window.gradients.named, now, self._versions, strict=True)
        moved = [e.name for e, version, before in pairs if version != before and id(e.parameter) not in renormed]
        if not moved:
            self._versions = now
            return
        more = f" and {len(moved) - 1} more" if len(moved) > 1 else ""
        raise WeightsMovedError(
            f"the weight {moved[0]!r}{more} was written to inside the window, so its microbatches would have gradients "
            "of different weights. Write to weights between windows, and step no other optimizer inside a window. "
            "Hooks that step during backward, as in layer-wise optimizers, cannot be used with accumulation"
        )


class WatchedBuffers(Part):
    """Warn that buffers move with every microbatch, if ``buffers`` is not given.

    Batch normalisation is left out: it has options and a warning of its own.

    Cost:
        In the first windows a comparison of the buffers with their copies, because a write through ``.data`` does not
        raise the version counter.

    Source:
        Law S5.
    """

    def __init__(self) -> None:
        self._windows = 0

    def check(self, window: OpenWindow) -> None:
        """Warn about the buffers that the passes have written to, if there was more than one pass."""
        if len(window.done) < 2 or window.setup.warn.has("buffers"):
            return
        self._windows += 1
        values = self._windows <= _WINDOWS
        buffers = [each for each in window.undo.snapshot.buffers if not isinstance(each.module, BatchNorm)]
        moved = [each for each in buffers if each.moved or (values and not each.same)]
        if moved:
            kinds = sorted({type(each.module).__name__ for each in moved})
            names = [_name(window.model, each) for each in moved]
            more = f" and {len(names) - _NAMED} more" if len(names) > _NAMED else ""
            window.setup.warn(
                "buffers",
                f"buffers move with every microbatch: {', '.join(names[:_NAMED])}{more} (of {', '.join(kinds)}). The "
                f"large batch would move them once, and here they moved {len(window.done)} times, so later "
                'microbatches see other values. buffers="once" starts every microbatch from the values before the '
                'window, and keeps the update of the first microbatch; buffers="mean" keeps the mean of all updates; '
                'buffers="each" keeps this behaviour without the warning',
            )


class BuffersOnce(Part):
    """Move buffers once a window: every pass starts from the values before the window.

    Args:
        pooled: Whether floating-point buffers end as the mean of all microbatches' updates, weighted by rows, which is
            exact for moving averages of batch means. Other buffers end as the first microbatch leaves them.

    Cost:
        A copy of the buffers for each microbatch.

    Source:
        Law S5.
    """

    def __init__(self, *, pooled: bool) -> None:
        self._pooled = pooled
        self._first: list[Tensor] = []
        self._sums: list[Tensor] = []
        self._rows = 0.0

    def open(self, window: OpenWindow, stack: ExitStack) -> None:
        """Forget the window before."""
        self._first, self._sums, self._rows = [], [], 0.0

    @contextmanager
    def around(self, window: OpenWindow, p: Pass) -> Generator[None]:
        """Start the pass from the values before the window, and record its update."""
        snapshot = window.undo.snapshot
        snapshot.restore_buffers()
        yield
        if p.again or p.filler or not p.rows:
            return
        values = [each.now().detach() for each in snapshot.buffers]
        if not self._first:
            self._first = [value.clone() for value in values]
            self._sums = [to_wide(value) * p.rows if value.is_floating_point() else value for value in self._first]
        elif self._pooled:
            for total, value in zip(self._sums, values, strict=True):
                if value.is_floating_point():
                    total.add_(value, alpha=p.rows)
        self._rows += p.rows

    def check(self, window: OpenWindow) -> None:
        """Leave the one update in the buffers."""
        window.undo.snapshot.restore_buffers()
        if not self._first:
            return
        with torch.no_grad():
            for buffer, first, total in zip(window.undo.snapshot.buffers, self._first, self._sums, strict=True):
                pooled = self._pooled and first.is_floating_point()
                buffer.tensor.copy_(total / self._rows if pooled else first)
        self._first, self._sums = [], []


def _flattens(window: OpenWindow, name: str) -> bool:
    """Return whether a weight is of a recurrent layer, whose `flatten_parameters` moves the weights unchanged."""
    return isinstance(dict(window.model.named_modules()).get(name.rpartition(".")[0]), nn.RNNBase)


def _renorms(module: Any) -> bool:
    """Return whether forward shortens the rows of the weight that it reads; a row that is short stays as it is."""
    return isinstance(module, nn.Embedding | nn.EmbeddingBag) and module.max_norm is not None


def _name(model: nn.Module, buffer: Buffer) -> str:
    path = next((path for path, module in model.named_modules() if module is buffer.module), "")
    return f"{path}.{buffer.name}" if path else buffer.name
