"""A stream that nobody may read any more: a lost terminal or a closed pipe does not end a run."""

from __future__ import annotations

import contextlib
import os
from typing import Any, TextIO, cast


class SafeStream:
    """Write to a stream while someone can read it, and to nowhere afterwards.

    A terminal that is lost, or a pipe whose reader has ended, raises an error at every write. A run has its numbers in
    its directory, and needs no reader.
    """

    def __init__(self, stream: TextIO) -> None:
        """Write to a stream.

        Args:
            stream: Standard output or standard error.
        """
        self._stream = stream

    def __getattr__(self, name: str) -> Any:
        """Return what the stream has under this name, such as its encoding."""
        return getattr(self._stream, name)

    def write(self, text: str) -> int:
        """Write a text.

        Args:
            text: Any text; what the stream's encoding has no letters for is written as escapes.

        Returns:
            Its length.
        """
        try:
            return self._stream.write(text)
        except UnicodeEncodeError:
            encoding = self._stream.encoding or "utf-8"
            return self._stream.write(text.encode(encoding, "backslashreplace").decode(encoding))
        except OSError:
            self._to_nowhere()
        return len(text)

    def flush(self) -> None:
        """Hand on what is waiting."""
        try:
            self._stream.flush()
        except OSError:
            self._to_nowhere()

    def _to_nowhere(self) -> None:
        """Point the stream's descriptor at the null device, where Python's flush at the end succeeds as well."""
        with contextlib.suppress(OSError, ValueError):
            nowhere = os.open(os.devnull, os.O_WRONLY)
            os.dup2(nowhere, self._stream.fileno())
            os.close(nowhere)


def safe(stream: TextIO) -> TextIO:
    """Wrap a stream.

    Args:
        stream: Standard output or standard error.

    Returns:
        A stream that raises no error when nobody reads it.
    """
    return cast("TextIO", SafeStream(stream))
