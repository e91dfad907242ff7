"""Laws N1, N2, N5 to N9: one denominator, whatever the cut, the tail or the masks."""

import math
from typing import Any

import pytest
import torch
from hypothesis import assume, example, given
from hypothesis import strategies as st
from torch import Tensor, nn

import microbatch as mb
from microbatch.errors import EmptyBatchError, EmptyWindowError, MissingCountError, UnknownTermError

from .reference import (
    DOORS,
    EXACT,
    WRONG,
    Batch,
    Door,
    Gradients,
    by_hand,
    few,
    full_batch,
    gradients_of,
    joined,
    limit,
    moved,
    norm,
    on_each_device,
    pieces_of,
    points,
    regressor,
    relative_error,
    sentences,
    squared,
    steps_by_windows,
    subject,
    tagger,
    through_each_door,
    token_loss,
    token_mean,
)

SEEDS = st.integers(0, 2**16)
SIZES = st.integers(1, 14)
DTYPES = st.sampled_from([torch.float64, torch.float32])
TARGETS = st.lists(st.integers(0, 8), min_size=1, max_size=9).filter(any)


# -- N1: the last window is short ----------------------------------------------------------------------------------


@on_each_device
@few
@given(
    rows=st.integers(1, 20),
    size=st.integers(1, 4),
    microbatches=st.integers(1, 5),
    sums=st.booleans(),
    dtype=DTYPES,
    seed=SEEDS,
)
@example(rows=10, size=2, microbatches=4, sums=False, dtype=torch.float64, seed=0)
@example(rows=11, size=1, microbatches=1, sums=False, dtype=torch.float32, seed=7893)  # a tiny gradient: all cancels
def test_n1_every_window_is_divided_by_what_was_in_it(
    device: str, rows: int, size: int, microbatches: int, sums: bool, dtype: torch.dtype, seed: int
) -> None:
    def loss_fn(model: nn.Module, batch: Batch) -> Tensor | mb.Loss:
        mean = squared(model, batch)
        return mb.Loss(sum=mean * len(batch["x"]), count=len(batch["x"])) if sums else mean

    model, loader = regressor(seed, device, dtype), pieces_of(points(seed, rows, dtype), size)
    it = subject(model)
    steps = steps_by_windows(it, loader, loss_fn, microbatches=microbatches)
    windows = [loader[at : at + microbatches] for at in range(0, len(loader), microbatches)]
    assert [step.microbatches for step in steps] == [len(window) for window in windows]
    for update, window in zip(it.updates, windows, strict=True):
        batch = joined(window)
        reference = full_batch(model, squared, batch)
        rounding = limit(model, squared, batch, reference)
        assert relative_error(update, reference) <= rounding
        alike = len(window) == microbatches and len(window[-1]["x"]) == len(window[0]["x"])
        error = relative_error(by_hand(model, squared, window, divide_by=microbatches), reference)
        assert error < max(WRONG, rounding) if alike else error > WRONG


@on_each_device
@pytest.mark.parametrize("sums", [False, True])
def test_n1_the_last_update_is_whole_and_by_hand_a_quarter(device: str, sums: bool) -> None:
    def loss_fn(model: nn.Module, batch: Batch) -> Tensor | mb.Loss:
        return mb.Loss(sum=squared(model, batch) * 2, count=2) if sums else squared(model, batch)

    model, loader = regressor(1, device), pieces_of(points(1, 10), 2)
    it = subject(model)
    steps_by_windows(it, loader, loss_fn, microbatches=4)
    reference = full_batch(model, squared, loader[4])
    assert norm(it.updates[1].values()) / norm(reference.values()) == pytest.approx(1, rel=EXACT)
    assert relative_error(it.updates[1], reference) <= EXACT
    quarter = by_hand(model, squared, loader[4:], divide_by=4)
    assert norm(quarter.values()) / norm(reference.values()) == pytest.approx(0.25, rel=EXACT)


# -- N2: a mean over tokens is not a mean of means -----------------------------------------------------------------


