"""What people read fits their screen: no line of a run or a plan is wider, and no number is broken."""

import io
from pathlib import Path
from typing import Any

import pytest
import torch
from rich.console import Console

from microbatch.checking.check_report import Cause, Check
from microbatch.cli.progress import Screen
from microbatch.cli.run_views import step_line, summary_view
from microbatch.planning.text_table import aligned, fitting
from microbatch.step.events import Retry
from microbatch.train.run_config import RunConfig
from microbatch.train.run_events import Notice, RunPlanned, StepLogged
from microbatch.tuning.sweep_records import BatchResult
from microbatch.tuning.sweep_words import table

CONFIG = RunConfig(
    job="images", device=torch.device("cpu"), batch_size=128, microbatch_size=16, memory_budget=None, steps=1000,
    epochs=88.9, samples=1438, validation_samples=359, seed=0, autocast=None, learning_rate=3e-3, schedule="cosine",
    warmup_steps=10, max_grad_norm=1.0, nonfinite="raise", validate_every=100, checkpoint_every=100, keep_checkpoints=3,
    compare=True, parameters=307_690, unit="images",
)  # fmt: skip
METRICS = {
    "step": 1000, "loss": 2.5588, "validation": {"loss": 2.3429, "accuracy": 0.1003, "top5": 0.5}, "lr": 1.09e-3,
    "per_second": 12_345.0, "seconds": 0.1, "peak_bytes": 6_790_000, "comm_bytes": 1 << 30, "sync": "lean",
    "applied": True,
}  # fmt: skip
COMPARED = {"relative_error": 3.7e-7, "peak_bytes": 6_790_000, "seconds": 0.123}
SUMMARY: dict[str, Any] = {
    "step": 1000, "steps": 1000, "seconds": 123.4, "validation": METRICS["validation"], "loss": 2.5, "facts": {},
    "peak_bytes": 6_790_000, "memory_budget": 1 << 30, "finished": True, "run": "runs/images", "text": None,
    "comparison": {"samples": 128, "microbatches": 8, "notes": ["the times differ by a factor of 2.4, which is much"],
                   "accumulated": COMPARED, "whole": COMPARED, "hand_written": COMPARED},
}  # fmt: skip
EVENTS = (
    RunPlanned(config=CONFIG, path=Path("runs/images"), step=0),
    Notice("the job's warm-up of 10 steps does not fit into 3: it takes 0, which is far less"),
    Retry(step=0, index=0, before=16, after=8, error="out of memory"),
    StepLogged(metrics=METRICS),
)


def shown(width: int | None, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    monkeypatch.delenv("COLUMNS", raising=False)
    if width is not None:
        monkeypatch.setenv("COLUMNS", str(width))
    console = Console(file=io.StringIO(), width=width, highlight=False)
    with Screen(console) as screen:
        for event in EVENTS:
            screen(event)
        console.print(summary_view(SUMMARY))
    return console.file.getvalue().splitlines()  # type: ignore[attr-defined]


@pytest.mark.parametrize("width", [200, 120, 80, 60, 50])
def test_a_run_fits_and_breaks_no_number(width: int, monkeypatch: pytest.MonkeyPatch) -> None:
    lines = shown(width, monkeypatch)
    assert max(map(len, lines)) <= width
    (step,) = [line for line in lines if "loss 2.5588" in line and "step" in line]
    assert "validation 2.3429" in step
    words = " ".join(lines).split()
    for number in ("2.3429", "307,690", "1,438", "6.48", "3.7e-07"):
        assert number in words
    assert ("1.00×" in words) == (width >= 80)  # a narrow table has no ratios
    assert "…" not in words
    (times,) = [line for line in lines if "time per step" in line]
    assert times.count("123 ms") == 3
    assert ("1.09e-03" in words) == (width >= 120)  # left out, and never in two pieces


def test_a_file_has_no_width(monkeypatch: pytest.MonkeyPatch) -> None:
    lines = shown(None, monkeypatch)
    (step,) = [line for line in lines if "loss 2.5588" in line]
    assert step.endswith("lr 1.09e-03  sent 1.00 GiB  sync lean")
    assert any(line.endswith("microbatches of 8") and len(line) > 80 for line in lines)  # one line, for `grep`
    assert step_line(METRICS, config=CONFIG, rate=1.0, width=None).cell_len > 80


def test_a_table_leaves_out_columns_until_it_fits() -> None:
    rows = [["", "microbatch", "counted", "error", "step"], [">", "16", "6.48 MiB", "+18.2%", "70.9 ms"]]
    assert fitting(rows, ["counted", "error"], None) == rows
    for width in (30, 25, 20):
        fitted = fitting(rows, ["counted", "error"], width)
        assert max(map(len, aligned(fitted).splitlines())) <= max(width, 23)
        assert fitted[0][1] == "microbatch"
        assert fitted[1][-1] == "70.9 ms"
    assert fitting(rows, ["counted", "error"], 20)[0] == ["", "microbatch", "step"]


def test_tables_of_a_sweep_and_a_check_fit() -> None:
    batch = BatchResult(
        batch_size=12_345, microbatch_size=1_234, learning_rate=1.06e-3, best_loss=0.5659, steps=6_300.0,
        samples=2_027_000.0, spread=0.031, seconds_per_sample=0.004, noise_scale=57.7, seeds=3, rates=1,
        reached=3,
    )  # fmt: skip
    causes = Check(
        relative_error=0.1, rounding=1e-7, limit=2e-7, equal=False, precision="float32", yardstick="float64", rows=8,
        microbatch_size=2, microbatches=4, parameters=(), notes=(),
        causes=(Cause(kind="batch_statistics", words="", where=("base.model.encoder." * 4 + "norm",), alone=0.57,
                      without=0.12, remedy=""),),
    )  # fmt: skip
    for width in (60, 80, 120, 200):
        shown = [table([batch], width=width), causes.table(width=width)]
        assert all(len(line) <= width for each in shown for line in each.splitlines())
        assert "2,027,000" in shown[0]
        assert "5.7e-01" in shown[1]
        assert "norm" in shown[1]  # the end of a name tells more than its beginning
