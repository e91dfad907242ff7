"""`microbatch new` writes a job that runs as it is, and writes over nothing."""

import json
import subprocess
from pathlib import Path

import pytest
import torch
from tests.forked import completed

from microbatch.train.find_job import call_job, find_job


def microbatch(*arguments: str, folder: Path) -> subprocess.CompletedProcess[str]:
    return completed(["-m", "microbatch", *arguments], cwd=folder)


def test_the_job_runs_as_it_is(tmp_path: Path) -> None:
    made = microbatch("new", "mine.py", folder=tmp_path)
    assert made.returncode == 0, made.stderr
    assert "microbatch train mine.py:job" in made.stdout
    assert "`microbatch train mine.py:job` trains it" in (tmp_path / "mine.py").read_text()
    flags = ["--steps", "60", "--microbatch-size", "64", "--no-compare", "--json", "--device", "cpu"]
    run = microbatch("train", "mine.py:job", *flags, folder=tmp_path)
    assert run.returncode == 0, run.stderr
    summary = json.loads(run.stdout.splitlines()[-1])
    assert summary["validation"]["accuracy"] > 0.6  # of two classes


def test_the_job_reads_a_table_of_numbers(tmp_path: Path) -> None:
    assert microbatch("new", str(tmp_path / "mine.py"), folder=tmp_path).returncode == 0
    table = tmp_path / "table.csv"
    table.write_text("".join(f"{i}.5,{i % 3},{i % 3}\n" for i in range(30)))
    offered = {"seed": 0, "device": torch.device("cpu"), "data": table, "batch_size": None}
    job = call_job(find_job(f"{tmp_path / 'mine.py'}:job"), offered, name="mine")
    assert (len(job.data), job.model[-1].out_features) == (27, 3)  # pyright: ignore[reportIndexIssue]


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("there.py", "is there already, and is not written over"),
        ("mine", "is no name of a Python file; write mine.py"),
        ("nowhere/mine.py", "there is no folder nowhere"),
    ],
)
def test_refusals_change_nothing(name: str, message: str, tmp_path: Path) -> None:
    (tmp_path / "there.py").write_text("mine")
    made = microbatch("new", name, folder=tmp_path)
    assert (made.returncode, made.stdout) == (2, "")
    assert message in made.stderr
    assert [(each.name, each.read_text()) for each in tmp_path.iterdir()] == [("there.py", "mine")]
