"""A sweep measures what is known, goes on where it was killed, puts the job back, and says what it cannot tell."""

import json
import random
import types
from pathlib import Path
from typing import Any

import pytest
import torch
from tests.tuning.swept_jobs import Point, distance, quadratic
from torch import nn

import microbatch as mb
from microbatch.errors import ConfigError
from microbatch.train.training_loop import TrainingLoop
from microbatch.tuning import sweep_setup
from microbatch.tuning.sweep_records import SweepProgress

QUICK: dict[str, Any] = {"seeds": 2, "points": 4, "microbatch_size": 8}


def points(result: mb.Sweep) -> list[tuple[Any, ...]]:
    """Return all that is to be the same twice: every curve, without times."""
    return [(run.batch_size, run.learning_rate, run.seed, run.ended, run.curve) for run in result.runs]


def test_where_noise_dominates_the_linear_rule_loses_no_sample() -> None:
    result = mb.sweep(
        quadratic(rate=0.04), batch_sizes=[8, 16, 32], target_loss=6.0, seeds=2, points=8, microbatch_size=8
    )
    assert [each.learning_rate for each in result.batches] == pytest.approx([0.04, 0.08, 0.16])
    samples = [each.samples for each in result.batches]
    assert None not in samples
    # E[|w|^2] falls by (1 - rate)^2 a step: nearly the same for the same samples.
    assert samples == pytest.approx([samples[0]] * 3, rel=0.1)
    assert result.critical is not None
    assert result.critical.high is None
    assert "takes 0.2" in result.advice
    assert all(run.ended == "reached the target" for run in result.runs)


def test_where_nothing_is_noisy_a_larger_batch_saves_no_step() -> None:
    # Without noise, a step is as good at any batch; the rates are held the same by the grid.
    job = quadratic(noise=1e-9, rate=0.05)
    result = mb.sweep(
        job,
        batch_sizes=[8, 32],
        lr="grid",
        grid=(0.25, 1.0),
        samples=512,
        points=3,
        seeds=1,
        drop=False,
        microbatch_size=32,
    )
    same = {run.batch_size: run for run in result.runs if run.learning_rate == pytest.approx(0.05)}
    losses = {size: {point.steps: point.loss for point in run.curve} for size, run in same.items()}
    assert losses[32][16] == pytest.approx(losses[8][16], rel=1e-6)
    samples = {size: {point.loss: point.samples for point in run.curve} for size, run in same.items()}
    assert samples[32][losses[32][16]] == 4 * samples[8][losses[8][16]]


def test_the_curve_is_the_one_of_a_hand_written_loop() -> None:
    job = quadratic(noise=0.0, rate=0.1)
    result = mb.sweep(job, batch_sizes=[16], samples=256, points=4, seeds=1, microbatch_size=4)
    (run,) = result.runs
    # Every sample is 0, so the weight shrinks by the same factor at each step; the rule doubles the rate.
    expected = [0.5 * 6 * (3.0 * 0.8**steps) ** 2 for steps in (1, 3, 7, 16)]
    assert [point.steps for point in run.curve] == [1, 3, 7, 16]
    assert [point.samples for point in run.curve] == [16, 48, 112, 256]
    assert [point.loss for point in run.curve] == pytest.approx(expected, rel=1e-12)
    assert result.critical is None
    assert "at least two" in result.advice


def test_without_validation_the_curve_is_the_mean_of_the_training_losses() -> None:
    result = mb.sweep(
        quadratic(noise=0.0, rate=0.1, validation=False),
        batch_sizes=[8],
        samples=64,
        points=2,
        seeds=1,
        microbatch_size=4,
    )
    losses = [0.5 * 6 * (3.0 * 0.9**steps) ** 2 for steps in range(8)]
    assert result.measure == "training loss"
    expected = [losses[0], sum(losses[1:]) / 7]
    assert [point.loss for point in result.runs[0].curve] == pytest.approx(expected, rel=1e-12)


