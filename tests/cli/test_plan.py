"""The command line plans a job: a table, JSON, a figure, and a cache that a changed job is not answered from."""

import dataclasses
import json
import xml.etree.ElementTree as ET
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from typer.testing import CliRunner

import microbatch as mb
from microbatch.cli.main import app
from microbatch.planning.figure import svg
from microbatch.planning.plan import Candidate, Plan, Way

pytestmark = pytest.mark.filterwarnings("ignore::UserWarning:torch.*")

JOB = """
import torch
import microbatch as mb

def job(batch_size=16):
    model = torch.nn.Sequential(torch.nn.Linear(8, {width}), torch.nn.Tanh(), torch.nn.Linear({width}, 1))
    return mb.Job(model=model, optimizer=torch.optim.SGD(model.parameters(), lr=0.1), data=list(torch.ones(32, 8)),
                  loss_fn=lambda model, x: model(x).square().mean(), batch_size=batch_size, steps=30)
"""


@pytest.fixture
def job(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    file = tmp_path / "small.py"
    file.write_text(JOB.format(width=32))
    return f"{file}:job"


def invoke(*arguments: str) -> Any:
    return CliRunner().invoke(app, list(arguments))


def kept(size: int, **changed: Any) -> Way:
    seconds = {1: 2.0, 2: 1.0, 4: 1.5}
    way = Way(
        name="kept",
        microbatch_size=size,
        microbatches=4 // size,
        blocks=(),
        predicted_bytes=101 * size,
        measured_bytes=100 * size,
        seconds=seconds[size],
    )
    return dataclasses.replace(way, **changed)


def made(microbatch_size: int, *, decided: bool = True) -> Plan:
    seconds = {1: 2.0, 2: 1.0, 4: 1.5}
    return Plan(
        batch_size=4,
        microbatch_size=microbatch_size,
        decided=decided,
        why="fastest of 3 sizes",
        budget=1000,
        candidates=tuple(
            Candidate(
                microbatch_size=size,
                microbatches=4 // size,
                predicted_bytes=120 * size,
                counted_bytes=101 * size,
                measured_bytes=100 * size,
                fits=True,
                seconds=seconds[size],
            )
            for size in seconds
        ),
        words=("a word",),
        rests_on="nothing",
        ways=(kept(microbatch_size),),
        way="kept",
    )


def test_a_plan_reads_back_as_it_was() -> None:
    plan = made(2)
    assert Plan.from_dict(plan.as_dict()) == plan
    assert (plan.microbatches, plan.peak_bytes, plan.seconds) == (2, 200, 1.0)


def test_the_table_and_the_chart_mark_the_chosen_size() -> None:
    plan = made(2)
    marked = [line.split() for line in plan.table().splitlines() if line.startswith(">")]
    assert marked == [[">", "2", "2", "240", "B", "202", "B", "200", "B", "+1.0%", "yes", "1.00", "s", "4"]]
    bars = {line.split()[0]: line.count("█") for line in plan.chart().splitlines()}
    assert bars == {"1": 12, "2": 24, "4": 16}


def test_the_figure_has_a_bar_for_every_size() -> None:
    space = "{http://www.w3.org/2000/svg}"
    root = ET.fromstring(svg(made(2)))  # noqa: S314 - we have just written it
    bars = [each for each in root.iter(f"{space}rect") if each.get("fill") != "white"]
    assert len(bars) == 6
    heights = [float(each.get("height", 0)) for each in bars[:3]]
    assert heights[1] == pytest.approx(2 * heights[0], abs=0.1)


def test_json_is_kept_and_a_changed_job_is_planned_again(job: str, monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[Any] = []

    def planned(job: Any, **_: Any) -> Plan:
        calls.append(job.batch_size)
        return made(2)

    monkeypatch.setattr("microbatch.cli.plan_command.plan", planned)
    first, second = invoke("plan", job, "--json"), invoke("plan", job, "--json")
    assert (first.exit_code, second.exit_code) == (0, 0)
    told, again = json.loads(first.stdout), json.loads(second.stdout)
    assert (told["microbatch_size"], told["cached"], again["cached"]) == (2, False, True)
    invoke("plan", job, "--batch-size", "8", "--json")
    invoke("plan", job, "--no-cache")
    Path(job.rpartition(":")[0]).write_text(JOB.format(width=33))
    invoke("plan", job)
    assert calls == [16, 8, 16, 16]


def test_a_plan_for_real(job: str, tmp_path: Path) -> None:
    figure = tmp_path / "plan.svg"
    result = invoke("plan", job, "--memory", "1 GiB", "--plot", str(figure), "--no-color")
    assert result.exit_code == 0, result.output
    assert "predicted" in result.stdout
    assert "of the budget of 1.00 GiB" in result.stdout
    assert figure.read_text().startswith("<svg")


def test_what_cannot_be_planned_is_said(job: str) -> None:
    assert invoke("plan", "nothing").exit_code == 2
    result = invoke("plan", job, "--plot", "plan.png")
    assert result.exit_code == 2


def test_training_finds_its_size_in_its_first_steps(job: str, tmp_path: Path) -> None:
    result = invoke("train", job, "--microbatch-size", "auto", "--json", "--no-compare", "--run", str(tmp_path / "run"))
    assert result.exit_code == 0, result.output
    events = [json.loads(line) for line in result.stdout.splitlines()]
    (plan,) = (event for event in events if event["event"] == "plan chosen")
    sizes = [event["microbatch_size"] for event in events if event["event"] == "step"]
    assert sizes[-1] == plan["microbatch_size"]
    assert 'microbatch_size = "auto"' in (tmp_path / "run" / "config.toml").read_text()


def test_the_error_compares_like_with_like() -> None:
    """A convolution allocates inside itself, which no meter sees."""
    model = nn.Sequential(nn.Conv2d(3, 16, 3, padding=1), nn.ReLU(), nn.Conv2d(16, 24, 3, stride=2), nn.ReLU())
    plan = mb.plan(
        model,
        optimizer=torch.optim.AdamW(model.parameters()),
        loss_fn=lambda model, x: model(x).square().mean(),
        batch=torch.randn(16, 3, 24, 24),
    )
    # The batch whole has no second microbatch, with which a prediction counts.
    ran = [each for each in plan.candidates if each.measured_bytes is not None and each.microbatches > 1]
    assert ran
    for each in ran:
        assert each.error == pytest.approx(0, abs=0.005)
        assert each.predicted_bytes is not None
        assert each.counted_bytes is not None
        assert each.predicted_bytes > 1.02 * each.counted_bytes
    assert "tensors alone" in plan.rests_on


def test_a_plan_changes_nothing() -> None:
    model = nn.Sequential(nn.Linear(8, 4), nn.BatchNorm1d(4), nn.Dropout(0.5), nn.Linear(4, 1))
    optimizer = torch.optim.AdamW(model.parameters())
    before = {name: value.clone() for name, value in model.state_dict().items()}
    random = torch.get_rng_state()
    plan = mb.plan(
        model,
        optimizer=optimizer,
        loss_fn=lambda model, x: model(x).square().mean(),
        batch=torch.randn(8, 8),
        memory_budget="1 GiB",
        from_batch_size=4,
    )
    random_after_the_batch = torch.get_rng_state()
    torch.set_rng_state(random)
    torch.randn(8, 8)
    assert torch.equal(torch.get_rng_state(), random_after_the_batch)
    assert not optimizer.state
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert plan.scaling is not None
    assert {each.microbatch_size for each in plan.candidates} == {1, 2, 4, 8}
    assert plan.chosen.measured_bytes is not None or not plan.decided  # where noise ended the search early
    with pytest.raises(mb.MicrobatchError, match=r"pass an mb\.Job"):
        mb.plan(model)


def test_a_plan_is_for_one_device_and_one_version(job: str, monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[int] = []

    def planned(job: Any, **_: Any) -> Plan:
        calls.append(job.batch_size)
        return made(2, decided=len(calls) > 1)

    monkeypatch.setattr("microbatch.cli.plan_command.plan", planned)
    invoke("plan", job)  # which a busy machine prevented, so that it is not kept
    for _ in range(2):
        invoke("plan", job)
    assert len(calls) == 2
    changes = [
        ("torch.__version__", "2.99.0"),
        ("platform.node", lambda: "elsewhere"),
        ("torch.get_num_threads", lambda: 99),
        ("importlib.metadata.version", lambda name: "9.9"),
        ("platform.python_version", lambda: "3.99"),
    ]
    for count, (name, value) in enumerate(changes, start=3):
        with monkeypatch.context() as patch:
            patch.setattr(name, value)
            for _ in range(2):
                invoke("plan", job)
            assert len(calls) == count, name
    invoke("plan", job)
    assert len(calls) == 2 + len(changes)


def test_a_kept_plan_of_another_form_is_made_again(job: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("microbatch.cli.plan_command.plan", lambda job, **_: made(2))
    invoke("plan", job)
    (file,) = tmp_path.rglob("plans/*.json")
    for text in ("{}", "not json", '{"batch_size": 4}'):
        file.write_text(text)
        assert json.loads(invoke("plan", job, "--json").stdout)["cached"] is False


def test_the_ways_are_shown_where_there_are_several(job: str, monkeypatch: pytest.MonkeyPatch) -> None:
    again = kept(4, name="checkpointed", blocks=("0", "1"), seconds=0.5)
    plan = dataclasses.replace(made(2), ways=(kept(2), again), way="checkpointed", microbatch_size=4)
    assert (plan.checkpoint, plan.offload, plan.microbatches, plan.seconds) == (("0", "1"), None, 1, 0.5)
    assert Plan.from_dict(plan.as_dict()) == plan
    monkeypatch.setattr("microbatch.cli.plan_command.plan", lambda job, **_: plan)
    shown = invoke("plan", job, "--no-cache", "--no-color").stdout
    (line,) = (line for line in shown.splitlines() if "checkpointed, 2 blocks" in line)
    assert line.split() == [">", "checkpointed,", "2", "blocks", "4", "404", "B", "400", "B", "500", "ms", "8"]
    told = json.loads(invoke("plan", job, "--no-cache", "--json").stdout)
    assert told["checkpoint"] == ["0", "1"]
    assert [each["name"] for each in told["ways"]] == ["kept", "checkpointed"]
