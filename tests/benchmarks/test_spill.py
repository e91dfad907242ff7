"""The benchmark of spilled activations: every way does the same arithmetic, and its bytes are what it says."""

import dataclasses

import pytest
from benchmarks.spill import SIZES, WAYS, Desk, Entry, as_markdown, by_size

# The profiler says so of every build without a GPU, and of every run that it does not export.
pytestmark = pytest.mark.filterwarnings("ignore::UserWarning:torch.*")


def entry(way: str, waiting: int) -> Entry:
    return Entry(
        case="tiny",
        rows=2,
        way=way,
        seconds=[0.1, 0.2, 0.3],
        against_plain=1.5,
        waiting_bytes=waiting,
        peak_bytes=3 << 20,
        spilled_bytes=1 << 20,
        file_bytes=0,
        same_bits=way != "spill",
    )


def test_every_way_leaves_the_same_gradient_and_fewer_bytes_wait() -> None:
    desks = {way: Desk("tiny", way, 2, smallest=0) for way in WAYS}
    assert len({desk.digest() for desk in desks.values()}) == 1
    memory = {way: desk.memory() for way, desk in desks.items()}
    waiting = {way: found["waiting_bytes"] for way, found in memory.items()}
    assert waiting["spill"] < waiting["plain"] / 2
    assert waiting["checkpoint and spill"] < waiting["checkpoint"] < waiting["plain"]
    assert memory["plain"]["spilled_bytes"] == memory["checkpoint"]["spilled_bytes"] == 0
    assert memory["spill"]["spilled_bytes"] > memory["checkpoint and spill"]["spilled_bytes"] > 0
    assert all(desk.seconds() > 0 for desk in desks.values())


def test_another_batch_has_another_digest() -> None:
    assert Desk("tiny", "plain", 2).digest() != Desk("tiny", "plain", 4).digest()


def test_the_table_says_what_differs() -> None:
    record = {
        "date": "2026-01-01",
        "hardware": {"cpu": "some"},
        "versions": {"torch": "2"},
        "threads": 1,
        "entries": [dataclasses.asdict(entry(way, 1 << 20)) for way in WAYS],
        "by_size": by_size(1, total=1 << 18),
    }
    lines = as_markdown(record).splitlines()
    (spilled,) = [line for line in lines if "| spill |" in line]
    assert "200 ms" in spilled
    assert "1.500" in spilled
    assert spilled.endswith("differs |")
    assert len([line for line in lines if line.startswith(tuple(f"| {size:,} |" for size in SIZES))]) == len(SIZES)
