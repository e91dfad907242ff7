"""The benchmark of the search: right verdicts from known measurements, and a run of "auto" that goes through."""

import dataclasses
import json
from pathlib import Path
from typing import Any

import pytest
from benchmarks import search
from benchmarks.search import RUN, Auto, Choosing, Row, verdicts


def auto(size: int, *, steps: int = 10, slower: float = 0.0, decided: bool = True) -> Auto:
    # Rounds differ, the sizes of a round hardly: 2 is the best, and 4 takes 1.04 of it.
    rounds = [1.0, 1.02, 0.98]
    times = {1: 1.5, 2: 1.0, 4: 1.04}[size]
    return Auto(
        microbatch_size=size,
        decided=decided,
        why="because",
        timed={1: 0.5, 2: 0.4},
        sizes=[size] * steps,
        seconds=[times] * (steps - 1) + [times + slower],
        rehearsal_seconds=slower,
        after=[times * each for each in rounds],
        best=rounds,
    )


def row(trials: list[Auto], **changes: Any) -> Row:
    seconds = {1: [1.5, 1.53, 1.47], 2: [1.0, 1.02, 0.98], 4: [1.04, 1.0608, 1.0192]}
    made = Row(case="tiny", batch_size=4, seconds=seconds, trials=trials, others_cpu=0.0)
    return dataclasses.replace(made, **changes)


def words(found: Row) -> list[str]:
    return [verdict for _, _, verdict in verdicts(found)]


def test_a_close_size_is_close_enough_and_a_far_one_is_not() -> None:
    assert row([]).best == 2
    assert row([]).against_best(4) == auto(4).against_best == pytest.approx(1.04)
    assert words(row([auto(2), auto(4)])) == ["met", "met", "met"]
    assert words(row([auto(2), auto(1)]))[0] == "missed"


def test_what_choosing_costs_is_all_that_its_steps_took_beyond_those_at_the_size() -> None:
    free, dear = auto(2), auto(2, slower=0.03 * RUN + 1e-9)
    assert free.overhead == pytest.approx(0)
    # What a process that had the size from the start takes as well is not the choice's.
    begun = dataclasses.replace(free, seconds=[3.0, *free.seconds[1:]], first=[3.0, 1.0])
    assert begun.overhead == pytest.approx(0)
    # At the speed that its own process has afterwards, whatever the size's own process needs.
    slow = dataclasses.replace(free, after=[0.5] * 3)
    assert slow.overhead == pytest.approx(10 * (1 - 0.5) / (RUN * 0.5))
    assert words(row([free, dear])) == ["met", "missed", "met"]


def test_noise_decides_nothing_and_a_refusal_is_one() -> None:
    assert words(row([auto(1)], others_cpu=0.2))[:2] == ["undecided", "undecided"]
    assert words(row([auto(4, decided=False)])) == ["refused", "met", "met", "-"]
    # One run that decided is judged alone.
    assert words(row([auto(4, decided=False), auto(1)]))[0] == "missed"


def test_auto_runs_until_it_has_chosen() -> None:
    run = Choosing("tiny", 1)
    found = run.choose()
    assert found.microbatch_size in {1, 2, 4}
    assert len(found.seconds) == len(found.sizes) > 1
    assert 0 < found.rehearsal_seconds < sum(found.seconds[:2])
    assert len(found.timed) <= search.PROBES
    assert run.step()[1].microbatch_size == found.microbatch_size


def test_quick_mode_writes_what_it_measured(tmp_path: Path) -> None:
    assert search.main(["--quick", "--threads", "1", "--out", str(tmp_path / "quick")]) == 0
    record = json.loads((tmp_path / "quick.json").read_text())
    (found,) = record["rows"]
    assert {size: len(taken) for size, taken in found["seconds"].items()} == {"1": 2, "2": 2, "4": 2}
    (trial,) = found["trials"]
    assert len(trial["after"]) == len(trial["best"]) == 2
    assert len(trial["first"]) > 1
    assert {"hardware", "versions", "threads", "verdicts"} <= record.keys()
    assert "## tiny, batch 4" in (tmp_path / "quick.md").read_text()
