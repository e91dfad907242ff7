"""Pipelines: the whole batch's gradient on every stage, by torch's own schedules, beside data-parallel ranks too."""

import datetime as dt
import re
import warnings
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.pipelining import PipelineStage, ScheduleGPipe, ScheduleInterleaved1F1B, SplitPoint, pipeline

from microbatch.errors import ConfigError, LossError, WindowError
from microbatch.loss.loss import Loss
from microbatch.ranks.pipeline import Pipeline
from microbatch.step.accumulator import Accumulator
from microbatch.step.options import Ranks, Sums
from microbatch.train.config import Settings
from microbatch.train.job import Job
from microbatch.train.resolve import resolve

Batch = dict[str, Tensor]
LossFn = Callable[[nn.Module, Batch], Any]
LENGTH = 5
MIXED = [5, 1, 2, 4, 0, 3, 5, 2, 1, 4, 0]
SCHEDULES = ["GPipe", "1F1B", "Interleaved1F1B", "LoopedBFS"]
ROUNDS = {"tokens": MIXED, "one row": MIXED[:1], "fewer": MIXED[3:9]}
CPU = torch.device("cpu")


class Block(nn.Module):
    """One of four parts of a classifier of tokens; takes a number for each beside what the part before it returns."""

    def __init__(self, width: int, out: int) -> None:
        super().__init__()
        self.layer = nn.Linear(width, out)
        self.gain = nn.Parameter(torch.ones(out))

    def forward(self, x: Tensor, scale: Tensor | None = None) -> Tensor:
        y = torch.tanh(self.layer(x))
        with torch.autocast("cpu", enabled=False):  # whose backward is not under autocast either
            y = y.to(self.gain.dtype) @ torch.diag(self.gain)
        return y if scale is None else y * scale


def make_blocks(dtype: torch.dtype = torch.float64) -> list[Block]:
    torch.manual_seed(5)
    return [Block(*widths).to(dtype) for widths in ((3, 6), (6, 5), (5, 5), (5, 4))]


class Part(nn.Module):
    """Some of the blocks, one after the other."""

    def __init__(self, blocks: list[Block]) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(blocks)

    def forward(self, x: Tensor, scale: Tensor | None = None) -> Tensor:
        for block in self.blocks:
            x = block(x, scale=scale)
        return x


class Whole(Part):
    """All blocks, on one device."""

    def __init__(self, dtype: torch.dtype = torch.float64) -> None:
        super().__init__(make_blocks(dtype))


def make_plain() -> nn.Module:
    torch.manual_seed(5)
    return nn.Sequential(nn.Linear(3, 6), nn.Tanh(), nn.Linear(6, 4)).double()


def make_batch(tokens: list[int]) -> Batch:
    """Return a row for every number of tokens, the rest of its labels masked."""
    generator = torch.Generator().manual_seed(11)
    x = torch.randn(len(tokens), LENGTH, 3, dtype=torch.float64, generator=generator)
    labels = torch.randint(4, (len(tokens), LENGTH), generator=generator)
    for row, number in enumerate(tokens):
        labels[row, number:] = -100
    return {"x": x, "labels": labels}


def rows(batch: Batch, start: int, stop: int) -> Batch:
    return {name: tensor[start:stop] for name, tensor in batch.items()}


def token_loss(model: nn.Module, batch: Batch) -> Loss:
    logits, labels = model(batch["x"]).flatten(0, 1), batch["labels"].flatten()
    return Loss(sum=F.cross_entropy(logits, labels, reduction="sum"), count=(labels >= 0).sum())


def row_mean(model: nn.Module, batch: Batch) -> Tensor:
    return model(batch["x"]).square().mean()


def two_terms(model: nn.Module, batch: Batch) -> dict[str, Loss]:
    logits, labels = model(batch["x"]), batch["labels"]
    tokens = F.cross_entropy(logits.flatten(0, 1), labels.flatten(), reduction="sum")
    return {
        "tokens": Loss(sum=tokens, count=(labels >= 0).sum()),
        "size": Loss(sum=0.1 * logits.square().sum(), count=len(labels)),
    }


