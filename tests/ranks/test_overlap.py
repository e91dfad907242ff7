"""Gradients that are reduced while the last backward runs: the same ones, and no rank that waits in vain."""

import copy
import re
import sys
from collections.abc import Callable, Iterator, Sequence
from types import ModuleType
from typing import Any

import pytest
import torch
from tests.faults import FULL
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from torch.utils.checkpoint import checkpoint

from microbatch.errors import ConfigError
from microbatch.loss.loss import Loss
from microbatch.ranks import reduce
from microbatch.step.accumulator import Accumulator
from microbatch.step.options import Ranks, Sums

Fault = Callable[[], None]


class Net(nn.Module):
    """Layers in a row, and before them one that only some microbatches use, and one that none does.

    Of the three buckets, each of two weights, two are whole before backward has ended; in that of `rare` and `never`
    something is always missing.
    """

    def __init__(self) -> None:
        super().__init__()
        self.never = nn.Linear(3, 2, bias=False)
        self.rare = nn.Linear(3, 3, bias=False)
        self.layers = nn.ModuleList([nn.Linear(3, 3, bias=False) for _ in range(4)])

    def forward(self, x: Tensor, *, rare: bool = False, fault: Fault | None = None) -> Tensor:
        x = self.rare(x) if rare else x
        for index, layer in enumerate(self.layers):
            x = layer(x).tanh()
            if index == 1 and fault is not None:
                x = Fails.apply(x, fault)
        return x


class Fails(torch.autograd.Function):
    """Has a fault in backward, when the gradients of what comes after it are on their way."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, fault: Fault) -> Tensor:
        ctx.fault = fault
        return x.clone()

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:
        ctx.fault()
        return grads[0], None


class World:
    """A model on every rank, with rows of its own, and a step of it."""

    def __init__(self, rank: int, rows: Sequence[int], *, wrap: bool = False, **settings: Any) -> None:
        torch.manual_seed(3)
        self.rank, self.bare = rank, Net().double()
        model = DistributedDataParallel(self.bare, find_unused_parameters=True) if wrap else self.bare
        self.optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        self.optimizer.register_step_pre_hook(self._look)
        settings = {"microbatch_size": 2, "ranks": Ranks(overlap=True), **settings}
        self.accumulator = Accumulator(model, self.optimizer, **settings)
        self.whole = torch.randn(sum(rows), 3, dtype=torch.float64)
        self.mine = self.whole.split(list(rows))[rank]
        self.rows = rows
        self.seen: dict[str, Tensor] = {}

    def _look(self, *_: object) -> None:
        self.seen = {name: p.grad.clone() for name, p in self.bare.named_parameters() if p.grad is not None}

    def weights(self) -> Tensor:
        return torch.cat([each.detach().flatten() for each in self.bare.parameters()])

    def expected(self, loss_fn: Callable[..., Loss | None]) -> dict[str, Tensor]:
        """Return the gradient of all ranks' microbatches, by plain autograd."""
        model = copy.deepcopy(self.bare)
        total, count = torch.zeros((), dtype=torch.float64), 0.0
        for rank, own in enumerate(self.whole.split(list(self.rows))):
            for index, piece in enumerate(own.split(2) if len(own) else ()):
                found = loss_fn(model, piece, rank, index)
                if found is not None:
                    total, count = total + found.sum, count + float(found.count)
        (total / count).backward()
        return {name: each.grad for name, each in model.named_parameters() if each.grad is not None}

    def step(self, plain: Callable[..., Any], faulty: Callable[..., Any] | None = None) -> dict[str, Any]:
        """Take a step, and say how far it is from what it should be, or what it left behind."""
        before, expected, calls = self.weights(), self.expected(plain), iter(range(100))
        chosen = faulty or plain
        told: dict[str, Any] = {"error": "", "message": ""}
        self.seen = {}
        try:
            step = self.accumulator.step(self.mine, lambda model, x: chosen(model, x, self.rank, next(calls)))
        except Exception as error:  # noqa: BLE001 - told to the test
            told = {"error": type(error).__name__, "message": str(error)}
        else:
            told |= {"retries": step.retries, "comm": (step.comm_calls, step.comm_bytes), "applied": step.applied}
            told |= {"microbatches": step.microbatches, "samples": step.samples}
        overlap = getattr(self.accumulator._it._together, "overlap", None)
        told["early"] = 0 if overlap is None else overlap.early
        told["same"] = bool(torch.equal(before, self.weights()))
        told["clean"] = all(each.grad is None for each in self.bare.parameters())
        told["hooks"] = sum(len(each._post_accumulate_grad_hooks or ()) for each in self.bare.parameters())
        told["names"] = sorted(self.seen) == sorted(expected)
        if told["names"]:
            told["off"] = max(float((self.seen[name] - expected[name]).abs().max()) for name in expected)
        return told


