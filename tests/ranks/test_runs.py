"""A run is the same on any number of ranks, goes on with another number of them, and outlives their deaths."""

import io
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Generator, Iterator
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from rich.console import Console
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import Shard, distribute_tensor

from microbatch.cli.progress import Screen
from microbatch.cli.run_views import step_line, summary_view
from microbatch.errors import CheckpointError
from microbatch.memory.budget import format_bytes
from microbatch.ranks.process_group import RankGroup
from microbatch.step.events import SyncChosen
from microbatch.train.checkpoint import read_newest, store
from microbatch.train.checkpoint_copy import copied
from microbatch.train.heartbeat import read_beat
from microbatch.train.launch import Launch
from microbatch.train.run_events import RunEvent
from microbatch.train.start import prepare
from microbatch.train.state import load_model, load_optimizer

CPU = torch.device("cpu")
JOB = Path(__file__).with_name("ranked_job.py")
FLAGS = {"device": "cpu", "compare": False, "checkpoint_every": 4, "validate_every": 6, "schedule": "constant"}


def run(folder: Path, job: str, *, launch: Launch | None = None, resume: bool = False, **flags: Any) -> list[RunEvent]:
    """Run a job, and return what it has told."""
    flags = {**FLAGS, **flags} | ({} if resume else {"job": f"{JOB}:{job}"})
    told: list[RunEvent] = []
    prepare(flags, run=folder, resume=resume, launch=launch, listeners=[told.append]).train()
    return told


def weights(folder: Path) -> dict[str, Tensor]:
    return read_newest(folder / "checkpoints", notice=pytest.fail).weights


