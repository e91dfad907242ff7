"""The benchmark under a memory budget: who is compared, who is disqualified, and what the tables say."""

import dataclasses
import json
from pathlib import Path
from typing import Any

import pytest
from benchmarks import budget
from benchmarks.budget import Loop, Row, as_markdown, finalists, grid, largest_within, page_table, put_between
from benchmarks.cases import BUDGET_CASES
from benchmarks.under_budget import Chosen, Contestant

CHOSEN = Chosen(microbatch_size=6, decided=True, why="fastest of 3 sizes", steps=9, seconds=4.0)
MADE = Row(
    case="vit-small",
    share=4,
    budget=1000,
    chosen=CHOSEN,
    auto_peak=900,
    auto_allocated=950,
    auto_seconds=[0.88, 0.89, 0.87],
    loop_seconds={4: [1.1, 1.1, 1.1], 8: [1.0, 1.0, 1.0]},
    loop_peaks={4: 500, 8: 980},
    loop_allocated={4: 510, 8: 990},
    others_cpu=0.0,
)
RECORD = {
    "command": "python -m benchmarks.budget",
    "date": "2030-01-01",
    "hardware": {"cpu": "a processor"},
    "versions": {"torch": "3"},
    "threads": 2,
    "repeats": 3,
    "heap": "the default",
}


def made(**changed: Any) -> Row:
    return dataclasses.replace(MADE, **changed)


def test_sizes_are_powers_of_two_and_those_between() -> None:
    assert grid(64) == [1, 2, 3, 4, 6, 8, 12, 16, 24, 32, 48]
    assert all(max(grid(rows)) < rows for rows in range(2, 200))


@pytest.mark.parametrize("budget", range(10, 140))
def test_the_largest_size_that_fits_is_found_between_two(budget: int) -> None:
    peaks = {size: 10 + 5 * size for size in (1, 2, 4, 8, 16, 24)}
    found = largest_within(peaks, budget)
    truth = max((size for size in range(1, 25) if 10 + 5 * size <= budget), default=None)
    known = max((size for size in peaks if peaks[size] <= budget), default=None)
    assert (found or known) == truth


def test_loops_above_the_budget_are_disqualified_however_fast() -> None:
    times = {1: 9.0, 2: 3.0, 4: 2.0, 8: 1.0}
    loops = [
        Loop(microbatch_size=size, peak_bytes=100 * size, allocated_bytes=0, seconds=[taken] * 2)
        for size, taken in times.items()
    ]
    assert finalists(loops, 800) == [4, 8]
    assert finalists(loops, 799) == [2, 4]
    assert finalists(loops, 99) == []


@pytest.mark.parametrize(
    ("changed", "verdict"),
    [
        ({}, "met"),
        ({"auto_seconds": [0.95, 0.94, 0.93]}, "missed"),
        ({"case": "ragged-small"}, "missed"),
        ({"auto_peak": 1001}, "over the budget"),
        ({"others_cpu": 0.2}, "undecided"),
        ({"auto_seconds": [0.5, 0.8, 1.5]}, "undecided"),
        ({"chosen": None, "auto_seconds": []}, "only the loop fits"),
        ({"loop_seconds": {}}, "only microbatch fits"),
        ({"chosen": None, "auto_seconds": [], "loop_seconds": {}}, "neither fits"),
    ],
)
def test_verdicts(changed: dict[str, Any], verdict: str) -> None:
    assert made(**changed).verdict == verdict


def test_the_ratio_is_to_the_best_loop() -> None:
    assert MADE.best_loop == 8
    assert MADE.ratio is not None
    assert MADE.ratio.median == pytest.approx(0.88)


def test_the_tables_have_what_fits_and_what_does_not() -> None:
    refused = made(chosen=None, refusal="too little", auto_seconds=[], auto_peak=None, loop_seconds={}, share=8)
    loops = [Loop(microbatch_size=8, peak_bytes=980, allocated_bytes=990, seconds=[1.0])]
    text = as_markdown(RECORD, {"vit-small": (4000, loops, [MADE, refused])})
    assert "| vit-small | 1/4, 0.0 MiB | 8 | 1.00 s | 0.0 MiB | 6 | 880 ms | 0.0 MiB | 0.880 | 0.9 | met |" in text
    assert "refused: too little" in text
    short = page_table([MADE, refused], RECORD)
    assert "| vit-small | 1/4 | 1.00 s | 880 ms | 0.880 | 0.9 | met |" in short
    assert "| vit-small | 1/8 | - | - | - | 0.9 | neither fits |" in short
    assert "nan" not in (text + short).lower()


def test_the_page_has_places_for_both_heaps() -> None:
    page = budget.PAGE.read_text(encoding="utf-8")
    for name in ("budget", "budget-kept-heap"):
        once = put_between(page, name, "a table")
        assert put_between(once, name, "a table") == once
        assert "a table" in once
    assert put_between(put_between(page, "budget", "x"), "budget", "y").count("<!-- budget: begin -->") == 1
    with pytest.raises(ValueError, match="no marks"):
        put_between(page, "other", "x")


def test_contestants_count_the_same_bytes_and_stay_within_the_budget() -> None:
    whole = Contestant("tiny", size=4, budget=None, threads=1)
    whole.window()
    most, _ = whole.peaks()
    single = Contestant("tiny", size=1, budget=None, threads=1)
    single.window()
    least, allocated = single.peaks()
    assert least < most
    assert allocated > 0
    limit = (least + most) // 2
    auto = Contestant("tiny", size=None, budget=limit, threads=1)
    assert auto.choose().microbatch_size < 4
    assert auto.peaks()[0] <= limit


def test_every_case_has_what_a_window_needs() -> None:
    assert {"gpt-small", "vit-small", "residual-small", "batchnorm-small", "ragged-small"} < set(BUDGET_CASES)
    for case in BUDGET_CASES.values():
        assert len(case.batch()["labels"]) == case.batch_size


@pytest.mark.slow
def test_everything_runs(tmp_path: Path) -> None:
    assert budget.main(["--quick", "--threads", "1", "--out", str(tmp_path / "budget")]) == 0
    told = json.loads((tmp_path / "budget.json").read_text())
    assert [row["share"] for row in told["cases"]["tiny"]["rows"]] == [2, 4, 8]
    assert (tmp_path / "budget.md").read_text().startswith("# At a memory budget")