def test_the_job_is_put_back() -> None:
    model = nn.Sequential(nn.Linear(6, 6), nn.BatchNorm1d(6), nn.Dropout(0.5), nn.Linear(6, 1)).double()
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.01)
    job = quadratic(
        model=model, optimizer=optimizer, loss_fn=lambda model, x: model(x).square().mean(), batch_norm="microbatch"
    )
    model(job.data[:4]).mean().backward()
    optimizer.step()
    model[1].eval()
    weights = {name: value.clone() for name, value in model.state_dict().items()}
    state = json.dumps(optimizer.state_dict(), default=lambda value: value.tolist())
    gradients = [parameter.grad for parameter in model.parameters()]
    copies = [None if gradient is None else gradient.clone() for gradient in gradients]
    torch_state, python_state = torch.get_rng_state(), random.getstate()
    step = optimizer.step
    mb.sweep(job, batch_sizes=[8, 16], samples=64, seeds=2, points=2, microbatch_size=8)
    assert all(torch.equal(value, weights[name]) for name, value in model.state_dict().items())
    assert json.dumps(optimizer.state_dict(), default=lambda value: value.tolist()) == state
    for parameter, gradient, copy in zip(model.parameters(), gradients, copies, strict=True):
        assert parameter.grad is gradient
        assert gradient is None or copy is None or torch.equal(gradient, copy)
    assert torch.equal(torch.get_rng_state(), torch_state)
    assert random.getstate() == python_state
    assert [model.training, model[1].training, model[2].training] == [True, False, True]
    assert optimizer.step == step


class KilledError(Exception):
    pass


@pytest.mark.parametrize("when", [3, 17])
def test_a_killed_sweep_goes_on_to_the_same_bits(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, when: int) -> None:
    asked: dict[str, Any] = {"batch_sizes": [8, 16], "lr": "grid", "grid": (0.5, 1.0), "samples": 96, "points": 3}
    asked |= {"seeds": 1, "microbatch_size": 8}
    whole = mb.sweep(quadratic(), **asked)
    take, steps = TrainingLoop._one_step, [0]

    def dies(loop: TrainingLoop, log: Any) -> None:
        steps[0] += 1
        if steps[0] == when:
            raise KilledError
        take(loop, log)

    with monkeypatch.context() as patch:
        patch.setattr(TrainingLoop, "_one_step", dies)
        with pytest.raises(KilledError):
            mb.sweep(quadratic(), **asked, folder=tmp_path / "sweep")
    again = mb.sweep(quadratic(), **asked, folder=tmp_path / "sweep")
    assert points(again) == points(whole)
    # A finished one is read, and no step is taken.
    with monkeypatch.context() as patch:
        patch.setattr(TrainingLoop, "_one_step", dies)
        steps[0] = when - 1
        read = mb.sweep(quadratic(), **asked, folder=tmp_path / "sweep")
    assert read == again
    assert mb.Sweep.from_dict(json.loads((tmp_path / "sweep" / "result.json").read_text())) == read


def test_a_folder_keeps_what_was_asked_for(tmp_path: Path) -> None:
    mb.sweep(quadratic(), batch_sizes=[8], samples=32, **QUICK, folder=tmp_path)
    with pytest.raises(ConfigError, match="other values of batch_sizes, samples"):
        mb.sweep(quadratic(), batch_sizes=[8, 16], samples=64, **QUICK, folder=tmp_path)


def test_a_worse_rate_ends_early_and_that_is_said() -> None:
    asked: dict[str, Any] = {"batch_sizes": [8, 16], "lr": "grid", "grid": (0.01, 1.0), "samples": 64, **QUICK}
    result = mb.sweep(quadratic(), **asked)
    ended = {(run.batch_size, run.learning_rate): (run.ended, len(run.curve)) for run in result.runs}
    assert ended == {
        (8, 0.02 * 0.01): ("beaten", 1),
        (8, 0.02): ("finished", 4),
        (16, 0.04 * 0.01): ("beaten", 1),
        (16, 0.04): ("finished", 4),
    }
    assert [each.rates for each in result.batches] == [2, 2]
    assert any("4 runs ended early" in note and "successive halving" in note for note in result.notes)
    kept = mb.sweep(quadratic(), **asked, drop=False)
    assert {run.ended for run in kept.runs} == {"finished"}
    assert not any("ended early" in note for note in kept.notes)


