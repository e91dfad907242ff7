"""One rank of `benchmarks.links`, which starts it on a host: it takes a step when it is told to, and says what it took.

Ways that need the same wrapper share a process. The optimizer's learning rate is 0, which costs as much arithmetic as
any other, so that every way can be held against every other one's gradient at any time.
"""

from __future__ import annotations

import json
import statistics
import sys
import time
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass
from datetime import timedelta
from functools import partial
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel

import microbatch as mb
from benchmarks.memory import ResidentPeak, resident_bytes
from benchmarks.models import GPT
from benchmarks.network import sent_bytes

LOOP, LIBRARY, EARLY, SHARDED = "loop", "library", "early", "sharded"
EVERY, ONCE, NEVER = "DDP, every microbatch", "DDP, no_sync by hand", "loop, no other rank"
OURS, ALONE = "microbatch", "microbatch, no other rank"
OVERLAPPED = "microbatch, overlap=True"
LEAN, FAST = "fully_shard, lean", "fully_shard, fast"
KINDS = {LOOP: (EVERY, ONCE, NEVER), LIBRARY: (OURS, ALONE), EARLY: (OVERLAPPED,), SHARDED: (LEAN, FAST)}


@dataclass(frozen=True, slots=True, kw_only=True)
class Seat:
    """Who a rank is, and what it trains.

    Attributes:
        kind: A key of `KINDS`.
        rank: Which it is.
        ranks: How many there are.
        address: Where the first one listens.
        port: At which port.
        threads: Of torch's operators.
        microbatches: Of a step.
        rows: Of a microbatch.
        shape: Of the model.
    """

    kind: str
    rank: int
    ranks: int
    address: str
    port: int
    threads: int
    microbatches: int
    rows: int
    shape: dict[str, int]

    def model(self) -> GPT:
        """Make the model, with the same weights on every rank."""
        torch.manual_seed(0)
        return GPT(**self.shape)

    def batch(self) -> Tensor:
        """Make this rank's share of the batch."""
        generator = torch.Generator().manual_seed(1 + self.rank)
        size = (self.microbatches * self.rows, self.shape["length"] + 1)
        return torch.randint(self.shape["vocabulary"], size, generator=generator)


