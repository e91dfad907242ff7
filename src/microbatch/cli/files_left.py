"""Show how many files the doctor has read, and the time left. It needs no other package, as the doctor."""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from typing import TextIO, TypeVar

from microbatch.planning.time_words import format_time

_SOON, _OFTEN = 0.4, 0.2  # seconds
_CLEAR = "\r\x1b[2K"

_Item = TypeVar("_Item")


def with_files_left(items: Sequence[_Item], stream: TextIO) -> Iterator[_Item]:
    """Yield items, and show on a terminal how many are done.

    Args:
        items: What is worked on, one after the other.
        stream: Standard error; nothing is written where it is no terminal.

    Yields:
        Each item. The line is taken away before the last one ends, and where an error ends the work.
    """
    began = drawn = time.monotonic()
    shown = False
    try:
        for done, item in enumerate(items):
            now = time.monotonic()
            if stream.isatty() and now - began > _SOON and now - drawn > _OFTEN:
                left = format_time((now - began) / max(1, done) * (len(items) - done))
                stream.write(f"{_CLEAR}  {done} of {len(items)} files read, {left} left")
                stream.flush()
                drawn, shown = now, True
            yield item
    finally:
        if shown:
            stream.write(_CLEAR)
            stream.flush()
