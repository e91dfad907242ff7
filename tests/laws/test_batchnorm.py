"""Law C4: batch normalisation, and any statistic of the batch, is the effective batch's, whatever the cut."""

import copy
import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import example, given
from hypothesis import strategies as st
from torch import Tensor, nn

import microbatch as mb

from .networks import LAYERS, UNet, classify, convolution, double, drawn, head, images, mobilenet, resnet18
from .reference import (
    Batch,
    Gradients,
    LossFunction,
    by_hand,
    few,
    full_batch,
    gradients_of,
    numbers,
    on_each_device,
    pieces_of,
    relative_error,
    subject,
)

EXACT = 1e-11  # a chain of normalisations makes rounding larger
ROUNDING = 1e-14  # of a sum that is zero
WRONG = 1e-3


def whole(model: nn.Module, loss: LossFunction, batch: Any) -> tuple[Gradients, Gradients]:
    """Return what one pass over the whole batch leaves, by plain PyTorch: gradients and buffers."""
    twin = copy.deepcopy(model)
    loss(twin, batch).backward()
    return gradients_of(twin), dict(twin.named_buffers())


def together(
    model: nn.Module, loss: LossFunction, batch: Any, *, size: int, **settings: Any
) -> tuple[Gradients, Gradients]:
    """Return what an exact window leaves: gradients and buffers."""
    settings = {"batch_norm": "exact", **settings}
    it = subject(model, size=size, **settings)
    it.accumulator.step(batch, loss)
    return it.updates[0], dict(it.model.named_buffers())


def buffers_differ(got: Gradients, wanted: Gradients) -> float:
    """Return the largest relative difference of a buffer; infinite where a counter differs.

    A mean that is zero but for rounding, as after another normalisation, has no relative difference.
    """
    assert got.keys() == wanted.keys()
    counts = [name for name, each in wanted.items() if not each.is_floating_point()]
    if any(not torch.equal(got[name], wanted[name]) for name in counts):
        return math.inf
    zero = [name for name, each in wanted.items() if max(each.abs().max(), got[name].abs().max()) <= ROUNDING]
    nothing = {*counts, *zero}
    return max(
        (relative_error({name: got[name]}, {name: each}) for name, each in wanted.items() if name not in nothing),
        default=0.0,
    )


def holds(
    model: nn.Module, loss: LossFunction, batch: Any, *, size: int, limit: float = EXACT, **settings: Any
) -> None:
    """Hold an exact window against the whole batch."""
    gradients, buffers = whole(model, loss, batch)
    got, left = together(model, loss, batch, size=size, **settings)
    assert relative_error(got, gradients) <= limit
    assert buffers_differ(left, buffers) <= limit


# -- networks ----------------------------------------------------------------------------------------------------------

NAMES = st.lists(st.sampled_from(sorted(LAYERS)), min_size=1, max_size=4)


@few
@given(names=NAMES, rows=st.integers(2, 9), size=st.integers(1, 9))
@example(names=["residual", "cumulative", "twice", "synchronised"], rows=7, size=3)
@example(names=["no affine", "frozen", "no tracking", "twice", "cumulative"], rows=5, size=1)
@example(names=["relu in place", "residual", "relu in place"], rows=5, size=2)
@example(names=["no affine", "cumulative"], rows=2, size=1)  # the second means are those of what has none
def test_a_network_of_any_layers(names: list[str], rows: int, size: int) -> None:
    batch = images(rows)
    model = double(drawn(names))
    holds(model, classify, batch, size=size)


NETWORKS: dict[str, Callable[[], nn.Module]] = {"resnet18": resnet18, "mobilenet": mobilenet, "unet": UNet}


@on_each_device
@pytest.mark.parametrize("size", [1, 3, 8])
@pytest.mark.parametrize("name", NETWORKS)
def test_networks_that_people_train(name: str, size: int, device: str) -> None:
    batch = images(8, side=16)
    model = double(NETWORKS[name]()).to(device)
    there = {key: each.to(device) for key, each in batch.items()}
    holds(model, classify, there, size=size)


