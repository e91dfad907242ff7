"""Losses that couple samples over fully sharded models: two rounds of passes, the same number on every rank."""

import copy
import gc
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from tests.cases import cases_in, result, run_cases
from tests.faults import FULL
from torch import Tensor, nn
from torch.distributed.fsdp import fully_shard

from microbatch.loss import losses
from microbatch.loss.loss import Loss
from microbatch.ranks.fsdp import fsdp_units
from microbatch.ranks.fsdp_passes import FLAGS
from microbatch.step.accumulator import Accumulator
from microbatch.step.options import Ranks

ROWS = 9
Batch = dict[str, Tensor]
WAYS = {
    f"{sync}, {'ZeRO-3' if after else 'ZeRO-2'}": (sync, after) for sync in ("lean", "fast") for after in (True, False)
}

FAR = ["lean, ZeRO-3", "fast, ZeRO-2"]  # which differ in everything


class Towers(nn.Module):
    """Two encoders, and what the loss learns of its own."""

    def __init__(self) -> None:
        super().__init__()
        self.left = nn.Sequential(nn.Linear(3, 5), nn.Tanh(), nn.Dropout(0.3), nn.Linear(5, 4))
        self.right = nn.Linear(3, 4)
        self.scale = nn.Parameter(torch.tensor([0.3]))

    def forward(self, batch: Batch) -> dict[str, Any]:
        return {"x": self.left(batch["x"]), "other": (batch["even"], self.right(batch["y"]) * 1.0)}


class Headed(Towers):
    """The same with a layer that the loss calls."""

    def __init__(self) -> None:
        super().__init__()
        self.head = nn.Linear(4, 4)


def make_headed() -> Headed:
    torch.manual_seed(5)
    return Headed().double()


def make_model() -> Towers:
    torch.manual_seed(5)
    return Towers().double()


def make_batch() -> Batch:
    generator = torch.Generator().manual_seed(11)
    x, y = (torch.randn(ROWS, 3, dtype=torch.float64, generator=generator) for _ in range(2))
    return {"x": x, "y": y, "even": torch.arange(ROWS) % 2 == 0}


def encode(model: Any, batch: Batch) -> dict[str, Any]:
    return model(batch)


def clip(model: Any, z: dict[str, Any]) -> Loss:
    return losses.clip(z["x"], z["other"][1], scale=model.scale.exp())


def headed(model: Any, z: dict[str, Any]) -> Tensor:
    """A loss that calls a sharded module itself."""
    return plain_clip(model, z | {"x": model.head(z["x"])})


def terms(model: Any, z: dict[str, Any]) -> dict[str, Any]:
    even, logits = z["other"][0], model.scale * z["x"] @ z["other"][1].T
    mean = F.cross_entropy(logits, torch.arange(len(logits))) + z["x"][even].var()
    return {"mean": mean, "even": Loss(sum=z["x"][even].square().sum(), count=even.sum())}


def share(rank: int, ranks: int, *, empty: bool = False) -> Batch:
    """Return this rank's rows: the others have one each, or none, and the first has the rest."""
    others = 0 if empty else 1
    first = ROWS - others * (ranks - 1)
    start, stop = (0, first) if rank == 0 else (first + others * (rank - 1), first + others * rank)
    return {name: each[start:stop] for name, each in make_batch().items()}


def whole(tensor: Tensor) -> Tensor:
    return tensor.full_tensor() if hasattr(tensor, "full_tensor") else tensor  # pyright: ignore[reportAttributeAccessIssue] -- a DTensor


def flags(model: nn.Module) -> list[dict[str, Any]]:
    return [{name: getattr(unit, name) for name in [*FLAGS, "_all_gather_comm"]} for unit in fsdp_units(model)]


