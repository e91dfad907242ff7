"""Law F5: ranks with different models, optimizer settings or options are named at the first window, on every rank."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel

from microbatch.errors import RankError
from microbatch.gradients.noise_estimate import NoiseScale
from microbatch.ranks.same_setup import differences
from microbatch.step.accumulator import Accumulator
from microbatch.step.options import Ranks, Sums

Made = tuple[nn.Module, Any, dict[str, Any]]


def make_model() -> nn.Sequential:
    torch.manual_seed(3)
    return nn.Sequential(nn.Linear(3, 4), nn.Linear(4, 1))


def adam(model: nn.Module, **settings: Any) -> torch.optim.Optimizer:
    return torch.optim.AdamW(model.parameters(), **settings)


def with_setting(**settings: Any) -> Callable[[bool], Made]:
    def make(odd: bool) -> Made:
        model = make_model()
        return model, adam(model, **(settings if odd else {})), {}

    return make


def with_option(**options: Any) -> Callable[[bool], Made]:
    def make(odd: bool) -> Made:
        model = make_model()
        return model, adam(model), options if odd else {}

    return make


def with_model(change: Callable[[nn.Sequential], nn.Module]) -> Callable[[bool], Made]:
    def make(odd: bool) -> Made:
        model = change(make_model()) if odd else make_model()
        return model, adam(model), {}

    return make


def frozen(model: nn.Sequential) -> nn.Module:
    model[0].requires_grad_(False)
    return model


def with_buffer(model: nn.Sequential) -> nn.Module:
    model.register_buffer("scale", torch.ones(2))
    return model


def another_optimizer(odd: bool) -> Made:
    model = make_model()
    return model, torch.optim.SGD(model.parameters(), lr=0.001) if odd else adam(model), {}


def other_groups(odd: bool) -> Made:
    model = make_model()
    split = [[model[0].weight], [model[0].bias, *model[1].parameters()]]
    groups = [
        {"params": each} for each in (split if odd else [[*split[0], model[0].bias], list(model[1].parameters())])
    ]
    return model, torch.optim.AdamW(groups), {}


def other_order(odd: bool) -> Made:
    a, b = nn.Linear(3, 1), nn.Linear(3, 1)
    model = nn.ModuleDict({"b": b, "a": a} if odd else {"a": a, "b": b})
    return model, torch.optim.SGD(model.parameters(), lr=0.1), {}


def resumed_optimizer(odd: bool) -> Made:
    model = make_model()
    optimizer = adam(model)
    if odd:
        model(torch.ones(1, 3)).sum().backward()
        optimizer.step()
        optimizer.zero_grad()
    return model, optimizer, {}


def scaler(odd: bool) -> Made:
    model = make_model()
    return model, adam(model), {"grad_scaler": torch.amp.GradScaler("cpu", init_scale=2.0 ** (9 + odd))}


def unwrapped(odd: bool) -> Made:
    wrapped = DistributedDataParallel(make_model())  # on every rank, because it talks to the others
    model = make_model() if odd else wrapped
    return model, adam(model), {}


def changed_after_wrapping(odd: bool) -> Made:
    model = DistributedDataParallel(make_model())
    if odd:
        with torch.no_grad():
            model.module[1].bias.add_(1.0)
    return model, adam(model), {}


def sharded(odd: bool) -> Made:
    model = make_model()
    fully_shard(model, mesh=init_device_mesh("cpu", (3,)))
    return model, adam(model, lr=0.2 if odd else 0.1), {}


# How each rank is set up (rank 1 is the odd one), and what the error has to say.
CASES: dict[str, tuple[Callable[[bool], Made], list[str]]] = {
    "learning rate": (
        with_setting(lr=0.5),
        ["optimizer 0, group 0, lr is 0.001 on ranks 0 and 2, and 0.5 on rank 1"],
    ),
    "betas": (with_setting(betas=(0.8, 0.99)), ["betas is [0.9, 0.999] on ranks 0 and 2, and [0.8, 0.99] on rank 1"]),
    "foreach": (with_setting(foreach=False), ["foreach is None on ranks 0 and 2, and False on rank 1"]),
    "optimizer": (another_optimizer, ["optimizer 0 is AdamW on ranks 0 and 2, and SGD on rank 1"]),
    "groups": (other_groups, ["parameter '0.bias' is (4,) torch.float32, trained, in group 0", "in group 1"]),
    "optimizer state": (resumed_optimizer, ["the state of optimizer 0 is of 0 parameters", "of 4 parameters, after 1"]),
    "shape": (with_model(lambda _: nn.Sequential(nn.Linear(3, 5), nn.Linear(5, 1))), ["'0.weight'", "(5, 3)"]),
    "dtype": (with_model(lambda model: model.double()), ["torch.float64", "on rank 1"]),
    "frozen": (with_model(frozen), ["'0.weight'", "frozen"]),
    "another layer": (with_model(lambda model: model.append(nn.Identity())), []),
    "more layers": (
        with_model(lambda model: model.append(nn.Linear(1, 1))),
        ["'2.weight' is missing on ranks 0 and 2"],
    ),
    "buffer": (
        with_model(with_buffer),
        ["buffer 'scale' is missing on ranks 0 and 2, and (2,) torch.float32 on rank 1"],
    ),
    "order": (other_order, ["the order differs: parameter 'a.weight' on rank 0", "'b.weight' on rank 1"]),
    "clipping": (with_option(max_grad_norm=1.0), ["max_grad_norm is None on ranks 0 and 2, and 1 on rank 1"]),
    "nonfinite": (with_option(nonfinite="skip"), ["nonfinite is raise", "skip on rank 1"]),
    "noise": (with_option(noise_scale=NoiseScale(5)), ["NoiseScale(every=...) is None on ranks 0 and 2, and 5"]),
    "sums": (with_option(sums=Sums(dtype=torch.float64)), ["Sums(dtype=...)"]),
    "overlap": (with_option(ranks=Ranks(overlap=True)), ["Ranks(overlap=...) is False"]),
    "deterministic": (
        with_option(ranks=Ranks(deterministic=True)),
        ["Ranks(deterministic=...) is False", "microbatch_size is missing"],
    ),
    "scaler": (scaler, ["grad_scaler is {scale: 512", "scale: 1024"]),
    "unwrapped": (unwrapped, ["the model is Sequential in DistributedDataParallel on ranks 0 and 2"]),
    "weights": (changed_after_wrapping, ["'1.bias'", "checksum"]),
    "sharded": (sharded, ["lr is 0.1 on ranks 0 and 2, and 0.2 on rank 1"]),
    # What may differ: options for memory, and nothing.
    "memory": (with_option(memory_budget="1 GiB", checkpoint=["0"], microbatch_size=1), []),
    "nothing": (with_option(), []),
}


def mean(model: Any, x: Tensor) -> Tensor:
    layers = model.values() if isinstance(model, nn.ModuleDict) else [model]
    return torch.stack([layer(x).square().mean() for layer in layers]).sum()


def attempt(accumulator: Accumulator, x: Tensor) -> str:
    try:
        accumulator.step(x, mean)
    except RankError as error:
        return str(error)
    return ""


def later_changes(rank: int, x: Tensor) -> dict[str, Any]:
    """Freeze a layer on all ranks, then unfreeze it on one of them."""
    model = make_model()
    accumulator = Accumulator(model, adam(model), microbatch_size=2)
    told: dict[str, Any] = {"first": attempt(accumulator, x)}
    model[0].requires_grad_(False)
    told["all"] = attempt(accumulator, x)
    model[0].requires_grad_(rank == 1)
    told["one"] = attempt(accumulator, x)
    model[0].requires_grad_(True)
    told["again"] = attempt(accumulator, x)
    total = torch.stack([each.detach().double().sum() for each in model.parameters()]).sum()
    return told | {"sum": float(total)}


def all_cases(rank: int, ranks: int) -> dict[str, Any]:
    assert ranks == 3
    told: dict[str, Any] = {}
    x = torch.ones(4, 3) * (rank + 1)
    for name, (make, _) in CASES.items():
        model, optimizer, options = make(rank == 1)
        data = x.double() if next(model.parameters()).dtype == torch.float64 else x
        settings: dict[str, Any] = {"microbatch_size": 2, **options}
        accumulator = Accumulator(model, optimizer, **settings)
        told[name] = attempt(accumulator, data)
    # The accumulator's own state, loaded on one rank.
    model = make_model()
    accumulator = Accumulator(model, adam(model), microbatch_size=2)
    if rank == 1:
        accumulator.load_state_dict(accumulator.state_dict() | {"windows": 7})
    told["loaded"] = attempt(accumulator, x)
    return told | {"later": later_changes(rank, x)}


@pytest.fixture(scope="module")
def told(run_ranks: Any, tmp_path_factory: pytest.TempPathFactory) -> list[Any]:
    folder: Path = tmp_path_factory.mktemp("setup")
    return run_ranks(all_cases, 3, folder)


@pytest.mark.parametrize("name", CASES)
def test_ranks_that_are_set_up_differently_are_named_on_every_rank(told: list[Any], name: str) -> None:
    _, words = CASES[name]
    for found in told:
        assert bool(found[name]) == bool(words), found[name]
        for each in words:
            assert each in found[name]
    assert len({found[name] for found in told}) == 1


def test_a_state_that_one_rank_alone_has_loaded_is_named(told: list[Any]) -> None:
    for found in told:
        assert "the number of earlier windows is 0 on ranks 0 and 2, and 7 on rank 1" in found["loaded"]


def test_parameters_that_one_rank_alone_trains_later_on_are_named(told: list[Any]) -> None:
    for found in told:
        later = found["later"]
        assert later["first"] == later["all"] == later["again"] == ""
        assert "parameter '0.weight' of this window is missing on ranks 0 and 2, and (4, 3)" in later["one"]
        assert later["sum"] == told[0]["later"]["sum"]


def test_only_a_few_of_many_differences_are_told_and_the_others_counted() -> None:
    text = differences({rank: {f"setting {n}": str(rank) for n in range(9)} for rank in range(2)})
    assert "setting 2 is 0 on rank 0, and 1 on rank 1; and 6 more differences" in text
    assert "setting 3" not in text