@through_each_door
@on_each_device
@few
@given(targets=TARGETS, size=SIZES, dtype=DTYPES, seed=SEEDS)
@example(targets=[8, 1, 2, 5], size=1, dtype=torch.float64, seed=0)
@example(targets=[8, 0, 0, 5, 1], size=2, dtype=torch.float64, seed=0)
def test_n2_every_token_weighs_the_same(
    door: Door, device: str, targets: list[int], size: int, dtype: torch.dtype, seed: int
) -> None:
    model, batch = tagger(seed, device, dtype), sentences(seed, targets)
    reference = full_batch(model, token_mean, batch)
    it = subject(model, size=size)
    step = door(it, batch, token_loss, size=size)
    assert relative_error(it.updates[0], reference) <= limit(model, token_mean, batch, reference)
    assert step.count == sum(targets)
    counts = [sum(targets[at : at + size]) for at in range(0, len(targets), size)]
    error = relative_error(by_hand(model, token_mean, pieces_of(batch, size), divide_by=len(counts)), reference)
    assert error < WRONG if len(set(counts)) == 1 else error > WRONG


class OneWeight(nn.Module):
    """A weight whose gradient at every token is the number in the batch, so that the mean is done in the head."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones((), dtype=torch.float64))


@through_each_door
@on_each_device
def test_n2_masks_of_8_1_2_5_tokens(door: Door, device: str) -> None:
    slopes, targets = torch.tensor([10.0, 19.0, 10.0, 10.0]), torch.tensor([8.0, 1.0, 2.0, 5.0])
    batch: Batch = {"slope": slopes.double(), "targets": targets.double()}

    def total(model: Any, piece: Batch) -> mb.Loss:
        return mb.Loss(sum=model.weight * (piece["slope"] * piece["targets"]).sum(), count=piece["targets"].sum())

    model = OneWeight().to(device)
    it = subject(model, size=1)
    door(it, batch, total, size=1)
    assert it.updates[0]["weight"].item() == pytest.approx(169 / 16, rel=EXACT)
    recipe = by_hand(model, lambda model, piece: total(model, piece).mean, pieces_of(batch, 1), divide_by=4)
    assert recipe["weight"].item() == pytest.approx(49 / 4, rel=EXACT)  # 16 % off
    assert relative_error(recipe, {"weight": torch.tensor(169 / 16)}) == pytest.approx(0.16, abs=0.001)


# -- N5: two terms, two denominators -------------------------------------------------------------------------------


def routed(model: Any, batch: Batch) -> Tensor:
    """Return the mean over samples of how unevenly they are routed."""
    return (model.router(model.embedding(batch["tokens"]).mean(1)).softmax(-1) ** 2).sum(-1).mean()


def both(model: nn.Module, batch: Batch) -> Tensor:
    return token_mean(model, batch) + routed(model, batch)


def two_terms(model: nn.Module, batch: Batch, *, sums: bool) -> dict[str, Tensor | mb.Loss]:
    rows, router = len(batch["tokens"]), routed(model, batch)
    return {"tokens": token_loss(model, batch), "router": mb.Loss(sum=router * rows, count=rows) if sums else router}


def counted(batch: Batch, *, sums: bool = True) -> dict[str, int | Tensor]:
    counts: dict[str, int | Tensor] = {"tokens": (batch["labels"] >= 0).sum()}
    return {**counts, "router": len(batch["tokens"])} if sums else counts


WITH_THE_BATCH = pytest.mark.parametrize("door", [pytest.param(DOORS[d], id=d) for d in ("step", "window", "windows")])


@WITH_THE_BATCH
@on_each_device
@few
@given(targets=TARGETS, size=SIZES, sums=st.booleans(), seed=SEEDS)
@example(targets=[8, 1, 2, 5], size=1, sums=True, seed=0)
@example(targets=[8, 1, 2, 5], size=1, sums=False, seed=0)
def test_n5_each_term_has_its_own_denominator(
    door: Door, device: str, targets: list[int], size: int, sums: bool, seed: int
) -> None:
    model, batch = tagger(seed, device), sentences(seed, targets)
    reference = full_batch(model, both, batch)
    it = subject(model, size=size)
    step = door(
        it,
        batch,
        lambda model, batch: two_terms(model, batch, sums=sums),
        size=size,
        counts=lambda batch: counted(batch, sums=sums),
    )
    assert relative_error(it.updates[0], reference) <= EXACT
    there = moved(batch, model, torch.float64)
    assert step.terms["tokens"].item() == pytest.approx(token_mean(model, there).item(), rel=EXACT)
    assert step.terms["router"].item() == pytest.approx(routed(model, there).item(), rel=EXACT)
    assert step.loss.item() == pytest.approx(both(model, there).item(), rel=EXACT)
    assert step.counts == {"tokens": sum(targets), "router": len(targets)}


@on_each_device
@few
@given(targets=st.lists(st.integers(1, 8), min_size=2, max_size=9), seed=SEEDS)
@example(targets=[8, 1, 2, 5], seed=0)
def test_n5_by_hand_the_second_term_counts_once_a_microbatch(device: str, targets: list[int], seed: int) -> None:
    model, batch = tagger(seed, device), sentences(seed, targets)
    reference, tokens = full_batch(model, both, batch), sum(targets)

    def recipe(model: nn.Module, piece: Batch) -> Tensor:  # the tokens are right, and the other term was forgotten
        return token_loss(model, piece).sum / tokens + routed(model, piece)

    wrong = by_hand(model, recipe, pieces_of(batch, 1), divide_by=1)
    router = {"weight": reference["router.weight"]}
    assert relative_error(wrong, reference) > WRONG
    assert relative_error({"weight": wrong["router.weight"] / len(targets)}, router) <= EXACT
    it = subject(model, size=1)
    it.accumulator.step(batch, lambda m, b: two_terms(m, b, sums=True), counts=counted)
    assert relative_error({"weight": it.updates[0]["router.weight"]}, router) <= EXACT


@through_each_door
@on_each_device
@few
@given(rows=st.integers(1, 9), size=SIZES, seed=SEEDS)
def test_n5_several_plain_means_share_the_rows(door: Door, device: str, rows: int, size: int, seed: int) -> None:
    def terms(model: Any, batch: Batch) -> dict[str, Tensor]:
        return {"fit": squared(model, batch), "size": 0.3 * model(batch["x"]).square().mean()}

    model, batch = regressor(seed, device), points(seed, rows)
    reference = full_batch(model, lambda m, b: sum(terms(m, b).values(), torch.zeros(())), batch)
    it = subject(model, size=size)
    step = door(it, batch, terms, size=size)
    assert relative_error(it.updates[0], reference) <= EXACT
    assert step.counts == {"fit": rows, "size": rows}


def test_n5_counts_given_as_numbers_need_no_batch() -> None:
    model, batch = tagger(0, "cpu"), sentences(0, [8, 1, 2, 5])
    it = subject(model, size=1)
    DOORS["count"](it, batch, lambda m, b: two_terms(m, b, sums=True), size=1, counts={"tokens": 16, "router": 4})
    assert relative_error(it.updates[0], full_batch(model, both, batch)) <= EXACT


# -- N6: a term that is not a mean of rows -------------------------------------------------------------------------


@through_each_door
def test_n6_a_term_without_a_denominator_is_refused_by_name(door: Door) -> None:
    it = subject(tagger(0, "cpu"), size=1)
    with pytest.raises(MissingCountError, match="'tokens', 'router'"):
        door(it, sentences(0, [3, 1]), lambda m, b: two_terms(m, b, sums=True), size=1)
    assert it.updates == []
    assert gradients_of(it.model) == {}


@WITH_THE_BATCH
def test_n6_a_term_that_was_not_declared_is_refused_by_name(door: Door) -> None:
    def undeclared(model: nn.Module, batch: Batch) -> dict[str, Any]:
        terms = two_terms(model, batch, sums=True)
        return {**terms, "balance": terms["router"]}

    it = subject(tagger(0, "cpu"), size=1)
    with pytest.raises(UnknownTermError, match="'balance'"):
        door(it, sentences(0, [3, 1]), undeclared, size=1, counts=counted)
    assert it.updates == []
    assert gradients_of(it.model) == {}


def test_n6_a_product_of_batch_means_is_right_in_one_microbatch_only() -> None:
    # Nothing in the value of such a loss tells it from a mean over rows: what is pinned here is the limit.
    def product(model: Any, batch: Batch) -> Tensor:
        out = model(batch["x"])
        return out[:, 0].mean() * out[:, 1].mean()

    model, batch = regressor(0, "cpu"), points(0, 8)
    reference = full_batch(model, product, batch)
    whole, cut = subject(model, size=8), subject(model, size=2)
    whole.accumulator.step(batch, product)
    cut.accumulator.step(batch, product)
    assert relative_error(whole.updates[0], reference) <= EXACT
    assert relative_error(cut.updates[0], reference) > 0.01


# -- N7: microbatches that contribute nothing ----------------------------------------------------------------------

NOTHING = {
    "none": lambda loss, rows: None,
    "dict": lambda loss, rows: {},
    "number": lambda loss, rows: mb.Loss(sum=loss * rows, count=0),
    "tensor": lambda loss, rows: mb.Loss(sum=loss * rows, count=torch.zeros((), device=loss.device)),
    "nan": lambda loss, rows: mb.Loss(sum=(loss * rows).detach() * math.nan, count=0),
}


def some_contribute(how: str, *, sums: bool) -> Any:
    """Make a loss function in which rows of ``use`` 0 come in microbatches that contribute nothing."""

    def loss_fn(model: nn.Module, batch: Batch) -> Any:
        loss, rows = squared(model, batch), len(batch["x"])
        if not batch["use"].any():
            return NOTHING[how](loss, rows)
        value = mb.Loss(sum=loss * rows, count=rows) if sums else loss
        return {"loss": value} if how == "dict" else value

    return loss_fn


def used_and_not(seed: int, use: list[bool], size: int) -> Batch:
    flags = torch.tensor(use).repeat_interleave(size)
    return {**points(seed, len(flags)), "use": flags}


def used_only(batch: Batch) -> Batch:
    return {name: each[batch["use"]] for name, each in batch.items()}


@through_each_door
@on_each_device
@few
@given(
    use=st.lists(st.booleans(), min_size=1, max_size=7).filter(any),
    size=st.integers(1, 3),
    how=st.sampled_from(sorted(NOTHING)),
    sums=st.booleans(),
    seed=SEEDS,
)
@example(use=[True, False, False, True], size=2, how="none", sums=False, seed=0)
def test_n7_divided_by_what_contributed(
    door: Door, device: str, use: list[bool], size: int, how: str, sums: bool, seed: int
) -> None:
    assume(sums or how in {"none", "dict"})  # a count of 0 is for losses that have counts
    model, batch = regressor(seed, device), used_and_not(seed, use, size)
    reference = full_batch(model, squared, used_only(batch))
    it = subject(model, size=size)
    step = door(it, batch, some_contribute(how, sums=sums), size=size)
    assert relative_error(it.updates[0], reference) <= EXACT
    assert step.count == sum(use) * size
    assert step.loss.item() == pytest.approx(squared(model, moved(used_only(batch), model, torch.float64)).item())
    contributing = [piece for piece in pieces_of(batch, size) if piece["use"].any()]
    configured = by_hand(model, squared, contributing, divide_by=len(use))
    error = relative_error(configured, reference)
    assert error == pytest.approx(1 - sum(use) / len(use))
    assert all(use) or error > WRONG


@through_each_door
@on_each_device
@pytest.mark.parametrize("how", sorted(NOTHING))
def test_n7_a_window_in_which_nothing_contributes_has_no_mean(door: Door, device: str, how: str) -> None:
    model, batch = regressor(0, device), used_and_not(0, [False, False], 2)
    it = subject(model, size=2)
    with pytest.raises(EmptyWindowError):
        door(it, batch, some_contribute(how, sums=True), size=2)
    assert it.updates == []
    assert gradients_of(it.model) == {}
    it = subject(model, size=2, nonfinite="skip")
    step = door(it, batch, some_contribute(how, sums=True), size=2)
    assert (step.applied, step.loss.item(), it.updates) == (False, 0.0, [])
    assert gradients_of(it.model) == {}


@through_each_door
@on_each_device
@pytest.mark.parametrize("at", [0, 1, 2])
def test_n7_a_row_without_labels_leaves_no_nan(door: Door, device: str, at: int) -> None:
    targets = [5, 3, 2]
    targets[at] = 0
    model, batch = tagger(0, device), sentences(0, targets)
    it = subject(model, size=1)
    step = door(it, batch, token_loss, size=1)
    assert relative_error(it.updates[0], full_batch(model, token_mean, batch)) <= EXACT
    assert step.loss.isfinite()
    assert relative_error(by_hand(model, token_mean, pieces_of(batch, 1), divide_by=3), it.updates[0]) > WRONG


# -- N8: any size --------------------------------------------------------------------------------------------------


@through_each_door
@on_each_device
@few
@given(rows=st.integers(1, 12), size=SIZES, dtype=DTYPES, seed=SEEDS)
@example(rows=7, size=3, dtype=torch.float64, seed=0)
@example(rows=1, size=1, dtype=torch.float64, seed=0)
@example(rows=1, size=5, dtype=torch.float64, seed=0)
def test_n8_any_batch_with_any_microbatch(
    door: Door, device: str, rows: int, size: int, dtype: torch.dtype, seed: int
) -> None:
    model, batch = regressor(seed, device, dtype), points(seed, rows, dtype)
    reference = full_batch(model, squared, batch)
    it = subject(model, size=size)
    step = door(it, batch, squared, size=size)
    assert relative_error(it.updates[0], reference) <= limit(model, squared, batch, reference)
    assert (step.samples, step.microbatches, step.microbatch_size) == (rows, -(-rows // size), min(rows, size))
    for wrong in (dropping(model, batch, size), meaning(model, batch, size)):
        right = rows % size == 0 or (rows < size and wrong != {})
        assert relative_error(wrong, reference) < WRONG if right else relative_error(wrong, reference) > WRONG


def dropping(model: nn.Module, batch: Batch, size: int) -> Gradients:
    """Do as loaders do that leave out the rows that do not fill a microbatch."""
    whole = len(batch["x"]) // size
    return by_hand(model, squared, pieces_of(batch, size)[:whole], divide_by=whole)


def meaning(model: nn.Module, batch: Batch, size: int) -> Gradients:
    """Average the microbatches' means, the short one like the others."""
    pieces = pieces_of(batch, size)
    return by_hand(model, squared, pieces, divide_by=len(pieces))


