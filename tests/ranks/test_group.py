"""Over whom gradients add up, in what, and with whose optimizer."""

from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from tests.cases import cases_in, run_cases
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module
from torch.nn.parallel import DistributedDataParallel

from microbatch.errors import ConfigError
from microbatch.loss.loss import Loss
from microbatch.ranks import reduce
from microbatch.ranks.process_group import group_of
from microbatch.step.accumulator import Accumulator
from microbatch.step.options import Ranks


def make_model(*, seed: int = 5) -> nn.Module:
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 2)).double()


def make_rows(number: int = 10) -> Tensor:
    return torch.randn(number, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(3))


def some_rows(x: Tensor, index: int, number: int) -> Tensor:
    """Return one rank's rows: most of them are the first's."""
    first = len(x) - number + 1
    return x[:first] if index == 0 else x[first + index - 1 : first + index]


def loss_fn(model: nn.Module, x: Tensor) -> Loss:
    return Loss(sum=model(x).square().sum(), count=len(x))


def whole(tensor: Tensor) -> Tensor:
    return tensor.full_tensor() if hasattr(tensor, "full_tensor") else tensor  # pyright: ignore[reportAttributeAccessIssue] -- a DTensor


def step_of(model: nn.Module, x: Tensor, **settings: Any) -> dict[str, Any]:
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    seen: list[Tensor] = []

    def look(*_: object) -> None:
        seen.extend(whole(p.grad).clone() for p in model.parameters() if p.grad is not None)

    optimizer.register_step_pre_hook(look)
    step = Accumulator(model, optimizer, microbatch_size=1, **settings).step(x, loss_fn)
    return {
        "gradient": torch.cat([each.flatten() for each in seen]),
        "loss": step.loss,
        "count": step.count,
        "norm": step.grad_norm,
        "comm": (step.comm_calls, step.comm_bytes),
    }


