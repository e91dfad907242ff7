"""The command line finds a learning rate: a table, JSON, figures, exit codes that tell what was found."""

import json
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from microbatch.cli.main import app

JOB = """
import torch
import microbatch as mb

def job(batch_size=16, curvature={curvature}, optimizer=torch.optim.SGD):
    torch.manual_seed(0)
    model = torch.nn.Linear(2, 1, bias=False)
    torch.nn.init.ones_(model.weight)
    rows = torch.eye(2).repeat(20, 1)
    return mb.Job(model=model, optimizer={optimizer}, data=list(rows),
                  loss_fn=lambda model, x: {curvature} * model(x).square().mean(), batch_size=batch_size, steps=30)
"""
SGD = "torch.optim.SGD(model.parameters(), lr=0.1)"
WITHOUT = "type('NoRate', (torch.optim.Optimizer,), {'step': lambda self, closure=None: None})(model.parameters(), {})"


def write(folder: Path, *, curvature: float = 1.0, optimizer: str = SGD) -> str:
    (folder / "job.py").write_text(JOB.format(curvature=curvature, optimizer=optimizer))
    return f"{folder / 'job.py'}:job"


def invoke(*arguments: str) -> Any:
    return CliRunner().invoke(app, ["lr", *arguments], env={"COLUMNS": "80"})


def test_a_rate_is_found_shown_and_given_as_the_next_command(tmp_path: Path) -> None:
    result = invoke(write(tmp_path), "--seeds", "2", "--steps", "60", "--microbatch-size", "8")
    assert result.exit_code == 0, result.output
    assert "< suggested" in result.stdout
    assert "Use a learning rate of" in result.stdout
    assert "microbatches of 8" in result.stdout
    assert f"microbatch train {tmp_path}" in result.stdout
    assert max(map(len, result.stdout.splitlines()[:25])) <= 80


def test_as_json_and_as_a_figure(tmp_path: Path) -> None:
    figure = tmp_path / "curve.svg"
    result = invoke(
        write(tmp_path), "--seeds", "1", "--steps", "60", "--json", "--plot", str(figure), "--batch-size", "8"
    )
    assert result.exit_code == 0, result.output
    found = json.loads(result.stdout)
    assert found["event"] == "lr"
    assert found["batch_size"] == 8
    assert 0.01 < found["suggested"] < 2.0  # the loss is w^2 / 2 in each direction: descent diverges above 2
    assert "<svg" in figure.read_text()


def test_a_curve_that_says_nothing_ends_with_code_one(tmp_path: Path) -> None:
    result = invoke(write(tmp_path, curvature=0.0), "--seeds", "1", "--steps", "30", "--json")
    assert result.exit_code == 1
    assert json.loads(result.stdout)["suggested"] is None
    shown = invoke(write(tmp_path, curvature=0.0), "--seeds", "1", "--steps", "30")
    assert shown.exit_code == 1
    assert "There is no suggestion" in shown.stdout
    assert "microbatch train" not in shown.stdout


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        (("--low", "many"), '--low is "many"'),
        (("--seeds", "1.5"), '--seeds is "1.5"'),
        (("--seeds", "0"), "1 to 100"),
        (("--steps", "3"), "steps is 3"),
        (("--low", "1", "--high", "0.1"), "low must be below high"),
        (("--plot", "curve.jpg"), "ends with .svg or .png"),
    ],
)
def test_what_cannot_work_is_refused_before_anything_runs(tmp_path: Path, flags: tuple[str, ...], words: str) -> None:
    result = invoke(f"{tmp_path / 'none.py'}:job", *flags)
    assert result.exit_code == 2
    assert words in result.stderr.replace("\n", " ")
    assert "Traceback" not in result.stderr


def test_an_optimizer_without_a_rate_is_named(tmp_path: Path) -> None:
    result = invoke(write(tmp_path, optimizer=WITHOUT))
    assert result.exit_code == 2
    assert "NoRate, has no learning rate" in result.stderr.replace("\n", " ")
