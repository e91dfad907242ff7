"""Law C4 for microbatches of one row: torch's CPU kernel is wrong for some strides, and one value has no variance."""

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import microbatch as mb
from microbatch.errors import BatchStatisticsError

from .reference import Batch, Gradients, by_window, gradients_of, relative_error, subject
from .test_batchnorm import EXACT, WRONG, buffers_differ


class Patches(nn.Module):
    """Normalise pictures, then read them as tokens: the gradient of the layer's output is laid out channels last."""

    def __init__(self, norm: Any, *, last: bool = False) -> None:
        super().__init__()
        self.stem, self.norm, self.tokens, self.head = nn.Conv2d(3, 8, 3, 2, 1), norm, nn.LayerNorm(8), nn.Linear(8, 3)
        self.last = last

    def forward(self, x: Tensor) -> Tensor:
        h = self.stem(x)
        if self.last:
            tokens = h.flatten(2).transpose(1, 2).contiguous()
            maps = self.norm(tokens.transpose(1, 2).unflatten(2, h.shape[2:]))
            return self.head((maps * torch.linspace(0, 1, 16).double().view(1, 1, 4, 4)).mean((2, 3)))
        return self.head(self.tokens(self.norm(h).flatten(2).transpose(1, 2)).tanh()).mean(1)


class Functional(nn.Module):
    """Calls the function that every layer calls, by keywords."""

    def forward(self, x: Tensor) -> Tensor:
        return F.batch_norm(input=x, running_mean=torch.zeros(8).double(), running_var=torch.ones(8).double())


class Own(nn.Module):
    """Batch normalisation in elementary operators, which torch differentiates without the kernel in question."""

    def __init__(self, layer: Any) -> None:
        super().__init__()
        self.layer = layer

    def forward(self, x: Tensor) -> Tensor:
        layer = self.layer
        if isinstance(layer, nn.InstanceNorm2d):
            mean, variance = x.mean((2, 3), keepdim=True), x.var((2, 3), correction=0, keepdim=True)
        elif isinstance(layer, nn.BatchNorm2d) and layer.training:
            mean, variance = x.mean((0, 2, 3), keepdim=True), x.var((0, 2, 3), correction=0, keepdim=True)
        else:
            shape = (1, 8, 1, 1)
            buffers = dict(layer.named_buffers())
            mean = buffers.get("running_mean", torch.zeros(8).double()).view(shape)
            variance = buffers.get("running_var", torch.ones(8).double()).view(shape)
        return (x - mean) * (variance + 1e-5).rsqrt()


def loss_fn(model: nn.Module, batch: Batch) -> Tensor:
    return F.cross_entropy(model(batch["x"]), batch["y"])


def pictures(rows: int) -> Batch:
    torch.manual_seed(3)
    return {"x": torch.randn(rows, 3, 8, 8).double(), "y": torch.randint(0, 3, (rows,))}


def made(norm: Any, *, last: bool = False) -> Patches:
    torch.manual_seed(2)
    return Patches(norm, last=last).double()


def by_hand(model: Patches, batch: Batch, *, each: bool) -> Gradients:
    """Take the gradient of the batch, or the mean of its rows' gradients, by elementary operators."""
    twin = copy.deepcopy(model)
    twin.norm = Own(twin.norm)
    rows = len(batch["y"])
    pieces = [{name: value[row : row + 1] for name, value in batch.items()} for row in range(rows)] if each else [batch]
    for piece in pieces:
        (loss_fn(twin, piece) / len(pieces)).backward()
    return gradients_of(twin)


WAYS: dict[str, tuple[Callable[[], nn.Module], str, bool]] = {
    # the layer, the mode, whether the reference goes row by row
    "exact": (lambda: nn.BatchNorm2d(8, affine=False), "exact", False),
    "frozen": (lambda: nn.BatchNorm2d(8, affine=False), "frozen", False),
    "plain": (lambda: nn.BatchNorm2d(8, affine=False), "microbatch", True),
    "pooled": (lambda: nn.BatchNorm2d(8, affine=False), "pooled", True),
    "evaluation": (lambda: nn.BatchNorm2d(8, affine=False).eval(), "microbatch", False),
    "evaluation, exact": (lambda: nn.BatchNorm2d(8, affine=False).eval(), "exact", False),
    "instances": (lambda: nn.InstanceNorm2d(8), "microbatch", False),
    "instances, exact": (lambda: nn.InstanceNorm2d(8), "exact", False),
}


@pytest.mark.parametrize("last", [False, True], ids=["gradient", "input"])
@pytest.mark.parametrize("way", WAYS)
def test_one_row_whose_gradient_has_other_strides(way: str, last: bool) -> None:
    make, mode, each = WAYS[way]
    model, batch = made(make(), last=last), pictures(4)
    reference = model
    if mode == "frozen":
        reference = copy.deepcopy(model)
        reference.norm.train(mode=False)
    it = subject(model, size=1, batch_norm=mode)
    it.accumulator.step(batch, loss_fn)
    assert relative_error(it.updates[-1], by_hand(reference, batch, each=each)) <= EXACT


