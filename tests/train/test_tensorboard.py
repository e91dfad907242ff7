"""Event files, read back by a reader of our own that checks every length and every checksum."""

import struct
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from microbatch.train.run_events import StepLogged
from microbatch.train.tensorboard import EventFile, crc32c, event_message, record


def varint(data: bytes, at: int) -> tuple[int, int]:
    value = shift = 0
    while True:
        value |= (data[at] & 0x7F) << shift
        shift, at = shift + 7, at + 1
        if not data[at - 1] & 0x80:
            return value, at


def fields(message: bytes) -> Iterator[tuple[int, Any]]:
    """Yield the numbers and values of a message's fields, by the wire format's own description."""
    at = 0
    while at < len(message):
        key, at = varint(message, at)
        if key & 7 == 0:
            value, at = varint(message, at)
        elif key & 7 == 1:
            value, at = struct.unpack("<d", message[at : at + 8])[0], at + 8
        elif key & 7 == 5:
            value, at = struct.unpack("<f", message[at : at + 4])[0], at + 4
        else:
            size, at = varint(message, at)
            value, at = message[at : at + size], at + size
        yield key >> 3, value


def records(data: bytes) -> Iterator[bytes]:
    at = 0
    while at < len(data):
        (size,) = struct.unpack("<Q", data[at : at + 8])
        message = data[at + 12 : at + 12 + size]
        for part, place in ((data[at : at + 8], at + 8), (message, at + 12 + size)):
            rotated = crc32c(part) >> 15 | crc32c(part) << 17
            assert struct.unpack("<I", data[place : place + 4])[0] == (rotated + 0xA282EAD8) % 2**32
        yield message
        at += 16 + size


def test_what_is_written_can_be_read() -> None:
    message = event_message(12.5, step=300, scalars={"loss": 1.5, "validation/loss": -2.0})
    found = dict(fields(message))
    assert (found[1], found[2]) == (12.5, 300)
    values = [dict(fields(value)) for _, value in fields(found[5])]
    assert [(value[1].decode(), value[2]) for value in values] == [("loss", 1.5), ("validation/loss", -2.0)]


def test_a_record_that_was_damaged_would_be_seen() -> None:
    data = bytearray(record(b"abc"))
    data[13] ^= 1
    with pytest.raises(AssertionError):
        list(records(bytes(data)))


def test_a_run_leaves_its_steps(tmp_path: Path) -> None:
    listener = EventFile()
    listener._path = tmp_path / "events.out.tfevents.1.x"
    for step in (1, 2):
        metrics = {"step": step, "loss": 1 / step, "validation": {"accuracy": 0.5}, "timeline": {"forward": [1.0]}}
        listener(StepLogged(metrics=metrics))
    told = [dict(fields(message)) for message in records(listener._path.read_bytes())]
    assert [each[2] for each in told] == [1, 2]
    names = [dict(fields(value))[1].decode() for _, value in fields(told[1][5])]
    assert names == ["loss", "validation/accuracy"]
