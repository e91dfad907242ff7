"""Law R7, at the window's end: memory that ends there ends there for all, and nobody waits or goes on alone."""

import copy
import time
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from tests.faults import FULL
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from microbatch.step.accumulator import Accumulator

RATE = 0.1


class Hungry(torch.optim.AdamW):
    """AdamW that finds no memory: while it makes its first state, or when it has written to a weight."""

    fault = ""

    @torch.no_grad()
    def step(self, closure: Any = None) -> Any:
        first, *others = (each for group in self.param_groups for each in group["params"])
        if self.fault:
            self.state[first]["exp_avg"] = torch.zeros_like(first)
        if self.fault == "error":
            raise ValueError("mine")
        if self.fault == "written":
            others[0].mul_(0.5)
        if self.fault:
            raise copy.copy(FULL)
        return super().step(closure)


class NoRoomFor(TorchDispatchMode):
    """Find no memory for fresh vectors of one length, some times."""

    def __init__(self, numel: int, *, times: int) -> None:
        super().__init__()
        self.numel, self.times = numel, times

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is torch.ops.aten.empty.memory_format and list(args[0]) == [self.numel] and self.times:
            self.times -= 1
            raise copy.copy(FULL)
        return func(*args, **(kwargs or {}))


def square(model: nn.Module, x: Tensor) -> Tensor:
    return model(x).square().mean()


class World:
    """The same model on every rank, with buffers, dropout and gradients of its user's; rows of its own on each."""

    def __init__(self, rank: int, ranks: int, *, several: bool = False) -> None:
        torch.manual_seed(7)
        self.rank = rank
        self.model = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4), nn.Dropout(0.0), nn.Linear(4, 1)).double()
        parameters = list(self.model.parameters())
        split = [parameters[:2], parameters[2:]] if several else [parameters]
        self.optimizers = [Hungry(each, lr=RATE) for each in split]
        self.accumulator = Accumulator(self.model, self.optimizers, microbatch_size=2)
        self.whole = torch.randn(4 * ranks, 3, dtype=torch.float64)
        self.rows = self.whole[4 * rank : 4 * rank + 4]
        self.mine = torch.full_like(parameters[-1], 9.0)
        self.reduced: list[int] = []

    def attempt(self, *faults: str) -> dict[str, Any]:
        """Try a step with these faults in the optimizers, and tell what became of it."""
        last = list(self.model.parameters())[-1]
        last.grad = self.mine
        before, started = self.picture(), time.monotonic()
        for optimizer, fault in zip(self.optimizers, faults, strict=True):
            optimizer.fault = fault
        told = self.step()
        for optimizer in self.optimizers:
            optimizer.fault = ""
        gradients = [parameter.grad for parameter in self.model.parameters()]
        kept = last.grad is self.mine and bool(self.mine.eq(9).all()) and gradients[:-1] == [None] * len(gradients[:-1])
        after = self.picture()
        return told | {
            "changed": [place for place, each in enumerate(before) if not torch.equal(each, after[place])],
            "gradients": kept,
            "state": sum(map(len, (value for each in self.optimizers for value in each.state.values()))),
            "seconds": time.monotonic() - started,
        }

    def picture(self) -> list[Tensor]:
        tensors = [*self.model.parameters(), *self.model.buffers(), torch.get_rng_state()]
        return [tensor.detach().clone() for tensor in tensors]

    def step(self) -> dict[str, Any]:
        """Take a step, count its collectives, and say how it failed."""
        self.reduced, all_reduce = [], dist.all_reduce

        def counted(tensor: Tensor, *args: Any, **kwargs: Any) -> Any:
            self.reduced.append(tensor.numel())
            return all_reduce(tensor, *args, **kwargs)

        dist.all_reduce = counted
        try:
            step = self.accumulator.step(self.rows, square)
        except Exception as error:  # noqa: BLE001 - told to the test
            message = "\n".join([str(error), *getattr(error, "__notes__", [])])
            return {"error": type(error).__name__, "message": message}
        finally:
            dist.all_reduce = all_reduce
        return {"error": "", "message": "", "retries": step.retries}

    def off(self) -> float:
        """Take a step without faults, and compare the weights with those of one process's step on the whole batch."""
        alone = copy.deepcopy(self.model).eval()
        self.model.eval()
        optimizers = [torch.optim.AdamW(each, lr=RATE) for each in self.split(alone)]
        for _ in range(2):
            self.step()
            for optimizer in optimizers:
                optimizer.zero_grad()
            square(alone, self.whole).backward()
            for optimizer in optimizers:
                optimizer.step()
        pairs = zip(self.model.parameters(), alone.parameters(), strict=True)
        return max(float((a - b).detach().abs().max()) for a, b in pairs)

    def split(self, model: nn.Module) -> list[list[Tensor]]:
        places = {id(parameter): place for place, parameter in enumerate(self.model.parameters())}
        theirs = list(model.parameters())
        return [[theirs[places[id(p)]] for g in each.param_groups for p in g["params"]] for each in self.optimizers]


# What each rank's optimizers do in the first step.
FAULTS: dict[str, list[tuple[str, ...]]] = {
    "state": [("",), ("state",), ("",)],
    "first rank": [("state",), ("",), ("",)],
    "everybody": [("state",), ("state",), ("state",)],
    "error": [("",), ("",), ("error",)],
    "half written beside one that is not": [("written",), ("state",), ("",)],
    "half written": [("",), ("written",), ("",)],
    "everybody half written": [("written",), ("written",), ("written",)],
    "several": [("", ""), ("state", ""), ("", "")],
    "several, the second": [("", ""), ("", "state"), ("", "")],
}
TAKEN_BACK = [*list(FAULTS)[:5], "several"]


