"""The models, optimizers and losses that people really have: each as exact as the plain ones."""

import copy
import json
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import example, given
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.optim import SGD, AdamW, Optimizer, SparseAdam
from torch.utils.checkpoint import checkpoint

import microbatch as mb

from .reference import (
    EXACT,
    WRONG,
    Batch,
    Door,
    Gradients,
    by_hand,
    few,
    filled,
    full_batch,
    gradients_of,
    limit,
    moved,
    norm,
    numbers,
    on_each_device,
    pieces_of,
    points,
    regressor,
    relative_error,
    sentences,
    squared,
    subject,
    tagger,
    through_each_door,
    token_loss,
    token_mean,
)

SEEDS = st.integers(0, 2**16)
TARGETS = st.lists(st.integers(0, 8), min_size=1, max_size=8).filter(any)
ROWS, SIZES = st.integers(1, 9), st.integers(1, 5)


def trained(model: nn.Module, optimizers: list[Optimizer], loss: Any, batches: list[Batch]) -> list[Tensor]:
    """Train on full batches by plain PyTorch and return the weights."""
    for batch in batches:
        for optimizer in optimizers:
            optimizer.zero_grad()
        loss(model, moved(batch, model, torch.float64)).backward()
        for optimizer in optimizers:
            optimizer.step()
    return [each.detach() for each in model.parameters()]


def furthest(left: Any, right: Any) -> float:
    """Return the largest difference between two lists of tensors."""
    return max((a - b).abs().max().item() for a, b in zip(left, right, strict=True))


# -- which parameters ----------------------------------------------------------------------------------------------


