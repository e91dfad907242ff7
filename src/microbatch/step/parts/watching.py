"""Find writes to weights and buffers inside a window, and move buffers once a window."""

from __future__ import annotations

from collections.abc import Generator, Sequence
from contextlib import ExitStack, contextmanager
from functools import partial
from operator import attrgetter
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm as BatchNorm  # pyright: ignore[reportPrivateUsage]

from microbatch.devices.backend import to_wide
from microbatch.errors import WeightsMovedError, WindowError
from microbatch.gradients.parameters import Frozen, Named
from microbatch.shards import PLAIN
from microbatch.step.part import OpenWindow, Part, Pass, Run
from microbatch.step.record import Step
from microbatch.step.saved_state import NO_MEMORY, Memory

_NAMED = 4  # buffers that a warning names
_PARAMETER, _TRAINED = attrgetter("parameter"), attrgetter("parameter.requires_grad")
_ONCE = (
    'buffers="once" starts every microbatch from the values before the window, and keeps the update of the first '
    "microbatch"
)
_MEAN = 'buffers="mean" keeps the mean of all updates'
_EACH = 'buffers="each" keeps this behaviour without the warning'
WINDOWS = 2
"""Windows in which the values of buffers are compared."""
_WATCHED = 8  # weights whose memory is compared in one window
_NORM = frozenset({"running_mean", "running_var", "num_batches_tracked"})


