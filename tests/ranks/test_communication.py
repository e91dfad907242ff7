"""What a plan says that ranks communicate is what they do, to the byte and to the call."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.fsdp import fully_shard

from microbatch.planning.cluster_plan import cluster_plan
from microbatch.planning.hardware import Device
from microbatch.planning.model_shapes import Case
from microbatch.planning.sharding import PRECISIONS, Setup
from microbatch.step.accumulator import Accumulator
from microbatch.step.options import Ranks

ROOM = Device(name="room", memory_bytes=1 << 50, reserved_bytes=0, source="for tests")
ROWS, MICROBATCHES = 6, 3  # of a rank


class Net(nn.Module):
    """Three blocks that are alike, a layer on either side, and a parameter that is in none of them."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.inward = nn.Linear(4, width)
        self.blocks = nn.ModuleList([nn.Linear(width, width) for _ in range(3)])
        self.outward = nn.Linear(width, 2)
        self.scale = nn.Parameter(torch.ones(2))

    def forward(self, x: Tensor) -> Tensor:
        x = self.inward(x)
        for block in self.blocks:
            x = block(x).tanh()
        return self.outward(x) * self.scale


def loss_of(model: nn.Module, batch: Tensor) -> Tensor:
    return model(batch).square().mean()


def units(model: Net) -> list[nn.Module]:
    return [model.inward, *model.blocks, model.outward]


def told(model: nn.Module, **settings: Any) -> tuple[int, int]:
    """Take two steps, the first of which says more, and return what the second one's record says."""
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    accumulator = Accumulator(model, optimizer, microbatch_size=ROWS // MICROBATCHES, **settings)
    found = [accumulator.step(torch.ones(ROWS, 4), loss_of) for _ in range(2)][1]
    return found.comm_bytes, found.comm_calls


def really_sent(rank: int, ranks: int) -> dict[str, tuple[int, int]]:
    found = {"ddp once a step": told(Net(1600))}  # of three buckets
    for strategy, after in (("fsdp", True), ("zero2", False)):
        for sync in ("lean", "fast"):
            model = Net(8)
            for unit in units(model):
                fully_shard(unit, reshard_after_forward=after)
            fully_shard(model, reshard_after_forward=False)
            found[f"{strategy} {sync}"] = told(model, ranks=Ranks(sync=sync))
    return found


def planned(strategy: str, width: int) -> dict[str, tuple[int, int]]:
    case = Case(name="net", model=Net(width), batch=torch.ones(1, 4), loss_fn=loss_of)
    setup = Setup(device=ROOM, ranks=2, strategy=strategy, precision=PRECISIONS["fp32"])
    plan = cluster_plan(case, setup, batch_size=2 * ROWS, microbatch_size=ROWS // MICROBATCHES)
    assert plan.communication is not None
    return {f"{strategy} {each.name}": (each.bytes, each.calls) for each in plan.communication.ways}


def test_ranks_send_what_a_plan_says(run_ranks: Callable[..., list[Any]], tmp_path: Path):
    sent, again = run_ranks(really_sent, 2, tmp_path)
    assert sent == again
    expected = planned("ddp", 1600) | planned("fsdp", 8) | planned("zero2", 8)
    assert sent == {name: expected[name] for name in sent}
    # Or else every way would be as good as every other.
    assert len(set(sent.values())) == len(sent) == 5
    calls = expected["ddp every microbatch"][1]
    assert calls == MICROBATCHES * (sent["ddp once a step"][1] - 1)
