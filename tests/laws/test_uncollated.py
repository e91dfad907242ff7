"""Laws E3, E6 and E9: samples that were not collated, values that no cut reaches, and numbers in lists and tuples."""

from __future__ import annotations

import functools
import warnings
from array import array
from collections import OrderedDict, UserDict, UserList, deque
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import microbatch as mb
from microbatch.batch.batch_tree import rows_of
from microbatch.batch.layouts import doubtful_numbers
from microbatch.errors import BatchError, RowsDisagreeError

ROWS = 6


def drawn(*shape: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(0), dtype=torch.float64)


def text(tokens: int = 6) -> dict[str, Tensor]:
    return {"input_ids": torch.zeros(tokens, dtype=torch.long), "labels": torch.zeros(tokens, dtype=torch.long)}


def features(rows: int = ROWS, tokens: int = 5) -> dict[str, Tensor]:
    return {"input_ids": torch.zeros(rows, tokens, dtype=torch.long), "labels": torch.zeros(rows, dtype=torch.long)}


@dataclass
class Sample:
    x: Tensor
    y: Tensor


# -- E3: samples ------------------------------------------------------------------------------------------------------

SAMPLES: dict[str, Callable[[], Any]] = {
    "one text": lambda: [text()],
    "two texts": lambda: [text(), text()],
    "two texts of two lengths": lambda: [text(6), text(9)],
    "two texts in a tuple": lambda: (text(), text()),
    "two texts in a dict": lambda: {"batch": [text(), text()]},
    "two texts of NumPy": lambda: [{"ids": np.zeros(6)}, {"ids": np.zeros(6)}],
    "two pairs": lambda: [(drawn(6, 4), drawn(6)), (drawn(6, 4), drawn(6))],
    "one pair": lambda: [(drawn(6), torch.tensor(1))],
    "two pairs in a list of one's own": lambda: UserList([(drawn(6, 4), drawn(6)), (drawn(6, 4), drawn(6))]),
    "two dataclasses": lambda: [Sample(drawn(6, 4), drawn(6)), Sample(drawn(6, 4), drawn(6))],
    "two dicts of sequences": lambda: [{"x": drawn(6, 4)}, {"x": drawn(6, 4)}],
    "two images": lambda: [drawn(3, 8, 8), drawn(3, 9, 8)],
    "two images in a tuple": lambda: (drawn(3, 8, 8), drawn(3, 9, 8)),
    "two images in a dict": lambda: {"images": [drawn(3, 8, 8), drawn(3, 9, 8)]},
    "two images of NumPy": lambda: [np.zeros((3, 8, 8)), np.zeros((3, 9, 8))],
    "one image with its targets": lambda: ([drawn(3, 8, 8)], [{"boxes": drawn(3, 4), "labels": drawn(3)}]),
    "two images with their targets": lambda: ([drawn(3, 8, 8)] * 2, [{"boxes": drawn(3, 4)}] * 2),
    "targets first, in a dict": lambda: {"targets": ({"boxes": drawn(3, 4)},), "images": (drawn(3, 8, 8),)},
}


@pytest.mark.parametrize("name", SAMPLES)
def test_e3_samples_are_refused_however_few_they_are(name: str) -> None:
    batch = SAMPLES[name]()
    it = mb.Accumulator(nn.Linear(4, 2), microbatch_size=2)
    with pytest.raises(BatchError, match=r"samples?, or .*collate.*mb\.Rows\("):
        it.gradient(batch, lambda model, _: model(torch.ones(1, 4)).mean())


BATCHES: dict[str, Callable[[], Any]] = {
    "x and y": lambda: [drawn(6, 4), drawn(6, 4)],
    "x and y of other sizes": lambda: (drawn(6, 96, 7), drawn(6, 48, 7)),
    "the last three rows of x and y": lambda: [drawn(3, 96, 7), drawn(3, 48, 7)],
    "the last four rows of x and y": lambda: [drawn(4, 96, 9), drawn(4, 48, 9)],
    "images and a mask": lambda: [drawn(3, 16, 16), torch.zeros(3, 9, 9, dtype=torch.bool)],
    "batches of images": lambda: [drawn(3, 3, 8, 8), drawn(3, 3, 9, 8)],
    "two loaders": lambda: (features(), features(tokens=9)),
    "pairs and their labels": lambda: ([features(), features()], drawn(6)),
    "texts and the labels of the rows": lambda: {"pairs": [text(), text()], "y": drawn(6)},
    "nested tuples, collated": lambda: [[drawn(6, 4), drawn(6)], [drawn(6, 4), drawn(6)]],
    "one dict in a list": lambda: [features()],
    "one flat dict in a tuple": lambda: (text(),),
    "inputs and targets": lambda: ({"x": drawn(6, 4)}, {"y": drawn(6)}),
    "marked texts": lambda: [{"ids": mb.Rows(drawn(6, 4))}, {"ids": mb.Rows(drawn(6, 4))}],
    "views and targets": lambda: ([drawn(6, 3, 8, 8)] * 2, [{"y": drawn(6)}] * 2),
}


