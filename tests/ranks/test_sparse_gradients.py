"""Sparse and complex gradients over ranks: reduced as such, exact against one process, or refused by name."""

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel

from microbatch.errors import ConfigError
from microbatch.step.accumulator import Accumulator
from microbatch.step.options import Ranks

Batch = dict[str, Tensor]
STEPS, ROWS, WORDS = 3, 6, 11


class Model(nn.Module):
    """A table with sparse gradients, and a layer of dense ones; ``tied``: they share their weight."""

    def __init__(self, *, tied: bool = False, bag: bool = False) -> None:
        super().__init__()
        torch.manual_seed(4)
        kind = nn.EmbeddingBag if bag else nn.Embedding
        self.table = kind(WORDS, 4, sparse=True)
        self.head = nn.Linear(4, WORDS if tied else 2, bias=False)
        self.tied, self.bag = tied, bag
        if tied:
            self.head.weight = self.table.weight

    def forward(self, batch: Batch) -> Tensor:
        """Return a number for each row; rows of kind 0 use the table alone, and of kind 1 the layer alone."""
        ids, table = batch["ids"], self.table
        x = table(ids) if self.bag else table(ids).mean(1)
        found = [x.sin().sum(1), self.head(batch["x"].to(x.dtype)).sin().sum(1), self.head(x).sin().sum(1)]
        return found[int(batch["kind"][0])]


def make_batch(step: int, kinds: list[int]) -> Batch:
    generator = torch.Generator().manual_seed(step)
    return {
        "ids": torch.randint(WORDS - 2, (ROWS, 3), generator=generator),
        "x": torch.randn(ROWS, 4, generator=generator),
        "kind": torch.tensor(kinds),
    }


def part(batch: Batch, start: int, stop: int) -> Batch:
    return {name: value[start:stop] for name, value in batch.items()}


def mean(model: nn.Module, batch: Batch) -> Tensor:
    return model(batch).double().mean()


def lazy_adam(model: nn.Module) -> list[torch.optim.Optimizer]:
    table, head = model.get_parameter("table.weight"), model.get_parameter("head.weight")
    return [torch.optim.SparseAdam([table], lr=0.1), torch.optim.AdamW([head], lr=0.1)]


def sgd(model: nn.Module) -> list[torch.optim.Optimizer]:
    return [torch.optim.SGD(model.parameters(), lr=0.1)]


def adagrad(model: nn.Module) -> list[torch.optim.Optimizer]:
    return [torch.optim.Adagrad(model.parameters(), lr=0.1)]


def alone(model: nn.Module, batches: list[Batch], optimizers: list[torch.optim.Optimizer], most: float | None) -> None:
    """Take the steps in one process, by hand: a backward for each row, because rows take different ways."""
    for batch in batches:
        for row in range(ROWS):
            (mean(model, part(batch, row, row + 1)) / ROWS).backward()
        if most is not None:
            for parameter in model.parameters():  # torch's own norm counts repeated rows of a sparse gradient apart
                if parameter.grad is not None and parameter.grad.is_sparse:
                    parameter.grad = parameter.grad.coalesce()
            norms = [each.grad.to_dense().norm() for each in model.parameters() if each.grad is not None]
            factor = min(1.0, most / (float(torch.stack(norms).norm()) + 1e-6))
            for parameter in model.parameters():
                if parameter.grad is not None:
                    parameter.grad = parameter.grad * factor
        for optimizer in optimizers:
            optimizer.step()
            optimizer.zero_grad()


