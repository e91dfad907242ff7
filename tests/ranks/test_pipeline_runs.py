"""A run of a model in stages is that of the whole model, and goes on with another number of pipelines."""

import json
import os
import shutil
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from tests.ranks.piped_job import two
from torch import Tensor, nn

from microbatch.errors import CheckpointError, ConfigError, MicrobatchError
from microbatch.ranks.process_group import RankGroup
from microbatch.train.checkpoint import read_newest
from microbatch.train.config import Settings
from microbatch.train.launch import Launch
from microbatch.train.place import STAGES, Place, check_piped_job, find_place, own_state
from microbatch.train.run_events import RunEvent, RunPlanned
from microbatch.train.start import prepare

CPU = torch.device("cpu")
JOB = Path(__file__).with_name("piped_job.py")
FLAGS = {"device": "cpu", "compare": False, "checkpoint_every": 4, "validate_every": 3, "schedule": "cosine"}


def run(folder: Path, job: str, *, launch: Launch | None = None, resume: bool = False, **flags: Any) -> list[RunEvent]:
    """Run a job, and return what it has told."""
    flags = {**FLAGS, **flags} | ({} if resume else {"job": f"{JOB}:{job}"})
    told: list[RunEvent] = []
    prepare(flags, run=folder, resume=resume, launch=launch, listeners=[told.append]).train()
    return told


def error_of(work: Callable[[], object]) -> str:
    """Say what it ends with."""
    try:
        work()
    except (MicrobatchError, ValueError) as error:
        return f"{type(error).__name__}: {error}"
    return ""


def stop_early(folder: Path, job: str, launch: Launch) -> None:
    """Leave a run as one that was killed after its fourth step does: with that checkpoint, and some steps after it."""
    run(folder, job, launch=launch, async_checkpoints=True)
    if launch.rank == 0:
        shutil.rmtree(folder / "checkpoints" / "step-000008")
    torch.distributed.barrier()


# -- on the ranks, each in a process of its own; the folder is told by the environment -------------------------------


def on_four(rank: int, ranks: int) -> dict[str, Any]:
    """Two pipelines of two ranks."""
    folder, launch = Path(os.environ["RUNS"]), Launch(rank=rank, ranks=ranks)
    told = run(folder / "two-4", "two", launch=launch)
    run(folder / "four-4", "four", launch=launch)
    stop_early(folder / "4-to-2", "two", launch)
    plans = [event.config for event in told if isinstance(event, RunPlanned)]
    job, everyone = two(device=CPU), RankGroup.find(CPU)
    if rank == 3:
        job = replace(job, model=nn.Linear(3, 4))
    return {
        "loss": error_of(lambda: run(folder / "failing-4", "failing", launch=launch)),
        "score": error_of(lambda: run(folder / "unscored-4", "failing_score", launch=launch, steps=2)),
        "mixed": error_of(lambda: find_place(job, everyone, patience=5)),
        "plan": [(plan.pipelines, plan.microbatches, plan.parameters) for plan in plans],
    }


def on_two(rank: int, ranks: int) -> dict[str, Any]:
    """One pipeline, and the other part of what two began."""
    folder, launch = Path(os.environ["RUNS"]), Launch(rank=rank, ranks=ranks)
    run(folder / "two-2", "two", launch=launch)
    run(folder / "4-to-2", "two", launch=launch, resume=True)
    stop_early(folder / "2-to-4", "two", launch)
    drawing = prepare({**FLAGS, "job": f"{JOB}:drawing", "steps": 1}, run=folder / "drawing-2", launch=launch)
    drawing.train()
    (drawn,) = [vars(each)["drawn"] for each in drawing.job.model.modules() if "drawn" in vars(each)]
    return {"drawn": drawn, "whole": error_of(lambda: run(folder / "whole-to-2", "two", launch=launch, resume=True))}


def on_four_again(rank: int, ranks: int) -> dict[str, Any]:
    """The other part of what one pipeline began."""
    folder, launch = Path(os.environ["RUNS"]), Launch(rank=rank, ranks=ranks)
    run(folder / "2-to-4", "two", launch=launch, resume=True)
    return {}


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory, run_ranks: Callable[..., list[Any]]) -> Iterator[Path]:
    folder = tmp_path_factory.mktemp("runs")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("RUNS", str(folder))
        run(folder / "whole", "two")
        shutil.copytree(folder / "whole", folder / "whole-to-2")
        torch.save(run_ranks(on_four, 4, folder / "processes-4"), folder / "four.pt")
        torch.save(run_ranks(on_two, 2, folder / "processes-2"), folder / "two.pt")
        run_ranks(on_four_again, 4, folder / "processes-4-again")
        yield folder


