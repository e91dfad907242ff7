"""The loss head in tiles: cross-entropy of a linear layer, without its logits."""

import contextlib
import copy
import functools
from collections.abc import Sequence
from typing import Any, cast

import pytest
import torch
import torch.nn.functional as F
from hypothesis import example, given
from hypothesis import strategies as st
from tests.allocations import allocated_peak
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

import microbatch as mb
from microbatch.errors import LossError
from microbatch.loss.loss import Loss
from microbatch.loss.tiled_cross_entropy import linear_cross_entropy

from .reference import (
    EXACT,
    NARROW,
    WRONG,
    Batch,
    Door,
    Gradients,
    few,
    fewer,
    filled,
    full_batch,
    numbers,
    on_each_device,
    relative_error,
    sentences,
    subject,
    through_each_door,
)

SEEDS = st.integers(0, 2**16)
TILES = st.sampled_from([None, 1, 2, 3, 7, 100])
WIDTH, WORDS = 6, 11


def plain(
    hidden: Tensor, weight: Tensor, labels: Tensor, *, bias: Tensor | None = None, ignore_index: int = -100
) -> Tensor:
    logits = F.linear(hidden, weight, bias).flatten(0, -2)
    return F.cross_entropy(logits, labels.flatten(), ignore_index=ignore_index, reduction="sum")


def drawn(seed: int, tokens: int, *, ignored: int = 0, dtype: torch.dtype = torch.float64, device: str = "cpu") -> Any:
    """Draw hidden, weight, labels and bias."""
    generator = torch.Generator().manual_seed(seed)
    labels = torch.randint(0, WORDS, (tokens,), generator=generator)
    labels[torch.randperm(tokens, generator=generator)[:ignored]] = -100
    hidden, weight, bias = numbers(seed, tokens, WIDTH), numbers(seed + 1, WORDS, WIDTH), numbers(seed + 2, WORDS)
    return (*(each.to(device, dtype).requires_grad_() for each in (hidden, weight, bias)), labels.to(device))


def gradients(loss: Tensor, **tensors: Tensor) -> Gradients:
    # torch does not say that gradients may be missing.
    found = cast("Sequence[Tensor | None]", torch.autograd.grad(loss, list(tensors.values()), allow_unused=True))
    return {name: each for name, each in zip(tensors, found, strict=True) if each is not None}


def wide(*tensors: Tensor) -> list[Tensor]:
    return [each.detach().double().requires_grad_() for each in tensors]


# -- the same loss and gradient ------------------------------------------------------------------------------------


@on_each_device
@given(
    tokens=st.integers(1, 12),
    ignored=st.integers(0, 12),
    tile=TILES,
    with_bias=st.booleans(),
    weight_of_loss=st.floats(-3, 3),
    seed=SEEDS,
)
@example(tokens=12, ignored=5, tile=5, with_bias=True, weight_of_loss=1.0, seed=0)
@example(tokens=12, ignored=12, tile=5, with_bias=True, weight_of_loss=1.0, seed=0)
@example(tokens=12, ignored=12, tile=None, with_bias=False, weight_of_loss=1.0, seed=0)
def test_it_is_the_plain_loss(
    device: str, tokens: int, ignored: int, tile: int | None, with_bias: bool, weight_of_loss: float, seed: int
) -> None:
    hidden, weight, bias, labels = drawn(seed, tokens, ignored=min(ignored, tokens), device=device)
    tensors = {"hidden": hidden, "weight": weight} | ({"bias": bias} if with_bias else {})
    given_bias = bias if with_bias else None
    expected = plain(hidden, weight, labels, bias=given_bias)
    loss = linear_cross_entropy(hidden, weight, labels, bias=given_bias, tile=tile)
    assert isinstance(loss.count, Tensor)
    assert loss.count.item() == tokens - min(ignored, tokens)
    assert loss.sum.dtype == torch.float64
    assert abs(loss.sum - expected) <= EXACT * (1 + expected.abs())
    want = gradients(expected * weight_of_loss, **tensors)
    got = gradients(loss.sum * weight_of_loss, **tensors)
    assert relative_error(got, want) <= EXACT
    if ignored < tokens and abs(weight_of_loss) > 0.01:
        counted = gradients(plain(hidden, weight, labels.clamp(min=0), bias=given_bias) * weight_of_loss, **tensors)
        assert ignored == 0 or relative_error(counted, want) > WRONG
        assert relative_error({name: each * 1.00001 for name, each in want.items()}, want) > WRONG