@pytest.mark.parametrize("name", ["resnet18", "mobilenet"])
def test_networks_of_others(name: str) -> None:
    """Networks of a library that was written without thinking of us."""
    theirs = pytest.importorskip("transformers")
    if name == "resnet18":
        sizes = {"embedding_size": 4, "hidden_sizes": [4, 8, 8, 16], "depths": [2, 2, 2, 2], "layer_type": "basic"}
        model = theirs.ResNetForImageClassification(theirs.ResNetConfig(num_labels=3, **sizes))
    else:
        config = theirs.MobileNetV2Config(depth_multiplier=0.2, classifier_dropout_prob=0.0, num_labels=3)
        model = theirs.MobileNetV2ForImageClassification(config)

    def loss(model: nn.Module, batch: Any) -> Tensor:
        return F.cross_entropy(model(batch["x"]).logits, batch["y"])

    holds(double(model), loss, images(5, side=33), size=2)


@pytest.mark.parametrize("size", [1, 3])
@pytest.mark.parametrize("name", NETWORKS)
def test_plain_accumulation_is_told_apart(name: str, size: int) -> None:
    batch = images(8, side=16)
    model = double(NETWORKS[name]())
    reference, buffers = whole(model, classify, batch)
    pieces = pieces_of(batch, size)
    shares = [len(piece["y"]) / 8 for piece in pieces]
    twin = copy.deepcopy(model)
    for share, piece in zip(shares, pieces, strict=True):
        (share * classify(twin, piece)).backward()
    assert relative_error(gradients_of(twin), reference) > WRONG
    assert buffers_differ(dict(twin.named_buffers()), buffers) == math.inf  # N batches were counted
    counted = {name: each for name, each in twin.named_buffers() if each.is_floating_point()}
    assert buffers_differ(counted, {name: buffers[name] for name in counted}) > WRONG


def test_the_step_reports_the_effective_batch() -> None:
    batch = images(7)
    model = double(drawn(["normalised"]))
    it = subject(model, size=2, batch_norm="exact")
    step = it.accumulator.step(batch, classify)
    assert (step.microbatches, step.microbatch_size, step.samples, step.count) == (4, 2, 7, 7)
    assert step.loss.item() == pytest.approx(classify(copy.deepcopy(model), batch).item(), rel=1e-12)
    norms = [each.square().sum() for each in full_batch(model, classify, batch).values()]
    assert step.grad_norm.item() == pytest.approx(sum(norms).sqrt().item(), rel=1e-11)  # pyright: ignore[reportAttributeAccessIssue]


def test_many_steps_leave_the_weights_and_statistics_of_large_batches() -> None:
    model = double(drawn(["residual", "cumulative"]))
    plain = copy.deepcopy(model)
    model_optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    plain_optimizer = torch.optim.SGD(plain.parameters(), lr=0.1, momentum=0.9)
    accumulator = mb.Accumulator(model, model_optimizer, microbatch_size=2, batch_norm="exact", max_grad_norm=0.5)
    for seed in range(5):
        batch = images(5 + seed, seed=seed)  # also more microbatches than there are threads
        accumulator.step(batch, classify)
        plain_optimizer.zero_grad()
        classify(plain, batch).backward()
        nn.utils.clip_grad_norm_(plain.parameters(), 0.5)
        plain_optimizer.step()
    assert buffers_differ(model.state_dict(), plain.state_dict()) <= 1e-10


# -- shapes and layouts ------------------------------------------------------------------------------------------------


class Flat(nn.Module):
    """Normalises what has no positions, and what has one, two or three dimensions of them."""

    def __init__(self) -> None:
        super().__init__()
        self.norms = nn.ModuleList([nn.BatchNorm1d(4), nn.BatchNorm1d(4), nn.BatchNorm2d(4), nn.BatchNorm3d(4)])
        self.mix = nn.Linear(4, 4)

    def forward(self, x: Tensor) -> Tensor:
        shapes = ((-1, 4), (-1, 4, 6), (-1, 4, 2, 3), (-1, 4, 1, 2, 3))
        for layer, shape in zip(self.norms, shapes, strict=True):
            wide = x if len(shape) == 2 else x.unsqueeze(-1) * torch.arange(1.0, 7, dtype=x.dtype).cos()
            x = self.mix(layer(wide.reshape(shape)).tanh().flatten(2).mean(-1) if len(shape) > 2 else layer(x).tanh())
        return x