class Tied(nn.Module):
    """Use one weight to read tokens and to predict them."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(7, 4)
        self.middle = nn.Linear(4, 4)
        self.head = nn.Linear(4, 7, bias=False)
        self.head.weight = self.embedding.weight

    def forward(self, tokens: Tensor) -> Tensor:
        """Return logits of shape ``(rows, tokens, 7)``."""
        return self.head(self.middle(self.embedding(tokens)).tanh())


@through_each_door
@on_each_device
@few
@given(targets=TARGETS, size=SIZES, dtype=st.sampled_from([torch.float64, torch.bfloat16]), seed=SEEDS)
@example(targets=[8, 1, 2, 5], size=1, dtype=torch.float64, seed=0)
def test_tied_weights(door: Door, device: str, targets: list[int], size: int, dtype: torch.dtype, seed: int) -> None:
    model, batch = filled(Tied(), seed, device, dtype), sentences(seed, targets)
    reference = full_batch(model, token_mean, batch)
    it = subject(model, size=size)
    door(it, batch, token_loss, size=size)
    assert relative_error(it.updates[0], reference) <= limit(model, token_mean, batch, reference)


@on_each_device
def test_tied_weights_by_hand_are_divided_twice(device: str) -> None:
    model, batch = filled(Tied(), 0, device), sentences(0, [8, 1, 2, 5])
    twin = copy.deepcopy(model)
    for piece in pieces_of(batch, 1):
        token_loss(twin, moved(piece, twin, torch.float64)).sum.backward()
    for _, parameter in twin.named_parameters(remove_duplicate=False):
        assert parameter.grad is not None
        parameter.grad.div_(16)
    assert relative_error(gradients_of(twin), full_batch(model, token_mean, batch)) > WRONG


@through_each_door
@on_each_device
@few
@given(
    rows=ROWS,
    size=SIZES,
    frozen=st.sets(st.integers(0, 3), max_size=3),
    dtype=st.sampled_from([torch.float64, torch.bfloat16]),
    seed=SEEDS,
)
@example(rows=4, size=2, frozen={0, 3}, dtype=torch.bfloat16, seed=0)
def test_frozen_parameters(
    door: Door, device: str, rows: int, size: int, frozen: set[int], dtype: torch.dtype, seed: int
) -> None:
    model, batch = regressor(seed, device, dtype), points(seed, rows, dtype)
    optimizer = AdamW(model.parameters(), lr=0.1, weight_decay=0.5)
    it = subject(model, optimizer, size=size)
    for now in (frozen, set[int](), frozen):  # thawed and frozen again between windows
        for index, parameter in enumerate(model.parameters()):
            parameter.requires_grad_(index not in now)
        reference, before = full_batch(model, squared, batch), [each.detach().clone() for each in model.parameters()]
        allowed = limit(model, squared, batch, reference)
        door(it, batch, squared, size=size)
        assert relative_error(it.updates[-1], reference) <= allowed
        assert len(it.updates[-1]) == 4 - len(now)
        moved_ = [not torch.equal(old, new) for old, new in zip(before, model.parameters(), strict=True)]
        assert moved_ == [index not in now for index in range(4)]


@through_each_door
@on_each_device
@few
@given(rows=ROWS, size=SIZES, dtype=st.sampled_from([torch.float64, torch.bfloat16]), seed=SEEDS)
def test_parameters_without_a_gradient_are_not_decayed(
    door: Door, device: str, rows: int, size: int, dtype: torch.dtype, seed: int
) -> None:
    model, batch = regressor(seed, device, dtype), points(seed, rows, dtype)
    model.register_parameter("unused", nn.Parameter(torch.ones(3, dtype=dtype, device=device)))
    it = subject(model, AdamW(model.parameters(), lr=0.1, weight_decay=0.5), size=size)
    reference = full_batch(model, squared, batch)
    allowed = limit(model, squared, batch, reference)
    door(it, batch, squared, size=size)
    assert "unused" not in it.updates[0]
    assert relative_error(it.updates[0], reference) <= allowed
    unused = model.get_parameter("unused")
    assert unused.tolist() == [1, 1, 1]
    unused.grad = torch.zeros_like(unused)  # as a gradient of zero, it would have been
    it.optimizer.step()
    assert unused.tolist() != [1, 1, 1]


@pytest.mark.filterwarnings("ignore:no optimizer of this accumulator holds")
@through_each_door
@on_each_device
@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16], ids=str)
def test_a_parameter_that_no_optimizer_holds_keeps_no_gradient(door: Door, device: str, dtype: torch.dtype) -> None:
    model, batch = regressor(0, device, dtype), points(0, 4, dtype)
    reference = full_batch(model, squared, batch)
    allowed = limit(model, squared, batch, reference)
    it = subject(model, SGD(model.get_submodule("2").parameters(), lr=0.0), size=2, nonfinite="skip")
    for loss in (squared, lambda model, batch: squared(model, batch) * float("nan"), squared):
        door(it, batch, loss, size=2)
        assert gradients_of(model) == {}
    assert [relative_error(update, reference) <= allowed for update in it.updates] == [True, True]


@through_each_door
@on_each_device
@few
@given(rows=st.integers(2, 8), only=st.integers(0, 7), dtype=st.sampled_from([torch.float64, torch.bfloat16]))
@example(rows=4, only=0, dtype=torch.float64)
@example(rows=4, only=3, dtype=torch.bfloat16)
def test_a_parameter_used_in_one_microbatch_only(
    door: Door, device: str, rows: int, only: int, dtype: torch.dtype
) -> None:
    flags = torch.arange(rows) == only % rows

    def loss(model: nn.Module, batch: Batch) -> Tensor:
        bias = model.get_parameter("expert") if batch["flag"].any() else 0
        out = model(batch["x"]) + bias * batch["flag"].unsqueeze(1)
        return (out - batch["y"]).square().mean()

    model, batch = regressor(0, device, dtype), {**points(0, rows, dtype), "flag": flags}
    model.register_parameter("expert", nn.Parameter(torch.ones(2, dtype=dtype, device=device)))
    reference = full_batch(model, loss, batch)
    it = subject(model, size=1)
    door(it, batch, loss, size=1)
    assert relative_error(it.updates[0], reference) <= limit(model, loss, batch, reference)


# -- which optimizers ----------------------------------------------------------------------------------------------


def one_with_groups(model: Any) -> list[Optimizer]:
    return [
        SGD([{"params": model[0].parameters()}, {"params": model[2].parameters(), "lr": 0.3}], lr=0.1, momentum=0.9)
    ]


def two(model: Any) -> list[Optimizer]:
    return [SGD(model[0].parameters(), lr=0.1), AdamW(model[2].parameters(), lr=0.05)]


@through_each_door
@on_each_device
@pytest.mark.parametrize("make", [one_with_groups, two])
@pytest.mark.parametrize("most", [None, 0.05])
@few
@given(rows=ROWS, size=SIZES, seed=SEEDS)
def test_groups_and_several_optimizers_end_at_the_same_weights(
    door: Door, device: str, make: Callable[[Any], list[Optimizer]], most: float | None, rows: int, size: int, seed: int
) -> None:
    batches = [points(seed + step, rows) for step in range(3)]
    model = regressor(seed, device)
    twin = copy.deepcopy(model)
    plain = make(twin)

    def clip(*_: Any) -> None:  # over all optimizers' parameters together, before the first of them steps
        nn.utils.clip_grad_norm_(twin.parameters(), float("inf") if most is None else most)

    plain[0].register_step_pre_hook(clip)
    expected = trained(twin, plain, squared, batches)
    optimizers = make(model)
    it = subject(model, optimizers[0], size=size)
    accumulator = mb.Accumulator(model, optimizers, microbatch_size=size, max_grad_norm=most)
    it = type(it)(model, optimizers[0], accumulator, it.updates)
    start = [each.detach().clone() for each in model.parameters()]
    for batch in batches:
        door(it, batch, squared, size=size)
    assert furthest(model.parameters(), expected) <= 1e-10  # AdamW divides by roots of tiny numbers
    assert furthest(start, expected) > WRONG


class Scaled(nn.Module):
    """Hold a temperature outside of the model."""

    def __init__(self, device: str) -> None:
        super().__init__()
        self.temperature = nn.Parameter(torch.tensor(0.7, dtype=torch.float64, device=device))


@through_each_door
@on_each_device
@few
@given(targets=TARGETS, size=SIZES, most=st.sampled_from([None, 0.01]), seed=SEEDS)
@example(targets=[8, 1, 2, 5], size=1, most=None, seed=0)
def test_a_parameter_of_the_optimizer_alone_and_outer_tensors(
    door: Door, device: str, targets: list[int], size: int, most: float | None, seed: int
) -> None:
    outer = Scaled(device)
    weights = numbers(seed, 5).abs().to(device) + 0.1  # of the classes; the loss closes over both

    def total(model: nn.Module, batch: Batch) -> tuple[Tensor, Tensor]:
        logits, labels = model(batch["tokens"]).flatten(0, 1), batch["labels"].flatten()
        sum_ = F.cross_entropy(logits / outer.temperature, labels, weights, reduction="sum")
        return sum_, (weights[labels.clamp(min=0)] * (labels >= 0)).sum()

    def loss_fn(model: nn.Module, batch: Batch) -> mb.Loss:
        sum_, count = total(model, batch)
        return mb.Loss(sum=sum_, count=count)

    model, batch = tagger(seed, device), sentences(seed, targets)
    optimizer = SGD([*model.parameters(), *outer.parameters()], lr=0.0)
    it = subject(model, optimizer, size=size, max_grad_norm=most)
    seen: list[Tensor] = []

    def keep(*_: Any) -> None:
        seen.extend(each.grad for each in outer.parameters() if each.grad is not None)

    optimizer.register_step_pre_hook(keep)
    door(it, batch, loss_fn, size=size)
    twin = copy.deepcopy(model)
    sum_, count = total(twin, moved(batch, twin, torch.float64))
    (sum_ / count).backward()
    alone = outer.temperature.grad
    assert alone is not None
    reference = {**gradients_of(twin), "temperature": alone}
    factor = 1.0 if most is None else min(1.0, most / (norm(reference.values()) + 1e-6))
    assert len(seen) == 1
    got = {**it.updates[0], "temperature": seen[0]}
    assert relative_error(got, {name: each * factor for name, each in reference.items()}) <= EXACT


# -- which models --------------------------------------------------------------------------------------------------


class Checkpointed(nn.Module):
    """Compute the middle again on the way back, dropout included."""

    def __init__(self, *, reentrant: bool, dropout: float = 0.0) -> None:
        super().__init__()
        self.first, self.last = nn.Linear(3, 4), nn.Linear(4, 2)
        self.middle = nn.Sequential(nn.Linear(4, 4), nn.Tanh(), nn.Dropout(dropout), nn.Linear(4, 4))
        self.reentrant: bool | None = reentrant

    def forward(self, x: Tensor) -> Tensor:
        """Return outputs of shape ``(rows, 2)``."""
        hidden = self.first(x).tanh()
        if self.reentrant is None:
            hidden = self.middle(hidden)
        else:
            hidden = checkpoint(self.middle, hidden, use_reentrant=self.reentrant)
        return self.last(hidden)


@through_each_door
@on_each_device
@pytest.mark.parametrize("reentrant", [False, True])
@few
@given(rows=ROWS, size=SIZES, dtype=st.sampled_from([torch.float64, torch.bfloat16]), seed=SEEDS)
def test_checkpointing_inside_the_model(
    door: Door, device: str, reentrant: bool, rows: int, size: int, dtype: torch.dtype, seed: int
) -> None:
    model, batch = filled(Checkpointed(reentrant=reentrant), seed, device, dtype), points(seed, rows, dtype)
    reference = full_batch(model, squared, batch)
    it = subject(model, size=size)
    door(it, batch, squared, size=size)
    assert relative_error(it.updates[0], reference) <= limit(model, squared, batch, reference)


@on_each_device
@pytest.mark.parametrize("reentrant", [False, True])
@pytest.mark.parametrize("autocast", [None, torch.bfloat16])
@few
@given(rows=ROWS, size=SIZES, seed=SEEDS)
def test_checkpointing_replays_dropout_and_autocast(
    device: str, reentrant: bool, autocast: torch.dtype | None, rows: int, size: int, seed: int
) -> None:
    model = filled(Checkpointed(reentrant=reentrant, dropout=0.5), seed, device, torch.float32)
    without = copy.deepcopy(model)
    without.reentrant = None  # type: ignore[assignment]
    batch = points(seed, rows, torch.float32)
    runs = [subject(each, size=size, autocast=autocast) for each in (model, without)]
    for it in runs:
        torch.manual_seed(seed)
        it.accumulator.step(batch, squared)
    assert relative_error(runs[0].updates[0], runs[1].updates[0]) <= torch.finfo(torch.float32).eps


@pytest.fixture
def compiler() -> Iterator[None]:
    """Leave no compiled code to the next test."""
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


@through_each_door
@on_each_device
@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16], ids=str)
def test_a_compiled_model(door: Door, device: str, dtype: torch.dtype, compiler: None) -> None:
    model, batch = tagger(0, device, dtype), sentences(0, [8, 1, 0, 2, 5])
    reference = full_batch(model, token_mean, batch)
    allowed = limit(model, token_mean, batch, reference)
    compiled: Any = torch.compile(model, backend="aot_eager")
    it = subject(compiled, SGD(compiled.parameters(), lr=0.0), size=2)  # the last microbatch has another shape
    for _ in range(2):
        door(it, batch, token_loss, size=2)
    for update in it.updates:
        plain = {name.removeprefix("_orig_mod."): each for name, each in update.items()}
        assert relative_error(plain, reference) <= allowed


# -- sparse gradients ----------------------------------------------------------------------------------------------


class Looked(nn.Module):
    """Look rows up, some of them several times, with a sparse gradient."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(7, 4, sparse=True)

    def forward(self, tokens: Tensor) -> Tensor:
        """Return ``(rows, tokens, 4)``."""
        return self.embedding(tokens).tanh()


