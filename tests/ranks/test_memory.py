"""Law R7: a rank that runs out of memory starts over by itself, the others wait at the window's end, all is exact."""

import copy
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from tests.faults import FULL, FullInBackward
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from microbatch.loss.loss import Loss
from microbatch.step.accumulator import Accumulator


def network() -> nn.Module:
    torch.manual_seed(7)
    return nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 1)).double()


def share(rank: int, ranks: int) -> tuple[Tensor, Tensor]:
    """Return this rank's rows, of different numbers, and everybody's."""
    whole = torch.randn(5 * ranks, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    starts = [0, 6, *[5 * (r + 2) for r in range(ranks - 2)], 5 * ranks]
    return whole[starts[rank] : starts[rank + 1]], whole


def running_out(at: set[int], *, where: str = "forward") -> Callable[[nn.Module, Tensor], Loss]:
    """Return a sum of squares whose calls of some numbers, from 0 on, find no memory."""
    calls: list[int] = []

    def loss_fn(model: nn.Module, x: Tensor) -> Loss:
        number = len(calls)
        calls.append(number)
        if number in at and where == "forward":
            raise copy.copy(FULL)
        y = model(x)
        return Loss(sum=(FullInBackward.apply(y) if number in at else y).square().sum(), count=len(x))

    return loss_fn


def two_terms(model: nn.Module, x: Tensor, loss_fn: Callable[[nn.Module, Tensor], Loss]) -> dict[str, Loss]:
    return {"fit": loss_fn(model, x), "size": Loss(sum=model(x).sum(), count=2 * len(x))}


def step_of(
    rank: int, ranks: int, at: dict[int, set[int]], *, where: str = "forward", wrap: bool = False, terms: bool = False
) -> dict[str, Any]:
    """Take a step on which some ranks run out of memory, and compare it with one process's."""
    model = network()
    alone = copy.deepcopy(model)
    wrapped = DistributedDataParallel(model) if wrap else model
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    events: list[Any] = []
    accumulator = Accumulator(wrapped, optimizer, microbatch_size=2, listeners=[events.append])
    mine, whole = share(rank, ranks)
    given: list[Tensor] = []
    optimizer.register_step_pre_hook(
        lambda *_: given.extend(p.grad.flatten().clone() for p in model.parameters() if p.grad is not None)
    )
    calls: list[int] = []
    all_reduce = dist.all_reduce

    def counted(tensor: Tensor, *args: Any, **kwargs: Any) -> Any:
        calls.append(tensor.numel())
        return all_reduce(tensor, *args, **kwargs)

    fails = running_out(at.get(rank, set()), where=where)
    accumulator.step(mine, running_out(set())) if not terms else None  # the weights are shared, the scale is known
    calls.clear()
    given.clear()
    with torch.no_grad():
        for ours, theirs in zip(model.parameters(), alone.parameters(), strict=True):
            ours.copy_(theirs)
    dist.all_reduce = counted
    try:
        if terms:
            step = accumulator.step(
                mine, lambda m, x: two_terms(m, x, fails), counts=lambda x: {"fit": len(x), "size": 2 * len(x)}
            )
        else:
            step = accumulator.step(mine, fails)
    finally:
        dist.all_reduce = all_reduce
    loss = alone(whole).square().sum() / len(whole)
    if terms:
        loss = loss + alone(whole).sum() / (2 * len(whole))
    loss.backward()
    theirs = torch.cat([p.grad.flatten() for p in alone.parameters() if p.grad is not None])
    return {
        "off": float((torch.cat(given) - theirs).norm() / theirs.norm()),
        "loss": math.isclose(float(step.loss), float(loss), rel_tol=1e-12),
        "samples": step.samples,
        "microbatches": step.microbatches,
        "retries": step.retries,
        "collectives": calls,
        "events": [type(event).__name__ for event in events].count("Retry"),
    }


def all_cases(rank: int, ranks: int) -> dict[str, Any]:
    return {
        "nobody": step_of(rank, ranks, {}),
        "first microbatch": step_of(rank, ranks, {1: {0}}),
        "last microbatch": step_of(rank, ranks, {1: {1}}),
        "backward": step_of(rank, ranks, {0: {2}}, where="backward"),
        "twice": step_of(rank, ranks, {0: {0}, 1: {1}}, where="backward"),
        "everybody": step_of(rank, ranks, {each: {1} for each in range(ranks)}),
        "wrapped": step_of(rank, ranks, {1: {1}}, wrap=True),
        "nobody, terms": step_of(rank, ranks, {}, terms=True),
        "terms": step_of(rank, ranks, {1: {1}}, terms=True),
    }


@pytest.fixture(scope="module")
def told(run_ranks: Any, tmp_path_factory: pytest.TempPathFactory) -> list[Any]:
    folder: Path = tmp_path_factory.mktemp("memory")
    return run_ranks(all_cases, 3, folder)


RETRIED: dict[str, set[int]] = {
    "nobody": set(),
    "first microbatch": {1},
    "last microbatch": {1},
    "backward": {0},
    "twice": {0, 1},
    "everybody": {0, 1, 2},
    "wrapped": {1},
    "terms": {1},
}


@pytest.mark.parametrize("name", RETRIED)
def test_r7_a_rank_out_of_memory_starts_over_and_the_step_is_exact(told: list[Any], name: str) -> None:
    for rank, found in enumerate(told):
        assert found[name]["off"] <= 1e-12
        assert found[name]["loss"]
        assert found[name]["samples"] == 5 * len(told)
        assert found[name]["retries"] == found[name]["events"] == (rank in RETRIED[name])


@pytest.mark.parametrize("name", RETRIED)
def test_r7_nothing_is_said_for_it_and_the_others_keep_their_cut(told: list[Any], name: str) -> None:
    for rank, found in enumerate(told):
        calm = found["nobody, terms" if name == "terms" else "nobody"]
        assert found[name]["collectives"] == calm["collectives"]
        assert (found[name]["microbatches"] > calm["microbatches"]) == (rank in RETRIED[name])


def budgeted(rank: int, _: int) -> dict[str, Any]:
    """Train a little where one rank is given less memory than its microbatches need."""
    torch.manual_seed(7)
    model = nn.Sequential(nn.Linear(16, 64), nn.Tanh(), nn.Linear(64, 1)).double()
    budget = "48 KiB" if rank == 1 else "1 GiB"
    accumulator = Accumulator(
        model, torch.optim.SGD(model.parameters(), lr=0.1), microbatch_size=32, memory_budget=budget
    )
    rows = torch.randn(32, 16, dtype=torch.float64, generator=torch.Generator().manual_seed(rank))
    steps = [accumulator.step(rows, lambda m, x: m(x).square().mean()) for _ in range(4)]
    return {
        "weights": torch.cat([parameter.detach().flatten() for parameter in model.parameters()]),
        "retries": [step.retries for step in steps],
        "samples": [step.samples for step in steps],
        "loss": [float(step.loss) for step in steps],
    }


def test_r7_a_rank_with_less_memory_keeps_step(run_ranks: Any, tmp_path: Path) -> None:
    first, second = run_ranks(budgeted, 2, tmp_path)
    assert first["retries"] == [0, 0, 0, 0]
    assert second["retries"][0] >= 1
    assert second["retries"][1:] == [0, 0, 0]
    assert first["samples"] == second["samples"] == [64] * 4
    assert first["loss"] == second["loss"]
    assert torch.equal(first["weights"], second["weights"])
    assert first["loss"][-1] < first["loss"][0]