@pytest.mark.parametrize("size", [1, 2])
def test_every_number_of_dimensions(size: int) -> None:
    batch = {"x": numbers(1, 5, 4), "y": torch.tensor([0, 1, 2, 3, 0])}
    holds(double(Flat()), classify, batch, size=size)


@pytest.mark.parametrize("layout", [torch.channels_last, torch.contiguous_format])
def test_memory_layouts(layout: torch.memory_format) -> None:
    batch = images(6)
    batch["x"] = batch["x"].contiguous(memory_format=layout)
    model = double(drawn(["residual", "inverted"])).to(memory_format=layout)  # pyright: ignore[reportCallIssue]
    layouts: list[bool] = []
    inside = next(each for each in model.modules() if isinstance(each, nn.BatchNorm2d))
    inside.register_forward_hook(lambda *each: layouts.append(each[2].is_contiguous(memory_format=layout)))
    holds(model, classify, batch, size=2)
    assert all(layouts)


def test_the_first_layer_may_be_the_normalisation() -> None:
    batch = images(5)
    model = double(nn.Sequential(nn.BatchNorm2d(3), nn.Flatten(), nn.Linear(108, 3)))
    holds(model, classify, batch, size=2)


def test_a_microbatch_whose_values_are_far_from_zero() -> None:
    """The sum of squares is not taken of raw values: merging would lose what it is after."""
    batch = images(6)
    batch["x"] = batch["x"] + 1e4
    model = double(nn.Sequential(nn.BatchNorm2d(3), nn.Flatten(), nn.Linear(108, 3)))
    holds(model, classify, batch, size=2, limit=1e-10)


# -- beside it ---------------------------------------------------------------------------------------------------------


class Recorded(nn.Module):
    """A dropout that can be told the masks that it drew."""

    def __init__(self) -> None:
        super().__init__()
        self.drawn: dict[int, Tensor] = {}
        self.replay: Tensor | None = None

    def forward(self, x: Tensor, rows: Tensor) -> Tensor:
        mask = torch.bernoulli(torch.full_like(x, 0.5)) if self.replay is None else self.replay
        self.drawn.update(zip(rows.tolist(), mask, strict=True))
        return 2 * x * mask


