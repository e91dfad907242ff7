"""The command line sweeps a job: a table, JSON, figures, a folder to go on with; what cannot work is refused."""

import json
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from microbatch.cli.main import app

pytestmark = pytest.mark.filterwarnings("ignore::UserWarning:torch.*")

JOB = """
import torch
import microbatch as mb

def job(batch_size=8, seed=0):
    torch.manual_seed(seed)
    model = torch.nn.Linear(4, 1)
    data = list(torch.randn(64, 4, generator=torch.Generator().manual_seed(0)))
    return mb.Job(model=model, optimizer=torch.optim.SGD(model.parameters(), lr=0.05), data=data, validation=data[:8],
                  loss_fn=lambda model, x: model(x).square().mean(), batch_size=batch_size, microbatch_size=4)
"""


@pytest.fixture
def job(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    monkeypatch.chdir(tmp_path)
    file = tmp_path / "small.py"
    file.write_text(JOB)
    return f"{file}:job"


def invoke(*arguments: str) -> Any:
    return CliRunner().invoke(app, ["sweep", *arguments])


QUICK = ("--samples", "64", "--points", "2", "--seeds", "2", "--microbatch-size", "4", "--no-color")


def test_a_sweep_writes_a_table_a_folder_and_figures(job: str, tmp_path: Path) -> None:
    shown = invoke(job, "--batch-size", "8,16", *QUICK, "--output", "out", "--plot", "own.png")
    assert shown.exit_code == 0, shown.output
    assert "of the steps" in shown.output
    assert "validation loss" in shown.output
    assert (tmp_path / "out" / "sweep.svg").read_text().startswith("<?xml")
    for png in (tmp_path / "out" / "sweep.png", tmp_path / "own.png"):
        assert png.read_bytes()[:4] == b"\x89PNG"
    kept = json.loads((tmp_path / "out" / "result.json").read_text())
    told = invoke(job, "--batch-size", "8,16", *QUICK, "--output", "out", "--json")
    assert told.exit_code == 0, told.output
    found = json.loads(told.stdout.splitlines()[-1])
    assert found["event"] == "sweep"
    assert found["runs"] == kept["runs"]
    assert [each["batch_size"] for each in found["batches"]] == [8, 16]


def test_without_batches_those_around_the_jobs_own_are_taken(job: str) -> None:
    told = invoke(job, *QUICK, "--json")
    assert told.exit_code == 0, told.output
    found = json.loads(told.stdout.splitlines()[-1])
    assert [each["batch_size"] for each in found["batches"]] == [4, 8, 16, 32]
    assert Path(found["folder"]).parent == Path("runs")


@pytest.mark.parametrize(
    ("arguments", "what"),
    [
        (("--batch-size", "8;16"), "--batch-size is"),
        (("--batch-size", "16,8"), "must rise"),
        (("--batch-size", "8,16", "--lr", "best"), "lr must be"),
        (("--batch-size", "8,16", "--seeds", "many"), "seeds"),
        (("--batch-size", "8,16", "--samples", "1.5"), "samples"),
        (("--batch-size", "8,16", "--target-loss", "low"), "target-loss"),
        (("--batch-size", "8,16", "--microbatch-size", "some"), "microbatch-size"),
        (("--batch-size", "8,16", "--microbatch-size", "0"), "--microbatch-size must be"),
        (("--batch-size", "8,16", "--plot", "figure.pdf"), ".svg or .png"),
        (("--batch-size", "8,16", "--device", "cuda:77"), "--device"),
    ],
)
def test_what_cannot_work_is_refused(job: str, arguments: tuple[str, ...], what: str, tmp_path: Path) -> None:
    refused = invoke(job, *QUICK, "--output", "out", *arguments)
    assert refused.exit_code == 2, refused.output
    assert what in refused.output
    assert "Traceback" not in refused.output
    assert not (tmp_path / "out" / "result.json").exists()