def lines(folder: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def events_of(folder: Path, rank: int) -> list[dict[str, Any]]:
    log = (folder / "logs" / f"rank-{rank}.log").read_text().splitlines()
    return [json.loads(line) for line in log if line.startswith("{")]


def curve(folder: Path) -> Tensor:
    return torch.tensor([[line["loss"], line["grad_norm"]] for line in lines(folder)], dtype=torch.float64)


def assert_close(a: Path, b: Path, *, tolerance: float) -> None:
    assert (curve(a) - curve(b)).abs().max() <= tolerance
    one, other = weights(a), weights(b)
    assert max(float((one[name] - other[name]).abs().max()) for name in one) <= tolerance
    last, last_of_other = (lines(each)[-1] for each in (a, b))
    assert abs(last["validation"]["loss"] - last_of_other["validation"]["loss"]) <= tolerance
    assert [(line["count"], line["samples"], line["epoch"]) for line in lines(a)] == [
        (line["count"], line["samples"], line["epoch"]) for line in lines(b)
    ]


# -- on the ranks, each in a process of its own; the folder is told by the environment -------------------------------


def chosen(told: list[RunEvent]) -> list[tuple[int, str]]:
    return [(event.step, event.sync) for event in told if isinstance(event, SyncChosen)]


def shown(told: list[RunEvent]) -> str:
    """Return what people see of it."""
    text = io.StringIO()
    screen = Screen(Console(file=text, width=200))
    for event in told:
        screen(event)
    return text.getvalue()


def begin(rank: int, ranks: int) -> dict[str, Any]:
    """Whole runs, one after the other, and the first part of one that goes on elsewhere."""
    folder, launch = Path(os.environ["RUNS"]), Launch(rank=rank, ranks=ranks)
    run(folder / f"plain-{ranks}", "plain", launch=launch)
    run(folder / f"by-row-{ranks}", "by_row", launch=launch, steps=5)
    run(folder / f"deterministic-{ranks}", "dropping", launch=launch, deterministic=True)
    run(folder / f"first-{ranks}", "plain", launch=launch, steps=6, async_checkpoints=True)
    run(folder / "stopped", "plain" if rank != 2 else "stopping", launch=launch)
    run(folder / "own-4", "own_shards", launch=launch, sync="lean")
    run(folder / "pairs-4", "pairs", launch=launch, shard="zero3")
    told = run(folder / "zero3-first", "blocks", launch=launch, shard="zero3", steps=6, async_checkpoints=True)
    model, optimizer = spread(seed=0)
    model.weight.to_local().sum().backward()
    optimizer.step()
    what = copied(step=1, weights=dict(model.state_dict()), state={"optimizer": optimizer.state_dict()})
    store(folder / "parts", what, keep=1, ranks=RankGroup.find(CPU))
    whole = model.weight.full_tensor(), optimizer.state[model.weight]["exp_avg"].full_tensor()
    if rank == 0:
        torch.save(whole, folder / "whole.pt")
    return {"sync": chosen(told), "screen": shown(told)}


def spread(*, seed: int) -> tuple[Any, torch.optim.Optimizer]:
    """A layer of ten rows that are spread over the ranks, as `fully_shard` would."""
    torch.manual_seed(seed)
    model: Any = nn.Linear(3, 10, bias=False)
    mesh = init_device_mesh("cpu", (torch.distributed.get_world_size(),))
    model.weight = nn.Parameter(distribute_tensor(model.weight.detach(), mesh, [Shard(0)]))
    return model, torch.optim.Adam(model.parameters(), lr=0.1)


def go_on(rank: int, ranks: int) -> dict[str, Any]:
    """The other part of runs that began with another number of ranks."""
    folder, launch = Path(os.environ["RUNS"]), Launch(rank=rank, ranks=ranks)
    run(folder / f"deterministic-{ranks}", "dropping", launch=launch, deterministic=True)
    for name in ("1-to-3", "4-to-3"):
        run(folder / name, "plain", launch=launch, resume=True, steps=12)
    run(folder / "deterministic-1-to-3", "dropping", launch=launch, resume=True, steps=12)
    told = run(folder / "zero3-4-to-3", "blocks", launch=launch, resume=True, steps=12)
    run(folder / "whole-to-zero2", "blocks", launch=launch, resume=True, steps=12, shard="zero2")
    read = read_newest(folder / "parts", notice=pytest.fail, ranks=RankGroup.find(CPU))
    model, optimizer = spread(seed=1)
    load_model(model, read.weights, {})
    load_optimizer(optimizer, read.state["optimizer"])
    return {
        "weight": model.weight.full_tensor(),
        "moment": optimizer.state[model.weight]["exp_avg"].full_tensor(),
        "own": model.weight.to_local().shape[0],
        "sync": chosen(told),
    }


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory, run_ranks: Callable[..., list[Any]]) -> Iterator[Path]:
    folder = tmp_path_factory.mktemp("runs")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("RUNS", str(folder))
        run(folder / "plain-1", "plain")
        run(folder / "by-row-1", "by_row", steps=5)
        run(folder / "blocks-1", "blocks")
        run(folder / "pairs-1", "pairs")
        run(folder / "whole-to-zero2", "blocks", steps=6)
        run(folder / "deterministic-1", "dropping", deterministic=True)
        run(folder / "first-1", "plain", steps=6)
        run(folder / "deterministic-1-to-3", "dropping", deterministic=True, steps=6)
        began = run_ranks(begin, 4, folder / "four")
        shutil.copytree(folder / "first-1", folder / "1-to-3")
        shutil.copytree(folder / "first-4", folder / "4-to-3")
        shutil.copytree(folder / "first-4", folder / "4-to-1")
        for name in ("zero3-4-to-3", "zero3-4-to-1"):
            shutil.copytree(folder / "zero3-first", folder / name)
        spread_again = run_ranks(go_on, 3, folder / "three")
        run(folder / "4-to-1", "plain", resume=True, steps=12)
        run(folder / "zero3-4-to-1", "blocks", resume=True, steps=12)
        torch.save(spread_again, folder / "spread.pt")
        torch.save(began, folder / "began.pt")
        yield folder


def test_the_same_batches_losses_and_weights(runs: Path) -> None:
    """Batches of 7 and of 1 over four ranks: uneven shares, and empty ones."""
    assert_close(runs / "plain-1", runs / "plain-4", tolerance=1e-12)


