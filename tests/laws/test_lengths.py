"""Row order is free: whatever the cut by length, the gradient, the loss and the rows' results are the batch's."""

import dataclasses
import functools
import itertools
import random
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import example, given
from hypothesis import strategies as st
from torch import Tensor, nn

import microbatch as mb
from microbatch.batch.lengths import Lengths, best_cuts, cut_by_length, in_order, take_piece
from microbatch.errors import BatchError, ConfigError

from .reference import (
    EXACT,
    WRONG,
    Batch,
    by_hand,
    few,
    filled,
    full_batch,
    on_each_device,
    pieces_of,
    relative_error,
    subject,
)

SEEDS = st.integers(0, 2**16)
LENGTHS = st.lists(st.integers(0, 9), min_size=1, max_size=9).filter(any)
SIZES = st.integers(1, 4)
COLUMNS, WORDS = 9, 11


class Reader(nn.Module):
    """Attend to the tokens of one's own row, masked, with absolute positions."""

    def __init__(self, *, positions: bool = True) -> None:
        super().__init__()
        self.embedding = nn.Embedding(WORDS, 6)
        self.positions = nn.Embedding(COLUMNS, 6) if positions else None
        self.query, self.key, self.value = (nn.Linear(6, 6) for _ in range(3))
        self.head = nn.Linear(6, WORDS)

    def forward(self, tokens: Tensor, mask: Tensor, position_ids: Tensor | None) -> Tensor:
        """Return logits of shape ``(rows, columns, WORDS)``."""
        hidden = self.embedding(tokens)
        if self.positions is not None:
            places = torch.arange(tokens.shape[1], device=tokens.device) if position_ids is None else position_ids
            hidden = hidden + self.positions(places)
        scores = self.query(hidden) @ self.key(hidden).mT
        scores = scores.masked_fill(mask.unsqueeze(1) == 0, -1e9)
        return self.head((hidden + scores.softmax(-1) @ self.value(hidden)).tanh())


def reader(seed: int, device: str = "cpu", *, positions: bool = True) -> nn.Module:
    return filled(Reader(positions=positions), seed, device)


def each_row(model: nn.Module, batch: Batch) -> Tensor:
    """Return the summed loss of every row."""
    logits = model(batch["tokens"], batch["mask"], batch.get("position_ids"))
    return F.cross_entropy(logits.mT, batch["labels"], reduction="none").sum(1)


def token_loss(model: nn.Module, batch: Batch) -> mb.Loss:
    return mb.Loss(sum=each_row(model, batch).sum(), count=(batch["labels"] >= 0).sum())


def token_mean(model: nn.Module, batch: Batch) -> Tensor:
    return token_loss(model, batch).mean


def ragged(seed: int, sizes: Sequence[int], *, left: bool = False, position_ids: bool = False) -> Batch:
    """Draw rows of the given lengths, padded to COLUMNS, their labels on the tokens only."""
    generator = torch.Generator().manual_seed(seed)
    tokens = torch.randint(0, WORDS, (len(sizes), COLUMNS), generator=generator)
    labels = torch.randint(0, WORDS, (len(sizes), COLUMNS), generator=generator)
    lengths = torch.tensor(sizes)
    mask = (torch.arange(COLUMNS) < lengths.unsqueeze(1)).long()
    if left:
        mask = mask.flip(1)
    batch = {"tokens": tokens, "labels": labels.masked_fill(mask == 0, -100), "mask": mask, "lengths": lengths}
    if position_ids:
        batch["position_ids"] = (mask.cumsum(1) - 1).clamp(min=0)
    return batch


WAYS: dict[str, Lengths] = {
    "mask": Lengths(of="mask"),
    "lengths": Lengths(of="lengths"),
    "function": Lengths(of=lambda batch: batch["mask"].bool()),
    "function of lengths": Lengths(of=lambda batch: batch["mask"].sum(1)),
    "no overhead": Lengths(of="mask", overhead=0),
    "much overhead": Lengths(of="mask", overhead=10**6),
    "few tokens": Lengths(of="mask", microbatch_tokens=1),
    "many tokens": Lengths(of="mask", microbatch_tokens=10**6),
    "keys": Lengths(of="mask", keys=["tokens", "labels", "mask", "position_ids"]),
}
each_way = pytest.mark.parametrize("way", WAYS)


# -- the gradient and the loss -------------------------------------------------------------------------------------


