"""Where in the user's code a function was called from."""

from __future__ import annotations

import inspect
import threading
from pathlib import Path

import torch

_NOT_THE_USERS = (str(Path(torch.__file__).parent), str(Path(__file__).parent), threading.__file__)


def caller() -> str:
    """Name the line of the innermost frame that is neither torch's nor this room's.

    Returns:
        ``"file.py:line"``; a line that was typed in, or made by a program, only where there is no file.
    """
    frame, typed = inspect.currentframe(), "<unknown>"
    while frame is not None:
        name = frame.f_code.co_filename
        if not name.startswith(_NOT_THE_USERS):
            if not name.startswith("<"):
                return f"{Path(name).name}:{frame.f_lineno}"
            typed = f"{name}:{frame.f_lineno}" if typed == "<unknown>" else typed
        frame = frame.f_back
    return typed