@pytest.mark.parametrize("shape", [(), (5,), (2, 5), (2, 3, 4), (0,), (2, 0)], ids=str)
@pytest.mark.parametrize("tile", [None, 1, 4])
def test_any_shape(shape: tuple[int, ...], tile: int | None) -> None:
    hidden, weight = numbers(0, *shape, WIDTH).requires_grad_(), numbers(1, WORDS, WIDTH).requires_grad_()
    labels = torch.randint(0, WORDS, shape)
    loss = linear_cross_entropy(hidden, weight, labels, tile=tile)
    expected = plain(hidden.reshape(-1, WIDTH), weight, labels.reshape(-1))
    assert (loss.sum - expected).abs() <= EXACT * (1 + expected.abs())
    assert loss.count == labels.numel()
    if labels.numel():
        want = gradients(expected, hidden=hidden, weight=weight)
        assert relative_error(gradients(loss.sum, hidden=hidden, weight=weight), want) <= EXACT
    else:
        assert gradients(loss.sum, hidden=hidden)["hidden"].shape == hidden.shape


@pytest.mark.parametrize("tile", [None, 1, 4])
@pytest.mark.parametrize("ignore_index", [0, 3, -1])
def test_another_label_to_ignore(tile: int | None, ignore_index: int) -> None:
    hidden, weight, bias, labels = drawn(0, 12)
    labels[::3] = ignore_index
    loss = linear_cross_entropy(hidden, weight, labels, bias=bias, ignore_index=ignore_index, tile=tile)
    expected = plain(hidden, weight, labels, bias=bias, ignore_index=ignore_index)
    tensors = {"hidden": hidden, "weight": weight, "bias": bias}
    assert loss.count == (labels != ignore_index).sum()
    want = gradients(expected, **tensors)
    assert relative_error(gradients(loss.sum, **tensors), want) <= EXACT
    if ignore_index >= 0:
        other = plain(hidden, weight, labels, bias=bias)
        assert relative_error(gradients(other, **tensors), want) > WRONG


@pytest.mark.parametrize("tile", [None, 1, 3])
def test_logits_that_are_large_or_left_out(tile: int | None) -> None:
    """Softmax must not overflow, and words that are masked by minus infinity get no gradient."""
    hidden, weight, bias, labels = drawn(0, 8)
    bias = bias.detach().clone()
    bias[3], bias[4] = -torch.inf, 1e4
    labels = torch.where(labels == 3, 4, labels)
    expected = plain(hidden * 1e3, weight, labels, bias=bias)
    loss = linear_cross_entropy(hidden * 1e3, weight, labels, bias=bias, tile=tile)
    assert loss.sum.isfinite()
    assert loss.sum.item() == pytest.approx(expected.item(), rel=EXACT)
    want = gradients(expected, hidden=hidden, weight=weight)
    assert relative_error(gradients(loss.sum, hidden=hidden, weight=weight), want) <= EXACT
    assert want["weight"][3].abs().max() == 0


# -- in narrow precision: no worse than the plain loss -------------------------------------------------------------


def cast_to(autocast: torch.dtype | None) -> Any:
    return contextlib.nullcontext() if autocast is None else torch.autocast("cpu", autocast)