@each_way
@on_each_device
@few
@given(sizes=LENGTHS, size=SIZES, seed=SEEDS)
@example(sizes=[1, 9, 2, 0, 9, 3], size=2, seed=0)
@example(sizes=[4], size=1, seed=0)
@example(sizes=[5, 5, 5, 5], size=3, seed=0)
def test_right_padding(way: str, device: str, sizes: list[int], size: int, seed: int) -> None:
    model, batch = reader(seed, device), ragged(seed, sizes)
    it = subject(model, size=size, lengths=WAYS[way])
    step = it.accumulator.step(batch, token_loss)
    assert relative_error(it.updates[0], full_batch(model, token_mean, batch)) <= EXACT
    assert step.count == sum(sizes)
    assert step.samples == len(sizes)
    alone = subject(model, size=len(sizes)).accumulator.step(batch, token_loss)
    assert step.loss.item() == pytest.approx(alone.loss.item(), rel=EXACT)


@pytest.mark.parametrize("way", ["mask", "function", "keys", "few tokens", "many tokens"])
@few
@given(sizes=LENGTHS, size=SIZES, seed=SEEDS)
@example(sizes=[1, 9, 2, 0, 9, 3], size=2, seed=0)
def test_left_padding_with_position_ids(way: str, sizes: list[int], size: int, seed: int) -> None:
    model, batch = reader(seed), ragged(seed, sizes, left=True, position_ids=True)
    it = subject(model, size=size, lengths=WAYS[way])
    it.accumulator.step(batch, token_loss)
    assert relative_error(it.updates[0], full_batch(model, token_mean, batch)) <= EXACT


@pytest.mark.parametrize(
    "lengths",
    [
        Lengths(of="mask", relative_positions=True),
        Lengths(of="lengths", side="left", relative_positions=True),
        Lengths(of="lengths", side="left", relative_positions=True, microbatch_tokens=1),
    ],
    ids=["mask", "lengths", "one by one"],
)
@few
@given(sizes=LENGTHS, size=SIZES, seed=SEEDS)
@example(sizes=[1, 9, 2, 0, 9, 3], size=2, seed=0)
def test_left_padding_of_a_model_without_positions(lengths: Lengths, sizes: list[int], size: int, seed: int) -> None:
    model, batch = reader(seed, positions=False), ragged(seed, sizes, left=True)
    it = subject(model, size=size, lengths=lengths)
    it.accumulator.step(batch, token_loss)
    assert relative_error(it.updates[0], full_batch(model, token_mean, batch)) <= EXACT


def test_by_hand_left_padding_moves_the_positions() -> None:
    model, batch = reader(0), ragged(0, [1, 9, 2, 4], left=True)
    it = subject(model, size=2, lengths=Lengths(of="mask", relative_positions=True))
    it.accumulator.step(batch, token_loss)
    assert relative_error(it.updates[0], full_batch(model, token_mean, batch)) > WRONG


def test_by_hand_the_mean_of_sorted_means() -> None:
    model, batch = reader(0), ragged(0, [1, 9, 2, 4])
    rows = batch["lengths"].argsort(descending=True)
    pieces = pieces_of({name: each[rows] for name, each in batch.items()}, 2)
    off = relative_error(by_hand(model, token_mean, pieces, divide_by=2), full_batch(model, token_mean, batch))
    assert off > WRONG


def test_by_hand_trimming_one_column_too_many() -> None:
    model, batch = reader(0), ragged(0, [1, 9, 2, 4])
    short = {name: each[:, :-1] if each.ndim == 2 else each for name, each in batch.items()}
    assert relative_error(full_batch(model, token_mean, short), full_batch(model, token_mean, batch)) > WRONG


@few
@given(sizes=LENGTHS, size=SIZES, seed=SEEDS)
def test_several_terms_and_their_counts(sizes: list[int], size: int, seed: int) -> None:
    model, batch = reader(seed), ragged(seed, sizes)

    def loss_fn(model: nn.Module, batch: Batch) -> dict[str, mb.Loss | Tensor]:
        return {"tokens": token_loss(model, batch), "rows": each_row(model, batch).square().mean()}

    def plain(model: nn.Module, batch: Batch) -> Tensor:
        return token_mean(model, batch) + each_row(model, batch).square().mean()

    it = subject(model, size=size, lengths="mask")
    it.accumulator.step(batch, loss_fn, counts=lambda batch: {"tokens": (batch["labels"] >= 0).sum()})
    assert relative_error(it.updates[0], full_batch(model, plain, batch)) <= EXACT
    assert relative_error(it.updates[0], full_batch(model, token_mean, batch)) > WRONG


