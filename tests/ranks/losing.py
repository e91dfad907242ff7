"""Ranks that are lost, in processes forked from one that has imported torch already; not a test."""

import datetime as dt
import json
import multiprocessing as mp
import os
import signal
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from tests.ranks.start_deepspeed import IS_THERE, make_engine
from torch import Tensor, nn
from torch._C._distributed_c10d import TCPStore
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard

import microbatch as mb

AT = 2  # the step in which a rank is lost
# Seconds of the process group's time-out: a test waits for it where a rank stays alive; a busy machine needs some.
PATIENCE = {"stopped": 15.0, "late": 15.0, "goes_on_sharded": 15.0}
LONG = 40.0


def killed(rank: int, step: int) -> None:
    if rank == 1 and step == AT:
        os.kill(os.getpid(), signal.SIGKILL)


def store_lost(rank: int, step: int) -> None:
    if rank == 0 and step == AT:
        os.kill(os.getpid(), signal.SIGKILL)


def stopped(rank: int, step: int) -> None:
    if rank == 1 and step == AT:
        os.kill(os.getpid(), signal.SIGSTOP)


def late(rank: int, step: int) -> None:
    if rank == 1 and step == AT:
        time.sleep(60)


def failing(rank: int, step: int) -> None:
    if rank == 1 and step == AT:
        raise ValueError("mine")


def nothing(rank: int, step: int) -> None:
    del rank, step


def batches(case: str, rank: int) -> Iterator[Tensor]:
    for index in range(AT + 2):
        if rank == 1 and index == AT and case in {"ended", "returned"}:
            return
        if rank == 1 and index == AT and case == "loader_fails":
            raise OSError("no such file")
        yield torch.full((2, 3), float(index + rank))


INSIDE: dict[str, Callable[[int, int], None]] = {
    "killed": killed,
    "stopped": stopped,
    "late": late,
    "failing": failing,
    "store_lost": store_lost,
    "sharded": failing,
    "goes_on": failing,
    "goes_on_sharded": failing,
    "engine": killed,
    "engine_inside": killed,
    "engine_fails": failing,
}
ENGINES = {"engine": 0, "engine_inside": 2, "engine_fails": 3}  # the ZeRO stage of each
CASES = {
    "killed": 3,
    "stopped": 3,
    "late": 2,
    "failing": 3,
    "store_lost": 2,
    "ended": 2,
    "returned": 2,
    "loader_fails": 2,
    "sharded": 2,
    "goes_on": 3,
    "goes_on_sharded": 2,
    **(dict.fromkeys(ENGINES, 2) if IS_THERE else {}),
}


def train(case: str, rank: int, began: list[float]) -> None:
    model = nn.Linear(3, 1)
    if case.endswith("sharded"):
        fully_shard(model, mesh=init_device_mesh("cpu", (dist.get_world_size(),)))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    if case in ENGINES:
        accumulator = mb.DeepSpeed(make_engine(model, optimizer, stage=ENGINES[case]), microbatch_size=1)
    else:
        accumulator = mb.Accumulator(model, optimizer, microbatch_size=1)
    for step, batch in enumerate(batches(case, rank)):

        def loss_fn(model: nn.Module, x: Tensor, step: int = step) -> Tensor:
            INSIDE.get(case, nothing)(rank, step)
            return model(x).square().mean()

        began.append(time.monotonic())
        with suppress(*[ValueError] if case.startswith("goes_on") else []):  # a loop that skips the batches that fail
            accumulator.step(batch, loss_fn)
    if case == "ended":
        dist.destroy_process_group()
        time.sleep(60)


def one_rank(case: str, rank: int, ranks: int, folder: Path) -> None:
    torch.set_num_threads(1)
    port = folder / "port"
    if rank == 0:  # the others wait for the port
        store = TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
        (folder / "writing").write_text(str(store.port))
        (folder / "writing").rename(port)
    else:
        while not port.exists():
            time.sleep(0.01)
        store = TCPStore("127.0.0.1", int(port.read_text()), is_master=False)
    dist.init_process_group(
        "gloo", store=store, rank=rank, world_size=ranks, timeout=dt.timedelta(seconds=PATIENCE.get(case, LONG))
    )
    told: dict[str, Any] = {"error": "", "message": ""}
    began: list[float] = []
    try:
        train(case, rank, began)
    except Exception as error:
        told = {"error": type(error).__name__, "message": str(error)}
        if rank == 1:
            raise
    finally:
        told["waited"] = time.monotonic() - began[-1]
        (folder / f"told-{rank}").write_text(json.dumps(told))


def lose(folder: Path, *, cases: dict[str, int] = CASES, timeout: float = 100) -> dict[str, dict[int, Any]]:
    """Run all cases at once.

    Returns:
        For each case, what each rank that was not lost has told.
    """
    context = mp.get_context("forkserver")
    context.set_forkserver_preload(["torch._dynamo", "tests.ranks.losing"])  # a first step imports both
    processes: dict[tuple[str, int], Any] = {}
    for case, ranks in cases.items():
        (folder / case).mkdir(parents=True)
        for rank in range(ranks):
            process = context.Process(target=one_rank, args=(case, rank, ranks, folder / case))
            process.start()
            processes[case, rank] = process
    survivors = [(case, rank) for case, rank in processes if rank != (0 if case == "store_lost" else 1)]
    deadline = time.monotonic() + timeout
    for name in survivors:
        processes[name].join(max(0.1, deadline - time.monotonic()))
    for process in processes.values():
        process.kill()
        process.join()
    found: dict[str, dict[int, Any]] = {}
    for case, rank in survivors:
        file = folder / case / f"told-{rank}"
        found.setdefault(case, {})[rank] = json.loads(file.read_text()) if file.exists() else None
    return found


if __name__ == "__main__":
    import sys
    import tempfile

    names = sys.argv[1:] or list(CASES)
    for case, told in lose(Path(tempfile.mkdtemp()), cases={name: CASES[name] for name in names}).items():
        for rank, each in told.items():
            print(case, rank, each)  # noqa: T201 - to look at by hand
