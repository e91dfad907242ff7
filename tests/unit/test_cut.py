"""A batch is cut by its rows, whatever holds it, and nothing is copied."""

import types
from collections import OrderedDict, UserDict
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any, NamedTuple, cast

import numpy as np
import pytest
import torch
from hypothesis import assume, given
from hypothesis import strategies as st
from torch import Tensor
from torch.utils.data import default_collate

from microbatch.batch.batch_tree import Rows, Whole, leaves, map_leaves
from microbatch.batch.copies import rows_copied
from microbatch.batch.cut import check_microbatch_size, cut
from microbatch.errors import BatchError, ConfigError, EmptyBatchError, RowsDisagreeError


class Pair(NamedTuple):
    x: Tensor
    y: Tensor


@dataclass(frozen=True)
class Frozen:
    x: Tensor
    scale: float


@dataclass(frozen=True, slots=True)
class FrozenSlots:
    x: Tensor
    note: str


@dataclass
class WithComputedField:
    x: Tensor
    twice: Tensor = field(init=False)

    def __post_init__(self) -> None:
        self.twice = 2 * self.x


class Encoding(UserDict[str, Any]):
    """As tokenizers return: a dict with more beside its items, whose constructor takes other arguments."""

    def __init__(self, data: dict[str, Any], encodings: list[str]) -> None:
        super().__init__(data)
        self.encodings = encodings

    def __getattr__(self, name: str) -> Any:
        try:
            return self.__dict__["data"][name]
        except KeyError:
            raise AttributeError(name) from None


class ReadOnly(Mapping[str, Any]):
    """A Mapping that is made from another one, and of which nothing more is known."""

    def __init__(self, items: Mapping[str, Any]) -> None:
        self._items = dict(items)

    def __getitem__(self, key: str) -> Any:
        return self._items[key]

    def __iter__(self) -> Iterator[str]:
        return iter(self._items)

    def __len__(self) -> int:
        return len(self._items)


class KeywordsOnly(ReadOnly):
    """A Mapping that cannot be made from another one."""

    def __init__(self, **items: Any) -> None:
        super().__init__(items)


def x(rows: int = 7, width: int = 2) -> Tensor:
    """Return a tensor whose every value is different, so that a wrong row cannot go unseen."""
    return torch.arange(rows * width, dtype=torch.float64).view(rows, width)


def same(one: Any, other: Any) -> bool:
    """Tell whether two structures are equal, types and values."""
    ours, theirs = leaves(one), leaves(other)
    return [path for path, _ in ours] == [path for path, _ in theirs] and all(
        type(a) is type(b) and (torch.equal(a, b) if isinstance(a, Tensor) else np.array_equal(a, b))
        for (_, a), (_, b) in zip(ours, theirs, strict=True)
    )


def test_a_tensor() -> None:
    pieces = cut(x(7), 3)
    assert [len(piece) for piece in pieces] == [3, 3, 1]
    assert torch.equal(torch.cat(pieces), x(7))