def looked_up(model: nn.Module, batch: Batch) -> Tensor:
    return model(batch["tokens"]).square().mean()


def densely(model: nn.Module, batch: Batch, **more: Any) -> Gradients:
    dense = copy.deepcopy(model)
    dense.embedding.sparse = False  # type: ignore[union-attr, assignment]
    return full_batch(dense, looked_up, batch, **more)


@through_each_door
@on_each_device
@few
@given(rows=ROWS, size=SIZES, most=st.sampled_from([None, 0.01]), seed=SEEDS)
@example(rows=6, size=2, most=0.01, seed=0)
def test_sparse_gradients(door: Door, device: str, rows: int, size: int, most: float | None, seed: int) -> None:
    check_sparse(door, device, rows=rows, size=size, most=most, dtype=torch.float64, seed=seed)


@through_each_door
@on_each_device
@pytest.mark.parametrize("most", [None, 0.01])
def test_sparse_gradients_of_bfloat16(door: Door, device: str, most: float | None) -> None:
    check_sparse(door, device, rows=6, size=2, most=most, dtype=torch.bfloat16, seed=0)


def check_sparse(
    door: Door, device: str, *, rows: int, size: int, most: float | None, dtype: torch.dtype, seed: int
) -> None:
    model, batch = filled(Looked(), seed, device, dtype), {"tokens": sentences(seed, [0] * rows)["tokens"]}
    reference = densely(model, batch)
    own = relative_error(densely(model, batch, dtype=dtype), reference)
    allowed = max(EXACT, own + torch.finfo(dtype).eps)
    it = subject(model, SparseAdam(model.parameters(), lr=0.1), size=size, max_grad_norm=most)
    before = model.get_parameter("embedding.weight").detach().clone()
    step = door(it, batch, looked_up, size=size)
    size_ = norm(reference.values())
    factor = 1.0 if most is None else min(1.0, most / (size_ + 1e-6))
    assert it.updates[0]["embedding.weight"].is_sparse
    assert relative_error(it.updates[0], {name: each * factor for name, each in reference.items()}) <= allowed
    assert step.grad_norm.item() == pytest.approx(size_, rel=max(EXACT, allowed))
    used = torch.zeros(7, dtype=torch.bool).scatter_(0, batch["tokens"].flatten(), value=True).to(device)
    changed = (model.get_parameter("embedding.weight") != before).any(1)
    assert not (changed & ~used).any()