@pytest.mark.parametrize("precision", NARROW)
@few
@given(tokens=st.integers(1, 12), tile=TILES, with_bias=st.booleans(), seed=SEEDS)
@example(tokens=12, tile=1, with_bias=True, seed=0)
@example(tokens=10, tile=3, with_bias=True, seed=150)
def test_no_worse_than_the_plain_loss(
    precision: str, tokens: int, tile: int | None, with_bias: bool, seed: int
) -> None:
    dtype, autocast = NARROW[precision]
    hidden, weight, bias, labels = drawn(seed, tokens, dtype=dtype)
    tensors = {"hidden": hidden, "weight": weight} | ({"bias": bias} if with_bias else {})
    given_bias = bias if with_bias else None
    with cast_to(autocast):
        theirs = plain(hidden, weight, labels, bias=given_bias)
        ours = linear_cross_entropy(hidden, weight, labels, bias=given_bias, tile=tile).sum
    h, w, b = wide(hidden, weight, bias)
    truth = plain(h, w, labels, bias=b if with_bias else None)
    want = gradients(truth, **({"hidden": h, "weight": w} | ({"bias": b} if with_bias else {})))
    unit = torch.finfo(autocast or dtype).eps
    assert ours.dtype == torch.float32
    # Each tile ends with a rounding of its own, and their sum with another one.
    assert abs(ours - truth) <= abs(theirs - truth) + 2 * unit * truth
    own = relative_error(gradients(theirs, **tensors), want)
    got = gradients(ours, **tensors)
    assert {name: each.dtype for name, each in got.items()} == {name: each.dtype for name, each in tensors.items()}
    assert relative_error(got, want) <= own + unit
    assert relative_error({name: each * (1 + 4 * (own + unit)) for name, each in want.items()}, want) > own + unit


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32], ids=str)
@pytest.mark.parametrize("tile", [1, 16])
def test_many_tiles_do_not_lose_what_one_product_keeps(dtype: torch.dtype, tile: int) -> None:
    """A sum of many tiles in a narrow precision stops growing."""
    tokens = 2048
    hidden = (1 + numbers(0, tokens, WIDTH) / 8).to(dtype).requires_grad_()
    weight = (numbers(1, WORDS, WIDTH) / 8).to(dtype).requires_grad_()
    bias = (numbers(2, WORDS) / 8).to(dtype).requires_grad_()
    labels = torch.arange(tokens) % 3
    ours = linear_cross_entropy(hidden, weight, labels, bias=bias, tile=tile).sum
    theirs = plain(hidden, weight, labels, bias=bias)
    h, w, b = wide(hidden, weight, bias)
    want = gradients(plain(h, w, labels, bias=b), weight=w, bias=b)
    got, plainly_got = (gradients(each, weight=weight, bias=bias) for each in (ours, theirs))
    unit = torch.finfo(dtype).eps
    # The bias is a plain sum over the tiles, for which float32 is as wide as it gets.
    for name in ("weight", "bias") if unit > 1e-6 else ("weight",):
        own = relative_error({name: plainly_got[name]}, {name: want[name]})
        assert relative_error({name: got[name]}, {name: want[name]}) <= own + unit


# -- in a window ---------------------------------------------------------------------------------------------------


class Writer(nn.Module):
    """Read tokens and predict tokens, with one weight or two."""

    def __init__(self, *, tied: bool, bias: bool = True) -> None:
        super().__init__()
        self.embedding = nn.Embedding(WORDS, WIDTH)
        self.middle = nn.Linear(WIDTH, WIDTH)
        self.head = nn.Linear(WIDTH, WORDS, bias=bias)
        if tied:
            self.head.weight = self.embedding.weight

    def forward(self, tokens: Tensor) -> Tensor:
        """Return hidden states."""
        return self.middle(self.embedding(tokens)).tanh()


def in_tiles(tile: int | None, *, again: bool = False) -> Any:
    def loss_fn(model: Any, batch: Batch) -> Loss:
        def head(hidden: Tensor) -> Tensor:
            loss = mb.linear_cross_entropy(hidden, model.head.weight, batch["labels"], bias=model.head.bias, tile=tile)
            return loss.sum

        hidden = model(batch["tokens"])
        sum_ = checkpoint(head, hidden, use_reentrant=False) if again else head(hidden)
        return mb.Loss(sum=sum_, count=(batch["labels"] >= 0).sum())

    return loss_fn


