"""The noise scale over ranks: all ranks together have the microbatches of one window, and know the same number."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from tests.cases import cases_in, result, run_cases
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from torch.optim import SGD

import microbatch as mb
from microbatch.errors import ConfigError

WINDOWS = 3
SHARES = [13, 6]
"""Rows of two ranks: microbatches of 4, 4, 4, 1 and of 4, 2 rows."""


class Dot(nn.Module):
    """The gradient of a row is the row."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(5, dtype=torch.float64))

    def forward(self, x: Tensor) -> Tensor:
        return x @ self.weight


def drawn(index: int) -> Tensor:
    return 0.5 + torch.randn(sum(SHARES), 5, generator=torch.Generator().manual_seed(index), dtype=torch.float64)


def right(index: int, sizes: list[int]) -> tuple[float, float]:
    """Return covariance and gradient of a window's rows, from the spread of groups of these sizes."""
    x = drawn(index)
    whole = x.mean(0)
    noise = sum(len(each) * float((each.mean(0) - whole).square().sum()) for each in x.split(sizes)) / (len(sizes) - 1)
    return noise, float(whole.square().sum()) - noise / len(x)


def mean(model: nn.Module, x: Tensor) -> Tensor:
    return model(x).mean()


def counted(model: nn.Module, x: Tensor) -> mb.Loss:
    """Each row counts twice: half the noise in what is counted, and the same in samples."""
    return mb.Loss(sum=2 * model(x).sum(), count=torch.tensor(2 * len(x)))


def run(
    rank: int,
    *,
    shares: list[int] = SHARES,
    loss: Any = mean,
    wrap: Callable[..., Any] = lambda model: model,
    momentum: float = 0.0,
    **options: Any,
) -> dict[str, Any]:
    model = wrap(Dot())
    given: dict[str, Any] = {"microbatch_size": 4, "noise_scale": mb.NoiseScale(every=1, microbatches=9)} | options
    it = mb.Accumulator(model, SGD(model.parameters(), lr=0.1, momentum=momentum), **given)
    first = sum(shares[:rank])
    steps = [it.step(drawn(index)[first : first + shares[rank]], loss) for index in range(WINDOWS)]
    return {
        "windows": [tuple(groups[0]) for groups in it.state_dict()["noise"]["windows"]],
        "scale": steps[-1].noise_scale,
        "calls": [step.comm_calls for step in steps],
        "retries": [step.retries for step in steps],
    }


# -- the cases, each run on every rank of one start of the processes --------------------------------------------------


def case_mean(rank: int, ranks: int) -> Any:
    return run(rank)


def case_counted(rank: int, ranks: int) -> Any:
    return run(rank, loss=counted)


def case_wrapped(rank: int, ranks: int) -> Any:
    return run(rank, wrap=DistributedDataParallel)


def case_overlap(rank: int, ranks: int) -> Any:
    return run(rank, ranks=mb.Ranks(overlap=True))


def case_bufferless(rank: int, ranks: int) -> Any:
    return run(rank, sums=mb.Sums(buffer="none"), momentum=0.9)


def case_some(rank: int, ranks: int) -> Any:
    return run(rank, noise_scale=mb.NoiseScale(every=1, microbatches=2))


def case_every_second(rank: int, ranks: int) -> Any:
    return run(rank, noise_scale=mb.NoiseScale(every=2))


def case_deterministic(rank: int, ranks: int) -> Any:
    return run(rank, shares=[12, 7], ranks=mb.Ranks(deterministic=True))


def case_one_each(rank: int, ranks: int) -> Any:
    return run(rank, microbatch_size=16)


def case_nothing_on_one(rank: int, ranks: int) -> Any:
    return run(rank, shares=[19, 0])


def case_retried_on_one(rank: int, ranks: int) -> Any:
    failed: list[bool] = []

    def failing(model: nn.Module, x: Tensor) -> Tensor:
        if rank == 1 and len(x) == 2 and not failed:
            failed.append(True)
            raise torch.OutOfMemoryError("out of memory")
        return mean(model, x)

    return run(rank, loss=failing)


def case_sharded(rank: int, ranks: int) -> Any:
    from torch.distributed.fsdp import fully_shard

    try:
        run(rank, wrap=fully_shard)
    except ConfigError as error:
        return {"refused": str(error)}
    return {"refused": None}


def everything(rank: int, ranks: int) -> Any:
    return run_cases(cases_in(globals()), rank, ranks)


# -- the tests ---------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def told(run_ranks: Any, tmp_path_factory: Any) -> Any:
    return run_ranks(everything, 2, tmp_path_factory.mktemp("noise") / "ranks")


SIZES: dict[str, list[int]] = {
    "mean": [4, 4, 4, 1, 4, 2],
    "counted": [4, 4, 4, 1, 4, 2],
    "wrapped": [4, 4, 4, 1, 4, 2],
    "overlap": [4, 4, 4, 1, 4, 2],
    "bufferless": [4, 4, 4, 1, 4, 2],
    "deterministic": [4, 4, 4, 4, 3],
    "one_each": [13, 6],
    "nothing_on_one": [4, 4, 4, 4, 3],
}


@pytest.mark.parametrize("case", SIZES)
def test_it_is_that_of_one_window_over_all_ranks(told: Any, case: str) -> None:
    expected = [right(index, SIZES[case]) for index in range(WINDOWS)]
    for each in result(told, case):
        assert each["windows"] == [pytest.approx(window, rel=1e-9) for window in expected]


def test_some_microbatches_of_each_rank_are_read(told: Any) -> None:
    """Two of four on the first rank, alternately, and both of two on the second."""
    expected: list[Any] = []
    for index in range(WINDOWS):
        x = drawn(index)
        groups, whole = x.split([4, 4, 4, 1, 4, 2]), float(x.mean(0).square().sum())
        read = [groups[k] for k in ([0, 2, 4, 5] if index % 2 == 0 else [1, 3, 4, 5])]
        parts, number = sum(len(each) * float(each.mean(0).square().sum()) for each in read), sum(map(len, read))
        noise = (parts - number * whole) / (4 - number / 19)
        expected.append(pytest.approx((noise, whole - noise / 19), rel=1e-9))
    for each in result(told, "some"):
        assert each["windows"] == expected


def test_every_rank_tells_the_same(told: Any) -> None:
    scales = {each["scale"] for each in result(told, "mean")}
    assert len(scales) == 1
    assert scales != {None}


def test_the_control_a_rank_alone_tells_something_else() -> None:
    alone = drawn(0)[:13]
    whole = alone.mean(0)
    apart = [len(each) * float((each.mean(0) - whole).square().sum()) for each in alone.split(4)]
    assert sum(apart) / 3 != pytest.approx(right(0, SIZES["mean"])[0], rel=0.01)


def test_a_rank_that_runs_its_window_again_takes_part_with_its_smaller_microbatches(told: Any) -> None:
    first, second = result(told, "retried_on_one")
    assert (first["retries"], second["retries"]) == ([0, 0, 0], [1, 0, 0])
    sizes = [4, 4, 4, 1, 2, 2, 2]
    for each in (first, second):
        assert each["windows"] == [pytest.approx(right(index, sizes), rel=1e-9) for index in range(WINDOWS)]


def test_a_measured_window_has_one_more_collective(told: Any) -> None:
    for each in result(told, "every_second"):
        _, measured, last = each["calls"]
        assert measured == last + 1
        assert len(each["windows"]) == 1


def test_a_sharded_model_is_refused(told: Any) -> None:
    for each in result(told, "sharded"):
        assert "noise_scale=" in each["refused"]
        assert "fully sharded" in each["refused"]