def for_every_stage(model: nn.Module, batch: Batch) -> Loss:
    """Give every stage a number for each row, by name."""
    y = model(batch["x"], scale=batch["x"].mean((1, 2), keepdim=True))
    return Loss(sum=y.square().sum(), count=len(y))


def by_position(model: nn.Module, batch: Batch) -> Loss:
    """Give every stage what has as many rows as the last microbatch, and none of the batch's."""
    y = model(batch["x"], scale=torch.arange(1.0, 6.0, dtype=torch.float64).view(1, LENGTH, 1))
    return Loss(sum=y.square().sum(), count=len(y))


def nothing_masked(model: nn.Module, batch: Batch) -> Loss | None:
    """Leave a microbatch out that has no labels."""
    return token_loss(model, batch) if bool((batch["labels"] >= 0).any()) else None


def two_counts(batch: Batch) -> dict[str, Any]:
    return {"tokens": (batch["labels"] >= 0).sum(), "size": len(batch["labels"])}


class World:
    """This rank's stages of the blocks, and steps of them; ``pp`` ranks have the stages between them."""

    def __init__(
        self, ranks: int, *, pp: int = 2, schedule: str = "1F1B", dtype: torch.dtype = torch.float64, **more: Any
    ) -> None:
        if pp not in MESHES:  # all ranks make a group together
            MESHES[pp] = init_device_mesh("cpu", (ranks // pp, pp), mesh_dim_names=("dp", "pp"))
        mesh, per = MESHES[pp], 2 if schedule in SCHEDULES[2:] else 1
        rank, number, group = mesh["pp"].get_local_rank(), pp * per, more.pop("group", mesh["pp"].get_group())
        self.blocks = make_blocks(dtype)
        self.own = [list(range(index * 4 // number, (index + 1) * 4 // number)) for index in range(rank, number, pp)]
        parts = [Part([self.blocks[i] for i in own]) for own in self.own]
        stages = [PipelineStage(part, rank + i * pp, number, CPU, group=group) for i, part in enumerate(parts)]
        self.model = Pipeline(stages, schedule=schedule)
        self.optimizer = torch.optim.SGD(self.model.parameters(), lr=0.1)
        self.events: list[str] = []
        settings: dict[str, Any] = {"microbatch_size": 2, "listeners": [lambda e: self.events.append(type(e).__name__)]}
        if ranks > pp:
            settings["ranks"] = Ranks(group=mesh["dp"])
        self.accumulator = Accumulator(self.model, self.optimizer, **(settings | more))
        self.seen: list[dict[str, Tensor]] = []
        self.optimizer.register_step_pre_hook(lambda *_: self.seen.append(self.named(grad=True)))
        self.pipeline = mesh["dp"].get_local_rank()

    def named(self, *, grad: bool = False) -> dict[str, Tensor]:
        """Return this rank's part of the whole model's parameters, or of their gradients, by their names there."""
        found = {
            f"blocks.{i}.{name}": parameter.grad if grad else parameter.detach()
            for own in self.own
            for i in own
            for name, parameter in self.blocks[i].named_parameters()
        }
        return {name: tensor.clone() for name, tensor in found.items() if tensor is not None}

    def step(self, batch: Batch, loss_fn: LossFn, **more: Any) -> dict[str, Any]:
        self.seen.clear()
        before = self.named()
        step = self.accumulator.step(batch, loss_fn, **more)
        return {
            "gradients": self.seen[0] if self.seen else {},
            "loss": step.loss,
            "terms": dict(step.terms),
            "count": step.count,
            "samples": step.samples,
            "microbatches": step.microbatches,
            "grad_norm": step.grad_norm,
            "applied": step.applied,
            "comm_calls": step.comm_calls,
            "clean": self.is_as(before),
        }

    def fail(self, batch: Batch, loss_fn: LossFn, **more: Any) -> dict[str, Any]:
        """Take a step that fails, and say how, and whether everything is as before."""
        before = self.named()
        try:
            self.accumulator.step(batch, loss_fn, **more)
        except Exception as failure:  # noqa: BLE001 - told to the test
            text = "\n".join([f"{type(failure).__name__}: {failure}", *getattr(failure, "__notes__", [])])
            return {"text": text, "clean": self.is_as(before)}
        return {"text": "nothing", "clean": False}

    def is_as(self, before: dict[str, Tensor]) -> bool:
        now = self.named()
        return all(torch.equal(tensor, now[name]) for name, tensor in before.items()) and not self.named(grad=True)


MESHES: dict[int, Any] = {}


# -- the cases, all of them run on every rank of one start of the processes -------------------------------------------


def cases_of_two(rank: int, ranks: int) -> dict[str, Any]:
    return {name: case(partial(World, ranks), rank) for name, case in CASES_OF_TWO.items()}


def exact(world: Callable[..., World], rank: int) -> Any:
    del rank
    found: dict[str, Any] = {}
    for schedule in SCHEDULES:
        now = world(schedule=schedule)
        # A short last microbatch; then fewer microbatches than stages; then as many as before.
        for name, tokens in ROUNDS.items():
            found[f"{schedule}, {name}"] = now.step(make_batch(tokens), token_loss)
        found[f"{schedule}, weights"] = now.named()
        found[f"{schedule}, events"] = now.events
    return found


def losses(world: Callable[..., World], rank: int) -> Any:
    """Take one step each of losses of other kinds."""
    del rank
    batch = make_batch(MIXED)
    return {
        "mean": world().step(batch, row_mean),
        "terms": world(max_grad_norm=0.01).step(batch, two_terms, counts=two_counts),
        "every stage": world().step(batch, for_every_stage),
        "no rows": world().step(batch, by_position),
        "none": world().step(batch, nothing_masked),
    }


def nonfinite(world: Callable[..., World], rank: int) -> Any:
    """Let the loss be NaN, and the gradient infinite on the first stage alone; then go on."""
    batch, bad = make_batch(MIXED), make_batch(MIXED)
    bad["x"][3] = torch.nan
    now, found = world(nonfinite="skip"), {}
    found["loss"] = now.step(bad, token_loss)
    handle = now.blocks[0].gain.register_hook(lambda grad: grad * torch.inf)
    found["gradient"] = now.step(batch, token_loss)
    found["raise"] = world().fail(bad, token_loss)
    handle.remove()
    found["next"], found["skipped"] = now.step(batch, token_loss), now.accumulator.skipped
    return found


def failures(world: Callable[..., World], rank: int) -> Any:
    """Fail in the loss function, in what it does with the model, and in what the ranks are given; then go on."""
    batch = make_batch(MIXED)

    def raises(model: nn.Module, batch: Batch) -> Any:
        loss = token_loss(model, batch)
        if bool((batch["labels"] >= 0).sum() == 7):
            raise KeyError("no such label")
        return loss

    def ragged(model: nn.Module, batch: Batch) -> Any:
        return model(batch["x"][:, : 1 + int((batch["labels"] >= 0).sum(1).max())]).mean()

    now = world()
    weight = torch.ones(3, dtype=torch.float64, requires_grad=True)
    found = {
        "raises": now.fail(batch, raises),
        "twice": now.fail(batch, lambda model, b: (model(b["x"]) + model(b["x"])).mean()),
        "never": now.fail(batch, lambda model, b: b["x"].mean()),
        "attribute": now.fail(batch, lambda model, b: model(b["x"]).mean() * model.gain),
        "graph": now.fail(batch, lambda model, b: model(b["x"] * weight).mean()),
        "ragged": now.fail(batch, ragged),
        "batches": now.fail(make_batch(MIXED[: 8 + rank]), row_mean),
        "shares": now.fail(rows(batch, 4 * rank, 4 * rank + 4), row_mean),
        "no rows left": now.fail(batch, lambda model, b: model(b["x"]).mean(), counts={"other": 1}),
        "empty": now.fail(rows(batch, 0, 0), row_mean),
    }
    return found | {"next": now.step(batch, token_loss)}


def low_precision(world: Callable[..., World], rank: int) -> Any:
    """Add up many gradients of the same size in bfloat16 weights, and run under autocast."""
    del rank
    now = world(schedule="GPipe", dtype=torch.bfloat16, microbatch_size=1)
    row = {name: tensor.expand(264, *tensor.shape[1:]) for name, tensor in make_batch([2]).items()}
    row["x"] = row["x"].bfloat16()
    many = now.step(row, row_mean)
    now = world(dtype=torch.float32, autocast=torch.bfloat16)
    batch = make_batch(MIXED)
    return {"many": many, "autocast": now.step(batch | {"x": batch["x"].float()}, token_loss)}


def random(world: Callable[..., World], rank: int) -> Any:
    """Draw random numbers in the loss function, before the model is called and after."""
    drawn: list[Tensor] = []

    def noisy(model: nn.Module, batch: Batch) -> Tensor:
        noise = torch.rand(batch["x"].shape, dtype=torch.float64)
        y = model(batch["x"] + noise)
        drawn.extend([noise, torch.rand(2)])
        return y.mean()

    now = world()
    torch.manual_seed(rank)
    before = torch.get_rng_state()
    result = now.step(make_batch(MIXED), noisy)
    return {"drawn": drawn, "loss": result["loss"], "moved": not torch.equal(before, torch.get_rng_state())}


def traced(world: Callable[..., World], rank: int) -> Any:
    """Let torch split a model."""
    like = world()
    pipe = pipeline(make_plain(), mb_args=(make_batch(MIXED)["x"][:2],), split_spec={"2": SplitPoint.BEGINNING})
    model = Pipeline(pipe.build_stage(rank, CPU))
    seen: dict[str, Tensor] = {}
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    named = {name.removeprefix("parts.0."): parameter for name, parameter in model.named_parameters()}
    optimizer.register_step_pre_hook(
        lambda *_: seen.update({n: p.grad for n, p in named.items() if p.grad is not None})
    )
    like.accumulator = Accumulator(model, optimizer, microbatch_size=2)
    return like.step(make_batch(MIXED), token_loss) | {"gradients": {n: g.clone() for n, g in seen.items()}}


def twins(world: Callable[..., World], rank: int) -> Any:
    """Give two stages the same weights."""
    like = world()
    torch.manual_seed(7)
    model = Pipeline(PipelineStage(nn.Linear(3, 3), rank, 2, CPU))
    like.accumulator = Accumulator(model, torch.optim.SGD(model.parameters(), lr=0.1), microbatch_size=2)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        for _ in range(2):
            like.accumulator.step(torch.randn(4, 3), lambda model, x: model(x).mean())
    return [str(each.message) for each in caught]


def broken(world: Callable[..., World], rank: int) -> Any:
    """Fail in the forward pass of the second stage, where the first one waits for its gradients."""
    # A group of its own, because it is of no use afterwards.
    group = dist.new_group(timeout=dt.timedelta(seconds=1))
    now, passes = world(group=group), []

    def fail(*_: object) -> None:
        passes.append(1)
        if rank == 1 and len(passes) == 3:
            raise ValueError("this layer does not like it")

    now.blocks[3].register_forward_pre_hook(fail)
    found = now.fail(make_batch(MIXED), row_mean)
    dist.barrier()  # the first one hears of nothing before its time is over
    return found


CASES_OF_TWO = {
    case.__name__: case for case in (exact, losses, nonfinite, failures, low_precision, random, traced, twins, broken)
}


def cases_of_four(rank: int, ranks: int) -> dict[str, Any]:
    """Run two pipelines of two stages with different rows, and one of four stages."""
    four = World(ranks, pp=4).step(make_batch(MIXED[:3]), token_loss)
    found: dict[str, Any] = {"four stages": four, "pipeline": World(ranks).pipeline}
    for name, first in {"uneven": 8, "all": len(MIXED)}.items():
        now = World(ranks, max_grad_norm=0.01)
        shares = [(0, first), (first, len(MIXED))]
        batch = rows(make_batch(MIXED), *shares[now.pipeline])
        found[f"{name}, tokens"] = now.step(batch, token_loss)
        found[f"{name}, weights"] = now.named()
        found[f"{name}, terms"] = World(ranks).step(batch, two_terms, counts=two_counts)
    now = World(ranks, nonfinite="skip")
    batch = make_batch(MIXED)
    bad = batch | {"x": batch["x"] * (torch.nan if now.pipeline else 1)}
    found["nan"] = now.step(bad, token_loss)

    def raises(model: nn.Module, batch: Batch) -> Any:
        loss = token_loss(model, batch)
        if rank == 3:
            raise KeyError("no such label")
        return loss

    def never(model: nn.Module, batch: Batch) -> Any:
        return batch["x"].mean() if now.pipeline else token_loss(model, batch)

    found["raises"] = now.fail(batch, raises)
    found["never"] = now.fail(batch, never)
    found["other counts"] = now.fail(batch, never, counts={"loss": 1})
    found["next"] = now.step(rows(batch, 0, 6) if now.pipeline else rows(batch, 6, 11), token_loss)
    return found


# -- what they have to be ---------------------------------------------------------------------------------------------


def reference(
    batch: Batch, loss_fn: LossFn, *, model: nn.Module | None = None, clip: float | None = None
) -> dict[str, Any]:
    """Run one backward of the whole batch with plain PyTorch."""
    model = model or Whole()
    model.zero_grad()
    loss = loss_fn(model, batch)
    parts = loss if isinstance(loss, dict) else {"loss": loss}
    means = {name: part.sum / part.count if isinstance(part, Loss) else part for name, part in parts.items()}
    torch.stack(list(means.values())).sum().backward()
    norm = torch.stack([p.grad.norm() for p in model.parameters() if p.grad is not None]).norm()
    if clip is not None:
        torch.nn.utils.clip_grad_norm_(model.parameters(), clip)
    return {
        "gradients": {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None},
        "loss": torch.stack(list(means.values())).sum().detach(),
        "terms": {name: mean.detach() for name, mean in means.items()} if len(means) > 1 else {},
        "grad_norm": norm,
        "count": float(loss.count) if isinstance(loss, Loss) else None,
    }


def close(found: Any, due: Any, *, unit: float = 1e-12) -> bool:
    torch.testing.assert_close(found, due, rtol=unit, atol=unit)
    return True


def assert_exact(found: list[dict[str, Any]], due: dict[str, Any]) -> None:
    """Hold what each rank says against the reference; the stages' gradients together are the whole model's."""
    seen: set[str] = set()
    for each in found:
        for name, gradient in each["gradients"].items():
            assert close(gradient, due["gradients"][name]), name
        seen |= set(each["gradients"])
        for name in ("loss", "terms", "grad_norm"):
            assert close(each[name], due[name]), name
        assert due["count"] in {None, each["count"]}
    assert seen == set(due["gradients"])


@pytest.fixture(scope="module")
def two(run_ranks: Callable[..., list[Any]], tmp_path_factory: pytest.TempPathFactory) -> list[Any]:
    return run_ranks(cases_of_two, 2, Path(tmp_path_factory.mktemp("two")))


@pytest.fixture(scope="module")
def four(run_ranks: Callable[..., list[Any]], tmp_path_factory: pytest.TempPathFactory) -> list[Any]:
    return run_ranks(cases_of_four, 4, Path(tmp_path_factory.mktemp("four")))


@pytest.mark.parametrize("schedule", SCHEDULES)
def test_every_schedule_has_the_whole_batch_s_gradient(two: list[Any], schedule: str) -> None:
    model = Whole()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    for name, tokens in ROUNDS.items():
        found = [each["exact"][f"{schedule}, {name}"] for each in two]
        assert_exact(found, reference(make_batch(tokens), token_loss, model=model))
        assert {each["samples"] for each in found} == {len(tokens)}
        assert {each["microbatches"] for each in found} == {-(-len(tokens) // 2)}
        optimizer.step()
    due, number = dict(model.named_parameters()), sum(-(-len(tokens) // 2) for tokens in ROUNDS.values())
    for each in two:
        for name, weight in each["exact"][f"{schedule}, weights"].items():
            assert close(weight, due[name].detach())
        events = each["exact"][f"{schedule}, events"]
        assert (events.count("MicrobatchDone"), events.count("StepDone")) == (number, len(ROUNDS))


@pytest.mark.parametrize(
    ("name", "loss_fn"),
    [
        ("mean", "row_mean"),
        ("terms", "two_terms"),
        ("every stage", "for_every_stage"),
        ("no rows", "by_position"),
        ("none", "token_loss"),
    ],
)
def test_the_loss_function_is_the_one_of_a_single_device(two: list[Any], name: str, loss_fn: str) -> None:
    due = reference(make_batch(MIXED), globals()[loss_fn], clip=0.01 if name == "terms" else None)
    assert_exact([each["losses"][name] for each in two], due)


def test_torch_may_have_split_the_model(two: list[Any]) -> None:
    assert_exact([each["traced"] for each in two], reference(make_batch(MIXED), token_loss, model=make_plain()))


def test_a_parameter_that_seems_to_be_in_two_stages_is_warned_of(two: list[Any]) -> None:
    for each in two:
        (text,) = each["twins"]
        assert text.startswith(
            "'parts.0.weight' on rank 0 of the pipeline and 'parts.0.weight' on rank 1 have the same"
        )


def test_what_is_not_finite_on_one_stage_is_dropped_on_all(two: list[Any]) -> None:
    for each in two:
        found = each["nonfinite"]
        assert not found["loss"]["applied"]
        assert found["loss"]["clean"]
        assert not found["gradient"]["applied"]
        assert found["gradient"]["clean"]
        assert found["raise"]["text"].startswith("NonfiniteError")
        assert found["raise"]["clean"]
        assert found["skipped"] == 2
    assert_exact([each["nonfinite"]["next"] for each in two], reference(make_batch(MIXED), token_loss))


@pytest.mark.parametrize(
    ("name", "first", "last"),
    [
        ("raises", "RankError: 1 of 2 ranks failed", "KeyError"),
        ("twice", "RankError: 1 of 2 ranks failed", "LossError: .* called its model 2 times"),
        ("attribute", "RankError: 1 of 2 ranks failed", "AttributeError: .* no 'gain'"),
        ("never", "LossError: .* did not call its model", "LossError: .* did not call its model"),
        ("graph", "LossError: .* has a graph", "LossError: .* has a graph"),
        ("ragged", "BatchError: microbatch 2 .* pad all rows", "BatchError: microbatch 2 .* pad all rows"),
        ("batches", "BatchError: .* has 8 rows in 4 passes", "BatchError: .* has 9 rows in 5 passes"),
        ("shares", "BatchError: .* different batches", "BatchError: .* different batches"),
        ("no rows left", "CountError: .* declared 1", "CountError: .* declared 1"),
        ("empty", "EmptyBatchError", "EmptyBatchError"),
    ],
)
def test_a_step_that_fails_leaves_all_stages_as_they_were(two: list[Any], name: str, first: str, last: str) -> None:
    for each, text in zip(two, (first, last), strict=True):
        found = each["failures"][name]
        assert re.match(text, found["text"]), found["text"]
        assert found["clean"]
    assert_exact([each["failures"]["next"] for each in two], reference(make_batch(MIXED), token_loss))


def test_a_stage_that_breaks_ends_the_others_by_their_time_out(two: list[Any]) -> None:
    first, last = (each["broken"] for each in two)
    assert re.match(
        r"RankError: step \d+ came to a halt, because rank 1 failed in step \d+ \(RuntimeError:", first["text"]
    )
    assert re.match(r"(?s)RuntimeError: .*Stage 1.* failed to run forward.*\nmicrobatch: weights", last["text"])
    assert first["clean"]
    assert last["clean"]


def test_bfloat16_gradients_add_up_in_float32(two: list[Any]) -> None:
    one = Whole(torch.bfloat16)
    row_mean(one, {"x": make_batch([2])["x"].bfloat16()}).backward()
    for each in two:
        for name, gradient in each["low_precision"]["many"]["gradients"].items():
            # 264 of the same: in bfloat16 they stop growing at 256, which is 3 % less.
            assert close(gradient, one.get_parameter(name).grad, unit=0.008)


def test_stages_run_under_autocast_as_on_one_device(two: list[Any]) -> None:
    model = Whole(torch.float32)
    seen: dict[str, Tensor] = {}
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    named = dict(model.named_parameters())
    optimizer.register_step_pre_hook(
        lambda *_: seen.update({n: p.grad.clone() for n, p in named.items() if p.grad is not None})
    )
    batch = make_batch(MIXED)
    batch["x"] = batch["x"].float()
    step = Accumulator(model, optimizer, microbatch_size=2, autocast=torch.bfloat16).step(batch, token_loss)
    plain = reference(make_batch(MIXED), token_loss)
    for each in two:
        found = each["low_precision"]["autocast"]
        assert close(found["loss"], step.loss, unit=1e-6)
        assert not torch.allclose(found["loss"].double(), plain["loss"], rtol=1e-6)
        for name, gradient in found["gradients"].items():
            assert close(gradient, seen[name], unit=1e-6)


def test_what_the_loss_function_draws_is_the_same_on_every_stage(two: list[Any]) -> None:
    first, last = (each["random"] for each in two)
    # The first stage takes down each microbatch once; the last one too, and then has a loss of each.
    taken, lost = first["drawn"], last["drawn"]
    assert not taken
    noise, after = lost[-12::2], lost[-11::2]  # the first one may have been twice, for torch to find shapes out
    assert len({float(each.sum()) for each in after}) == len(after) == 6
    model, batch = Whole(), make_batch(MIXED)
    means = [model(batch["x"][2 * i : 2 * i + 2] + each).mean() * len(each) for i, each in enumerate(noise)]
    assert close(last["loss"], torch.stack(means).sum().detach() / len(MIXED))
    assert not first["moved"]
    assert not last["moved"]


def test_pipelines_beside_one_another_have_one_denominator(four: list[Any]) -> None:
    assert_exact([each["four stages"] for each in four], reference(make_batch(MIXED[:3]), token_loss))
    for name in ("uneven", "all"):
        due = reference(make_batch(MIXED), token_loss, clip=0.01)
        assert_exact([each[f"{name}, tokens"] for each in four], due)
        assert_exact([each[f"{name}, terms"] for each in four], reference(make_batch(MIXED), two_terms))
        assert {each[f"{name}, tokens"]["samples"] for each in four} == {len(MIXED)}
    counts = [[each["uneven, tokens"]["microbatches"] for each in four if each["pipeline"] == i] for i in (0, 1)]
    assert counts == [[4, 4], [2, 2]]
    # One agreement and one reduction over the data-parallel ranks, beside the first step's weights and state.
    assert {each["next"]["comm_calls"] for each in four} == {3}


def test_a_pipeline_that_fails_is_heard_of_in_the_other(four: list[Any]) -> None:
    assert [each["pipeline"] for each in four] == [0, 0, 1, 1]
    for name, due in {
        "raises": ["RankError", "RankError", "RankError", "KeyError"],
        "never": ["RankError", "RankError", "LossError", "LossError"],
        "other counts": ["RankError", "RankError", "LossError", "LossError"],
    }.items():
        assert [each[name]["text"].split(":")[0] for each in four] == due, name
        assert all(each[name]["clean"] for each in four)
    assert all(not each["nan"]["applied"] and each["nan"]["clean"] for each in four)
    assert_exact([each["next"] for each in four], reference(make_batch(MIXED), token_loss))


# -- what is refused, on a rank that is alone -------------------------------------------------------------------------


@pytest.fixture
def alone() -> Iterator[Callable[..., PipelineStage]]:
    store = dist.HashStore()  # pyright: ignore[reportPrivateImportUsage] -- public by name, and in torch's own pages
    dist.init_process_group("gloo", store=store, rank=0, world_size=1)

    def stage(index: int = 0, number: int = 1, **more: Any) -> PipelineStage:
        return PipelineStage(more.pop("module", nn.Linear(3, 3)), index, number, CPU, **more)

    yield stage
    dist.destroy_process_group()


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"microbatch_size": "auto"}, 'a Pipeline does not go with microbatch_size="auto": pass a number'),
        ({"memory_budget": "1 GiB"}, "memory_budget="),
        ({"sums": Sums(buffer="none")}, r"Sums\(buffer="),
        ({"grad_scaler": torch.amp.GradScaler("cpu")}, "grad_scaler="),
        ({"ranks": Ranks(deterministic=True)}, r"Ranks\(deterministic=True\)"),
        ({"compile": True}, "compile each stage's module"),
        ({"offload": "activations"}, "offload="),
        ({"checkpoint": "all"}, "checkpoint="),
        ({"lengths": "mask"}, "pad all rows to one length"),
        ({"dropout": "by_row"}, 'dropout="by_row"'),
        ({"batch_norm": "exact"}, 'batch_norm="exact"'),
    ],
)
def test_what_makes_no_sense_is_refused_by_name(alone: Any, settings: dict[str, Any], message: str) -> None:
    model = Pipeline(alone())
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    settings.setdefault("microbatch_size", 2)
    with pytest.raises(ConfigError, match=message):
        Accumulator(model, optimizer, **settings)


def test_batch_normalisation_would_see_the_rows_that_fill_up(alone: Any) -> None:
    model = Pipeline(alone(module=nn.BatchNorm1d(3)))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    with pytest.raises(ConfigError, match=r'a Pipeline does not go with BatchNorm without .* pass batch_norm="frozen"'):
        Accumulator(model, optimizer, microbatch_size=2)
    step = Accumulator(model, optimizer, microbatch_size=2, batch_norm="frozen").step(
        torch.randn(3, 3), lambda m, x: m(x).mean()
    )
    assert step.microbatches == 2
    assert int(model.parts[0].get_buffer("num_batches_tracked")) == 0


def test_stages_and_schedules_that_do_not_fit_are_refused(alone: Any) -> None:
    with pytest.raises(ConfigError, match="not a Linear"):
        Pipeline(nn.Linear(3, 3))
    with pytest.raises(ConfigError, match="at least one stage"):
        Pipeline([])
    with pytest.raises(ConfigError, match=r"has the stages \[1\] of 2, and should have \[0, 1\]"):
        Pipeline(alone(1, 2))
    with pytest.raises(ConfigError, match="leave out input_args= and output_args="):
        Pipeline(alone(input_args=torch.zeros(2, 3), output_args=torch.zeros(2, 3)))
    with pytest.raises(ConfigError, match="'ZBVZeroBubble'; schedules that split backward in two"):
        Pipeline(alone(), schedule="ZBVZeroBubble")
    with pytest.raises(ConfigError, match="'1F1B' takes one stage a rank, and this one has 2; 'Interleaved1F1B'"):
        Pipeline([alone(0, 2), alone(1, 2)], schedule="1F1B")
    with pytest.raises(ConfigError, match="needs several stages on each rank"):
        Pipeline(alone(), schedule=ScheduleInterleaved1F1B)


def test_a_loop_of_one_s_own_an_encoder_and_a_call_are_refused(alone: Any) -> None:
    model = Pipeline(alone(), schedule=ScheduleGPipe)
    accumulator = Accumulator(model, torch.optim.SGD(model.parameters(), lr=0.1), microbatch_size=2)
    with pytest.raises(ConfigError, match=r"use accumulator\.step\(batch, loss_fn\)"):
        accumulator.window()
    with pytest.raises(ConfigError, match=r"use accumulator\.step\(batch, loss_fn\)"):
        accumulator.windows([], microbatches=2)
    with pytest.raises(ConfigError, match="a Pipeline does not go with encode="):
        accumulator.step(torch.zeros(2, 3), lambda model, z: z.sum(), encode=lambda model, x: model(x))
    with pytest.raises(WindowError, match="its schedule runs the stages"):
        model(torch.zeros(2, 3))


def test_an_output_without_rows_is_refused_where_a_microbatch_is_filled_up(alone: Any) -> None:
    class Summed(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = nn.Linear(3, 3)

        def forward(self, x: Tensor) -> Tensor:
            return self.layer(x).sum()

    model = Pipeline(alone(module=Summed()))
    accumulator = Accumulator(model, torch.optim.SGD(model.parameters(), lr=0.1), microbatch_size=2)
    assert accumulator.step(torch.ones(4, 3), lambda model, x: model(x)).microbatches == 2
    with pytest.raises(LossError, match=r"of shape \(\), and a microbatch of 1 rows was filled up to 2"):
        accumulator.step(torch.ones(5, 3), lambda model, x: model(x))


def test_a_command_of_one_process_is_refused_a_pipeline(alone: Any) -> None:
    model = Pipeline(alone())
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    job = Job(model=model, optimizer=optimizer, loss_fn=row_mean, data=[torch.zeros(3)], batch_size=1)
    with pytest.raises(ConfigError, match="whose stages are on several ranks"):
        resolve(Settings(job="mine"), job, device=CPU)
