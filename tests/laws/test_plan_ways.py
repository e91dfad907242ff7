"""A plan compares keeping activations with computing them again and with moving them away, and says what pays."""

import dataclasses
import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.optim import SGD

import microbatch as mb
from microbatch.errors import OutOfMemoryError
from microbatch.memory import kept_heap
from microbatch.planning import make_plan, memory_options
from microbatch.planning.plan import CHECKPOINTED, KEPT, OFFLOADED, Candidate, Plan, Way
from microbatch.planning.plan_words import words_for
from microbatch.step.size.auto_checkpoint import fewest
from microbatch.step.size.dry_run import dry_run_at

ROWS, TOKENS, BLOCKS = 8, 64, 4


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.inner = nn.Linear(128, 128)

    def forward(self, x: Tensor) -> Tensor:
        for _ in range(3):
            x = torch.tanh(self.inner(x))
        return x


def deep() -> nn.Module:
    return nn.Sequential(nn.Linear(8, 128), *(Block() for _ in range(BLOCKS)), nn.Linear(128, 1))


def loss_fn(model: nn.Module, x: Tensor) -> Tensor:
    return model(x).square().mean()


def peak(size: int, **options: Any) -> int:
    model = deep()
    accumulator = mb.Accumulator(model, SGD(model.parameters(), lr=0.1), microbatch_size=size, **options)
    return dry_run_at(accumulator.options, loss_fn, batch=torch.zeros(ROWS, TOKENS, 8), size=size)


def settings_of() -> Any:
    model = deep()
    return mb.Accumulator(model, SGD(model.parameters(), lr=0.1), microbatch_size=1).options


def planned(budget: int | str, *, tokens: int = TOKENS) -> Plan:
    model = deep()
    return mb.plan(
        model,
        optimizer=SGD(model.parameters(), lr=0.1),
        loss_fn=loss_fn,
        batch=torch.randn(ROWS, tokens, 8),
        memory_budget=budget,
    )