class World:
    """Towers over the ranks, in evaluation mode unless it is said that there is dropout."""

    def __init__(self, way: str, *, root: bool = True, **settings: Any) -> None:
        sync, after = WAYS[way]
        self.model = settings.pop("model", None) or make_model()
        self.model.train(settings.pop("train", False))
        for unit in [*self.model.children(), *([self.model] if root else [])]:
            fully_shard(unit, reshard_after_forward=after)
        self.seen: list[dict[str, Tensor]] = []
        self.events: list[str] = []
        self.before = flags(self.model)
        optimizer = torch.optim.SGD(self.model.parameters(), lr=0.1)
        optimizer.register_step_pre_hook(lambda *_: self.seen.append(self.gradients()))
        listeners = [lambda event: self.events.append(type(event).__name__)]
        settings = {"microbatch_size": 2, **settings}
        self.accumulator = Accumulator(self.model, optimizer, ranks=Ranks(sync=sync), listeners=listeners, **settings)

    def gradients(self) -> dict[str, Tensor]:
        return {n: whole(p.grad).clone() for n, p in self.model.named_parameters() if p.grad is not None}

    def step(self, batch: Batch, loss_fn: Any, encoder: Any = encode) -> dict[str, Any]:
        self.seen.clear()
        step = self.accumulator.step(batch, loss_fn, encode=encoder)
        return {
            "gradients": self.seen[0],
            "loss": step.loss,
            "counts": dict(step.counts),
            "samples": step.samples,
            "microbatches": step.microbatches,
            "retries": step.retries,
            "sync": step.sync,
            "clean": flags(self.model) == self.before and not self.gradients(),
            "random": torch.rand(1).item(),
        }


def fails(
    at: int, *, error: Exception, rank: int, inner: Callable[..., Any], where: str = "before"
) -> Callable[..., Any]:
    """Wrap a function so that one rank's call of some number fails: before, after or inside of the model's passes."""
    calls: list[int] = []

    def full(*_: object) -> None:
        raise copy.copy(error)

    def wrapped(model: Any, given: Any) -> Any:
        calls.append(len(calls))
        if calls[-1] != at or dist.get_rank() != rank:
            return inner(model, given)
        if where == "before":
            full()
        # The second tower, when the first has been gathered.
        handle = model.right.register_forward_pre_hook(full) if where == "forward" else None
        try:
            found = inner(model, given)
        finally:
            if handle is not None:
                handle.remove()
        if where == "after":
            full()
        found["x"].register_hook(full)
        return found

    return wrapped


def every_way(case: Callable[[str], Any], *, only: Iterable[str] = WAYS) -> dict[str, Any]:
    return {way: case(way) for way in only}


# -- the cases, each run on every rank of one start of the processes --------------------------------------------------


def case_clip(rank: int, ranks: int) -> Any:
    return every_way(lambda way: World(way).step(share(rank, ranks), clip))


def case_terms(rank: int, ranks: int) -> Any:
    return every_way(lambda way: World(way).step(share(rank, ranks), terms))


def case_empty(rank: int, ranks: int) -> Any:
    return every_way(lambda way: World(way).step(share(rank, ranks, empty=True), plain_clip))


def case_rootless(rank: int, ranks: int) -> Any:
    """Shard the towers alone, and call each by itself; what the loss takes from the model is replicated."""

    def apart(model: Any, batch: Batch) -> Any:
        return {"x": model.left(batch["x"]), "other": (batch["even"], model.right(batch["y"]) * 1.0)}

    return every_way(lambda way: World(way, root=False).step(share(rank, ranks), clip, apart))


def case_headed(rank: int, ranks: int) -> Any:
    return every_way(lambda way: World(way, model=make_headed()).step(share(rank, ranks), headed))


def case_by_row(rank: int, ranks: int) -> Any:
    """Encode with dropout, whose masks are the rows', and have to be the same in both rounds."""
    return every_way(lambda way: World(way, dropout="by_row", train=True).step(share(rank, ranks), clip))


def case_dropout(rank: int, ranks: int) -> Any:
    return every_way(lambda way: World(way, train=True).step(share(rank, ranks), clip))