def test_what_left_a_rank_is_in_the_metrics_and_on_screen(runs: Path) -> None:
    said, summary = lines(runs / "plain-4"), json.loads((runs / "plain-4" / "summary.json").read_text())
    # The eleventh step measures the noise scale, with one small all-reduce more.
    (sent,) = {(line["comm_bytes"], line["comm_calls"]) for line in said[1:] if line["step"] != 11}
    assert [line["comm_calls"] for line in said if line["step"] == 11] == [3]
    assert sent[0] > 0
    assert sent[1] == 2  # the agreement, and the only bucket
    assert summary["communication"] == {"bytes": sent[0], "calls": sent[1]}
    shown = Console(width=200, record=True, file=io.StringIO())
    shown.print(step_line(said[-1], config=SimpleNamespace(steps=9, unit="rows"), rate=1.0))  # pyright: ignore[reportArgumentType] - the rest is not read
    shown.print(summary_view(summary))
    assert f"sent {format_bytes(sent[0])}" in (text := shown.export_text())
    assert f"{format_bytes(sent[0])} from each rank in 2 calls a step" in text
    assert "comm_bytes" not in lines(runs / "plain-1")[0]


def test_masks_by_row_are_the_same_on_any_number_of_ranks(runs: Path) -> None:
    assert_close(runs / "by-row-1", runs / "by-row-4", tolerance=1e-12)


@pytest.mark.parametrize("name", ["1-to-3", "4-to-3", "4-to-1"])
def test_a_checkpoint_goes_on_with_another_number_of_ranks(runs: Path, name: str) -> None:
    assert_close(runs / "plain-1", runs / name, tolerance=1e-12)


@pytest.mark.parametrize("name", ["own-4", "zero3-4-to-3", "zero3-4-to-1", "whole-to-zero2"])
def test_fully_sharded_runs_are_the_same_and_go_on_sharded_or_whole(runs: Path, name: str) -> None:
    assert_close(runs / "blocks-1", runs / name, tolerance=1e-12)


def test_a_fully_sharded_run_whose_loss_couples_samples(runs: Path) -> None:
    assert_close(runs / "pairs-1", runs / "pairs-4", tolerance=1e-12)


def test_a_sharded_run_says_how_it_meets(runs: Path) -> None:
    assert {line["sync"] for line in lines(runs / "own-4")} == {"lean"}
    began = torch.load(runs / "began.pt", weights_only=True)
    assert [each["sync"] for each in began] == [[(0, "lean"), (1, "fast")]] * 4
    screen = began[0]["screen"]
    assert "over all ranks (ZeRO-3); lean or fast, as memory allows" in screen
    assert "from step 1 on lean: gradients meet after every microbatch, in shards, because the first window" in screen
    assert "from step 2 on fast: gradients meet once a step, whole until then, because unsharded gradients" in screen
    assert "sync fast" in screen
    assert [each["sync"] for each in torch.load(runs / "spread.pt", weights_only=True)] == [[(6, "fast")]] * 3
    assert [line.get("sync") for line in lines(runs / "zero3-4-to-3")] == ["lean", *["fast"] * 11]
    assert "sync" not in lines(runs / "zero3-4-to-1")[-1]


def test_a_checkpoint_of_several_ranks_is_that_of_one(runs: Path) -> None:
    """One format: the same files by the same names, and weights that any reader of safetensors reads."""
    one, four = (max((runs / name / "checkpoints").iterdir()) for name in ("plain-1", "plain-4"))
    assert [file.name for file in sorted(one.iterdir())] == [file.name for file in sorted(four.iterdir())]
    assert json.loads((four / "manifest.json").read_text())["format"] == 1


@pytest.mark.parametrize("name", ["deterministic-3", "deterministic-4", "deterministic-1-to-3"])
def test_deterministic_runs_have_the_same_bits_with_dropout(runs: Path, name: str) -> None:
    assert torch.equal(curve(runs / "deterministic-1"), curve(runs / name))
    one, other = weights(runs / "deterministic-1"), weights(runs / name)
    assert all(torch.equal(one[key], other[key]) for key in one)
    assert [line.get("validation") for line in lines(runs / "deterministic-1")] == [
        line.get("validation") for line in lines(runs / name)
    ]


def test_one_rank_is_asked_to_stop_and_all_stop_at_the_same_step(runs: Path) -> None:
    folder = runs / "stopped"
    summary = json.loads((folder / "summary.json").read_text())
    assert (summary["finished"], summary["stopped_by"], summary["step"]) == (False, "SIGTERM", 3)
    assert [path.name for path in sorted((folder / "checkpoints").iterdir())] == ["step-000000", "step-000003"]
    assert len(lines(folder)) == 3