def plainly(model: Any, batch: Batch) -> Tensor:
    sum_ = plain(model(batch["tokens"]), model.head.weight, batch["labels"], bias=model.head.bias)
    return sum_ / (batch["labels"] >= 0).sum()


@through_each_door
@on_each_device
@few
@given(
    targets=st.lists(st.integers(0, 8), min_size=1, max_size=6).filter(any),
    size=st.integers(1, 4),
    tile=TILES,
    tied=st.booleans(),
    bias=st.booleans(),
    fuse=st.booleans(),
    again=st.booleans(),
    seed=SEEDS,
)
@example(targets=[8, 1, 0, 5], size=2, tile=3, tied=True, bias=True, fuse=True, again=False, seed=0)
def test_in_a_window(
    door: Door,
    device: str,
    targets: list[int],
    size: int,
    tile: int | None,
    tied: bool,
    bias: bool,
    fuse: bool,
    again: bool,
    seed: int,
) -> None:
    model, batch = filled(Writer(tied=tied, bias=bias), seed, device), sentences(seed, targets)
    reference = full_batch(model, plainly, batch)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("microbatch.gradients.fused_matmul.SMALLEST", 1)
        it = subject(model, size=size, sums=mb.Sums(fuse=fuse))
        step = door(it, batch, in_tiles(tile, again=again), size=size)
    assert relative_error(it.updates[0], reference) <= EXACT
    assert relative_error(full_batch(model, lambda m, b: plainly(m, b) * 1.00001, batch), reference) > WRONG
    assert (step.fused > 0) == fuse