def case_beside_tensor_parallel(rank: int, ranks: int) -> Any:
    """Share the rows over one dimension of a mesh, and the model over the other."""
    mesh = init_device_mesh("cpu", (2, ranks // 2), mesh_dim_names=("dp", "tp"))
    dp, found = mesh["dp"], {}
    for name, given in [("mesh", dp), ("group", dp.get_group())]:
        found[name] = step_of(make_model(), some_rows(make_rows(), dp.get_local_rank(), 2), ranks=Ranks(group=given))
    split = parallelize_module(make_model(), mesh["tp"], {"0": ColwiseParallel(), "2": RowwiseParallel()})
    found["split"] = step_of(split, some_rows(make_rows(), dp.get_local_rank(), 2), ranks=Ranks(group=dp))
    try:
        model = make_model()
        Accumulator(model, torch.optim.SGD(model.parameters()), ranks=Ranks(group=mesh))
    except ConfigError as error:
        found["refused"] = str(error)
    return found


def case_not_in_the_group(rank: int, ranks: int) -> Any:
    group = dist.new_group([0])
    try:
        group_of(group)
    except ConfigError as error:
        return str(error)
    return ""


def case_shared_state(rank: int, ranks: int) -> Any:
    """Take steps with an optimizer whose state is shared out."""
    from torch.distributed.optim import ZeroRedundancyOptimizer  # which torch itself warns of something in

    found: dict[str, list[Tensor]] = {}
    for name in ("bare", "wrapped"):
        model = make_model(seed=5 + rank)
        outer = DistributedDataParallel(model) if name == "wrapped" else model
        optimizer = ZeroRedundancyOptimizer(model.parameters(), torch.optim.AdamW, lr=0.01)
        accumulator = Accumulator(outer, optimizer, microbatch_size=1, max_grad_norm=1.0)
        for number in range(5):
            accumulator.step(some_rows(make_rows() + number, rank, ranks), loss_fn)
        found[name] = [parameter.detach().clone() for parameter in model.parameters()]
    return found


def case_dtypes(rank: int, ranks: int) -> Any:
    """Tell what bfloat16 gradients add up in, and that one bucket's memory is enough for all steps."""
    found: dict[str, Any] = {}
    real, dtypes = dist.all_reduce, list[tuple[str, int]]()

    def counted(tensor: Tensor, *args: Any, **settings: Any) -> Any:
        dtypes.append((str(tensor.dtype), tensor.data_ptr()))
        return real(tensor, *args, **settings)

    bucket_bytes, reduce.BUCKET_BYTES = reduce.BUCKET_BYTES, 30
    dist.all_reduce = counted
    try:
        for name, dtype in [("float32", torch.float32), ("own", None)]:
            model = make_model().bfloat16()
            optimizer = torch.optim.SGD(model.parameters(), lr=0.0)
            accumulator = Accumulator(model, optimizer, microbatch_size=1, ranks=Ranks(reduce_dtype=dtype))
            seen: list[Tensor] = []
            optimizer.register_step_pre_hook(
                lambda *_, model=model, seen=seen: seen.extend(
                    p.grad.flatten().clone() for p in model.parameters() if p.grad is not None
                )
            )
            steps: list[list[tuple[str, int]]] = []
            for _ in range(2):
                dtypes.clear()
                seen.clear()
                accumulator.step(some_rows(make_rows(), rank, ranks).bfloat16(), loss_fn)
                steps.append([each for each in dtypes if "64" not in each[0]])
            found[name] = {
                "dtypes": sorted({dtype for dtype, _ in steps[0]}),
                "reductions": len(steps[0]),
                "memory": len({place for step in steps for _, place in step}),
                "gradient": torch.cat(seen),
            }
    finally:
        dist.all_reduce, reduce.BUCKET_BYTES = real, bucket_bytes
    return found


def case_figures(rank: int, ranks: int) -> Any:
    found = step_of(make_model(), some_rows(make_rows(), rank, ranks))
    return found["comm"]


CASES = cases_in(globals())


def all_cases(rank: int, ranks: int) -> dict[str, Any]:
    return run_cases(CASES, rank, ranks)


@pytest.fixture(scope="module")
def told(run_ranks: Any, tmp_path_factory: pytest.TempPathFactory) -> list[Any]:
    folder: Path = tmp_path_factory.mktemp("group")
    return run_ranks(all_cases, 4, folder)


def result(told: list[Any], case: str) -> list[Any]:
    """Return what a case gave on every rank."""
    assert [rank[case] for rank in told if str(rank[case]).startswith("failed")] == []
    return [rank[case] for rank in told]


def reference(x: Tensor) -> tuple[Tensor, Tensor]:
    model = make_model()
    loss = model(x).square().sum() / len(x)
    loss.backward()
    return torch.cat([p.grad.flatten() for p in model.parameters() if p.grad is not None]), loss.detach()


def off(ours: Tensor, theirs: Tensor) -> float:
    return float((ours.double() - theirs).norm() / theirs.norm())


@pytest.mark.parametrize("name", ["mesh", "group", "split"])
def test_tensor_parallel_ranks_do_not_add_to_the_counts(told: list[Any], name: str) -> None:
    theirs, loss = reference(make_rows())
    for found in result(told, "beside_tensor_parallel"):
        ours = found[name]
        assert off(ours["gradient"], theirs) <= 1e-12
        assert ours["count"] == 10  # over all ranks it would have been 20
        assert float(ours["loss"]) == pytest.approx(float(loss), rel=1e-12)
        assert float(ours["norm"]) == pytest.approx(float(theirs.norm()), rel=1e-12)


def test_groups_that_cannot_be_meant_are_refused(told: list[Any]) -> None:
    for rank, found in enumerate(result(told, "not_in_the_group")):
        assert ("not one of its ranks" in found) == (rank != 0)
    for found in result(told, "beside_tensor_parallel"):
        assert "one dimension of a DeviceMesh, not 2" in found["refused"]


@pytest.mark.parametrize("name", ["bare", "wrapped"])
def test_r1_an_optimizer_whose_state_is_shared_out(told: list[Any], name: str) -> None:
    model = make_model()
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.01)
    for number in range(5):
        optimizer.zero_grad()
        model(make_rows() + number).square().sum().div(10).backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
    for found in result(told, "shared_state"):
        for ours, theirs in zip(found[name], model.parameters(), strict=True):
            torch.testing.assert_close(ours, theirs.detach(), rtol=1e-9, atol=1e-11)


def test_the_dtype_of_the_reduction_is_ones_own_choice(told: list[Any]) -> None:
    theirs, _ = reference(make_rows())
    unit = 2.0**-8
    for found in result(told, "dtypes"):
        assert found["float32"]["dtypes"] == ["torch.float32"]
        assert found["own"]["dtypes"] == ["torch.bfloat16"]
        for each in found.values():
            assert each["reductions"] >= 2
            # Gradients that fill a bucket are added up where they are, others all in one place.
            assert each["memory"] <= 2 * each["reductions"]
        assert off(found["float32"]["gradient"], theirs) <= 8 * unit
        assert off(found["own"]["gradient"], theirs) <= 16 * unit


def test_bytes_and_calls_are_counted_as_a_ring_sends_them(told: list[Any]) -> None:
    weights = sum(p.numel() for p in make_model().parameters())
    agreement = 8 * (14 + 50 * 16 + 4)
    first, broadcast = 8 * 3 * 4, 8 * weights
    for calls, sent in result(told, "figures"):
        # That all are set up alike, a broadcast a parameter, the agreement, the bucket, and the first step's word.
        assert calls == 1 + 4 + 3
        sums = sum(2 * 3 * each // 4 for each in (agreement, 8 * weights, first))
        assert abs(sent - sums - 3 * broadcast // 4) <= 4  # whole bytes each
