"""``microbatch plan --price``: what a step and a run cost, here and on hardware that is not here."""

import dataclasses
import json
from decimal import Decimal
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from microbatch.cli.main import app
from microbatch.planning.plan import Candidate, Plan, Way

GPT = {"model_type": "gpt2", "n_embd": 64, "n_layer": 4, "n_head": 2, "vocab_size": 512}
JOB = """
import torch
import microbatch as mb

def job(batch_size=4):
    model = torch.nn.Linear(8, 1)
    return mb.Job(model=model, optimizer=torch.optim.SGD(model.parameters(), lr=0.1), data=list(torch.ones(32, 8)),
                  loss_fn=lambda model, x: model(x).square().mean(), batch_size=batch_size, {length})
"""
WAY = Way(
    name="kept",
    microbatch_size=2,
    microbatches=2,
    blocks=(),
    predicted_bytes=200,
    measured_bytes=200,
    seconds=3.6,
)
PLAN = Plan(
    batch_size=4,
    microbatch_size=2,
    decided=True,
    why="fastest of 2 sizes",
    budget=300,
    candidates=tuple(
        Candidate(
            microbatch_size=size,
            microbatches=4 // size,
            predicted_bytes=100 * size,
            counted_bytes=100 * size,
            measured_bytes=100 * size,
            fits=size < 4,
            seconds=3.6,
        )
        for size in (2, 4)
    ),
    words=("a word",),
    rests_on="nothing",
    ways=(WAY,),
    way="kept",
)


def invoke(*arguments: str) -> Any:
    return CliRunner().invoke(app, ["plan", *arguments])


@pytest.fixture
def config(tmp_path: Path) -> str:
    file = tmp_path / "tiny.json"
    file.write_text(json.dumps(GPT))
    return str(file)


