"""The checkpoint of the best validation is kept, and a run without a better one ends early."""

import json
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn

import microbatch as mb
from microbatch.errors import ConfigError
from microbatch.train.best import Best
from microbatch.train.config import load_settings
from microbatch.train.job import Job
from microbatch.train.resolve import resolve
from microbatch.train.rundir import RunDirectory
from microbatch.train.training_loop import TrainingLoop

SCORES = [5.0, 3.0, 4.0, 3.5, 2.0, 2.5, 2.0, math.nan, 6.0, 1.0]


class Scripted:
    """Scores of one validation after the other, whatever the model says."""

    def __init__(self, scores: Sequence[float], start: int = 0) -> None:
        self.scores, self.calls = scores, start

    def __call__(self, model: nn.Module, batch: Tensor) -> Mapping[str, mb.Loss]:
        score = torch.tensor(self.scores[self.calls])
        self.calls += 1
        return {"loss": mb.Loss(sum=score, count=1), "accuracy": mb.Loss(sum=-score, count=1)}


def loop_of(folder: Path, evaluate: Any = None, **flags: Any) -> TrainingLoop:
    torch.manual_seed(0)
    model = nn.Linear(2, 1)
    validation: dict[str, Any] = {} if evaluate is None else {"validation": [torch.ones(2)], "evaluate": evaluate}
    job = Job(
        model=model,
        optimizer=torch.optim.SGD(model.parameters(), lr=0.1),
        loss_fn=lambda model, x: model(x).square().mean(),
        data=[torch.randn(2) for _ in range(4)],
        batch_size=4,
        microbatch_size=2,
        steps=10,
        **validation,
    )
    settings = {"validate_every": 1, "checkpoint_every": 4, "keep_checkpoints": 1, **flags}
    config = resolve(load_settings(settings), job, device=torch.device("cpu"))
    directory = RunDirectory(folder)
    if not directory.config.exists():
        directory.start(config="", files={})
    return TrainingLoop(job, config=config, run=directory)


def kept(folder: Path) -> list[int]:
    return sorted(int(each.name.removeprefix("step-")) for each in (folder / "checkpoints").glob("step-*"))


@pytest.mark.parametrize("flags", [{}, {"best": "max:accuracy"}, {"best": "min:loss", "async_checkpoints": True}])
def test_the_best_checkpoint_outlives_newer_ones(flags: dict[str, Any], tmp_path: Path) -> None:
    loop = loop_of(tmp_path, Scripted([*SCORES[:9], 9.0]), **flags)
    assert loop.run() is None
    assert kept(tmp_path) == [5, 10]
    assert (loop.progress.best.step, loop.progress.best.waited) == (5, 5)


def test_without_a_loss_nothing_is_the_best(tmp_path: Path) -> None:
    def evaluate(model: nn.Module, batch: Tensor) -> Mapping[str, mb.Loss]:
        return {"accuracy": mb.Loss(sum=torch.tensor(1.0), count=1)}

    loop_of(tmp_path, evaluate).run()
    assert kept(tmp_path) == [10]
    with pytest.raises(ConfigError, match="--best min:loss: the validation has no 'loss'; it has 'accuracy'"):
        loop_of(tmp_path / "other", evaluate, patience=2).run()


@pytest.mark.parametrize(("patience", "last"), [(1, 3), (2, 4), (4, 9), (5, 10)])
def test_a_run_ends_after_validations_without_a_better_one(patience: int, last: int, tmp_path: Path) -> None:
    loop = loop_of(tmp_path, Scripted(SCORES), patience=patience)
    assert loop.run() is None
    assert loop.progress.step == last
    assert loop.stopped_early == (last < 10)
    assert kept(tmp_path)[-1] == last


@pytest.mark.parametrize("stop", [3, 5, 7])
def test_a_resumed_run_waits_on_from_where_it_was(stop: int, tmp_path: Path) -> None:
    loop_of(tmp_path, Scripted(SCORES), steps=stop, patience=4).run()
    loop = loop_of(tmp_path, Scripted(SCORES, start=stop), patience=4)
    loop.restore()
    assert loop.run() is None
    assert loop.progress.step == 9
    assert kept(tmp_path) == [5, 9]


def test_refusals() -> None:
    with pytest.raises(ConfigError, match="--patience: the job has no validation set"):
        loop_of(Path(), patience=3)
    with pytest.raises(ConfigError, match="min:NAME or max:NAME"):
        load_settings({"best": "accuracy"})


@given(scores=st.lists(st.floats(-5, 5) | st.just(math.nan), min_size=1), largest=st.booleans())
def test_the_first_of_equal_scores_is_the_best(scores: list[float], largest: bool) -> None:
    best = Best()
    for step, score in enumerate(scores, 1):
        best.look({"loss": score}, score="max:loss" if largest else "min:loss", step=step)
    finite = [score for score in scores if math.isfinite(score)]
    expected = (max if largest else min)(finite) if finite else None
    assert best.value == expected
    assert best.step == (0 if expected is None else scores.index(expected) + 1)


def test_the_summary_says_where_the_best_is(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from microbatch.train.start import prepare

    monkeypatch.chdir(tmp_path)
    (tmp_path / "a.py").write_text(
        "import torch, microbatch as mb\n"
        "def job():\n"
        "    model = torch.nn.Linear(2, 1)\n"
        "    optimizer = torch.optim.SGD(model.parameters(), lr=10.0)\n"  # worse with every step
        "    rows = [torch.ones(2)] * 4\n"
        "    return mb.Job(model=model, optimizer=optimizer, loss_fn=lambda m, x: m(x).square().mean(),\n"
        "                  data=rows, validation=rows, batch_size=4, microbatch_size=2, steps=6)\n"
    )
    flags = {"job": "a.py:job", "patience": 2, "validate_every": 1, "compare": False, "schedule": "constant"}
    summary = prepare(flags, run=tmp_path / "run").train()
    assert (summary["step"], summary["stopped_early"], summary["finished"]) == (3, True, True)
    assert summary["best"]["step"] == 1
    assert Path(summary["best"]["checkpoint"]).is_dir()
    assert json.loads((tmp_path / "run" / "summary.json").read_text()) == summary