@few
@given(sizes=LENGTHS, size=SIZES, fuse=st.booleans(), seed=SEEDS)
def test_with_everything_else(sizes: list[int], size: int, fuse: bool, seed: int) -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("microbatch.gradients.fused_matmul.SMALLEST", 1)
        model, batch = reader(seed), ragged(seed, sizes)
        it = subject(model, size=size, lengths="mask", sums=mb.Sums(fuse=fuse), max_grad_norm=0.01)
        step = it.accumulator.step(batch, token_loss)
    reference = full_batch(model, token_mean, batch)
    factor = min(1.0, 0.01 / (step.grad_norm.item() + 1e-6))
    assert relative_error(it.updates[0], {name: each * factor for name, each in reference.items()}) <= EXACT
    assert (step.fused > 0) == fuse


# -- every row, once, in its place ---------------------------------------------------------------------------------


@each_way
@few
@given(sizes=LENGTHS, size=SIZES, seed=SEEDS)
@example(sizes=[0, 9, 0], size=1, seed=0)
def test_every_row_is_in_exactly_one_microbatch(way: str, sizes: list[int], size: int, seed: int) -> None:
    batch: dict[str, Any] = {
        **ragged(seed, sizes),
        "text": [f"row {i}" for i in range(len(sizes))],
        "images": mb.Rows([torch.full((1 + i % 2, 2), i) for i in range(len(sizes))]),
        "weights": mb.Whole(torch.arange(COLUMNS)),
        "scale": torch.tensor(2.0),
        "name": "all",
        "row": torch.arange(len(sizes)),
        "numpy": torch.arange(len(sizes)).unsqueeze(1).repeat(1, 3).numpy(),
    }
    lengths = WAYS[way]
    if "lengths" in way:  # which alone do not tell how many columns there are: the batch has entries of two widths
        lengths = dataclasses.replace(lengths, keys=["tokens", "labels", "mask"])
    pieces = cut_by_length(batch, size, lengths=lengths)
    assert sorted(torch.cat([piece.rows for piece in pieces]).tolist()) == list(range(len(sizes)))
    most = lengths.microbatch_tokens or size * max(sizes)
    for piece in pieces:
        got, rows = take_piece(batch, piece, lengths=lengths), piece.rows.tolist()
        longest = max(1, *(sizes[row] for row in rows))
        assert got["tokens"].shape == got["labels"].shape == got["mask"].shape == (len(rows), longest)
        assert len(rows) == 1 or got["tokens"].numel() <= most
        assert torch.equal(got["tokens"], batch["tokens"][rows, :longest])
        assert got["tokens"].is_contiguous()
        assert got["mask"].sum(1).tolist() == got["lengths"].tolist() == [sizes[row] for row in rows]
        assert got["row"].tolist() == rows
        assert got["numpy"].tolist() == [[row] * 3 for row in rows]
        assert got["text"] == [f"row {row}" for row in rows]
        assert [each[0, 0].item() for each in got["images"]] == rows
        assert got["weights"] is batch["weights"].value
        assert (got["scale"].item(), got["name"]) == (2.0, "all")


@few
@given(sizes=LENGTHS, size=SIZES)
@example(sizes=[0, 9, 0, 0], size=1)
def test_padding_on_the_left_told_by_lengths_leaves_a_column_too(sizes: list[int], size: int) -> None:
    lengths = Lengths(of="lengths", side="left", relative_positions=True)
    batch = ragged(0, sizes, left=True)
    for piece in cut_by_length(batch, size, lengths=lengths):
        got, rows = take_piece(batch, piece, lengths=lengths), piece.rows.tolist()
        longest = max(1, *(sizes[row] for row in rows))
        assert got["tokens"].shape == (len(rows), longest)
        assert torch.equal(got["tokens"], batch["tokens"][rows, COLUMNS - longest :])


