"""Fully sharded models: the whole batch's gradient on every rank, however its parts meet, and no rank that waits."""

import copy
import gc
from collections.abc import Callable, Generator, Sequence
from contextlib import contextmanager, suppress
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from tests.cases import cases_in, result, run_cases
from tests.faults import FULL
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import CPUOffloadPolicy, MixedPrecisionPolicy, fully_shard

from microbatch.loss.loss import Loss
from microbatch.ranks.fsdp import fsdp_units
from microbatch.ranks.fsdp_passes import FLAGS
from microbatch.step.accumulator import Accumulator
from microbatch.step.options import Ranks, Sums

Batch = dict[str, Tensor]
LossFn = Callable[[nn.Module, Batch], Any]
LENGTH = 6
MIXED = [6, 1, 2, 5, 0, 3, 6, 4]
WAYS = [(sync, after) for sync in ("lean", "fast") for after in (True, False)]
IDS = [f"{sync}, {'ZeRO-3' if after else 'ZeRO-2'}" for sync, after in WAYS]
FAR = [IDS[0], IDS[3]]  # which differ in everything


class Model(nn.Module):
    """A classifier of tokens of two units and the root's, which has a layer that only some microbatches use."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(3, 3)
        self.body = nn.Sequential(nn.Linear(3, 5), nn.Tanh(), nn.Linear(5, 4))
        self.rare = nn.Linear(3, 4, bias=False)
        self.never = nn.Parameter(torch.ones(3))

    def forward(self, x: Tensor, *, rare: bool = False) -> Tensor:
        y = self.body(self.first(x))
        return y + self.rare(x) if rare else y * 1.0


def make_model() -> Model:
    torch.manual_seed(5)
    return Model().double()


def sharded(model: nn.Module, **how: Any) -> nn.Module:
    fully_shard(model.get_submodule("first"), **how)
    fully_shard(model.get_submodule("body"), **how)
    fully_shard(model, **how)
    return model


def make_batch(tokens: list[int]) -> Batch:
    """Return a row for every number of tokens, the rest of its labels masked."""
    generator = torch.Generator().manual_seed(11)
    x = torch.randn(len(tokens), LENGTH, 3, dtype=torch.float64, generator=generator)
    labels = torch.randint(4, (len(tokens), LENGTH), generator=generator)
    for row, number in enumerate(tokens):
        labels[row, number:] = -100
    return {"x": x, "labels": labels, "row": torch.arange(len(tokens))}


def rows(batch: Batch, start: int, stop: int) -> Batch:
    return {name: tensor[start:stop] for name, tensor in batch.items()}


def share(rank: int, ranks: int, tokens: list[int] = MIXED) -> Batch:
    """Return one rank's rows: one for each but the first, which has all others."""
    batch, first = make_batch(tokens), len(tokens) - (ranks - 1)
    return rows(batch, 0, first) if rank == 0 else rows(batch, first + rank - 1, first + rank)


def token_loss(model: nn.Module, batch: Batch) -> Loss:
    return loss_of(model(batch["x"]), batch)


def loss_of(y: Tensor, batch: Batch) -> Loss:
    logits, labels = y.flatten(0, 1), batch["labels"].flatten()
    return Loss(sum=F.cross_entropy(logits, labels, reduction="sum"), count=(labels >= 0).sum())


def row_mean(model: nn.Module, batch: Batch) -> Tensor:
    return model(batch["x"]).square().mean()


def whole(tensor: Tensor) -> Tensor:
    return tensor.full_tensor() if hasattr(tensor, "full_tensor") else tensor  # pyright: ignore[reportAttributeAccessIssue] -- a DTensor


def gradients(model: nn.Module) -> dict[str, Tensor]:
    return {name: whole(p.grad).clone() for name, p in model.named_parameters() if p.grad is not None}


