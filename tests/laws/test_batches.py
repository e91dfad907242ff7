"""Laws E1 to E9: where the rows of a batch are, and what is refused because nobody can know."""

from __future__ import annotations

import copy
import warnings
from collections import ChainMap, UserList, deque
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from typing import Any, NamedTuple, Self

import numpy as np
import pytest
import torch
import torch.nn.functional as F
import torch.nn.modules.module as modules
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.nn.utils.rnn import pack_padded_sequence
from torch.utils.data import DataLoader, TensorDataset

import microbatch as mb
from microbatch.batch.batch_tree import rows_of
from microbatch.batch.layouts import other_layout
from microbatch.errors import BatchError, MissingCountError, RowsDisagreeError
from microbatch.step import loader_windows

from .reference import EXACT, WRONG, gradients_of, relative_error

LossFunction = Callable[[nn.Module, Any], Any]


def accumulated(model: nn.Module, batch: Any, loss_fn: LossFunction, *, size: int = 2, **options: Any) -> Any:
    """Return the gradient that the accumulator leaves for a batch; the model's parameters are left alone."""
    twin = copy.deepcopy(model)
    mb.Accumulator(twin, microbatch_size=size, memory_budget="none", **options).gradient(batch, loss_fn)
    return gradients_of(twin)


def plain(model: nn.Module, batch: Any, loss_fn: LossFunction) -> Any:
    """Return the gradient of one plain backward."""
    twin = copy.deepcopy(model)
    loss_fn(twin, batch).backward()
    return gradients_of(twin)