@few
@given(
    spans=st.lists(st.none() | st.tuples(st.integers(0, 8), st.integers(0, 8)), min_size=1, max_size=8),
    size=SIZES,
    tokens=st.sampled_from([None, 9, 20]),
)
@example(spans=[(0, 3), (5, 8)], size=1, tokens=8)
@example(spans=[(0, 3), (5, 8), None, None], size=1, tokens=9)
@example(spans=[None, None, None], size=2, tokens=None)
def test_tokens_are_within_bounds_wherever_the_padding_is(
    spans: list[tuple[int, int] | None], size: int, tokens: int | None
) -> None:
    mask = torch.zeros(len(spans), COLUMNS, dtype=torch.long)
    for row, span in enumerate(spans):
        if span is not None:
            mask[row, min(span) : max(span) + 1] = 1
    lengths = Lengths(of="mask", relative_positions=True, microbatch_tokens=tokens)
    batch = {"tokens": torch.arange(mask.numel()).view(mask.shape), "mask": mask}
    pieces = cut_by_length(batch, size, lengths=lengths)
    assert sorted(torch.cat([piece.rows for piece in pieces]).tolist()) == list(range(len(spans)))
    for piece in pieces:
        got = take_piece(batch, piece, lengths=lengths)
        assert got["mask"].sum() == mask[piece.rows].sum()
        most = tokens or size * max(1, mask.sum(1).max().item())
        assert got["tokens"].shape[1] >= 1
        assert len(piece.rows) == 1 or got["tokens"].numel() <= most


@few
@given(sizes=LENGTHS, size=SIZES, seed=SEEDS)
def test_results_come_back_in_the_order_of_the_batch(sizes: list[int], size: int, seed: int) -> None:
    model, batch = reader(seed), ragged(seed, sizes)
    for lengths in ("mask", None):
        it = subject(model, size=size, lengths=lengths)
        results: list[Tensor] = []
        with it.accumulator.window() as window:
            for microbatch in window.split(batch):
                losses = each_row(it.model, microbatch)
                results.append(losses.detach())
                window.backward(mb.Loss(sum=losses.sum(), count=(microbatch["labels"] >= 0).sum()))
        expected = each_row(model, batch).detach()
        assert (window.in_order(results) - expected).abs().max() <= 1e-12
        if lengths and sizes != sorted(sizes, reverse=True):
            assert not torch.equal(torch.cat(results).argsort(), window.in_order(results).argsort()) or sizes == [
                *reversed(sizes)
            ]


@few
@given(rows=st.permutations(range(7)), cuts=st.sets(st.integers(1, 6)))
def test_in_order(rows: list[int], cuts: set[int]) -> None:
    at = [0, *sorted(cuts), 7]
    parts = [torch.tensor(rows[a:b]) for a, b in itertools.pairwise(at)]
    assert in_order([part * 10 for part in parts], parts).tolist() == [0, 10, 20, 30, 40, 50, 60]
    wide = in_order([torch.stack([part, -part], 1) for part in parts], parts)
    assert wide.tolist() == [[i, -i] for i in range(7)]


def test_nothing_random_is_drawn() -> None:
    model, batch = reader(0), ragged(0, [1, 9, 2, 0, 4])
    before = (torch.get_rng_state(), random.getstate())
    subject(model, size=2, lengths="mask").accumulator.step(batch, token_loss)
    assert torch.equal(torch.get_rng_state(), before[0])
    assert random.getstate() == before[1]
    torch.rand(1)
    assert not torch.equal(torch.get_rng_state(), before[0])


def test_the_batch_is_left_alone() -> None:
    model, batch = reader(0), ragged(0, [1, 9, 2, 0, 4])
    kept = {name: each.clone() for name, each in batch.items()}

    def scribble(model: nn.Module, batch: Batch) -> mb.Loss:
        loss = token_loss(model, {name: each.clone() for name, each in batch.items()})  # what backward will look at
        for each in batch.values():
            each.zero_()
        return loss

    it = subject(model, size=1, lengths="mask")
    it.accumulator.step(batch, scribble)
    assert all(torch.equal(batch[name], kept[name]) for name in kept)
    assert relative_error(it.updates[0], full_batch(model, token_mean, kept)) <= EXACT
    assert relative_error(it.updates[0], full_batch(model, token_mean, ragged(1, [1, 9, 2, 0, 4]))) > WRONG


# -- the best cut --------------------------------------------------------------------------------------------------


def cost_of(sizes: Sequence[int], cuts: Sequence[tuple[int, int]], overhead: int) -> int:
    return sum((end - begin) * max(sizes[begin:end]) + overhead for begin, end in cuts)


def all_cuts(rows: int) -> list[list[tuple[int, int]]]:
    ways = itertools.chain.from_iterable(itertools.combinations(range(1, rows), k) for k in range(rows))
    return [list(itertools.pairwise([0, *way, rows])) for way in ways]


