"""The loop: order of samples, schedule, evaluation, metrics, and the comparison that leaves no trace."""

import json
import math
from collections import Counter
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn

from microbatch.loss.loss import Loss
from microbatch.train.compare import compare
from microbatch.train.config import load_settings
from microbatch.train.data import BatchOrder, Position
from microbatch.train.evaluate import evaluate
from microbatch.train.job import Job
from microbatch.train.resolve import resolve
from microbatch.train.run_events import RunEvent, StepLogged
from microbatch.train.rundir import MetricsLog, RunDirectory
from microbatch.train.schedule import make_schedulers, warmup_cosine
from microbatch.train.training_loop import TrainingLoop
from microbatch.warned import MicrobatchWarning

CPU = torch.device("cpu")


def samples(number: int, *, seed: int = 0) -> list[dict[str, Tensor]]:
    """Rows with very different numbers of real targets, so that a mean of means is far from the mean."""
    generator = torch.Generator().manual_seed(seed)
    made: list[dict[str, Tensor]] = []
    for _ in range(number):
        x = torch.randn(5, 4, generator=generator)
        real = torch.arange(5) < torch.randint(1, 6, (), generator=generator)
        made.append({"x": x, "y": torch.where(real, (x.sum(1) > 0).long(), -100)})
    return made


def token_loss(model: nn.Module, microbatch: dict[str, Tensor]) -> Loss:
    logits = model(microbatch["x"]).flatten(0, 1)
    labels = microbatch["y"].flatten()
    return Loss(sum=F.cross_entropy(logits, labels, ignore_index=-100, reduction="sum"), count=(labels >= 0).sum())


def named_token_loss(model: nn.Module, microbatch: dict[str, Tensor]) -> dict[str, Loss]:
    return {"loss": token_loss(model, microbatch)}


def a_job(model: nn.Module | None = None, **changes: Any) -> Job:
    model = model or nn.Sequential(nn.Linear(4, 16), nn.Tanh(), nn.Linear(16, 2))
    values: dict[str, Any] = {
        "model": model,
        "optimizer": torch.optim.AdamW(model.parameters(), lr=1e-2),
        "loss_fn": token_loss,
        "data": samples(22),
        "validation": samples(9, seed=1),
        "batch_size": 8,
        "microbatch_size": 3,
        "steps": 7,
        "unit": "tokens",
    }
    return Job(**(values | changes))


def run_job(job: Job, folder: Path, **flags: Any) -> tuple[TrainingLoop, list[dict[str, Any]]]:
    config = resolve(load_settings(flags), job, device=CPU)
    directory = RunDirectory(folder)
    directory.start(config="", files={})
    events: list[RunEvent] = []
    loop = TrainingLoop(job, config=config, run=directory, listeners=[events.append])
    assert loop.run() is None
    lines = [json.loads(line) for line in directory.metrics.read_text().splitlines()]
    assert [event.metrics["step"] for event in events if isinstance(event, StepLogged)] == [x["step"] for x in lines]
    return loop, lines


@given(
    number=st.integers(1, 60), batch_size=st.integers(1, 20), seed=st.integers(0, 2**63 - 1), epochs=st.integers(1, 3)
)
def test_every_epoch_reads_every_sample_once(number: int, batch_size: int, seed: int, epochs: int) -> None:
    order, position, seen = BatchOrder(number, batch_size=batch_size, seed=seed), Position(), Counter[int]()
    for step in range(epochs * order.batches_per_epoch):
        chosen, following = order.take(position)
        assert len(chosen) == min(batch_size, number - position.start)
        # A new order from the position alone gives the same batch: that is what resuming does.
        assert BatchOrder(number, batch_size=batch_size, seed=seed).take(position) == (chosen, following)
        seen.update(chosen)
        position = following
        assert position.epoch == (step + 1) // order.batches_per_epoch
    assert seen == Counter(dict.fromkeys(range(number), epochs))


def test_epochs_and_seeds_have_orders_of_their_own() -> None:
    def first(seed: int, epoch: int) -> list[int]:
        return BatchOrder(50, batch_size=50, seed=seed).take(Position(epoch))[0]

    orders = [first(seed, epoch) for seed in range(3) for epoch in range(3)]
    assert len({tuple(order) for order in orders}) == 9