class Dropping(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first, self.last = convolution(3, 4), nn.Sequential(convolution(4, 4), *head(36))
        self.dropout = Recorded()

    def forward(self, x: Tensor) -> Tensor:
        rows = x[:, 0, 0, 0].detach().round().long()
        return self.last(self.dropout(self.first(x), rows))


def test_dropout_beside_it() -> None:
    batch = images(6)
    batch["x"][:, 0, 0, 0] = torch.arange(6.0)
    model = Dropping()
    double(model)
    it = subject(model, size=2, batch_norm="exact")
    it.accumulator.step(batch, classify)
    assert isinstance(it.model, Dropping)
    masks = it.model.dropout.drawn
    model.dropout.replay = torch.stack([masks[row] for row in range(6)])
    reference, buffers = whole(model, classify, batch)
    assert relative_error(it.updates[0], reference) <= EXACT
    assert buffers_differ(dict(it.model.named_buffers()), buffers) <= EXACT


def test_the_same_seed_draws_the_same_masks() -> None:
    batch = images(6)
    model = double(nn.Sequential(convolution(3, 4), nn.Dropout(0.5), *head(36)))
    runs: list[Gradients] = []
    for _ in range(2):
        torch.manual_seed(3)
        runs.append(together(model, classify, batch, size=2)[0])
    assert relative_error(runs[0], runs[1]) == 0.0


class Student(nn.Module):
    """Learns from a teacher in training mode, of which nobody wants gradients."""

    def __init__(self) -> None:
        super().__init__()
        self.teacher = nn.Sequential(convolution(3, 4), nn.Flatten())
        self.student = nn.Sequential(convolution(3, 4), nn.Flatten())

    def forward(self, x: Tensor) -> Tensor:
        with torch.no_grad():
            wanted = self.teacher(x)
        return (self.student(x) - wanted).square().mean(1)


def test_a_teacher_without_gradients() -> None:
    batch = images(6)
    holds(double(Student()), lambda model, batch: model(batch["x"]).mean(), batch, size=2)


class Telling(nn.Module):
    """Leaves on itself, before one normalisation, what it reads after another."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.last = convolution(3, 4), nn.Sequential(convolution(4, 4), *head(36))
        self.told: Any = None
        self.passes = 0

    def forward(self, x: Tensor) -> Tensor:
        self.told = self.first.get_submodule("0")(x)
        self.passes += 1
        out = self.last(self.first(x))
        return out * (1 + self.told.mean((1, 2, 3)).tanh().unsqueeze(1))


def test_what_a_module_keeps_on_itself_is_its_microbatchs_own() -> None:
    batch = images(6)
    model = Telling()
    double(model)
    model.told, model.passes = None, 0
    holds(model, classify, batch, size=2)
    it = subject(model, size=4, batch_norm="exact")
    it.accumulator.step(batch, classify)
    assert isinstance(it.model, Telling)
    assert len(it.model.told) == 2  # of the last microbatch, as ever
    assert it.model.passes == 1


def test_some_microbatches_contribute_nothing() -> None:
    batch = images(6)
    model = double(drawn(["residual"]))

    def loss(model: nn.Module, batch: Any) -> Any:
        losses = F.cross_entropy(model(batch["x"]), batch["y"], reduction="none")
        kept = batch["kept"]
        return mb.Loss(sum=(losses * kept).sum(), count=int(kept.sum())) if kept.any() else None

    kept = torch.tensor([1.0, 0.0, 0.0, 0.0, 1.0, 1.0], dtype=torch.float64)
    both = {**batch, "kept": kept}
    reference, _ = whole(model, lambda model, batch: loss(model, batch).mean, both)
    assert relative_error(together(model, loss, both, size=2)[0], reference) <= EXACT


def test_fused_weights() -> None:
    batch = images(6)
    layers = [nn.Flatten(), nn.Linear(108, 512), nn.BatchNorm1d(512), nn.Tanh(), nn.Linear(512, 512)]
    model = double(nn.Sequential(*layers, nn.BatchNorm1d(512), nn.Tanh(), nn.Linear(512, 3)))
    holds(model, classify, batch, size=2)
    it = subject(model, size=2, batch_norm="exact")
    assert it.accumulator.step(batch, classify).fused == 1
    holds(model, classify, batch, size=2, sums=mb.Sums(fuse=False))


def test_what_is_spilled_and_what_is_not() -> None:
    batch = images(6, side=40)  # storages of 64 KiB and more
    model = double(nn.Sequential(convolution(3, 4), convolution(4, 4), *head(1600)))
    for offload in (mb.Spill(model), mb.Spill(model, smallest=1 << 40)):
        holds(model, classify, batch, size=2, offload=offload)
        assert offload.bytes_held == 0
        before = offload.bytes_spilled
        step = subject(model, size=2, batch_norm="exact", offload=offload).accumulator.step(batch, classify)
        assert step.spilled_bytes == offload.bytes_spilled - before
    assert step.spilled_bytes == 0
    assert subject(model, size=2, batch_norm="exact").accumulator.step(batch, classify).spilled_bytes > 0


def test_memory_runs_out() -> None:
    batch = images(8)
    model = double(drawn(["residual", "cumulative"]))

    def loss(model: nn.Module, batch: Any) -> Tensor:
        found = classify(model, batch)
        if len(batch["y"]) > 2:
            raise torch.OutOfMemoryError
        return found

    reference, buffers = whole(model, classify, batch)
    it = subject(model, size=8, batch_norm="exact")
    step = it.accumulator.step(batch, loss)
    assert (step.retries, step.microbatch_size) == (2, 2)
    assert relative_error(it.updates[0], reference) <= EXACT
    assert buffers_differ(dict(it.model.named_buffers()), buffers) <= EXACT


def test_a_dropped_window_moves_no_statistics() -> None:
    batch = images(6)
    model = double(drawn(["normalised"]))
    it = subject(model, size=2, batch_norm="exact", nonfinite="skip")
    before = copy.deepcopy(dict(it.model.named_buffers()))
    batch["x"][4, 0, 0, 0] = math.nan
    assert not it.accumulator.step(batch, classify).applied
    assert buffers_differ(dict(it.model.named_buffers()), before) == 0.0


# -- precision ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("autocast", [None, torch.bfloat16])
def test_no_worse_than_the_full_batchs_own_rounding(autocast: torch.dtype | None) -> None:
    batch = images(8)
    model = double(drawn(["residual", "normalised"]))
    reference, _ = whole(model, classify, batch)
    narrow = copy.deepcopy(model).float()
    there: Batch = {"x": batch["x"].float(), "y": batch["y"]}

    def loss(model: nn.Module, batch: Any) -> Tensor:
        return classify(model, batch)

    with torch.autocast("cpu", torch.bfloat16, enabled=autocast is not None):
        own = relative_error(whole(narrow, loss, there)[0], reference)
    got = relative_error(together(narrow, loss, there, size=2, autocast=autocast)[0], reference)
    unit = torch.finfo(autocast or torch.float32).eps
    # Both are draws of the same rounding: a few units, and not one more for each microbatch.
    assert got <= 1.5 * own + unit


def test_narrow_weights_add_up_in_the_wide_dtype() -> None:
    """The gradients of one backward would be added in bfloat16, where a sum of ones stops at 256."""
    model = nn.Sequential(nn.Linear(1, 1)).to(torch.bfloat16)
    rows = 300
    it = subject(model, size=1, batch_norm="exact")
    it.accumulator.step(
        torch.ones(rows, 1, dtype=torch.bfloat16), lambda model, x: mb.Loss(sum=model(x).sum(), count=1 / rows)
    )
    assert it.updates[0]["0.bias"].item() == pytest.approx(rows, rel=2**-8)


# -- one's own statistics ----------------------------------------------------------------------------------------------


def test_elsewhere_they_are_identities() -> None:
    x = torch.ones(3, requires_grad=True)
    assert mb.batch_mean(x) is x
    assert mb.batch_mean(x, count=2) is x
    assert mb.batch_sum(x) is x
    assert mb.batch_gather(x) is x
    it = subject(nn.Linear(3, 1), size=1)
    seen: list[Tensor] = []

    def loss(model: nn.Module, x: Tensor) -> Tensor:
        seen.append(mb.batch_gather(x))
        return model(x).mean()

    it.accumulator.step(torch.ones(2, 3), loss)
    assert [len(each) for each in seen] == [1, 1]


class Mixture(nn.Module):
    """A layer of experts, of which a router takes two for each token, and the share of tokens that each gets."""

    def __init__(self, width: int, experts: int) -> None:
        super().__init__()
        self.router = nn.Linear(width, experts)
        self.experts = nn.ModuleList(nn.Linear(width, width) for _ in range(experts))

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        share = self.router(x).softmax(-1)
        chosen = torch.zeros_like(share).scatter(-1, share.topk(2).indices, 1.0)
        used = mb.batch_mean(chosen.flatten(0, 1).mean(0))
        wanted = mb.batch_mean(share.flatten(0, 1).mean(0))
        weights = share * chosen
        out = sum(weights[..., i : i + 1] * expert(x).tanh() for i, expert in enumerate(self.experts))
        assert isinstance(out, Tensor)
        return x + out, (used * wanted).sum() * len(self.experts)


class Transformer(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(11, 8)
        self.attention = nn.MultiheadAttention(8, 2, batch_first=True)
        self.mixtures = nn.ModuleList(Mixture(8, 4) for _ in range(2))
        self.head = nn.Linear(8, 11)

    def forward(self, tokens: Tensor) -> tuple[Tensor, Tensor]:
        x = self.embedding(tokens)
        x = x + self.attention(x, x, x, need_weights=False)[0]
        balance = torch.zeros((), dtype=x.dtype)
        for mixture in self.mixtures:
            x, part = mixture(x)
            balance = balance + part
        return self.head(x), balance


def routed(model: nn.Module, tokens: Tensor) -> Tensor:
    logits, balance = model(tokens[:, :-1])
    return F.cross_entropy(logits.flatten(0, 1), tokens[:, 1:].flatten()) + 0.1 * balance


@pytest.mark.parametrize("size", [1, 2, 4])
def test_a_mixture_of_experts_is_balanced_over_the_batch(size: int) -> None:
    torch.manual_seed(1)
    model, tokens = Transformer().double(), torch.randint(0, 11, (7, 6))
    holds(model, routed, tokens, size=size)
    if size == 1:
        reference, _ = whole(model, routed, tokens)
        pieces = [{"t": piece} for piece in tokens.split(1)]
        plain = by_hand(model, lambda model, batch: routed(model, batch["t"]), pieces, divide_by=len(pieces))
        assert relative_error(plain, reference) > WRONG


def vicreg(z: Tensor) -> Tensor:
    centred = z - z.mean(0)
    covariance = centred.T @ centred / (len(z) - 1)
    off = covariance - covariance.diag().diag()
    return F.relu(1 - (centred.var(0) + 1e-4).sqrt()).mean() + off.square().sum() / z.shape[1]


def vicreg_by_sums(z: Tensor, rows: float) -> Tensor:
    centred = z - mb.batch_mean(z.mean(0))
    covariance = mb.batch_sum(centred.T @ centred) / (rows - 1)
    off = covariance - covariance.diag().diag()
    return F.relu(1 - (covariance.diag() + 1e-4).sqrt()).mean() + off.square().sum() / z.shape[1]


def barlow(one: Tensor, other: Tensor) -> Tensor:
    one, other = ((z - z.mean(0)) / z.std(0) for z in (one, other))
    off = one.T @ other / len(one) - torch.eye(one.shape[1], dtype=one.dtype)
    return off.square().sum()


def contrast(one: Tensor, other: Tensor) -> Tensor:
    return F.cross_entropy(F.normalize(one) @ F.normalize(other).T / 0.2, torch.arange(len(one)))


def views(model: nn.Module, batch: Any) -> tuple[Tensor, Tensor]:
    return model(batch["x"]), model(batch["x"].flip(3))


COUPLED: dict[str, tuple[LossFunction, LossFunction]] = {
    "vicreg": (lambda m, b: vicreg(m(b["x"])), lambda m, b: vicreg(mb.batch_gather(m(b["x"])))),
    "vicreg by sums": (lambda m, b: vicreg(m(b["x"])), lambda m, b: vicreg_by_sums(m(b["x"]), 8)),
    "barlow": (lambda m, b: barlow(*views(m, b)), lambda m, b: barlow(*map(mb.batch_gather, views(m, b)))),
    "contrast": (lambda m, b: contrast(*views(m, b)), lambda m, b: contrast(*map(mb.batch_gather, views(m, b)))),
}


@pytest.mark.filterwarnings("ignore:the loss compares the samples:microbatch.MicrobatchWarning")
@pytest.mark.parametrize("size", [1, 3])
@pytest.mark.parametrize("name", COUPLED)
def test_losses_that_couple_samples(name: str, size: int) -> None:
    plain, exact = COUPLED[name]
    batch = images(8)
    model = double(nn.Sequential(convolution(3, 4), convolution(4, 4), *head(36, classes=5)))
    reference, _ = whole(model, plain, batch)
    assert relative_error(together(model, exact, batch, size=size)[0], reference) <= EXACT
    if size == 3:  # of one row there is no variance
        bare = {"batch_norm": "microbatch"}
        assert relative_error(together(model, plain, batch, size=size, **bare)[0], reference) > WRONG


def test_a_mean_over_counts_of_ones_own() -> None:
    x, kept = numbers(3, 7, 3), torch.tensor([1, 0, 0, 1, 1, 1, 0], dtype=torch.float64)
    batch = {"x": x, "kept": kept}
    model = nn.Linear(3, 2).double()

    def exact(model: nn.Module, batch: Any) -> Tensor:
        z, kept = model(batch["x"]), batch["kept"]
        mean = (z * kept.unsqueeze(1)).sum(0) / kept.sum().clamp(min=1)
        return mb.batch_mean(mean, count=kept.sum()).square().sum()

    def plain(model: nn.Module, batch: Any) -> Tensor:
        return (model(batch["x"]) * batch["kept"].unsqueeze(1)).sum(0).div(batch["kept"].sum()).square().sum()

    reference, _ = whole(model, plain, batch)
    # In the last microbatch nothing is kept.
    found = together(model, exact, {key: each[[0, 3, 4, 5, 6, 1, 2]] for key, each in batch.items()}, size=5)[0]
    assert relative_error(found, reference) <= EXACT