def no_room_for_a_bucket(rank: int, ranks: int) -> dict[str, Any]:
    told: dict[str, Any] = {}
    for name, times in (("once", 1), ("always", 100)):
        world = World(rank, ranks)
        numel = sum(parameter.numel() for parameter in world.model.parameters())
        world.model[1].eval()  # it would not take the single row that is tried at last
        with NoRoomFor(numel, times=times if rank == 1 else 0):
            told[name] = world.attempt("")
        told[name]["off"] = world.off() if times > 1 else 0.0
    return told


def afterwards(rank: int, ranks: int) -> dict[str, Any]:
    """Count the collectives of a first step, of later ones, and of one that meets other parameters."""
    world = World(rank, ranks)
    frozen = next(iter(world.model.parameters()))
    counts: list[int] = []
    for step in range(5):
        frozen.requires_grad_(step >= 3)
        world.step()
        counts.append(len(world.reduced))
    resumed = World(rank, ranks)
    resumed.optimizers[0].load_state_dict(world.optimizers[0].state_dict())
    resumed.accumulator.load_state_dict(world.accumulator.state_dict())
    return {"counts": counts, "resumed": resumed.attempt("state" if rank == 1 else "")}


def going_on_alone(rank: int, ranks: int) -> list[dict[str, Any]]:
    """Fail on one rank in a later step, which the others take, and go on as if nothing had been."""
    world = World(rank, ranks)
    world.step()
    later = world.attempt("error" if rank == 1 else "")
    return [later, world.attempt("")]


def all_cases(rank: int, ranks: int) -> dict[str, Any]:
    told: dict[str, Any] = {}
    for name, faults in FAULTS.items():
        world = World(rank, ranks, several=len(faults[0]) > 1)
        told[name] = world.attempt(*faults[rank])
        told[name]["off"] = world.off() if name in TAKEN_BACK else 0.0
    return told | {
        "bucket": no_room_for_a_bucket(rank, ranks),
        "afterwards": afterwards(rank, ranks),
        "alone": going_on_alone(rank, ranks),
    }


@pytest.fixture(scope="module")
def told(run_ranks: Any, tmp_path_factory: pytest.TempPathFactory) -> list[Any]:
    folder: Path = tmp_path_factory.mktemp("optimizer")
    return run_ranks(all_cases, 3, folder)


def own_error(fault: tuple[str, ...]) -> str:
    return "ValueError" if "error" in fault else "OutOfMemoryError" if any(fault) else "RankError"


@pytest.mark.parametrize("name", FAULTS)
def test_r7_all_ranks_raise_and_nobody_waits(told: list[Any], name: str) -> None:
    for rank, found in enumerate(told):
        assert found[name]["error"] == own_error(FAULTS[name][rank]), found[name]["message"]
        assert found[name]["seconds"] < 10
        assert found[name]["gradients"] == (name in TAKEN_BACK)  # elsewhere the step has been, and used them up


@pytest.mark.parametrize("name", TAKEN_BACK)
def test_r7_the_step_is_taken_back_where_any_rank_has_the_weights_from_before(told: list[Any], name: str) -> None:
    for found in told:
        words = "no weight was changed" if name == "everybody" else "as before the window on every rank"
        assert words in found[name]["message"]
        assert found[name]["changed"] == []
        assert found[name]["state"] == 0
        assert found[name]["off"] <= 1e-12


@pytest.mark.parametrize("name", [name for name in FAULTS if name not in TAKEN_BACK])
def test_r7_where_nobody_has_them_all_ranks_say_so(told: list[Any], name: str) -> None:
    for found in told:
        assert "checkpoint" in found[name]["message"]
        # Weights and buffers agree: where weights were written, batch normalisation's three buffers moved, too.
        assert {6, 7, 8} < set(found[name]["changed"])


def test_r7_memory_to_reduce_in_is_asked_for_before_the_ranks_agree(told: list[Any]) -> None:
    for rank, found in enumerate(told):
        once, always = found["bucket"]["once"], found["bucket"]["always"]
        assert once["error"] == ""
        assert once["retries"] == (rank == 1)
        assert always["error"] == ("OutOfMemoryError" if rank == 1 else "RankError")
        assert always["changed"] == []
        assert always["gradients"]
        assert always["off"] <= 1e-12


def test_r4_only_a_step_that_meets_parameters_for_the_first_time_is_agreed_on_twice(told: list[Any]) -> None:
    for found in told:
        assert found["afterwards"]["counts"] == [3, 2, 2, 3, 2]


def test_r7_a_resumed_run_cannot_take_back_what_was_done_to_its_state_and_says_so(told: list[Any]) -> None:
    for rank, found in enumerate(told):
        resumed = found["afterwards"]["resumed"]
        assert resumed["error"] == ("OutOfMemoryError" if rank == 1 else "RankError")
        assert "go on from a checkpoint" in resumed["message"]
        assert (resumed["changed"] == []) == (rank == 1)


def test_r7_a_rank_that_goes_on_after_a_step_that_only_the_others_took_is_found_out(told: list[Any]) -> None:
    for rank, found in enumerate(told):
        later, after = found["alone"]
        assert later["error"] == ("ValueError" if rank == 1 else "")
        assert after["error"] == "RankError"
        assert "not at the same step" in after["message"]
        assert after["changed"] == []
        assert after["gradients"]