def test_a_rate_that_diverges_ends_and_that_is_said() -> None:
    result = mb.sweep(
        quadratic(), batch_sizes=[8], lr="grid", grid=(1.0, 1e6), points=2, seeds=1, microbatch_size=8, drop=False
    )
    assert {run.learning_rate: run.ended for run in result.runs} == {0.02: "finished", 2e4: "diverged"}
    assert any("diverged at learning rate 2e+04" in note for note in result.notes)
    assert result.batches[0].learning_rate == 0.02


def test_a_target_that_is_never_reached_is_said() -> None:
    result = mb.sweep(quadratic(), batch_sizes=[8, 16], target_loss=-1.0, samples=64, **QUICK)
    assert result.critical is None
    assert "show no difference" in result.advice
    assert [each.samples for each in result.batches] == [None, None]
    assert sum("0 of 2 seeds reached the target" in note for note in result.notes) == 2
    assert result.costs(1.0) == {8: None, 16: None}


def test_a_target_before_the_first_point_is_said() -> None:
    result = mb.sweep(quadratic(), batch_sizes=[8, 16], target_loss=1e9, samples=64, **QUICK)
    assert [each.samples for each in result.batches] == [None, None]
    assert sum("at the target at the first point already" in note for note in result.notes) == 2
    assert {len(run.curve) for run in result.runs} == {1}


def test_the_cost_is_the_price_of_the_time() -> None:
    result = mb.sweep(quadratic(), batch_sizes=[8, 16], samples=64, **QUICK)
    for each in result.batches:
        assert each.samples is not None
        assert each.seconds_per_sample is not None
        assert result.costs(7.2)[each.batch_size] == pytest.approx(each.samples * each.seconds_per_sample * 0.002)
    with pytest.raises(ConfigError, match="price_per_hour"):
        result.costs(-1.0)


def test_a_function_makes_a_job_for_each_seed() -> None:
    seeds: list[int] = []

    def job(seed: int) -> mb.Job:
        seeds.append(seed)
        return quadratic(rate=0.02)

    result = mb.sweep(job, batch_sizes=[8, 16], samples=64, **QUICK)
    assert seeds == [0, 1]
    assert {run.seed for run in result.runs} == {0, 1}
    curves = {run.curve for run in result.runs if run.batch_size == 8}
    assert len(curves) == 2  # another order of the data