@on_each_device
def test_sparse_gradients_by_hand_have_another_norm(device: str) -> None:
    model, batch = filled(Looked(), 0, device), {"tokens": sentences(0, [0] * 6)["tokens"]}
    twin = copy.deepcopy(model)
    looked_up(twin, moved(batch, twin, torch.float64)).backward()
    parts = twin.get_parameter("embedding.weight").grad
    assert parts is not None
    size = norm(densely(model, batch).values())
    assert norm([parts._values()]) != pytest.approx(size, rel=0.01)  # the same row counted in parts


# -- precision of the user's choice --------------------------------------------------------------------------------


def hand_written(model: nn.Module, batch: Batch, size: int, autocast: torch.dtype, scaler: Any = None) -> Gradients:
    """Run the autocast loop from PyTorch's documentation, with the weights of a mean over rows."""
    twin, rows = copy.deepcopy(model), len(batch["x"])
    device = next(twin.parameters()).device
    for piece in pieces_of(moved(batch, twin, torch.float32), size):
        with torch.autocast(device.type, autocast):
            loss = squared(twin, piece) * (len(piece["x"]) / rows)
        (loss if scaler is None else scaler.scale(loss)).backward()
    gradients = gradients_of(twin)
    scale = 1.0 if scaler is None else scaler.get_scale()
    return {name: each / scale for name, each in gradients.items()}


