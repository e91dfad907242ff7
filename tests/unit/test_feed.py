"""Microbatches arrive on the device as they were."""

import random
import time
from collections.abc import Iterator
from typing import Any

import pytest
import torch

from microbatch.batch.batch_tree import leaves
from microbatch.batch.prefetch import feed

CPU = torch.device("cpu")


def tensors_of(batch: object) -> list[torch.Tensor]:
    return [leaf for _, leaf in leaves(batch) if isinstance(leaf, torch.Tensor)]


def test_on_the_cpu_nothing_is_copied() -> None:
    microbatches = [{"x": torch.randn(3, 2), "n": 3, "deep": [torch.randn(3)]} for _ in range(4)]
    arrived = list(feed(microbatches, CPU))
    assert len(arrived) == 4
    for ours, theirs in zip(arrived, microbatches, strict=True):
        assert ours["n"] == 3
        for one, other in zip(tensors_of(ours), tensors_of(theirs), strict=True):
            assert one.untyped_storage().data_ptr() == other.untyped_storage().data_ptr()
            assert torch.equal(one, other)


def test_on_the_cpu_a_microbatch_is_asked_for_when_its_turn_comes() -> None:
    asked: list[int] = []

    def source() -> Iterator[torch.Tensor]:
        for index in range(3):
            asked.append(index)
            yield torch.tensor(index)

    arrived = feed(source(), CPU)
    assert asked == []
    for index, microbatch in enumerate(arrived):
        assert int(microbatch) == index
        assert asked == list(range(index + 1))


def test_no_microbatches_are_no_microbatches() -> None:
    assert list(feed([], CPU)) == []


def test_an_exception_in_the_source_reaches_the_caller() -> None:
    def source() -> Iterator[torch.Tensor]:
        yield torch.ones(1)
        raise ValueError("mine")

    arrived = feed(source(), CPU)
    assert next(arrived).item() == 1
    with pytest.raises(ValueError, match="mine"):
        next(arrived)


@pytest.fixture
def cuda() -> torch.device:
    return torch.device("cuda", torch.cuda.current_device())


def batches(number: int, rows: int, *, seed: int = 1) -> list[dict[str, Any]]:
    generator = torch.Generator().manual_seed(seed)
    return [
        {
            "x": torch.randn(rows, 1000, generator=generator),
            "index": torch.full((rows,), i),
            "n": i,
            "s": torch.tensor(i),
        }
        for i in range(number)
    ]


@pytest.mark.cuda
def test_on_cuda_everything_arrives_in_order_and_unchanged(cuda: torch.device) -> None:
    sent = batches(20, 50)
    arrived: list[Any] = []
    for index, microbatch in enumerate(feed(sent, cuda)):
        assert microbatch["n"] == index
        assert all(tensor.device == cuda for tensor in tensors_of(microbatch))
        arrived.append(microbatch)
    assert len(arrived) == 20
    for ours, theirs in zip(arrived, sent, strict=True):
        for one, other in zip(tensors_of(ours), tensors_of(theirs), strict=True):
            assert torch.equal(one.cpu(), other)


@pytest.mark.cuda
def test_on_cuda_values_are_right_however_late_the_device_reads_them(cuda: torch.device) -> None:
    # The device is kept busy, so the host runs far ahead: memory that is given away too early would be overwritten.
    sent = batches(60, 200)
    rng = random.Random(1)  # noqa: S311 - how long to wait
    sums: list[torch.Tensor] = []
    for microbatch in feed(sent, cuda):
        torch.cuda._sleep(rng.randrange(2_000_000))
        sums.append(microbatch["x"].sum(1).double().sum() + microbatch["index"].sum())
        del microbatch
        if rng.random() < 0.2:
            time.sleep(rng.random() / 200)
    for total, theirs in zip(sums, sent, strict=True):
        expected = theirs["x"].double().sum() + theirs["index"].sum()
        torch.testing.assert_close(total.cpu(), expected, rtol=1e-4, atol=1e-2)


@pytest.mark.cuda
def test_on_cuda_a_source_that_is_written_over_after_its_microbatch_is_done_does_no_harm(cuda: torch.device) -> None:
    page = torch.empty(100_000)
    seen: list[torch.Tensor] = []

    def source() -> Iterator[torch.Tensor]:
        for index in range(30):
            yield page.fill_(float(index)).clone()

    for microbatch in feed(source(), cuda):
        torch.cuda._sleep(500_000)
        seen.append(microbatch.mean())
    assert [round(value.item(), 3) for value in seen] == [float(index) for index in range(30)]


@pytest.mark.cuda
def test_on_cuda_what_is_there_already_is_not_copied(cuda: torch.device) -> None:
    there = [torch.randn(3, device=cuda) for _ in range(3)]
    for ours, theirs in zip(feed(there, cuda), there, strict=True):
        assert ours.data_ptr() == theirs.data_ptr()


@pytest.mark.cuda
def test_on_cuda_what_the_source_computes_there_is_finished_first(cuda: torch.device) -> None:
    def source() -> Iterator[torch.Tensor]:
        for index in range(10):
            torch.cuda._sleep(2_000_000)
            yield torch.full((1000,), float(index), device=cuda)

    values = [microbatch.mean() for microbatch in feed(source(), cuda)]
    assert [value.item() for value in values] == [float(index) for index in range(10)]


@pytest.mark.cuda
def test_on_cuda_the_device_does_not_keep_what_has_been_used(cuda: torch.device) -> None:
    megabytes = 8
    sent = [torch.ones(megabytes, 2**18) for _ in range(24)]
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    for microbatch in feed(sent, cuda):
        torch.cuda._sleep(20_000_000)  # the host has sent everything before the device has done anything
        microbatch.mul_(2)
        del microbatch
    torch.cuda.synchronize()
    assert torch.cuda.max_memory_allocated() - before <= 4 * megabytes * 2**20


@pytest.mark.cuda
def test_on_cuda_many_windows_reserve_no_more_than_one(cuda: torch.device) -> None:
    def window() -> int:
        for microbatch in feed([torch.ones(8, 2**18) for _ in range(4)], cuda):
            microbatch.mul_(2)
        torch.cuda.synchronize()
        return torch.cuda.memory_reserved()

    first = window()
    assert max(window() for _ in range(8)) <= first + 2**21