def fine(model: nn.Module, x: Tensor, rank: int, index: int) -> Loss:
    del rank, index
    return Loss(sum=model(x).square().sum(), count=len(x))


def failing(error: Exception, *, rank: int, at: int, where: str = "backward") -> Callable[..., Loss]:
    def fault() -> None:
        raise copy.copy(error)

    def loss_fn(model: nn.Module, x: Tensor, own: int, index: int) -> Loss:
        fails = (own, index) == (rank, at)
        if fails and where == "forward":
            fault()
        y = model(x, fault=fault) if fails else model(x)
        return Loss(sum=y.square().sum(), count=len(x))

    return loss_fn


def rarely(model: nn.Module, x: Tensor, rank: int, index: int) -> Loss:
    return Loss(sum=model(x, rare=(rank, index) == (0, 0)).square().sum(), count=len(x))


def rarely_last(model: nn.Module, x: Tensor, rank: int, index: int) -> Loss:
    return Loss(sum=model(x, rare=(rank, index) == (0, 2)).square().sum(), count=len(x))


def nothing_last(model: nn.Module, x: Tensor, rank: int, index: int) -> Loss | None:
    return None if (rank, index) == (0, 2) else fine(model, x, rank, index)


def infinite(model: nn.Module, x: Tensor, rank: int, index: int) -> Loss:
    return Loss(sum=model(x).square().sum() * (float("inf") if (rank, index) == (1, 1) else 1), count=len(x))


def twice_reentrant(model: nn.Module, x: Tensor, rank: int, index: int) -> Loss:
    """Use a layer in two checkpoints whose backwards are inside of the window's, so that its gradient grows twice."""
    y = model(x)
    if (rank, index) == (0, 2):
        layer = model.get_submodule("layers.3")
        for _ in range(2):
            y = checkpoint(layer, y, use_reentrant=True)
    return Loss(sum=y.square().sum(), count=len(x))


def by_hand(rank: int, *, wrong: bool) -> dict[str, Any]:
    """Leave a loop before its end; or, on one rank, begin another one."""
    world = World(rank, [6, 3])
    before, told = world.weights(), dict[str, Any](error="")
    try:
        with world.accumulator.window() as window:
            for index, x in enumerate(window.split(world.mine)):
                window.backward(fine(world.bare, x, rank, index))
                if index == 1 and not wrong:
                    break
            for x in window.split(world.mine) if wrong and rank == 0 else ():
                window.backward(fine(world.bare, x, rank, 0))
        told["samples"] = window.step.samples
    except Exception as error:  # noqa: BLE001 - told to the test
        told["error"] = type(error).__name__
    return {**told, "same": bool(torch.equal(before, world.weights())), "next": world.step(fine)}


def several_steps(rank: int) -> dict[str, Any]:
    """Fail in between, and see that the steps around it are exact."""
    world = World(rank, [6, 4])
    fault = failing(RuntimeError("a fault of the kernel"), rank=1, at=1)
    return {"before": world.step(fine), "fault": world.step(fine, fault), "after": world.step(rarely)}