def test_one_row_in_a_hand_written_loop_and_under_a_checkpoint() -> None:
    model, batch = made(nn.BatchNorm2d(8, affine=False)), pictures(3)
    it = subject(model, size=1, checkpoint=["norm"])
    by_window(it, batch, loss_fn, size=1)
    assert relative_error(it.updates[-1], by_hand(model, batch, each=True)) <= EXACT


def test_a_function_called_by_keywords_beside_a_layer() -> None:
    model, batch = made(nn.BatchNorm2d(8, affine=False)), pictures(2)
    model.norm = nn.Sequential(Functional(), nn.Identity())
    model.unused = nn.BatchNorm1d(1)
    twin = copy.deepcopy(model)
    twin.norm = Own(nn.Identity())
    loss_fn(twin, batch).backward()
    it = subject(model, size=1)
    it.accumulator.step(batch, loss_fn)
    assert relative_error(it.updates[-1], gradients_of(twin)) <= EXACT


def test_torch_itself_is_wrong_there() -> None:
    """The negative control: where this fails, torch has mended its kernel, and the mode is no longer needed."""
    model, batch = made(nn.BatchNorm2d(8, affine=False).eval()), pictures(1)
    twin = copy.deepcopy(model)
    loss_fn(twin, batch).backward()
    assert relative_error(gradients_of(twin), by_hand(model, batch, each=False)) > WRONG


def test_a_check_in_microbatches_of_one_row() -> None:
    model = made(nn.BatchNorm2d(8, affine=False)).float()
    batch = pictures(4)
    batch["x"] = batch["x"].float()
    assert mb.check(model, loss_fn, batch, microbatch_size=1, batch_norm="exact").ok


# -- one value for each channel ----------------------------------------------------------------------------------------


def pooling() -> nn.Module:
    """Normalise maps of one by one, where a microbatch of one row has one value for each channel."""
    torch.manual_seed(0)
    first = [nn.Conv2d(3, 8, 3, 2, 1), nn.BatchNorm2d(8), nn.ReLU(), nn.AdaptiveAvgPool2d(1)]
    return nn.Sequential(*first, nn.Conv2d(8, 16, 1), nn.BatchNorm2d(16), nn.Flatten(), nn.Linear(16, 3)).double()


@pytest.mark.parametrize("mode", ["microbatch", "pooled"])
def test_a_row_left_over_is_named_with_the_layer_and_another_cut(mode: str) -> None:
    it = subject(pooling(), size=3, batch_norm=mode)
    before = copy.deepcopy(it.model.state_dict())
    with pytest.raises(BatchStatisticsError) as caught:
        it.accumulator.step(pictures(7), loss_fn)
    words = str(caught.value)
    for each in ("'5' (BatchNorm2d)", "1 row", "7 rows in microbatches of 3", "microbatch_size=4", '"exact"'):
        assert each in words
    assert buffers_differ(it.model.state_dict(), before) == 0.0
    again = subject(pooling(), size=4, batch_norm=mode)  # what it advises
    again.accumulator.step(pictures(7), loss_fn)


def test_a_hand_written_loop_has_the_same_words_as_a_note() -> None:
    it = subject(pooling(), size=3)
    with pytest.raises(ValueError, match="Expected more than 1 value") as caught:
        by_window(it, pictures(7), loss_fn, size=3)
    assert "'5' (BatchNorm2d)" in caught.value.__notes__[0]


def test_other_errors_stay_as_they_are() -> None:
    def failing(model: nn.Module, batch: Batch) -> Tensor:
        raise ValueError("something else")

    with pytest.raises(ValueError, match="something else") as caught:
        subject(pooling(), size=3).accumulator.step(pictures(7), failing)
    assert type(caught.value) is ValueError


@pytest.mark.parametrize("size", [1, 3])
def test_a_check_runs_no_microbatch_alone_that_needs_the_others(size: int) -> None:
    model, batch = pooling().float(), pictures(7)
    batch["x"] = batch["x"].float()
    assert mb.check(model, loss_fn, batch, microbatch_size=size, batch_norm="exact").ok


@pytest.mark.parametrize("size", [1, 3])
def test_a_check_names_a_row_left_over_and_judges_another_cut(size: int) -> None:
    found = mb.check(pooling(), loss_fn, pictures(7), microbatch_size=size)
    alone = next(cause for cause in found.causes if cause.kind == "one_row")
    assert found.microbatch_size == 4
    assert not found.ok
    for each in ("'5' (BatchNorm2d)", "1 row", "microbatches of 4 rows was compared"):
        assert each in alone.words
    assert ("7 rows in microbatches of 3 leave one row over" in alone.words) == (size == 3)
    assert "microbatch_size=4" in alone.remedy
    # The rest is the verdict of the cut that is possible.
    other = mb.check(pooling(), loss_fn, pictures(7), microbatch_size=4)
    assert found.causes[1:] == other.causes
    assert [cause.kind for cause in other.causes] == ["batch_statistics"]
    assert found.relative_error == other.relative_error > WRONG


def test_a_check_of_a_batch_that_has_no_other_cut_is_refused() -> None:
    with pytest.raises(BatchStatisticsError, match="from a microbatch of 1 row"):
        mb.check(pooling(), loss_fn, pictures(3), microbatch_size=2)