@through_each_door
@on_each_device
@few
@given(rows=ROWS, size=SIZES, seed=SEEDS)
def test_autocast_is_the_hand_written_autocast_loop(door: Door, device: str, rows: int, size: int, seed: int) -> None:
    model, batch = regressor(seed, device, torch.float32), points(seed, rows, torch.float32)
    it = subject(model, size=size, autocast=torch.bfloat16)
    ran_in: set[torch.dtype] = set()
    it.model.register_forward_hook(lambda _, __, out: ran_in.add(out.dtype))
    door(it, batch, squared, size=size)
    assert ran_in == {torch.bfloat16}
    expected = hand_written(model, batch, size, torch.bfloat16)
    if door.__name__ == "by_count":  # the rows are not known beforehand: divided once, at the end, so rounded elsewhere
        truth = full_batch(model, squared, batch)
        assert relative_error(it.updates[0], truth) <= relative_error(expected, truth) + torch.finfo(torch.bfloat16).eps
    else:
        assert relative_error(it.updates[0], expected) == 0
    assert relative_error(hand_written(model, batch, size, torch.float16), expected) > WRONG


@through_each_door
@on_each_device
@pytest.mark.parametrize("autocast", [None, torch.float16], ids=str)
@few
@given(targets=TARGETS, size=SIZES, most=st.sampled_from([None, 0.05]), seed=SEEDS)
def test_a_gradient_scaler_leaves_no_trace(
    door: Door, device: str, autocast: torch.dtype | None, targets: list[int], size: int, most: float | None, seed: int
) -> None:
    model, batch = tagger(seed, device, torch.float32), sentences(seed, targets)
    scaler = torch.amp.GradScaler(device, init_scale=2.0**9)
    settings: dict[str, Any] = {"size": size, "autocast": autocast, "max_grad_norm": most}
    with_, without = subject(model, grad_scaler=scaler, **settings), subject(model, **settings)
    step, plain = door(with_, batch, token_loss, size=size), door(without, batch, token_loss, size=size)
    # A scale keeps float16's small numbers; where everything is float32, a power of two changes nothing but roundings.
    off = torch.finfo(autocast or torch.float32).eps * 2
    assert step.applied
    assert relative_error(with_.updates[0], without.updates[0]) <= off
    assert step.loss.item() == plain.loss.item()
    assert step.grad_norm.item() == pytest.approx(plain.grad_norm.item(), rel=off)
    still_scaled = {name: each * scaler.get_scale() for name, each in with_.updates[0].items()}
    assert relative_error(still_scaled, without.updates[0]) > WRONG