# Name: model, optimizers, the kinds of rows, the rows of each rank, options.
Case = tuple[dict[str, bool], Callable[[nn.Module], list[torch.optim.Optimizer]], list[int], list[int], dict[str, Any]]
BOTH, TABLE = [2] * ROWS, [0] * ROWS
CASES: dict[str, Case] = {
    "SparseAdam": ({}, lazy_adam, BOTH, [3, 3], {}),
    "a bag": ({"bag": True}, lazy_adam, BOTH, [3, 3], {}),
    "different numbers of rows": ({}, lazy_adam, BOTH, [5, 1], {}),
    "a rank without rows": ({}, lazy_adam, BOTH, [6, 0], {}),
    "a rank that uses only the layer": ({}, lazy_adam, [0, 0, 2, 1, 1, 1], [3, 3], {}),
    "clipping": ({}, lazy_adam, BOTH, [4, 2], {"max_grad_norm": 0.05}),
    "SGD": ({}, sgd, BOTH, [3, 3], {}),
    "Adagrad": ({}, adagrad, BOTH, [3, 3], {}),
    "sparse here, dense there": ({"tied": True}, sgd, [0, 0, 0, 1, 1, 1], [3, 3], {}),
    "sparse and dense on both": ({"tied": True}, sgd, [0, 1, 0, 1, 0, 1], [3, 3], {}),
    "dense first": ({"tied": True}, sgd, [1, 0, 0, 0, 0, 0], [4, 2], {}),
    "overlap": ({}, sgd, BOTH, [3, 3], {"ranks": Ranks(overlap=True)}),
    "deterministic": ({}, sgd, BOTH, [3, 3], {"ranks": Ranks(deterministic=True)}),
    "in DistributedDataParallel": ({}, lazy_adam, BOTH, [3, 3], {}),
}


def run(name: str, rank: int, *, dtype: torch.dtype = torch.float64, **options: Any) -> dict[str, Any]:
    how, make_optimizers, kinds, shares, given = CASES[name]
    batches = [make_batch(step, kinds) for step in range(STEPS)]
    expected = Model(**how).double()
    alone(expected, batches, make_optimizers(expected), given.get("max_grad_norm"))
    model = Model(**how).to(dtype)
    wrapped = DistributedDataParallel(model) if "Distributed" in name else model
    accumulator = Accumulator(wrapped, make_optimizers(model), microbatch_size=1, **given, **options)
    start, stop = sum(shares[:rank]), sum(shares[: rank + 1])
    sparse: list[bool] = []
    for optimizer in accumulator.options.optimizers:
        groups = optimizer.param_groups
        optimizer.register_step_pre_hook(
            lambda *_, groups=groups: sparse.extend(
                p.grad.is_sparse for g in groups for p in g["params"] if p.grad is not None
            )
        )
    for batch in batches:
        accumulator.step(part(batch, start, stop), mean)
    found = {name: each.detach() for name, each in model.named_parameters()}
    off = [float((each.double() - expected.get_parameter(n)).abs().max()) for n, each in found.items()]
    moved = (found["table.weight"].double() - Model(**how).table.weight.to(dtype).double()).abs().amax(1)
    return {"off": max(off), "sparse": sparse, "moved": moved > 0, "weights": found}


def complex_weights(rank: int, **options: Any) -> float:
    torch.manual_seed(1)
    model, x = nn.Linear(3, 2, dtype=torch.complex128), torch.randn(4, 3, dtype=torch.complex128)
    expected = copy.deepcopy(model)
    (expected(x).abs() ** 2).mean().backward()
    Accumulator(model, torch.optim.SGD(model.parameters(), lr=1.0), microbatch_size=1, **options).gradient(
        x[2 * rank : 2 * rank + 2], lambda model, x: (model(x).abs() ** 2).mean()
    )
    pairs = [(each.grad, expected.get_parameter(name).grad) for name, each in model.named_parameters()]
    return max(float((a - b).abs().max()) for a, b in pairs if a is not None and b is not None)


def sharded_table() -> str:
    model = Model()
    fully_shard(model, mesh=init_device_mesh("cpu", (2,)))
    try:
        Accumulator(model, torch.optim.SGD(model.parameters(), lr=0.1), microbatch_size=1)
    except ConfigError as error:
        return str(error)
    return ""


