"""Peak memory is predicted by microbatch size and sequence length together, terms in the length squared included."""

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

import microbatch as mb
from microbatch.errors import ConfigError
from microbatch.memory.allocator import AllocatorMeter
from microbatch.memory.ledger import Timeline
from microbatch.memory.length_curves import Lengthwise
from microbatch.memory.predict import predict
from microbatch.step.options import Options
from microbatch.step.size.dry_run_lengths import dry_run_lengths, some_columns

# The profiler says so of every build without a GPU.
pytestmark = pytest.mark.filterwarnings("ignore::UserWarning:torch.*")

WORDS = 40
NUMBERS = 512  # what a window keeps of each of its microbatches is a few numbers
CLOSE = 0.005


class Attention(nn.Module):
    """Attention that keeps the scores of every pair of positions, and a mask over them for all rows alike."""

    def __init__(self, width: int, *, fused: bool) -> None:
        super().__init__()
        self.inner = nn.Linear(width, 3 * width)
        self.fused = fused

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.inner(x).chunk(3, dim=-1)
        if self.fused:
            heads = [each.unflatten(2, (2, -1)).transpose(1, 2) for each in (q, k, v)]
            return x + F.scaled_dot_product_attention(*heads, is_causal=True).transpose(1, 2).flatten(2)
        mask = torch.ones(x.shape[1], x.shape[1]).triu(1).bool()
        return x + (q @ k.transpose(1, 2)).masked_fill(mask, -1e9).softmax(-1) @ v


def language(width: int, *, fused: bool) -> nn.Module:
    return nn.Sequential(
        nn.Embedding(WORDS, width),
        Attention(width, fused=fused),
        nn.Tanh(),
        Attention(width, fused=fused),
        nn.Linear(width, WORDS),
    )


def next_word(model: nn.Module, ids: Tensor) -> Tensor:
    return F.cross_entropy(model(ids).flatten(0, 1), ids.flatten())


def described(model: nn.Module, **changed: Any) -> Options:
    given: dict[str, Any] = {
        "model": model,
        "optimizers": [torch.optim.AdamW(model.parameters(), lr=0.01)],
        "microbatch_size": 1,
    }
    return Options(**given | changed)


def measured(it: Options, loss_fn: Callable[..., Any], batch: Tensor, size: int, *, meter: mb.MemoryMeter) -> Any:
    """Run two real windows of the real accumulator, on copies."""
    model, optimizers = copy.deepcopy((it.model, list(it.optimizers)))
    accumulator = mb.Accumulator(model, optimizers, microbatch_size=size, autocast=it.autocast)
    meter.track(model, *optimizers, batch)
    with meter:
        for _ in range(2):
            accumulator.step(batch, loss_fn)
    return meter


def rehearsed(it: Options, *, rows: int, lengths: tuple[int, ...] = (6, 12, 24), witness: tuple[int, ...] = ()) -> Any:
    batches = {length: torch.randint(WORDS, (rows, length)) for length in lengths}
    return dry_run_lengths(it, next_word, batches=batches, sizes=(2, 4), witness=witness)


@given(
    fused=st.booleans(),
    width=st.sampled_from([8, 32]),
    autocast=st.sampled_from([None, torch.bfloat16]),
    size=st.sampled_from([2, 5, 9]),
    length=st.sampled_from([3, 17, 40, 100]),
)
@settings(max_examples=2)
def test_the_peak_at_any_size_and_length_is_predicted(
    fused: bool, width: int, autocast: Any, size: int, length: int
) -> None:
    it, batch = described(language(width, fused=fused), autocast=autocast), torch.randint(WORDS, (2 * size, length))
    found = rehearsed(it, rows=2 * size)
    truth = measured(it, next_word, batch, size, meter=mb.MemoryMeter()).peak_bytes
    assert found.peak_bytes(size, length=length) == pytest.approx(truth, abs=NUMBERS)


def test_a_line_through_two_lengths_is_not_enough() -> None:
    it, batch = described(language(8, fused=False)), torch.randint(WORDS, (8, 200))
    found = rehearsed(it, rows=8)
    truth = measured(it, next_word, batch, 4, meter=mb.MemoryMeter()).peak_bytes
    assert found.peak_bytes(4, length=200) == pytest.approx(truth, rel=CLOSE)
    by_length = found.by_length(4)
    blind = predict(lambda length: by_length.predicted_run(length).timeline, sizes=(12, 24)).peak_bytes(200)
    assert blind < (1 - 10 * CLOSE) * truth