@pytest.mark.parametrize(
    ("batch", "second"),
    [
        pytest.param({"x": x(3), "n": 5}, {"x": x(3)[2:], "n": 5}, id="dict"),
        pytest.param([x(3), x(3) + 1], [x(3)[2:], x(3)[2:] + 1], id="list"),
        pytest.param((x(3), None), (x(3)[2:], None), id="tuple"),
        pytest.param(Pair(x(3), x(3, 1)), Pair(x(3)[2:], x(3, 1)[2:]), id="named tuple"),
        pytest.param(Frozen(x(3), 0.5), Frozen(x(3)[2:], 0.5), id="frozen dataclass"),
        pytest.param(FrozenSlots(x(3), "a"), FrozenSlots(x(3)[2:], "a"), id="frozen dataclass with slots"),
        pytest.param(OrderedDict(b=x(3), a=x(3)), OrderedDict(b=x(3)[2:], a=x(3)[2:]), id="OrderedDict"),
        pytest.param(ReadOnly({"x": x(3)}), ReadOnly({"x": x(3)[2:]}), id="Mapping"),
        pytest.param({"x": x(3), "t": torch.tensor(0.7)}, {"x": x(3)[2:], "t": torch.tensor(0.7)}, id="0-d tensor"),
        pytest.param({"x": x(3), "text": "abc"}, {"x": x(3)[2:], "text": "abc"}, id="a text of as many letters"),
        pytest.param({"x": x(3), "b": b"abc"}, {"x": x(3)[2:], "b": b"abc"}, id="bytes of as many"),
        pytest.param({"x": x(3), "n": None}, {"x": x(3)[2:], "n": None}, id="None"),
        pytest.param({"x": x(3), "ids": ["a", "b", "c"]}, {"x": x(3)[2:], "ids": ["c"]}, id="list of texts"),
        pytest.param({"x": x(3), "ids": ("a", "b", "c")}, {"x": x(3)[2:], "ids": ("c",)}, id="tuple of texts"),
        pytest.param({"x": x(3), "ids": [[4], [5], [6]]}, {"x": x(3)[2:], "ids": [[6]]}, id="list of lists"),
        pytest.param([4, 5, 6], [6], id="numbers alone"),
        pytest.param({"x": x(3), "hw": (8, 9, 3)}, {"x": x(3)[2:], "hw": (8, 9, 3)}, id="tuple of numbers"),
        pytest.param({"x": x(3), "empty": []}, {"x": x(3)[2:], "empty": []}, id="empty list"),
        pytest.param({"x": x(3), "empty": {}}, {"x": x(3)[2:], "empty": {}}, id="empty dict"),
        pytest.param({"x": x(3), "empty": ()}, {"x": x(3)[2:], "empty": ()}, id="empty tuple"),
        pytest.param({"x": np.arange(3)}, {"x": np.arange(3)[2:]}, id="NumPy array"),
        pytest.param({"x": x(3), "n": np.float64(2)}, {"x": x(3)[2:], "n": np.float64(2)}, id="NumPy number"),
        pytest.param({"x": x(3), "n": np.array(2.0)}, {"x": x(3)[2:], "n": np.array(2.0)}, id="NumPy 0-d array"),
        pytest.param({"x": x(3), "k": {1: torch.ones(3)}}, {"x": x(3)[2:], "k": {1: torch.ones(1)}}, id="int keys"),
        pytest.param(["a", "b", "c"], ["c"], id="texts alone"),
        pytest.param({"x": [["a"], ["b", "c"], []]}, {"x": [[]]}, id="ragged lists alone"),
        pytest.param([{"x": x(3)}, (x(3), [x(3)])], [{"x": x(3)[2:]}, (x(3)[2:], [x(3)[2:]])], id="all nested"),
        pytest.param({"x": x(3), "w": Whole(x(5))}, {"x": x(3)[2:], "w": x(5)}, id="Whole tensor"),
        pytest.param({"x": x(3), "w": Whole([1, 2, 3])}, {"x": x(3)[2:], "w": [1, 2, 3]}, id="Whole list"),
        pytest.param(
            {"x": x(3), "w": Rows([x(1), x(2), x(4)])}, {"x": x(3)[2:], "w": [x(4)]}, id="Rows of tensors of any size"
        ),
        pytest.param({"w": Rows((1, 2, 3))}, {"w": (3,)}, id="Rows of numbers in a tuple"),
        pytest.param({"w": Rows("abc")}, {"w": "c"}, id="Rows of a text"),
    ],
)
def test_the_second_microbatch_has_the_last_row_and_the_same_structure(batch: Any, second: Any) -> None:
    pieces = cut(batch, 2)
    assert len(pieces) == 2
    assert type(pieces[1]) is type(second)
    assert same(pieces[1], second)


def test_the_comparison_of_structures_sees_a_difference() -> None:
    assert not same({"x": x(3)}, {"x": x(3) + 1})
    assert not same({"x": x(3)}, {"y": x(3)})
    assert not same({"x": [1]}, {"x": (1,)})


def test_a_dataclass_keeps_fields_that_its_constructor_does_not_take() -> None:
    first, second = cut(WithComputedField(x(3)), 2)
    assert torch.equal(second.twice, 2 * x(3)[2:])
    assert torch.equal(first.twice, 2 * x(3)[:2])


def test_a_tokenizers_output_keeps_what_it_carries_beside_its_items() -> None:
    batch = Encoding({"input_ids": x(3), "attention_mask": x(3) > 0}, ["first", "second", "third"])
    first, second = cut(batch, 2)
    assert isinstance(second, Encoding)
    assert torch.equal(second.input_ids, x(3)[2:])
    assert torch.equal(second["attention_mask"], x(3)[2:] > 0)
    assert second.encodings == ["first", "second", "third"]
    assert len(first["input_ids"]) == 2
    assert torch.equal(batch["input_ids"], x(3))  # cutting did not write to the batch


