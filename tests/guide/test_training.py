"""What the playground shows of a run is true of it."""

import contextlib
import copy
import io
from typing import Any

import pytest
import torch

from microbatch.guide.lessons import LESSONS, lesson
from microbatch.guide.playground_settings import FIELDS, read_settings
from microbatch.guide.presets import PRESETS
from microbatch.guide.python_code import program
from microbatch.guide.training import Training


def run(**values: Any) -> list[dict[str, Any]]:
    events: list[dict[str, Any]] = []
    Training(read_settings(values), lambda kind, told: events.append({"kind": kind, **told})).run()
    return events


def steps(**values: Any) -> list[dict[str, Any]]:
    return [event for event in run(**values) if event["kind"] == "step"]


@pytest.mark.parametrize("name", LESSONS)
def test_a_lesson_is_the_same_for_the_same_seed(name: str) -> None:
    first, again, other = (lesson(name, batch_size=4, seed=seed) for seed in (1, 1, 2))
    for one, two in zip(first.model.parameters(), again.model.parameters(), strict=True):
        assert torch.equal(one, two)
    batch = first.batch(3)
    assert all(torch.equal(batch[key], again.batch(3)[key]) for key in batch)
    pairs = zip(first.model.parameters(), other.model.parameters(), strict=True)
    assert not all(torch.equal(one, two) for one, two in pairs)
    assert not all(torch.equal(batch[key], first.batch(4)[key]) for key in batch if batch[key].shape)


def test_the_badge_is_an_independent_computation() -> None:
    """Its number again, by a loop that shares nothing with the playground's but the lesson."""
    settings: dict[str, Any] = {"model": "transformer", "batch": 12, "microbatch": 5, "steps": 2}
    found = steps(**settings)
    made = lesson("transformer", batch_size=12, seed=0)
    optimizer = torch.optim.SGD(made.model.parameters(), lr=0.05, momentum=0.9)
    for index in range(2):
        batch = made.batch(index)
        exact = copy.deepcopy(made.model).double()
        made.mean_loss(exact, batch).backward()
        truth = torch.cat([each.grad.flatten() for each in exact.parameters() if each.grad is not None])
        optimizer.zero_grad()
        total = int((batch["labels"] >= 0).sum())
        for tokens, labels in zip(batch["tokens"].split(5), batch["labels"].split(5), strict=True):
            (made.loss(made.model, {"tokens": tokens, "labels": labels}).sum / total).backward()
        mine = torch.cat([each.grad.double().flatten() for each in made.model.parameters() if each.grad is not None])
        error = float((mine - truth).norm() / truth.norm())
        assert found[index]["error"] == pytest.approx(error, rel=0.5)
        assert found[index]["full_loss"] == pytest.approx(float(made.mean_loss(exact, batch).detach()), rel=1e-4)
        optimizer.step()


@pytest.mark.parametrize(
    ("model", "precision"),
    [
        ("transformer", "float32"),
        ("transformer", "bfloat16"),
        ("conv", "autocast"),
        ("mlp", "float32"),
        ("mlp", "autocast"),
    ],
)
def test_the_right_denominator_is_within_the_tolerance_of_its_precision(model: str, precision: str) -> None:
    for step in steps(model=model, precision=precision, batch=24, microbatch=7, steps=2):
        assert step["error"] <= step["tolerance"]
        assert step["per_second"] * step["seconds"] == pytest.approx(24)  # rows, whatever the loss counts


def test_without_dividing_the_gradient_is_n_times_too_large() -> None:
    for step in steps(model="mlp", batch=32, microbatch=8, divide="none", steps=2, lr=0.01):
        assert step["scale"] == pytest.approx(4, rel=0.02)
        assert step["error"] > 1000 * step["tolerance"]
        assert step["reported"] == pytest.approx(4 * step["loss"], rel=1e-5)


def test_the_mean_of_means_is_seen_on_ragged_text_and_not_on_even_rows() -> None:
    assert all(
        step["error"] > 1000 * step["tolerance"] for step in steps(microbatch=2, batch=8, divide="means", steps=1)
    )
    assert all(step["error"] <= step["tolerance"] for step in steps(model="mlp", divide="means", steps=1))


def test_batch_norm_and_coupled_losses_are_not_the_batchs_when_they_are_cut() -> None:
    for values in ({"model": "conv", "norm": "batch"}, {"model": "pairs"}):
        cut, whole = steps(**values, microbatch=4, steps=1)[0], steps(**values, microbatch=32, steps=1)[0]
        assert cut["error"] > 0.05
        assert whole["error"] <= whole["tolerance"]


def test_exact_batch_norm_is_the_batchs() -> None:
    events = run(model="conv", norm="exact", batch=24, microbatch=5, steps=2)
    # They end in another order than they begin, all of them before the first backward.
    forwards = [event["index"] for event in events if event["kind"] == "forward"]
    assert sorted(forwards[:5]) == sorted(forwards[5:]) == [0, 1, 2, 3, 4]
    assert [event["index"] for event in events if event["kind"] == "microbatch"] == 2 * [0, 1, 2, 3, 4]
    for step in (event for event in events if event["kind"] == "step"):
        assert step["error"] <= step["tolerance"]


