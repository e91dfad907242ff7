"""The gradient without a step over ranks: the whole batch's on every rank, reduced once; and metrics of all ranks."""

from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from tests.cases import cases_in, result, run_cases
from torch import Tensor, nn
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel
from torch.optim import LBFGS

import microbatch as mb

Batch = dict[str, Tensor]
SHARES = {2: (5, 2), 3: (4, 0, 3)}
EXACT = 1e-12


def make_model(*, norm: bool = False) -> nn.Sequential:
    torch.manual_seed(3)
    return nn.Sequential(nn.Linear(4, 6), nn.BatchNorm1d(6) if norm else nn.Tanh(), nn.Linear(6, 3)).double()


def make_batch() -> Batch:
    draw = torch.Generator().manual_seed(5)
    x = torch.randn(7, 4, dtype=torch.float64, generator=draw)
    return {"x": x, "class": torch.randint(3, (7,), generator=draw)}


def share(batch: Batch, rank: int, ranks: int) -> Batch:
    first = sum(SHARES[ranks][:rank])
    return {name: each[first : first + SHARES[ranks][rank]] for name, each in batch.items()}


def weighted(model: nn.Module, batch: Batch) -> mb.Loss:
    weight = 1.0 + (batch["class"] == 0).double()
    out = model(batch["x"])
    total = (F.cross_entropy(out, batch["class"], reduction="none") * weight).sum()
    right = (out.argmax(-1) == batch["class"]).sum()
    return mb.Loss(sum=total, count=weight.sum(), metrics={"correct": right, "rows": len(out)})


def encode(model: nn.Module, batch: Batch) -> Tensor:
    return model(batch["x"])


def coupled(model: nn.Module, z: Tensor) -> Tensor:
    return z.var(0).sum() + (z @ z.T).logsumexp(1).mean()


def whole(tensor: Tensor | None) -> Tensor:
    assert tensor is not None
    found: Any = tensor
    return (found.full_tensor() if hasattr(found, "full_tensor") else found).detach().clone()


def told_of(model: nn.Module, step: mb.Step) -> dict[str, Any]:
    gradients = {name.removeprefix("module."): whole(each.grad) for name, each in model.named_parameters()}
    metrics = {name: value.item() for name, value in step.metrics.items()}
    return {"gradients": gradients, "applied": step.applied, "loss": step.loss.item(), "metrics": metrics}


def sharded(model: nn.Sequential) -> nn.Sequential:
    for each in (model[0], model[2], model):
        fully_shard(each)
    return model


def gradient(model: nn.Module, rank: int, ranks: int, **more: Any) -> dict[str, Any]:
    accumulator = mb.Accumulator(model, microbatch_size=2, memory_budget="none")
    loss: Any = coupled if more else weighted
    accumulator.gradient(share(make_batch(), rank, ranks), loss, **more)  # a second one replaces it
    return told_of(model, accumulator.gradient(share(make_batch(), rank, ranks), loss, **more))


def case_bare(rank: int, ranks: int) -> Any:
    return gradient(make_model(), rank, ranks)


def case_ddp(rank: int, ranks: int) -> Any:
    return gradient(DistributedDataParallel(make_model()), rank, ranks)


def case_sharded(rank: int, ranks: int) -> Any:
    return gradient(sharded(make_model()), rank, ranks)


def case_coupled(rank: int, ranks: int) -> Any:
    return gradient(make_model(), rank, ranks, encode=encode)


def case_sharded_coupled(rank: int, ranks: int) -> Any:
    return gradient(sharded(make_model()), rank, ranks, encode=encode)


def case_overlap(rank: int, ranks: int) -> Any:
    model = make_model()
    accumulator = mb.Accumulator(model, microbatch_size=2, ranks=mb.Ranks(overlap=True))
    return told_of(model, accumulator.gradient(share(make_batch(), rank, ranks), weighted))


def hooked(model: nn.Sequential) -> nn.Sequential:
    model.get_parameter("0.weight").register_hook(lambda gradient: gradient.clamp(-0.01, 0.01))
    return model


def case_hooked(rank: int, ranks: int) -> Any:
    return gradient(hooked(make_model()), rank, ranks)


def case_hooked_ddp(rank: int, ranks: int) -> Any:
    return gradient(DistributedDataParallel(hooked(make_model())), rank, ranks)


def case_hooked_overlap(rank: int, ranks: int) -> Any:
    model = hooked(make_model())
    accumulator = mb.Accumulator(model, microbatch_size=2, ranks=mb.Ranks(overlap=True))
    return told_of(model, accumulator.gradient(share(make_batch(), rank, ranks), weighted))


def case_lbfgs(rank: int, ranks: int) -> Any:
    model, batch = make_model(), share(make_batch(), rank, ranks)
    accumulator = mb.Accumulator(model, microbatch_size=2)
    optimizer = LBFGS(model.parameters(), lr=0.5, max_iter=5)

    def closure() -> float:
        return accumulator.gradient(batch, weighted).loss.item()

    for _ in range(2):
        optimizer.step(closure)
    return {name: each.detach() for name, each in model.named_parameters()}