def test_the_order_of_a_mapping_is_kept() -> None:
    batch = OrderedDict([("b", x(3)), ("a", x(3)), ("c", x(3))])
    assert [list(piece) for piece in cut(batch, 2)] == [["b", "a", "c"]] * 2


def test_a_read_only_mapping_comes_back_readable() -> None:
    batch = types.MappingProxyType({"x": x(3), "n": 5})
    second = cut(batch, 2)[1]
    assert isinstance(second, types.MappingProxyType)
    assert torch.equal(second["x"], x(3)[2:])
    assert second["n"] == 5


def test_a_mapping_that_cannot_be_made_from_another_comes_back_as_a_dict() -> None:
    second = cut(KeywordsOnly(x=x(3), n=5), 2)[1]
    assert same(second, {"x": x(3)[2:], "n": 5})


def test_a_default_dict_keeps_its_default() -> None:
    from collections import defaultdict

    batch: defaultdict[str, Any] = defaultdict(list, x=x(3))
    second = cut(batch, 2)[1]
    assert torch.equal(second["x"], x(3)[2:])
    assert second["other"] == []


def test_what_default_collate_makes_is_cut() -> None:
    items = [{"x": torch.full((2,), float(i)), "name": f"row {i}", "pair": (i, f"{i}")} for i in range(5)]
    pieces = cut(default_collate(items), 2)
    assert [piece["name"] for piece in pieces] == [["row 0", "row 1"], ["row 2", "row 3"], ["row 4"]]
    assert [piece["pair"][0].tolist() for piece in pieces] == [[0, 1], [2, 3], [4]]
    assert [list(piece["pair"][1]) for piece in pieces] == [["0", "1"], ["2", "3"], ["4"]]


def test_a_tuple_of_texts_from_a_loader_of_tuples_is_cut() -> None:
    batch = default_collate([(torch.tensor(float(i)), f"row {i}") for i in range(3)])
    assert [list(piece[1]) for piece in cut(batch, 2)] == [["row 0", "row 1"], ["row 2"]]


def test_nothing_is_copied() -> None:
    batch: dict[str, Any] = {
        "x": x(10, 4),
        "deep": [x(10, 1), np.arange(10)],
        "whole": Whole(x(3)),
        "ids": torch.arange(10),
    }
    for number, piece in enumerate(cut(batch, 3)):
        for ours, theirs in [(piece["x"], batch["x"]), (piece["deep"][0], batch["deep"][0])]:
            assert ours.untyped_storage().data_ptr() == theirs.untyped_storage().data_ptr()
            assert ours.data_ptr() == theirs.data_ptr() + 3 * number * theirs.stride(0) * theirs.element_size()
        assert np.shares_memory(piece["deep"][1], batch["deep"][1])
        assert piece["whole"] is batch["whole"].value


def test_rows_of_a_view_that_is_not_contiguous_are_right_and_not_copied() -> None:
    batch = x(8, 6)[::2, 1::2]
    pieces = cut(batch, 3)
    assert torch.equal(torch.cat(pieces), batch)
    assert pieces[1].untyped_storage().data_ptr() == batch.untyped_storage().data_ptr()


def test_the_batch_is_left_as_it_was() -> None:
    inner = [x(4)]
    batch = {"x": x(4), "inner": inner, "whole": Whole(1)}
    before = dict(batch)
    cut(batch, 2)
    assert all(batch[key] is before[key] for key in before)
    assert inner[0].shape == (4, 2)


def test_a_gradient_flows_through_a_slice_to_the_batch() -> None:
    batch = x(4).requires_grad_()
    sum((piece.sum() * (i + 1) for i, piece in enumerate(cut(batch, 3))), torch.zeros(())).backward()
    assert batch.grad is not None
    assert batch.grad[:, 0].tolist() == [1, 1, 1, 2]


