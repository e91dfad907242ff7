"""The benchmark of slow links: what it makes of its measurements, and what it says where it cannot measure."""

import pytest
from benchmarks import links, network
from benchmarks.linked import ALONE, EVERY, KINDS, OURS
from benchmarks.links import Entry, disagreement, gains, table


def entry(way: str, *, megabits: float = 1000.0, communication: float = 1.0, sent: int = 8_000_000) -> Entry:
    return Entry(
        megabits=megabits,
        way=way,
        seconds=[2.0, 2.0, 2.0],
        communication=[communication] * 3,
        wire_bytes=sent,
        counted_bytes=0,
        calls=0,
        peak_bytes=1 << 20,
    )


def test_gains_are_of_the_same_link() -> None:
    fast = [entry(EVERY, megabits=10_000, communication=0.5), entry(OURS, megabits=10_000, communication=0.25)]
    slow = [entry(EVERY, communication=4.0), entry(OURS, communication=0.5, sent=1_000_000)]
    assert gains([*slow, *fast]) == [(1000.0, 8.0, 8.0), (10_000, 1.0, 2.0)]


def test_a_wrong_gradient_is_far_off() -> None:
    assert disagreement({"one": [4.0, -2.0], "other": [4.0, -2.0]}) == 0
    assert disagreement({"one": [4.0, -2.0], "other": [4.0, 2.0]}) == 1


def test_what_has_no_other_rank_has_no_communication() -> None:
    (line,) = [each for each in table([entry(ALONE)]).splitlines() if ALONE in each]
    assert "| 2.00 s ± 0 % | – |" in line
    assert len({way for ways in KINDS.values() for way in ways}) == sum(map(len, KINDS.values()))


def test_a_machine_that_makes_no_hosts_is_told_so(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(network, "_TOOLS", ("no-such-tool",))
    assert links.main([]) == 2
    assert "no-such-tool" in capsys.readouterr().err
