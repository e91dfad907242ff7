"""A run that was stopped or killed and resumed has the losses of the run that was not, bit for bit."""

import json
import os
import random
import signal
import time
from pathlib import Path

import pytest
from tests.forked import Forked

JOB = f"{Path(__file__).with_name('small_job.py')}:small"
FLAGS = ["--no-compare", "--checkpoint-every", "1", "--validate-every", "7", "--json", "--device", "cpu"]


def start(run: Path, *flags: str, job: str = JOB) -> Forked:
    command = ["-m", "microbatch", "train", job, "--run", str(run), *FLAGS, *flags]
    # One thread: the sums of a matrix product depend on how many take part.
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    return Forked(command, env=environment)


def finish(process: Forked) -> tuple[int | None, str, str]:
    out, err = process.communicate(timeout=120)
    return process.returncode, out, err


def metrics(run: Path) -> list[dict[str, object]]:
    return [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]


def learned(run: Path) -> list[tuple[object, ...]]:
    """Return what a step computed, as exact numbers, without its times."""
    keys = ("step", "epoch", "loss", "lr", "grad_norm", "count", "samples", "validation")
    return [tuple(json.dumps(line.get(key)) for key in keys) for line in metrics(run)]


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory: pytest.TempPathFactory) -> Path:
    run = tmp_path_factory.mktemp("runs") / "whole"
    code, _, err = finish(start(run))
    assert code == 0, err
    assert [line["step"] for line in metrics(run)] == list(range(1, 41))
    return run


def wait_for(path: Path, lines: int, process: Forked) -> None:
    deadline = time.monotonic() + 60
    while process.poll() is None and time.monotonic() < deadline:
        if path.exists() and path.read_bytes().count(b"\n") >= lines:
            return
        time.sleep(0.001)


@pytest.mark.slow
def test_killed_at_random_moments(uninterrupted: Path, tmp_path: Path) -> None:
    """With a checkpoint after every step, most of the moments fall into the writing of one."""
    run = tmp_path / "killed"
    chance = random.Random(7)  # noqa: S311 -- moments, not secrets
    kills = 0
    for attempt in range(30):
        before = len(metrics(run)) if run.exists() else 0
        process = start(run, *(["--resume"] if attempt else []))
        if kills < 5:
            wait_for(run / "metrics.jsonl", before + chance.randint(1, 7), process)
            time.sleep(chance.uniform(0, 0.02))
            process.kill()
        code, _, err = finish(process)
        if code == 0:
            break
        assert code == -signal.SIGKILL, err
        kills += 1
    assert kills >= 3
    assert learned(run) == learned(uninterrupted)
    assert not list((run / "checkpoints").glob(".writing*"))
    assert len(list((run / "checkpoints").glob("step-*"))) == 3


@pytest.mark.slow
@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_stopped_politely(uninterrupted: Path, tmp_path: Path, number: signal.Signals, code: int) -> None:
    run = tmp_path / "stopped"
    process = start(run, "--checkpoint-every", "1000")
    wait_for(run / "metrics.jsonl", 5, process)
    process.send_signal(number)
    status, out, err = finish(process)
    assert status == code, err
    summary = json.loads(out.splitlines()[-1])
    assert (summary["event"], summary["finished"], summary["stopped_by"]) == ("summary", False, number.name)
    # Nothing but this stop can have written it, and it has every step that was taken.
    steps = len(metrics(run))
    assert (run / "checkpoints" / f"step-{steps:06d}").is_dir()
    assert 5 <= steps < 40
    assert finish(start(run, "--resume"))[0] == 0
    assert learned(run) == learned(uninterrupted)


SLOW_LOSS = """
import pathlib, time
from small_job import *  # noqa
import small_job, dataclasses, torch

def slow(*, device):
    def loss_fn(model, microbatch):
        with pathlib.Path(__file__).with_name("calls").open("a") as calls:
            calls.write("\\n")
        time.sleep(2)
        return small_job.loss_fn(model, microbatch)
    return dataclasses.replace(small_job.small(device=device), loss_fn=loss_fn, validation=None)
"""


@pytest.mark.slow
def test_a_second_ctrl_c_drops_the_window_and_writes_nothing(tmp_path: Path) -> None:
    (tmp_path / "slow_job.py").write_text(SLOW_LOSS)
    (tmp_path / "small_job.py").write_text(Path(__file__).with_name("small_job.py").read_text())
    run = tmp_path / "run"
    process = start(run, "--checkpoint-every", "1000", job=f"{tmp_path / 'slow_job.py'}:slow")
    wait_for(run / "metrics.jsonl", 1, process)
    # Into the next pass: before it, the first signal ends the run politely, and at once.
    calls = tmp_path / "calls"
    wait_for(calls, len(calls.read_bytes()) + 1, process)
    process.send_signal(signal.SIGINT)
    time.sleep(0.2)
    process.send_signal(signal.SIGINT)
    code, _, err = finish(process)
    assert code == 130, err
    assert "stopped at once" in err
    assert f"microbatch train --run {run} --resume" in err
    assert [path.name for path in (run / "checkpoints").iterdir()] == ["step-000000"]
    assert not (run / "summary.json").exists()


def test_a_damaged_checkpoint_is_named_and_the_losses_are_still_the_same(uninterrupted: Path, tmp_path: Path) -> None:
    run = tmp_path / "damaged"
    finish(start(run, "--steps", "40"))
    weights = run / "checkpoints" / "step-000040" / "weights.safetensors"
    weights.write_bytes(weights.read_bytes()[:-7])
    code, out, err = finish(start(run, "--resume"))
    assert code == 0, err
    notices = [event["text"] for line in out.splitlines() if (event := json.loads(line))["event"] == "notice"]
    assert any("step-000040 is damaged: weights.safetensors has" in text for text in notices)
    assert any("going on from step-000039" in text for text in notices)
    assert learned(run) == learned(uninterrupted)


def test_another_seed_is_another_run(uninterrupted: Path, tmp_path: Path) -> None:
    """The control: the comparison of losses is not blind."""
    run = tmp_path / "seeded"
    assert finish(start(run, "--seed", "1", "--steps", "3"))[0] == 0
    assert [line[2] for line in learned(run)] != [line[2] for line in learned(uninterrupted)][:3]


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--seed", "4"], "started with seed 0"),
        (["--batch-size", "4"], "started with batch_size 8"),
    ],
)
def test_a_resumed_run_keeps_what_makes_it_that_run(uninterrupted: Path, flags: list[str], message: str) -> None:
    code, _, err = finish(start(uninterrupted, "--resume", *flags))
    assert code == 2
    assert message in err
