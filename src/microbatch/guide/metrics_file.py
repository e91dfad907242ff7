"""A metrics file of any length, read in pieces while it grows."""

from __future__ import annotations

import os
from dataclasses import dataclass, field
from pathlib import Path

PIECE = 1 << 20
"""Bytes that are read at once; also the longest line. A line of 8,000 microbatches takes about a third of it."""

_SAMPLED = PIECE // 16
"""The longest line of a sample."""

_MARK = 512
"""Bytes before the place that was read last, by which a file is known again: every line has times of its own."""


@dataclass(frozen=True, slots=True)
class Piece:
    """What one read found.

    Attributes:
        lines: Whole lines without their ends; an empty one stands for a line that is too long.
        behind: Whether more is waiting.
        share: How much of the file has been read, from 0 to 1.
    """

    lines: list[bytes] = field(default_factory=list[bytes])
    behind: bool = False
    share: float = 1.0


class MetricsFile:
    """Read a file of lines as it grows, and notice when it was cut."""

    def __init__(self, path: Path) -> None:
        """Begin at the start of the file; nothing is opened yet.

        Args:
            path: The file; need not exist.
        """
        self.path = path
        self._begin()

    def _begin(self) -> None:
        self._place = 0
        self._mark = b""
        self._too_long = False

    def read(self) -> Piece | None:
        """Read the next whole lines: at most `PIECE` bytes.

        Returns:
            The lines; `None` where the file is not the one that was read so far, such as one that a resumed run cut.
            The next read then begins at its start.

        Raises:
            OSError: The file cannot be read.
        """
        if not self.path.is_file():
            cut = bool(self._mark)
            self._begin()
            return None if cut else Piece()
        with self.path.open("rb") as file:
            file.seek(self._place - len(self._mark))
            if file.read(len(self._mark)) != self._mark:
                self._begin()
                return None
            data, size = file.read(PIECE), os.fstat(file.fileno()).st_size
        lines = self._whole_lines(data)
        return Piece(lines, behind=len(data) == PIECE, share=min(1.0, self._place / size) if size else 1.0)

    def sample(self, number: int) -> list[bytes]:
        """Read lines from evenly spread places, up to the last whole line.

        Args:
            number: Of places.

        Returns:
            The lines in their order; none where the file is shorter than `number` bytes.

        Raises:
            OSError: The file cannot be read.

        Cost:
            Two short reads for each place, whatever the length of the file.
        """
        if not self.path.is_file():
            return []
        found: list[bytes] = []
        with self.path.open("rb") as file:
            size = os.fstat(file.fileno()).st_size
            end = 0
            for index in range(number):
                file.seek(max(end, size * index // number))
                if index:
                    file.readline(_SAMPLED)  # the rest of a line that began before this place
                line = file.readline(_SAMPLED)
                end = file.tell()
                if line.endswith(b"\n"):
                    found.append(line)
            file.seek(max(end, size - PIECE))
            found.extend(file.read(PIECE).split(b"\n")[-2:-1])
        return found

    def _whole_lines(self, data: bytes) -> list[bytes]:
        """Split what was read, and go on behind its last whole line."""
        end = data.rfind(b"\n") + 1
        if not end and len(data) == PIECE:
            self._too_long, end = True, PIECE
            self._pass(data)
            return []
        lines = data[:end].split(b"\n")[:-1]
        if lines and self._too_long:
            self._too_long, lines[0] = False, b""
        self._pass(data[:end])
        return lines

    def _pass(self, data: bytes) -> None:
        self._place += len(data)
        self._mark = (self._mark + data)[-_MARK:]