class WatchedWeights(Part):
    """Refuse a window in which something writes to the weights, such as another optimizer.

    Every write by a torch operator raises a tensor's version counter; a write through ``.data`` does not. The counters
    are compared before the step, which finds every write, and after the first backward, so that hooks that step an
    optimizer are found before the next microbatch. An assignment to ``.data`` replaces a weight's memory: that of a
    few weights in each window is compared before the step.

    Cost:
        About a microsecond a weight at each comparison, because none of them is in the CPU's cache after a backward.

    Source:
        Law S4.
    """

    def __init__(self) -> None:
        self._versions: list[int] = []
        self._some = NO_MEMORY
        self._frozen: list[tuple[Tensor, Tensor | None]] = []

    def open(self, window: OpenWindow, stack: ExitStack) -> None:
        """Read the versions, and keep the memory of a few weights."""
        self._versions = window.gradients.versions
        named, groups = window.gradients.named, [g for each in window.options.optimizers for g in each.param_groups]
        self._some = memory_of_some(window, named)
        self._frozen = [(p, p.grad) for group in groups for p in group["params"] if not p.requires_grad]

    def backward(self, window: OpenWindow, run: Run) -> Run:
        """Compare the versions after the first backward."""
        return partial(self._watched, window, run)

    def check(self, window: OpenWindow) -> None:
        """Compare the versions and the memory before the step; refuse weights replaced, frozen or thawed since."""
        self._compare(window)
        self._check_same(window)
        moved = self._some.replaced
        replaced = [each.name for each in window.gradients.named if id(each.parameter) in moved] if moved else []
        if replaced and not _flattens(window, replaced[0]):
            raise WeightsMovedError(
                f"the values of the weight {replaced[0]!r} were replaced inside the window (weight.data = ..., or "
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

    def put_back(self, window: OpenWindow, error: BaseException) -> None:
        """Drop the memory that was kept."""
        self._some = NO_MEMORY

    def done(self, window: OpenWindow, step: Step) -> None:
        """Drop the memory that was kept."""
        self._some = NO_MEMORY

    def _check_same(self, window: OpenWindow) -> None:
        """Refuse a window in whose course the model got other weights, or a weight with a gradient was frozen."""
        named = window.gradients.named
        model = window.options.model
        replaced = window.setup.trainable.replaced(model)
        if replaced and not window.options.is_sharded:  # sharding replaces parameters by itself
            trained = {id(each.parameter) for each in named}
            if names := [name for name, each in replaced.items() if id(each) in trained]:
                more = f" and {len(names) - 1} more" if len(names) > 1 else ""
                raise WeightsMovedError(
                    f"the model got another parameter as {names[0]!r}{more} inside the window (an assignment to an "
                    "attribute, or load_state_dict(assign=True)): its microbatches would have gradients of different "
                    "weights, and the optimizer holds the parameter from before. Replace parameters between windows, "
                    "and create the optimizer again"
                )
        if all(map(_TRAINED, named)):
            return
        pairs = zip(named, window.gradients.present, strict=True)
        frozen = next((each.name for each, present in pairs if present and not each.parameter.requires_grad), None)
        if frozen is not None:
            raise WindowError(
                f"the weight {frozen!r} was frozen (requires_grad=False) inside the window, after microbatches had "
                "added to its gradient, which is therefore not the large batch's; freeze weights between windows"
            )

    def _watched(self, window: OpenWindow, run: Run, tensors: Sequence[Any], seeds: Sequence[Tensor]) -> None:
        run(tensors, seeds)
        if not window.done:
            self._compare(window)

    def _compare(self, window: OpenWindow) -> None:
        now = window.gradients.versions
        if now == self._versions:
            return
        renormed = {id(each.weight) for each in window.model.modules() if renorms(each)}
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

    Args:
        once: Whether ``buffers="once"`` could be given.

    Cost:
        In the first windows a comparison of the buffers with their copies, because a write through ``.data`` does not
        raise the version counter.

    Source:
        Law S5.
    """

    def __init__(self, *, once: bool) -> None:
        self._once, self._windows = once, 0

    def check(self, window: OpenWindow) -> None:
        """Warn about the buffers that the passes have written to, if there was more than one pass."""
        if len(window.done) < 2 or window.setup.warn.has("buffers"):
            return
        self._windows += 1
        values = self._windows <= WINDOWS
        moved = [
            each
            for each in window.undo.snapshot.buffers
            if each.memory is None  # a buffer
            and not (each.name in _NORM and isinstance(each.module, BatchNorm))
            and (each.moved or (values and not each.same))
        ]
        if moved:
            text = moved_text(window, moved, "buffers move")
            window.setup.warn("buffers", f"{text}. {buffers_advice(once=self._once, mean=self._once)}")


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
        self._rows, self._begun = 0.0, False

    def open(self, window: OpenWindow, stack: ExitStack) -> None:
        """Forget the window before."""
        self._first, self._sums, self._rows, self._begun = [], [], 0.0, False

    @contextmanager
    def around(self, window: OpenWindow, p: Pass) -> Generator[None]:
        """Start the pass from the values before the window, and record its update."""
        snapshot = window.undo.snapshot
        if self._begun:
            snapshot.restore_buffers()
        yield
        if not self._begun:
            self._begun = True
            snapshot.drop_still()
        if p.again or p.filler or not p.rows:
            return
        values = [each.now().detach() for each in snapshot.buffers]
        if self._pooled:
            self._check_shapes(window, values)
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
                if first.shape == buffer.tensor.shape:
                    buffer.tensor.copy_(total / self._rows if pooled else first)
                else:
                    setattr(buffer.module, buffer.name, first)
        self._first, self._sums = [], []

    @staticmethod
    def _check_shapes(window: OpenWindow, values: Sequence[Tensor]) -> None:
        """Refuse the mean of buffers that change their shape, such as a queue that grows."""
        for buffer, value in zip(window.undo.snapshot.buffers, values, strict=True):
            if value.is_floating_point() and value.shape != buffer.copy.shape:
                raise WindowError(
                    f"the buffer {_name(window.model, buffer)!r} changed its shape from {tuple(buffer.copy.shape)} to "
                    f'{tuple(value.shape)} in a microbatch, so buffers="mean" has no values to average; '
                    'buffers="once" keeps the update of the first microbatch, buffers="each" those of all microbatches'
                )


def _flattens(window: OpenWindow, name: str) -> bool:
    """Return whether a weight is of a recurrent layer, whose `flatten_parameters` moves the weights unchanged."""
    return isinstance(dict(window.model.named_modules()).get(name.rpartition(".")[0]), nn.RNNBase)


def renorms(module: Any) -> bool:
    """Return whether forward shortens the rows of the weight that it reads; a row that is short stays as it is.

    Args:
        module: The layer.

    Returns:
        Whether it is an embedding with ``max_norm``.
    """
    return isinstance(module, nn.Embedding | nn.EmbeddingBag) and module.max_norm is not None


def memory_of_some(window: OpenWindow, found: Sequence[Named | Frozen]) -> Memory:
    """Keep the memory of a few parameters, other ones in each window; drop it when the window ends."""
    stride = len(found) // _WATCHED + 1
    some = map(_PARAMETER, found[window.setup.history.windows % stride :: stride])
    return Memory([each for each in some if type(each) in PLAIN])


def buffers_advice(*, once: bool, mean: bool = False) -> str:
    """Return text on the values of ``buffers=`` to choose from: ``"once"`` and ``"mean"`` if asked for, ``"each"``."""
    return "; ".join([*([_ONCE] if once else []), *([_MEAN] if mean else []), _EACH])


def moved_text(window: OpenWindow, moved: Sequence[Any], what: str) -> str:
    """Return text that names the buffers or frozen weights that moved, and how often.

    Args:
        window: The window.
        moved: Their modules and names.
        what: The kind of state and the verb.

    Returns:
        The beginning of a warning.
    """
    kinds = sorted({type(each.module).__name__ for each in moved})
    names = [_name(window.model, each) for each in moved]
    more = f" and {len(names) - _NAMED} more" if len(names) > _NAMED else ""
    return (
        f"{what} with every microbatch: {', '.join(names[:_NAMED])}{more} (of {', '.join(kinds)}). The large batch "
        f"would move them once, and here they moved {len(window.done)} times, so later microbatches see other values"
    )


def _name(model: nn.Module, each: Any) -> str:
    path = next((path for path, module in model.named_modules() if module is each.module), "")
    return f"{path}.{each.name}" if path else each.name