def case_exact_norm(rank: int, ranks: int) -> Any:
    if not all(SHARES[ranks]):
        return None  # every rank needs rows
    model = make_model(norm=True)
    accumulator = mb.Accumulator(model, microbatch_size=2, batch_norm="exact")
    return told_of(model, accumulator.gradient(share(make_batch(), rank, ranks), weighted))


def case_a_failing_rank(rank: int, ranks: int) -> Any:
    """What was in `.grad` is there again on every rank, and the next gradient is right."""
    model = make_model()
    accumulator = mb.Accumulator(model, microbatch_size=2)
    batch = share(make_batch(), rank, ranks)
    accumulator.gradient(batch, weighted)
    before = [whole(each.grad) for each in model.parameters()]

    def fails(model: nn.Module, microbatch: Batch) -> mb.Loss:
        if rank == 0:
            raise ValueError
        return weighted(model, microbatch)

    try:
        accumulator.gradient(batch, fails)
    except (ValueError, mb.MicrobatchError) as error:
        raised = type(error).__name__
    else:
        raised = "nothing"
    kept = all(torch.equal(a, whole(b.grad)) for a, b in zip(before, model.parameters(), strict=True))
    return told_of(model, accumulator.gradient(batch, weighted)) | {"raised": raised, "kept": kept}


CASES = cases_in(globals())


def all_cases(rank: int, ranks: int) -> Any:
    return run_cases(CASES, rank, ranks)


@pytest.fixture(scope="module", params=[2, 3])
def told(request: pytest.FixtureRequest, run_ranks: Any, tmp_path_factory: pytest.TempPathFactory) -> list[Any]:
    folder: Path = tmp_path_factory.mktemp(f"gradient-{request.param}")
    return run_ranks(all_cases, request.param, folder)


def reference(*, norm: bool = False, couples: bool = False, hooks: bool = False) -> tuple[dict[str, Tensor], float]:
    model, batch = make_model(norm=norm), make_batch()
    model = hooked(model) if hooks else model
    loss = coupled(model, encode(model, batch)) if couples else weighted(model, batch).mean
    loss.backward()
    return {name: whole(each.grad) for name, each in model.named_parameters()}, loss.item()


def off(got: dict[str, Tensor], wanted: dict[str, Tensor]) -> float:
    distance = torch.stack([(got[name] - each).square().sum() for name, each in wanted.items()]).sum().sqrt()
    return (distance / torch.stack([each.square().sum() for each in wanted.values()]).sum().sqrt()).item()


PLAIN = ["bare", "ddp", "sharded", "coupled", "sharded_coupled", "overlap", "exact_norm", "a_failing_rank"]


@pytest.mark.parametrize("case", [*PLAIN, "hooked", "hooked_ddp", "hooked_overlap"])
def test_every_rank_has_the_whole_batchs_gradient(told: list[Any], case: str) -> None:
    wanted, loss = reference(norm=case == "exact_norm", couples="coupled" in case, hooks="hooked" in case)
    right = (make_model()(make_batch()["x"]).argmax(-1) == make_batch()["class"]).sum().item()
    for found in result(told, case):
        if found is None:
            continue
        assert off(found["gradients"], wanted) <= EXACT
        assert found["loss"] == pytest.approx(loss, rel=1e-12)
        assert not found["applied"]
        if "coupled" not in case and case != "exact_norm":
            assert found["metrics"] == {"correct": right, "rows": 7}


def test_a_ranks_own_gradient_is_refused_by_the_same_comparison(told: list[Any]) -> None:
    wanted, _ = reference()
    model = make_model()
    weighted(model, share(make_batch(), 0, len(told))).mean.backward()
    assert off({name: whole(each.grad) for name, each in model.named_parameters()}, wanted) > 1e-2


def test_a_rank_that_fails_leaves_every_rank_as_it_was(told: list[Any]) -> None:
    found = result(told, "a_failing_rank")
    assert [each["raised"] for each in found] == ["ValueError"] + ["RankError"] * (len(told) - 1)
    assert all(each["kept"] for each in found)


def test_lbfgs_over_ranks_goes_the_way_of_the_full_batch(told: list[Any]) -> None:
    model, batch = make_model(), make_batch()
    optimizer = LBFGS(model.parameters(), lr=0.5, max_iter=5)

    def closure() -> float:
        optimizer.zero_grad()
        loss = weighted(model, batch).mean
        loss.backward()
        return loss.item()

    for _ in range(2):
        optimizer.step(closure)
    for found in result(told, "lbfgs"):
        for name, each in model.named_parameters():
            torch.testing.assert_close(found[name], each.detach(), rtol=1e-9, atol=1e-9)
