"""``microbatch_size="auto"`` over several ranks: each looks for its own size, and every step is the whole batch's."""

import copy
import math
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from microbatch.step.accumulator import Accumulator
from microbatch.step.events import PlanChosen

ROWS, STEPS, FASTEST = 32, 16, (4, 16)


def mean(model: nn.Module, x: Tensor) -> Tensor:
    return model(x).square().mean()


def tuned(rank: int, ranks: int) -> dict[str, Any]:
    """Train until sizes have been chosen, on clocks by which each rank has a fastest size of its own."""
    torch.manual_seed(7)
    model = nn.Sequential(nn.Linear(3, 8), nn.Tanh(), nn.Linear(8, 1)).double()
    alone = copy.deepcopy(model)
    optimizer, theirs = (torch.optim.SGD(each.parameters(), lr=0.1) for each in (model, alone))
    events: list[Any] = []
    accumulator = Accumulator(model, optimizer, microbatch_size="auto", listeners=[events.append])
    now = 0.0

    def loss_fn(model: nn.Module, x: Tensor) -> Tensor:
        nonlocal now
        now += len(x) * (1 + abs(math.log2(len(x) / FASTEST[rank])))
        return mean(model, x)

    accumulator._it.stopwatch.clock = lambda: now
    whole = torch.randn(ROWS * ranks, 3, dtype=torch.float64)
    off: list[float] = []
    sizes: list[float] = []
    for _ in range(STEPS):
        step = accumulator.step(whole[ROWS * rank : ROWS * (rank + 1)], loss_fn)
        sizes.append(step.microbatch_size)
        theirs.zero_grad()
        mean(alone, whole).backward()
        theirs.step()
        pairs = zip(model.parameters(), alone.parameters(), strict=True)
        off.append(max(float((a - b).detach().abs().max()) for a, b in pairs))
    chosen = [event.microbatch_size for event in events if isinstance(event, PlanChosen)]
    return {"off": off, "chosen": chosen, "sizes": sizes}


@pytest.fixture(scope="module")
def told(run_ranks: Any, tmp_path_factory: pytest.TempPathFactory) -> list[Any]:
    return run_ranks(tuned, 2, tmp_path_factory.mktemp("auto"))


def test_r2_each_rank_chooses_its_own_size(told: list[Any]) -> None:
    assert [found["chosen"] for found in told] == [[size] for size in FASTEST]
    assert tuple(found["sizes"][-1] for found in told) == FASTEST
    assert all(len(set(found["sizes"])) > 2 for found in told)


def test_r1_every_step_is_the_whole_batchs_while_they_look(told: list[Any]) -> None:
    for found in told:
        assert len(found["off"]) == STEPS
        assert max(found["off"]) <= 1e-12