def drawn(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


# -- E1: the dimension of the rows ---------------------------------------------------------------------------------


class Recurrent(nn.Module):
    """A recurrent network in torch's default layout, (time, rows, features)."""

    def __init__(self) -> None:
        super().__init__()
        self.rnn = nn.GRU(3, 5)

    def forward(self, x: Tensor) -> Tensor:
        return self.rnn(x)[0]


def sequences(model: nn.Module, batch: Any) -> Tensor:
    return F.mse_loss(model(batch["x"])[..., :2], batch["y"])


def recurrent() -> tuple[nn.Module, dict[str, Tensor]]:
    torch.manual_seed(0)
    return Recurrent().double(), {"x": drawn(7, 6, 3), "y": drawn(7, 6, 2, seed=1)}


@settings(max_examples=15)
@given(size=st.integers(1, 7))
def test_e1_rows_in_the_second_dimension_are_exact(size: int) -> None:
    model, batch = recurrent()
    marked = {name: mb.Rows(each, dim=1) for name, each in batch.items()}
    reference = plain(model, batch, sequences)
    assert relative_error(accumulated(model, marked, sequences, size=size), reference) <= EXACT
    assert relative_error(accumulated(model, mb.Rows(batch, dim=-2), sequences, size=size), reference) <= EXACT


def test_e1_what_was_taken_is_said_once_and_time_is_what_was_cut() -> None:
    model, batch = recurrent()
    it = mb.Accumulator(copy.deepcopy(model), microbatch_size=2)
    with pytest.warns(mb.MicrobatchWarning, match=r"dimension 0 or in dimension 1.*rnn \(GRU\).*dim=1"):
        it.gradient(batch, sequences)
    it.gradient(batch, sequences)  # once for each accumulator: a second warning would be an error
    # The control: cut along the time, the gradient is another one.
    assert relative_error(gradients_of(it.options.bare_model), plain(model, batch, sequences)) > WRONG
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        accumulated(model, {"x": mb.Rows(batch["x"]), "y": batch["y"]}, sequences)  # the mark says that it is meant


def test_e1_check_names_the_dimension() -> None:
    model, batch = recurrent()
    found = mb.check(model, sequences, batch, microbatch_size=2)
    assert not found.ok
    assert "The window uses dimension 0" in str(found)
    marked = mb.check(model, sequences, mb.Rows(batch, dim=1), microbatch_size=2)
    assert marked.ok
    assert marked.notes == ()
    hooks = {name: table for name, table in vars(modules).items() if name.startswith("_global_") and "hooks" in name}
    assert hooks
    assert not any(hooks.values())  # torch 2.14 compiles no model while one of them has an entry


GRU = ("rnn (GRU)",)


@pytest.mark.parametrize(
    ("batch", "time_first", "said"),
    [
        pytest.param({"x": drawn(7, 6, 3)}, GRU, True, id="alone, before a recurrent network"),
        pytest.param((drawn(7, 6, 3), drawn(7, 6)), (), True, id="two tensors agree"),
        pytest.param((drawn(6, 6, 3), drawn(6)), GRU, True, id="targets that fit both"),
        pytest.param((drawn(7, 6, 3), drawn(7)), GRU, False, id="targets that show the rows"),
        pytest.param((drawn(6, 6, 3), drawn(6)), (), False, id="both sizes agree on one tensor"),
        pytest.param({"x": drawn(7, 6, 3)}, (), False, id="alone"),
        pytest.param((drawn(8, 5), drawn(8, 5)), (), False, id="rows and features twice"),
        pytest.param((drawn(8, 5), drawn(8)), (), False, id="rows and features"),
        pytest.param((drawn(8, 3, 4, 4), drawn(8, 3, 4, 4)), GRU, False, id="images"),
        pytest.param({"input_ids": drawn(8, 5), "attention_mask": drawn(8, 5)}, GRU, False, id="a tokenizer's"),
        pytest.param({"x": drawn(7, 6, 3), "ids": [*"abcdefg"]}, GRU, False, id="texts that show the rows"),
        pytest.param((drawn(7, 6, 3), mb.Rows(drawn(7, 6))), GRU, False, id="a mark"),
        pytest.param((drawn(7, 1, 3), drawn(7, 1)), GRU, False, id="one entry in the second dimension"),
        pytest.param([drawn(3, 8, 8), drawn(3, 8, 8)], (), True, id="a list of two images"),
        pytest.param({"a": [drawn(3, 8, 8), drawn(3, 8, 8)]}, (), True, id="a list of two images in a dict"),
        pytest.param([drawn(3, 8, 8)], (), True, id="a list of one image"),
        pytest.param({"a": [drawn(3, 8, 8)]}, (), True, id="a list of one image in a dict"),
        pytest.param([drawn(3, 8, 8), 1], (), True, id="a list of one image and its label"),
        pytest.param([drawn(3, 96, 7)], (), False, id="a list of the last three rows"),
        pytest.param([drawn(8, 8, 8)], (), False, id="a list of one value"),
        pytest.param([mb.Rows(drawn(3, 8, 8))], (), False, id="a list of one value that is marked"),
        pytest.param([drawn(3, 8, 8), drawn(3)], (), False, id="a list of one value and the numbers of its rows"),
        pytest.param([drawn(8, 4, 4), drawn(8, 2)], (), False, id="images without channels and what is said of them"),
    ],
)
def test_e1_only_what_is_doubtful_is_said(batch: Any, time_first: tuple[str, ...], said: bool) -> None:
    assert bool(other_layout(batch, time_first=time_first, thorough=True)) == said
    # Without a module that expects the time first, only `check` is thorough: every batch of sequences looks like this.
    images = isinstance(batch, list) or (isinstance(batch, dict) and "a" in batch)
    assert bool(other_layout(batch, time_first=time_first)) == (said and (bool(time_first) or images))


def test_e1_rows_that_disagree_are_explained_by_the_layout() -> None:
    with pytest.raises(RowsDisagreeError, match=r"batch\['x'\] has 6 in dimension 1.*mb\.Rows\(value, dim=1\)"):
        rows_of({"x": drawn(7, 6, 3), "y": drawn(6)})
    with pytest.raises(RowsDisagreeError, match=r"every 2 consecutive entries of batch\['x'\].*group=2"):
        rows_of({"x": drawn(12, 3), "y": drawn(6)})


# -- E2, E3, E9: lists ---------------------------------------------------------------------------------------------


class Named(NamedTuple):
    a: Tensor
    b: Tensor
    c: Tensor


IMAGES = [drawn(3, 8, 8, seed=seed) for seed in range(6)]
SAMPLES = [(drawn(8, seed=seed), torch.tensor(seed)) for seed in range(32)]


@pytest.mark.parametrize(
    "batch",
    [
        pytest.param(IMAGES, id="images"),
        pytest.param(tuple(IMAGES), id="a tuple of images"),
        pytest.param({"images": IMAGES, "labels": torch.arange(6)}, id="images and labels"),
        pytest.param({"images": IMAGES[:3], "labels": torch.arange(3)}, id="as many images as colours"),
        pytest.param({"images": IMAGES[:2], "labels": torch.arange(2)}, id="two images and labels"),
        pytest.param([drawn(3, 4 + size, 9) for size in range(4)], id="images of many sizes"),
        pytest.param([drawn(8) for _ in range(32)], id="samples without labels"),
        pytest.param(SAMPLES, id="samples"),
        pytest.param(SAMPLES[:2], id="two samples"),
        pytest.param([{"x": drawn(8), "y": 3}] * 5, id="samples as dicts"),
        pytest.param([Named(drawn(8), drawn(8), drawn(8))] * 5, id="samples as named tuples"),
        pytest.param((drawn(4, 3), [{"boxes": drawn(n, 4)} for n in (1, 2, 3, 1)]), id="targets of a detector"),
        pytest.param([np.zeros((3, 8, 8))] * 4, id="images of NumPy"),
        pytest.param({"x": drawn(5, 2), "weights": [0.1, 0.2, 0.3, 0.2, 0.2]}, id="as many class weights as rows"),
        pytest.param({"x": drawn(5, 2), "weights": [torch.tensor(0.2)] * 5}, id="class weights as tensors"),
        pytest.param({"x": drawn(5, 2), "sizes": (1, 2, 3, 4, 5)}, id="a long tuple of numbers"),
    ],
)
def test_e2_e3_e9_a_list_that_could_be_the_samples_is_refused(batch: Any) -> None:
    with pytest.raises(BatchError, match=r"mb\.Rows\("):
        mb.cut(batch, 2)


def test_e3_the_words_name_collate() -> None:
    with pytest.raises(BatchError, match=r"32 samples.*collate.*mb\.Rows\("):
        mb.cut(SAMPLES, 4)


@pytest.mark.parametrize(
    "batch",
    [
        pytest.param({"x": drawn(5, 2), "names": ["cat", "dog"]}, id="texts of another number"),
        pytest.param({"x": drawn(5, 2), "weights": [0.1, 0.2, 0.3]}, id="numbers of another number"),
        pytest.param({"x": drawn(5, 2), "images": IMAGES}, id="images of another number"),
    ],
)
def test_e2_a_list_takes_part_in_the_check_of_the_rows(batch: Any) -> None:
    with pytest.raises(RowsDisagreeError):
        mb.cut(batch, 2)


@pytest.mark.parametrize(
    ("batch", "rows"),
    [
        pytest.param((drawn(8, 3), torch.arange(8)), 8, id="x and y"),
        pytest.param([drawn(8, 3), drawn(8, 3)], 8, id="two of one shape"),
        pytest.param([drawn(3, 8, 8), drawn(3, 8, 8)], 3, id="two of one shape, few rows"),
        pytest.param([drawn(8, 4), drawn(8, 2), drawn(8, 4), drawn(8)], 8, id="transitions"),
        pytest.param(
            [torch.zeros(8, 5, dtype=torch.long), torch.ones(8, 5, dtype=torch.bool), drawn(8, 5)], 8, id="dtypes"
        ),
        pytest.param(([drawn(8, 3, 4, 4)] * 4, torch.arange(8)), 8, id="views and labels"),
        pytest.param(([drawn(2, 3)] * 2, torch.arange(2)), 2, id="two views of the last two rows"),
        pytest.param(((drawn(8, 3), torch.arange(8)), (drawn(8, 3), torch.arange(8))), 8, id="two loaders"),
        pytest.param(Named(drawn(8, 3), drawn(8, 3), drawn(8, 3)), 8, id="a named tuple"),
        pytest.param({"x": drawn(8, 3), "size": (4, 4)}, 8, id="a size"),
        pytest.param({"x": drawn(8, 3), "names": [*"abcdefgh"]}, 8, id="a text for each row"),
        pytest.param([drawn(8, 3), None, drawn(8, 3)], 8, id="nothing between"),
        pytest.param([drawn(8, 3)], 8, id="one"),
    ],
)
def test_e2_what_a_loader_gives_every_day_goes_on_without_a_word(batch: Any, rows: int) -> None:
    assert rows_of(batch) == rows
    assert len(mb.cut(batch, 2)) == -(-rows // 2)


@pytest.mark.parametrize("tensors", [1, 2, 4])
def test_e2_default_collate_of_tensors_is_cut(tensors: int) -> None:
    data = TensorDataset(*(drawn(6, width + 1) for width in range(tensors)))
    for batch in DataLoader(data, batch_size=4):
        assert rows_of(batch) == len(batch[0])


# -- E4: what a loader hands in is handed on -----------------------------------------------------------------------


class Graphs:
    """A batch of graphs, as PyG makes them: an object that holds tensors and knows how to move."""

    def __init__(self, nodes: Tensor, graph: Tensor) -> None:
        self.store = {"x": nodes, "graph": graph}
        self.moved = 0

    def to(self, device: torch.device) -> Self:
        self.moved += 1
        return self


def graphs() -> list[Graphs]:
    return [
        Graphs(drawn(5, 3), torch.tensor([0, 0, 1, 1, 1])),
        Graphs(drawn(4, 3, seed=1), torch.tensor([0, 1, 2, 2])),
        Graphs(drawn(2, 3, seed=2), torch.tensor([0, 0])),
    ]


def pooled(model: nn.Module, microbatch: Graphs) -> Tensor:
    """Return the sum over graphs of a loss of each."""
    nodes, graph = microbatch.store["x"], microbatch.store["graph"]
    total = torch.zeros(int(graph.max()) + 1, 1, dtype=nodes.dtype).index_add(0, graph, model(nodes))
    return total.square().sum()


def test_e4_objects_are_handed_on_and_a_plain_mean_needs_its_count() -> None:
    torch.manual_seed(0)
    model, loader = nn.Linear(3, 1).double(), graphs()
    counts = [int(each.store["graph"].max()) + 1 for each in loader]
    torch.stack([pooled(model, each) / sum(counts) for each in loader]).sum().backward()
    reference = gradients_of(model)
    seen: list[Any] = []
    optimizer = torch.optim.SGD(model.parameters(), lr=0.0)
    optimizer.register_step_pre_hook(lambda *_: seen.append(gradients_of(model)))
    it = mb.Accumulator(model, optimizer)
    for window in it.windows(loader, microbatches=3):
        for microbatch, count in zip(window, counts, strict=True):
            window.backward(pooled(model, microbatch) / count, count=count)
    for window in it.windows(loader, microbatches=3):
        for microbatch, count in zip(window, counts, strict=True):
            window.backward(mb.Loss(sum=pooled(model, microbatch), count=count))
    assert [relative_error(each, reference) <= EXACT for each in seen] == [True, True]
    assert [each.moved for each in loader] == [2, 2, 2]
    for window in it.windows(loader[:1], microbatches=1):
        for microbatch in window:
            with pytest.raises(MissingCountError, match="count="):
                window.backward(pooled(model, microbatch))
            window.backward(pooled(model, microbatch), count=1)


@pytest.mark.parametrize(
    "microbatch",
    [
        pytest.param((tuple(IMAGES), tuple({"boxes": drawn(n, 4)} for n in range(1, 7))), id="tuples of a detector"),
        pytest.param((drawn(4, 3), drawn(6, 2)), id="flat targets"),
        pytest.param(pack_padded_sequence(drawn(5, 2, 3), torch.tensor([5, 2])), id="a packed sequence"),
        pytest.param({"x": torch.eye(3).to_sparse()}, id="a sparse tensor"),
        pytest.param("a text", id="a text"),
    ],
)
def test_e4_whatever_it_is_it_arrives_as_it_was(microbatch: Any) -> None:
    model = nn.Linear(1, 1)
    it = mb.Accumulator(model, torch.optim.SGD(model.parameters(), lr=0.1))
    for window in it.windows([microbatch] * 3, microbatches=2):
        for arrived in window:
            assert type(arrived) is type(microbatch)
            window.backward(model(torch.ones(1, 1)).sum(), count=1)
        assert window.step.applied


def test_e4_windows_have_a_length_where_the_loader_has_one() -> None:
    model = nn.Linear(2, 1)
    it = mb.Accumulator(model, torch.optim.SGD(model.parameters(), lr=0.1))
    windows = it.windows([torch.ones(2, 2)] * 7, microbatches=3)
    assert len(windows) == 3
    assert isinstance(windows, Iterator)
    with pytest.raises(TypeError):
        len(it.windows(iter([torch.ones(2, 2)]), microbatches=3))


# -- S10: a loop that was left -------------------------------------------------------------------------------------


@pytest.mark.parametrize(("backwards", "steps"), [(0, 2), (1, 3)])
def test_s10_break_is_said_once_and_the_next_windows_are_right(backwards: int, steps: int) -> None:
    torch.manual_seed(0)
    model = nn.Linear(3, 1).double()
    loader = [drawn(2, 3, seed=seed) for seed in range(6)]
    optimizer, seen = torch.optim.SGD(model.parameters(), lr=0.0), list[Any]()
    optimizer.register_step_pre_hook(lambda *_: seen.append(gradients_of(model)))
    it = mb.Accumulator(model, optimizer)

    def train() -> None:
        for number, window in enumerate(it.windows(loader, microbatches=2)):
            for index, x in enumerate(window):
                if number == 1 and index == backwards:
                    break
                window.backward(model(x).square().mean())

    with pytest.warns(mb.MicrobatchWarning, match=f"left by `break` after the backward of {backwards} of 2"):
        train()
    used = [loader[:2], *([loader[2:3]] if backwards else []), loader[4:]]
    assert len(seen) == len(used) == steps
    for each, microbatches in zip(seen, used, strict=True):
        reference = plain(model, torch.cat(microbatches), lambda model, x: model(x).square().mean())
        assert relative_error(each, reference) <= EXACT


def test_s10_an_error_and_the_end_of_training_are_no_break() -> None:
    model = nn.Linear(3, 1)
    it = mb.Accumulator(model, torch.optim.SGD(model.parameters(), lr=0.1))

    def train(stop: Callable[[], None]) -> None:
        for window in it.windows([torch.ones(2, 3)] * 4, microbatches=2):
            for x in window:
                window.backward(model(x).mean())
                stop()

    def mine() -> None:
        raise ValueError("mine")

    with warnings.catch_warnings():
        warnings.simplefilter("error")
        with pytest.raises(ValueError, match="mine"):
            train(mine)
        train(lambda: None)
        for window in it.windows([torch.ones(2, 3)] * 4, microbatches=2):
            for x in window:
                window.backward(model(x).mean())
            break


def leave_by_return(it: mb.Accumulator, loader: Sequence[Tensor], end: Callable[[], object]) -> None:
    for window in it.windows(loader, microbatches=2):
        for x in window:
            window.backward(it._it.options.model(x).mean())
            end()
            return


def leave_by_two_breaks(it: mb.Accumulator, loader: Sequence[Tensor], end: Callable[[], object]) -> None:
    for _, window in enumerate(it.windows(loader, microbatches=2)):
        for _, x in enumerate(window):
            window.backward(it._it.options.model(x).mean())
            break
        end()
        break


def leave_a_generator(it: mb.Accumulator, loader: Sequence[Tensor], end: Callable[[], object]) -> None:
    def microbatches() -> Iterator[Tensor]:
        for window in it.windows(loader, microbatches=2):
            for x in window:
                yield x
                window.backward(it._it.options.model(x).mean())

    for number, _ in enumerate(microbatches()):
        if number == 1:
            end()
            break


LEAVINGS = [leave_by_return, leave_by_two_breaks, leave_a_generator]


@pytest.mark.parametrize("leave", LEAVINGS)
def test_s10_leaving_both_loops_at_once_is_said_once(leave: Callable[..., None]) -> None:
    torch.manual_seed(0)
    model, loader = nn.Linear(3, 1), [torch.ones(2, 3)] * 4
    it = mb.Accumulator(model, torch.optim.SGD(model.parameters(), lr=0.1))
    before = [each.detach().clone() for each in model.parameters()]

    def twice() -> None:
        leave(it, loader, lambda: None)
        leave(it, loader, lambda: None)

    with pytest.warns(mb.MicrobatchWarning, match="backward of 1 of 2 microbatches; no step is taken") as seen:
        twice()
    assert [each.filename for each in seen] == [__file__]
    assert all(map(torch.equal, before, model.parameters()))
    assert all(each.grad is None for each in model.parameters())
    assert it.step(torch.ones(4, 3), lambda model, x: model(x).mean()).applied


@pytest.mark.parametrize("leave", LEAVINGS)
@pytest.mark.parametrize("error", [ValueError, KeyboardInterrupt, GeneratorExit])
def test_s10_leaving_both_loops_by_an_error_is_not_said(leave: Callable[..., None], error: type[BaseException]) -> None:
    # The negative control: the same loops are closed in the same state, and the error says it already.
    model = nn.Linear(3, 1)
    it = mb.Accumulator(model, torch.optim.SGD(model.parameters(), lr=0.1))

    def fails() -> None:
        raise error

    with warnings.catch_warnings():
        warnings.simplefilter("error")
        with pytest.raises(error):
            leave(it, [torch.ones(2, 3)] * 4, fails)
        with suppress(error):
            leave(it, [torch.ones(2, 3)] * 4, fails)
    assert it.step(torch.ones(4, 3), lambda model, x: model(x).mean()).applied


def test_s10_leaving_by_a_loop_that_was_left_without_an_error_is_found_in_this_python() -> None:
    # What tells a statement from an error: both close a generator, at another instruction of the loop's frame.
    told = list[bool]()

    def generator() -> Iterator[int]:
        try:
            yield 1
        except GeneratorExit:
            told.append(loader_windows._left_by_statement())

    def leave(error: bool) -> None:
        for _ in generator():
            if error:
                raise LookupError
            return

    leave(False)
    with suppress(LookupError):
        leave(True)
    assert told == [True, False]


# -- E5: what is advised -------------------------------------------------------------------------------------------


def test_e5_three_values_are_shown_and_whole_is_for_what_has_no_rows() -> None:
    ragged = {f"audio {number}": drawn(9 + number) for number in range(33)}
    with pytest.raises(RowsDisagreeError) as caught:
        rows_of(ragged)
    text = str(caught.value)
    assert text.count("batch['audio ") == 3
    assert "and 30 more" in text
    flat = {"x": drawn(8, 3), "boxes": drawn(10, 5)}
    with pytest.raises(RowsDisagreeError, match=r"windows\(loader.*mb\.Whole\(\.\.\.\) is right only"):
        rows_of(flat)


# -- E6: objects ---------------------------------------------------------------------------------------------------


class SlicesItself:
    """As a TensorDict: a length, and slices of its own type."""

    def __init__(self, fields: dict[str, Tensor]) -> None:
        self._fields = fields

    def __len__(self) -> int:
        return len(next(iter(self._fields.values())))

    def __getitem__(self, item: Any) -> Any:
        if isinstance(item, str):
            return self._fields[item]
        return SlicesItself({name: each[item] for name, each in self._fields.items()})

    def to(self, device: torch.device) -> SlicesItself:
        return SlicesItself({name: each.to(device) for name, each in self._fields.items()})

    def clone(self) -> SlicesItself:
        return SlicesItself({name: each.clone() for name, each in self._fields.items()})


def regression(model: nn.Module, batch: Any) -> Tensor:
    return F.mse_loss(model(batch["x"]), batch["y"])


def columns() -> tuple[nn.Module, dict[str, Tensor]]:
    torch.manual_seed(0)
    return nn.Linear(3, 2).double(), {"x": drawn(7, 3), "y": drawn(7, 2, seed=1)}


@settings(max_examples=10)
@given(size=st.integers(1, 8))
def test_e6_an_object_that_slices_itself_has_rows(size: int) -> None:
    model, batch = columns()
    got = accumulated(model, SlicesItself(batch), regression, size=size)
    assert relative_error(got, plain(model, batch, regression)) <= EXACT
    with pytest.raises(RowsDisagreeError):
        rows_of((SlicesItself(batch), drawn(6)))


@pytest.mark.parametrize("wrap", [lambda graphs: graphs, lambda graphs: [graphs], lambda graphs: {"a": graphs}])
def test_e6_an_unknown_object_that_holds_tensors_is_refused_unless_it_is_marked(wrap: Callable[[Any], Any]) -> None:
    with pytest.raises(BatchError, match=r"Graphs, which holds tensors.*mb\.Whole\(.*windows\("):
        rows_of({"x": drawn(6, 2), "graphs": wrap(graphs()[0])})
    marked = {"x": drawn(6, 2), "graphs": mb.Whole(wrap(graphs()[0]))}
    assert [len(each["x"]) for each in mb.cut(marked, 4)] == [4, 2]


def test_e6_an_object_without_tensors_is_given_to_every_microbatch() -> None:
    generator = torch.Generator()
    assert all(each["g"] is generator for each in mb.cut({"x": drawn(6, 2), "g": generator}, 4))


@pytest.mark.parametrize(
    ("batch", "words"),
    [
        pytest.param(pack_padded_sequence(drawn(5, 2, 3), torch.tensor([5, 2])), "pack_padded_sequence", id="packed"),
        pytest.param({"x": torch.eye(3).to_sparse()}, r"sparse_coo.*to_dense\(\)", id="sparse"),
        pytest.param(mb.Rows(torch.eye(3).to_sparse()), r"sparse_coo.*to_dense\(\)", id="sparse rows"),
    ],
)
def test_e6_layouts_that_cannot_be_sliced_have_words_of_their_own(batch: Any, words: str) -> None:
    with pytest.raises(BatchError, match=words):
        rows_of(batch)


# -- E7: several entries for each row ------------------------------------------------------------------------------


def preference(model: nn.Module, batch: Any) -> Tensor:
    """Return a loss of pairs that lie one after the other: chosen, rejected, chosen, ..."""
    scores = model(batch["x"]).view(-1, 2)
    return F.softplus(scores[:, 1] - scores[:, 0]).mean()


def stacked(model: nn.Module, batch: Any) -> Tensor:
    """Return the same for all chosen ones above all rejected ones."""
    chosen, rejected = model(batch["x"].flatten(0, 1)).view(2, -1)
    return F.softplus(rejected - chosen).mean()


@settings(max_examples=15)
@given(size=st.integers(1, 6))
def test_e7_pairs_stay_together(size: int) -> None:
    torch.manual_seed(0)
    model, x = nn.Linear(3, 1).double(), drawn(10, 3)
    reference = plain(model, {"x": x}, preference)
    assert relative_error(accumulated(model, {"x": mb.Rows(x, group=2)}, preference, size=size), reference) <= EXACT
    halves = torch.cat([x[::2], x[1::2]]).unflatten(0, (2, -1))
    got = accumulated(model, {"x": mb.Rows(halves, dim=1)}, stacked, size=size)
    assert relative_error(got, reference) <= EXACT


def test_e7_pairs_that_are_torn_apart_give_another_gradient() -> None:
    """The control: N chosen above N rejected, cut as they are."""
    torch.manual_seed(0)
    model, x = nn.Linear(3, 1).double(), drawn(12, 3)

    def halves(model: nn.Module, x: Tensor) -> Tensor:
        chosen, rejected = model(x).view(2, -1)
        return F.softplus(rejected - chosen).mean()

    assert relative_error(accumulated(model, x, halves, size=4), plain(model, x, halves)) > WRONG


def test_e7_everything_that_handles_rows_obeys_dim_and_group() -> None:
    x = torch.arange(24).view(4, 6)
    assert [each.tolist() for each in mb.cut(mb.Rows(x[0], group=2), 2)] == [[0, 1, 2, 3], [4, 5]]
    assert torch.equal(torch.cat(mb.cut(mb.Rows(x, dim=1, group=3), 1), dim=1), x)
    assert [each.tolist() for each in mb.cut(mb.Rows(np.arange(6), group=3), 1)] == [[0, 1, 2], [3, 4, 5]]
    assert mb.cut(mb.Rows([1, 2, 3, 4], group=2), 1) == [[1, 2], [3, 4]]
    tree = mb.Rows({"a": x, "b": {"c": x + 1, "names": ["u", "v", "w", "x"]}, "scale": 2.0}, group=2)
    assert [each["b"]["names"] for each in mb.cut(tree, 1)] == [["u", "v"], ["w", "x"]]
    assert [each["a"].tolist() for each in mb.cut(tree, 1)] == [x[:2].tolist(), x[2:].tolist()]


@pytest.mark.filterwarnings("ignore:the loss is a plain mean")
def test_e7_rows_of_another_layout_are_cut_by_length() -> None:
    sizes = [5, 1, 3, 2]
    mask = torch.arange(5) < torch.tensor(sizes)[:, None]
    tokens = torch.arange(20).view(4, 5) * mask
    rows_first = {"tokens": tokens, "mask": mask}
    time_first = {name: mb.Rows(each.T.contiguous(), dim=1) for name, each in rows_first.items()}
    pairs = {name: mb.Rows(each.repeat_interleave(2, 0), group=2) for name, each in rows_first.items()}
    lengths = mb.Lengths(of="mask", keys=["tokens", "mask"], overhead=0)
    model = nn.Linear(1, 1)
    found: dict[str, list[Any]] = {}
    for name, batch in {"rows": rows_first, "time": time_first, "pairs": pairs}.items():
        seen = found[name] = []
        it = mb.Accumulator(model, torch.optim.SGD(model.parameters(), lr=0.1), microbatch_size=2, lengths=lengths)
        with it.window() as window:
            for each in window.split(batch):
                seen.append(each["tokens"])
                window.backward(model(torch.ones(1, 1)).sum())
    assert [each.T.tolist() for each in found["time"]] == [each.tolist() for each in found["rows"]]
    assert [each[::2].tolist() for each in found["pairs"]] == [each.tolist() for each in found["rows"]]
    assert any(each.shape[1] < 5 for each in found["rows"])


@pytest.mark.parametrize(
    "make",
    [
        lambda: mb.Rows(5),
        lambda: mb.Rows(None),
        lambda: mb.Rows(mb.Whole(1)),
        lambda: mb.Rows([1], dim=True),
        lambda: mb.Rows([1], group=0),
        lambda: mb.Rows([1], group=True),
        lambda: rows_of(mb.Rows(torch.tensor(1.0))),
        lambda: rows_of(mb.Rows(drawn(2, 3), dim=2)),
        lambda: rows_of(mb.Rows([drawn(2), drawn(2)], dim=1)),
        lambda: rows_of(mb.Rows(drawn(5), group=2)),
        lambda: rows_of(mb.Rows({})),
        lambda: rows_of(mb.Rows({"a": drawn(2), "b": drawn(3)})),
        lambda: rows_of(mb.Rows(object())),
    ],
)
def test_e7_a_mark_that_makes_no_sense_is_refused(make: Callable[[], object]) -> None:
    with pytest.raises(BatchError):
        make()


# -- E8: editing a microbatch in place -----------------------------------------------------------------------------


def edited(model: nn.Module, batch: Any) -> Tensor:
    batch["x"].div_(2)
    batch["n"] *= 2
    batch["scale"].add_(1)
    batch["list"][0].add_(1)
    batch["deep"]["ids"].append(1)
    return (model(batch["x"]) * batch["scale"] + torch.from_numpy(batch["n"])[:, None]).square().mean()


def everything() -> tuple[nn.Module, dict[str, Any]]:
    torch.manual_seed(0)
    x = drawn(8, 3)
    return nn.Linear(3, 1).double(), {
        "x": x,
        "n": np.linspace(0.0, 1.0, 8),
        "scale": torch.ones(()).double(),
        "list": mb.Rows([drawn(2) for _ in range(8)]),
        "deep": {"ids": mb.Whole([1, 2])},
    }


def picture(batch: dict[str, Any]) -> Any:
    return copy.deepcopy([batch["x"], batch["n"], batch["scale"], batch["list"].value, batch["deep"]["ids"].value])


def equal(one: Any, other: Any) -> bool:
    if isinstance(one, list):
        return len(one) == len(other) and all(map(equal, one, other))
    return bool((torch.as_tensor(one) == torch.as_tensor(other)).all())


@pytest.mark.parametrize("fails", [0, 2])
def test_e8_a_retry_sees_the_users_rows_and_the_batch_is_what_it_was(fails: int) -> None:
    model, batch = everything()
    before, calls = picture(batch), list[int]()
    whole = {**batch, "x": batch["x"].clone(), "n": batch["n"].copy(), "scale": batch["scale"].clone()}
    whole |= {"list": [drawn(2)], "deep": {"ids": []}}
    reference = plain(model, whole, edited)

    def loss_fn(model: nn.Module, microbatch: Any) -> Tensor:
        calls.append(1)
        loss = edited(model, microbatch)
        if len(calls) == fails:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return loss

    assert relative_error(accumulated(model, batch, loss_fn, size=4), reference) <= EXACT
    assert equal(picture(batch), before)


@pytest.mark.parametrize("coupled", ["twice", "keep"])
def test_e8_the_second_encoding_sees_the_users_rows(coupled: str) -> None:
    torch.manual_seed(0)
    model, x = nn.Linear(3, 2).double(), drawn(8, 3)
    before, reference = x.clone(), plain(model, x / 2, lambda model, x: model(x).var())
    twin = copy.deepcopy(model)
    it = mb.Accumulator(twin, microbatch_size=2, coupled=coupled)
    it.gradient(x, lambda _, z: z.var(), encode=lambda model, x: model(x.div_(2)))
    assert relative_error(gradients_of(twin), reference) <= EXACT
    assert torch.equal(x, before)


def test_e8_one_tensor_in_two_places_stays_one_tensor() -> None:
    x, seen = drawn(4, 2), list[bool]()

    def loss_fn(model: nn.Module, batch: Any) -> Tensor:
        batch["a"].add_(1)
        seen.append(torch.equal(batch["a"], batch["b"]))
        return model(batch["b"]).mean()

    accumulated(nn.Linear(2, 1).double(), {"a": x, "b": x}, loss_fn)
    assert seen == [True, True]


@pytest.mark.parametrize("lengths", [None, mb.Lengths(of="mask", keys=["x"])])
def test_e8_split_hands_out_copies_of_everything_on_the_device(lengths: mb.Lengths | None) -> None:
    model = nn.Linear(2, 1).double()
    batch: dict[str, Any] = {
        "x": drawn(4, 2),
        "mask": torch.ones(4, 2),
        "whole": mb.Whole(drawn(3)),
        "own": SlicesItself({"x": drawn(4)}),
    }
    mine = {batch["x"].untyped_storage().data_ptr(), batch["whole"].value.untyped_storage().data_ptr()}
    mine.add(batch["own"]["x"].untyped_storage().data_ptr())
    it = mb.Accumulator(model, torch.optim.SGD(model.parameters(), lr=0.1), microbatch_size=2, lengths=lengths)
    with it.window() as window:
        for each in window.split(batch):
            for tensor in (each["x"], each["whole"], each["own"]["x"]):
                assert tensor.untyped_storage().data_ptr() not in mine
            window.backward(model(each["x"]).mean())


# -- strange trees -------------------------------------------------------------------------------------------------


class Stubborn(list[Any]):
    def __init__(self, one: Any, two: Any) -> None:
        super().__init__([one, two])


def cyclic() -> dict[str, Any]:
    batch: dict[str, Any] = {"x": drawn(4, 2)}
    batch["me"] = batch
    return batch


def endless() -> list[Any]:
    batch: list[Any] = [drawn(4, 2)]
    batch.append(batch)
    return batch


@pytest.mark.parametrize(
    "make",
    [
        pytest.param(cyclic, id="a dict that contains itself"),
        pytest.param(endless, id="a list that contains itself"),
        pytest.param(lambda: drawn(4, 2).to("meta"), id="meta"),
        pytest.param(lambda: {"x": drawn(4, 2).to("meta")}, id="meta in a dict"),
        pytest.param(lambda: Stubborn(drawn(4, 2), drawn(4)), id="a list that cannot be made again"),
    ],
)
def test_a_strange_tree_is_refused_by_an_error_of_ours(make: Callable[[], Any]) -> None:
    model = nn.Linear(2, 1).double()
    it = mb.Accumulator(model, torch.optim.SGD(model.parameters(), lr=0.1), microbatch_size=2)
    with pytest.raises(BatchError):
        it.step(make(), lambda model, batch: model(batch["x"] if isinstance(batch, dict) else batch[0]).mean())


@pytest.mark.parametrize(
    "value",
    [
        pytest.param(mb.Rows([torch.eye(2).to_sparse()] * 8), id="sparse rows"),
        pytest.param(mb.Whole(torch.eye(2).to_sparse()), id="a sparse tensor"),
        pytest.param(mb.Whole(pack_padded_sequence(drawn(5, 2, 3), torch.tensor([5, 2]))), id="a packed sequence"),
        pytest.param(mb.Whole(nn.Linear(1, 1)), id="a module"),
        pytest.param(deque([drawn(8)]), id="a deque"),
        pytest.param({1, 2}, id="a set"),
        pytest.param(range(3), id="a range"),
        pytest.param(torch.Size([8]), id="a size"),
        pytest.param(UserList([*"abcdefgh"]), id="a list of one's own"),
        pytest.param(ChainMap({"a": drawn(8)}), id="a chain of dicts"),
        pytest.param(torch.distributions.Normal(drawn(8), 1.0), id="a distribution"),
        pytest.param(np.array([{}] * 8, dtype=object), id="an array of objects"),
        pytest.param(np.complex64(1), id="a complex number"),
        pytest.param(memoryview(b"12345678"), id="a view of bytes"),
    ],
)
@pytest.mark.parametrize("budget", ["1 GiB", "none"])
def test_a_strange_value_beside_rows_is_cut_or_refused(value: Any, budget: str) -> None:
    it = mb.Accumulator(nn.Linear(2, 1).double(), microbatch_size=4, memory_budget=budget)
    with suppress(BatchError):
        it.gradient({"x": drawn(8, 2), "value": value}, lambda model, batch: model(batch["x"]).mean())