def case_calls(rank: int, ranks: int) -> Any:
    """Count what is scattered in a step of four microbatches."""

    def case(way: str) -> int:
        scatters, world = list[int](), World(way)
        for unit in fsdp_units(world.model):
            inner = unit._reduce_scatter_comm
            unit._reduce_scatter_comm = Counting(inner, scatters)
        world.step(share(rank, ranks), clip)
        return len(scatters)

    return every_way(case)


class Counting:
    """A unit's scatter, counted."""

    def __init__(self, inner: Any, found: list[int]) -> None:
        self.inner, self.found = inner, found

    def __getattr__(self, name: str) -> Any:
        return getattr(self.inner, name)

    def __call__(self, *args: Any, **settings: Any) -> Any:
        self.found.append(1)
        return self.inner(*args, **settings)


def case_out_of_memory(rank: int, ranks: int) -> Any:
    """Run out in the first round, and in the second: the first rank has two microbatches."""

    def case(way: str, at: int, where: str) -> Any:
        failing = fails(at, error=FULL, rank=0, inner=encode, where=where)
        return World(way, microbatch_size=4).step(share(rank, ranks), clip, failing)

    places = [(0, "before"), (1, "forward"), (2, "forward"), (2, "backward"), (3, "backward"), (3, "after")]
    return {
        (at, where): every_way(lambda way, at=at, where=where: case(way, at, where), only=FAR) for at, where in places
    }


def case_errors(rank: int, ranks: int) -> Any:
    """Return what one rank's fault, in each of the places, is on every rank; and a step after them all."""

    def case(way: str) -> Any:
        world, batch, wrong = World(way, microbatch_size=4), share(rank, ranks), KeyError("x")
        found: dict[str, Any] = {}
        for place, at in [("first", 0), ("second", 2)]:
            failing = fails(at, error=wrong, rank=0, inner=encode)
            found[place] = refused(lambda failing=failing: world.step(batch, clip, failing))
        found["loss"] = refused(lambda: world.step(batch, fails(0, error=wrong, rank=1, inner=clip)))
        found["memory"] = refused(lambda: world.step(batch, fails(0, error=FULL, rank=1, inner=clip)))
        return found | {"after": world.step(batch, clip)}

    return every_way(case, only=FAR)


def refused(act: Callable[[], Any]) -> str:
    try:
        act()
    except Exception as error:  # noqa: BLE001 - what is raised is what is asked
        return type(error).__name__
    return "nothing"


CASES = cases_in(globals())


def all_cases(rank: int, ranks: int) -> dict[str, Any]:
    gc.freeze()  # what is imported by now is collected once for each time that memory ends
    return run_cases(CASES, rank, ranks)


@pytest.fixture(scope="module")
def told(run_ranks: Any, tmp_path_factory: pytest.TempPathFactory) -> list[Any]:
    folder: Path = tmp_path_factory.mktemp("sharded-coupled")
    return run_ranks(all_cases, 2, folder, timeout=120)


# -- what plain PyTorch says on the whole batch -----------------------------------------------------------------------


def plain_clip(model: Any, z: dict[str, Any]) -> Tensor:
    logits = model.scale.exp() * z["x"] @ z["other"][1].T
    diagonal = torch.arange(len(logits))
    return (F.cross_entropy(logits, diagonal) + F.cross_entropy(logits.T, diagonal)) / 2


def plain_terms(model: Any, z: dict[str, Any]) -> Tensor:
    found = terms(model, z)
    return found["mean"] + found["even"].sum / found["even"].count


def reference(loss: Callable[..., Tensor], batch: Batch | None = None) -> tuple[dict[str, Tensor], Tensor]:
    model = (make_headed() if loss is headed else make_model()).eval()
    value = loss(model, model(batch or make_batch()))
    value.backward()
    return {name: p.grad for name, p in model.named_parameters() if p.grad is not None}, value.detach()


