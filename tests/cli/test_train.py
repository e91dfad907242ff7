"""`microbatch train` as people and machines meet it: what it prints where, and with which exit code it ends."""

import json
import os
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest
from tests.forked import completed
from typer.testing import CliRunner

from microbatch.cli.main import app

JOBS = """
import torch
from torch import nn
from microbatch.train.job import Job

def job(loss_fn, **more):
    model = nn.Linear(3, 1)
    data = [torch.randn(3) for _ in range(10)]
    values = dict(model=model, optimizer=torch.optim.SGD(model.parameters(), lr=0.1), loss_fn=loss_fn, data=data,
                  batch_size=4, microbatch_size=3, steps=4, validation=data, facts={"best possible": 0.25})
    return Job(**(values | more))

def good():
    return job(lambda model, x: model(x).square().mean(), show=lambda model: "a [bold]sample[/bold] of text")

def wrong():
    return {}["mine"]

def breaks():
    calls = []
    def loss_fn(model, x):
        calls.append(1)
        if len(calls) == 5:
            raise ValueError("on purpose")
        return model(x).square().mean()
    return job(loss_fn, validation=None)

def hungry():
    # One row fits, and two do not.
    return job(lambda model, x: model(x).square().mean() * torch.ones(len(x), 100_000).mean(), memory_budget="500 KB",
               microbatch_size=2, steps=2)

def infinite():
    return job(lambda model, x: model(x).mean() * float("inf"))
"""


@pytest.fixture
def jobs(tmp_path: Path) -> Path:
    (tmp_path / "jobs.py").write_text(JOBS)
    return tmp_path


def test_one_process_has_nothing_to_share_out(jobs: Path) -> None:
    result = train(jobs, "jobs.py:good", "--shard", "zero3", "--no-compare")
    assert result.returncode == 0
    assert "--shard zero3: one process holds everything; start several with torchrun" in result.stdout
    assert "sharded" not in result.stdout