def one_captured(rank: int) -> dict[str, Any]:
    """Take over the gradients of one microbatch as if they lay in the memory of a captured graph."""
    name = "torch._inductor.cudagraph_trees"
    sys.modules[name] = ModuleType(name)
    try:
        return World(rank, [2, 2], compile=True).step(eager)
    finally:
        del sys.modules[name]


@torch.compiler.disable
def eager(model: nn.Module, x: Tensor, rank: int, index: int) -> Loss:
    return fine(model, x, rank, index)


def cases(rank: int, ranks: int) -> dict[str, Any]:
    reduce.BUCKET_BYTES = 9 * 8 + 1  # two weights
    return {
        "captured": one_captured(rank),
        "uneven": World(rank, [9, 1]).step(fine),
        "off": World(rank, [9, 1], ranks=Ranks()).step(fine),
        "no rows": World(rank, [5, 0]).step(fine),
        "wrapped": World(rank, [4, 4], wrap=True).step(fine),
        "rare": World(rank, [6, 4]).step(rarely),
        "rare, last": World(rank, [6, 4]).step(rarely_last),
        "nothing last": World(rank, [6, 4]).step(nothing_last),
        "infinite": World(rank, [6, 4], nonfinite="skip").step(fine, infinite),
        "full, last backward": World(rank, [6, 4]).step(fine, failing(FULL, rank=0, at=2)),
        "full, before": World(rank, [6, 4]).step(fine, failing(FULL, rank=0, at=1)),
        "full, both": World(rank, [4, 4]).step(fine, both_full),
        "in forward": World(rank, [6, 4]).step(fine, failing(RuntimeError("mine"), rank=0, at=2, where="forward")),
        "reentrant": World(rank, [6, 4]).step(fine, twice_reentrant),
        "steps": several_steps(rank),
        "left early": by_hand(rank, wrong=False),
        "split twice": by_hand(rank, wrong=True),
    }


def both_full(model: nn.Module, x: Tensor, rank: int, index: int) -> Loss:
    """Memory ends on every rank in its last backward."""
    return failing(FULL, rank=rank, at=1)(model, x, rank, index)