def off(ours: dict[str, Tensor], theirs: dict[str, Tensor]) -> float:
    assert ours.keys() == theirs.keys()
    difference = torch.cat([(ours[name] - theirs[name]).flatten() for name in theirs]).norm()
    return float(difference / torch.cat([each.flatten() for each in theirs.values()]).norm())


def check(ours: dict[str, Any], theirs: tuple[dict[str, Tensor], Tensor]) -> None:
    assert off(ours["gradients"], theirs[0]) <= 1e-12
    assert float((ours["loss"] - theirs[1]).abs()) <= 1e-12
    assert ours["samples"] == ROWS
    assert ours["clean"]  # flags as they were, and no gradient left


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize(
    ("case", "loss"),
    [
        ("clip", plain_clip),
        ("terms", plain_terms),
        ("empty", plain_clip),
        ("rootless", plain_clip),
        ("headed", headed),
    ],
)
def test_c3_the_gradient_of_all_ranks_rows(told: list[Any], case: str, loss: Callable[..., Tensor], way: str) -> None:
    theirs = reference(loss)
    for rank, found in enumerate(result(told, case)):
        check(found[way], theirs)
        assert found[way]["sync"] == way[:4]
        assert found[way]["microbatches"] == ([5, 0] if case == "empty" else [4, 1])[rank]


def test_negatives_of_a_rank_alone_are_refused_by_the_same_comparison() -> None:
    theirs, _ = reference(plain_clip)
    local = [reference(plain_clip, share(rank, 2))[0] for rank in range(2)]
    usual = {name: (8 * local[0][name] + local[1][name]) / ROWS for name in theirs}
    assert off(usual, theirs) > 1e-2


@pytest.mark.parametrize("way", WAYS)
def test_c2_masks_are_the_same_in_both_rounds(told: list[Any], way: str) -> None:
    model = make_model()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    theirs: dict[str, Tensor] = {}
    optimizer.register_step_pre_hook(
        lambda *_: theirs.update({n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None})
    )
    accumulator = Accumulator(model, optimizer, microbatch_size=ROWS, dropout="by_row", coupled="keep")
    step = accumulator.step(make_batch(), clip, encode=encode)
    assert off(theirs, reference(plain_clip)[0]) > 1e-2  # there is dropout
    for found in result(told, "by_row"):
        check(found[way], (theirs, step.loss))


def test_passes_that_come_to_nothing_draw_nothing(told: list[Any]) -> None:
    for rank, found in enumerate(result(told, "dropout")):
        model, batch = make_model().train(), share(rank, 2)
        for start in range(0, len(batch["x"]), 2):
            model({name: each[start : start + 2] for name, each in batch.items()})
        following = torch.rand(1).item()
        assert {each["random"] for each in found.values()} == {following}


@pytest.mark.parametrize("way", WAYS)
def test_r4_gradients_are_scattered_in_the_second_round_alone(told: list[Any], way: str) -> None:
    units, microbatches = 3, 4
    for found in result(told, "calls"):
        assert found[way] == units * (1 if way.startswith("fast") else microbatches)


@pytest.mark.parametrize("way", FAR)
def test_r7_all_ranks_start_over_together(told: list[Any], way: str) -> None:
    theirs = reference(plain_clip)
    for rank, found in enumerate(result(told, "out_of_memory")):
        for each in found.values():
            check(each[way], theirs)
            assert each[way]["retries"] == 1
            assert each[way]["microbatches"] == [4, 1][rank]


@pytest.mark.parametrize("way", FAR)
def test_a_ranks_fault_is_an_error_on_all_and_nobody_waits(told: list[Any], way: str) -> None:
    one, other = (found[way] for found in result(told, "errors"))
    for place in ("first", "second"):
        assert (one[place], other[place]) == ("KeyError", "RankError")
    assert (one["loss"], other["loss"]) == ("RankError", "KeyError")
    assert (one["memory"], other["memory"]) == ("RankError", "OutOfMemoryError")
    for each in (one, other):
        check(each["after"], reference(plain_clip))
