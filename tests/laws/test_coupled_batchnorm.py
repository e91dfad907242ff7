"""Laws C1 and C4 together: encoders with batch normalisation, under a loss that couples samples."""

import copy
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import example, given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

import microbatch as mb
from microbatch.errors import BatchStatisticsError, ConfigError, LossError, NonfiniteError, OutOfMemoryError

from .networks import LAYERS, WIDTH, classify, convolution, double, head, images
from .reference import Gradients, gradients_of, numbers, relative_error, subject
from .test_batchnorm import EXACT, WRONG, buffers_differ


class Towers(nn.Module):
    """Encodes images, and words about them; the loss has a scale, and a normalised head, of its own."""

    def __init__(self, *inside: nn.Module, dropout: float = 0.0) -> None:
        super().__init__()
        self.image = nn.Sequential(nn.Conv2d(3, WIDTH, 3), *inside, *head(16, classes=8), nn.BatchNorm1d(8))
        self.dropout = nn.Dropout(dropout)
        # One weight is large enough to be fused.
        wide = nn.Linear(512, 512, bias=False)
        self.words = nn.Sequential(nn.Linear(3, 512), nn.BatchNorm1d(512), nn.Tanh(), wide, nn.Linear(512, 8))
        self.head = nn.Sequential(nn.Linear(8, 8), nn.BatchNorm1d(8, momentum=None))
        self.scale = nn.Parameter(torch.tensor(0.5))


def encode(model: Any, batch: Any) -> dict[str, Tensor]:
    image, words = model.dropout(model.image(batch["x"])), model.words(batch["x"][:, :, 0, 0])
    return {"image": image, "words": words, "label": batch["y"]}


def clip(model: Any, z: Any) -> Tensor:
    """Return CLIP's loss, and one that normalises all representations once more."""
    x, y = (F.normalize(z[side], dim=1) for side in ("image", "words"))
    logits, diagonal = model.scale.exp() * x @ y.T, torch.arange(len(x), device=x.device)
    coupled = (F.cross_entropy(logits, diagonal) + F.cross_entropy(logits.T, diagonal)) / 2
    return coupled + F.cross_entropy(model.head(z["image"]), z["label"])


def whole(model: nn.Module, batch: Any) -> tuple[Gradients, Gradients]:
    """Return what one pass over the whole batch leaves, by plain PyTorch: gradients and buffers."""
    twin = copy.deepcopy(model)
    clip(twin, encode(twin, batch)).backward()
    return gradients_of(twin), dict(twin.named_buffers())


def make(*names: str, **form: Any) -> nn.Module:
    return double(Towers(*(LAYERS[name]() for name in names), **form))


