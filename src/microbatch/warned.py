"""Warnings: each kind once for each accumulator, and attributed to the user's own line."""

from __future__ import annotations

import inspect
import warnings
from pathlib import Path

_OURS = (str(Path(__file__).parent), "<@")  # files of the package, and functions that beartype generated
_BETWEEN = ("/torch/", "/contextlib.py")  # code that may stand between the package and the user's line


class MicrobatchWarning(UserWarning):
    """Something is probably wrong, but not certainly; the text says how to mend it, or how to say that it is meant."""


def warn(text: str) -> None:
    """Issue a `MicrobatchWarning` at the user's line that led here.

    Args:
        text: What is probably wrong, and what to write instead.
    """
    frame, level = inspect.currentframe(), 1
    while frame is not None and _is_between(frame.f_code.co_filename):
        frame, level = frame.f_back, level + 1
    warnings.warn(text, MicrobatchWarning, stacklevel=level)


class WarnOnce:
    """Issue each kind of warning once; an accumulator has one of these."""

    def __init__(self) -> None:
        self._kinds = set[str]()

    def __call__(self, kind: str, text: str) -> None:
        """Issue a warning, unless one of its kind was issued before.

        Args:
            kind: Name of the kind.
            text: What is probably wrong, and what to write instead.
        """
        if kind not in self._kinds:
            self._kinds.add(kind)
            warn(text)

    def has(self, kind: str) -> bool:
        """Return whether a warning of this kind was issued."""
        return kind in self._kinds


def _is_between(file: str) -> bool:
    return file.startswith(_OURS) or any(part in file for part in _BETWEEN)