class Desk:
    """A rank's ways to take a step.

    Args:
        seat: Who it is.
    """

    def __init__(self, seat: Seat) -> None:
        self.seat, self.batch = seat, seat.batch()
        self.before = resident_bytes() or 0
        self.model: nn.Module = seat.model()
        self.parameters = sum(each.numel() for each in self.model.parameters())
        if seat.kind == LOOP:
            self.model = DistributedDataParallel(self.model)
        elif seat.kind == SHARDED:
            for block in self.model.get_submodule("blocks").children():
                fully_shard(block)
            fully_shard(self.model)
        self.optimizer = torch.optim.AdamW(self.model.parameters(), lr=0.0)
        self.optimizer.register_step_pre_hook(self._keep)
        self.gradient = [0.0, 0.0]
        self.looks = False
        own = [dist.new_group([rank]) for rank in range(seat.ranks)][seat.rank]
        settings: dict[str, dict[str, Any]] = {
            OURS: {},
            ALONE: {"ranks": mb.Ranks(group=own)},
            OVERLAPPED: {"ranks": mb.Ranks(overlap=True)},
            LEAN: {"ranks": mb.Ranks(sync="lean")},
            FAST: {"ranks": mb.Ranks(sync="fast")},
        }
        self.ways: dict[str, Callable[[], tuple[int, int]]] = {
            name: partial(self._loop, syncs=name) if seat.kind == LOOP else self._library(**settings[name])
            for name in KINDS[seat.kind]
        }

    def step(self, way: str) -> dict[str, float]:
        """Take one, together with the other ranks, and say what it took."""
        dist.barrier()
        sent, started = sent_bytes(), time.perf_counter()
        counted, calls = self.ways[way]()
        seconds = time.perf_counter() - started
        dist.barrier()  # what is under way has arrived
        return {"seconds": seconds, "wire": sent_bytes() - sent, "counted": counted, "calls": calls}

    def look(self, way: str) -> dict[str, Any]:
        """Take one untimed, and say what it held and which gradient came of it."""
        self.looks = True
        with ResidentPeak() as peak:
            self.step(way)
        self.looks = False
        found = torch.tensor(self.gradient, dtype=torch.float64)
        if self.seat.kind == SHARDED:
            dist.all_reduce(found)
        return {"peak": (peak.bytes or 0) - self.before, "gradient": found.tolist(), "parameters": self.parameters}

    def probe(self, way: str) -> dict[str, float]:
        """Say what the link does: seconds of a message, and bytes a second of a long one."""
        del way
        short, long = torch.zeros(1), torch.zeros(1 << 22)
        sent = long.nbytes * 2 * (self.seat.ranks - 1) / self.seat.ranks
        return {"short": _reduced(short, 21), "rate": sent / _reduced(long, 3)}

    def _loop(self, *, syncs: str) -> tuple[int, int]:
        """Take a step as people write it."""
        assert isinstance(self.model, DistributedDataParallel)  # noqa: S101 - this kind's
        number = self.seat.microbatches
        for index, microbatch in enumerate(self.batch.split(self.seat.rows)):
            waits = syncs == NEVER or (syncs == ONCE and index < number - 1)
            with self.model.no_sync() if waits else nullcontext():
                (_loss(self.model, microbatch) / number).backward()
        self.optimizer.step()
        self.optimizer.zero_grad()
        return 0, 0

    def _library(self, **given: Any) -> Callable[[], tuple[int, int]]:
        size = self.seat.rows
        accumulator = mb.Accumulator(self.model, self.optimizer, microbatch_size=size, memory_budget="none", **given)

        def run() -> tuple[int, int]:
            step = accumulator.step(self.batch, _loss)
            return step.comm_bytes, step.comm_calls

        return run

    def _keep(self, *_: object) -> None:
        """Note two numbers of the gradient that do not depend on how it is shared out."""
        if self.looks:
            pairs = [(_own(each), _own(each.grad)) for each in self.model.parameters() if each.grad is not None]
            self.gradient = [
                sum(float(grad.double().square().sum()) for _, grad in pairs),
                sum(float((grad.double() * weight).sum()) for weight, grad in pairs),
            ]


def _loss(model: nn.Module, batch: Tensor) -> Tensor:
    return F.cross_entropy(model(batch[:, :-1]).flatten(0, 1), batch[:, 1:].flatten())


def _own(tensor: Any) -> Tensor:
    """Return what this rank holds of a tensor."""
    return (tensor.to_local() if hasattr(tensor, "to_local") else tensor).detach()


def _reduced(tensor: Tensor, times: int) -> float:
    taken: list[float] = []
    for _ in range(times):
        dist.barrier()
        started = time.perf_counter()
        dist.all_reduce(tensor)
        taken.append(time.perf_counter() - started)
    return statistics.median(taken)


def main() -> None:
    """Answer every line until there are no more."""
    seat = Seat(**json.loads(sys.argv[1]))
    torch.set_num_threads(seat.threads)
    place = f"tcp://{seat.address}:{seat.port}"
    # Patience for one collective on a slow link, so that no rank outlives the others for long.
    patience = timedelta(seconds=120)
    dist.init_process_group("gloo", init_method=place, rank=seat.rank, world_size=seat.ranks, timeout=patience)
    desk = Desk(seat)
    print(json.dumps({"ready": True}), flush=True)
    for line in sys.stdin:
        what, _, way = line.strip().partition(" ")
        print(json.dumps(getattr(desk, what)(way)), flush=True)


if __name__ == "__main__":
    main()
