"""TensorBoard's event files, written without TensorBoard: the numbers of ``metrics.jsonl`` under the same names.

A file is a row of records, each with its length and two checksums around it (the TFRecord format), each holding one
``Event`` message in protocol-buffer encoding; only the fields for a step's scalars are written.
"""

from __future__ import annotations

import struct
import time
from collections.abc import Iterator, Mapping
from functools import cache
from pathlib import Path
from typing import Any, cast

from microbatch.train.run_events import RunEvent, RunPlanned, StepLogged

_POLYNOMIAL = 0x82F63B78  # CRC-32C, reflected


class EventFile:
    """Write every step's numbers to an event file in the run directory; a listener of a run."""

    def __init__(self) -> None:
        """Begin without a file; the run's plan says where it goes."""
        self._path: Path | None = None

    def __call__(self, event: RunEvent) -> None:
        """Write a step.

        Args:
            event: What happened; only steps leave numbers.
        """
        now = time.time()
        if isinstance(event, RunPlanned):
            # A resumed run has a file of its own, which TensorBoard reads behind the others.
            self._path = event.path / f"events.out.tfevents.{int(now)}.microbatch.{time.monotonic_ns()}"
            self._append(event_message(now, version="brain.Event:2"))
        elif isinstance(event, StepLogged):
            self._append(event_message(now, step=event.metrics["step"], scalars=dict(scalars(event.metrics))))

    def _append(self, message: bytes) -> None:
        # Opened anew for each step, so that a run that is killed leaves whole records.
        if self._path is not None:
            with self._path.open("ab") as file:
                file.write(record(message))


def scalars(metrics: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, float]]:
    """List the numbers of a step.

    Args:
        metrics: A line of metrics.
        prefix: Of the names.

    Yields:
        Names, those of nested values behind a slash, and numbers.

    Example:
        >>> list(scalars({"step": 3, "loss": 1.5, "validation": {"loss": 2}, "applied": True}))
        [('loss', 1.5), ('validation/loss', 2.0), ('applied', 1.0)]
    """
    for name, value in metrics.items():
        if isinstance(value, Mapping):
            yield from scalars(cast("Mapping[str, Any]", value), f"{prefix}{name}/")
        elif isinstance(value, int | float) and prefix + name != "step":
            yield prefix + name, float(value)


def event_message(
    wall_time: float, *, step: int = 0, scalars: Mapping[str, float] | None = None, version: str | None = None
) -> bytes:
    """Encode an ``Event``.

    Args:
        wall_time: Seconds since 1970.
        step: Of the run.
        scalars: Numbers by name.
        version: Of the file, for its first event.

    Returns:
        The message.
    """
    message = _field(1, 1) + struct.pack("<d", wall_time) + _field(2, 0) + _varint(step)
    if version is not None:
        message += _text(3, version.encode())
    if scalars:
        values = (_text(1, name.encode()) + _field(2, 5) + struct.pack("<f", value) for name, value in scalars.items())
        message += _text(5, b"".join(_text(1, value) for value in values))
    return message


def record(message: bytes) -> bytes:
    """Put a message between its length and its checksums.

    Args:
        message: Any bytes.

    Returns:
        The record.
    """
    length = struct.pack("<Q", len(message))
    return length + struct.pack("<I", _masked(length)) + message + struct.pack("<I", _masked(message))


def crc32c(data: bytes) -> int:
    """Compute the checksum that the format asks for.

    Args:
        data: Any bytes.

    Returns:
        CRC-32C.

    Example:
        >>> hex(crc32c(b"123456789"))  # the check value of its definition
        '0xe3069283'
    """
    table, value = _table(), 0xFFFFFFFF
    for byte in data:
        value = table[(value ^ byte) & 0xFF] ^ (value >> 8)
    return value ^ 0xFFFFFFFF


@cache
def _table() -> tuple[int, ...]:
    def entry(value: int) -> int:
        for _ in range(8):
            value = (value >> 1) ^ (_POLYNOMIAL if value & 1 else 0)
        return value

    return tuple(entry(byte) for byte in range(256))


def _masked(data: bytes) -> int:
    value = crc32c(data)
    return ((value >> 15 | value << 17) + 0xA282EAD8) & 0xFFFFFFFF


def _field(number: int, kind: int) -> bytes:
    return _varint(number << 3 | kind)


def _varint(value: int) -> bytes:
    encoded = bytearray()
    while value > 0x7F:
        encoded.append(value & 0x7F | 0x80)
        value >>= 7
    return bytes([*encoded, value])


def _text(number: int, content: bytes) -> bytes:
    return _field(number, 2) + _varint(len(content)) + content
