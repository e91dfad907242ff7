"""The command line checks a job: a table or JSON, and an exit status that a script can go by."""

import json
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from microbatch.cli.main import app

JOB = """
import torch
import microbatch as mb

def masked(model, batch):
    return (model(batch["x"]).square() * batch["mask"]).sum() / batch["mask"].sum()

def job(batch_size=16):
    torch.manual_seed(0)
    model = torch.nn.Sequential(torch.nn.Linear(8, 8), {middle}, torch.nn.Tanh(), torch.nn.Linear(8, 1))
    mask = [float(row % 3 == 0 or row > {whole}) for row in range(32)]
    data = [{{"x": torch.randn(8), "mask": torch.tensor([each])}} for each in mask]
    return mb.Job(model=model, optimizer=torch.optim.SGD(model.parameters(), lr=0.1), data=data,
                  loss_fn=masked, batch_size=batch_size, microbatch_size=4)
"""


def invoke(*arguments: str) -> Any:
    return CliRunner().invoke(app, ["check", *arguments])


def job(folder: Path, *, middle: str = "torch.nn.Identity()", whole: int) -> str:
    file = folder / "small.py"
    file.write_text(JOB.format(middle=middle, whole=whole))
    return f"{file}:job"


def test_a_job_that_holds_ends_with_0(tmp_path: Path) -> None:
    result = invoke(job(tmp_path, whole=-1), "--no-color")
    assert result.exit_code == 0, result.output
    assert result.stdout.startswith("equal to rounding: ")
    assert "16 rows in 4 microbatches of 4, float32 against float64" in result.stdout


def test_a_job_that_does_not_ends_with_1_and_names_the_causes(tmp_path: Path) -> None:
    path = job(tmp_path, middle="torch.nn.BatchNorm1d(8)", whole=7)
    result = invoke(path, "--no-color")
    assert result.exit_code == 1, result.output
    assert "batch_statistics  1" in result.stdout
    told = invoke(path, "--json", "--batch-size", "32", "--microbatch-size", "8")
    found = json.loads(told.stdout)
    assert told.exit_code == 1
    assert (found["event"], found["ok"], found["rows"], found["microbatches"]) == ("check", False, 32, 4)
    assert {cause["kind"] for cause in found["causes"]} == {"batch_statistics", "counts"}


def test_bad_input_ends_with_2(tmp_path: Path) -> None:
    assert invoke("nothing").exit_code == 2
    result = invoke(job(tmp_path, whole=-1), "--batch-size", "1", "--json")
    assert result.exit_code == 2
    assert json.loads(result.stdout)["kind"] == "EmptyBatchError"


@pytest.mark.parametrize(("name", "rows"), [("images", 24), ("images-batchnorm", 12), ("language", 6)])
def test_the_built_in_jobs_hold(name: str, rows: int) -> None:
    result = invoke(name, "--batch-size", str(rows), "--microbatch-size", "4", "--json")
    assert result.exit_code == 0, result.output
    found = json.loads(result.stdout)
    assert found["ok"]
    assert found["causes"] == []
    assert found["rows"] == rows
    assert found["relative_error"] <= found["limit"] < 1e-4


@pytest.mark.parametrize("plain", [False, True])
def test_pairs_hold_over_the_whole_batch_and_not_within_microbatches(tmp_path: Path, plain: bool) -> None:
    file = tmp_path / "pairs.jsonl"
    words = [a + b for a in ("alpha", "beta", "gamma", "delta") for b in ("kappa", "lambda", "sigma", "omega")]
    file.write_text("\n".join(json.dumps({"anchor": f"find {w}", "positive": f"{w} {w[::-1]}"}) for w in words))
    flags = ["--accumulation", "plain"] if plain else []
    result = invoke("pairs", "--data", str(file), "--batch-size", "12", "--microbatch-size", "4", *flags, "--json")
    found = json.loads(result.stdout)
    assert (result.exit_code, found["ok"]) == (int(plain), not plain), result.output
    assert [cause["kind"] for cause in found["causes"]] == (["coupling"] if plain else [])


LOOP = """

def loop(model, optimizer, batch):
    for part in mb.cut(batch, 4):
        (masked(model, part) * {weight}).backward()
    optimizer.step()
    optimizer.zero_grad()
"""


@pytest.mark.parametrize(
    ("weight", "kinds"), [('len(part["x"]) / len(batch["x"])', set[str]()), ("1", {"not_divided"})]
)
def test_a_loop_of_ones_own_is_checked(tmp_path: Path, weight: str, kinds: set[str]) -> None:
    path = job(tmp_path, whole=-1)
    file = tmp_path / "small.py"
    file.write_text(file.read_text() + LOOP.format(weight=weight))
    result = invoke(path, "--loop", f"{file}:loop", "--json")
    found = json.loads(result.stdout)
    assert found["ok"] is not bool(kinds), result.output
    assert {cause["kind"] for cause in found["causes"]} == kinds
    assert result.exit_code == int(bool(kinds))
    assert invoke(path, "--loop", f"{file}:lopo").exit_code == 2
