"""Laws C1 and C2: a loss that couples samples has the whole batch's gradient, however the batch is cut."""

import copy
import random
import warnings
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import example, given
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

import microbatch as mb
from microbatch.errors import (
    ConfigError,
    EmptyWindowError,
    LossError,
    NoGraphError,
    NonfiniteError,
    OutOfMemoryError,
    WindowError,
)
from microbatch.step.cutting import Cutting
from microbatch.step.part import Pass
from microbatch.step.size.stopwatch import Stopwatch

from .reference import (
    EXACT,
    NARROW,
    WRONG,
    Batch,
    Gradients,
    Subject,
    few,
    filled,
    full_batch,
    gradients_of,
    moved,
    numbers,
    on_each_device,
    pieces_of,
    relative_error,
    subject,
)

WAYS = ("twice", "keep", "spill")
in_each_way = pytest.mark.parametrize("way", WAYS)

# -- encoders ---------------------------------------------------------------------------------------------------------


class Towers(nn.Module):
    """Encode what stands on either side, and hold what the losses learn of their own."""

    def __init__(self, *, shared: bool = False, dropout: float = 0.0, norm: bool = False) -> None:
        super().__init__()
        self.left = nn.Sequential(
            nn.Linear(3, 6), nn.BatchNorm1d(6) if norm else nn.Tanh(), nn.Dropout(dropout), nn.Linear(6, 4)
        )
        self.right = self.left if shared else nn.Sequential(nn.Linear(3, 5), nn.Tanh(), nn.Linear(5, 4))
        self.scale = nn.Parameter(torch.zeros(()))
        self.bias = nn.Parameter(torch.zeros(()))
        self.head = nn.Linear(4, 4)


def towers(seed: int = 0, device: str = "cpu", dtype: torch.dtype = torch.float64, **form: Any) -> nn.Module:
    return filled(Towers(**form), seed, device, dtype)


def pairs(rows: int, *, seed: int = 0) -> Batch:
    left, noise = numbers(seed + 10, rows, 3), numbers(seed + 20, rows, 3)
    return {"left": left, "right": left + noise / 4, "label": torch.arange(rows) % 3}


def encode(model: Any, batch: Batch) -> dict[str, Any]:
    """Return both sides' representations, nested, and labels, which have no gradient."""
    sides = (model.left(batch["left"]), model.right(batch["right"]))
    return {"sides": sides, "label": batch["label"]}


# -- losses, each by plain PyTorch ------------------------------------------------------------------------------------


def info_nce(model: Any, z: Any) -> Tensor:
    x, y = (F.normalize(side, dim=1) for side in z["sides"])
    return F.cross_entropy(model.scale.exp() * x @ y.T, torch.arange(len(x), device=x.device))


def clip(model: Any, z: Any) -> Tensor:
    x, y = (F.normalize(side, dim=1) for side in z["sides"])
    logits, diagonal = model.scale.exp() * x @ y.T + model.bias, torch.arange(len(x), device=x.device)
    return (F.cross_entropy(logits, diagonal) + F.cross_entropy(logits.T, diagonal)) / 2


def siglip(model: Any, z: Any) -> Tensor:
    x, y = z["sides"]
    signs = 2 * torch.eye(len(x), dtype=x.dtype, device=x.device) - 1
    return -F.logsigmoid(signs * (model.scale.exp() * x @ y.T + model.bias)).sum() / len(x)


def triplet(model: Any, z: Any) -> Tensor:
    """Mine the hardest positive and negative of each row in the whole batch (Hermans, Beyer, Leibe 2017)."""
    x, same = z["sides"][0], z["label"][:, None] == z["label"]
    apart = (x[:, None] - x).square().sum(2)
    hardest_positive = apart.masked_fill(~same, -1).amax(1)
    hardest_negative = apart.masked_fill(same, torch.inf).amin(1)
    return F.softplus(hardest_positive - hardest_negative.clamp(max=1e6)).mean()


def vicreg(model: Any, z: Any) -> Tensor:
    x, y = (model.head(side) for side in z["sides"])
    loss = (x - y).square().mean()
    for side in (x, y):
        centred = side - side.mean(0)
        spread = (centred.square().sum(0) / max(1, len(side) - 1) + 1e-4).sqrt()
        covariance = centred.T @ centred / max(1, len(side) - 1)
        loss = loss + (1 - spread).relu().mean() + covariance.fill_diagonal_(0).square().sum() / side.shape[1]
    return loss


def barlow(model: Any, z: Any) -> Tensor:
    x, y = ((side - side.mean(0)) / (side.var(0, unbiased=False) + 1e-5).sqrt() for side in z["sides"])
    cross = x.T @ y / len(x)
    return (cross - torch.eye(len(cross), dtype=x.dtype, device=x.device)).square().sum()