@pytest.fixture
def job(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setattr("microbatch.cli.plan_command.plan", lambda job, **_: PLAN)
    file = tmp_path / "small.py"
    file.write_text(JOB.format(length="steps=1000"))
    return f"{file}:job"


def elsewhere(config: str, *arguments: str, device: str = "h100") -> Any:
    return invoke(config, "--sequence-length", "32", "--batch-size", "64", "--device", device, *arguments)


def test_here_the_jobs_own_run_at_the_measured_time(job: str) -> None:
    # 2.50 EUR/h * 3.6 s / 3600 = 0.0025 EUR a step; 1000 steps of 3.6 s are one hour.
    shown = invoke(job, "--price", "2.50 EUR/h", "--deadline", "59 min", "--no-color", "--device", "cpu")
    assert shown.exit_code == 1
    assert "cost on 1 x cpu, at 2.50 EUR/h a device, measured: a step 3.60 s, 0.00250 EUR;" in shown.stdout
    assert "no; the run takes 60.0 min, 2.50 EUR" in " ".join(shown.stdout.split())
    told = json.loads(invoke(job, "--price", "2.50 EUR/h", "--deadline", "1 h", "--device", "cpu", "--json").stdout)
    assert (told["cached"], told["cost"]["meets_deadline"]) == (True, True)
    assert Decimal(told["cost"]["run_cost"]) == Decimal("2.5")
    assert (told["cost"]["basis"], told["cost"]["limit"]) == ("measured", "memory")


def test_the_length_may_be_given_and_another_length_needs_no_new_plan(job: str) -> None:
    for arguments, steps, cached in (
        (("--steps", "10"), 10, False),
        (("--samples", "10"), 3, True),
        ((), 1000, True),
    ):
        told = json.loads(invoke(job, "--price", "1/h", "--json", *arguments).stdout)
        assert (told["cost"]["steps"], told["cached"]) == (steps, cached)


def test_a_job_without_a_length_needs_one_for_a_run_only(job: str) -> None:
    Path(job.rpartition(":")[0]).write_text(JOB.format(length="steps=None"))
    assert json.loads(invoke(job, "--steps", "10", "--price", "1/h", "--json").stdout)["cost"]["steps"] == 10
    again = invoke(job, "--price", "1/h", "--json")  # an earlier plan, of which the run's length is not kept
    assert json.loads(again.stdout)["cost"]["steps"] is None
    refused = invoke(job, "--price", "1/h", "--deadline", "1 h")
    assert refused.exit_code == 2
    assert "--deadline needs the length of the run" in refused.output


def test_a_plan_that_timed_nothing_has_no_cost(job: str, monkeypatch: pytest.MonkeyPatch) -> None:
    untimed = dataclasses.replace(PLAN, decided=False, ways=(dataclasses.replace(WAY, seconds=None),))
    monkeypatch.setattr("microbatch.cli.plan_command.plan", lambda job, **_: untimed)
    result = invoke(job, "--price", "1/h", "--deadline", "1 h", "--json")
    told = json.loads(result.stdout)["cost"]
    assert (result.exit_code, told["step_cost"], told["run_cost"], told["meets_deadline"]) == (1, None, None, None)


def test_without_a_question_nothing_is_said_of_cost(job: str, config: str) -> None:
    assert json.loads(invoke(job, "--json").stdout)["cost"] is None
    assert "cost" not in invoke(job, "--no-color").stdout
    assert "cost" not in elsewhere(config).stdout


def test_elsewhere_the_predicted_time_on_all_devices(config: str) -> None:
    flags = ("--ranks", "2", "--bandwidth", "1 GB/s", "--microbatch-seconds", "2 s", "--microbatch-size", "8")
    result = elsewhere(config, *flags, "--price", "3.60/h", "--steps", "100", "--json")
    told = json.loads(result.stdout)
    (way, *_) = told["communication"]["ways"]
    cost = told["cost"]
    assert cost["step_seconds"] == pytest.approx(4 * 2 + way["seconds"])
    assert float(cost["run_cost"]) == pytest.approx(100 * 2 * cost["step_seconds"] * 3.60 / 3600)
    assert (cost["devices"], cost["basis"], cost["limit"]) == (2, "predicted", "arithmetic")
    # A last microbatch of half the rows is half the arithmetic.
    ragged = elsewhere(config, *flags[:-1], "32", "--batch-size", "96", "--json", "--price", "1/h", "--steps", "1")
    assert json.loads(ragged.stdout)["cost"]["step_seconds"] == pytest.approx(1.5 * 2 + way["seconds"], rel=1e-3)


def test_what_limits_a_setup(config: str) -> None:
    slow = ("--ranks", "2", "--bandwidth", "1 MB/s", "--microbatch-seconds", "1 ms", "--price", "1/h", "--json")
    assert json.loads(elsewhere(config, *slow).stdout)["cost"]["limit"] == "network"
    small = elsewhere(config, "--price", "1/h", "--json", device="1 MiB")
    assert small.exit_code == 1
    told = json.loads(small.stdout)["cost"]
    assert (told["limit"], told["fits"], told["step_cost"]) == ("memory", False, None)


def test_several_devices_and_ranks_in_one_table(config: str) -> None:
    arguments = ("--ranks", "1,2", "--price", "h100=2.50 EUR/h, t4=0.01 EUR/h", "--steps", "100000")
    result = elsewhere(config, *arguments, "--json", device="h100,t4")
    rows = [json.loads(line)["cost"] for line in result.stdout.splitlines()]
    assert [each["where"] for each in rows] == ["1 x h100-80gb", "2 x h100-80gb", "1 x t4-16gb", "2 x t4-16gb"]
    best = min(rows, key=lambda each: Decimal(each["run_cost"]))
    assert [each["where"] for each in rows if each["cheapest"]] == [best["where"]]
    # Just below the time of the cheapest, another one is the cheapest that meets the deadline.
    deadline = f"{0.99 * best['run_seconds']:.6f} s"
    shown = elsewhere(config, *arguments, "--deadline", deadline, device="h100,t4")
    in_time = [each for each in rows if each["run_seconds"] <= 0.99 * best["run_seconds"]]
    assert in_time
    other = min(in_time, key=lambda each: Decimal(each["run_cost"]))
    (marked,) = (line for line in shown.stdout.splitlines() if line.startswith(">"))
    assert other["where"] in marked
    assert "cheapest within" in shown.stdout
    assert "predicted, nothing was run" in shown.stdout
    late = elsewhere(config, *arguments, "--deadline", "0.001 s", device="h100,t4")
    assert (late.exit_code, "none of these; the fastest is" in late.stdout) == (1, True)


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (("--price", "2,50/h"), "--price: '2,50/h' is not a price"),
        (("--price", "h100=2/h"), "--price has no price for t4-16gb"),
        (("--price", "2/h"), '--price has one price for 2 devices: write --price "h100-80gb=2.50/h,t4-16gb=2.50/h"'),
        (("--price", "h100=2/h,t4=1/h,l4=1/h"), "--price has a price for l4, and no --device has this name"),
        (("--price", "h100=2/h,t5=1/h"), "--price: 't5' is not one device"),
        (("--price", "h100=2/h,h100-80gb=3/h,t4=1/h"), "--price has two prices for h100-80gb"),
        (("--deadline", "6 h"), "--deadline finds the cheapest plan, so it needs the price"),
        (("--price", "h100=2/h,t4=1/h", "--deadline", "soon"), "--deadline: 'soon' is not a time"),
        (("--price", "h100=2/h,t4=1/h", "--deadline", "6 h"), "--deadline needs the length of the run: --steps"),
        (("--steps", "0"), "--steps is 0: it must be a whole number, at least 1"),
        (("--samples", "many"), '--samples is "many"'),
        (("--steps", "1", "--samples", "1"), "--steps and --samples are both the length of the run"),
        (("--microbatch-seconds", "1 s"), "--device names several"),
    ],
)
def test_a_wrong_flag_is_refused_in_its_own_words(config: str, arguments: tuple[str, ...], said: str) -> None:
    result = elsewhere(config, *arguments, device="h100,t4")
    assert result.exit_code == 2
    assert said in result.output


def test_here_one_device_has_one_price(job: str) -> None:
    result = invoke(job, "--price", "h100=2/h")
    assert result.exit_code == 2
    assert "--price names devices, and this plan is for the one here" in result.output
