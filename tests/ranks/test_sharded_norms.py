"""Law C4 over fully sharded models: statistics of the batch that all ranks have together."""

import copy
import gc
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from tests.cases import cases_in, result, run_cases
from torch import Tensor, nn
from torch.distributed.fsdp import fully_shard

import microbatch as mb
from microbatch.ranks.fsdp import fsdp_units
from microbatch.ranks.fsdp_passes import FLAGS

ROWS, FIRST = 11, 7
Batch = dict[str, Tensor]
AFTER = {"ZeRO-3": True, "ZeRO-2": False}


class Model(nn.Module):
    """Normalises images and features, and shares statistics of its own."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Sequential(nn.Conv2d(2, 4, 3, padding=1, bias=False), nn.BatchNorm2d(4))
        self.beside = nn.Sequential(nn.Conv2d(4, 4, 1), nn.BatchNorm2d(4, momentum=0.3))
        self.head, self.last = nn.Linear(64, 3), nn.BatchNorm1d(3, momentum=None)
        self.scale = nn.Parameter(torch.tensor([0.3]))

    def forward(self, x: Tensor) -> Tensor:
        x = self.conv(x).tanh()
        x = x + self.beside(x).tanh()
        return self.last(self.head(x.flatten(1))) * self.scale.exp()


def make() -> tuple[Model, Batch]:
    """Make the model and the whole batch."""
    torch.manual_seed(3)
    model, scale = Model().double(), torch.rand(ROWS, 1, 1, 1, dtype=torch.float64)
    return model, {"x": torch.randn(ROWS, 2, 4, 4, dtype=torch.float64) * scale, "y": torch.arange(ROWS) % 3}


def loss_fn(model: nn.Module, batch: Batch) -> Tensor:
    return nn.functional.cross_entropy(model(batch["x"]), batch["y"])


def contrast(model: Any, z: Tensor) -> Tensor:
    return (model.scale * z @ z.T).tanh().mean() + z.var()


def whole(shard: Any) -> Tensor:
    return shard.full_tensor()


class World:
    """The model over the ranks, of which the first has most rows."""

    def __init__(self, way: str, **settings: Any) -> None:
        self.model, self.batch = make()
        for unit in (self.model.conv, self.model.beside, self.model):
            fully_shard(unit, reshard_after_forward=AFTER[way])
        self.before = self.flags()
        optimizer = torch.optim.SGD(self.model.parameters(), lr=0.1)
        self.seen: dict[str, Tensor] = {}
        optimizer.register_step_pre_hook(lambda *_: self.seen.update(self.gradients()))
        settings.setdefault("microbatch_size", 2)
        self.accumulator = mb.Accumulator(self.model, optimizer, **settings)

    def flags(self) -> list[dict[str, Any]]:
        return [{name: getattr(unit, name) for name in [*FLAGS, "_training_state"]} for unit in fsdp_units(self.model)]

    def gradients(self) -> dict[str, Tensor]:
        return {name: whole(each.grad) for name, each in self.model.named_parameters() if each.grad is not None}

    def share(self, rank: int) -> Batch:
        rows = slice(0, FIRST) if rank == 0 else slice(FIRST, ROWS)
        return {name: each[rows] for name, each in self.batch.items()}

    def step(self, rank: int, function: Any = loss_fn, **how: Any) -> dict[str, Any]:
        step = self.accumulator.step(self.share(rank), function, **how)
        return {
            "gradients": dict(self.seen),
            "loss": step.loss,
            "sync": step.sync,
            "retries": step.retries,
            "buffers": {name: each.clone() for name, each in self.model.named_buffers()},
            "clean": self.flags() == self.before and not self.gradients(),
            "weights": [whole(each.detach()) for each in self.model.parameters()],
        }


def case_exact(rank: int, ranks: int) -> Any:
    found: dict[str, Any] = {}
    for way in AFTER:
        world = World(way, batch_norm="exact")
        found[way] = [world.step(rank) for _ in range(2)]
    return found


def case_exact_encoded(rank: int, ranks: int) -> Any:
    return {way: World(way, batch_norm="exact").step(rank, contrast, encode=lambda m, b: m(b["x"])) for way in AFTER}


def case_pooled(rank: int, ranks: int) -> Any:
    return {
        way: World(way, batch_norm="pooled", microbatch_size=4, ranks=mb.Ranks(sync="fast")).step(rank) for way in AFTER
    }


def failing(at: int, error: Exception) -> Any:
    calls: list[int] = []

    def function(model: nn.Module, batch: Batch) -> Tensor:
        calls.append(0)
        if len(calls) == at:
            raise copy.copy(error)
        return loss_fn(model, batch)

    return function


def case_failures(rank: int, ranks: int) -> Any:
    found: dict[str, Any] = {}
    for way in AFTER:
        full = torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 MiB")
        retried = World(way, batch_norm="exact").step(rank, failing(2, full) if rank == 0 else loss_fn)
        world, said = World(way, batch_norm="exact"), ""
        try:
            world.step(rank, failing(1, KeyError("x")) if rank == 1 else loss_fn)
        except Exception as error:  # noqa: BLE001 - told to the test
            said = type(error).__name__
        found[way] = {"retried": retried, "said": said, "after": world.step(rank)}
    return found


def case_gathering(rank: int, ranks: int) -> Any:
    """Memory that ends while weights are gathered: before a unit has said anything, and after."""
    found: dict[str, Any] = {}
    for name in ("unshard", "wait_for_unshard"):
        world = World("ZeRO-3", batch_norm="exact")
        unit = list(fsdp_units(world.model))[1]
        inner, calls = getattr(unit, name), list[int]()

        def once(*given: Any, inner: Any = inner, calls: Any = calls) -> Any:
            calls.append(0)
            if len(calls) == 1 and rank == 1:
                raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 MiB")
            return inner(*given)

        setattr(unit, name, once)
        found[name] = world.step(rank)
    return found


CASES = cases_in(globals())


def all_cases(rank: int, ranks: int) -> dict[str, Any]:
    warnings.simplefilter("error")
    gc.freeze()
    return run_cases(CASES, rank, ranks)


@pytest.fixture(scope="module")
def told(run_ranks: Any, tmp_path_factory: pytest.TempPathFactory) -> list[Any]:
    folder: Path = tmp_path_factory.mktemp("sharded-norms")
    return run_ranks(all_cases, 2, folder, timeout=120)


def reference(loss: Any, model: nn.Module) -> tuple[dict[str, Tensor], Tensor]:
    model.zero_grad()
    value = loss(model)
    value.backward()
    return {name: each.grad for name, each in model.named_parameters() if each.grad is not None}, value.detach()


def off(ours: dict[str, Tensor], theirs: dict[str, Tensor]) -> float:
    assert ours.keys() == theirs.keys()
    difference = torch.cat([(ours[name] - theirs[name]).flatten() for name in theirs]).norm()
    return float(difference / torch.cat([each.flatten() for each in theirs.values()]).norm())


def check(ours: dict[str, Any], theirs: tuple[dict[str, Tensor], Tensor], model: nn.Module) -> None:
    assert off(ours["gradients"], theirs[0]) <= 1e-12
    assert float((ours["loss"] - theirs[1]).abs()) <= 1e-12
    assert ours["clean"]
    assert ours["sync"] == "fast"
    for name, each in model.named_buffers():
        torch.testing.assert_close(ours["buffers"][name], each, rtol=1e-12, atol=1e-13)


@pytest.mark.parametrize("way", AFTER)
def test_the_batch_of_all_ranks_step_after_step(told: list[Any], way: str) -> None:
    model, batch = make()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    for step in range(2):
        theirs = reference(lambda model: loss_fn(model, batch), model)
        for found in result(told, "exact"):
            check(found[way][step], theirs, model)
        optimizer.step()
    for found in result(told, "exact"):
        torch.testing.assert_close(found[way][1]["weights"], [each.detach() for each in model.parameters()])


def test_statistics_of_each_microbatch_are_refused_by_the_same_comparison() -> None:
    model, batch = make()
    theirs, _ = reference(lambda model: loss_fn(model, batch), model)

    def parts(model: nn.Module) -> Tensor:
        shares = [{name: each[rows] for name, each in batch.items()} for rows in (slice(FIRST), slice(FIRST, ROWS))]
        return sum((len(each["y"]) * loss_fn(model, each) for each in shares), torch.zeros(())) / ROWS

    assert off(reference(parts, make()[0])[0], theirs) > 1e-2


@pytest.mark.parametrize("way", AFTER)
def test_encoded_batches(told: list[Any], way: str) -> None:
    model, batch = make()
    theirs = reference(lambda model: contrast(model, model(batch["x"])), model)
    for found in result(told, "exact_encoded"):
        check(found[way], theirs, model)


@pytest.mark.parametrize("way", AFTER)
def test_failures(told: list[Any], way: str) -> None:
    model, batch = make()
    theirs = reference(lambda model: loss_fn(model, batch), model)
    for rank, found in enumerate(result(told, "failures")):
        check(found[way]["retried"], theirs, model)
        assert found[way]["retried"]["retries"] == 1
        assert found[way]["said"] == ("KeyError" if rank == 1 else "RankError")
        check(found[way]["after"], theirs, model)


@pytest.mark.parametrize("place", ["unshard", "wait_for_unshard"])
def test_memory_that_ends_while_weights_are_gathered(told: list[Any], place: str) -> None:
    model, batch = make()
    theirs = reference(lambda model: loss_fn(model, batch), model)
    for found in result(told, "gathering"):
        check(found[place], theirs, model)
        assert found[place]["retries"] == 1


@pytest.mark.parametrize("way", AFTER)
def test_pooled_statistics_are_of_this_ranks_rows_alone(told: list[Any], way: str) -> None:
    """What a rank fills up with is measured by nobody."""
    for rank, found in enumerate(result(told, "pooled")):
        model, batch = make()
        accumulator = mb.Accumulator(
            model, torch.optim.SGD(model.parameters(), lr=0.1), microbatch_size=4, batch_norm="pooled"
        )
        rows = slice(0, FIRST) if rank == 0 else slice(FIRST, ROWS)
        accumulator.step({name: each[rows] for name, each in batch.items()}, loss_fn)
        assert found[way]["clean"]
        for name, each in model.named_buffers():
            torch.testing.assert_close(found[way]["buffers"][name], each, rtol=1e-12, atol=1e-13)
