"""Activations that wait for backward off the device: the same step, to the last bit."""

import copy
import itertools
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
            twin, SGD(twin.parameters(), lr=0.1), microbatch_size=4, sums=mb.Sums(fuse=fuse), offload=offload
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


@pytest.mark.parametrize("named", [True, False])
def test_casts_that_stay_for_the_window_are_not_moved(named: bool, tmp_path: Path) -> None:
    width, rows = 512, 4
    model = nn.Sequential(nn.Linear(width, width, bias=False), nn.Tanh(), nn.Linear(width, width, bias=False))
    spill = mb.Spill(model, directory=tmp_path, smallest=1)
    moved: list[int] = []

    def loss(model: nn.Module, x: Tensor) -> Tensor:
        return model(x).sum(1).float().square().mean()

    accumulator = mb.Accumulator(
        model,
        SGD(model.parameters(), lr=0.1),
        microbatch_size=rows,
        autocast=torch.bfloat16,
        offload=spill if named else None,
        listeners=[lambda event: moved.append(spill.bytes_spilled)],
    )
    for _ in range(2):
        moved.clear()
        before = spill.bytes_spilled
        with accumulator.window() as window:
            for x in window.split(torch.randn(4 * rows, width)):
                with spill:
                    value = loss(model, x)
                window.backward(value)
        each = [after - earlier for earlier, after in itertools.pairwise([before, *moved[:4]])]
        casts, activations = 2 * width * width * 2, 2 * rows * width * 2  # input and tanh, both in bfloat16
        few = 64 * rows  # what the loss saves
        assert casts + activations <= each[0] <= casts + activations + few  # they do not stay yet
        # A window that was not told of them moves them each time.
        extra = 0 if named else casts
        assert all(extra + activations <= one <= extra + activations + few for one in each[1:])
