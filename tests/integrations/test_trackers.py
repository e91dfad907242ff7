"""Trackers: what arrives there is what the run measured; one that is missing or fails says so once."""

import importlib
import json
import os
import subprocess
import sys
import types
from collections.abc import Iterator
from importlib.machinery import ModuleSpec
from pathlib import Path
from typing import Any

import pytest
import torch

import microbatch as mb
from microbatch.integrations import trackers
from microbatch.train.start import prepare

JOB = """
import torch
from microbatch.train.job import Job

def job():
    model = torch.nn.Linear(3, 1)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    data = list(torch.randn(10, 3))
    return Job(model=model, optimizer=optimizer, loss_fn=lambda model, x: model(x).square().mean(), data=data,
               validation=data, batch_size=4, microbatch_size=3, steps=4)
"""

TRACKIO = """
calls = []

class Run:
    id = "a run"

    def log(self, numbers, step=None):
        if numbers.get("fails"):
            raise OSError("disk full")
        calls.append(("log", numbers, step))

    def finish(self):
        calls.append(("finish",))

def init(**arguments):
    calls.append(("init", arguments))
    return Run()
"""


@pytest.fixture
def job(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "job.py").write_text(JOB)
    return tmp_path


@pytest.fixture
def trackio(monkeypatch: pytest.MonkeyPatch) -> Any:
    """A stand-in that records its calls."""
    module: Any = types.ModuleType("trackio")
    module.__spec__ = ModuleSpec("trackio", None)
    exec(TRACKIO, module.__dict__)  # noqa: S102
    monkeypatch.setitem(sys.modules, "trackio", module)
    return module


def run(tracker: str, *, resume: bool = False, listeners: Any = (), **flags: Any) -> list[dict[str, Any]]:
    """Train, and return the lines of metrics."""
    directory = Path("out")
    given = {} if resume else {"job": "job.py:job"}
    flags = {**given, "tracker": tracker, "compare": False, "device": "cpu", **flags}
    prepare(flags, run=directory, resume=resume, listeners=listeners).train()
    return [json.loads(line) for line in (directory / "metrics.jsonl").read_text().splitlines()]


def accumulator(*listeners: Any) -> mb.Accumulator:
    model = torch.nn.Linear(3, 1)
    return mb.Accumulator(model, torch.optim.SGD(model.parameters(), lr=0.1), microbatch_size=2, listeners=listeners)


def loss_fn(model: Any, x: torch.Tensor) -> torch.Tensor:
    return model(x).square().mean()


def scalars(folder: Path, name: str) -> list[tuple[int, float]]:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(folder)).Reload()
    return [(each.step, each.value) for each in events.Scalars(name)]


def test_trackio_gets_every_step(job: Path, trackio: Any) -> None:
    metrics = run("trackio")
    (begin, *steps, end) = trackio.calls
    assert begin[1]["project"] == "microbatch"
    assert begin[1]["config"]["batch_size"] == 4
    assert [step for _, _, step in steps] == [1, 2, 3, 4]
    assert [each["loss"] for _, each, _ in steps] == [line["loss"] for line in metrics]
    assert steps[-1][1]["validation/loss"] == metrics[-1]["validation"]["loss"]
    assert "step" not in steps[0][1]
    assert end == ("finish",)


def test_a_resumed_run_continues_at_its_tracker(job: Path, trackio: Any) -> None:
    run("trackio", steps=2, checkpoint_every=2)
    trackio.calls.clear()
    (job / "out" / "tracker.json").write_text("damaged")
    run("trackio", resume=True, steps=4)
    assert [call[0] for call in trackio.calls] == ["init", "log", "log", "finish"]
    assert trackio.calls[0][1]["resume"] == "allow"
    assert trackio.calls[0][1]["name"] == "out"
    assert [call[2] for call in trackio.calls[1:3]] == [3, 4]


def test_a_tracker_that_fails_is_left_out_and_said_once(job: Path, trackio: Any) -> None:
    def log(self: Any, numbers: Any, step: int) -> None:
        trackio.calls.append(step)
        if step == 2:
            raise OSError("no network")

    trackio.Run.log = log
    told: list[Any] = []
    metrics = run("trackio", listeners=[told.append])
    assert len(metrics) == 4
    assert trackio.calls[1:] == [1, 2]
    notices = [each.text for each in told if type(each).__name__ == "Notice" and "tracker" in each.text]
    assert len(notices) == 1
    assert "failed at step 2" in notices[0]
    assert "OSError: no network" in notices[0]


def test_a_tracker_that_is_not_installed_is_refused_before_training(job: Path) -> None:
    with pytest.raises(mb.errors.MissingDependencyError, match="pip install trackio"):
        run("trackio")
    assert not (job / "out" / "metrics.jsonl").exists()
    with pytest.raises(mb.errors.MissingDependencyError, match="pip install trackio"):
        trackers.Trackio(project="x")


