"""Laws E2, E4 and E9 for lists of numbers of every kind, and for values that can be read only once."""

from __future__ import annotations

import io
from collections.abc import Callable, Iterator
from decimal import Decimal
from fractions import Fraction
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import microbatch as mb
from microbatch.errors import BatchError

ROWS, SIZE = 6, 4
VALUES = [0.5, -1.0, 2.0, 0.25, 3.0, -2.0]

# Every one of these could be one number for each row, or class weights.
LISTS: dict[str, Callable[[], Any]] = {
    "float": lambda: list(VALUES),
    "float64": lambda: list(np.array(VALUES)),
    "float32": lambda: list(np.array(VALUES, dtype=np.float32)),
    "int64": lambda: list(np.arange(ROWS)),
    "bool": lambda: list(np.arange(ROWS) > 2),
    "0-d arrays": lambda: [np.array(each) for each in VALUES],
    "decimals": lambda: [Decimal(each) for each in VALUES],
    "fractions": lambda: [Fraction(each) for each in VALUES],
    "mixed": lambda: [1, 0.5, np.int64(3), np.float32(4), Decimal(5), 6j],
    "a tuple": lambda: tuple(np.arange(ROWS)),
}
TENSORS: dict[str, Callable[[], Any]] = {
    "0-d tensors": lambda: list(torch.tensor(VALUES)),
    "some 0-d tensors": lambda: [np.float32(1), 2.0, torch.tensor(3.0), 4, 5, 6],
}


def x() -> Tensor:
    return torch.randn(ROWS, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize("name", [*LISTS, *TENSORS])
def test_e9_a_list_of_numbers_beside_as_many_rows_is_refused_unless_it_is_marked(name: str) -> None:
    values = {**LISTS, **TENSORS}[name]()
    with pytest.raises(BatchError, match=r"batch\['w'\] is a list of 6 numbers.*class weights.*mb.Rows"):
        mb.cut({"x": x(), "w": values}, SIZE)
    assert [list(each["w"]) for each in mb.cut({"x": x(), "w": mb.Rows(values)}, SIZE)] == [
        list(values[:SIZE]),
        list(values[SIZE:]),
    ]
    assert all(list(each["w"]) == list(values) for each in mb.cut({"x": x(), "w": mb.Whole(values)}, SIZE))


@pytest.mark.parametrize("name", LISTS)
def test_e2_a_list_of_numbers_alone_has_one_for_each_row(name: str) -> None:
    values = LISTS[name]()
    pieces = mb.cut(values, SIZE)
    assert [len(piece) for piece in pieces] == [4, 2]
    assert [each for piece in pieces for each in piece] == list(values)


@pytest.mark.parametrize("name", TENSORS)
def test_e3_a_list_of_0d_tensors_alone_is_to_be_stacked(name: str) -> None:
    with pytest.raises(BatchError, match=r"0-d tensors: stack them into one tensor \(torch.stack\)"):
        mb.cut(TENSORS[name](), SIZE)


def test_e2_numbers_that_are_no_list_belong_to_the_whole_batch() -> None:
    batch = {"x": x(), "n": np.float32(2), "z": np.array(3.0), "size": (3, 4), "shape": x().shape}
    for piece in mb.cut(batch, SIZE):
        assert {name: piece[name] for name in batch if name != "x"} == {n: batch[n] for n in batch if n != "x"}


@pytest.mark.parametrize("value", [bytearray(b"abcdef"), memoryview(b"abcdef"), b"abcdef", "abcdef"])
def test_e2_bytes_and_texts_of_every_kind_belong_to_the_whole_batch(value: Any) -> None:
    assert [
        bytes(each["v"], "ascii") if isinstance(value, str) else bytes(each["v"])
        for each in mb.cut({"x": x(), "v": value}, SIZE)
    ] == [b"abcdef", b"abcdef"]


def test_e2_texts_of_numpy_are_one_for_each_row() -> None:
    assert [each["t"] for each in mb.cut({"x": x(), "t": list(np.array(list("abcdef")))}, SIZE)] == [
        ["a", "b", "c", "d"],
        ["e", "f"],
    ]


def targets() -> Iterator[Tensor]:
    yield from x()


@pytest.mark.parametrize(
    "make", [targets, lambda: iter([1, 2]), lambda: zip("ab", "cd", strict=True), lambda: map(str, [1])]
)
def test_e4_what_can_be_read_only_once_is_refused_or_handed_on(make: Callable[[], Any]) -> None:
    with pytest.raises(BatchError, match="read only once"):
        mb.cut({"x": x(), "v": make()}, SIZE)
    model = nn.Linear(3, 1, dtype=torch.float64)
    it = mb.Accumulator(model, torch.optim.SGD(model.parameters(), lr=0.1))
    for window in it.windows([{"x": x(), "v": make()}], microbatches=1):
        for microbatch in window:
            assert list(microbatch["v"])
            window.backward(model(microbatch["x"]).mean(), count=ROWS)


def test_e4_a_file_is_no_iterator_of_rows() -> None:
    assert len(mb.cut({"x": x(), "v": io.StringIO("text")}, SIZE)) == 2


@pytest.mark.parametrize("name", LISTS)
def test_the_comparison_sees_numbers_that_are_given_whole(name: str) -> None:
    # The negative control: numbers that every microbatch gets.
    pieces = [each["w"] for each in mb.cut({"x": x(), "w": mb.Whole(LISTS[name]())}, SIZE)]
    assert [each for piece in pieces for each in piece] != list(LISTS[name]())