def lines(folder: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def weights(folder: Path, *, stages: int) -> dict[str, Tensor]:
    """Return the final weights by their names in the whole model."""
    read = read_newest(folder / "checkpoints", notice=pytest.fail)
    assert read.step == 8
    found: dict[str, Tensor] = {}
    for name, tensor in read.weights.items():
        stage, at, rest = name.split(".", 2)
        found[f"{int(stage.removeprefix('stage-')) * 4 // stages + int(at)}.{rest}"] = tensor
    return found


@pytest.mark.parametrize(("name", "stages"), [("two-2", 2), ("two-4", 2), ("four-4", 4), ("4-to-2", 2), ("2-to-4", 2)])
def test_the_same_losses_scores_and_weights_as_the_whole_model(runs: Path, name: str, stages: int) -> None:
    whole, piped = lines(runs / "whole"), lines(runs / name)
    assert [line["step"] for line in piped] == list(range(1, 9))
    for key in ("loss", "grad_norm", "lr", "count", "samples", "epoch"):
        assert [line[key] for line in piped] == pytest.approx([line[key] for line in whole], abs=1e-12), key
    held_out = [line["validation"]["loss"] for line in whole if "validation" in line]
    assert len(held_out) == 3
    assert [line["validation"]["loss"] for line in piped if "validation" in line] == pytest.approx(held_out, abs=1e-12)
    one, other = (
        read_newest(runs / "whole" / "checkpoints", notice=pytest.fail).weights,
        weights(runs / name, stages=stages),
    )
    assert set(one) == set(other)
    assert max(float((one[each] - other[each]).abs().max()) for each in one) <= 1e-12


def test_each_stage_is_written_once_by_a_name_of_its_own(runs: Path) -> None:
    """Of two pipelines of two ranks the first writes; the other has the same."""
    path = runs / "two-4" / "checkpoints" / "step-000008"
    weights_of = {file.name: sorted(load_file(file)) for file in path.glob("weights*.safetensors")}
    assert {file: len(names) for file, names in weights_of.items()} == {
        "weights.safetensors": 4,
        "weights-1.safetensors": 4,
    }
    assert {name.partition(".")[0] for name in weights_of["weights-1.safetensors"]} == {"stage-1"}
    assert json.loads((path / "manifest.json").read_text())["format"] == 2
    moments = load_file(path / "state-1.safetensors")
    assert sum("exp_avg_sq" in name for name in moments) == 4


def test_what_fails_on_one_last_stage_ends_all_ranks(runs: Path) -> None:
    """Ranks 1 and 3 have last stages; nobody waits for a rank that is gone."""
    told = torch.load(runs / "four.pt", weights_only=True)
    for what, own in (("loss", "no loss today"), ("score", "no score today")):
        found = [each[what] for each in told]
        assert found[1] == found[3] == f"ValueError: {own}"
        assert all(each.startswith("RankError: ") for each in (found[0], found[2])), found
    assert "the validation score failed on rank 1: no score today" in told[0]["score"]


def test_the_plan_is_of_the_whole_model_and_of_pipelines(runs: Path) -> None:
    parameters = sum(tensor.numel() for tensor in weights(runs / "two-2", stages=2).values())
    told = torch.load(runs / "four.pt", weights_only=True)
    assert [each["plan"] for each in told] == [[(2, 2, parameters)]] * 4


def test_stages_draw_numbers_of_their_own(runs: Path) -> None:
    first, second = (each["drawn"] for each in torch.load(runs / "two.pt", weights_only=True))
    assert first != second


def test_pipelines_that_are_not_alike_are_refused_on_every_rank(runs: Path) -> None:
    found = [each["mixed"] for each in torch.load(runs / "four.pt", weights_only=True)]
    assert all("is a Pipeline on some ranks, and none on rank 3" in each for each in found), found


def test_a_checkpoint_of_another_split_is_refused(runs: Path) -> None:
    found = [each["whole"] for each in torch.load(runs / "two.pt", weights_only=True)]
    assert all("the checkpoint has the model whole, and this rank has " in each for each in found), found
    with pytest.raises(CheckpointError, match=r"in stages \(0 of 2; 1 of 2\), and this rank has the whole of it"):
        run(runs / "two-2", "two", resume=True)
    state = {STAGES: {"0 of 2": {}, "1 of 2": {}}}
    with pytest.raises(CheckpointError, match="this rank has 0,2 of 4: go on with the model split as it was"):
        own_state(state, Place(stages="0,2 of 4"))


@pytest.mark.parametrize(
    ("flags", "changes", "match"),
    [
        ({}, {"microbatch_size": None}, "a microbatch size that is to be found does not go: pass one"),
        ({"shard": "zero3"}, {}, "--shard does not go: keep each stage whole"),
        ({"deterministic": True}, {}, "--deterministic does not go"),
        ({}, {"encode": lambda model, batch: model(batch)}, r"Job\(encode=\) does not go"),
        ({}, {"show": str}, r"Job\(show=\) does not go: no rank has a model to call"),
    ],
)
def test_what_a_run_has_no_use_of_is_refused_by_name(flags: Any, changes: Any, match: str) -> None:
    settings, job = Settings(job="mine", **flags), replace(two(device=CPU), **changes)
    with pytest.raises(ConfigError, match=match):
        check_piped_job(settings, job)