def correlation(model: Any, z: Any) -> Tensor:
    x, y = (side[:, 0] - side[:, 0].mean() for side in z["sides"])
    return 1 - (x * y).sum() / (x.square().sum() * y.square().sum() + 1e-6).sqrt()


def auc(model: Any, z: Any) -> Tensor:
    """Rank every positive above every negative: a mean over pairs, not over rows."""
    scores, positive = model.head(z["sides"][0])[:, 0], z["label"] == 0
    return F.softplus(scores[~positive] - scores[positive, None]).sum() / (positive.sum() * (~positive).sum() + 1)


LOSSES: dict[str, Callable[[Any, Any], Tensor]] = {
    each.__name__: each for each in (info_nce, clip, siglip, triplet, vicreg, barlow, correlation, auc)
}


def whole(loss: Callable[[Any, Any], Tensor]) -> Callable[[nn.Module, Batch], Tensor]:
    return lambda model, batch: loss(model, encode(model, batch))


def reference(model: nn.Module, loss: Callable[[Any, Any], Tensor], batch: Batch) -> Gradients:
    return full_batch(model, whole(loss), batch)


def in_pieces(model: nn.Module, loss: Callable[[Any, Any], Any], batch: Batch, size: int) -> nn.Module:
    """Run plain PyTorch on the whole batch, encoded piece by piece in one graph, so that each draws its own masks."""
    twin = copy.deepcopy(model)
    twin.zero_grad()
    parts = [encode(twin, piece) for piece in pieces_of(batch, size)]
    sides = tuple(torch.cat([part["sides"][side] for part in parts]) for side in range(2))
    loss(twin, {"sides": sides, "label": batch["label"]}).backward()
    return twin


def coupled(model: nn.Module, size: Any, way: str = "twice", **settings: Any) -> Subject:
    return subject(model, size=size, coupled=way, **settings)


# -- the law ----------------------------------------------------------------------------------------------------------