@settings(max_examples=5)
@given(
    names=st.lists(st.sampled_from(sorted(LAYERS)), max_size=2),
    rows=st.integers(2, 7),
    size=st.integers(1, 7),
    fuse=st.booleans(),
)
@example(names=["residual", "twice"], rows=7, size=2, fuse=True)
@example(names=["cumulative", "frozen"], rows=5, size=1, fuse=False)
def test_encoders_with_batch_normalisation(names: list[str], rows: int, size: int, fuse: bool) -> None:
    model, batch = make(*names), images(rows)
    reference, buffers = whole(model, batch)
    it = subject(model, size=size, batch_norm="exact", sums=mb.Sums(fuse=fuse))
    with pytest.MonkeyPatch.context() as patch:  # a large weight among many small modules is fused, too
        patch.setattr("microbatch.gradients.fused_matmul._MODULES", 1 << 10)
        step = it.accumulator.step(batch, clip, encode=encode)
    assert relative_error(it.updates[0], reference) <= EXACT
    assert buffers_differ(dict(it.model.named_buffers()), buffers) <= EXACT
    assert (step.microbatches, step.samples, step.fused) == (-(-rows // size), rows, int(fuse))
    twin = copy.deepcopy(model)
    assert step.loss.item() == pytest.approx(clip(twin, encode(twin, batch)).item(), rel=1e-12)


@pytest.mark.parametrize("way", ["twice", "keep"])
def test_without_it_encoders_are_told_apart(way: str) -> None:
    model, batch = make("residual"), images(6)
    it = subject(model, size=2, coupled=way)
    it.accumulator.step(batch, clip, encode=encode)
    assert relative_error(it.updates[0], whole(model, batch)[0]) > WRONG


def test_terms_of_rows_that_are_cut_by_length() -> None:
    """Representations come back in the order of the batch, and each term is over its own count."""
    model = double(nn.Sequential(nn.Linear(4, 8), nn.BatchNorm1d(8), nn.Tanh(), nn.Linear(8, 4)))
    length = torch.tensor([3, 1, 2, 6, 4, 5, 3])
    used = torch.arange(6) < length.unsqueeze(1)
    batch = {"x": numbers(1, 7, 6, 4) * used.unsqueeze(2), "length": length}

    def encode(model: Any, batch: Any) -> Tensor:
        return model(batch["x"].sum(1))

    def terms(_: Any, z: Tensor) -> dict[str, Any]:
        places = torch.arange(len(z), dtype=z.dtype)
        return {"ranked": (z @ z.T).tanh().mean(1) @ places, "few": mb.Loss(sum=z[places > 4].square().sum(), count=2)}

    twin = copy.deepcopy(model)
    found = terms(twin, encode(twin, batch))
    (found["ranked"] + found["few"].mean).backward()
    it = subject(model, size=2, batch_norm="exact", lengths="length")
    it.accumulator.step(batch, terms, encode=encode)
    assert relative_error(it.updates[0], gradients_of(twin)) <= EXACT


def test_dropout_in_an_encoder_is_drawn_once() -> None:
    """There is one forward pass, so that the random state moves as in one."""
    model, batch = make("normalised", dropout=0.5), images(6)
    runs: list[Gradients] = []
    calls: list[int] = []

    def counted(model: Any, batch: Any) -> Any:
        calls.append(len(batch["y"]))
        return encode(model, batch)

    for _ in range(2):
        torch.manual_seed(3)
        it = subject(model, size=2, batch_norm="exact")
        it.accumulator.step(batch, clip, encode=counted)
        runs.append(it.updates[0])
    assert calls == [2] * 6
    assert relative_error(runs[0], runs[1]) == 0.0


@pytest.mark.parametrize("autocast", [None, torch.bfloat16])
def test_no_worse_than_the_full_batchs_own_rounding(autocast: torch.dtype | None) -> None:
    model, batch = make("residual"), images(8)
    reference, _ = whole(model, batch)
    narrow, there = copy.deepcopy(model).float(), {"x": batch["x"].float(), "y": batch["y"]}
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast is not None):
        own = relative_error(whole(narrow, there)[0], reference)
    it = subject(narrow, size=2, batch_norm="exact", autocast=autocast)
    it.accumulator.step(there, clip, encode=encode)
    assert relative_error(it.updates[0], reference) <= 1.5 * own + torch.finfo(autocast or torch.float32).eps


@pytest.mark.parametrize("where", ["encode", "loss"])
def test_memory_runs_out(where: str) -> None:
    model, batch = make("residual"), images(8)
    largest = 2 if where == "encode" else 0

    def encoded(model: Any, batch: Any) -> Any:
        found = encode(model, batch)
        if where == "encode" and len(batch["y"]) > largest:
            raise torch.OutOfMemoryError
        return found

    def loss(model: Any, z: Any) -> Tensor:
        if where == "loss":
            raise torch.OutOfMemoryError
        return clip(model, z)

    it = subject(model, size=8, batch_norm="exact")
    if where == "loss":
        before = copy.deepcopy(it.model.state_dict())
        with pytest.raises(OutOfMemoryError, match="the loss over the whole batch"):
            it.accumulator.step(batch, loss, encode=encoded)
        assert all(torch.equal(each, before[name]) for name, each in it.model.state_dict().items())
        return
    step = it.accumulator.step(batch, loss, encode=encoded)
    assert (step.retries, step.microbatch_size) == (2, 2)
    reference, buffers = whole(model, batch)
    assert relative_error(it.updates[0], reference) <= EXACT
    assert buffers_differ(dict(it.model.named_buffers()), buffers) <= EXACT


def test_what_goes_wrong_leaves_everything_as_it_was() -> None:
    model, batch = make("normalised"), images(6)
    it = subject(model, size=2, batch_norm="exact")
    before, random = copy.deepcopy(it.model.state_dict()), torch.get_rng_state()

    def parted(model: Any, batch: Any) -> Any:
        if 1 in batch["y"] and 0 not in batch["y"]:
            mb.batch_sum(batch["x"].sum())
        return encode(model, batch)

    def unfit(model: Any, batch: Any) -> Any:
        return {**encode(model, batch), "scale": model.scale}

    def infinite(model: Any, batch: Any) -> Any:
        found = encode(model, batch)
        return {**found, "image": found["image"] / (0 if 2 in batch["y"] else 1)}

    batch["y"] = torch.tensor([0, 0, 1, 1, 2, 2])
    for encoder, loss, error, words in (
        (
            parted,
            clip,
            BatchStatisticsError,
            "microbatch 0 waits for batch_norm .* microbatch 1 waits for batch_sum",
        ),
        (unfit, clip, LossError, "belongs to no row"),
        (infinite, clip, NonfiniteError, "microbatch 2"),
        (encode, lambda *_: 1 / 0, ZeroDivisionError, "zero"),
    ):
        with pytest.raises(error, match=words):
            it.accumulator.step(batch, loss, encode=encoder)  # pyright: ignore[reportArgumentType] -- one never returns
        assert all(torch.equal(each, before[name]) for name, each in it.model.state_dict().items())
        assert torch.equal(torch.get_rng_state(), random)
        assert not gradients_of(it.model)
    it.accumulator.step(batch, clip, encode=encode)
    assert relative_error(it.updates[0], whole(model, batch)[0]) <= EXACT


@pytest.mark.parametrize("way", ["twice", "keep"])
def test_ways_of_encoding_are_not_to_be_had(way: str) -> None:
    with pytest.raises(ConfigError, match=f'does not go with coupled="{way}".*leave coupled= out'):
        subject(make(), size=2, batch_norm="exact", coupled=way)


# -- the other modes ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("way", ["twice", "keep", "spill"])
@pytest.mark.parametrize("size", [2, 6])
def test_pooled_statistics_of_encoders_move_once(size: int, way: str) -> None:
    """However often a microbatch is encoded, it is measured once."""
    model, batch = double(nn.Sequential(nn.BatchNorm2d(3), nn.Flatten(), nn.Linear(108, 3))), images(6)
    twin = copy.deepcopy(model)
    twin(batch["x"])
    it = subject(model, size=size, batch_norm="pooled", coupled=way)
    it.accumulator.step(batch, lambda _, z: z.var(0).sum(), encode=lambda model, batch: model(batch["x"]))
    assert buffers_differ(dict(it.model.named_buffers()), dict(twin.named_buffers())) <= EXACT


# -- checkpoints -------------------------------------------------------------------------------------------------------


class Between(nn.Module):
    """Blocks without a normalisation between blocks with one."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.last = convolution(3, 4), nn.Sequential(convolution(4, 4), *head(36))
        self.between = nn.Sequential(nn.Conv2d(4, 4, 3, padding=1), nn.Tanh(), nn.Conv2d(4, 4, 1))

    def forward(self, x: Tensor) -> Tensor:
        return self.last(self.between(self.first(x)))


def test_blocks_that_are_computed_again() -> None:
    model, batch = double(Between()), images(6)
    twin = copy.deepcopy(model)
    classify(twin, batch).backward()
    it = subject(model, size=2, batch_norm="exact", checkpoint=["between"])
    it.accumulator.step(batch, classify)
    assert relative_error(it.updates[0], gradients_of(twin)) <= EXACT
    around = subject(model, size=2, batch_norm="exact", checkpoint=["first"])
    with pytest.raises(BatchStatisticsError, match=r"batch_norm at 'first\.1' is inside a checkpoint"):
        around.accumulator.step(batch, classify)
    with pytest.raises(ConfigError, match='does not go with checkpoint="auto"'):
        subject(model, size=2, batch_norm="exact", checkpoint="auto")


class Remembering(nn.Module):
    """Keeps on itself what it returns."""

    def __init__(self) -> None:
        super().__init__()
        self.inside = nn.Conv2d(4, 4, 1)
        self.kept: Any = None

    def forward(self, x: Tensor) -> Tensor:
        self.kept = self.inside(x)
        return self.kept


def test_what_replaced_a_forward_keeps_nothing_on_the_model() -> None:
    model = Between()
    model.between = nn.Sequential(Remembering())
    it = subject(double(model), size=2, batch_norm="exact", checkpoint=["between"])
    with pytest.raises(BatchStatisticsError, match=r"kept a tensor on the model itself, as 'kept' of 'between\.0'"):
        it.accumulator.step(images(6), classify)