def flags(model: nn.Module) -> list[dict[str, Any]]:
    names = [*FLAGS, "_all_gather_comm", "_reduce_scatter_comm"]
    return [{name: getattr(unit, name) for name in names} for unit in fsdp_units(model)]


@contextmanager
def counting() -> Generator[list[tuple[str, int]]]:
    """Tell the collectives that torch is asked for, and the numbers that each is given."""
    found: list[tuple[str, int]] = []
    names = ["all_reduce", "all_gather_into_tensor", "reduce_scatter_tensor", "all_gather_single"]
    real = {name: getattr(dist, name) for name in [*names, "reduce_scatter_single"] if hasattr(dist, name)}

    def counted(name: str) -> Callable[..., Any]:
        def call(*args: Any, **settings: Any) -> Any:
            given = next(each for each in (*args, *settings.values()) if isinstance(each, Tensor))
            found.append((name, given.numel()))
            return real[name](*args, **settings)

        return call

    for name in real:
        setattr(dist, name, counted(name))
    try:
        yield found
    finally:
        for name, function in real.items():
            setattr(dist, name, function)


class World:
    """A model over the ranks, and one step of it."""

    def __init__(self, model: nn.Module, **settings: Any) -> None:
        self.model = model
        self.optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        self.before = flags(model)
        settings.setdefault("microbatch_size", 1)
        self.events: list[str] = []
        listeners = [lambda event: self.events.append(type(event).__name__)]
        self.accumulator = Accumulator(model, self.optimizer, listeners=listeners, **settings)
        self.seen: list[dict[str, Tensor]] = []
        self.optimizer.register_step_pre_hook(lambda *_: self.seen.append(gradients(model)))

    def step(self, batch: Batch, loss_fn: LossFn, **settings: Any) -> dict[str, Any]:
        self.seen.clear()
        step = self.accumulator.step(batch, loss_fn, **settings)
        return self.told(step)

    def told(self, step: Any) -> dict[str, Any]:
        return {
            "gradients": self.seen[0] if self.seen else {},
            "loss": step.loss,
            "count": step.count,
            "samples": step.samples,
            "microbatches": step.microbatches,
            "grad_norm": step.grad_norm,
            "applied": step.applied,
            "retries": step.retries,
            "sync": step.sync,
            "comm": (step.comm_calls, step.comm_bytes),
            "clean": flags(self.model) == self.before and not gradients(self.model),
        }


def every_way(
    case: Callable[[Callable[..., World]], Any], *, only: Sequence[str] = IDS, **settings: Any
) -> dict[str, Any]:
    """Run a case for every way that gradients meet."""
    found: dict[str, Any] = {}
    for name, (sync, after) in zip(IDS, WAYS, strict=True):
        if name not in only:
            continue

        def world(sync: str = sync, after: bool = after, **more: Any) -> World:
            how = {key: more.pop(key) for key in ("mp_policy", "offload_policy", "mesh") if key in more}
            model = more.pop("model", None) or make_model()
            return World(
                sharded(model, reshard_after_forward=after, **how), ranks=Ranks(sync=sync), **(settings | more)
            )

        found[name] = case(world)
    return found


# -- the cases, each run on every rank of one start of the processes --------------------------------------------------


def case_uneven(rank: int, ranks: int) -> Any:
    return every_way(lambda world: world().step(share(rank, ranks), token_loss), max_grad_norm=100.0)


def case_masked(rank: int, ranks: int) -> Any:
    """Mask all labels but those of the first rank, and say so in three ways."""

    def loss_fn(model: nn.Module, batch: Batch) -> Any:
        y = model(batch["x"])
        loss = loss_of(y, batch)
        # The second is a mean of nothing, and its gradient is NaN, whatever it is multiplied with.
        nothing = [None, Loss(sum=y.sum() / loss.count, count=0), loss]
        return loss if bool(loss.count) else nothing[int(batch["row"][0]) % 3]

    tokens = [6, 0, 3, *[0] * 5]
    return every_way(lambda world: world().step(share(rank, ranks, tokens), loss_fn))