def test_what_is_spread_over_ranks_is_written_in_parts_and_spread_again(runs: Path) -> None:
    weight, moment = torch.load(runs / "whole.pt", weights_only=True)
    files = {file.name for file in (runs / "parts" / "step-000001").glob("*.safetensors")}
    assert files == {f"{stem}{part}.safetensors" for stem in ("weights", "state") for part in ("", "-1", "-2", "-3")}
    whole = read_newest(runs / "parts", notice=pytest.fail)
    assert torch.equal(whole.weights["weight"], weight)
    again = torch.load(runs / "spread.pt", weights_only=True)
    assert [each["own"] for each in again] == [4, 4, 2]
    for each in again:
        assert torch.equal(each["weight"], weight)
        assert torch.equal(each["moment"], moment)


def test_a_missing_part_is_noticed(runs: Path, tmp_path: Path) -> None:
    path = tmp_path / "step-000001"
    shutil.copytree(runs / "parts" / path.name, path)
    (path / "weights-2.safetensors").unlink()
    with pytest.raises(CheckpointError, match=r"weights-2\.safetensors is missing"):
        read_newest(tmp_path, notice=pytest.fail)


def test_nobody_leaves_half_a_checkpoint(runs: Path) -> None:
    assert not list(runs.glob("*/checkpoints/.writing*"))
    assert len(list((runs / "first-4" / "checkpoints").iterdir())) == 3


# -- under torchrun ------------------------------------------------------------------------------------------------


@contextmanager
def torchrun(ranks: int, folder: Path, *flags: str, launcher: tuple[str, ...] = ()) -> Generator[subprocess.Popen[str]]:
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={ranks}", *launcher]
    command += ["--monitor-interval=0.05", "-m", "microbatch", "train", f"{JOB}:slow", f"--run-dir={folder}"]
    command += ["--device=cpu", "--checkpoint-every=3", "--no-compare", "--json", *flags]
    process = subprocess.Popen(
        command,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        start_new_session=True,
    )
    try:
        yield process
    finally:
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)
        process.communicate()


def process_of(folder: Path, rank: int, *, step: int) -> int:
    """Wait until a rank is at a step, and return its process."""
    deadline = time.monotonic() + 60
    while time.monotonic() < deadline:
        beat = read_beat(folder / "logs", rank)
        if beat is not None and beat.step >= step:
            return beat.process
        time.sleep(0.005)
    raise AssertionError(f"rank {rank} never came to step {step}")


def test_a_rank_is_killed_and_the_run_comes_to_the_same_end(tmp_path: Path) -> None:
    killed, calm = tmp_path / "killed", tmp_path / "calm"
    with torchrun(2, killed, launcher=("--max-restarts=2",)) as process:
        os.kill(process_of(killed, 1, step=8), signal.SIGKILL)
        out, err = process.communicate(timeout=120)
    assert process.returncode == 0, err
    run(calm, "plain", steps=20, schedule="cosine", checkpoint_every=3, validate_every=2)
    assert_close(calm, killed, tolerance=1e-12)
    events = [json.loads(line) for line in out.splitlines()]
    assert [event["step"] for event in events if event["event"] == "plan"] == [0, 6]
    # The first rank alone speaks, and every one has its log, of both launches.
    assert [event["event"] for event in events].count("summary") == 1
    for rank in (0, 1):
        log = events_of(killed, rank)
        assert [event["restarts"] for event in log if event["event"] == "launch"] == [0, 1], err
    assert "rank 1 has died" in (killed / "logs" / "rank-0.log").read_text()


def test_a_rank_that_hangs_is_named_with_its_step(tmp_path: Path) -> None:
    run_folder = tmp_path / "run"
    with torchrun(2, run_folder, "--rank-timeout=2") as process:
        stuck = process_of(run_folder, 1, step=4)
        os.kill(stuck, signal.SIGSTOP)
        assert process.stdout is not None
        # The launcher waits for the one that hangs, so not to the end of what it says.
        error = next(event for line in process.stdout if (event := json.loads(line))["event"] == "error")
        os.kill(stuck, signal.SIGKILL)
    assert error["kind"] == "RankError"
    assert "rank 1 did not arrive: in step" in error["message"]
    assert f"process {stuck}" in error["message"]
