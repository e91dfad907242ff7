"""What goes with fully sharded models: lengths, sizes that are found, checkpointed blocks, tensor parallelism."""

import gc
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from tests.cases import cases_in, result, run_cases
from torch import Tensor, nn
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import checkpoint_wrapper
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module

from microbatch.loss.loss import Loss
from microbatch.step.accumulator import Accumulator
from microbatch.step.options import Ranks

Batch = dict[str, Tensor]
TOKENS = [6, 1, 2, 5, 3, 3, 6, 4]
WAYS = {"lean, ZeRO-3": ("lean", True), "fast, ZeRO-2": ("fast", False)}


class Model(nn.Module):
    """A classifier of tokens with two blocks."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(7, 4)
        self.blocks = nn.ModuleList(
            nn.Sequential(nn.Linear(4, 8), nn.Tanh(), nn.Dropout(0.4), nn.Linear(8, 4)) for _ in range(2)
        )
        self.head = nn.Linear(4, 7)

    def forward(self, x: Tensor) -> Tensor:
        x = self.embed(x)
        for block in self.blocks:
            x = x + block(x)
        return self.head(x) * 1.0


def make_model(*, train: bool = False) -> Model:
    torch.manual_seed(5)
    return Model().double().train(train)


def make_batch() -> Batch:
    generator = torch.Generator().manual_seed(11)
    x = torch.randint(7, (len(TOKENS), max(TOKENS)), generator=generator)
    mask = torch.arange(max(TOKENS)) < torch.tensor(TOKENS).unsqueeze(1)
    return {"x": x, "mask": mask, "y": (x * 3 + 1) % 7}


def share(rank: int, ranks: int) -> Batch:
    first = len(TOKENS) - ranks + 1
    rows = slice(0, first) if rank == 0 else slice(first + rank - 1, first + rank)
    return {name: each[rows] for name, each in make_batch().items()}


def loss_fn(model: nn.Module, batch: Batch) -> Loss:
    labels = torch.where(batch["mask"], batch["y"], -100)
    sum_ = F.cross_entropy(model(batch["x"]).flatten(0, 1), labels.flatten(), reduction="sum")
    return Loss(sum=sum_, count=batch["mask"].sum())


def whole(tensor: Tensor) -> Tensor:
    return tensor.full_tensor() if hasattr(tensor, "full_tensor") else tensor  # pyright: ignore[reportAttributeAccessIssue] -- a DTensor


def run(model: nn.Module, batch: Batch, *, steps: int = 1, **settings: Any) -> dict[str, Any]:
    """Take steps, and tell the gradient of the last."""
    seen: dict[str, Tensor] = {}
    events: list[str] = []
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    optimizer.register_step_pre_hook(
        lambda *_: seen.update({n: whole(p.grad).clone() for n, p in model.named_parameters() if p.grad is not None})
    )
    settings.setdefault("microbatch_size", 2)
    settings["listeners"] = [lambda event: events.append(type(event).__name__)]
    accumulator = Accumulator(model, optimizer, max_grad_norm=100.0, **settings)
    step = [accumulator.step(batch, loss_fn) for _ in range(steps)][-1]
    return {
        "gradients": {name.replace("_checkpoint_wrapped_module.", ""): each for name, each in seen.items()},
        "loss": step.loss,
        "norm": step.grad_norm,
        "count": step.count,
        "microbatches": step.microbatches,
        "size": accumulator.microbatch_size,
        "events": events,
    }


def sharded(model: nn.Module, *, after: bool, mesh: Any = None) -> nn.Module:
    for block in [*model.get_submodule("blocks").children(), model]:
        fully_shard(block, reshard_after_forward=after, mesh=mesh)
    return model


def every_way(case: Callable[[str, bool], Any]) -> dict[str, Any]:
    return {name: case(*way) for name, way in WAYS.items()}


# -- the cases, each run on every rank of one start of the processes --------------------------------------------------


def case_lengths(rank: int, ranks: int) -> Any:
    batch = share(rank, ranks)
    return every_way(
        lambda sync, after: run(sharded(make_model(), after=after), batch, ranks=Ranks(sync=sync), lengths="mask")
    )


def case_by_row(rank: int, ranks: int) -> Any:
    batch = share(rank, ranks)
    model = lambda after: sharded(make_model(train=True), after=after)  # noqa: E731
    return every_way(lambda sync, after: run(model(after), batch, ranks=Ranks(sync=sync), dropout="by_row"))


def case_checkpointed(rank: int, ranks: int) -> Any:
    def case(sync: str, after: bool) -> Any:
        model = make_model()
        for name, block in list(model.blocks.named_children()):
            model.blocks.register_module(name, checkpoint_wrapper(block))
        return run(sharded(model, after=after), share(rank, ranks), ranks=Ranks(sync=sync))

    return every_way(case)


def case_auto(rank: int, ranks: int) -> Any:
    return every_way(
        lambda sync, after: run(
            sharded(make_model(), after=after),
            share(rank, ranks),
            ranks=Ranks(sync=sync),
            microbatch_size="auto",
            steps=40,
        )
    )


def case_tensor_parallel(rank: int, ranks: int) -> Any:
    """Pairs of ranks share each weight, and have the same rows."""
    mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("dp", "tp"))

    def case(sync: str, after: bool) -> Any:
        model = make_model()
        for block in model.blocks:
            parallelize_module(block, mesh["tp"], {"0": ColwiseParallel(), "3": RowwiseParallel()})
        sharded(model, after=after, mesh=mesh["dp"])
        return run(model, share(mesh["dp"].get_local_rank(), 2), ranks=Ranks(sync=sync, group=mesh["dp"]))

    return every_way(case)


ON_FOUR = {"tensor_parallel"}
CASES = cases_in(globals())


def all_cases(rank: int, ranks: int) -> dict[str, Any]:
    gc.freeze()
    return run_cases({name: case for name, case in CASES.items() if (name in ON_FOUR) == (ranks == 4)}, rank, ranks)


@pytest.fixture(scope="module")
def runs(run_ranks: Any, tmp_path_factory: pytest.TempPathFactory) -> Callable[[int], list[Any]]:
    """Return what starts the processes once for each number of them."""

    @cache
    def run(ranks: int) -> list[Any]:
        folder: Path = tmp_path_factory.mktemp(f"beside-{ranks}")
        return run_ranks(all_cases, ranks, folder, timeout=120)

    return run


def reference() -> tuple[dict[str, Tensor], Tensor]:
    model = make_model()
    loss = loss_fn(model, make_batch())
    mean = loss.sum / loss.count
    mean.backward()
    return {name: p.grad for name, p in model.named_parameters() if p.grad is not None}, mean.detach()


def off(ours: dict[str, Tensor], theirs: dict[str, Tensor]) -> float:
    assert sorted(ours) == sorted(theirs)
    one, other = (torch.cat([grads[name].flatten() for name in sorted(theirs)]) for grads in (ours, theirs))
    return float((one - other).norm() / other.norm())


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("case", ["lengths", "checkpointed", "tensor_parallel"])
def test_the_gradient_and_its_norm(runs: Callable[[int], list[Any]], case: str, way: str) -> None:
    theirs, loss = reference()
    norm = torch.cat([each.flatten() for each in theirs.values()]).norm().item()
    for found in result(runs(4 if case in ON_FOUR else 2), case):
        assert off(found[way]["gradients"], theirs) <= 1e-12
        assert float((found[way]["loss"] - loss).abs()) <= 1e-12
        assert found[way]["norm"].item() == pytest.approx(norm, rel=1e-12)
        assert found[way]["count"] == sum(TOKENS)


@pytest.mark.parametrize("way", WAYS)
def test_masks_by_row_are_those_of_one_process(runs: Callable[[int], list[Any]], way: str) -> None:
    alone = run(make_model(train=True), make_batch(), dropout="by_row")
    assert off(alone["gradients"], reference()[0]) > 1e-2
    for found in result(runs(2), "by_row"):
        assert off(found[way]["gradients"], alone["gradients"]) <= 1e-12
        assert float((found[way]["loss"] - alone["loss"]).abs()) <= 1e-12


@pytest.mark.parametrize("way", WAYS)
def test_sizes_are_found_while_training(runs: Callable[[int], list[Any]], way: str) -> None:
    alone = run(make_model(), make_batch(), steps=40)
    for found in result(runs(2), "auto"):
        assert off(found[way]["gradients"], alone["gradients"]) <= 1e-10
        assert found[way]["events"].count("PlanChosen") == 1
