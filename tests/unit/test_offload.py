"""Activations that wait for backward off the device: the same step, to the last bit."""

import copy
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn
from torch.optim import SGD

import microbatch as mb


def loss_fn(model: nn.Module, microbatch: dict[str, Tensor]) -> Tensor:
    return model(microbatch["x"]).square().mean()


@pytest.mark.parametrize("fuse", [True, False])
def test_the_step_is_the_same(fuse: bool, tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(64, 64), nn.Tanh(), nn.Dropout(0.5), nn.Linear(64, 64), nn.Tanh())
    batch = {"x": torch.randn(10, 64)}
    weights: list[list[Tensor]] = []
    spill = mb.Spill(model, directory=tmp_path, smallest=1)
    for offload in (None, spill):
        twin = copy.deepcopy(model)
        torch.manual_seed(1)
        accumulator = mb.Accumulator(
            twin, SGD(twin.parameters(), lr=0.1), microbatch_size=4, fuse=fuse, offload=offload
        )
        accumulator.step(batch, loss_fn)
        weights.append([each.detach() for each in twin.parameters()])
    assert all(map(torch.equal, *weights))
    assert spill.bytes_spilled > 10 * 64 * 4
    assert spill.bytes_held == 0


def test_by_name() -> None:
    model = nn.Linear(2, 2)
    accumulator = mb.Accumulator(model, SGD(model.parameters(), lr=0.1), microbatch_size=1, offload="activations")
    assert accumulator.step({"x": torch.ones(3, 2)}, loss_fn).microbatches == 3


def test_anything_else_is_refused() -> None:
    model = nn.Linear(2, 2)
    with pytest.raises(mb.MicrobatchError, match='"activations", a Spill or None'):
        mb.Accumulator(model, SGD(model.parameters(), lr=0.1), microbatch_size=1, offload="parameters")
