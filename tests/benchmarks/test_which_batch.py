"""The study's page is written from its results, and from nothing else."""

import json
import math
from pathlib import Path
from typing import Any

import pytest
from benchmarks import which_batch
from benchmarks.swept import STUDIES

from microbatch.tuning.sweep_records import CurvePoint, SweepRun
from microbatch.tuning.sweep_summary import summarise


def told(*, critical: float) -> dict[str, Any]:
    """Return a stored sweep whose samples to every loss follow the law."""
    runs: list[SweepRun] = []
    for size in (16, 64, 256):
        for seed in range(2):
            slow = (1 + size / critical) * (1 + 0.01 * seed)
            curve = tuple(
                CurvePoint(
                    steps=round(samples / size),
                    samples=samples,
                    loss=10 * math.exp(-samples / slow / 4000),
                    noise_scale=90.0,
                )
                for samples in range(512, 8192 + 1, 512)
            )
            runs.append(
                SweepRun(
                    batch_size=size,
                    microbatch_size=8,
                    learning_rate=0.1,
                    seed=seed,
                    ended="finished",
                    curve=curve,
                    seconds_per_sample=0.001,
                )
            )
    made = summarise(runs, target=None, measure="validation loss")
    return json.loads(json.dumps({**made.as_dict(), "wall_seconds": 1.0}))


def test_the_parts_hold_the_measured_numbers() -> None:
    results = {"images": told(critical=100.0), "images-finder": told(critical=400.0)}
    found = which_batch.parts(results)
    assert set(found) == {"critical", "targets", "sweep images", "sweep images-finder", "pair images images-finder"}
    fit = results["images"]["critical"]
    assert fit["batch_size"] == pytest.approx(100, rel=0.1)
    assert f"{fit['batch_size']:,.3g}" in found["critical"]
    assert found["targets"].count("| images |") == 3
    assert found["sweep images"].count("\n|") == 4
    assert "256 takes" in found["sweep images"]
    head, *rows = found["pair images images-finder"].splitlines()
    assert "worst best loss of both" in head
    assert [row.split(" | ")[0] for row in rows[3:]] == ["| 16", "| 64", "| 256"]


def test_only_what_stands_between_the_marks_is_replaced() -> None:
    page = "a\n<!-- numbers: x y -->\nold\n<!-- end -->\nb\n<!-- numbers: z -->\nkept\n<!-- end -->\nc"
    written = which_batch.filled(page, {"x y": "new"})
    assert written == page.replace("old", "\nnew\n")
    assert which_batch.filled(written, {"x y": "new"}) == written


def test_every_place_of_the_page_is_known() -> None:
    page = which_batch.PAGE.read_text(encoding="utf-8")
    places = set(which_batch.re.findall(r"<!-- numbers: (.+?) -->", page))
    known = {"critical", "targets", *(f"sweep {name}" for name in STUDIES)}
    known |= {f"pair {first} {second}" for first, second in which_batch.PAIRED}
    assert places <= known
    assert {f"pair {first} {second}" for first, second in which_batch.PAIRED} <= places


def test_the_page_holds_the_numbers_of_the_results() -> None:
    file: Path = which_batch.OUT / "which-batch.json"
    if not file.exists():
        pytest.skip("the study has not been run")
    results = json.loads(file.read_text(encoding="utf-8"))["sweeps"]
    page = which_batch.PAGE.read_text(encoding="utf-8")
    assert which_batch.filled(page, which_batch.parts(results)) == page


def test_the_results_are_written_with_their_figures(tmp_path: Path) -> None:
    which_batch.write_results({"images": told(critical=100.0)}, tmp_path)
    assert sorted(path.name for path in tmp_path.iterdir()) == [
        "which-batch-images.svg",
        "which-batch.json",
        "which-batch.md",
    ]
    assert "![sweep images](which-batch-images.svg)" in (tmp_path / "which-batch.md").read_text()