@on_each_device
@few
@given(
    sizes=st.lists(st.integers(1, 5), min_size=1, max_size=6), door=st.sampled_from(["windows", "count"]), seed=SEEDS
)
@example(sizes=[4, 1, 3], door="windows", seed=0)
def test_n8_microbatches_of_different_sizes(device: str, sizes: list[int], door: str, seed: int) -> None:
    model, batch = regressor(seed, device), points(seed, sum(sizes))
    xs, ys = batch["x"].split(sizes), batch["y"].split(sizes)
    loader = [{"x": x, "y": y} for x, y in zip(xs, ys, strict=True)]
    reference = full_batch(model, squared, batch)
    it = subject(model)
    if door == "windows":
        steps_by_windows(it, loader, squared, microbatches=len(loader))
    else:
        with it.accumulator.window() as window:
            for piece in loader:
                window.backward(squared(it.model, moved(piece, it.model, torch.float64)), count=len(piece["x"]))
    assert relative_error(it.updates[0], reference) <= EXACT
    error = relative_error(by_hand(model, squared, loader, divide_by=len(loader)), reference)
    assert error < WRONG if len(set(sizes)) == 1 else error > WRONG


@pytest.mark.parametrize("door", ["step", "window"])
def test_n8_a_batch_of_0_rows_is_refused(door: str) -> None:
    it = subject(regressor(0, "cpu"), size=2)
    with pytest.raises(EmptyBatchError, match="0 rows"):
        DOORS[door](it, points(0, 0), squared, size=2)
    assert it.updates == []
    assert gradients_of(it.model) == {}