def train(folder: Path, *arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
    inherited = {key: value for key, value in os.environ.items() if key not in {"NO_COLOR", "FORCE_COLOR"}}
    settings = {**inherited, "COLUMNS": "100", "OMP_NUM_THREADS": "1", **environment}
    return completed(["-m", "microbatch", "train", *arguments], cwd=folder, env=settings)


def test_a_job_of_ones_own_for_people(jobs: Path) -> None:
    result = train(jobs, "jobs.py:good", "--run", "out")
    assert result.returncode == 0, result.stderr
    assert result.stderr == ""
    shown = result.stdout
    assert "4 samples a step = 2 microbatches of 3 (the last of 1)" in shown
    assert "best possible" in shown
    assert "0.2500" in shown
    assert "gradient error" in shown
    assert "written by hand" in shown
    assert "a [bold]sample[/bold] of text" in shown
    assert "\x1b" not in shown  # not a terminal: no colours, no bars, no cursor
    assert "\r" not in shown


def test_for_machines_every_line_is_an_object(jobs: Path) -> None:
    result = train(jobs, "jobs.py:good", "--run", "out", "--json", "--checkpoint-every", "2")
    assert result.returncode == 0, result.stderr
    assert result.stderr == ""
    events = [json.loads(line) for line in result.stdout.splitlines()]
    kinds = [event["event"] for event in events]
    assert kinds[0] == "plan"
    assert kinds[-1] == "summary"
    assert [event["step"] for event in events if event["event"] == "step"] == [1, 2, 3, 4]
    assert [event["step"] for event in events if event["event"] == "checkpoint"] == [0, 2, 4]
    assert (events[0]["batch_size"], events[0]["microbatch_size"], events[0]["microbatches"]) == (4, 3, 2)
    written = [json.loads(line) for line in (jobs / "out" / "metrics.jsonl").read_text().splitlines()]
    assert [
        {key: value for key, value in e.items() if key != "event"} for e in events if e["event"] == "step"
    ] == written
    summary = {key: value for key, value in events[-1].items() if key != "event"}
    assert summary == json.loads((jobs / "out" / "summary.json").read_text())
    assert summary["comparison"]["accumulated"]["relative_error"] < 1e-5


def test_what_is_done_when_memory_runs_out_is_shown(jobs: Path) -> None:
    people, machines = (
        train(jobs, "jobs.py:hungry", "--run", "a"),
        train(jobs, "jobs.py:hungry", "--run", "b", "--json"),
    )
    assert (people.returncode, people.stderr) == (0, "")
    assert "step 1: memory ran out, so the same batch starts again in microbatches of 1" in people.stdout
    assert "step 2: memory" not in people.stdout
    events = [json.loads(line) for line in machines.stdout.splitlines()]
    (retry,) = [event for event in events if event["event"] == "retry"]
    assert (retry["step"], retry["index"], retry["before"], retry["after"]) == (0, 0, 2, 1)
    assert [event["retries"] for event in events if event["event"] == "step"] == [1, 0]


def test_the_stored_configuration_gives_the_same_run_again(jobs: Path) -> None:
    assert train(jobs, "jobs.py:good", "--run", "first", "--epochs", "2", "--lr", "0.05", "--json").returncode == 0
    stored = tomllib.loads((jobs / "first" / "config.toml").read_text())
    assert (stored["steps"], stored["learning_rate"], stored["job"]) == (6, 0.05, f"{jobs}/jobs.py:good")
    assert train(jobs, "--config", "first/config.toml", "--run", "second", "--json").returncode == 0
    losses = [
        [json.loads(line)["loss"] for line in (jobs / name / "metrics.jsonl").read_text().splitlines()]
        for name in ("first", "second")
    ]
    assert losses[0] == losses[1]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["jobs.py:good", "--batch-size", "0"], "--batch-size is 0: it must be at least 1"),
        (["jobs.py:good", "--microbatch-size", "some"], "a whole number or 'auto'"),
        (["jobs.py:good", "--memory", "6 GiX"], "'6 GiX' is not an amount of memory"),
        (["jobs.py:good", "--device", "cuda:77"], "--device cuda:77"),
        (["jobs.py:good", "--steps", "3", "--epochs", "1"], "both steps and epochs"),
        (["jobs.py:good", "--config", "none.toml"], "there is no configuration file none.toml"),
        (["jobs.py:good", "--data", "nowhere"], "--data nowhere: there is no such file or folder"),
        (["jobs.py:good", "--data", "."], "takes no data"),
        (["jobs.py:goood"], "no function 'goood'"),
        (["run.toml"], "write --config run.toml"),
        (["langauge"], "did you mean 'language'"),
        (["jobs.py:good", "--resume", "--run", "nowhere"], "there is no run directory nowhere"),
        (["jobs.py:good", "--resume", "--run", "."], "is not a run directory"),
        (["jobs.py:good", "--resume"], "there is no run under runs/ to resume"),
        (["jobs.py:good", "--run", "."], "is not empty and holds no run"),
        (["jobs.py:good", "--run", "jobs.py"], "is a file"),
        (["jobs.py:good", "--memory", "3"], "--memory is 3: 3 what? Write"),
        (["jobs.py:good", "--memory", "3 B"], "--memory 3 B: 3 B cannot hold what every step of this model needs"),
        (["broken.py:job"], "broken.py, line 2 is not valid Python"),
        (
            ["pairs", "--data", "other.csv"],
            "no text under \"anchor\"; rename its columns, which are 'question', 'answer'",
        ),
    ],
)
def test_bad_input_is_one_message_and_exit_code_2(
    jobs: Path, arguments: list[str], message: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(jobs)
    (jobs / "broken.py").write_text("x = 1\ndef job(:\n")
    (jobs / "other.csv").write_text("question,answer\na,b\n")
    monkeypatch.setattr(sys, "path", list(sys.path))
    monkeypatch.setenv("COLUMNS", "100")
    result = CliRunner().invoke(app, ["train", *arguments])
    assert result.exit_code == 2, result.stderr
    assert message in result.stderr
    assert "Traceback" not in result.stderr
    assert result.stdout == ""  # before any work
    assert not (jobs / "runs").exists()


def test_a_run_is_not_overwritten_and_can_be_gone_on_with(jobs: Path) -> None:
    assert train(jobs, "jobs.py:good", "--run", "out", "--no-compare").returncode == 0
    again = train(jobs, "jobs.py:good", "--run", "out")
    assert again.returncode == 2
    assert "already holds a run; add --resume" in again.stderr
    longer = train(jobs, "--run", "out", "--resume", "--steps", "6", "--json", "--no-compare")
    assert longer.returncode == 0, longer.stderr
    assert "steps changes from 4 to 6" in longer.stdout
    steps = [json.loads(line)["step"] for line in (jobs / "out" / "metrics.jsonl").read_text().splitlines()]
    assert steps == [1, 2, 3, 4, 5, 6]


def test_an_error_in_the_users_function_keeps_its_traceback(jobs: Path) -> None:
    result = train(jobs, "jobs.py:wrong", "--run", "out")
    assert result.returncode == 1
    assert 'return {}["mine"]' in result.stderr
    assert "KeyError: 'mine'" in result.stderr
    assert "microbatch/train" not in result.stderr  # no frames of ours, which say nothing of it
    assert "click" not in result.stderr
    assert "the job's function failed with the KeyError above" in result.stderr


def test_an_error_in_a_step_keeps_its_traceback_and_says_how_to_go_on(jobs: Path) -> None:
    result = train(jobs, "jobs.py:breaks", "--run", "out", "--checkpoint-every", "1")
    assert result.returncode == 1
    assert "ValueError: on purpose" in result.stderr
    assert "The checkpoint of step 2 is safe" in result.stderr
    assert "microbatch train --run out --resume" in result.stderr


def test_a_failed_step_of_ours_is_one_message_and_exit_code_1(jobs: Path) -> None:
    result = train(jobs, "jobs.py:infinite", "--run", "out", "--json")
    assert result.returncode == 1
    assert "Traceback" not in result.stderr
    last = json.loads(result.stdout.splitlines()[-1])
    assert (last["event"], last["kind"]) == ("error", "NonfiniteError")


@pytest.mark.skipif(sys.platform == "win32", reason="needs a pseudo-terminal")
@pytest.mark.parametrize(
    ("flags", "environment", "colours"), [((), {}, True), (("--no-color",), {}, False), ((), {"NO_COLOR": "1"}, False)]
)
def test_a_terminal_gets_a_bar_and_colours_unless_told_not_to(
    jobs: Path, flags: tuple[str, ...], environment: dict[str, str], *, colours: bool
) -> None:
    import pty
    import re

    main, child = pty.openpty()
    arguments = [sys.executable, "-m", "microbatch", "train", "jobs.py:good", "--run", "out", "--no-compare", *flags]
    inherited = {key: value for key, value in os.environ.items() if key not in {"NO_COLOR", "FORCE_COLOR"}}
    settings = {**inherited, "TERM": "xterm-256color", "COLUMNS": "100", "OMP_NUM_THREADS": "1", **environment}
    process = subprocess.Popen(arguments, cwd=jobs, env=settings, stdout=child, stderr=child)
    os.close(child)
    shown = b""
    try:
        while piece := os.read(main, 65536):
            shown += piece
    except OSError:  # Linux says so when the other end is closed
        pass
    os.close(main)
    text = shown.decode()
    assert process.wait(timeout=60) == 0, text
    assert "━" in text
    assert "■" in text
    assert bool(re.search(r"\x1b\[[\d;]*3[1-7]m", text)) == colours
    assert text.count("\x1b[?25l") == text.count("\x1b[?25h")  # the cursor is given back
