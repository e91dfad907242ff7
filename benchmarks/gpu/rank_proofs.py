"""Proofs with two processes: a rank each, on one device with gloo, or on two with NCCL."""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
from datetime import timedelta
from pathlib import Path

import torch
import torch.distributed as dist
from torch import nn

import microbatch as mb
from benchmarks.gpu.exact_proofs import EXACT, Say, full_batch, squared
from benchmarks.gpu.here import Here, gradients, relative_error
from benchmarks.gpu.outcome import NotHereError, Numbers, require

SHARES = (3, 5)  # rows of each rank: not the same number
PATIENCE = 30  # seconds that a rank waits for the other


def gloo(here: Here, _say: Say) -> Numbers:
    """Train on two ranks that share one device."""
    found = _two(here, "gloo", [str(here.device)] * 2)
    here.rest("a device that ranks share")
    return found


def nccl(here: Here, _say: Say) -> Numbers:
    """Train on two ranks with a device each."""
    here.need_cuda("NCCL")
    if torch.cuda.device_count() < 2:
        raise NotHereError("there is one device, and NCCL wants one for each rank")
    return _two(here, "nccl", ["cuda:0", "cuda:1"])


def made(device: str | torch.device) -> tuple[nn.Module, dict[str, torch.Tensor]]:
    """Make the same model and batch on every rank."""
    torch.manual_seed(5)
    model = nn.Sequential(nn.Linear(600, 600), nn.Tanh(), nn.Linear(600, 4)).double()
    rows = sum(SHARES)
    return model.to(device), {"x": torch.randn(rows, 600).double(), "y": torch.randn(rows, 4).double()}


def _two(here: Here, backend: str, devices: list[str]) -> Numbers:
    with tempfile.TemporaryDirectory() as folder:
        ranks = [
            subprocess.Popen(  # noqa: S603 - this file
                [sys.executable, "-m", "benchmarks.gpu.rank_proofs", folder, str(rank), backend, device],
                stdout=subprocess.PIPE,
                stderr=subprocess.STDOUT,
                text=True,
            )
            for rank, device in enumerate(devices)
        ]
        printed = [each.communicate()[0] for each in ranks]
        for each, text in zip(ranks, printed, strict=True):
            require(each.returncode == 0, f"a rank ended with status {each.returncode}: {text[-1000:]}")
        found = [torch.load(Path(folder) / f"{rank}.pt", weights_only=True) for rank in range(2)]
    model, batch = made(here.device)
    reference = [each.cpu() for each in full_batch(model, squared, batch)]
    errors = [relative_error(each["gradients"], reference) for each in found]
    require(max(errors) <= EXACT, f"the gradients are {errors} off")
    same = all(torch.equal(a, b) for a, b in zip(found[0]["weights"], found[1]["weights"], strict=True))
    require(same, "the ranks' weights are not the same bits")
    return {"error": max(errors), "bytes sent in a step": found[0]["sent"]}


def rank_main(folder: str, rank: int, *, backend: str, device: str) -> None:
    """Be one rank: take a step with this rank's rows, and save the gradient and the weights."""
    if device.startswith("cuda"):
        torch.cuda.set_device(device)
    store = f"file://{folder}/store"
    dist.init_process_group(backend, init_method=store, rank=rank, world_size=2, timeout=timedelta(seconds=PATIENCE))
    model, batch = made(device)
    start = sum(SHARES[:rank])
    share = {name: each[start : start + SHARES[rank]] for name, each in batch.items()}
    optimizer, seen = torch.optim.SGD(model.parameters(), lr=0.1), list[list[torch.Tensor]]()

    def look(*_: object) -> None:
        seen.append(gradients(model))

    optimizer.register_step_pre_hook(look)
    step = mb.Accumulator(model, optimizer, microbatch_size=2).step(share, squared)
    found = {
        "gradients": [each.cpu() for each in seen[0]],
        "weights": [each.detach().cpu() for each in model.parameters()],
        "sent": step.comm_bytes,
    }
    torch.save(found, Path(folder) / f"{rank}.pt")
    dist.barrier()
    dist.destroy_process_group()
    sys.stdout.flush()
    os._exit(0)  # torch's threads may abort an ordinary end


if __name__ == "__main__":
    rank_main(sys.argv[1], int(sys.argv[2]), backend=sys.argv[3], device=sys.argv[4])