def case_none_without_a_forward(rank: int, ranks: int) -> Any:
    def loss_fn(model: nn.Module, batch: Batch) -> Any:
        return token_loss(model, batch) if (batch["labels"] >= 0).any() else None

    return every_way(lambda world: world().step(share(rank, ranks), loss_fn))


def case_empty_share(rank: int, ranks: int) -> Any:
    batch = make_batch(MIXED)
    mine = batch if rank == ranks - 1 else rows(batch, 0, 0)
    return every_way(lambda world: world(microbatch_size=3).step(mine, row_mean))


def case_terms(rank: int, ranks: int) -> Any:
    def loss_fn(model: nn.Module, batch: Batch) -> Any:
        return {"tokens": token_loss(model, batch), "size": 0.1 * row_mean(model, batch)}

    def counts(batch: Batch) -> Any:
        return {"tokens": (batch["labels"] >= 0).sum()}

    return every_way(lambda world: world().step(share(rank, ranks), loss_fn, counts=counts))


def case_rare(rank: int, ranks: int) -> Any:
    def loss_fn(model: nn.Module, batch: Batch) -> Tensor:
        return model(batch["x"], rare=int(batch["row"][0]) == 0).square().mean()

    return every_way(lambda world: world().step(share(rank, ranks), loss_fn))


def case_clip(rank: int, ranks: int) -> Any:
    return every_way(lambda world: world(max_grad_norm=0.01).step(share(rank, ranks), token_loss))