@pytest.mark.parametrize("tile", [None, 100])
def test_one_tile_is_fused(tile: int | None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("microbatch.gradients.fused_matmul.SMALLEST", 1)
    model, batch = filled(Writer(tied=False), 0, "cpu"), sentences(0, [4, 1], width=4)
    it = subject(model, size=1, sums=mb.Sums(fuse=True))
    it.accumulator.step(batch, in_tiles(tile))
    assert it.accumulator.fusion()["head.weight"] == "fused"
    it.accumulator.step(batch, in_tiles(1))
    assert it.accumulator.fusion()["head.weight"] != "fused"


@pytest.mark.parametrize("precision", NARROW)
@pytest.mark.parametrize("tile", [None, 3])
def test_in_a_window_no_worse_than_plain(precision: str, tile: int | None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("microbatch.gradients.fused_matmul.SMALLEST", 1)
    dtype, autocast = NARROW[precision]
    model, batch = filled(Writer(tied=True), 0, "cpu", dtype), sentences(0, [8, 1, 0, 5])
    reference = full_batch(model, plainly, batch)
    ours, theirs = (subject(model, size=2, autocast=autocast, sums=mb.Sums(fuse=fuse)) for fuse in (True, False))
    ours.accumulator.step(batch, in_tiles(tile))

    def plain_loss(model: Any, batch: Batch) -> mb.Loss:
        sum_ = plain(model(batch["tokens"]), model.head.weight, batch["labels"], bias=model.head.bias)
        return mb.Loss(sum=sum_, count=(batch["labels"] >= 0).sum())

    theirs.accumulator.step(batch, plain_loss)
    own = relative_error(theirs.updates[0], reference)
    assert own < 0.1
    assert relative_error(ours.updates[0], reference) <= own + torch.finfo(autocast or dtype).eps


# -- what is frozen, and what is not trained at all ----------------------------------------------------------------


@pytest.mark.parametrize("tile", [None, 1, 3])
@pytest.mark.parametrize("frozen", ["hidden", "weight", "bias", "hidden weight", "weight bias", "hidden bias"])
def test_frozen_parts(tile: int | None, frozen: str) -> None:
    hidden, weight, bias, labels = drawn(0, 8, ignored=2)
    tensors = {"hidden": hidden, "weight": weight, "bias": bias}
    for name in frozen.split():
        tensors.pop(name).requires_grad_(requires_grad=False)
    want = gradients(plain(hidden, weight, labels, bias=bias), **tensors)
    loss = linear_cross_entropy(hidden, weight, labels, bias=bias, tile=tile)
    assert relative_error(gradients(loss.sum, **tensors), want) <= EXACT
    assert want.keys() == tensors.keys()


@pytest.mark.parametrize("tile", [None, 1, 3])
@pytest.mark.parametrize("how", ["no_grad", "inference_mode", "frozen"])
def test_evaluation(tile: int | None, how: str) -> None:
    hidden, weight, bias, labels = drawn(0, 8, ignored=2)
    expected = plain(hidden, weight, labels, bias=bias)
    if how == "frozen":
        for each in (hidden, weight, bias):
            each.requires_grad_(requires_grad=False)
    guard = {"no_grad": torch.no_grad, "inference_mode": torch.inference_mode}.get(how, contextlib.nullcontext)
    with guard():
        loss = linear_cross_entropy(hidden, weight, labels, bias=bias, tile=tile)
    assert not loss.sum.requires_grad
    assert loss.sum.item() == pytest.approx(expected.item(), rel=EXACT)
    assert loss.count == 6


@pytest.mark.parametrize("tile", [None, 1, 3])
def test_walking_the_graph_twice(tile: int | None) -> None:
    """Is right, or refused: one tile's logits have become their gradient by then."""
    hidden, weight, bias, labels = drawn(0, 6 if tile is None else 8, ignored=2)
    tensors = {"hidden": hidden, "weight": weight, "bias": bias}
    want = gradients(plain(hidden, weight, labels, bias=bias), **tensors)
    loss = linear_cross_entropy(hidden, weight, labels, bias=bias, tile=tile).sum

    def once_more(times: float) -> Gradients:
        found = torch.autograd.grad(loss * times, list(tensors.values()), retain_graph=True)
        return dict(zip(tensors, found, strict=True))

    assert relative_error(once_more(1.0), want) <= EXACT
    if tile is None:
        with pytest.raises(RuntimeError, match="inplace"):
            once_more(2.0)
    else:
        assert relative_error({name: each / 2 for name, each in once_more(2.0).items()}, want) <= EXACT
        assert relative_error(once_more(2.0), want) > WRONG


@pytest.mark.parametrize("copied", [False, True])
def test_walking_the_graph_twice_with_hooks_on_what_is_saved(copied: bool) -> None:
    """Torch does not look whether what a hook gives back was overwritten."""
    hidden, weight, bias, labels = drawn(0, 6, ignored=2)
    tensors = {"hidden": hidden, "weight": weight, "bias": bias}
    want = gradients(plain(hidden, weight, labels, bias=bias), **tensors)

    def give(tensor: Tensor) -> Tensor:
        return tensor.clone() if copied else tensor

    with torch.autograd.graph.saved_tensors_hooks(lambda tensor: tensor, give):
        loss = linear_cross_entropy(hidden, weight, labels, bias=bias).sum
    again = functools.partial(torch.autograd.grad, loss, list(tensors.values()), retain_graph=True)
    assert relative_error(dict(zip(tensors, again(), strict=True)), want) <= EXACT
    if copied:
        assert relative_error(dict(zip(tensors, again(), strict=True)), want) <= EXACT
    else:
        with pytest.raises(RuntimeError, match="inplace"):
            again()


@pytest.mark.parametrize("tile", [None, 1, 3])
def test_a_second_derivative_is_refused(tile: int | None) -> None:
    hidden, weight, _, labels = drawn(0, 6)
    share = torch.ones((), dtype=torch.float64, requires_grad=True)
    loss = linear_cross_entropy(hidden, weight, labels, tile=tile).sum * share
    (gradient,) = torch.autograd.grad(loss, hidden, create_graph=True)
    penalty = gradient.square().sum()
    for tensor in (hidden, weight, share):  # the loss leads to these too, so that a part would be missing unseen
        with pytest.raises(RuntimeError, match="once_differentiable"):
            torch.autograd.grad(penalty + loss, tensor, retain_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        penalty.backward()


@pytest.mark.parametrize("tile", [None, 1, 3])
def test_what_was_given_is_left_alone(tile: int | None) -> None:
    hidden, weight, bias, labels = drawn(0, 6, ignored=1)
    kept = [each.detach().clone() for each in (hidden, weight, bias, labels)]
    linear_cross_entropy(hidden, weight, labels, bias=bias, tile=tile).sum.backward()
    assert all(torch.equal(a, b.detach()) for a, b in zip(kept, (hidden, weight, bias, labels), strict=True))


# -- memory --------------------------------------------------------------------------------------------------------

TOKENS, VOCABULARY, SMALL_WIDTH, TILE = 512, 4096, 16, 32


def run_head(head: Any, *, dtype: torch.dtype, autocast: torch.dtype | None) -> None:
    hidden = torch.randn(TOKENS, SMALL_WIDTH, dtype=dtype, requires_grad=True)
    weight = torch.randn(VOCABULARY, SMALL_WIDTH, dtype=dtype, requires_grad=True)
    labels = torch.randint(0, VOCABULARY, (TOKENS,))
    with cast_to(autocast):
        loss = head(hidden, weight, labels)
    loss.backward()


def metered(head: Any, **how: Any) -> int:
    with mb.MemoryMeter() as meter:
        run_head(head, **how)
    return meter.peak_bytes


def allocated(head: Any, **how: Any) -> int:
    """Count every allocation, also those inside of operators."""
    return allocated_peak(lambda: run_head(head, **how))


@pytest.mark.parametrize("count", [metered, allocated])
@pytest.mark.parametrize("precision", ["float32", "bfloat16", "autocast to bfloat16"])
@pytest.mark.parametrize("tile", [None, TILE])
def test_the_logits_are_never_whole(count: Any, precision: str, tile: int | None) -> None:
    dtype, autocast = NARROW[precision]
    logits = TOKENS * VOCABULARY * torch.finfo(autocast or dtype).bits // 8

    def tiled(hidden: Tensor, weight: Tensor, labels: Tensor) -> Tensor:
        return linear_cross_entropy(hidden, weight, labels, tile=tile).sum

    assert count(tiled, dtype=dtype, autocast=autocast) < logits
    assert count(plain, dtype=dtype, autocast=autocast) > 2 * logits


@pytest.mark.parametrize("count", [metered, allocated])
def test_evaluation_holds_one_tile(count: Any) -> None:
    def tiled(hidden: Tensor, weight: Tensor, labels: Tensor) -> Tensor:
        with torch.no_grad():
            linear_cross_entropy(hidden, weight, labels, tile=TILE)
        return hidden.sum()

    one = TILE * VOCABULARY * 4
    held = (TOKENS + VOCABULARY) * SMALL_WIDTH * 4
    assert count(tiled, dtype=torch.float32, autocast=None) < held * 2 + 4 * one


@pytest.mark.parametrize("count", [metered, allocated])
def test_one_tile_holds_the_logits_once(count: Any) -> None:
    logits = TOKENS * VOCABULARY * 4

    def whole(hidden: Tensor, weight: Tensor, labels: Tensor) -> Tensor:
        return linear_cross_entropy(hidden, weight, labels, tile=TOKENS).sum

    assert logits < count(whole, dtype=torch.float32, autocast=None) < 1.5 * logits


# -- refused -------------------------------------------------------------------------------------------------------


def test_what_does_not_fit_is_refused() -> None:
    hidden, weight, bias, labels = drawn(0, 6)
    cases: list[tuple[Any, ...]] = [
        (hidden, weight[:, :-1], labels),
        (hidden, weight[0], labels),
        (hidden, weight, labels[:-1]),
        (hidden, weight, labels.unsqueeze(1)),
        (hidden, weight, labels.int()),
        (hidden, weight, labels.double()),
        (hidden.long(), weight, labels),
    ]
    for case in cases:
        with pytest.raises(LossError, match="linear_cross_entropy"):
            linear_cross_entropy(*case)
    for tile in (0, -1):
        with pytest.raises(LossError, match="tile"):
            linear_cross_entropy(hidden, weight, labels, tile=tile)
    assert linear_cross_entropy(hidden, weight, labels, bias=bias).count == 6


@pytest.mark.parametrize("tile", [None, 1, 3])
@pytest.mark.parametrize("label", [WORDS, -1, -101])
def test_a_label_that_is_no_word_is_not_passed_over(tile: int | None, label: int) -> None:
    hidden, weight, _, labels = drawn(0, 6)
    labels[2] = label
    with pytest.raises((RuntimeError, IndexError)):
        linear_cross_entropy(hidden, weight, labels, tile=tile)
    with pytest.raises((RuntimeError, IndexError)):
        plain(hidden, weight, labels)


# -- the stand-in for F.cross_entropy in a window ------------------------------------------------------------------

ARGUMENTS: dict[str, dict[str, Any]] = {
    "sum": {"reduction": "sum"},
    "mean": {},
    "ignore": {"reduction": "sum", "ignore_index": 2},
    "weight": {"reduction": "sum", "weight": torch.arange(1, 1 + WORDS, dtype=torch.float64)},
    "smooth": {"reduction": "sum", "label_smoothing": 0.1},
    "none": {"reduction": "none"},
}


@through_each_door
@pytest.mark.parametrize("name", ARGUMENTS)
@pytest.mark.parametrize("layout", ["flat", "with columns", "probabilities"])
@fewer
@given(
    targets=st.lists(st.integers(1, 8), min_size=1, max_size=6),
    size=st.integers(1, 4),
    double=st.booleans(),
    seed=SEEDS,
)
@example(targets=[8, 1, 2, 5], size=1, double=True, seed=0)
def test_cross_entropy_in_a_window(
    door: Door, name: str, layout: str, targets: list[int], size: int, double: bool, seed: int
) -> None:
    arguments = ARGUMENTS[name]
    if layout == "probabilities" and name == "ignore":
        return

    def term(model: Any, batch: Batch) -> Tensor:
        logits, labels = F.linear(model(batch["tokens"]), model.head.weight), batch["labels"]
        if name == "ignore":  # which leaves -100 without a meaning
            labels = labels.where(labels >= 0, 1)
        if layout == "probabilities":
            # Not the model's own, whose gradient is 0.
            out = F.cross_entropy(
                logits.flatten(0, 1), logits.flatten(0, 1).detach().softmax(1).roll(1, 1), **arguments
            )
        elif layout == "flat":
            out = F.cross_entropy(logits.flatten(0, 1), labels.flatten(), **arguments)
        else:
            out = F.cross_entropy(logits.mT, labels, **arguments)
        total = out.sum()
        if double:
            (gradient,) = torch.autograd.grad(total, logits, create_graph=True)
            total = total + gradient.square().sum()
        return total

    def loss_fn(model: Any, batch: Batch) -> mb.Loss:
        parts = [
            term(model, {key: each[i : i + 1] for key, each in batch.items()}) for i in range(len(batch["labels"]))
        ]
        return mb.Loss(sum=torch.stack(parts).sum(), count=len(parts))

    def reference(model: nn.Module, batch: Batch) -> Tensor:
        loss = loss_fn(model, batch)
        return loss.sum / loss.count

    model, batch = filled(Writer(tied=True), seed, "cpu"), sentences(seed, targets)
    twin = copy.deepcopy(model)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("microbatch.gradients.fused_matmul.SMALLEST", 1)
        patch.setattr("microbatch.loss.tiled_cross_entropy._IN_CACHE", 1)
        it = subject(model, size=size, sums=mb.Sums(fuse=True))
        step = door(it, batch, loss_fn, size=size)
    want = full_batch(twin, reference, batch)
    assert relative_error(it.updates[0], want) <= EXACT
    assert step.loss.item() == pytest.approx(reference(twin, batch).item(), rel=EXACT)
    assert relative_error(full_batch(twin, lambda m, b: reference(m, b) * 1.00001, batch), want) > WRONG