def sharded_beside(rank: int) -> float:
    """Shard the layer, and leave the table whole on every rank."""
    expected, batch = Model(), make_batch(0, BOTH)
    model = copy.deepcopy(expected)
    beside = {each for name, each in model.named_parameters() if name == "table.weight"}
    fully_shard(model, mesh=init_device_mesh("cpu", (2,)), ignored_params=beside)
    accumulator = Accumulator(model, torch.optim.SGD(model.parameters(), lr=1.0), microbatch_size=1)
    accumulator.step(part(batch, 3 * rank, 3 * rank + 3), mean)
    alone(expected, [batch], [torch.optim.SGD(expected.parameters(), lr=1.0)], None)
    return float((model.table.weight - expected.table.weight).detach().abs().max())


def all_cases(rank: int, ranks: int) -> dict[str, Any]:
    assert ranks == 2
    told: dict[str, Any] = {name: run(name, rank) for name in CASES}
    return told | {
        "bfloat16": run("SGD", rank, dtype=torch.bfloat16),
        "bfloat16, reduced in bfloat16": run("SGD", rank, dtype=torch.bfloat16, ranks=Ranks(reduce_dtype=None)),
        "complex": complex_weights(rank),
        "complex, overlapped": complex_weights(rank, ranks=Ranks(overlap=True)),
        "complex, deterministic": complex_weights(rank, ranks=Ranks(deterministic=True)),
        "sharded": sharded_table(),
        "beside": sharded_beside(rank),
        "group": dist.get_world_size(),
    }


@pytest.fixture(scope="module")
def told(run_ranks: Any, tmp_path_factory: pytest.TempPathFactory) -> list[Any]:
    folder: Path = tmp_path_factory.mktemp("sparse")
    return run_ranks(all_cases, 2, folder, timeout=120)


@pytest.mark.parametrize("name", CASES)
def test_sparse_gradients_are_those_of_one_process(told: list[Any], name: str) -> None:
    for found in told:
        assert found[name]["off"] <= 1e-12
        for parameter, value in found[name]["weights"].items():
            assert torch.equal(value, told[0][name]["weights"][parameter])


@pytest.mark.parametrize("name", CASES)
def test_the_optimizer_gets_a_sparse_gradient_where_every_rank_has_one(told: list[Any], name: str) -> None:
    dense = {"overlap", "deterministic", "sparse here, dense there", "sparse and dense on both", "dense first"}
    for found in told:
        assert any(found[name]["sparse"]) == (name not in dense)


def test_rows_that_no_rank_used_do_not_move(told: list[Any]) -> None:
    for found in told:
        assert not found["SparseAdam"]["moved"][-2:].any()
        assert found["SparseAdam"]["moved"][:-2].any()


@pytest.mark.parametrize("name", ["bfloat16", "bfloat16, reduced in bfloat16"])
def test_sparse_gradients_of_bfloat16_add_up_in_float32(told: list[Any], name: str) -> None:
    for found in told:
        assert found[name]["off"] <= 0.02  # three steps, each rounded to 8 bits
        for parameter, value in found[name]["weights"].items():
            assert torch.equal(value, told[0][name]["weights"][parameter])


def test_complex_gradients_are_reduced(told: list[Any]) -> None:
    for found in told:
        for name in ("complex", "complex, overlapped", "complex, deterministic"):
            assert found[name] <= 1e-12


def test_a_sharded_table_with_sparse_gradients_is_refused_and_one_beside_it_is_exact(told: list[Any]) -> None:
    for found in told:
        assert "a sharded Embedding(sparse=True)" in found["sharded"]
        assert "sparse=False" in found["sharded"]
        assert found["beside"] <= 1e-6


def test_the_comparison_sees_a_rank_that_is_left_out() -> None:
    expected, batch = Model().double(), make_batch(0, TABLE)
    alone(expected, [batch], lazy_adam(expected), None)
    model = Model().double()
    Accumulator(model, lazy_adam(model), microbatch_size=1).step(part(batch, 0, 3), mean)
    assert float((model.table.weight - expected.table.weight).detach().abs().max()) > 0.01