def test_the_finder_is_asked_at_each_batch(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[tuple[int, float]] = []

    def find(job: mb.Job, *, batch_size: int, microbatch_size: int) -> Any:
        assert microbatch_size == 8
        asked.append((batch_size, job.optimizer.param_groups[0]["lr"]))  # type: ignore[union-attr]
        return types.SimpleNamespace(suggested=0.03 if batch_size == 8 else None)

    monkeypatch.setattr(
        sweep_setup,
        "import_module",
        lambda name: {"microbatch.tuning.find_rate": types.SimpleNamespace(find_learning_rate=find)}[name],
    )
    result = mb.sweep(quadratic(), batch_sizes=[8, 16], lr="auto", samples=64, **QUICK)
    assert asked == [(8, 0.02), (16, 0.04)]
    assert [each.learning_rate for each in result.batches] == [0.03, 0.04]
    assert any("batch 16: the finder suggests no learning rate" in note for note in result.notes)


def test_the_microbatch_size_is_found_once_for_each_batch(tmp_path: Path) -> None:
    result = mb.sweep(quadratic(), batch_sizes=[8, 16], samples=64, seeds=1, points=2, folder=tmp_path)
    found = json.loads((tmp_path / "sweep.json").read_text())["batches"]
    assert {int(size): setup["microbatch_size"] for size, setup in found.items()} == {
        each.batch_size: each.microbatch_size for each in result.batches
    }
    again = mb.sweep(quadratic(), batch_sizes=[8, 16], samples=64, seeds=1, points=2, folder=tmp_path)
    assert points(again) == points(result)


def test_progress_is_told_in_turns() -> None:
    told: list[SweepProgress] = []
    mb.sweep(quadratic(), batch_sizes=[8, 16], samples=64, seeds=2, points=2, microbatch_size=8, progress=told.append)
    runs = [(each.point, each.batch_size, each.seed) for each in told if each.seed is not None]
    assert [point for point, _, _ in runs] == [1] * 4 + [2] * 4
    assert runs[0][1:] != runs[4][1:]  # nobody is always first
    assert sorted(run[1:] for run in runs[:4]) == sorted(run[1:] for run in runs[4:])


def coupled() -> mb.Job:
    return quadratic(validation=False, encode=lambda model, rows: rows, loss_fn=lambda model, found: found.mean())


def scheduled() -> mb.Job:
    job = quadratic()
    return quadratic(
        model=job.model,
        optimizer=job.optimizer,
        scheduler=torch.optim.lr_scheduler.ConstantLR(job.optimizer),  # type: ignore[arg-type]
    )


def rmsprop() -> mb.Job:
    model = Point(6)
    return quadratic(model=model, optimizer=torch.optim.RMSprop(model.parameters(), lr=0.01), loss_fn=distance)


@pytest.mark.parametrize(
    ("asked", "what"),
    [
        ({"batch_sizes": []}, "batch_sizes must be whole numbers"),
        ({"batch_sizes": [0, 8]}, "batch_sizes must be whole numbers"),
        ({"batch_sizes": [8, 8]}, "must rise"),
        ({"batch_sizes": [16, 8]}, "must rise"),
        ({"batch_sizes": [1024]}, "more than the data has: 512"),
        ({"batch_sizes": [128], "samples": 128}, "fewer than 4 steps in 128 samples"),
        ({"lr": "best"}, 'must be "rule", "auto" or "grid"'),
        ({"grid": (1.0, -1.0)}, "positive factors"),
        ({"seeds": 0}, "seeds must be a whole number of at least 1"),
        ({"points": 1}, "points must be a whole number of at least 2"),
        ({"samples": 0}, "samples must be a whole number of at least 1"),
        ({"target_loss": float("nan")}, "target_loss must be a finite number"),
        ({"accumulation": "plain", "microbatch_size": "auto"}, 'instead of "auto"'),
        ({"job": coupled()}, "give the job a validation set"),
        ({"job": scheduled()}, "scheduler=None"),
        ({"job": rmsprop()}, "no rule was made for RMSprop"),
        ({"job": quadratic(epochs=None)}, "pass samples="),
    ],
)
def test_what_cannot_work_is_refused(asked: dict[str, Any], what: str) -> None:
    given: dict[str, Any] = {"job": quadratic(), "batch_sizes": [8, 16], **QUICK} | asked
    with pytest.raises(ConfigError, match=what):
        mb.sweep(given.pop("job"), **given)


def test_without_a_rule_the_grid_is_around_the_jobs_own_rate() -> None:
    result = mb.sweep(rmsprop(), batch_sizes=[8, 16], lr="grid", grid=(1.0,), samples=64, **QUICK)
    assert [each.learning_rate for each in result.batches] == [0.01, 0.01]
    assert any("no scaling rule" in note for note in result.notes)


def test_the_rule_scales_all_hyperparameters_of_adam_in_every_slice() -> None:
    model, seen = Point(6), set[tuple[Any, ...]]()
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.01, betas=(0.9, 0.99), eps=1e-6)

    def watched(model: nn.Module, rows: torch.Tensor) -> mb.Loss:
        group = optimizer.param_groups[0]
        seen.add((group["lr"], *group["betas"], group["eps"]))
        return distance(model, rows)

    job = quadratic(
        model=model, optimizer=optimizer, loss_fn=watched, evaluate=lambda model, rows: {"loss": distance(model, rows)}
    )
    mb.sweep(job, batch_sizes=[32], samples=256, points=2, seeds=1, microbatch_size=32)
    assert len(seen) == 1
    # k = 4: twice the rate, beta -> 1 - 4 (1 - beta), half of eps.
    assert next(iter(seen)) == pytest.approx((0.02, 0.6, 0.96, 5e-7))