@on_each_device
@few
@given(rows=ROWS, size=SIZES, seed=SEEDS)
def test_a_gradient_scaler_is_the_hand_written_loop(device: str, rows: int, size: int, seed: int) -> None:
    model, batch = regressor(seed, device, torch.float32), points(seed, rows, torch.float32)
    ours, theirs = (torch.amp.GradScaler(device, init_scale=2.0**9) for _ in range(2))
    it = subject(model, size=size, autocast=torch.float16, grad_scaler=ours)
    it.accumulator.step(batch, squared)
    expected = hand_written(model, batch, size, torch.float16, theirs)
    assert relative_error(it.updates[0], expected) <= torch.finfo(torch.float32).eps


# -- continuing ----------------------------------------------------------------------------------------------------


@through_each_door
@on_each_device
@few
@given(before=st.integers(0, 3), after=st.integers(1, 3), size=SIZES, seed=SEEDS)
def test_a_resumed_accumulator_continues_bit_for_bit(
    door: Door, device: str, before: int, after: int, size: int, seed: int
) -> None:
    batches = [
        sentences(seed + step, [(seed + step + row) % 8 + 1 for row in range(5)]) for step in range(before + after)
    ]

    def start() -> tuple[nn.Module, Optimizer]:
        model = tagger(seed, device, torch.float32)
        return model, SGD(model.parameters(), lr=0.3, momentum=0.9)

    whole = subject(*start(), size=size)
    steps = [door(whole, batch, token_loss, size=size) for batch in batches]
    first = subject(*start(), size=size)
    for batch in batches[:before]:
        door(first, batch, token_loss, size=size)
    saved = json.loads(json.dumps(first.accumulator.state_dict()))
    second = subject(*start(), size=size)
    second.model.load_state_dict(first.model.state_dict())
    second.optimizer.load_state_dict(first.optimizer.state_dict())
    second.accumulator.load_state_dict(saved)
    resumed = [door(second, batch, token_loss, size=size) for batch in batches[before:]]
    assert [step.index for step in resumed] == [step.index for step in steps[before:]]
    assert [step.loss.item() for step in resumed] == [step.loss.item() for step in steps[before:]]
    assert all(map(torch.equal, second.model.parameters(), whole.model.parameters()))
    assert second.accumulator.state_dict() == whole.accumulator.state_dict()


def test_a_forgotten_state_is_seen() -> None:
    it, other = (subject(regressor(0, "cpu"), size=2, nonfinite="skip") for _ in range(2))
    it.accumulator.step(points(0, 4), lambda model, batch: squared(model, batch) * float("nan"))
    it.accumulator.step(points(0, 4), squared)
    state = it.accumulator.state_dict()
    assert (state["windows"], state["skipped"], state["count"]) == (2, 1, 4)
    assert other.accumulator.state_dict() != it.accumulator.state_dict()
    other.accumulator.load_state_dict(it.accumulator.state_dict())
    assert other.accumulator.state_dict() == it.accumulator.state_dict()
    assert (other.accumulator.skipped, other.accumulator.step(points(0, 4), squared).index) == (1, 2)
    assert by_hand(it.model, squared, pieces_of(points(0, 4), 2), divide_by=2).keys() == it.updates[0].keys()
