"""Law C4 over ranks: statistics of the batch that all ranks have together, and nothing that hangs."""

import copy
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import microbatch as mb

ROWS = 11
SHARES = {1: [11], 2: [7, 4], 3: [2, 5, 4]}


class Model(nn.Module):
    """Normalises images and features, and shares statistics of its own."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.first = nn.Conv2d(2, 4, 3, padding=1, bias=False), nn.BatchNorm2d(4)
        self.beside = nn.Conv2d(4, 4, 1)
        self.second = nn.SyncBatchNorm(4)
        self.head, self.last = nn.Linear(64, 3), nn.BatchNorm1d(3, momentum=None)

    def forward(self, x: Tensor) -> Tensor:
        x = self.first(self.conv(x)).tanh()
        x = x + self.second(self.beside(x)).tanh()
        return self.last(self.head(x.flatten(1)))


def make() -> tuple[nn.Module, dict[str, Tensor]]:
    """Make the model and the whole batch."""
    torch.manual_seed(3)
    model, scale = Model().double(), torch.rand(ROWS, 1, 1, 1, dtype=torch.float64)
    return model, {"x": torch.randn(ROWS, 2, 4, 4, dtype=torch.float64) * scale, "y": torch.arange(ROWS) % 3}


def contrast(z: Tensor, y: Tensor) -> Tensor:
    same = (y.unsqueeze(0) == y.unsqueeze(1)).double()
    return ((z @ z.T).tanh() - same).square().mean() + z.mean(0).square().sum()


def plain(model: nn.Module, batch: dict[str, Tensor]) -> Tensor:
    z = model(batch["x"])
    return nn.functional.cross_entropy(z, batch["y"]) + contrast(z, batch["y"]) + z.square().sum().tanh()


def shared(model: nn.Module, batch: dict[str, Tensor]) -> Tensor:
    z = model(batch["x"])
    own = nn.functional.cross_entropy(z, batch["y"])
    everyone, labels = mb.batch_gather(z), mb.batch_gather(batch["y"])
    same = (labels.unsqueeze(0) == labels.unsqueeze(1)).double()
    coupled = ((everyone @ everyone.T).tanh() - same).square().mean() + mb.batch_mean(z.mean(0)).square().sum()
    return own + coupled + mb.batch_sum(z.square().sum()).tanh()


def one_step(rank: int, ranks: int) -> dict[str, Any]:
    """Take one exact step on this rank's share."""
    model, batch = make()
    start = sum(SHARES[ranks][:rank])
    share = {name: each[start : start + SHARES[ranks][rank]] for name, each in batch.items()}
    optimizer = torch.optim.SGD(model.parameters(), lr=0.0)
    gradients: dict[str, Tensor] = {}

    def keep(*_: object) -> None:
        gradients.update({name: each.grad.clone() for name, each in model.named_parameters() if each.grad is not None})

    optimizer.register_step_pre_hook(keep)
    step = mb.Accumulator(model, optimizer, microbatch_size=2, batch_norm="exact").step(share, shared)
    return {"gradients": gradients, "buffers": dict(model.named_buffers()), "loss": step.loss}


def is_whole(found: dict[str, Any]) -> None:
    """Hold a rank's step against plain PyTorch on the batch of all."""
    model, batch = make()
    loss = plain(model, batch)
    loss.backward()
    torch.testing.assert_close(found["loss"], loss.detach(), rtol=1e-12, atol=0)
    for name, each in model.named_parameters():
        torch.testing.assert_close(found["gradients"][name], each.grad, rtol=1e-10, atol=1e-12)
    for name, each in model.named_buffers():
        torch.testing.assert_close(found["buffers"][name], each, rtol=1e-11, atol=1e-13)


@pytest.mark.slow
def test_the_batch_of_three_ranks(run_ranks: Callable[..., list[Any]], tmp_path: Path) -> None:
    for found in run_ranks(one_step, 3, tmp_path):
        is_whole(found)


# -- one rank fails, in each of the places -----------------------------------------------------------------------------

COUPLED = ("encode", "loss", "after", "push")
"""Places that only a loss of the whole batch's representations has."""


def encode(model: nn.Module, batch: dict[str, Tensor]) -> dict[str, Tensor]:
    return {"z": model(batch["x"]), "y": batch["y"]}


def of_all(_: nn.Module, encoded: dict[str, Tensor]) -> Tensor:
    z, y = encoded["z"], encoded["y"]
    return nn.functional.cross_entropy(z, y) + contrast(z, y) + z.square().sum().tanh()


