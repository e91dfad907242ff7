"""Batch normalisation if microbatches run one after the other: frozen or pooled statistics, one row, or a warning."""

from __future__ import annotations

from collections.abc import Generator, Sequence
from contextlib import ExitStack, contextmanager
from functools import partial
from typing import Any

from torch import Tensor
from torch.nn.modules.batchnorm import _BatchNorm as BatchNorm  # pyright: ignore[reportPrivateUsage]

from microbatch.errors import BatchStatisticsError, ConfigError
from microbatch.loss.batchnorm import layers_of
from microbatch.loss.one_row_norm import ContiguousNorms, explain_one_value, is_of_one_value
from microbatch.loss.pooled_stats import Pooled
from microbatch.step.cutting import Cutting
from microbatch.step.part import Function, OpenWindow, Part, Pass, Run

_KIND = "batch norm"
_NAMED = 4  # layers that a warning names


class FrozenNorms(Part):
    """Normalise by the running statistics, and do not update them."""

    def open(self, window: OpenWindow, stack: ExitStack) -> None:
        """Put the layers into evaluation mode until the end of the window."""
        for name, layer in layers_of(window.model).items():
            if layer.running_mean is None:
                raise ConfigError(
                    f'batch_norm="frozen" normalises by running statistics, and {name!r} has none '
                    "(track_running_stats=False)"
                )
            # The mode of the layer is changed, so that a checkpoint that runs it again in backward does the same.
            layer.training = False
            stack.callback(setattr, layer, "training", True)


class PooledNorms(Part):
    """Normalise each microbatch by its own statistics, and update running statistics once, from the whole batch."""

    _pooled: Pooled

    def open(self, window: OpenWindow, stack: ExitStack) -> None:
        """Collect the layers' statistics."""
        self._pooled = stack.enter_context(Pooled(window.model))

    @contextmanager
    def around(self, window: OpenWindow, p: Pass) -> Generator[None]:
        """Collect the statistics of a pass, unless it runs for the second time or is a filler."""
        pooled = self._pooled
        pooled.done = p.again or p.filler
        yield
        pooled.done = p.again
        if not p.filler:
            pooled.next()

    def check(self, window: OpenWindow) -> None:
        """Update the running statistics, or raise an error if a layer's statistics could not be collected.

        Before the step, like all other buffers: an error until then restores them, and so does a dropped window.
        """
        self._pooled.check()
        self._pooled.finish()


class OneRowNorms(Part):
    """Keep microbatches of one row right where torch's CPU kernel is wrong, and name the layer that needs more rows."""

    _rows = _size = 0

    def cut(self, window: OpenWindow, batch: object, cutting: Cutting) -> None:
        """Store the rows of the batch and of a microbatch, for the error's words."""
        self._rows, self._size = cutting.rows, cutting.size

    def around(self, window: OpenWindow, p: Pass) -> ContiguousNorms | None:
        """Return the mode that makes tensors contiguous, for a microbatch of one row on the CPU."""
        alone = p.rows == 1 and window.device.type == "cpu" and not window.options.compile
        return ContiguousNorms() if alone else None

    def call(self, window: OpenWindow, function: Function) -> Function:
        """Raise an error of this library where a layer has a single value for each channel."""
        # A method, and no function made here: that would hold on to the accumulator where annotations are checked.
        return partial(self._named, window, function)

    def failed(self, window: OpenWindow, error: BaseException) -> None:
        """Explain the error to a hand-written loop, which has called the model itself."""
        if is_of_one_value(error):
            error.add_note(f"microbatch: {self._explain(window, error)}")

    def _named(self, window: OpenWindow, function: Function, model: Any, microbatch: Any) -> Any:
        try:
            return function(model, microbatch)
        except ValueError as error:
            if not is_of_one_value(error):
                raise
            raise BatchStatisticsError(self._explain(window, error)) from error

    def _explain(self, window: OpenWindow, error: BaseException) -> str:
        rows = window.now.rows if window.now is not None else None
        return explain_one_value(error, window.model, rows=rows, batch=self._rows or 0, size=self._size)


class NormWarning(Part):
    """Warn that batch normalisation uses the statistics of microbatches, if ``batch_norm`` is not given."""

    def backward(self, window: OpenWindow, run: Run) -> Run:
        """Warn after the second microbatch's backward."""
        norms = any(isinstance(each, BatchNorm) for each in window.undo.snapshot.modules)
        if not norms or window.setup.warn.has(_KIND) or not (layers := list(layers_of(window.model))):
            return run

        def warning(tensors: Sequence[Any], seeds: Sequence[Tensor]) -> None:
            run(tensors, seeds)
            if window.done and not (window.now is not None and window.now.filler):
                more = f" and {len(layers) - _NAMED} more" if len(layers) > _NAMED else ""
                window.setup.warn(
                    _KIND,
                    f"batch normalisation ({', '.join(layers[:_NAMED])}{more}) normalises each microbatch by its own "
                    "statistics, so the gradient is not the large batch's, and running statistics are updated once a "
                    'microbatch. batch_norm="exact" in accumulator.step normalises over the whole batch; '
                    'batch_norm="frozen" uses running statistics; mb.convert_batch_norm(model, to="group") replaces '
                    'the layers by ones that need no batch. batch_norm="microbatch" keeps this behaviour without the '
                    "warning",
                )

        return warning
