"""The meter counts what the allocator counts, and holds it under a budget."""

import gc
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from tests.allocations import allocated_peak
from torch import Tensor, nn

from microbatch.errors import MicrobatchError, OutOfMemoryError
from microbatch.memory.meter import MemoryMeter
from microbatch.step.accumulator import Accumulator

# The profiler says so of every build without a GPU, and of every run that it does not export.
pytestmark = pytest.mark.filterwarnings("ignore::UserWarning:torch.*")


class Block(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.norm, self.qkv, self.out = nn.LayerNorm(width), nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.mlp = nn.Sequential(
            nn.LayerNorm(width), nn.Linear(width, 4 * width), nn.GELU(), nn.Linear(4 * width, width)
        )

    def forward(self, x_BTC: Tensor) -> Tensor:
        B, T, C = x_BTC.shape
        q, k, v = self.qkv(self.norm(x_BTC)).view(B, T, 3, 4, C // 4).permute(2, 0, 3, 1, 4)
        mixed = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        x_BTC = x_BTC + self.out(mixed.transpose(1, 2).reshape(B, T, C))
        return x_BTC + self.mlp(x_BTC)


class Gpt(nn.Module):
    """As small as it can be and still have what makes a language model's memory: attention, tied and large logits."""

    def __init__(self, vocabulary: int = 300, width: int = 32, length: int = 32) -> None:
        super().__init__()
        self.tokens, self.places = nn.Embedding(vocabulary, width), nn.Embedding(length, width)
        self.blocks = nn.Sequential(Block(width), Block(width))
        self.norm, self.head = nn.LayerNorm(width), nn.Linear(width, vocabulary, bias=False)
        self.head.weight = self.tokens.weight

    def forward(self, ids_BT: Tensor) -> Tensor:
        x_BTC = self.tokens(ids_BT) + self.places.weight[: ids_BT.shape[1]]
        return self.head(self.norm(self.blocks(x_BTC)))


def mlp() -> tuple[nn.Module, Tensor, Callable[[nn.Module, Tensor], Tensor]]:
    model = nn.Sequential(nn.Linear(100, 200), nn.ReLU(), nn.Dropout(0.1), nn.Linear(200, 50), nn.Tanh())
    return model, torch.randn(64, 100), lambda model, x: (model(x) ** 2).mean()


def gpt() -> tuple[nn.Module, Tensor, Callable[[nn.Module, Tensor], Tensor]]:
    def loss_fn(model: nn.Module, ids: Tensor) -> Tensor:
        logits = model(ids[:, :-1])
        return F.cross_entropy(logits.flatten(0, 1), ids[:, 1:].flatten())

    return Gpt(), torch.randint(300, (6, 33)), loss_fn


@pytest.mark.parametrize("make", [mlp, gpt])
@pytest.mark.parametrize("optimizer_class", [torch.optim.SGD, torch.optim.AdamW])
def test_the_peak_of_a_training_step_is_the_allocators(make: Any, optimizer_class: Any) -> None:
    model, batch, loss_fn = make()
    optimizer = optimizer_class(model.parameters(), lr=0.01)

    def run() -> None:
        for _ in range(2):  # the second time with optimizer state
            loss_fn(model, batch).backward()
            optimizer.step()
            optimizer.zero_grad()

    run()  # what is made once is made now
    truth = allocated_peak(run)
    gc.collect()
    meter = MemoryMeter()
    meter.track(model, optimizer, batch)
    before = meter.live_bytes
    with meter:
        run()
    assert truth > 100_000
    assert meter.peak_bytes - before == pytest.approx(truth, rel=0.01)
    assert meter.live_bytes == before


@pytest.mark.parametrize("make", [mlp, gpt])
def test_the_comparison_with_the_allocator_sees_another_batch(make: Any) -> None:
    model, batch, loss_fn = make()
    whole = allocated_peak(lambda: loss_fn(model, batch).backward())
    model.zero_grad()
    half = allocated_peak(lambda: loss_fn(model, batch[: len(batch) // 2]).backward())
    assert half < 0.95 * whole


def test_live_bytes_are_what_is_alive() -> None:
    meter = MemoryMeter()
    with meter:
        a = torch.zeros(1000)
        assert meter.live_bytes == 4000
        b = a.view(10, 100)[2:]  # a view is not another storage
        c = a + 1
        assert meter.live_bytes == 8000
        del a
        assert meter.live_bytes == 8000  # b holds it
        del b
        assert meter.live_bytes == 4000
    del c
    assert meter.live_bytes == 0
    assert meter.peak_bytes == 8000


def test_every_tensor_of_an_operator_with_several_is_counted() -> None:
    meter = MemoryMeter()
    source = torch.randn(100)
    meter.track(source)
    with meter:
        values, order = source.sort()
        assert meter.live_bytes == 400 + 400 + 800
        del values, order
    assert meter.live_bytes == 400


def test_tensors_without_bytes_are_not_confused_with_one_another() -> None:
    meter = MemoryMeter()
    with meter:
        empty = [torch.zeros(0) for _ in range(3)]
        one = torch.zeros(1)
    del empty
    assert meter.live_bytes == 4
    del one
    assert meter.live_bytes == 0


# -- what is named to track -------------------------------------------------------------------------------------------


def test_a_module_is_its_parameters_buffers_and_gradients_once_each() -> None:
    model = nn.Sequential(nn.Linear(10, 10, bias=False), nn.BatchNorm1d(10))
    model.append(model[0])  # used twice, there once
    meter = MemoryMeter()
    meter.track(model)
    parameters = 400 + 2 * 40
    buffers = 2 * 40 + 8
    assert meter.live_bytes == parameters + buffers
    model(torch.randn(4, 10)).sum().backward()
    meter.track(model)
    assert meter.live_bytes == 2 * parameters + buffers
    model.zero_grad()
    assert meter.live_bytes == parameters + buffers


def test_an_optimizer_is_its_state() -> None:
    model = nn.Linear(10, 10, bias=False)
    optimizer = torch.optim.AdamW(model.parameters())
    meter = MemoryMeter()
    meter.track(optimizer)
    assert meter.live_bytes == 0
    model(torch.randn(4, 10)).sum().backward()
    optimizer.step()
    meter.track(optimizer)
    assert meter.live_bytes == 2 * 400 + 4  # two moments and the number of steps
    meter.track(model, optimizer)
    assert meter.live_bytes == 4 * 400 + 4


def test_nested_structures_are_their_tensors_once_each() -> None:
    x = torch.zeros(10)
    meter = MemoryMeter()
    meter.track({"a": [x, (torch.zeros(5), 3, None, "text")], "again": x}, x[2:])
    assert meter.live_bytes == 40  # the five zeros died with the structure
    nested = {"model": nn.Linear(2, 2), "deep": {"y": torch.zeros(3)}}
    meter.track(nested)
    assert meter.live_bytes == 40 + 24 + 12


def test_a_sparse_tensor_is_its_indices_and_values() -> None:
    sparse = torch.eye(8).to_sparse()
    meter = MemoryMeter()
    meter.track(sparse)
    assert meter.live_bytes == 8 * 2 * 8 + 8 * 4


# -- the budget -------------------------------------------------------------------------------------------------------


def test_passing_the_budget_is_out_of_memory_and_says_by_what() -> None:
    meter = MemoryMeter(budget=10_000)
    with meter:
        fits = torch.zeros(2000)
        with pytest.raises(OutOfMemoryError) as caught:
            torch.zeros(1000)
    assert isinstance(caught.value, torch.OutOfMemoryError)
    assert isinstance(caught.value, MicrobatchError)
    for words in ["9.77 KiB", "3.91 KiB", "7.81 KiB", "microbatch_size", "memory_budget", "aten."]:
        assert words in str(caught.value)
    assert len(fits) == 2000


def test_exactly_the_budget_fits() -> None:
    with MemoryMeter(budget=4000) as meter:
        assert len(torch.zeros(1000)) == 1000
    assert meter.peak_bytes == 4000


def test_what_is_freed_can_be_used_again() -> None:
    with MemoryMeter(budget=5000):
        for _ in range(10):
            torch.zeros(1000)


def peak(run: Callable[[], object], *tracked: object) -> int:
    meter = MemoryMeter()
    meter.track(*tracked)
    with meter:
        run()
    return meter.peak_bytes


@pytest.mark.parametrize("where", ["forward", "backward"])
def test_a_step_that_passes_its_budget_puts_everything_back(where: str) -> None:
    torch.manual_seed(2)
    model = nn.Sequential(nn.Linear(64, 64), nn.BatchNorm1d(64), nn.Dropout(0.5), nn.Linear(64, 64))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    # In forward one activation is more than the gradients, which a budget has to hold in any case.
    size = 16 if where == "backward" else 512
    batch = torch.randn(2 * size, 64)
    reached: list[str] = []

    def loss_fn(model: nn.Module, x: Tensor) -> Tensor:
        reached.append("forward")
        loss = model(x).square().mean()
        reached.append("backward")
        return loss

    static = peak(lambda: None, model, optimizer)
    # With the first gradients in place, the second microbatch has less room; a byte below the peak fails in backward.
    free = Accumulator(model, optimizer, microbatch_size=size, memory_budget="1 GiB", batch_norm="microbatch").step(
        batch, loss_fn
    )
    assert free.peak_bytes is not None
    # Beside model and gradients there is room for the batch and the copy of one microbatch, not for an activation.
    copied = batch.nbytes // 2
    budget = free.peak_bytes - 1 if where == "backward" else 2 * static + batch.nbytes + copied + 8192
    last = list(model.parameters())[-1]
    last.grad = mine = torch.full_like(last, 5.0)
    weights = [parameter.detach().clone() for parameter in model.parameters()]
    buffers = [buffer.clone() for buffer in model.buffers()]
    state = torch.get_rng_state()
    reached.clear()
    accumulator = Accumulator(model, optimizer, microbatch_size=size, memory_budget=budget, batch_norm="microbatch")

    def loop() -> None:  # which cannot be run again, so that the error reaches it
        with accumulator.window() as window:
            for microbatch in window.split(batch):
                window.backward(loss_fn(model, microbatch))

    with pytest.raises(torch.OutOfMemoryError) as caught:
        loop()
    assert isinstance(caught.value, OutOfMemoryError)
    assert reached[-1] == where
    assert last.grad is mine
    assert mine.eq(5).all()
    assert [parameter.grad for parameter in model.parameters()][:-1] == [None] * 5
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), weights, strict=True))
    assert all(torch.equal(a, b) for a, b in zip(model.buffers(), buffers, strict=True))
    assert torch.equal(torch.get_rng_state(), state)
    # And the memory has come back with them: a smaller microbatch fits at once.
    if where == "backward":
        assert (
            Accumulator(model, optimizer, microbatch_size=4, memory_budget=budget, batch_norm="microbatch")
            .step(batch, loss_fn)
            .applied
        )


def test_the_budget_is_off_when_the_window_is_over() -> None:
    model = nn.Linear(8, 8)
    accumulator = Accumulator(
        model, torch.optim.SGD(model.parameters(), lr=0.1), microbatch_size=2, memory_budget="64 KiB"
    )
    step = accumulator.step(torch.randn(4, 8), lambda model, x: model(x).mean())
    assert step.peak_bytes is not None
    assert step.peak_bytes < 65536
    assert len(torch.zeros(100_000)) == 100_000