def test_the_schedule_rises_to_the_peak_and_falls_to_the_floor() -> None:
    curve = [warmup_cosine(s, steps=20, warmup_steps=4, final_fraction=0.1) for s in range(20)]
    assert curve[:5] == pytest.approx([0.2, 0.4, 0.6, 0.8, 1.0])
    assert all(a > b for a, b in pairwise(curve[4:]))
    assert curve[-1] == pytest.approx(0.1)
    assert warmup_cosine(0, steps=1, warmup_steps=0, final_fraction=0.1) == 1.0


def test_several_groups_keep_their_proportions() -> None:
    parameters = [nn.Parameter(torch.zeros(1)) for _ in range(2)]
    optimizer = torch.optim.SGD([{"params": parameters[:1], "lr": 1.0}, {"params": parameters[1:], "lr": 0.1}])
    make_schedulers([optimizer], kind="cosine", steps=10, warmup_steps=3)
    assert [group["lr"] for group in optimizer.param_groups] == pytest.approx([0.25, 0.025])


def test_training_follows_plain_pytorch(tmp_path: Path) -> None:
    """The same batches, schedule and clipping by hand, each batch whole, give the same losses and weights."""
    torch.manual_seed(3)
    job = a_job(max_grad_norm=0.2, warmup_steps=2)
    twin = nn.Sequential(nn.Linear(4, 16), nn.Tanh(), nn.Linear(16, 2))
    twin.load_state_dict(job.model.state_dict())
    optimizer = torch.optim.AdamW(twin.parameters(), lr=1e-2)
    _, lines = run_job(job, tmp_path / "run")
    order, position = BatchOrder(22, batch_size=8, seed=0), Position()
    for step, line in enumerate(lines):
        chosen, position = order.take(position)
        for group in optimizer.param_groups:
            group["lr"] = 1e-2 * warmup_cosine(step, steps=7, warmup_steps=2, final_fraction=0.1)
        loss = token_loss(twin, job.collate([job.data[index] for index in chosen])).mean
        loss.backward()
        norm = nn.utils.clip_grad_norm_(twin.parameters(), 0.2)
        optimizer.step()
        optimizer.zero_grad()
        assert line["loss"] == pytest.approx(loss.item(), rel=1e-5)
        assert line["grad_norm"] == pytest.approx(norm.item(), rel=1e-4)
        assert line["lr"] == pytest.approx(optimizer.param_groups[0]["lr"])
        assert line["samples"] == len(chosen)
    assert [line["samples"] for line in lines] == [8, 8, 6, 8, 8, 6, 8]
    for ours, theirs in zip(job.model.parameters(), twin.parameters(), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-5)


def test_a_dropped_window_does_not_move_the_schedule(tmp_path: Path) -> None:
    calls = 0

    def sometimes_infinite(model: nn.Module, microbatch: dict[str, Tensor]) -> Loss:
        nonlocal calls
        calls += 1
        loss = token_loss(model, microbatch)
        return Loss(sum=loss.sum * math.inf, count=loss.count) if 4 <= calls <= 6 else loss

    job = a_job(loss_fn=sometimes_infinite, evaluate=named_token_loss)
    _, lines = run_job(job, tmp_path / "run", nonfinite="skip")
    applied = [line["applied"] for line in lines]
    assert applied == [True, False, True, True, True, True, True]
    assert lines[1]["lr"] == lines[2]["lr"] != lines[3]["lr"]
    assert lines[1]["loss"] is None  # strict JSON has no infinity


def test_the_learning_rate_flag_moves_every_group(tmp_path: Path) -> None:
    model = nn.Linear(4, 2)
    groups = [{"params": [model.weight], "lr": 0.2}, {"params": [model.bias], "lr": 0.1}]
    job = a_job(model, optimizer=torch.optim.SGD(groups))
    loop, lines = run_job(job, tmp_path / "run", learning_rate=0.4, schedule="constant")
    assert lines[0]["lr"] == pytest.approx(0.4)
    assert loop.job.optimizer.param_groups[1]["lr"] == pytest.approx(0.2)  # type: ignore[union-attr]


def test_evaluation_pools_over_the_set_whatever_the_cut() -> None:
    job = a_job()
    whole = token_loss(job.model, job.collate(list(job.validation)))  # type: ignore[arg-type]
    for size in (1, 2, 4, 9):
        found = evaluate(job, microbatch_size=size, device=CPU)
        assert found["loss"] == pytest.approx(whole.mean.item(), rel=1e-6)
    rows = [token_loss(job.model, job.collate([row])).mean.item() for row in job.validation]  # type: ignore[union-attr]
    assert sum(rows) / len(rows) != pytest.approx(whole.mean.item(), rel=1e-3)  # the mean of means is another number