def failing(rank: int, ranks: int, *, where: str, error: Exception | None) -> dict[str, Any]:
    """Fail on the second rank, somewhere, once, and say what each rank was told."""
    model, batch = make()
    start = sum(SHARES[ranks][:rank])
    rows = 0 if where == "no rows" and rank == 1 else SHARES[ranks][rank]
    share = {name: each[start : start + rows] for name, each in batch.items()}
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    accumulator = mb.Accumulator(model, optimizer, microbatch_size=2, batch_norm="exact")
    before, attempts = copy.deepcopy(model.state_dict()), list[int]()
    gradients: dict[str, Tensor] = {}

    def keep(*_: object) -> None:
        gradients.update({name: each.grad.clone() for name, each in model.named_parameters() if each.grad is not None})

    optimizer.register_step_pre_hook(keep)

    def fail(here: str, *_: object) -> None:
        if rank == 1 and here == where and error is not None and not attempts:
            attempts.append(0)
            raise copy.copy(error)

    def disturbed(function: Callable[..., Any], model: nn.Module, batch: dict[str, Tensor]) -> Any:
        x = batch["x"]
        fail("forward")
        if rank == 1 and where in {"backward", "push"}:
            x = x.clone().requires_grad_()
            x.register_hook(partial(fail, where))
        if rank == 1 and where == "order":
            mb.batch_sum(x.sum())
        found = function(model, {**batch, "x": x})
        fail("encode")
        return found

    def loss(model: nn.Module, encoded: dict[str, Tensor]) -> Tensor:
        fail("loss")
        if rank == 1 and where == "after":
            encoded["z"].register_hook(partial(fail, "after"))
        return of_all(model, encoded)

    told = ""
    try:
        if where in COUPLED:
            step = accumulator.step(share, loss, encode=partial(disturbed, encode))
        else:
            step = accumulator.step(share, partial(disturbed, shared))
    except Exception as failure:  # noqa: BLE001 - to be told
        told = f"{type(failure).__name__}: {failure}"
        step, retries = None, 0
    else:
        retries = step.retries
    same = all(torch.equal(each, before[name]) for name, each in model.state_dict().items())
    record = {"told": told, "same": same, "retries": retries}
    if step is None:
        return record
    return record | {"loss": step.loss, "gradients": gradients, "buffers": dict(model.named_buffers())}


FULL = torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 MiB")
PLACES = ("forward", "backward", *COUPLED)


def all_failures(rank: int, ranks: int) -> dict[str, Any]:
    """Fail everywhere, and take a step after all that, in one start of the processes."""
    found = {where: failing(rank, ranks, where=where, error=KeyError(where)) for where in PLACES}
    found |= {where: failing(rank, ranks, where=where, error=None) for where in ("no rows", "order")}
    found |= {f"{where}, full": failing(rank, ranks, where=where, error=FULL) for where in PLACES}
    return found | {"step": one_step(rank, ranks)}


@pytest.fixture(scope="module")
def failures(run_ranks: Callable[..., list[Any]], tmp_path_factory: pytest.TempPathFactory) -> list[Any]:
    return run_ranks(all_failures, 2, tmp_path_factory.mktemp("failures"))


def test_the_batch_of_two_ranks(failures: list[Any]) -> None:
    for each in failures:
        is_whole(each["step"])


@pytest.mark.parametrize(
    ("where", "one", "other"),
    [
        ("forward", "RankError: rank 1 failed before batch_norm at 'first'", "KeyError: 'forward'"),
        ("backward", "RankError: rank 1 failed before the end of the backward pass", "KeyError: 'backward'"),
        ("encode", "RankError: rank 1 failed before the end of the forward pass", "KeyError: 'encode'"),
        ("loss", "RankError: 1 of 2 ranks failed", "KeyError: 'loss'"),
        ("after", "RankError: 1 of 2 ranks failed", "KeyError: 'after'"),
        ("push", "RankError: rank 1 failed before the end of the backward pass", "KeyError: 'push'"),
        ("no rows", "RankError: rank 0 has reached batch_norm at 'first'", "RankError: rank 1 has reached the end of"),
        ("order", "RankError: rank 0 has reached batch_norm at", "RankError: rank 1 has reached batch_sum at"),
        # The loss of all representations is as large in smaller microbatches.
        ("loss, full", "RankError: 1 of 2 ranks failed", "OutOfMemoryError: "),
        ("after, full", "RankError: 1 of 2 ranks failed", "OutOfMemoryError: "),
    ],
)
def test_no_rank_waits_for_one_that_does_not_come(failures: list[Any], where: str, one: str, other: str) -> None:
    first, second = (each[where] for each in failures)
    assert first["told"].startswith(one)
    assert second["told"].startswith(other)
    assert first["same"]
    assert second["same"]


@pytest.mark.parametrize("where", ["forward", "backward", "encode", "push"])
def test_memory_that_ends_on_one_rank_makes_all_run_the_batch_again(failures: list[Any], where: str) -> None:
    for each in failures:
        found = each[f"{where}, full"]
        assert (found["told"], found["retries"]) == ("", 1)
        is_whole(found)