@given(rows=st.integers(1, 40), size=st.integers(1, 50), width=st.integers(0, 3))
def test_the_microbatches_together_are_the_batch(rows: int, size: int, width: int) -> None:
    columns = torch.arange(rows * width).view(rows, width)
    batch = {"x": columns, "y": [torch.arange(rows)], "ids": [f"{i}" for i in range(rows)], "n": 3, "a": np.ones(rows)}
    pieces = cut(batch, size)
    assert len(pieces) == -(-rows // size)
    assert [len(piece["x"]) for piece in pieces[:-1]] == [size] * (len(pieces) - 1)
    assert 1 <= len(pieces[-1]["x"]) <= size
    assert torch.equal(torch.cat([piece["x"] for piece in pieces]), columns)
    assert torch.equal(torch.cat([piece["y"][0] for piece in pieces]), torch.arange(rows))
    assert [each for piece in pieces for each in piece["ids"]] == batch["ids"]
    assert [piece["n"] for piece in pieces] == [3] * len(pieces)
    assert sum(len(piece["a"]) for piece in pieces) == rows


LEAVES = st.sampled_from(["tensor", "number", "text", "none", "scalar", "array"])
TREES = st.recursive(
    LEAVES,
    lambda inner: st.tuples(inner, inner) | st.dictionaries(st.text("abc", max_size=2), inner, min_size=1, max_size=3),
    max_leaves=8,
)


@given(drawn=TREES, rows=st.integers(1, 9), size=st.integers(1, 10))
def test_any_nesting_of_anything_comes_back_together(drawn: Any, rows: int, size: int) -> None:
    made = {
        "tensor": torch.arange(rows * 3).view(rows, 3),
        "number": 3,
        "text": "words",
        "none": None,
        "scalar": torch.tensor(0.5),
        "array": np.arange(rows),
    }
    # The drawn texts are names of leaves: a tuple of names is not a column of texts.
    batch = {"x": torch.arange(rows), "drawn": _build(drawn, made)}
    try:
        pieces = cut(batch, size)
    except BatchError as error:  # a tuple of texts or of numbers, or entries that could be samples
        words = ("(a list", "could be one number for each row", "they could be 2 samples")
        assume(not any(each in str(error) for each in words))
        raise
    for path, whole in leaves(batch):
        parts = [dict(leaves(piece))[path] for piece in pieces]
        if isinstance(whole, Tensor) and whole.ndim:
            assert torch.equal(torch.cat(cast("list[Tensor]", parts)), whole)
        elif isinstance(whole, np.ndarray):
            assert np.array_equal(np.concatenate(parts), whole)
        elif not isinstance(whole, list | tuple):  # columns of plain values, of as many as there are rows, are above
            assert all(part is whole for part in parts)


def _build(drawn: Any, made: dict[str, Any]) -> Any:
    if isinstance(drawn, str):
        return made[drawn]
    if isinstance(drawn, dict):
        return {key: _build(value, made) for key, value in cast("dict[str, Any]", drawn).items()}
    return type(drawn)(_build(value, made) for value in drawn)


def test_paths_say_where_a_leaf_stands() -> None:
    batch = {"tokens": [x(2), Pair(x(2), x(2))], "f": Frozen(x(2), 1.0)}
    assert [path for path, _ in leaves(batch)] == [
        "batch['tokens'][0]",
        "batch['tokens'][1][0]",
        "batch['tokens'][1][1]",
        "batch['f'].x",
        "batch['f'].scale",
    ]


def test_leaves_are_visited_once_each_in_order() -> None:
    seen: list[Any] = []
    map_leaves(lambda value, _: seen.append(value), {"a": [torch.tensor(1), 2], "b": (3, torch.tensor(4))})
    assert [int(value) for value in seen] == [1, 2, 3, 4]


# -- what cannot be cut -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("batch", [torch.zeros(0, 3), {"x": torch.zeros(0)}, [], {"ids": []}, {"w": Rows([])}])
def test_a_batch_of_0_rows_is_refused(batch: Any) -> None:
    with pytest.raises(EmptyBatchError, match=r"0 rows; skip empty batches"):
        cut(batch, 2)


def test_rows_that_disagree_are_named_with_their_paths_and_sizes() -> None:
    batch = {"x": x(3), "labels": {"class": torch.zeros(4)}, "n": 1}
    with pytest.raises(RowsDisagreeError) as caught:
        cut(batch, 2)
    for words in ["batch['x'] has 3", "batch['labels']['class'] has 4", "mb.Whole(", "mb.Rows("]:
        assert words in str(caught.value)
    assert "batch['n']" not in str(caught.value)


def test_a_list_of_images_without_the_mark_is_told_about_it() -> None:
    with pytest.raises(RowsDisagreeError, match=r"batch\[1\] has 4.*mb\.Rows"):
        cut([torch.zeros(3, 8), torch.zeros(4, 8)], 2)


def test_rows_of_a_mark_disagree_too() -> None:
    with pytest.raises(RowsDisagreeError, match=r"batch\['w'\] has 2"):
        cut({"x": x(3), "w": Rows([1, 2])}, 2)


@pytest.mark.parametrize(
    "batch", [{}, {"n": 3}, torch.tensor(1.0), "text", None, {"w": Whole(torch.ones(3))}, np.array(1.0)]
)
def test_a_batch_without_rows_is_refused_by_its_type(batch: Any) -> None:
    with pytest.raises(BatchError, match=rf"no rows.*{type(batch).__name__}.*\(rows, \.\.\.\)") as caught:
        cut(batch, 2)
    assert not isinstance(caught.value, EmptyBatchError)


def test_a_sparse_tensor_is_refused_by_its_path() -> None:
    with pytest.raises(BatchError, match=r"batch\['x'\] is a torch\.sparse_coo tensor.*mb\.Rows"):
        cut({"x": torch.eye(3).to_sparse()}, 2)


@pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors is in prototype stage")
@pytest.mark.parametrize("layout", [torch.strided, torch.jagged])
def test_a_nested_tensor_is_refused_by_its_path(layout: torch.layout) -> None:
    nested = torch.nested.nested_tensor([torch.ones(2, 3), torch.ones(4, 3)], layout=layout)
    with pytest.raises(BatchError, match=r"batch\['x'\] is a nested tensor.*pad it"):
        cut({"x": nested}, 2)


@pytest.mark.parametrize("size", [0, -1, True, False, 2.5, 2.0, "8", None, torch.tensor(2)])
def test_a_size_that_is_no_number_of_rows_is_refused(size: Any) -> None:
    with pytest.raises(ConfigError, match=r"microbatch_size must be a whole number of at least 1, not") as caught:
        check_microbatch_size(size)
    assert str(caught.value).endswith(repr(size))


@pytest.mark.parametrize("size", [0, -1, True])
def test_cut_refuses_it(size: Any) -> None:
    with pytest.raises(ConfigError, match="microbatch_size"):
        cut(x(3), size)


class Named(Tensor):
    pass


LAYOUTS: dict[str, Tensor] = {
    "contiguous": torch.randn(6, 3, 4, 4),
    "channels last": torch.randn(6, 3, 4, 4).to(memory_format=torch.channels_last),
    "images of one channel": torch.randn(6, 5, 5, 1).permute(0, 3, 1, 2),
    "transposed": torch.randn(3, 6).t(),
    "every other row": torch.randn(12, 3)[::2],
    "expanded": torch.randn(1, 3).expand(6, 3),
    "large": torch.randn(6, 20_000),
    "conjugated": torch.randn(6, 2, dtype=torch.complex64).conj(),
    "bool": torch.randn(6, 2) > 0,
    "bfloat16": torch.randn(6, 2).bfloat16(),
    "nothing in a row": torch.randn(6, 0),
    "a subclass": torch.randn(6, 2).as_subclass(Named),
}


@pytest.mark.parametrize("name", LAYOUTS)
@pytest.mark.parametrize(("start", "stop"), [(0, 6), (1, 3), (5, 6), (2, 2)])
def test_rows_are_copied_as_torch_copies_them(name: str, start: int, stop: int) -> None:
    tensor = LAYOUTS[name]
    found, expected = rows_copied(tensor, start, stop, device=tensor.device), tensor[start:stop].clone()
    assert torch.equal(found, expected)
    assert (found.stride(), type(found), found.is_conj()) == (expected.stride(), type(expected), False)
    before = tensor.clone()
    found.zero_()
    assert torch.equal(tensor, before)


def test_rows_of_a_tensor_with_a_graph_keep_it() -> None:
    tensor = torch.randn(4, 2, requires_grad=True)
    rows_copied(tensor, 1, 3, device=tensor.device).sum().backward()
    assert tensor.grad is not None
    assert tensor.grad.tolist() == [[0, 0], [1, 1], [1, 1], [0, 0]]