@pytest.fixture(autouse=True)
def on_a_disk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Let spilled tensors lie where that is worth something, wherever the tests run; and believe any clock."""
    monkeypatch.setattr("microbatch.step.size.search.NOISE", math.inf)
    monkeypatch.setattr("microbatch.memory.offload_targets._IN_MEMORY", set())
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))


def test_where_memory_limits_blocks_are_computed_again_and_only_as_many_as_it_takes() -> None:
    budget = int(1.05 * peak(1))
    assert peak(2) > budget
    plan = planned(budget)
    by_name = {way.name: way for way in plan.ways}
    assert by_name.keys() == {KEPT, CHECKPOINTED, OFFLOADED}
    kept, again, away = (by_name[name] for name in (KEPT, CHECKPOINTED, OFFLOADED))
    assert kept.microbatch_size == 1
    assert again.microbatch_size > 1
    assert 0 < len(again.blocks) <= BLOCKS
    assert away.microbatch_size > 1
    if again.microbatch_size == 2:
        assert again.blocks == fewest(settings_of(), loss_fn, batch=torch.zeros(ROWS, TOKENS, 8), size=2, budget=budget)
    for way in plan.ways:
        assert way.seconds
        assert way.measured_bytes is not None
        assert way.measured_bytes <= budget
        assert way.predicted_bytes == pytest.approx(way.measured_bytes, rel=0.05)
    # What was chosen is what can be passed on.
    assert plan.checkpoint == plan.chosen.blocks
    assert plan.offload == ("activations" if plan.way == OFFLOADED else None)
    fastest = min(way.seconds or 0.0 for way in plan.ways)
    assert (plan.seconds or 0.0) <= 1.03 * fastest
    model = deep()
    accumulator = mb.Accumulator(
        model,
        SGD(model.parameters(), lr=0.1),
        microbatch_size=plan.microbatch_size,
        checkpoint=plan.checkpoint,
        offload=plan.offload,
        memory_budget=budget,
    )
    assert [accumulator.step(torch.randn(ROWS, TOKENS, 8), loss_fn).retries for _ in range(2)] == [0, 0]
    told = json.loads(json.dumps(plan.as_dict()))
    assert Plan.from_dict(told) == plan
    assert plan.ways_table().count("\n") == 3


def test_where_not_even_one_row_fits_what_lets_it_fit_is_found() -> None:
    budget = int(1.1 * peak(1, checkpoint="all"))
    assert peak(1) > budget
    plan = planned(budget)
    assert plan.way in {CHECKPOINTED, OFFLOADED}
    assert KEPT not in {way.name for way in plan.ways}
    assert not any(each.fits for each in plan.candidates)
    assert plan.peak_bytes is not None
    assert plan.peak_bytes <= budget
    assert any("not even one row fits" in words for words in plan.words)


def test_where_nothing_helps_the_error_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(OutOfMemoryError):
        planned(400_000)  # less than the weights and their gradients


def test_where_memory_does_not_limit_the_price_is_told_at_the_same_size() -> None:
    plan = planned("1 GiB")
    assert plan.way == KEPT
    sizes = {way.microbatch_size for way in plan.ways}
    assert len(sizes) == 1
    again = next(way for way in plan.ways if way.name == CHECKPOINTED)
    assert len(again.blocks) == BLOCKS
    assert plan.chosen.measured_bytes is not None
    assert again.measured_bytes is not None
    assert again.measured_bytes < plan.chosen.measured_bytes
    (words,) = (words for words in plan.words if words.startswith("activation checkpoints of all 4 blocks"))
    assert "of the memory" in words
    assert "nothing to gain" in words


def test_where_spilled_tensors_would_be_in_memory_offloading_is_not_offered(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("microbatch.memory.offload_targets._filesystem", lambda _: "tmpfs")
    monkeypatch.setattr("microbatch.memory.offload_targets._IN_MEMORY", {"tmpfs"})
    plan = planned("1 GiB", tokens=2 * TOKENS)  # whatever size is chosen, its activations are large enough to be moved
    assert OFFLOADED not in {way.name for way in plan.ways}


@pytest.mark.parametrize("size", ["auto", 2])
def test_an_accumulator_is_planned_for_with_all_it_was_asked_for(size: Any) -> None:
    model = nn.Sequential(nn.Linear(8, 64), nn.Dropout(0.5), nn.Linear(64, 1))
    accumulator = mb.Accumulator(
        model, SGD(model.parameters(), lr=0.1), microbatch_size=size, memory_budget="1 GiB", autocast=torch.bfloat16
    )
    before = accumulator.state_dict()
    weights = [each.detach().clone() for each in model.parameters()]
    plan = mb.plan(accumulator, loss_fn=loss_fn, batch=torch.randn(8, 8))
    assert plan.budget == 1 << 30
    assert {1, 2, 4, 8} == {each.microbatch_size for each in plan.candidates}
    assert accumulator.state_dict() == before
    assert all(map(torch.equal, weights, model.parameters()))
    with pytest.raises(mb.MicrobatchError, match=r"mb\.Accumulator with loss_fn= and batch="):
        mb.plan(accumulator, loss_fn=loss_fn)


def test_ragged_rows_are_planned_in_tokens() -> None:
    model = nn.Sequential(nn.Embedding(5, 16), nn.Linear(16, 1))
    mask = torch.arange(6)[None] < torch.arange(1, 17).clamp(max=6)[:, None]
    batch = {"tokens": torch.ones(16, 6, dtype=torch.int64) * mask, "mask": mask}

    def masked(model: nn.Module, microbatch: dict[str, Tensor]) -> mb.Loss:
        kept = microbatch["mask"]
        return mb.Loss(sum=(model(microbatch["tokens"])[..., 0] * kept).sum(), count=kept.sum())

    accumulator = mb.Accumulator(model, SGD(model.parameters(), lr=0.1), lengths="mask", memory_budget="1 GiB")
    plan = mb.plan(accumulator, loss_fn=masked, batch=batch)
    assert plan.microbatch_tokens == 6 * plan.microbatch_size
    assert plan.as_dict()["microbatch_tokens"] == plan.microbatch_tokens


def test_a_size_that_was_asked_for_is_timed_too(monkeypatch: pytest.MonkeyPatch) -> None:
    model = deep()
    data = list(torch.randn(ROWS, TOKENS, 8))
    job = mb.Job(
        model=model,
        optimizer=SGD(model.parameters(), lr=0.1),
        loss_fn=loss_fn,
        data=data,
        batch_size=ROWS,
        microbatch_size=3,
        memory_budget="1 GiB",
    )
    plan = mb.plan(job)
    asked = next(each for each in plan.candidates if each.microbatch_size == 3)
    assert asked.seconds


# -- words ------------------------------------------------------------------------------------------------------------


def way(name: str, size: int, seconds: float | None, *, peak: int = 500, blocks: int = 0) -> Way:
    return Way(
        name=name,
        microbatch_size=size,
        microbatches=-(-32 // size),
        blocks=tuple(map(str, range(blocks))),
        predicted_bytes=peak,
        measured_bytes=None,
        seconds=seconds,
    )


def plan_of(size: int, *, seconds: dict[int, float], peak: int = 500, **changed: Any) -> Plan:
    candidates = tuple(
        Candidate(
            microbatch_size=each,
            microbatches=-(-32 // each),
            predicted_bytes=100 + each * 20,
            counted_bytes=100 + each * 20,
            measured_bytes=None,
            fits=True,
            seconds=seconds.get(each),
        )
        for each in (1, 2, 4, 8, 16, 32)
    )
    made = Plan(
        batch_size=32,
        microbatch_size=size,
        decided=True,
        why="fastest of 3 sizes",
        budget=1000,
        candidates=candidates,
        words=(),
        rests_on="",
        ways=(way(KEPT, size, seconds.get(size), peak=peak),),
        way=KEPT,
    )
    return dataclasses.replace(made, **changed)


def told(plan: Plan, *, asked: int | None = None, norms: tuple[str, ...] = (), blocks: int = 6) -> str:
    return "\n".join(words_for(plan, asked=asked, batch_norms=norms, blocks=blocks))


@pytest.mark.parametrize(
    ("rows", "kept", "said"), [(70_000, False, True), (70_000, True, False), (60_000, False, False)]
)
def test_a_heap_that_would_be_kept_with_profit_is_named(
    rows: int, kept: bool, said: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(kept_heap, "_glibc", object)
    monkeypatch.setattr(kept_heap, "_done", [kept])
    model = nn.Embedding(rows, 128)  # 34 or 31 MiB
    plan = mb.plan(
        model,
        optimizer=SGD(model.parameters(), lr=0.1),
        loss_fn=lambda model, x: model(x).square().mean(),
        batch=torch.zeros(2, 1, dtype=torch.long),
        memory_budget="2 GiB",
    )
    assert any("mb.keep_heap()" in words for words in plan.words) is said


def test_faster_is_said_of_sizes_that_were_timed_and_of_no_others() -> None:
    plan = plan_of(16, seconds={8: 1.1, 16: 1.0, 32: 1.2, 4: 1.3})
    assert "memory is at 18% of the budget with microbatches of 4: 16 would be 1.3 times as fast" in told(plan, asked=4)
    assert "times as fast" not in told(plan, asked=2)
    assert "times as fast" not in told(dataclasses.replace(plan, decided=False), asked=4)
    assert "the 8 asked for is as fast" in told(plan_of(16, seconds={8: 1.04, 16: 1.0}), asked=8)
    assert "a microbatch of 32 fits too and is slower: 1.20 times" in told(plan)


def test_a_full_memory_and_a_whole_batch_and_few_rows_are_told() -> None:
    assert "memory is at 97% of the budget of 1000 B: one more step down is safer" in told(
        plan_of(16, seconds={16: 1.0}, peak=970)
    )
    assert "one more step down" not in told(plan_of(16, seconds={16: 1.0}, peak=900))
    assert "the whole batch fits and is fastest: do not accumulate" in told(plan_of(32, seconds={32: 1.0, 16: 1.1}))
    assert "do not accumulate" not in told(plan_of(32, seconds={}, decided=False))
    assert "statistics of microbatches of 4 rows: under 8 they are noisy" in told(
        plan_of(4, seconds={4: 1.0}), norms=("bn",)
    )
    assert "noisy" not in told(plan_of(8, seconds={8: 1.0}), norms=("bn",))
    assert "activation checkpoints are not compared" in told(plan_of(8, seconds={8: 1.0}), blocks=0)


def test_what_pays_is_told_and_what_does_not() -> None:
    kept = way(KEPT, 4, 1.0)
    pays = plan_of(16, seconds={4: 1.0}, ways=(kept, way(CHECKPOINTED, 16, 0.8, blocks=4)), way=CHECKPOINTED)
    assert "checkpoints of 4 of 6 blocks: microbatches of 16 rows fit instead of 4, 1.25 times as fast" in told(pays)
    no = plan_of(4, seconds={4: 1.0}, ways=(kept, way(CHECKPOINTED, 16, 1.2, blocks=6), way(OFFLOADED, 8, 1.5)))
    assert "of all 6 blocks: microbatches of 16 rows fit instead of 4, in 1.20 times the time: no gain" in told(no)
    assert 'offload="activations": microbatches of 8 rows fit instead of 4, in 1.50 times the time' in told(no)
    same = plan_of(4, seconds={4: 1.0}, ways=(kept, way(OFFLOADED, 4, 1.5, peak=250)))
    assert "50% of the memory, 1.50 times the time of a step; memory is not what limits" in told(same)


def test_another_way_has_to_be_clearly_faster() -> None:
    kept, again = way(KEPT, 4, 1.0), way(CHECKPOINTED, 8, 0.98)
    assert make_plan._best([kept, again], kept) is kept
    faster = dataclasses.replace(again, seconds=0.9)
    assert make_plan._best([kept, faster], kept) is faster
    untimed = dataclasses.replace(kept, seconds=None)
    assert make_plan._best([untimed, faster], untimed) is untimed
    assert make_plan._best([again, faster], None) is faster


def test_the_settings_of_a_way_are_what_its_name_says() -> None:
    model = deep()
    options = mb.Accumulator(model, SGD(model.parameters(), lr=0.1), microbatch_size=1).options
    stage = memory_options.Stage(
        options=options, loss_fn=loss_fn, batch=torch.zeros(4, 8), counts=None, rows=4, budget=None
    )
    assert memory_options._options(stage, way(OFFLOADED, 4, 1.0)).offload == "activations"
    assert memory_options._options(stage, way(CHECKPOINTED, 4, 1.0, blocks=2)).checkpoint == ("0", "1")