def test_the_parts_are_the_whole_and_know_what_grows() -> None:
    it = described(language(8, fused=False))
    weights = sum(parameter.nbytes for parameter in it.model.parameters())
    found = rehearsed(it, rows=8, witness=(2, 4)).by_length(4)
    parts = found.parts(200)
    assert sum(parts.values()) == found.peak_bytes(200)
    assert parts["parameters"] == parts["gradients"] == weights
    assert parts["inputs"] == (8 + 4) * 200 * 8  # the batch, and the copy of a microbatch
    assert parts["activations"] > 4 * 4 * 200 * 200


def test_what_fits_is_found_in_both_directions() -> None:
    found = rehearsed(described(language(8, fused=False)), rows=8)
    budget = found.peak_bytes(7, length=90)
    assert found.largest(budget, length=90) == 7
    assert found.longest(budget, microbatch_size=7) == 90
    assert found.largest(budget - 1, length=90) == 6
    assert found.longest(budget - 1, microbatch_size=7) == 89


class Last(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.tokens = nn.Embedding(WORDS, 16)
        self.layers = nn.LSTM(16, 48, batch_first=True)
        self.head = nn.Linear(48, WORDS)

    def forward(self, ids: Tensor) -> Tensor:
        return self.head(self.layers(self.tokens(ids))[0])


@pytest.fixture(scope="module")
def witnessed() -> tuple[Options, Lengthwise]:
    it = described(Last())
    return it, rehearsed(it, rows=24, lengths=(10, 20, 40), witness=(1, 2, 4, 8))


def test_workspaces_are_in_the_prediction_at_every_length(witnessed: tuple[Options, Lengthwise]) -> None:
    it, found = witnessed
    batch = torch.randint(WORDS, (24, 50))
    truth = AllocatorMeter(torch.device("cpu"))
    measured(it, next_word, batch, 12, meter=truth)
    allocated = truth.witnessed().peak_bytes
    assert (1 - CLOSE) * allocated <= found.peak_bytes(12, length=50) <= 1.05 * allocated
    blind = rehearsed(it, rows=24, lengths=(10, 20, 40))
    assert blind.peak_bytes(12, length=50) < (1 - CLOSE) * allocated


def test_where_it_was_rehearsed_it_says_what_was_measured(witnessed: tuple[Options, Lengthwise]) -> None:
    _, found = witnessed
    for length, each in found.predictions.items():
        for size in (1, 2, 4, 8):
            assert found.peak_bytes(size, length=length) == each.peak_bytes(size)


def test_both_in_one_term() -> None:
    def at(length: int) -> Any:
        def run(m: int) -> Timeline:
            live = [900, 10 * m + 3 * length, m * length**2 + 2 * m * m * length]
            return Timeline(operators=["a", "b", "c"], live=live, storages=[])

        return predict(run, sizes=(2, 4, 8))

    found = Lengthwise({length: at(length) for length in (8, 16, 32)})
    assert found.peak_bytes(20, length=500) == 20 * 500**2 + 2 * 20 * 20 * 500
    assert found.peak_bytes(1, length=1) == 900


@pytest.mark.parametrize("lengths", [(8, 16), (16, 8, 32), (0, 8, 16)])
def test_lengths_that_cannot_be_fitted_are_refused(lengths: tuple[int, ...]) -> None:
    one = predict(lambda m: Timeline(operators=["a"], live=[m], storages=[]))
    with pytest.raises(ConfigError, match="lengths must be three or more"):
        Lengthwise(dict.fromkeys(lengths, one))


def test_columns_are_cut_and_repeated_where_there_are_columns() -> None:
    batch = {"ids": torch.arange(6).reshape(2, 3), "label": torch.arange(2), "image": torch.zeros(2, 5, 3)}
    wide, narrow = some_columns(batch, 7, columns=3), some_columns(batch, 2, columns=3)
    assert wide["ids"].tolist() == [[0, 1, 2, 0, 1, 2, 0], [3, 4, 5, 3, 4, 5, 3]]
    assert narrow["ids"].tolist() == [[0, 1], [3, 4]]
    assert all(made["label"] is batch["label"] and made["image"] is batch["image"] for made in (wide, narrow))