@given(
    sizes=st.lists(st.integers(0, 30), min_size=1, max_size=8).map(lambda sizes: sorted(sizes, reverse=True)),
    most=st.integers(1, 120),
    overhead=st.integers(0, 40),
)
@example(sizes=[100, 99, 10, 9, 8], most=200, overhead=20)
def test_no_cut_is_better(sizes: list[int], most: int, overhead: int) -> None:
    cuts = best_cuts(sizes, most=most, overhead=overhead)
    assert cuts[0][0] == 0
    assert cuts[-1][1] == len(sizes)
    assert all(left[1] == right[0] for left, right in itertools.pairwise(cuts))
    allowed = [
        way
        for way in all_cuts(len(sizes))
        if all(end == begin + 1 or (end - begin) * sizes[begin] <= most for begin, end in way)
    ]
    assert cuts in allowed
    assert cost_of(sizes, cuts, overhead) == min(cost_of(sizes, way, overhead) for way in allowed)


@given(
    rows=st.lists(st.tuples(st.integers(0, 30), st.integers(1, 30)), min_size=1, max_size=7),
    most=st.integers(1, 120),
    overhead=st.integers(0, 40),
)
@example(rows=[(0, 4), (5, 4), (0, 3)], most=12, overhead=9)
def test_no_cut_is_better_wherever_the_rows_start(rows: list[tuple[int, int]], most: int, overhead: int) -> None:
    rows = sorted(rows, key=lambda row: -row[1])

    def tokens(begin: int, end: int) -> int:
        group = rows[begin:end]
        return len(group) * (max(start + size for start, size in group) - min(start for start, _ in group))

    def cost(way: Sequence[tuple[int, int]]) -> int:
        return sum(tokens(*piece) + overhead for piece in way)

    cuts = best_cuts([size for _, size in rows], starts=[start for start, _ in rows], most=most, overhead=overhead)
    allowed = [
        way for way in all_cuts(len(rows)) if all(end == begin + 1 or tokens(begin, end) <= most for begin, end in way)
    ]
    assert cuts in allowed
    assert cost(cuts) == min(cost(way) for way in allowed)


def test_by_hand_cuts_of_equal_size_cost_more() -> None:
    sizes = [100, 99, 10, 9, 8, 7]
    equal = [(0, 3), (3, 6)]
    assert cost_of(sizes, best_cuts(sizes, most=300, overhead=20), 20) < cost_of(sizes, equal, 20)


def test_one_by_one_cuts_cost_more_where_a_microbatch_is_dear() -> None:
    sizes = [10] * 6
    assert len(best_cuts(sizes, most=60, overhead=0)) >= 1
    assert best_cuts(sizes, most=60, overhead=5) == [(0, 6)]
    assert best_cuts(sizes, most=20, overhead=5) == [(0, 2), (2, 4), (4, 6)]


def test_padding_is_really_left_out() -> None:
    sizes = [9] + [1] * 8
    seen: list[int] = []

    def loss_fn(model: nn.Module, batch: Batch) -> mb.Loss:
        seen.append(batch["tokens"].numel())
        return token_loss(model, batch)

    for lengths in (Lengths(of="mask", overhead=1), None):
        seen.clear()
        subject(reader(0), size=3, lengths=lengths).accumulator.step(ragged(0, sizes), loss_fn)
        assert sum(seen) == (9 + 8 if lengths else 9 * 9)


# -- refused by name -----------------------------------------------------------------------------------------------


def pair_mask(batch: Any) -> Any:
    return {**batch, "pairs": torch.ones(len(batch["mask"]), COLUMNS, COLUMNS)}


def pair_mask_with_heads(batch: Any) -> Any:
    return {**batch, "pairs": torch.ones(len(batch["mask"]), 1, COLUMNS, COLUMNS)}


def packed(batch: Any, *, name: str) -> Any:
    return {**batch, name: torch.zeros(len(batch["mask"]), dtype=torch.int32)}


def without_rows(batch: Any) -> Any:
    return {**batch, "mask": mb.Whole(batch["mask"][:-1])}