@given(
    way=st.sampled_from(WAYS),
    rows=st.integers(1, 13),
    size=st.integers(1, 14),
    loss=st.sampled_from(sorted(LOSSES)),
    shared=st.booleans(),
    seed=st.integers(0, 99),
)
@example(way="twice", rows=8, size=2, loss="clip", shared=False, seed=0)
def test_any_cut_has_the_whole_batchs_gradient(
    way: str, rows: int, size: int, loss: str, shared: bool, seed: int
) -> None:
    model, batch = towers(seed, shared=shared), pairs(rows, seed=seed)
    it, theirs = coupled(model, size, way), reference(model, LOSSES[loss], batch)
    step = it.accumulator.step(batch, LOSSES[loss], encode=encode)
    if rows < 4:  # where several of them are all but constant, and their gradients next to nothing but rounding
        assert max((it.updates[0][name] - each).abs().max().item() for name, each in theirs.items()) <= EXACT
    else:
        assert relative_error(it.updates[0], theirs) <= EXACT
    expected = whole(LOSSES[loss])(model, batch).item()
    assert step.loss.item() == pytest.approx(expected, rel=EXACT, abs=EXACT)
    assert (step.count, step.samples, step.microbatches) == (rows, rows, -(-rows // size))


@pytest.mark.parametrize("loss", sorted(LOSSES))
def test_negatives_from_the_microbatch_alone_are_refused_by_the_same_comparison(loss: str) -> None:
    model, batch = towers(), pairs(8)
    theirs = reference(model, LOSSES[loss], batch)
    twin = copy.deepcopy(model)
    for piece in pieces_of(batch, 2):
        (whole(LOSSES[loss])(twin, piece) / 4).backward()
    assert relative_error(gradients_of(twin), theirs) > WRONG


def test_the_temperature_has_its_gradient_once_and_not_once_a_microbatch() -> None:
    model, batch = towers(), pairs(8)
    it, theirs = coupled(model, 2), reference(model, clip, batch)
    it.accumulator.step(batch, clip, encode=encode)
    assert torch.allclose(it.updates[0]["scale"], theirs["scale"], rtol=EXACT)
    # Everyone's first cached-gradient loop: the loss again for every microbatch, the others' rows detached.
    twin = copy.deepcopy(model)
    with torch.no_grad():
        cached = encode(twin, batch)
    for start in range(0, 8, 2):
        part = encode(twin, {name: each[start : start + 2] for name, each in batch.items()})
        sides = tuple(
            torch.cat([old[:start], new, old[start + 2 :]])
            for old, new in zip(cached["sides"], part["sides"], strict=True)
        )
        clip(twin, {"sides": sides}).backward()
    usual = gradients_of(twin)
    assert (usual["scale"] / theirs["scale"]).item() == pytest.approx(4)
    assert relative_error({"left": usual["left.0.weight"]}, {"left": theirs["left.0.weight"]}) <= EXACT
    assert relative_error(usual, theirs) > WRONG


def test_a_hand_written_loop() -> None:
    model, batch = towers(), pairs(7)
    it = coupled(model, 2)
    with it.accumulator.window() as window:
        z = window.encode(batch, encode)
        assert z["sides"][0].shape == (7, 4)
        assert torch.equal(z["label"], batch["label"])
        window.backward(clip(it.model, z))
    assert relative_error(it.updates[0], reference(model, clip, batch)) <= EXACT
    assert (window.step.microbatches, window.step.samples) == (4, 7)


# -- random state and buffers -----------------------------------------------------------------------------------------


@in_each_way
@few
@given(rows=st.integers(2, 9), size=st.integers(1, 9))
@example(rows=8, size=2)
def test_dropout_has_the_same_masks_both_times(way: str, rows: int, size: int) -> None:
    model, batch = towers(dropout=0.5), pairs(rows)
    it = coupled(model, size, way)
    torch.manual_seed(3)
    theirs = gradients_of(in_pieces(model, siglip, batch, size))
    after = torch.rand(3)
    torch.manual_seed(3)
    it.accumulator.step(batch, siglip, encode=encode)
    assert relative_error(it.updates[0], theirs) <= EXACT
    assert torch.equal(torch.rand(3), after)  # as if everything had been encoded once


def test_masks_drawn_anew_are_refused_by_the_same_comparison() -> None:
    model, batch = towers(dropout=0.5), pairs(8)
    torch.manual_seed(3)
    theirs = gradients_of(in_pieces(model, siglip, batch, 2))
    twin = copy.deepcopy(model)
    torch.manual_seed(3)
    with torch.no_grad():
        parts = [encode(twin, piece)["sides"] for piece in pieces_of(batch, 2)]
    sides = tuple(torch.cat(each).requires_grad_() for each in zip(*parts, strict=True))
    siglip(twin, {"sides": sides}).backward()
    whole = [side.grad for side in sides if side.grad is not None]
    for index, piece in enumerate(pieces_of(batch, 2)):
        rows = slice(2 * index, 2 * index + 2)
        torch.autograd.backward(encode(twin, piece)["sides"], [grad[rows] for grad in whole])
    assert relative_error(gradients_of(twin), theirs) > WRONG


@in_each_way
def test_every_generator_is_replayed_and_what_the_loss_draws_comes_after(way: str) -> None:
    class Noisy(Towers):
        def forward(self, x: Tensor) -> Tensor:
            noise = random.random() + np.random.rand() + torch.rand(())  # noqa: NPY002, S311 - the global ones
            return self.left(x) * noise

    model, batch = filled(Noisy(), 0, "cpu"), pairs(6)
    drawn: list[float] = []

    def noisy(model: Any, piece: Batch) -> Any:
        return {"sides": (model(piece["left"]), model.right(piece["right"])), "label": piece["label"]}

    def loss(model: Any, z: Any) -> Tensor:
        drawn.append(torch.rand(()).item())
        return siglip(model, z) * drawn[-1]

    def seeded() -> None:
        torch.manual_seed(1)
        random.seed(1)
        np.random.seed(1)  # noqa: NPY002

    seeded()
    twin = copy.deepcopy(model)
    parts = [noisy(twin, piece)["sides"] for piece in pieces_of(batch, 2)]
    loss(twin, {"sides": tuple(torch.cat(each) for each in zip(*parts, strict=True))}).backward()
    after = (torch.rand(()), random.random(), np.random.rand())  # noqa: NPY002, S311
    it = coupled(model, 2, way)
    seeded()
    it.accumulator.step(batch, loss, encode=noisy)
    assert relative_error(it.updates[0], gradients_of(twin)) <= EXACT
    assert (torch.rand(()), random.random(), np.random.rand()) == after  # noqa: NPY002, S311


@in_each_way
def test_statistics_of_a_microbatch_are_the_same_both_times_and_move_once(way: str) -> None:
    model, batch = towers(norm=True), pairs(8)
    it = coupled(model, 4, way)
    twin = in_pieces(model, clip, batch, 4)
    it.accumulator.step(batch, clip, encode=encode)
    assert relative_error(it.updates[0], gradients_of(twin)) <= EXACT
    assert it.model.get_buffer("left.1.num_batches_tracked") == 2
    for ours, theirs in zip(it.model.buffers(), twin.buffers(), strict=True):
        assert torch.equal(ours, theirs)


@pytest.mark.filterwarnings("ignore:buffers move")
@in_each_way
def test_buffers_that_the_encoder_reads_and_the_loss_moves(way: str) -> None:
    class Counting(Towers):
        def __init__(self) -> None:
            super().__init__()
            self.register_buffer("seen", torch.ones(()))

    def counted(model: Any, piece: Batch) -> Any:
        model.seen = model.seen + 1
        return {"sides": (model.left(piece["left"]) * model.seen, model.right(piece["right"]))}

    def loss(model: Any, z: Any) -> Tensor:
        model.seen = model.seen * 10  # another tensor in its place
        return siglip(model, z)

    model, batch = filled(Counting(), 0, "cpu"), pairs(6)
    twin = copy.deepcopy(model)
    parts = [counted(twin, piece)["sides"] for piece in pieces_of(batch, 2)]
    loss(twin, {"sides": tuple(torch.cat(each) for each in zip(*parts, strict=True))}).backward()
    it = coupled(model, 2, way)
    it.accumulator.step(batch, loss, encode=counted)
    assert relative_error(it.updates[0], gradients_of(twin)) <= EXACT
    assert it.model.get_buffer("seen").item() == 40  # 1, three microbatches, times 10


@in_each_way
def test_a_buffer_that_is_written_to_in_place_while_a_graph_needs_it(way: str) -> None:
    """Kept graphs cannot have that, as autograd says, so they are given up: what worked goes on working."""
    model, batch = filled(Towers(norm=True), 0, "cpu"), pairs(6)

    def counted(model: Any, piece: Batch) -> Any:
        seen = model.left[1].running_mean
        seen.add_(1)
        return {"sides": (model.left(piece["left"]), model.right(piece["right"]) * seen[:4].exp())}

    it = coupled(model, 2, way)
    step = it.accumulator.step(batch, siglip, encode=counted)
    assert step.retries == (0 if way == "twice" else 1)
    twice = coupled(model, 2, "twice")
    for update in it.updates:
        twice.accumulator.step(batch, siglip, encode=counted)
        assert relative_error(update, twice.updates[-1]) == 0


# -- with everything else ---------------------------------------------------------------------------------------------


@on_each_device
@pytest.mark.parametrize("precision", sorted(NARROW))
@in_each_way
def test_in_low_precision_it_is_no_worse_than_the_whole_batch(device: str, precision: str, way: str) -> None:
    dtype, autocast = NARROW[precision]
    model, batch = towers(2, device), pairs(8)
    exact = reference(model, clip, batch)
    narrow = towers(2, device, dtype)
    theirs = copy.deepcopy(narrow)
    with torch.autocast(device, autocast, enabled=autocast is not None):
        loss = whole(clip)(theirs, moved(batch, narrow, dtype))
    loss.backward()
    own = relative_error(gradients_of(theirs), exact)
    it = coupled(narrow, 2, way, autocast=autocast)
    share = {name: each.to(dtype) if each.is_floating_point() else each for name, each in batch.items()}
    it.accumulator.step(share, clip, encode=encode)
    # Of a microbatch's gradient, which is rounded to the parameters' precision before it is added.
    unit = torch.finfo(autocast or dtype).eps
    assert relative_error(it.updates[0], exact) <= own + 2 * unit


@in_each_way
def test_a_scaler_and_float16(way: str) -> None:
    model, batch = towers(1, dtype=torch.float32), pairs(8)
    batch |= {side: batch[side].float() for side in ("left", "right")}
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**10)
    it = coupled(model, 2, way, autocast=torch.float16, grad_scaler=scaler, max_grad_norm=1e-3)
    step = it.accumulator.step(batch, clip, encode=encode)
    assert step.applied
    theirs = reference(model.double(), clip, pairs(8))
    norm = torch.cat([each.flatten() for each in theirs.values()]).norm()
    assert step.grad_norm.item() == pytest.approx(norm.item(), rel=1e-2)
    assert relative_error(it.updates[0], {name: each * (1e-3 / norm) for name, each in theirs.items()}) <= 1e-2
    scaler.update(2.0**40)
    weights = copy.deepcopy(it.model.state_dict())
    assert not it.accumulator.step(batch, clip, encode=encode).applied  # infinities: the scale backs off
    assert scaler.get_scale() < 2.0**40
    assert all(torch.equal(each, weights[name]) for name, each in it.model.state_dict().items())


@in_each_way
def test_weights_are_fused_in_the_second_pass(way: str) -> None:
    model = filled(nn.Sequential(nn.Linear(512, 512), nn.Tanh(), nn.Linear(512, 512)), 0, "cpu")
    with torch.no_grad():
        for each in model.parameters():
            each.mul_(0.05)
    batch = {"left": numbers(1, 6, 512)}

    def one(model: nn.Module, piece: Batch) -> Tensor:
        return model(piece["left"])

    def loss(model: nn.Module, z: Tensor) -> Tensor:
        return (z @ z.T).logsumexp(1).mean()

    it = coupled(model, 2, way)
    step = it.accumulator.step(batch, loss, encode=one)
    assert step.fused == 2
    assert relative_error(it.updates[0], full_batch(model, lambda m, b: loss(m, one(m, b)), batch)) <= EXACT


@in_each_way
def test_ragged_rows_come_back_in_their_own_order(way: str) -> None:
    sizes = torch.tensor([2, 5, 1, 4, 3, 5, 1])
    mask = torch.arange(5) < sizes[:, None]
    batch = {"x": numbers(0, 7, 5, 3) * mask[..., None], "mask": mask, "y": numbers(1, 7, 4)}
    model = towers()

    def pooled(model: Any, piece: Batch) -> Any:
        total = (model.left(piece["x"]) * piece["mask"][..., None]).sum(1)
        return total / piece["mask"].sum(1, keepdim=True), piece["y"]

    def loss(model: Any, z: Any) -> Tensor:
        return info_nce(model, {"sides": z})

    seen: list[Tensor] = []

    def watched(model: Any, z: Any) -> Tensor:
        seen.append(z[1])
        return loss(model, z)

    it = coupled(model, 2, way, lengths="mask")
    it.accumulator.step(batch, watched, encode=pooled)
    assert torch.equal(seen[0], batch["y"])
    theirs = full_batch(model, lambda m, b: loss(m, pooled(m, b)), batch)
    assert relative_error(it.updates[0], theirs) <= EXACT


def test_terms_need_no_counts_because_the_loss_sees_the_whole_batch() -> None:
    model, batch = towers(), pairs(7)

    def terms(model: Any, z: Any) -> dict[str, Any]:
        far = z["label"] > 0
        spread = mb.Loss(sum=z["sides"][0][far].square().sum(), count=far.sum())
        return {"clip": clip(model, z), "spread": spread, "none": mb.Loss(sum=model.bias * torch.nan, count=0)}

    def plain(model: Any, z: Any) -> Tensor:
        far = z["label"] > 0
        return clip(model, z) + z["sides"][0][far].square().sum() / far.sum()

    it = coupled(model, 3)
    step = it.accumulator.step(batch, terms, encode=encode)
    assert relative_error(it.updates[0], reference(model, plain, batch)) <= EXACT
    assert step.counts == {"clip": 7, "spread": 4}
    assert step.terms["clip"].item() == pytest.approx(whole(clip)(model, batch).item(), rel=EXACT)
    with pytest.raises(ConfigError, match="counts= does not go with encode="):
        it.accumulator.step(batch, terms, encode=encode, counts={"clip": 7})


def test_a_summed_loss_of_some_rows() -> None:
    model, batch = towers(), pairs(7)

    def summed(model: Any, z: Any) -> mb.Loss:
        return mb.Loss(sum=3 * clip(model, z), count=3)

    it = coupled(model, 3)
    step = it.accumulator.step(batch, summed, encode=encode)
    assert relative_error(it.updates[0], reference(model, clip, batch)) <= EXACT
    assert (step.count, step.samples) == (3, 7)


@in_each_way
def test_events_are_those_of_its_microbatches(way: str) -> None:
    events: list[Any] = []
    it = coupled(towers(), 3, way, listeners=[events.append])
    it.accumulator.step(pairs(7), clip, encode=encode)
    done = [(event.index, event.microbatches, event.rows) for event in events if isinstance(event, mb.MicrobatchDone)]
    assert done == [(0, 3, 3), (1, 3, 3), (2, 3, 1)]
    assert [type(event).__name__ for event in events].count("StepDone") == 1


def test_encoding_twice_keeps_no_graph_but_one() -> None:
    batch = {"left": numbers(0, 64, 3)}
    peaks: dict[tuple[str, int], int] = {}
    for way, size in [("twice", 64), ("twice", 4), ("keep", 4)]:
        model = filled(nn.Sequential(nn.Linear(3, 2048), nn.Tanh(), nn.Linear(2048, 2)), 0, "cpu")
        it = coupled(model, size, way, memory_budget="8 GiB")
        step = it.accumulator.step(batch, lambda m, z: z.square().mean(), encode=lambda m, b: m(b["left"]))
        meter = mb.MemoryMeter()
        meter.track(it.model)
        assert step.peak_bytes is not None
        peaks[way, size] = step.peak_bytes - 2 * meter.live_bytes  # the weights and their gradients are there anyway
    assert peaks["twice", 4] < peaks["keep", 4] / 3
    assert peaks["twice", 4] < peaks["twice", 64] / 3


# -- out of memory ----------------------------------------------------------------------------------------------------


class Full(TorchDispatchMode):
    """Find no memory for the n-th operator from where it is armed; once."""

    def __init__(self, at: int) -> None:
        super().__init__()
        self.at, self.asked, self.armed = at, 0, False
        self.refused = ""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if self.armed and not (func._schema.is_mutable or func.is_view or func.namespace == "profiler"):
            self.asked += 1
            if self.asked == self.at:
                self.refused, self.armed = str(func), False
                raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 MiB")
        return func(*args, **(kwargs or {}))


def state_of(it: Subject) -> dict[str, Tensor]:
    return {name: each.clone() for name, each in it.model.state_dict().items()} | {"random": torch.get_rng_state()}


def operators_of(way: str) -> tuple[int, int, int]:
    """Count the operators of a window of microbatches of 4: up to its loss, up to that one's end, and in all."""
    full, it = Full(-1), coupled(towers(dropout=0.5, norm=True), 4, way)
    marks: list[int] = []

    def loss(model: Any, z: Any) -> Tensor:
        marks.append(full.asked)
        found = siglip(model, z)
        marks.append(full.asked)
        return found

    it.optimizer.register_step_pre_hook(lambda *_: marks.append(full.asked))
    with full:
        it.accumulator.step(pairs(8), loss, encode=arming(full))
    first, loss_done, last = marks
    return first, loss_done, last


def arming(full: Full) -> Callable[[Any, Batch], Any]:
    """Encode, and begin to count when that is first done."""

    def encoded(model: Any, batch: Batch) -> Any:
        full.armed = full.armed or not full.asked
        return encode(model, batch)

    return encoded


def interrupted(way: str, size: int, at: int) -> tuple[Subject, mb.Step | OutOfMemoryError]:
    """Take a step in which memory ends at some operator."""
    it, full = coupled(towers(dropout=0.5, norm=True), size, way, memory_budget="none"), Full(at)
    torch.manual_seed(5)
    with full:
        try:
            step = it.accumulator.step(pairs(8), siglip, encode=arming(full))
        except OutOfMemoryError as error:
            return it, error
    return it, step


@in_each_way
def test_out_of_memory_anywhere_gives_what_the_small_size_gives(way: str) -> None:
    first, loss_done, last = operators_of(way)
    # Where graphs were kept, the microbatches stay as they are, and are encoded twice.
    expected, plain = interrupted(way, 2 if way == "twice" else 4, -1)
    assert isinstance(plain, mb.Step)
    anywhere = [2, first - 1, (3 * loss_done + last) // 4, (loss_done + last) // 2]
    for at in [*anywhere, *([] if way == "twice" else [(first + loss_done) // 2])]:
        it, step = interrupted(way, 4, at)
        assert isinstance(step, mb.Step)
        assert (step.retries, step.microbatch_size) == (1, plain.microbatch_size)
        assert relative_error(it.updates[0], expected.updates[0]) == 0
        assert torch.equal(step.loss, plain.loss)
        ours, theirs = state_of(it), state_of(expected)
        assert all(torch.equal(each, theirs[name]) for name, each in ours.items() if name != "random")


def test_out_of_memory_in_the_loss_is_nothing_that_smaller_microbatches_help() -> None:
    first, loss_done, _ = operators_of("twice")
    it, error = interrupted("twice", 4, (first + loss_done) // 2)
    assert isinstance(error, OutOfMemoryError)
    assert "in the loss over the whole batch's representations" in str(error)
    assert gradients_of(it.model) == {}
    assert it.accumulator.step(pairs(8), siglip, encode=encode).microbatch_size == 4


def test_a_budget_is_held_by_smaller_microbatches() -> None:
    model = filled(nn.Sequential(nn.Linear(3, 1024), nn.Tanh(), nn.Linear(1024, 2)), 0, "cpu")
    batch = {"left": numbers(0, 64, 3)}

    def one(model: nn.Module, piece: Batch) -> Tensor:
        return model(piece["left"])

    def loss(model: nn.Module, z: Tensor) -> Tensor:
        return (z @ z.T).logsumexp(1).mean()

    def step_of(**settings: Any) -> tuple[mb.Step, Gradients]:
        it = coupled(model, 64, **settings)
        return it.accumulator.step(batch, loss, encode=one), it.updates[0]

    free, _ = step_of(memory_budget="1 GiB")
    assert free.peak_bytes is not None
    step, gradients = step_of(memory_budget=int(free.peak_bytes * 0.6))
    assert step.retries >= 1
    assert step.peak_bytes is not None
    assert step.peak_bytes <= free.peak_bytes * 0.6
    assert relative_error(gradients, full_batch(model, lambda m, b: loss(m, one(m, b)), batch)) <= EXACT


# -- errors -----------------------------------------------------------------------------------------------------------


@in_each_way
def test_an_error_leaves_everything_as_it_was(way: str) -> None:
    model, batch = towers(dropout=0.5, norm=True), pairs(8)
    for where in ("first", "loss", "second"):
        it, calls = coupled(model, 2, way), list[int]()

        def failing(model: Any, piece: Batch, calls: list[int] = calls, where: str = where) -> Any:
            calls.append(1)
            if len(calls) == (2 if where == "first" else 6 if where == "second" else -1):
                raise KeyError(where)
            return encode(model, piece)

        def loss(model: Any, z: Any, where: str = where) -> Tensor:
            if where == "loss":
                model.left[1].running_mean.add_(1)
                torch.rand(3)
                raise KeyError(where)
            return siglip(model, z)

        before = state_of(it)
        if where == "second" and way != "twice":  # nothing is encoded again
            continue
        with pytest.raises(KeyError, match=where):
            it.accumulator.step(batch, loss, encode=failing)
        assert torch.is_grad_enabled()
        assert gradients_of(it.model) == {}
        assert all(torch.equal(each, before[name]) for name, each in state_of(it).items())
        it.accumulator.step(batch, siglip, encode=encode)  # and the next window is as good as any


def test_what_is_not_a_representation_of_the_rows_is_refused() -> None:
    model, batch = towers(), pairs(6)
    it = coupled(model, 2)
    wrong: list[tuple[Callable[..., Any], type[Exception], str]] = [
        (lambda m, b: (m.left(b["left"]), m.scale), LossError, "belongs to no row"),
        (lambda m, b: m.left(b["left"]).mean(0), LossError, r"\(4,\) for a microbatch of 2 rows"),
        (lambda m, b: (m.left(b["left"]), 1.0), LossError, "a float beside tensors"),
        (lambda m, b: None, LossError, "None"),
    ]
    for function, kind, words in wrong:
        with pytest.raises(kind, match=words):
            it.accumulator.step(batch, lambda m, z: z.mean(), encode=function)
    with pytest.raises(LossError, match="different structures"):
        it.accumulator.step(batch, clip, encode=lambda m, b: encode(m, b)["sides"] if b["label"][0] else encode(m, b))
    with pytest.raises(NoGraphError, match="no gradient with respect to any representation"):
        it.accumulator.step(batch, lambda m, z: m.scale * z["sides"][0].detach().mean(), encode=encode)
    with pytest.raises(ConfigError, match="coupled must be"):
        coupled(model, 2, "thrice")


def test_a_window_encodes_one_batch_and_has_its_loss() -> None:
    model, batch = towers(), pairs(6)
    it = coupled(model, 2)
    with pytest.raises(WindowError, match="left without"), it.accumulator.window() as window:
        window.encode(batch, encode)
    with it.accumulator.window() as window:
        z = window.encode(batch, encode)
        with pytest.raises(WindowError, match="one batch"):
            window.encode(batch, encode)
        with pytest.raises(WindowError, match="no microbatches beside"):
            window.split(batch)
        window.backward(clip(it.model, z))
        with pytest.raises(WindowError, match="already computed the loss"):
            window.backward(clip(it.model, z))
    with pytest.raises(EmptyWindowError):
        it.accumulator.step(batch, lambda m, z: mb.Loss(sum=z["sides"][0].sum(), count=0), encode=encode)
    assert gradients_of(it.model) == {}


def test_the_microbatch_whose_representation_is_not_finite_is_named() -> None:
    model, batch = towers(), pairs(6)
    batch["left"][3] = torch.nan
    it = coupled(model, 2)
    with pytest.raises(NonfiniteError) as failure:
        it.accumulator.step(batch, clip, encode=encode)
    assert failure.value.microbatch == 1
    skipping = coupled(model, 2, nonfinite="skip")
    assert not skipping.accumulator.step(batch, clip, encode=encode).applied
    assert skipping.accumulator.step(pairs(6), clip, encode=encode).applied


def test_part_of_the_model_may_be_frozen() -> None:
    model, batch = towers(), pairs(6)
    model.get_submodule("left").requires_grad_(requires_grad=False)
    it = coupled(model, 2)
    it.accumulator.step(batch, clip, encode=encode)
    assert relative_error(it.updates[0], reference(model, clip, batch)) <= EXACT
    # A head that is trained on representations of encoders that are not.
    for part in (model.get_submodule("left"), model.get_submodule("right")):
        part.requires_grad_(requires_grad=False)
    it = coupled(model, 2)
    it.accumulator.step(batch, vicreg, encode=encode)
    assert relative_error(it.updates[0], reference(model, vicreg, batch)) <= EXACT


# -- which way --------------------------------------------------------------------------------------------------------


def test_graphs_are_kept_where_they_fit() -> None:
    model, batch = towers(), pairs(8)
    it, calls = coupled(model, 2, "auto", memory_budget="1 GiB"), list[int]()

    def counted(model: Any, piece: Batch) -> Any:
        calls.append(1)
        return encode(model, piece)

    for expected in (8, 4, 4):  # twice, to see what a graph takes, and then once
        calls.clear()
        it.accumulator.step(batch, clip, encode=counted)
        assert len(calls) == expected
    calls.clear()
    it.accumulator.step(pairs(16), clip, encode=counted)
    assert len(calls) == 16  # of a larger batch nothing is known
    twin = coupled(model, 2, "auto", memory_budget="1 GiB")
    twin.accumulator.load_state_dict(it.accumulator.state_dict())
    calls.clear()
    twin.accumulator.step(pairs(16), clip, encode=counted)
    assert len(calls) == 8


def test_where_they_do_not_fit_the_batch_is_always_encoded_twice() -> None:
    model = filled(nn.Sequential(nn.Linear(3, 4096), nn.Tanh(), nn.Linear(4096, 2)), 0, "cpu")
    batch = {"left": numbers(0, 64, 3)}
    calls: list[int] = []

    def counted(model: Any, piece: Batch) -> Any:
        calls.append(1)
        return model(piece["left"])

    def step(it: Subject) -> mb.Step:
        return it.accumulator.step(batch, lambda m, z: z.square().mean(), encode=counted)

    # A microbatch of 8 rows has 512 KiB of activations.
    known = step(coupled(model, 8, memory_budget="1 GiB")).peak_bytes
    assert known is not None
    it = coupled(model, 8, "auto", memory_budget=known + (1 << 20))
    for _ in range(9):
        calls.clear()
        assert step(it).retries == 0
        assert len(calls) == 2 * 8
    assert not it.accumulator._it.way.keep(64)
    assert all(relative_error(each, it.updates[0]) <= EXACT for each in it.updates)


def test_graphs_that_did_not_fit_after_all_are_not_kept_again() -> None:
    model, batch = towers(), pairs(8)
    it = coupled(model, 2, "auto", memory_budget="1 GiB")
    it.accumulator.step(batch, clip, encode=encode)
    full, calls = Full(5), list[int]()

    def counted(model: Any, piece: Batch) -> Any:
        calls.append(1)
        full.armed = len(calls) == 3
        return encode(model, piece)

    with full:
        step = it.accumulator.step(batch, clip, encode=counted)
    assert full.refused
    assert (step.retries, step.microbatch_size) == (1, 2)
    calls.clear()
    it.accumulator.step(batch, clip, encode=counted)
    assert len(calls) == 8
    assert all(relative_error(each, it.updates[0]) <= EXACT for each in it.updates)


def test_the_time_of_a_microbatch_is_that_of_both_passes() -> None:
    now = iter([0.0, 1.0, 3.0, 10.0, 14.0, 22.0])
    stopwatch, window = Stopwatch(), towers_window()
    stopwatch.clock, stopwatch.on = lambda: next(now), True
    stopwatch.cut(window, (), Cutting(lambda: iter(()), 2))
    for again in (False, True):  # the second round begins after the loss, which took 7 seconds
        for index, rows in enumerate((4, 3)):
            with stopwatch.around(window, Pass(rows, None, index, again=again)):
                pass
    assert stopwatch.laps == [(1.0 + 4.0, 4), (2.0 + 8.0, 3)]


def towers_window() -> mb.Window:
    return coupled(towers(), 2).accumulator.window()


def test_auto_finds_a_size_for_the_encoder() -> None:
    model, batch = towers(), pairs(16)
    chosen: list[Any] = []
    it = coupled(model, "auto", "auto", memory_budget="32 KiB", listeners=[chosen.append])  # which is little
    for _ in range(40):
        it.accumulator.step(batch, clip, encode=encode)
        if any(isinstance(event, mb.PlanChosen) for event in chosen):
            break
    (plan,) = [event for event in chosen if isinstance(event, mb.PlanChosen)]
    assert plan.predicted_bytes is not None  # the encoder was rehearsed
    theirs = reference(model, clip, batch)
    assert all(relative_error(each, theirs) <= EXACT for each in it.updates)


class Places(nn.Module):
    """Add a constant buffer, as encoders do with the places of tokens; a moving one counts its calls."""

    def __init__(self, *, moves: bool) -> None:
        super().__init__()
        self.moves, self.linear = moves, nn.Linear(4, 4)
        self.register_buffer("places", torch.arange(4.0))
        self.places: Tensor

    def forward(self, x: Tensor) -> Tensor:
        if self.moves:
            self.places += 1
        return self.linear(x + self.places.clone())


def test_a_buffer_that_does_not_move_is_not_said_to_move() -> None:
    """The second encoding begins with the buffers of the first: putting them back is no move."""

    def loss_fn(model: nn.Module, z: Tensor) -> Tensor:
        return (z @ z.T).logsumexp(1).mean()

    for moves in (False, True):
        model = Places(moves=moves)
        accumulator = mb.Accumulator(model, microbatch_size=2, coupled="twice")
        with warnings.catch_warnings(record=True) as told:
            warnings.simplefilter("always")
            accumulator.gradient(torch.randn(6, 4), loss_fn, encode=lambda model, x: model(x))
        assert len(told) == moves
