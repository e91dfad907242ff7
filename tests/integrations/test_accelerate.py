"""Accelerate: prepared models and optimizers, beside `accelerator.accumulate` as the negative control."""

import copy
import os
import types
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from tests.faults import RunsOut
from torch import Tensor, nn

import microbatch as mb

pytest.importorskip("accelerate")
from accelerate import Accelerator
from accelerate.state import AcceleratorState, GradientState, PartialState

from microbatch.integrations.accelerate import accumulator_for

pytestmark = pytest.mark.filterwarnings("ignore:.*set_vital.*deprecated")

TOKENS = 9


@pytest.fixture(autouse=True)
def fresh() -> Iterator[None]:
    """Accelerate's state is the process's own: each test begins without, and leaves none."""
    forget()
    yield
    forget()


def forget() -> None:
    AcceleratorState._reset_state(reset_partial_state=True)
    GradientState._reset_state()
    PartialState._reset_state()


class Tagger(nn.Module):
    def __init__(self, dropout: float = 0.0) -> None:
        super().__init__()
        self.net = nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Dropout(dropout), nn.Linear(8, 4))

    def forward(self, x: Tensor, labels: Tensor) -> Tensor:
        return F.cross_entropy(self.net(x).flatten(0, 1), labels.flatten())


def loss_fn(model: nn.Module, batch: Any) -> mb.Loss:
    n = (batch["labels"] != -100).sum()
    return mb.Loss(sum=model(**batch) * n, count=n)


def batches(number: int = 4) -> list[dict[str, Tensor]]:
    generator = torch.Generator().manual_seed(5)
    made: list[dict[str, Tensor]] = []
    for rows in [12] * (number - 1) + [10]:
        lengths = torch.randint(1, TOKENS + 1, (rows,), generator=generator)
        labels = torch.randint(4, (rows, TOKENS), generator=generator)
        labels = labels.masked_fill(torch.arange(TOKENS) >= lengths[:, None], -100)
        made.append({"x": torch.randn(rows, TOKENS, 6, generator=generator, dtype=torch.float64), "labels": labels})
    return made


def model_of(dropout: float = 0.0) -> Tagger:
    torch.manual_seed(0)
    return Tagger(dropout).double()


def weights(model: nn.Module) -> Tensor:
    return torch.cat([each.detach().double().flatten() for each in model.parameters()])


def distance(one: Tensor, other: Tensor) -> float:
    return float((one - other).norm() / other.norm())


def whole() -> tuple[Tensor, list[float]]:
    """Plain PyTorch: one backward of each whole batch."""
    model = model_of()
    optimizer = torch.optim.Adam(model.parameters(), lr=0.05)
    schedule = torch.optim.lr_scheduler.StepLR(optimizer, 2)
    losses: list[float] = []
    for batch in batches():
        optimizer.zero_grad()
        loss = model(**batch)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 0.2)
        optimizer.step()
        schedule.step()
        losses.append(loss.item())
    return weights(model), losses


def prepared(accelerator: Accelerator, model: nn.Module, *, schedules: int = 1) -> Any:
    optimizer = torch.optim.Adam(model.parameters(), lr=0.05)
    schedule = torch.optim.lr_scheduler.StepLR(optimizer, 2 * schedules)
    return accelerator.prepare(model, optimizer, schedule)


@pytest.mark.parametrize("microbatch_size", [5, "auto"])
def test_a_run_is_the_run_of_whole_batches(microbatch_size: int | str) -> None:
    accelerator = Accelerator(cpu=True)
    model, optimizer, schedule = prepared(accelerator, model_of())
    accumulator = accumulator_for(accelerator, model, optimizer, microbatch_size=microbatch_size, max_grad_norm=0.2)
    losses: list[float] = []
    for batch in batches():
        step = accumulator.step(batch, loss_fn)
        schedule.step()
        losses.append(step.loss.item())
    reference, expected = whole()
    assert distance(weights(model), reference) < 1e-12
    assert losses == pytest.approx(expected, rel=1e-12)