class Restless(nn.Module):
    """Draws random numbers, writes buffers and has a part that is frozen in evaluation mode."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.norm, self.last = nn.Linear(4, 8), nn.BatchNorm1d(5), nn.Linear(8, 2)
        self.frozen = nn.Dropout(0.5).eval()
        self.register_buffer("calls", torch.zeros(()))

    def forward(self, x: Tensor) -> Tensor:
        self.calls += 1
        return self.last(self.frozen(self.norm(self.first(x))) + 0.1 * torch.rand(8))


@pytest.mark.parametrize(
    ("by_job", "flag", "calls"), [("each", None, 6), (None, "each", 6), ("each", "once", 2), (None, "mean", 2)]
)
def test_buffers_move_as_the_settings_say_and_else_the_job(
    by_job: str | None, flag: str | None, calls: int, tmp_path: Path
) -> None:
    job = a_job(Restless(), buffers=by_job, batch_norm="microbatch", validation=None, steps=2)
    run_job(job, tmp_path / "run", buffers=flag)  # 8 rows are 3 microbatches, and the comparison leaves no trace
    assert float(job.model.get_buffer("calls")) == calls


class Block(nn.Module):
    """Counts its forward passes."""

    def __init__(self) -> None:
        super().__init__()
        self.linear, self.calls = nn.Linear(4, 4), 0

    def forward(self, x: Tensor) -> Tensor:
        self.calls += 1
        return self.linear(x).tanh()


def test_checkpoint_recomputes_blocks_and_changes_no_weight(tmp_path: Path) -> None:
    calls, weights = dict[str, int](), dict[str, list[Tensor]]()
    for flag in ("none", "all", "auto"):
        torch.manual_seed(0)
        blocks = [Block() for _ in range(3)]
        job = a_job(nn.Sequential(*blocks, nn.Linear(4, 2)), validation=None, steps=2)
        run_job(job, tmp_path / flag, checkpoint=flag, compare=False)
        calls[flag], weights[flag] = blocks[1].calls, [each.detach() for each in job.model.parameters()]
    assert calls["all"] == 2 * calls["none"] > 0
    for found in weights.values():
        assert all(map(torch.equal, found, weights["none"]))


def test_buffers_that_move_with_every_microbatch_are_warned_of(tmp_path: Path) -> None:
    job = a_job(Restless(), batch_norm="microbatch", validation=None, steps=2)
    with pytest.warns(MicrobatchWarning, match=r"buffers move with every microbatch: calls \(of Restless\)"):
        run_job(job, tmp_path / "run")


def everything(job: Job) -> dict[str, Any]:
    """Copy all state that training depends on."""
    optimizer = job.optimizer
    assert isinstance(optimizer, torch.optim.Optimizer)
    return {
        "weights": {name: value.clone() for name, value in job.model.state_dict().items()},
        "gradients": [None if p.grad is None else p.grad.clone() for p in job.model.parameters()],
        "modes": [module.training for module in job.model.modules()],
        "optimizer": [
            {key: value.clone() if isinstance(value, Tensor) else value for key, value in state.items()}
            for state in optimizer.state.values()
        ],
        "groups": [{key: value for key, value in group.items() if key != "params"} for group in optimizer.param_groups],
        "random": torch.get_rng_state(),
    }


def assert_same(before: dict[str, Any], after: dict[str, Any]) -> None:
    torch.testing.assert_close(after, before, rtol=0, atol=0, equal_nan=True)


def trained(job: Job) -> Job:
    """Take a step and leave a gradient behind, as in the middle of somebody's window."""
    batch = job.collate([job.data[index] for index in range(4)])
    token_loss(job.model, batch).mean.backward()
    job.optimizer.step()  # type: ignore[union-attr]
    return job


def test_evaluation_touches_no_training_state() -> None:
    job = trained(a_job(Restless()))
    before = everything(job)
    evaluate(job, microbatch_size=2, device=CPU)
    assert_same(before, everything(job))
    with torch.no_grad():
        job.model.eval()(torch.zeros(1, 5, 4))
    with pytest.raises(AssertionError):  # the control: the comparison sees what evaluation would have changed
        assert_same(before, everything(job))


