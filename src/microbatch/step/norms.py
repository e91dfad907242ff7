"""What a window does about batch normalisation, where its microbatches run one after the other."""

from __future__ import annotations

import inspect
import warnings
from collections.abc import Generator
from contextlib import ExitStack, contextmanager
from pathlib import Path

from torch import nn

from microbatch.errors import ConfigError
from microbatch.loss.batchnorm import layers_of
from microbatch.loss.pooled_stats import Pooled
from microbatch.step.settings import FROZEN, POOLED, Memory, Settings

_OURS = (str(Path(__file__).parents[1]), "<@")  # files of the package, and functions that beartype made of its own
_NAMED = 4  # layers that a warning names


class Norms:
    """Do in a window what ``batch_norm=`` says.

    Args:
        settings: The accumulator's.
        memory: The accumulator's.
    """

    def __init__(self, settings: Settings, memory: Memory) -> None:
        self._settings = settings
        self._memory = memory
        self._pooled: Pooled | None = None

    def open(self, stack: ExitStack) -> None:
        """Begin.

        Args:
            stack: Where what is switched on is put, to be switched off at the window's end.

        Raises:
            ConfigError: A layer is to be frozen that has no running statistics.
        """
        model = self._settings.bare_model
        if self._settings.batch_norm == FROZEN:
            _freeze(model, stack)
        elif self._settings.batch_norm == POOLED:
            self._pooled = stack.enter_context(Pooled(model))

    def went(self, microbatches: int) -> None:
        """Learn that a microbatch has been run.

        Args:
            microbatches: How many have been by now.
        """
        if self._pooled is not None:
            self._pooled.next()
        elif microbatches > 1 and self._settings.batch_norm is None and not self._memory.warned:
            self._memory.warned = True
            self._warn(list(layers_of(self._settings.bare_model)))

    def encoded(self) -> None:
        """Learn that a microbatch has been encoded, without a graph or with one that is kept."""
        if self._pooled is not None:
            self._pooled.next()

    @contextmanager
    def aside(self) -> Generator[None]:
        """Measure nothing of the passes inside the block."""
        if self._pooled is None:
            yield
            return
        before, self._pooled.done = self._pooled.done, True
        yield
        self._pooled.done = before

    def encode_again(self) -> None:
        """Measure nothing more: what comes has been measured."""
        if self._pooled is not None:
            self._pooled.done = True

    def check(self) -> None:
        """See to it that `finish` has something to go by.

        Raises:
            BatchStatisticsError: A layer normalised where it could not be seen.
        """
        if self._pooled is not None:
            self._pooled.check()

    def finish(self) -> None:
        """Leave running statistics as the window's end is to find them."""
        if self._pooled is not None:
            self._pooled.finish()

    def _warn(self, layers: list[str]) -> None:
        if not layers:
            return
        more = f" and {len(layers) - _NAMED} more" if len(layers) > _NAMED else ""
        frame, level = inspect.currentframe(), 1
        while frame is not None and frame.f_code.co_filename.startswith(_OURS):
            frame, level = frame.f_back, level + 1
        warnings.warn(
            f"batch normalisation ({', '.join(layers[:_NAMED])}{more}) normalises each microbatch by its own "
            "statistics, so that the gradient is not the large batch's, and running statistics move once a microbatch. "
            'batch_norm="exact" in accumulator.step normalises over the whole batch; batch_norm="frozen" by the '
            'running statistics; mb.convert_batch_norm(model, to="group") has layers that need no batch. '
            'batch_norm="microbatch" says that this is what you want',
            stacklevel=level,
        )


def _freeze(model: nn.Module, stack: ExitStack) -> None:
    for name, layer in layers_of(model).items():
        if layer.running_mean is None:
            raise ConfigError(
                f'batch_norm="frozen" normalises by running statistics, and {name!r} has none '
                "(track_running_stats=False)"
            )
        # The layer itself, and not what it calls: a checkpoint that runs it again in backward then does the same.
        layer.training = False
        stack.callback(setattr, layer, "training", True)