@pytest.mark.parametrize("name", BATCHES)
def test_e3_what_has_another_form_is_a_batch(name: str) -> None:
    """The negative control: the same containers, with rows."""
    batch = BATCHES[name]()
    rows = rows_of(batch)
    assert len(mb.cut(batch, 2)) == -(-rows // 2)
    assert rows == (6 if "last" not in name and "images" not in name else len(batch[0]))


def test_e3_texts_of_other_lengths_are_to_be_collated() -> None:
    with pytest.raises(RowsDisagreeError, match=r"entries of batch\['ids'\] are samples, pad them and collate"):
        rows_of({"ids": [drawn(5), drawn(7)]})
    with pytest.raises(RowsDisagreeError) as caught:
        rows_of((drawn(6, 3), drawn(5)))
    assert "collate" not in str(caught.value)


def test_e3_a_list_of_ones_own_is_cut_as_a_list() -> None:
    batch = UserList([drawn(6, 4), drawn(6)])
    pieces = mb.cut(batch, 4)
    assert [type(each) for each in pieces] == [UserList, UserList]
    assert torch.equal(torch.cat([each[0] for each in pieces]), batch[0])
    texts = UserList([*"abcdef"])
    assert [list(each["t"]) for each in mb.cut({"x": drawn(6), "t": texts}, 4)] == [[*"abcd"], [*"ef"]]


# -- E6: values that no cut reaches -----------------------------------------------------------------------------------


class Holder:
    def __init__(self, **values: Any) -> None:
        self.__dict__.update(values)

    def method(self) -> None:
        """Do nothing."""


@dataclass
class Hidden:
    x: Tensor

    def __post_init__(self) -> None:
        self.again = self.x


@dataclass
class Cached:
    x: Tensor

    @cached_property
    def twice(self) -> Tensor:
        """Return what is computed once."""
        return 2 * self.x


class Mirrors(dict[str, Any]):
    """A dict whose attributes are not kept in step with its items."""

    def __init__(self, x: Tensor) -> None:
        super().__init__(x=x)
        self.x = x


class Extended(UserDict[str, Any]):
    """A dict with more beside its items."""

    def __init__(self, x: Tensor) -> None:
        super().__init__(x=x)
        self.weights = torch.ones(6)


class Dia:
    """As a diagonal matrix of SciPy: a shape and a dtype, arrays inside, and nothing to slice."""

    shape, dtype = (6, 6), np.dtype(float)

    def __init__(self) -> None:
        self.data, self.offsets = np.ones((1, 6)), np.zeros(1)


def closure(of: Any) -> Callable[[], Any]:
    return lambda: of


OUT_OF_REACH: dict[str, Callable[[], Any]] = {
    "an array in an object": lambda: Holder(w=np.ones(6)),
    "an array in a dict in an object": lambda: Holder(w={"a": [np.ones(6)]}),
    "a diagonal matrix": Dia,
    "a partial": lambda: functools.partial(torch.mul, torch.ones(6)),
    "a partial with a name": lambda: functools.partial(torch.mul, other=torch.ones(6)),
    "values of a dict": {"w": torch.ones(6)}.values,
    "items of a dict": {"w": np.ones(6)}.items,
    "values of an ordered dict": lambda: OrderedDict(w=torch.ones(6)).values(),
    "a closure": lambda: closure(torch.ones(6)),
    "a bound method": lambda: Holder(w=torch.ones(6)).method,
    "an attribute that is no field": lambda: Hidden(drawn(6, 2)),
    "an attribute that is no item": lambda: Mirrors(drawn(6, 2)),
    "an attribute beside a dict": lambda: Extended(drawn(6, 2)),
}


@pytest.mark.parametrize("name", OUT_OF_REACH)
def test_e6_tensors_and_arrays_that_no_cut_reaches_are_refused_unless_marked(name: str) -> None:
    value = OUT_OF_REACH[name]()
    with pytest.raises(BatchError, match=r"batch\['v'\].*tensors or arrays.*mb\.Whole\("):
        rows_of({"x": drawn(6, 2), "v": value})
    assert [each["v"] is value for each in mb.cut({"x": drawn(6, 2), "v": mb.Whole(value)}, 4)] == [True, True]


def test_e6_a_property_that_was_computed_before_the_cut_is_refused() -> None:
    batch = Cached(drawn(6, 2))
    assert len(mb.cut(batch, 4)[1].twice) == 2  # computed from the rows of the microbatch
    assert len(batch.twice) == 6
    with pytest.raises(BatchError, match=r"batch\.twice holds tensors"):
        mb.cut(batch, 4)


class InStep(OrderedDict[str, Any]):
    """As a model's output: every item is an attribute too."""

    def __setitem__(self, name: str, value: Any) -> None:
        super().__setitem__(name, value)
        super().__setattr__(name, value)


class Attributes(dict[str, Any]):
    """A dict that is its own attributes."""

    def __init__(self, **values: Any) -> None:
        super().__init__(**values)
        self.__dict__ = self


def test_e6_attributes_that_are_the_items_are_cut_with_them() -> None:
    batch = InStep()
    batch["x"] = drawn(6, 2)
    assert [len(each.x) for each in mb.cut(batch, 4)] == [4, 2]
    assert rows_of(Attributes(x=drawn(6, 2))) == 6


def unset() -> Callable[[], Any]:
    def function() -> Any:
        return later

    if ROWS > 6:
        later = 1
    return function


@pytest.mark.parametrize(
    "value",
    [
        pytest.param(np.random.default_rng(0), id="random numbers"),
        pytest.param(Holder(name="a", n=np.float64(1), zero=np.array(1.0)), id="numbers of NumPy"),
        pytest.param(functools.partial(max, 1), id="a partial of numbers"),
        pytest.param({"a": 1}.keys(), id="keys"),
        pytest.param(closure(1), id="a closure"),
        pytest.param(unset(), id="a variable without a value"),
        pytest.param("text".upper, id="a method of a text"),
        pytest.param(drawn, id="a function"),
    ],
)
def test_e6_objects_without_tensors_and_arrays_go_to_every_microbatch(value: Any) -> None:
    assert [each["v"] is value for each in mb.cut({"x": drawn(6, 2), "v": value}, 4)] == [True, True]


@dataclass
class Counted:
    x: Tensor
    cache: dict[str, int] = field(default_factory=dict[str, int])

    def __post_init__(self) -> None:
        self.name = "a"


def test_e6_a_dataclass_with_a_name_beside_its_fields_is_cut() -> None:
    assert [(len(each.x), each.name) for each in mb.cut(Counted(drawn(6, 2)), 4)] == [(4, "a"), (2, "a")]


# -- E9: numbers in lists and tuples ----------------------------------------------------------------------------------


@pytest.mark.parametrize("number", [2, 3, ROWS])
@pytest.mark.parametrize("make", [list, tuple, UserList, deque, lambda values: array("d", values)])
def test_e9_numbers_are_refused_whatever_holds_them(make: Callable[[list[float]], Any], number: int) -> None:
    values = make([0.5] * number)
    kind = BatchError if number == ROWS else RowsDisagreeError
    with pytest.raises(kind, match=r"mb\.Whole\("):
        mb.cut({"x": drawn(ROWS, 2), "w": values}, 4)
    with pytest.raises(BatchError, match=rf"list of {number} numbers.*class weights"):
        mb.cut({"x": drawn(number, 2), "w": values}, 4)
    assert all(each["w"] == values for each in mb.cut({"x": drawn(number, 2), "w": mb.Whole(values)}, 1))
    assert [list(each["w"]) for each in mb.cut({"x": drawn(number, 2), "w": mb.Rows(values)}, 1)] == [[0.5]] * number
    assert [len(each) for each in mb.cut(values, number - 1)] == [number - 1, 1]  # alone they are the rows


def test_e9_numbers_in_a_range_or_of_a_dict_are_refused_too() -> None:
    with pytest.raises(BatchError, match=r"batch\['w'\] is a list of 6 numbers"):
        rows_of({"x": drawn(ROWS, 2), "w": range(ROWS)})
    with pytest.raises(RowsDisagreeError):
        rows_of({"x": drawn(ROWS, 2), "w": range(10**12)})
    with pytest.raises(BatchError, match=r"batch\['w'\] is a list of 2 numbers"):
        rows_of({"x": drawn(2, 2), "w": {"a": 0.5, "b": 1.5}.values()})
    pieces = mb.cut({"x": drawn(ROWS, 2), "w": mb.Rows(range(ROWS), group=1), "n": mb.Whole(range(ROWS))}, 4)
    assert [each["w"] for each in pieces] == [range(4), range(4, 6)]
    assert [each["n"] for each in pieces] == [range(ROWS)] * 2
    assert [list(each) for each in mb.cut(range(ROWS), 4)] == [[0, 1, 2, 3], [4, 5]]


def test_e3_a_deque_is_cut_as_a_list() -> None:
    batch = deque([drawn(6, 4), drawn(6)])
    pieces = mb.cut(batch, 4)
    assert [type(each) for each in pieces] == [deque, deque]
    assert torch.equal(torch.cat([each[0] for each in pieces]), batch[0])
    assert [list(each["t"]) for each in mb.cut({"x": drawn(6), "t": deque("abcdef")}, 4)] == [[*"abcd"], [*"ef"]]
    with pytest.raises(BatchError, match="they could be 3 samples"):
        rows_of(deque([drawn(6, 4)] * 3))
    marked = mb.cut({"x": drawn(3), "images": mb.Rows(deque([drawn(3, 8, 8)] * 3))}, 2)
    assert [len(each["images"]) for each in marked] == [2, 1]


@pytest.mark.parametrize("values", [(True, False, True), (0.1, 2, 3), (torch.tensor(1.0), 2, 3)])
def test_e9_a_short_tuple_of_other_numbers_is_no_size(values: Any) -> None:
    with pytest.raises(BatchError, match="list of 3 numbers"):
        rows_of({"x": drawn(3, 2), "w": values})


@pytest.mark.parametrize("size", [(224, 224), (8, 9, 3), (np.int64(4), 4), torch.Size([1, 2, 3, 4, 5]), ()])
def test_e9_a_size_goes_to_every_microbatch(size: Any) -> None:
    assert [each["s"] for each in mb.cut({"x": drawn(ROWS, 2), "s": size}, 4)] == [size, size]


DOUBTFUL: dict[str, tuple[Any, str]] = {
    "lists of floats": ([[1.0, 2.0]] * ROWS, "list of 6 lists.*one list for each row.*mb.Whole.*mb.Rows"),
    "lists of whole numbers": ([[1, 2, 3]] * ROWS, "list of 6 lists"),
    "tuples in a list": ([(1.0, 2.0)] * ROWS, "list of 6 lists"),
    "deeper": ([[[1.0], [2.0]]] * ROWS, "list of 6 lists"),
}
CERTAIN: dict[str, Any] = {
    "lists of many lengths": [[1], [2, 3], [4], [5], [6], [7, 8, 9]],
    "texts": [[*"ab"]] * ROWS,
    "marked as rows": mb.Rows([[1.0, 2.0]] * ROWS),
    "marked as a value": mb.Whole([[1.0, 2.0]] * ROWS),
    "a size": (224, 224),
    "a shape": torch.Size([ROWS, 2]),
    "a number": 3,
}


def said(batch: Any) -> list[str]:
    """Return the warnings of two windows of one accumulator."""
    it = mb.Accumulator(nn.Linear(2, 1).double(), microbatch_size=1)
    with warnings.catch_warnings(record=True) as found:
        warnings.simplefilter("always")
        for _ in range(2):
            it.gradient(batch, lambda model, piece: model(piece["x"]).sum())
    return [str(each.message) for each in found if "numbers" in str(each.message)]


@pytest.mark.parametrize("name", DOUBTFUL)
def test_e9_lists_of_numbers_in_a_list_are_named_once(name: str) -> None:
    value, words = DOUBTFUL[name]
    with pytest.warns(mb.MicrobatchWarning, match=words):
        mb.Accumulator(nn.Linear(2, 1).double(), microbatch_size=4).gradient(
            {"x": drawn(ROWS, 2), "w": value}, lambda model, piece: model(piece["x"]).sum()
        )
    assert len(said({"x": drawn(ROWS, 2), "input_ids": value})) == 1
    assert [len(each["w"]) for each in mb.cut({"x": drawn(ROWS, 2), "w": value}, 4)] == [4, 2]
    assert doubtful_numbers({"w": value}) == ""  # alone, they are the rows


@pytest.mark.parametrize("name", CERTAIN)
def test_e9_what_is_certain_is_not_named(name: str) -> None:
    assert said({"x": drawn(ROWS, 2), "w": CERTAIN[name]}) == []


def test_e9_a_size_of_as_many_numbers_as_rows_is_named_once() -> None:
    (words,) = said({"x": drawn(2, 2), "hw": (224, 224)})
    assert "tuple of 2 whole numbers" in words
    assert "mb.Rows" in words
    assert said({"x": drawn(2, 2), "hw": mb.Whole((224, 224))}) == []
    assert said({"x": drawn(2, 2), "hw": torch.Size([224, 224])}) == []


def test_e9_check_names_the_numbers() -> None:
    batch = {"x": drawn(ROWS, 2), "w": [[1.0, 2.0]] * ROWS}
    found = mb.check(nn.Linear(2, 1).double(), lambda model, piece: model(piece["x"]).mean(), batch, microbatch_size=2)
    assert "list of 6 lists of numbers" in str(found)