@pytest.mark.parametrize("make", [Restless, lambda: None], ids=["restless", "plain"])
def test_the_comparison_leaves_no_trace(make: Any) -> None:
    job = trained(a_job(make()))
    before = everything(job)
    config = resolve(load_settings({}), job, device=CPU)
    compare(job, job.collate(samples(8)), config=config, seconds=0.0)
    assert_same(before, everything(job))


def test_the_comparison_measures_what_it_says() -> None:
    job = a_job(nn.Sequential(nn.Linear(4, 64), nn.Tanh(), nn.Linear(64, 2)).double())
    batch = job.collate([{"x": row["x"].double(), "y": row["y"]} for row in samples(16)])
    config = resolve(load_settings({"batch_size": 16}), job, device=CPU)
    found = compare(job, batch, config=config, seconds=0.0)
    assert found.accumulated.relative_error is not None
    assert found.accumulated.relative_error <= 1e-12
    assert found.hand_written.relative_error is not None
    assert found.hand_written.relative_error > 1e-3  # its mean of means is another gradient, and is seen
    assert found.accumulated.peak_bytes is not None
    assert found.whole.peak_bytes is not None
    assert found.accumulated.peak_bytes < found.whole.peak_bytes
    assert min(way.seconds or 0 for way in (found.accumulated, found.whole, found.hand_written)) > 0


def test_random_losses_are_compared_in_evaluation_mode_and_said() -> None:
    model = nn.Sequential(nn.Linear(4, 16), nn.Dropout(0.5), nn.Linear(16, 2))
    job = a_job(model)
    config = resolve(load_settings({}), job, device=CPU)
    found = compare(job, job.collate(samples(8)), config=config, seconds=0.0)
    assert found.accumulated.relative_error is not None
    assert found.accumulated.relative_error < 1e-5
    assert any("evaluation mode" in note for note in found.notes)


def test_the_metrics_forget_what_no_checkpoint_knows(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    path.write_text('{"step": 1}\n{"step": 2}\n{"step": 3}\n{"st')
    log = MetricsLog(path, after_step=2)
    log.write({"step": 3, "loss": math.nan})
    log.close()
    assert path.read_text() == '{"step": 1}\n{"step": 2}\n{"step": 3, "loss": null}\n'


def test_a_run_writes_what_it_promises(tmp_path: Path) -> None:
    _, lines = run_job(a_job(), tmp_path, epochs=2.0, validate_every=2, checkpoint_every=4, keep_checkpoints=2)
    assert [line["step"] for line in lines] == [1, 2, 3, 4, 5, 6]  # 2 epochs of 3 batches
    assert [line["step"] for line in lines if "validation" in line] == [2, 4, 6]
    assert [line["epoch"] for line in lines] == [0, 0, 0, 1, 1, 1]
    assert lines[0]["peak_bytes"] > 0
    assert sorted(path.name for path in (tmp_path / "checkpoints").iterdir()) == ["step-000004", "step-000006"]


def test_validation_runs_at_the_size_that_the_run_has_found(tmp_path: Path) -> None:
    validated: list[int] = []

    def tight(model: nn.Module, microbatch: dict[str, Tensor]) -> Loss:
        rows = len(microbatch["x"])
        if type(microbatch["x"]) is Tensor and rows > 2:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return token_loss(model, microbatch)

    def scores(model: nn.Module, microbatch: dict[str, Tensor]) -> dict[str, Loss]:
        validated.append(len(microbatch["x"]))
        return named_token_loss(model, microbatch)

    job = a_job(loss_fn=tight, evaluate=scores, microbatch_size=None, steps=30)
    loop, lines = run_job(job, tmp_path, validate_every=10)
    assert loop.config.microbatch_size == 8  # what the run would have fallen back to
    assert loop.microbatch_size == lines[-1]["microbatch_size"] <= 2
    assert len(validated) >= 3 * 5
    assert max(validated) <= 2
    again = TrainingLoop(job, config=loop.config, run=loop.run_directory)
    again.restore()
    assert again.microbatch_size == loop.microbatch_size


def test_the_noise_scale_is_written_where_it_was_measured(tmp_path: Path) -> None:
    model = nn.Linear(4, 2)
    job = a_job(
        model, optimizer=torch.optim.SGD(model.parameters(), lr=1e-3), data=samples(64), batch_size=32, steps=12
    )
    _, lines = run_job(job, tmp_path / "run")
    assert [line["step"] for line in lines if "noise_scale" in line] == [
        11
    ]  # the meter is on in the first and the 21st
    assert lines[10]["noise_scale"] > 0