@pytest.fixture(scope="module")
def told(run_ranks: Callable[..., list[Any]], tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    return run_ranks(cases, 2, tmp_path_factory.mktemp("overlap"))


ROWS = {
    "captured": 4,
    "uneven": 10,
    "off": 10,
    "no rows": 5,
    "wrapped": 8,
    "rare": 10,
    "rare, last": 10,
    "nothing last": 10,
} | {
    "captured": 4,
    "full, last backward": 10,
    "full, before": 10,
    "full, both": 8,
}


@pytest.mark.parametrize("case", ROWS)
def test_the_gradient_is_that_of_all_rows(told: list[dict[str, Any]], case: str):
    for rank in told:
        found = rank[case]
        assert (found["error"], found["message"]) == ("", "")
        assert (found["names"], found["clean"], found["hooks"], found["applied"]) == (True, True, 0, True)
        assert found["off"] <= 1e-12
        assert (found["samples"], found["same"]) == (ROWS[case], False)


def test_buckets_leave_during_the_last_backward(told: list[dict[str, Any]]):
    for rank in told:
        assert [rank[case]["early"] for case in ("uneven", "wrapped", "rare", "full, last backward")] == [2] * 4
        # Of the layers between the fault and the loss.
        assert rank["steps"]["fault"]["early"] == (1 if rank is told[1] else 2)
        assert rank["off"]["early"] == 0
    assert [rank["no rows"]["early"] for rank in told] == [2, 0]
    assert [rank["nothing last"]["early"] for rank in told] == [0, 2]


def test_every_rank_says_as_much_and_each_bucket_once(told: list[dict[str, Any]]):
    first, second = (
        {case: rank[case]["comm"] for case in ("uneven", "no rows", "rare", "nothing last")} for rank in told
    )
    assert first == second
    assert len(set(first.values())) == 1
    broadcasts, agreements, buckets = 6, 2, 3
    # Once: that all are set up alike, and that all have taken their first step.
    assert first["uneven"][0] == 1 + broadcasts + agreements + buckets + 1


@pytest.mark.parametrize("case", ["in forward", "reentrant"])
def test_a_fault_hangs_nobody_and_changes_nothing(told: list[dict[str, Any]], case: str):
    first, second = (rank[case] for rank in told)
    assert first["error"] == {"in forward": "RuntimeError", "reentrant": "WindowError"}[case]
    assert second["error"] == "RankError"
    for found in (first, second):
        assert (found["same"], found["clean"], found["hooks"]) == (True, True, 0)


def test_a_fault_in_the_last_backward_leaves_the_next_step_exact(told: list[dict[str, Any]]):
    for rank, error in zip(told, ("RankError", "RuntimeError"), strict=True):
        steps = rank["steps"]
        assert (steps["fault"]["error"], steps["fault"]["same"], steps["fault"]["clean"]) == (error, True, True)
        assert steps["before"]["off"] <= 1e-12
        assert steps["after"]["off"] <= 1e-12


def test_memory_that_ends_is_known_to_those_who_wait_for_it(told: list[dict[str, Any]]):
    assert [rank["full, last backward"]["retries"] for rank in told] == [1, 1]
    assert [rank["full, last backward"]["microbatches"] for rank in told] == [6, 2]
    assert [rank["full, before"]["retries"] for rank in told] == [1, 0]
    assert [rank["full, both"]["retries"] for rank in told] == [1, 1]


def test_a_window_that_is_not_finite_is_dropped_on_all(told: list[dict[str, Any]]):
    for rank in told:
        assert (rank["infinite"]["applied"], rank["infinite"]["same"]) == (False, True)


def test_a_loop_of_ones_own_may_end_early_but_not_begin_again(told: list[dict[str, Any]]):
    for rank, error in zip(told, ("WindowError", "RankError"), strict=True):
        assert rank["left early"]["error"] == ""
        assert rank["left early"]["samples"] == 4 + 3
        assert (rank["split twice"]["error"], rank["split twice"]["same"]) == (error, True)
        assert rank["left early"]["next"]["off"] <= 1e-12
        assert rank["split twice"]["next"]["off"] <= 1e-12


def refused() -> Iterator[tuple[str, dict[str, Any]]]:
    yield "Ranks(deterministic=True)", {"ranks": Ranks(overlap=True, deterministic=True), "microbatch_size": 2}
    yield 'batch_norm="exact"', {"batch_norm": "exact"}
    yield 'Sums(buffer="none")', {"sums": Sums(buffer="none")}
    yield 'dropout="by_row"', {"dropout": "by_row"}


@pytest.mark.parametrize(("name", "settings"), list(refused()))
def test_what_does_not_go_with_it_is_refused(name: str, settings: dict[str, Any]):
    model = nn.Linear(3, 1)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    asked: dict[str, Any] = {"ranks": Ranks(overlap=True), **settings}
    with pytest.raises(ConfigError, match=re.escape("Ranks(overlap=True) does not go with " + name)):
        Accumulator(model, optimizer, **asked)


def test_narrow_parameters_and_encoders_are_refused():
    model = nn.Linear(3, 1).bfloat16()
    with pytest.raises(ConfigError, match="parameters narrower"):
        Accumulator(model, torch.optim.SGD(model.parameters()), ranks=Ranks(overlap=True))
    wide = nn.Linear(3, 1)
    accumulator = Accumulator(wide, torch.optim.SGD(wide.parameters()), ranks=Ranks(overlap=True))
    with pytest.raises(ConfigError, match="encode="):
        accumulator.step(torch.ones(2, 3), lambda model, z: z.sum(), encode=lambda model, x: model(x))
    accumulator.step(torch.ones(2, 3), lambda model, x: model(x).mean())  # of one process, it does nothing