def test_a_tracker_that_cannot_start_is_refused_before_training(job: Path, trackio: Any) -> None:
    def refuses(**arguments: Any) -> None:
        raise RuntimeError("no key")

    trackio.init = refuses
    with pytest.raises(mb.errors.ConfigError, match="no key"):
        run("trackio")
    assert not (job / "out" / "metrics.jsonl").exists()


def test_in_a_loop_of_ones_own(trackio: Any) -> None:
    tracker = trackers.Trackio(project="own")
    step = accumulator(tracker).step(torch.ones(5, 3), loss_fn)
    tracker.finish()
    assert [call[0] for call in trackio.calls] == ["init", "log", "finish"]
    _, numbers, index = trackio.calls[1]
    assert (numbers["loss"], numbers["samples"], index) == (step.loss.item(), 5, 1)
    assert "sync" not in numbers  # None


def test_a_failure_in_a_loop_of_ones_own_is_a_warning(trackio: Any) -> None:
    tracker = trackers.Trackio(project="own")
    with pytest.warns(mb.MicrobatchWarning, match="the tracker Trackio failed at step 3.*disk full"):
        tracker.send({"fails": 1}, step=3)
    tracker.send({"loss": 1.0}, step=4)
    assert [call[0] for call in trackio.calls] == ["init"]


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
@pytest.mark.filterwarnings("ignore::FutureWarning")
def test_mlflow_has_the_history_of_a_run_and_of_its_continuation(job: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    mlflow: Any = pytest.importorskip("mlflow")
    mlflow.set_tracking_uri((job / "mlflow").as_uri())
    monkeypatch.setenv("MLFLOW_ALLOW_FILE_STORE", "true")
    run("mlflow", steps=2, checkpoint_every=2)
    metrics = run("mlflow", resume=True, steps=4)
    client = mlflow.MlflowClient()
    (found,) = client.search_runs(["0"])
    history = client.get_metric_history(found.info.run_id, "loss")
    assert [(each.step, each.value) for each in history] == [(line["step"], line["loss"]) for line in metrics]
    assert found.data.params["batch_size"] == "4"
    assert found.info.status == "FINISHED"


def history(data: bytes) -> Iterator[dict[str, Any]]:
    """Yield the lines that an offline run has written: a log as of LevelDB, with a message in each record."""
    pb: Any = importlib.import_module("wandb.proto.wandb_internal_pb2")
    at, message = 7, b""
    while at < len(data):
        rest = 32768 - at % 32768
        if rest < 7:
            at += rest
            continue
        size, kind = int.from_bytes(data[at + 4 : at + 6], "little"), data[at + 6]
        message += data[at + 7 : at + 7 + size]
        at += 7 + size
        if kind in {1, 4}:  # full, or the last part
            record, message = pb.Record.FromString(message), b""
            if record.WhichOneof("record_type") == "history":
                yield {
                    each.key or "/".join(each.nested_key): json.loads(each.value_json) for each in record.history.item
                }


def test_wandb_offline(job: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("wandb")
    script = (
        "from pathlib import Path; from microbatch.train.start import prepare; "
        "flags = dict(job='job.py:job', tracker='wandb', compare=False, device='cpu'); "
        "prepare(flags, run=Path('out')).train()"
    )
    quiet = {"WANDB_MODE": "offline", "WANDB_SILENT": "true", "WANDB_DISABLE_GIT": "true", "WANDB_CONSOLE": "off"}
    subprocess.run([sys.executable, "-c", script], env={**os.environ, **quiet}, check=True, timeout=100)
    (written,) = (job / "out" / "wandb").glob("offline-run-*/*.wandb")
    found = list(history(written.read_bytes()))
    metrics = [json.loads(line) for line in (job / "out" / "metrics.jsonl").read_text().splitlines()]
    assert [(each["_step"], each["loss"]) for each in found] == [(line["step"], line["loss"]) for line in metrics]


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_tensorboard_from_a_run_and_from_a_loop_of_ones_own(job: Path) -> None:
    pytest.importorskip("tensorboard")
    metrics = run("tensorboard")
    found = scalars(job / "out", "loss")
    assert found == [(line["step"], pytest.approx(line["loss"])) for line in metrics]
    tracker = trackers.TensorBoard(job / "own")
    step = accumulator(tracker).step(torch.ones(5, 3), loss_fn)
    assert scalars(job / "own", "loss") == [(1, pytest.approx(step.loss.item()))]  # written before the end
    tracker.finish()


def test_the_command_line_has_it(job: Path) -> None:
    result = subprocess.run(
        [sys.executable, "-m", "microbatch", "train", "job.py:job", "--tracker", "trackio"],
        capture_output=True,
        text=True,
        check=False,
        timeout=100,
    )
    assert result.returncode == 2
    assert "pip install trackio" in result.stderr