Change = Callable[[Any], Any]
REFUSED: dict[str, tuple[Change, Lengths, type[Exception], str]] = {
    "cu_seqlens": (functools.partial(packed, name="cu_seqlens"), Lengths(of="mask"), BatchError, "cu_seqlens"),
    "cu_seq_lens_q": (functools.partial(packed, name="cu_seq_lens_q"), Lengths(of="mask"), BatchError, "cu_seq_lens_q"),
    "seq_idx": (functools.partial(packed, name="seq_idx"), Lengths(of="mask"), BatchError, "seq_idx"),
    "pairs": (pair_mask, Lengths(of="mask"), BatchError, "pairs"),
    "pairs with heads": (pair_mask_with_heads, Lengths(of="mask"), BatchError, "pairs"),
    "name": (lambda batch: batch, Lengths(of="attention_mask"), ConfigError, "attention_mask"),
    "too long": (lambda batch: batch | {"lengths": batch["lengths"] + 9}, Lengths(of="lengths"), BatchError, "9"),
    "negative": (lambda batch: batch | {"lengths": batch["lengths"] - 9}, Lengths(of="lengths"), BatchError, "-"),
    "rows": (lambda batch: batch, Lengths(of=lambda batch: batch["mask"][:-1]), BatchError, "shape"),
    "dimensions": (lambda batch: batch, Lengths(of=lambda batch: batch["mask"].unsqueeze(2)), BatchError, "shape"),
    "0-d": (lambda batch: batch, Lengths(of=lambda batch: batch["mask"].sum()), BatchError, "shape"),
    "columns": (lambda batch: batch, Lengths(of=lambda batch: batch["mask"][:, :-1]), BatchError, "columns"),
    "mask for rows it does not have": (without_rows, Lengths(of="mask"), BatchError, "shape"),
    "no numbers": (lambda batch: batch, Lengths(of=lambda _: ["a", "b", "c", "d"]), BatchError, "read"),  # pyright: ignore[reportArgumentType]
    "keys": (lambda batch: batch, Lengths(of="mask", keys=["tokens", "lengths"]), BatchError, "keys"),
    "keys of another width": (
        lambda batch: batch | {"image": torch.zeros(len(batch["mask"]), 3)},
        Lengths(of="mask", keys=["tokens", "image"]),
        BatchError,
        "image",
    ),
    "columns in the last dimension": (
        lambda batch: batch | {"bias": torch.zeros(len(batch["mask"]), 1, 1, COLUMNS)},
        Lengths(of="mask"),
        BatchError,
        "bias",
    ),
    "two widths": (
        lambda batch: batch | {"image": torch.zeros(len(batch["mask"]), 3)},
        Lengths(of="lengths"),
        BatchError,
        "keys",
    ),
}


@pytest.mark.parametrize("case", REFUSED)
def test_refused_by_name(case: str) -> None:
    change, lengths, error, words = REFUSED[case]
    batch = ragged(0, [1, 8, 2, 4])
    it = subject(reader(0), size=2, lengths=lengths)
    before = [each.detach().clone() for each in it.model.parameters()]
    with pytest.raises(error, match=words):
        it.accumulator.step(change(batch), token_loss)
    assert it.updates == []
    assert all(torch.equal(a, b) for a, b in zip(before, it.model.parameters(), strict=True))
    step = subject(reader(0), size=2, lengths=Lengths(of="mask")).accumulator.step(batch, token_loss)
    assert step.applied


@pytest.mark.parametrize("lengths", [Lengths(of="mask"), Lengths(of="lengths", side="left")], ids=["mask", "lengths"])
def test_left_padding_without_position_ids_is_refused(lengths: Lengths) -> None:
    sizes = [1, 9, 2, 4]
    with pytest.raises(BatchError, match="position_ids"):
        subject(reader(0), size=2, lengths=lengths).accumulator.step(ragged(0, sizes, left=True), token_loss)
    batch = ragged(0, sizes, left=True, position_ids=True)
    assert subject(reader(0), size=2, lengths=lengths).accumulator.step(batch, token_loss).applied


def test_left_padding_with_position_ids_that_are_not_trimmed_is_refused_or_right() -> None:
    batch: dict[str, Any] = ragged(0, [1, 9, 2, 4], left=True)
    batch["position_ids"] = mb.Whole(torch.arange(COLUMNS))
    with pytest.raises(BatchError, match="position_ids"):
        subject(reader(0), size=2, lengths="mask").accumulator.step(batch, token_loss)


@pytest.mark.parametrize(
    ("arguments", "word"),
    [
        ({"side": "centre"}, "side"),
        ({"microbatch_tokens": 0}, "microbatch_tokens"),
        ({"overhead": -1}, "overhead"),
        ({"keys": "tokens"}, "keys"),
    ],
)
def test_settings_that_cannot_work(arguments: Mapping[str, Any], word: str) -> None:
    with pytest.raises(ConfigError, match=word):
        Lengths(of="mask", **arguments)
    assert Lengths(of="mask").of == "mask"
