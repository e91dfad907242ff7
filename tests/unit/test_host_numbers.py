"""Numbers that are read from the device: in order, and as many copies as the device needs."""

from collections.abc import Generator
from contextlib import contextmanager

import pytest
import torch
from torch import Tensor

from microbatch.step.host_numbers import numbers_of

FOUND = [torch.tensor(1.5), 3, torch.tensor(0.1, dtype=torch.float64), torch.tensor(float("nan")), 2.5]


@contextmanager
def counted_reads(monkeypatch: pytest.MonkeyPatch) -> Generator[list[int]]:
    """Count the tensors that are read by the host."""
    reads = list[int]()

    def reader(name: str) -> None:
        plain = getattr(Tensor, name)

        def read(self: Tensor) -> object:
            reads.append(self.numel())
            return plain(self)

        monkeypatch.setattr(Tensor, name, read)

    with monkeypatch.context():
        for name in ("tolist", "__float__", "item"):
            reader(name)
        yield reads
    monkeypatch.undo()


@pytest.mark.parametrize("kind", ["cpu", "cuda"])  # the tensors are on the CPU: only the way they are read differs
def test_numbers_come_in_their_order_and_exactly(kind: str) -> None:
    found = numbers_of(FOUND, torch.device(kind))
    assert found[:3] == [1.5, 3.0, 0.1]
    assert found[3] != found[3]
    assert found[4] == 2.5
    assert all(type(each) is float for each in found)


def test_a_device_is_read_once(monkeypatch: pytest.MonkeyPatch) -> None:
    with counted_reads(monkeypatch) as reads:
        numbers_of(FOUND, torch.device("cuda"))
    assert reads == [3]
