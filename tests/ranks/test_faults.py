"""Laws M1, M6 and R7 together: memory ends at random operators of one rank, and both go on as if it had begun small."""

import gc
import random
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import torch
from tests.faults import RunsOut
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from microbatch.gradients import fused_matmul
from microbatch.loss.loss import Loss
from microbatch.step.accumulator import Accumulator
from microbatch.step.options import Sums

ROWS, LARGE, SMALL, PLACES = 8, 4, 2, 8


class Network(nn.Module):
    """Batch norm, dropout, and a layer that is computed again in backward."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.norm, self.drop = nn.Linear(3, 6), nn.BatchNorm1d(6), nn.Dropout(0.5)
        self.again = nn.Sequential(nn.Linear(6, 6), nn.Dropout(0.5), nn.Tanh())
        self.last = nn.Linear(6, 1)

    def forward(self, x: Tensor) -> Tensor:
        """Return outputs of shape ``(rows, ..., 1)``."""
        flat = self.drop(self.norm(self.first(x.flatten(0, -2)))).view(*x.shape[:-1], 6)
        hidden = checkpoint(self.again, flat, use_reentrant=False)
        assert isinstance(hidden, Tensor)
        return self.last(hidden)


@dataclass(frozen=True)
class Case:
    settings: dict[str, Any] = field(default_factory=dict[str, Any])
    optimizers: int = 1
    scaled: bool = False
    dtype: torch.dtype = torch.float64


CASES = {
    "fused": Case(),
    "not fused": Case({"sums": Sums(fuse=False)}),
    "lengths": Case({"lengths": "mask"}),
    "two optimizers": Case({"max_grad_norm": 0.1}, optimizers=2),
    "scaler": Case({"autocast": torch.bfloat16}, optimizers=2, scaled=True, dtype=torch.float32),
}


def mean(model: nn.Module, batch: dict[str, Tensor]) -> Loss:
    mask = batch["mask"]
    return Loss(sum=(model(batch["x"]).squeeze(-1).float().square() * mask).sum(), count=mask.sum())


def run(case: Case, rank: int, size: int, *at: int) -> tuple[list[Tensor], int, int]:
    """Take two steps; return what they left, the retries of the first, and how often it asked for memory."""
    torch.manual_seed(7)
    model = Network().to(case.dtype)
    parameters = list(model.parameters())
    optimizers = [torch.optim.AdamW(parameters[n :: case.optimizers], lr=0.1) for n in range(case.optimizers)]
    scaler = torch.amp.GradScaler("cpu", init_scale=1024.0) if case.scaled else None
    accumulator = Accumulator(
        model, optimizers, microbatch_size=size, memory_budget="none", grad_scaler=scaler, **case.settings
    )
    mode = RunsOut(*at)

    def loss_fn(model: nn.Module, batch: dict[str, Tensor]) -> Loss:
        mode.armed = True
        return mean(model, batch)

    def stop(*_: object) -> None:
        mode.armed = False

    optimizers[0].register_step_pre_hook(stop)
    torch.manual_seed(rank)
    lengths = torch.tensor([5, 1, 4, 2, 5, 3, 2, 4]).roll(rank).unsqueeze(1)
    batch = {"x": torch.randn(ROWS, 5, 3, dtype=case.dtype), "mask": torch.arange(5) < lengths}
    with mode:
        step = accumulator.step(batch, loss_fn)
    accumulator.step(batch, mean)
    assert len(mode.refused) == len(at)
    state = [value for each in optimizers for held in each.state.values() for value in held.values()]
    scale = torch.tensor(0.0 if scaler is None else scaler.get_scale())
    left = [*parameters, *model.buffers(), *state, torch.get_rng_state(), scale, step.loss]
    return [tensor.detach().clone() for tensor in left], step.retries, mode.asked


def all_cases(rank: int, ranks: int) -> dict[str, Any]:
    assert ranks == 2
    gc.freeze()  # each recovery collects garbage
    fused_matmul.SMALLEST = 1
    told: dict[str, Any] = {}
    for name, case in CASES.items():
        large, _, asked = run(case, rank, LARGE)
        small, _, _ = run(case, rank, SMALL if rank else LARGE)
        count = torch.tensor([asked])
        torch.distributed.broadcast(count, src=1)
        places = random.Random(name).sample(range(1, int(count)), PLACES)  # noqa: S311
        found = [run(case, rank, LARGE, *([place] if rank else [])) for place in places]
        told[name] = {
            "same": [all(map(torch.equal, left, small)) for left, _, _ in found],
            "retries": [retries for _, retries, _ in found],
            "tells": not all(map(torch.equal, large, small)),
        }
    return told


@pytest.fixture(scope="module")
def told(run_ranks: Any, tmp_path_factory: pytest.TempPathFactory) -> list[Any]:
    folder: Path = tmp_path_factory.mktemp("faults")
    return run_ranks(all_cases, 2, folder)


@pytest.mark.parametrize("name", CASES)
def test_wherever_memory_ends_on_one_rank_both_end_as_if_it_had_begun_small(told: list[Any], name: str) -> None:
    for rank, found in enumerate(told):
        assert found[name]["same"] == [True] * PLACES
        assert found[name]["retries"] == [rank] * PLACES
        assert found[name]["tells"]  # the comparison tells the two sizes apart