def case_hybrid(rank: int, ranks: int) -> Any:
    mesh = init_device_mesh("cpu", (2, ranks // 2), mesh_dim_names=("replicate", "shard"))

    def case(world: Callable[..., World]) -> Any:
        made = world(mesh=mesh)
        with counting() as calls:
            told = made.step(share(rank, ranks), token_loss)
        return told | {"calls": list(calls)}

    return every_way(case)


def case_offloaded(rank: int, ranks: int) -> Any:
    policy = CPUOffloadPolicy(pin_memory=False)
    return every_way(lambda world: world(offload_policy=policy).step(share(rank, ranks), token_loss))


def case_narrow(rank: int, ranks: int) -> Any:
    """Add up a 256 and eight ones in bfloat16 parameters, where that would stay 256."""

    def loss_fn(model: nn.Module, piece: Batch) -> Loss:
        return Loss(sum=(model(piece["x"]) * piece["weight"]).sum(), count=1)

    weight = torch.ones(9, 1, 1, dtype=torch.bfloat16)
    weight[0] = 256
    batch = {"x": torch.ones(9, 1, 3, dtype=torch.bfloat16), "weight": weight}
    policy = MixedPrecisionPolicy(reduce_dtype=torch.float32)
    found = {
        "lean": World(sharded(make_model().bfloat16()), ranks=Ranks(sync="lean")).step(batch, loss_fn),
        "fast": World(sharded(make_model().bfloat16(), mp_policy=policy), ranks=Ranks(sync="fast")).step(
            batch, loss_fn
        ),
    }
    model = make_model().bfloat16()
    for row in range(9):  # what a loop of one's own has
        loss_fn(model, {name: each[row : row + 1] for name, each in batch.items()}).sum.backward()
    return found | {"by hand": gradients(model)["body.2.bias"] / 9}


def case_twenty_steps(rank: int, ranks: int) -> Any:
    model = sharded(make_model())
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.01)
    accumulator = Accumulator(model, optimizer, microbatch_size=2)
    losses: list[Tensor] = []
    for number in range(20):
        batch = share(rank, ranks)
        losses.append(accumulator.step(batch | {"x": batch["x"] + number}, token_loss).loss)
    return {"weights": [whole(p.detach()) for p in model.parameters()], "losses": torch.stack(losses)}


def case_calls(rank: int, ranks: int) -> Any:
    """Tell what is said in a window of 4 microbatches, after one that has shared the weights."""

    def case(world: Callable[..., World]) -> Any:
        made, mine = world(), rows(make_batch(MIXED), 0, 4)
        made.step(mine, token_loss)
        with counting() as calls:
            told = made.step(mine, token_loss)
        return told | {"calls": list(calls)}

    return every_way(case)


def running_out(at: set[int], where: str) -> LossFn:
    """Return a loss whose calls of some numbers find no memory."""
    calls: list[int] = []

    def full(*_: object) -> None:
        raise copy.copy(FULL)

    def in_backward(module: nn.Module, given: Any, output: Tensor) -> None:
        output.register_hook(full)

    def loss_fn(model: nn.Module, batch: Batch) -> Loss:
        calls.append(len(calls))
        fails = calls[-1] in at
        if fails and where == "before":
            full()
        handles = []
        if fails and where == "forward":
            handles = [model.get_submodule("body.2").register_forward_pre_hook(full)]
        elif fails and where.startswith("backward"):
            # The first layer's gradient comes after the body's has been scattered.
            place = model.get_submodule("first" if where.endswith("scattered") else "body.1")
            handles = [place.register_forward_hook(in_backward)]
        try:
            return token_loss(model, batch)
        finally:
            for handle in handles:
                handle.remove()

    return loss_fn


FAULTS: dict[str, tuple[str, dict[int, set[int]]]] = {
    "the first thing of all": ("before", {1: {0}}),
    "the first forward": ("forward", {1: {0}}),
    "a later forward": ("forward", {0: {1}}),
    "the first backward": ("backward", {1: {0}}),
    "a later backward": ("backward, scattered", {0: {1}}),
    "the last backward": ("backward, scattered", {0: {2}}),
    "two ranks": ("forward", {0: {1}, 1: {0}}),
}


def out_of_memory(rank: int, names: list[str], world: Callable[..., World]) -> dict[str, Any]:
    """Let ranks run out of memory in a window of three passes, in which the first has three microbatches."""
    mine = rows(make_batch(MIXED), 0, 5) if rank == 0 else rows(make_batch(MIXED), 4 + rank, 5 + rank)
    if rank == dist.get_world_size() - 1:
        mine = rows(make_batch(MIXED), 4 + rank, 8)
    found: dict[str, Any] = {}
    for name in names:
        where, at = FAULTS[name]
        made, before = world(microbatch_size=2), torch.get_rng_state()
        told = made.step(mine, running_out(at.get(rank, set()), where))
        found[name] = told | {
            "events": made.events.count("Retry"),
            "random": torch.equal(before, torch.get_rng_state()),
        }
    return found


def case_out_of_memory(rank: int, ranks: int) -> Any:
    few = ["the first forward", "the last backward"]
    found = every_way(lambda world: out_of_memory(rank, few, world), only=IDS[:3])
    # All of them for the way in which microbatches differ most in what they say.
    return found | every_way(lambda world: out_of_memory(rank, list(FAULTS), world), only=IDS[3:])


def case_out_of_memory_hybrid(rank: int, ranks: int) -> Any:
    mesh = init_device_mesh("cpu", (2, ranks // 2), mesh_dim_names=("replicate", "shard"))
    names = ["a later backward", "the last backward"]
    return every_way(lambda world: out_of_memory(rank, names, lambda **more: world(mesh=mesh, **more)))


def case_failures(rank: int, ranks: int) -> Any:
    """Let one rank fail in its loss function, or find what is not finite, and go on."""

    def failing(model: nn.Module, batch: Batch) -> Any:
        loss = token_loss(model, batch)
        if rank == 1:
            raise ValueError("mine")
        return loss

    def nan(model: nn.Module, batch: Batch) -> Loss:
        loss = token_loss(model, batch)
        return Loss(sum=loss.sum * float("nan"), count=loss.count) if rank == 1 else loss

    def case(world: Callable[..., World]) -> Any:
        found: dict[str, Any] = {}
        for name, loss_fn in [("failing", failing), ("nan", nan)]:
            made = world()
            weights = [whole(p.detach()).clone() for p in made.model.parameters()]
            try:
                made.accumulator.step(share(rank, ranks), loss_fn)
                found[name] = {"error": ""}
            except Exception as error:  # noqa: BLE001 - told to the test
                found[name] = {"error": type(error).__name__, "message": str(error)}
            same = zip(weights, [whole(p.detach()) for p in made.model.parameters()], strict=True)
            found[name] |= {"same": all(torch.equal(a, b) for a, b in same), "clean": flags(made.model) == made.before}
            found[name]["next"] = made.step(share(rank, ranks), token_loss)
        return found

    return every_way(case, only=FAR)


def case_loops(rank: int, ranks: int) -> Any:
    """Write the loop by hand: over a batch, and over a loader."""

    def split(world: Callable[..., World]) -> Any:
        made = world()
        with made.accumulator.window() as window:
            for piece in window.split(share(rank, ranks)):
                window.backward(token_loss(made.model, piece))
        return made.told(window.step)

    def loader(world: Callable[..., World]) -> Any:
        made, mine = world(), share(rank, ranks)
        loader = [rows(mine, row, row + 1) for row in range(len(mine["x"]))]
        for window in made.accumulator.windows(loader, microbatches=8):
            for piece in window:
                window.backward(token_loss(made.model, piece))
            return made.told(window.step)
        raise AssertionError

    def after_an_error(world: Callable[..., World]) -> Any:
        made, mine = world(), rows(make_batch(MIXED), 0, 4) if rank == 0 else rows(make_batch(MIXED), 4, 8)
        with suppress(ValueError), made.accumulator.window() as window:
            for index, piece in enumerate(window.split(mine)):
                window.backward(token_loss(made.model, piece))
                if index == 1:  # on every rank: there is nobody to make the rest
                    raise ValueError
        return made.step(mine, token_loss)

    cases = {"split": split, "loader": loader, "after an error": after_an_error}
    return {name: every_way(case, only=FAR) for name, case in cases.items()}


def case_refused(rank: int, ranks: int) -> Any:
    """Ask for what is not possible, and tell what is said."""
    model = sharded(make_model())
    before, optimizer = flags(model), torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    found: dict[str, str] = {}
    asked: dict[str, dict[str, Any]] = {
        "batch_norm": {"batch_norm": "exact", "ranks": Ranks(sync="lean")},
        "buffer": {"sums": Sums(buffer="none")},
        "compile": {"compile": True},
        "offload": {"offload": "activations"},
        "checkpoint": {"checkpoint": "all"},
        "coupled": {"coupled": "keep"},
        "group": {"ranks": Ranks(group="dp")},
    }
    for name, settings in asked.items():
        found[name] = _error(lambda settings=settings: Accumulator(model, optimizer, microbatch_size=1, **settings))
    found["sync"] = _error(lambda: Ranks(sync="slow"))
    found["reduce_dtype"] = _error(lambda: Ranks(reduce_dtype=torch.bfloat16))
    accumulator = Accumulator(model, optimizer, microbatch_size=1)
    mine = share(rank, ranks)
    narrow = sharded(make_model().bfloat16())
    found["fast"] = _error(lambda: Accumulator(narrow, torch.optim.SGD(narrow.parameters()), ranks=Ranks(sync="fast")))

    def by_hand() -> None:
        with accumulator.window() as window:
            window.backward(row_mean(model, rows(mine, 0, 1)), count=1)

    found["by hand"] = _error(by_hand)
    return {"said": found, "clean": flags(model) == before}


def _error(function: Callable[[], object]) -> str:
    try:
        function()
    except Exception as error:  # noqa: BLE001 - told to the test
        return f"{type(error).__name__}: {error}"
    return ""


def case_auto(rank: int, ranks: int) -> Any:
    """Let the second way be chosen where memory allows it on every rank."""
    found: dict[str, list[Any]] = {}
    for name, budget in [("room", "1 GiB"), ("one has none", "1 GiB" if rank else "11 KiB")]:
        made = World(sharded(make_model()), memory_budget=budget)
        found[name] = [made.step(share(rank, ranks), token_loss)["sync"] for _ in range(3)]
    return found


ON_FOUR = {"uneven", "masked", "rare", "hybrid", "calls", "out_of_memory_hybrid"}
CASES = cases_in(globals())
ON_TWO = set(CASES) - {"out_of_memory_hybrid"}


def all_cases(rank: int, ranks: int) -> dict[str, Any]:
    gc.freeze()  # what is imported by now is collected once for each time that memory ends
    return run_cases(
        {name: case for name, case in CASES.items() if name in (ON_FOUR if ranks == 4 else ON_TWO)}, rank, ranks
    )


@pytest.fixture(scope="module")
def runs(run_ranks: Any, tmp_path_factory: pytest.TempPathFactory) -> Callable[[int], list[Any]]:
    """Return what starts the processes once for each number of them."""

    @cache
    def run(ranks: int) -> list[Any]:
        folder: Path = tmp_path_factory.mktemp(f"sharded-{ranks}")
        return run_ranks(all_cases, ranks, folder, timeout=120)

    return run


@pytest.fixture
def two(runs: Callable[[int], list[Any]]) -> list[Any]:
    return runs(2)


@pytest.fixture
def four(runs: Callable[[int], list[Any]]) -> list[Any]:
    return runs(4)


@pytest.fixture(params=[2, 4], ids=["2 ranks", "4 ranks"])
def told(request: pytest.FixtureRequest, runs: Callable[[int], list[Any]]) -> list[Any]:
    return runs(request.param)


# -- what plain PyTorch says on the whole batch -----------------------------------------------------------------------


def token_mean(model: nn.Module, batch: Batch) -> Tensor:
    loss = token_loss(model, batch)
    return loss.sum / loss.count


def reference(loss_fn: Callable[[nn.Module, Batch], Tensor], batch: Batch) -> tuple[dict[str, Tensor], Tensor]:
    model = make_model()
    loss = loss_fn(model, batch)
    loss.backward()
    return gradients(model), loss.detach()


TOKENS = reference(token_mean, make_batch(MIXED))


def off(ours: dict[str, Tensor], theirs: dict[str, Tensor]) -> float:
    """Return the relative error of one gradient against another."""
    assert sorted(ours) == sorted(theirs)
    one, other = (torch.cat([grads[name].flatten().double() for name in sorted(theirs)]) for grads in (ours, theirs))
    return float((one - other).norm() / other.norm())


def check(ours: dict[str, Any], theirs: tuple[dict[str, Tensor], Tensor]) -> None:
    assert off(ours["gradients"], theirs[0]) <= 1e-12
    assert float((ours["loss"] - theirs[1]).abs()) <= 1e-12
    assert ours["applied"]
    assert ours["clean"]  # flags as they were, and no gradient left


@pytest.mark.parametrize("way", IDS)
@pytest.mark.parametrize("case", ["uneven", "hybrid"])
def test_n3_r1_r2_uneven_rows_and_tokens(told: list[Any], case: str, way: str) -> None:
    check_uneven(result(told, case), way)


@pytest.mark.parametrize("way", IDS)
@pytest.mark.parametrize("case", ["none_without_a_forward", "offloaded"])
def test_microbatches_without_a_forward_and_shards_on_the_host(two: list[Any], case: str, way: str) -> None:
    check_uneven(result(two, case), way)


def check_uneven(told: list[Any], way: str) -> None:
    norm = torch.cat([gradient.flatten() for gradient in TOKENS[0].values()]).norm()
    for rank, found in enumerate(told):
        check(found[way], TOKENS)
        assert found[way]["grad_norm"].item() == pytest.approx(norm.item(), rel=1e-12)
        assert found[way]["microbatches"] == (8 - len(told) + 1 if rank == 0 else 1)
        assert (found[way]["count"], found[way]["samples"]) == (27, 8)
        assert found[way]["sync"] == way[:4]


def test_the_mean_of_the_ranks_means_is_refused_by_the_same_comparison() -> None:
    per_rank = [reference(token_mean, share(rank, 2))[0] for rank in range(2)]
    usual = {name: (per_rank[0][name] + per_rank[1][name]) / 2 for name in per_rank[0]}
    assert off(usual, TOKENS[0]) > 0.1


@pytest.mark.parametrize("way", IDS)
def test_n4_masked_microbatches_and_ranks(told: list[Any], way: str) -> None:
    theirs = reference(token_mean, make_batch([6, 0, 3, *[0] * 5]))
    for found in result(told, "masked"):
        check(found[way], theirs)


@pytest.mark.parametrize("way", IDS)
def test_a_rank_with_an_empty_share(two: list[Any], way: str) -> None:
    theirs = reference(row_mean, make_batch(MIXED))
    for rank, found in enumerate(result(two, "empty_share")):
        check(found[way], theirs)
        assert found[way]["microbatches"] == (3 if rank == len(two) - 1 else 0)


@pytest.mark.parametrize("way", IDS)
def test_n5_terms_with_denominators_of_their_own(two: list[Any], way: str) -> None:
    theirs = reference(lambda model, batch: token_mean(model, batch) + 0.1 * row_mean(model, batch), make_batch(MIXED))
    for found in result(two, "terms"):
        check(found[way], theirs)


@pytest.mark.parametrize("way", IDS)
def test_r5_a_parameter_that_one_microbatch_of_one_rank_uses(told: list[Any], way: str) -> None:
    def loss_fn(model: nn.Module, batch: Batch) -> Tensor:
        pieces = [model(batch["x"][row : row + 1], rare=row == 0).square().mean() for row in range(8)]
        return torch.stack(pieces).mean()

    theirs = reference(loss_fn, make_batch(MIXED))
    assert "rare.weight" in theirs[0]
    for found in result(told, "rare"):
        check(found[way], theirs)


@pytest.mark.parametrize("way", IDS)
def test_b5_clipping_is_of_the_whole_gradient(two: list[Any], way: str) -> None:
    norm = torch.cat([gradient.flatten() for gradient in TOKENS[0].values()]).norm()
    clipped = {name: gradient * (0.01 / (norm + 1e-6)) for name, gradient in TOKENS[0].items()}
    for found in result(two, "clip"):
        check(found[way], (clipped, TOKENS[1]))


def test_p1_bfloat16_parameters_add_up_to_more_than_256(two: list[Any]) -> None:
    for found in result(two, "narrow"):
        mean = torch.full((4,), 264 / 9, dtype=torch.bfloat16)
        for sync in ("lean", "fast"):
            assert torch.equal(found[sync]["gradients"]["body.2.bias"], mean)
        assert not torch.equal(found["by hand"], mean)


def test_r1_the_weights_after_twenty_steps(two: list[Any]) -> None:
    model = make_model()
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.01)
    losses: list[Tensor] = []
    for number in range(20):
        batch = make_batch(MIXED)
        loss = token_mean(model, batch | {"x": batch["x"] + number})
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.detach())
    for found in result(two, "twenty_steps"):
        torch.testing.assert_close(found["losses"], torch.stack(losses), rtol=1e-10, atol=0)
        for ours, theirs in zip(found["weights"], model.parameters(), strict=True):
            torch.testing.assert_close(ours, theirs.detach(), rtol=1e-9, atol=1e-10)


@pytest.mark.parametrize("way", IDS)
def test_r4_one_scatter_for_each_unit_of_a_step(told: list[Any], way: str) -> None:
    microbatches, units = 4, 3
    for found in result(told, "calls"):
        calls = [name for name, _ in found[way]["calls"]]
        scatters = sum(name.startswith("reduce_scatter") for name in calls)
        gathers = sum(name.startswith("all_gather") for name in calls)
        fast, again = way.startswith("fast"), way.endswith("3")
        assert scatters == units * (1 if fast else microbatches)
        assert gathers == (2 * units if again else units) * (microbatches if again or not fast else 1)
        # Beside them: two agreements before and one after, and the norm's sum, which is of 8 bytes and not counted.
        assert found[way]["comm"][0] == len(calls) - 1
        assert [numel for name, numel in found[way]["calls"] if name == "all_reduce"][-1] == 1


@pytest.mark.parametrize("sync", ["lean", "fast"])
def test_replicas_meet_once(told: list[Any], sync: str) -> None:
    for found in result(told, "hybrid"):
        for way in (way for way in IDS if way.startswith(sync)):
            sums = [numel for name, numel in found[way]["calls"] if name == "all_reduce"]
            sizes = [-(-numel // (len(told) // 2)) for numel in (12, 44)]
            assert all(sums.count(size) <= 1 for size in sizes)


@pytest.mark.parametrize("way", IDS)
def test_r7_all_ranks_start_over_together(two: list[Any], way: str) -> None:
    for found in result(two, "out_of_memory"):
        for ours in found[way].values():
            check(ours, TOKENS)
            assert ours["retries"] == ours["events"] == 1
            assert ours["random"]


@pytest.mark.parametrize("way", IDS)
def test_r7_with_replicas(four: list[Any], way: str) -> None:
    for found in result(four, "out_of_memory_hybrid"):
        for ours in found[way].values():
            check(ours, TOKENS)
            assert ours["retries"] == 1


@pytest.mark.parametrize("way", FAR)
def test_r6_an_error_on_one_rank_is_an_error_on_all_and_leaves_nothing(two: list[Any], way: str) -> None:
    for rank, found in enumerate(result(two, "failures")):
        failing, nan = found[way]["failing"], found[way]["nan"]
        assert failing["error"] == ("ValueError" if rank == 1 else "RankError")
        assert nan["error"] == "NonfiniteError"
        for each in (failing, nan):
            assert each["same"]
            assert each["clean"]
            check(each["next"], TOKENS)


@pytest.mark.parametrize("way", FAR)
@pytest.mark.parametrize("loop", ["split", "loader", "after an error"])
def test_hand_written_loops(two: list[Any], loop: str, way: str) -> None:
    for found in result(two, "loops"):
        check(found[loop][way], TOKENS)


REFUSED = {
    "batch_norm": 'batch_norm="exact" does not go with Ranks(sync="lean")',
    "buffer": 'a fully sharded model does not go with Sums(buffer="none")',
    "compile": "a fully sharded model does not go with compile=",
    "offload": "a fully sharded model does not go with offload=",
    "checkpoint": "a fully sharded model does not go with checkpoint=",
    "coupled": 'a fully sharded model does not go with coupled="keep"',
    "sync": 'sync must be "auto", "lean" or "fast"',
    "reduce_dtype": "reduce_dtype must be",
    "group": "Ranks: group must be",
    "fast": 'pass reduce_dtype=torch.float32 to the policy, or sync="lean"',
    "by hand": "window.split",
}


def test_what_does_not_go_together_is_refused_by_name(two: list[Any]) -> None:
    for found in result(two, "refused"):
        assert found["clean"]
        assert sorted(found["said"]) == sorted(REFUSED)
        for name, words in REFUSED.items():
            assert words in found["said"][name]
            assert found["said"][name].startswith(("ConfigError", "WindowError"))


def test_the_way_is_chosen_by_what_memory_allows_on_every_rank(two: list[Any]) -> None:
    for found in result(two, "auto"):
        assert found["room"] == ["lean", "fast", "fast"]
        assert found["one has none"] == ["lean", "lean", "lean"]