def test_accumulate_is_rejected_by_the_same_comparison() -> None:
    accelerator = Accelerator(cpu=True, gradient_accumulation_steps=3)
    model, optimizer, schedule = prepared(accelerator, model_of())
    for batch in batches():
        for index, part in enumerate(mb.cut(batch, 4)):
            accelerator.gradient_state._set_sync_gradients(index == -(-len(batch["x"]) // 4) - 1)
            accelerator.backward(model(**part))
            if accelerator.sync_gradients:
                accelerator.clip_grad_norm_(model.parameters(), 0.2)
            optimizer.step()
            schedule.step()
            optimizer.zero_grad()
    assert distance(weights(model), whole()[0]) > 1e-3


def test_memory_that_ends_leaves_the_same_run() -> None:
    accelerator = Accelerator(cpu=True)
    model, optimizer, schedule = prepared(accelerator, model_of())
    accumulator = accumulator_for(accelerator, model, optimizer, microbatch_size=12, max_grad_norm=0.2)
    full = RunsOut(4, 40)

    def ends(model: nn.Module, batch: Any) -> mb.Loss:
        full.armed = True
        return loss_fn(model, batch)

    with full:
        for batch in batches():
            accumulator.step(batch, ends)
            schedule.step()
    assert len(full.refused) == 2
    assert distance(weights(model), whole()[0]) < 1e-12


def test_bf16_is_no_worse_than_the_whole_batch() -> None:
    def run(*, ours: bool) -> Tensor:
        accelerator = Accelerator(cpu=True, mixed_precision="bf16")
        model, optimizer, _ = prepared(accelerator, model_of().float())
        accumulator = accumulator_for(accelerator, model, optimizer, microbatch_size=5)
        for batch in batches():
            narrow = {"x": batch["x"].float(), "labels": batch["labels"]}
            if ours:
                accumulator.step(narrow, loss_fn)
            else:
                accelerator.backward(model(**narrow))
                optimizer.step()
                optimizer.zero_grad()
        found = weights(model)
        AcceleratorState._reset_state(reset_partial_state=True)
        return found

    model = model_of()
    optimizer = torch.optim.Adam(model.parameters(), lr=0.05)
    for batch in batches():
        optimizer.zero_grad()
        model(**batch).backward()
        optimizer.step()
    exact = weights(model)
    assert distance(run(ours=True), exact) <= 1.2 * distance(run(ours=False), exact) + 1e-6


def test_a_scheduler_waits_where_a_window_is_dropped() -> None:
    accelerator = Accelerator(cpu=True)
    model, optimizer, schedule = prepared(accelerator, model_of())
    accumulator = accumulator_for(accelerator, model, optimizer, microbatch_size=5, nonfinite="skip")
    for factor in (1.0, float("inf"), 1.0):
        accumulator.step(batches()[0], lambda model, batch, by=factor: mb.Loss(sum=model(**batch) * by, count=1))
        schedule.step()
    assert schedule.scheduler.last_epoch == 2
    assert accumulator.skipped == 1


def test_the_scaler_of_the_accelerator_skips_a_step_that_overflows() -> None:
    """Accelerate makes a scaler on a GPU alone; this one is put where it would be."""
    accelerator = Accelerator(cpu=True)
    accelerator.scaler = torch.amp.GradScaler("cpu", init_scale=2.0**126, growth_interval=100)
    model, optimizer, schedule = prepared(accelerator, model_of().float())
    accumulator = accumulator_for(accelerator, model, optimizer, microbatch_size=5)
    applied: list[bool] = []
    for _ in range(20):
        batch = {**batches()[0], "x": batches()[0]["x"].float() * 100}
        applied.append(accumulator.step(batch, lambda model, b: mb.Loss(sum=model(**b) * 100, count=1)).applied)
        schedule.step()
    assert applied[0] is False
    assert applied[-1] is True
    assert schedule.scheduler.last_epoch == sum(applied)
    assert accelerator.scaler.get_scale() < 2.0**126


def test_saved_state_resumes_bit_for_bit(tmp_path: Path) -> None:
    def run(start: int, load: Path | None = None) -> Tensor:
        accelerator = Accelerator(cpu=True)
        model, optimizer, schedule = prepared(accelerator, model_of(0.3))
        accumulator = accumulator_for(accelerator, model, optimizer, microbatch_size=5, dropout="by_row")
        if load is not None:
            accelerator.load_state(str(load))
        for index, batch in enumerate(batches()):
            if index >= start:
                accumulator.step(batch, loss_fn)
                schedule.step()
                if load is None and start == 0 and index == 1:
                    accelerator.save_state(str(tmp_path / "state"))
        AcceleratorState._reset_state(reset_partial_state=True)
        return weights(model)

    through = run(0)
    assert torch.equal(run(2, load=tmp_path / "state"), through)
    assert not torch.equal(run(2), through)


# -- refusals ---------------------------------------------------------------------------------------------------------


def test_accumulation_of_its_own_is_refused() -> None:
    accelerator = Accelerator(cpu=True, gradient_accumulation_steps=4)
    model, optimizer, _ = prepared(accelerator, model_of())
    with pytest.raises(mb.errors.ConfigError, match=r"gradient_accumulation_steps=4.*leave it at 1"):
        accumulator_for(accelerator, model, optimizer)


@pytest.mark.parametrize("kind", ["DEEPSPEED", "MEGATRON_LM"])
def test_engines_are_refused(kind: str) -> None:
    model = model_of()
    accelerator = types.SimpleNamespace(distributed_type=types.SimpleNamespace(name=kind))
    with pytest.raises(mb.errors.ConfigError, match=f"Accelerate runs {kind}"):
        accumulator_for(accelerator, model, torch.optim.SGD(model.parameters(), lr=0.1))


def test_the_old_sharding_is_refused() -> None:
    class FullyShardedDataParallel(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = model_of()

    model, accelerator = FullyShardedDataParallel(), Accelerator(cpu=True)
    with pytest.raises(mb.errors.ConfigError, match="fsdp_version=2"):
        accumulator_for(accelerator, model, torch.optim.SGD(model.parameters(), lr=0.1))


# -- ranks ------------------------------------------------------------------------------------------------------------


def on_two_ranks(rank: int, ranks: int) -> Any:
    os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": "2", "ACCELERATE_USE_CPU": "true"}
    os.environ |= {"MASTER_ADDR": "localhost", "MASTER_PORT": "29500"}
    accelerator = Accelerator(cpu=True)
    assert accelerator.num_processes == 2
    first = model_of()
    # The scheduler of Accelerate takes a step for each rank.
    model, optimizer, schedule = prepared(accelerator, copy.deepcopy(first), schedules=2)
    accumulator = accumulator_for(accelerator, model, optimizer, microbatch_size=3, max_grad_norm=0.2)
    theirs, own, _ = prepared(accelerator, copy.deepcopy(first), schedules=2)
    losses: list[float] = []
    for batch in batches():
        share = {name: value[:8] if rank == 0 else value[8:] for name, value in batch.items()}
        losses.append(accumulator.step(share, loss_fn).loss.item())
        schedule.step()
        if len(share["x"]):
            accelerator.backward(theirs(**share))
            accelerator.clip_grad_norm_(theirs.parameters(), 0.2)
            own.step()
            own.zero_grad()
    return weights(model), losses, weights(theirs)


def test_two_ranks_with_uneven_rows(run_ranks: Any, tmp_path: Path) -> None:
    reference, expected = whole()
    for ours, losses, theirs in run_ranks(on_two_ranks, 2, tmp_path):
        assert distance(ours, reference) < 1e-12
        assert losses == pytest.approx(expected, rel=1e-12)
        assert distance(theirs, reference) > 1e-3