def test_n8_a_loader_without_microbatches_has_no_window() -> None:
    it = subject(regressor(0, "cpu"))
    assert steps_by_windows(it, [], squared, microbatches=3) == []
    assert it.updates == []


# -- N9: the reported loss -----------------------------------------------------------------------------------------


@through_each_door
@on_each_device
@few
@given(targets=TARGETS, size=SIZES, seed=SEEDS)
@example(targets=[8, 1, 2, 5], size=1, seed=0)
def test_n9_the_loss_is_the_effective_batchs_whatever_the_cut(
    door: Door, device: str, targets: list[int], size: int, seed: int
) -> None:
    model, batch = tagger(seed, device), sentences(seed, targets)
    whole = token_mean(model, moved(batch, model, torch.float64)).item()
    step = door(subject(model, size=size), batch, token_loss, size=size)
    assert step.loss.item() == pytest.approx(whole, rel=EXACT)
    assert step.loss.ndim == 0
    assert step.loss.device.type == device
    assert step.grad_norm.item() == pytest.approx(norm(full_batch(model, token_mean, batch).values()), rel=EXACT)
    counts = [sum(targets[at : at + size]) for at in range(0, len(targets), size)]
    means = [token_mean(model, moved(piece, model, torch.float64)).item() for piece in pieces_of(batch, size)]
    if sum(map(bool, counts)) > 1:
        assert means[-1] != pytest.approx(whole, rel=WRONG)
    if len(set(counts)) > 1:
        assert sum(means) / len(means) != pytest.approx(whole, rel=WRONG)
