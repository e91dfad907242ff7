"""The run of all faults: it keeps to its time, and a fault that hangs is stopped and named."""

import itertools
import threading
import time

import pytest
from benchmarks import faults


def test_a_fault_that_hangs_is_stopped_and_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(faults, "LONGEST", 1)
    wrong = dict[str, str]()
    with faults.limited(wrong, "one"):
        threading.Event().wait(60)
    with faults.limited(wrong, "another"):
        pass
    assert wrong.keys() == {"one"}
    assert wrong["one"].startswith("hangs at threading.py")


def test_no_fault_begins_after_the_time_is_over() -> None:
    assert list(faults.until(0, itertools.count())) == []
    started = time.monotonic()
    taken = sum(1 for _ in faults.until(0.05, itertools.count()))
    assert taken > 1
    assert time.monotonic() - started >= 0.05


def test_places_are_taken_evenly() -> None:
    places = sorted(faults.spread(number, 1000) for number in range(100))
    assert len(set(places)) > 90
    assert max(after - before for before, after in itertools.pairwise(places)) < 100


def test_every_call_is_made_where_the_time_lasts(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(faults.wrong_values, "raw", lambda call: None)  # a checker of types comes first in this process
    found = faults.values(60.0)
    assert found["calls"] == found["of"] > 2000
    assert faults.values(0.0)["calls"] == 0
