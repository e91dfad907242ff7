"""Bytes as people write them, and as they read them."""

from typing import Any, cast

import pytest
from hypothesis import given
from hypothesis import strategies as st

from microbatch.errors import ConfigError
from microbatch.memory.budget import format_bytes, parse_bytes


@pytest.mark.parametrize(
    ("text", "size"),
    [
        (1, 1),
        (4096, 4096),
        ("4096", 4096),
        ("1 B", 1),
        ("1KB", 1_000),
        ("1 KiB", 1_024),
        ("512MiB", 512 * 1024**2),
        ("512 MB", 512_000_000),
        ("1.5 GB", 1_500_000_000),
        ("1.5 GiB", 3 * 1024**3 // 2),
        ("2 TB", 2 * 1000**4),
        ("2 TiB", 2 * 1024**4),
        ("  6  gib ", 6 * 1024**3),
        ("6 GIB", 6 * 1024**3),
        ("0.5 KiB", 512),
    ],
)
def test_an_amount_is_read(text: int | str, size: int) -> None:
    assert parse_bytes(text) == size


@pytest.mark.parametrize("text", ["", "GiB", "6 GiBs", "6 GB free", "six GB", "-6 GB", "1e9", "6,5 GB", "1 K", "6 Gi"])
def test_an_amount_that_cannot_be_read_is_shown_with_an_example(text: str) -> None:
    with pytest.raises(ConfigError, match='write bytes, or a text such as "6 GiB"') as caught:
        parse_bytes(text)
    assert repr(text) in str(caught.value)


@pytest.mark.parametrize("amount", [0, -1, "0", "0 GiB", "0.4 B"])
def test_less_than_a_byte_is_refused_by_its_value(amount: int | str) -> None:
    with pytest.raises(ConfigError, match="at least 1 byte") as caught:
        parse_bytes(amount)
    assert repr(amount) in str(caught.value)


def test_a_truth_value_is_no_amount() -> None:
    with pytest.raises(ConfigError, match="True"):
        parse_bytes(cast("Any", True))


@pytest.mark.parametrize(
    ("size", "text"),
    [
        (0, "0 B"),
        (1, "1 B"),
        (1023, "1023 B"),
        (1024, "1.00 KiB"),
        (1536, "1.50 KiB"),
        (100 * 1024, "100 KiB"),
        (12.34 * 1024**2, "12.3 MiB"),
        (6 * 1024**3, "6.00 GiB"),
        (2000 * 1024**4, "2000 TiB"),
    ],
)
def test_an_amount_is_written(size: float, text: str) -> None:
    assert format_bytes(size) == text


@given(st.integers(1, 10**15))
def test_what_is_written_can_be_read_and_is_near(size: int) -> None:
    assert parse_bytes(format_bytes(size)) == pytest.approx(size, rel=0.006)
