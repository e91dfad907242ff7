"""The windows over a loader's microbatches, as `Accumulator.windows` returns them."""

from __future__ import annotations

import math
import sys
from collections.abc import Callable, Generator, Iterable, Iterator, Sequence, Sized
from dis import opname
from inspect import currentframe
from itertools import islice
from typing import Any, Self, cast

from microbatch.errors import ConfigError
from microbatch.kind_words import kind_of
from microbatch.step.window import Window

_POPS = {"POP_TOP", "POP_ITER"}  # the second one since Python 3.14


class Windows(Iterator[Window]):
    """Group a loader's microbatches into windows.

    It has a length where the loader has one, so that a progress bar knows the number of steps.

    Args:
        loader: Yields microbatches.
        microbatches: Number of microbatches in a window; at least 1.
        create: Creates the window of a list of microbatches.

    Raises:
        ConfigError: The loader cannot be iterated over.

    Source:
        Laws B1, B2, E4 and S10.
    """

    def __init__(self, loader: Iterable[Any], microbatches: int, create: Callable[[Sequence[Any]], Window]) -> None:
        self._loader, self._microbatches = loader, microbatches
        # The generator does not refer to this object, so that leaving the outer loop closes it at once.
        try:
            source = iter(loader)
        except TypeError:
            raise ConfigError(f"the loader must be an iterable of microbatches, not {kind_of(loader)}") from None
        self._windows = _windows_of(source, min(microbatches, sys.maxsize), create)

    def __iter__(self) -> Self:
        """Return this iterator."""
        return self

    def __next__(self) -> Window:
        """Close the window before, and open the next one."""
        return next(self._windows)

    def __len__(self) -> int:
        """Return the number of windows; `TypeError` for a loader without a length."""
        return math.ceil(len(cast("Sized", self._loader)) / self._microbatches)

    def close(self) -> None:
        """Drop the open window, as an error in its block does."""
        self._windows.close()


def _windows_of(
    source: Iterator[Any], microbatches: int, create: Callable[[Sequence[Any]], Window]
) -> Generator[Window]:
    while held := list(islice(source, microbatches)):
        window = create(held)
        try:
            with window:
                del held
                yield window
                window.leave()
        except GeneratorExit:
            if window.left and _left_by_statement():
                window.warn_left("no step is taken, because the loop over windows was left at the same time")
            raise


def _left_by_statement() -> bool:
    """Return whether a ``break`` or ``return`` closes the generator that calls this, rather than an error.

    Both statements pop the iterators of their loops, one instruction for each. An error pops them too, but its frame
    then stands at the instruction that raised the error. Loops may be nested in generators of the user.
    """
    frame = currentframe()
    while frame is not None:
        if opname[frame.f_code.co_code[frame.f_lasti]] in _POPS:
            return True
        frame = frame.f_back
    return False
