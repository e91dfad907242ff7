"""Find the line of the user's code that called a function."""

from __future__ import annotations

import inspect
import threading
from pathlib import Path

import torch

_SKIPPED = (str(Path(torch.__file__).parent), str(Path(__file__).parent), threading.__file__)


def caller() -> str:
    """Return file and line of the innermost frame that is neither torch's nor this room's.

    Returns:
        ``"file.py:line"``. If no frame belongs to a file, the innermost frame of code that was typed in or generated.
    """
    frame, fallback = inspect.currentframe(), "<unknown>"
    while frame is not None:
        name = frame.f_code.co_filename
        if not name.startswith(_SKIPPED):
            if not name.startswith("<"):
                return f"{Path(name).name}:{frame.f_lineno}"
            fallback = f"{name}:{frame.f_lineno}" if fallback == "<unknown>" else fallback
        frame = frame.f_back
    return fallback