def test_the_coupled_step_is_the_batchs_and_goes_forward_twice() -> None:
    events = run(model="pairs", coupling="coupled", batch=24, microbatch=5, steps=2)
    kinds = [event["kind"] for event in events]
    assert (kinds.count("encode"), kinds.count("forward"), kinds.count("microbatch")) == (10, 10, 10)
    assert [event["index"] for event in events if event["kind"] in ("encode", "forward")] == 4 * [0, 1, 2, 3, 4]
    for step in (event for event in events if event["kind"] == "step"):
        assert step["error"] <= step["tolerance"]
        assert step["reported"] == pytest.approx(step["full_loss"], rel=1e-5)


def test_the_memory_is_the_meters_and_beside_it_the_full_batchs() -> None:
    for step in steps(model="conv", batch=32, microbatch=4, compare="yes", steps=2):
        assert sum(step["memory"].values()) == step["peak_bytes"]
        assert sum(step["whole"]["memory"].values()) == step["whole"]["peak_bytes"]
        assert step["whole"]["memory"]["activations"] > 3 * step["memory"]["activations"]
        assert step["whole"]["loss"] == pytest.approx(step["loss"], rel=1e-3)


def test_a_rule_scales_the_learning_rate() -> None:
    rates = {
        rule: next(event for event in run(model="mlp", batch=128, microbatch=64, rule=rule, steps=1))["lr"]
        for rule in ("fixed", "linear", "sqrt")
    }
    assert rates == {"fixed": 0.05, "linear": pytest.approx(0.2), "sqrt": pytest.approx(0.1)}


@pytest.mark.parametrize(
    "values",
    [
        {"model": "mlp", "steps": 3},
        {"model": "conv", "norm": "batch", "microbatch": 5, "steps": 2, "optimizer": "adamw", "lr": 0.001},
        {"model": "mlp", "divide": "means", "batch": 20, "steps": 2, "precision": "autocast"},
        {"model": "conv", "batch": 128, "microbatch": 128, "tank": 1, "steps": 2, "rule": "linear"},
        {"model": "pairs", "coupling": "coupled", "microbatch": 5, "steps": 2},
        {"model": "conv", "norm": "exact", "microbatch": 5, "steps": 2},
    ],
    ids=str,
)
def test_the_program_reproduces_the_run(values: dict[str, Any]) -> None:
    text = program(read_settings(values))
    assert len(text.splitlines()) <= 17 + text.startswith("# Wrong on purpose")
    said = io.StringIO()
    with contextlib.redirect_stdout(said):
        exec(compile(text, "program", "exec"), {})  # noqa: S102
    told = [line.split() for line in said.getvalue().splitlines()]
    found = steps(**values)
    assert [(int(number), int(pieces)) for number, _, pieces in told] == [
        (step["step"] + 1, step["microbatches"]) for step in found
    ]
    for (_, loss, _), step in zip(told, found, strict=True):
        assert float(loss) == pytest.approx(step["reported"], rel=1e-5)


@pytest.mark.parametrize("name", PRESETS)
def test_a_program_that_is_wrong_on_purpose_says_so(name: str) -> None:
    text = program(read_settings(PRESETS[name].settings))
    assert text.startswith("# Wrong on purpose") == (PRESETS[name].exact is False)


@pytest.mark.parametrize("name", PRESETS)
def test_every_preset_can_be_run_and_shows_what_it_says(name: str) -> None:
    settings = {**PRESETS[name].settings, "steps": 1, "compare": "no"}
    events = run(**settings)
    kinds = [event["kind"] for event in events]
    found = [event for event in events if event["kind"] == "step"]
    assert ("overflow" in kinds) == (name == "overflows")
    assert ("retry" in kinds) == (name == "recovers")
    exact = [step["error"] <= step["tolerance"] for step in found]
    assert exact == ([] if PRESETS[name].exact is None else [PRESETS[name].exact])
    if name in ("fits", "recovers"):
        assert max(step["peak_bytes"] for step in found) <= 10 * 1024**2


def test_a_forgotten_division_explodes_where_the_whole_batch_learns() -> None:
    found = steps(**{**PRESETS["undivided"].settings, "steps": 16})
    assert all(step["scale"] == pytest.approx(4, rel=0.02) for step in found[:2])
    assert found[-1]["whole"]["loss"] < 0.8 * found[0]["whole"]["loss"]
    assert found[-1]["loss"] > 10 * found[0]["loss"]


def test_an_overflow_tells_what_is_truly_needed() -> None:
    """The budget ends an attempt at the operator that passes it, which says little of what the batch needs."""
    (overflow,) = (event for event in run(**PRESETS["overflows"].settings) if event["kind"] == "overflow")
    (roomy,) = steps(**{**PRESETS["overflows"].settings, "tank": "none", "steps": 1})
    assert overflow["need_bytes"] == pytest.approx(roomy["peak_bytes"], rel=0.01)
    assert sum(overflow["need_memory"].values()) == overflow["need_bytes"] > 2 * overflow["peak_bytes"]
    retries = [event for event in run(**{**PRESETS["recovers"].settings, "steps": 1}) if event["kind"] == "retry"]
    assert [event["rows"] for event in retries] == [event["before"] for event in retries]
    assert retries[0]["need_bytes"] == pytest.approx(overflow["need_bytes"], rel=0.01)


def test_a_setting_reads_what_it_writes() -> None:
    settings = read_settings({})
    assert read_settings({name: str(value) for name, value in settings.as_dict().items()}) == settings
    assert set(settings.as_dict()) == {field.name for field in FIELDS}
