"""Errors of the user's functions that Python or torch report in other words."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

from microbatch.errors import WindowError

_OURS = (str(Path(__file__).parents[1]), "<@")  # and functions that beartype generated
_SWAPPED = re.compile(r"'\w+' object (is not callable|is not subscriptable|cannot be interpreted as an integer)")
"""What Python raises if a microbatch is called, or a model is read like a microbatch."""
_AGAIN = "backward through the graph a second time"


def raise_as_raised(error: BaseException) -> None:
    """Raise the error of the user's function, if another one was raised in its place; explain swapped parameters.

    The library calls the functions inside of generators. There, Python replaces a `StopIteration`, such as that of
    ``next(loader)`` at the loader's end, by a `RuntimeError`.

    Raises:
        StopIteration: It was the user's.
    """
    if isinstance(error, TypeError) and _SWAPPED.match(str(error)):
        error.add_note("microbatch: loss_fn is called as loss_fn(model, microbatch), the model first")
    if type(error) is not RuntimeError or not isinstance(error.__cause__, StopIteration):
        return
    last = error.__traceback__
    while last is not None and last.tb_next is not None:
        last = last.tb_next
    if last is not None and last.tb_frame.f_code.co_filename.startswith(_OURS):
        raise error.__cause__ from None


def backward_once(run: Callable[..., object], *roots: Any) -> None:
    """Run a backward, and explain the error of a graph that an earlier microbatch's backward has freed."""
    try:
        run(*roots)
    except Exception as error:
        if not isinstance(error, RuntimeError) or _AGAIN not in str(error):
            raise
        raise WindowError(
            f"the loss goes back into a graph that an earlier backward has used (torch: trying to go {_AGAIN}). Either "
            "the loss function calls backward() itself, or a tensor with a graph outlives its microbatch: a running "
            "total of losses, a hidden state, or a tensor that was computed outside of the loss function. "
            "Call detach() on this tensor, or compute it in every call of the loss function"
        ) from error
