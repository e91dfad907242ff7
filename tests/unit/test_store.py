"""The store that tensors are put away in: they come back as they were, once stored however often viewed."""

import os
import tempfile
import threading
import weakref
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode

from microbatch.errors import SpillError
from microbatch.memory.offload_targets import File, Piece
from microbatch.memory.spill import Spill
from microbatch.memory.tensor_store import Handle, Store, is_movable

# Some kinds of tensors are not there yet, others no longer.
pytestmark = pytest.mark.filterwarnings("ignore:.*(nested tensors|quantized tensor|Sparse CSR tensor):UserWarning")


class Labelled(Tensor):
    """A subclass, whose label would be lost."""


def bits(tensor: Tensor) -> Tensor:
    return torch.stack([tensor]).flatten().view(torch.uint8)


def is_as_before(found: Tensor, like: Tensor, values: Tensor) -> bool:
    """Tell whether a tensor has the layout of one and the values of another."""
    return (
        found.shape == like.shape
        and found.stride() == like.stride()
        and found.dtype == like.dtype
        and found.device == like.device
        and not found.requires_grad
        and torch.equal(bits(found), bits(values))
    )


# -- they come back ----------------------------------------------------------------------------------------------------

DTYPES = [
    torch.float64,
    torch.float32,
    torch.bfloat16,
    torch.float16,
    torch.complex64,
    torch.complex128,
    torch.int64,
    torch.int32,
    torch.uint8,
    torch.bool,
    torch.float8_e4m3fn,
]


def drawn(draw: st.DrawFn) -> Tensor:
    """Draw a strided view, overlapping or not, somewhere in a storage."""
    shape = draw(st.lists(st.integers(1, 5), min_size=0, max_size=4))
    stride = [draw(st.integers(0, 7)) for _ in shape]
    offset, rest = draw(st.integers(0, 200)), draw(st.integers(0, 200))
    span = 1 + sum((size - 1) * step for size, step in zip(shape, stride, strict=True))
    dtype = draw(st.sampled_from(DTYPES))
    bytes_ = torch.randint(256 if dtype != torch.bool else 2, ((offset + span + rest) * dtype.itemsize,))
    return bytes_.to(torch.uint8).view(dtype).as_strided(shape, stride, offset)


@given(data=st.data())
def test_any_strided_view_comes_back_as_it_was(data: st.DataObject) -> None:
    tensor = data.draw(st.composite(drawn)())
    store = Store()
    handle, values = store.put(tensor), tensor.clone()
    assert is_as_before(handle.get(), tensor, values)  # from the original
    like = torch.empty_strided(tensor.shape, tensor.stride(), dtype=tensor.dtype)
    assert store.bytes_held <= tensor.untyped_storage().nbytes()
    storage = weakref.ref(tensor.untyped_storage())
    del tensor
    assert storage() is None
    back = handle.get()
    assert is_as_before(back, like, values)
    assert back.data_ptr() % back.element_size() == 0
    again = handle.get()
    assert again.data_ptr() == back.data_ptr()  # what is there is not fetched twice
    del handle
    assert store.bytes_held == 0
    assert is_as_before(again, like, values)  # they outlive it


@pytest.mark.parametrize("at", [0, 1, 7, 16, 100, 1000])
def test_a_copy_is_aligned_as_its_original_was(at: int) -> None:
    x = torch.randn(4000)
    alignment = x[at : at + 10].data_ptr() % 64
    handle = Store().put(x[at : at + 10])
    del x
    assert handle.get().data_ptr() % 64 == alignment


def test_more_than_a_gigabyte_of_address_is_an_offset_like_any_other(tmp_path: Path) -> None:
    file = File(tmp_path)
    data = torch.arange(100, dtype=torch.uint8)
    at = 3 << 30  # a hole of 3 GiB takes no room
    file.transfer(at, data, write=True)
    back = torch.zeros_like(data)
    file.transfer(at, back, write=False)
    assert torch.equal(back, data)


def labelled() -> Tensor:
    return torch.ones(4, 4).as_subclass(Labelled)


def fake() -> Tensor:
    with FakeTensorMode():
        return torch.ones(4, 4)


def inference() -> Tensor:
    with torch.inference_mode():
        return torch.ones(4, 4)


LEFT: dict[str, Callable[[], Tensor]] = {
    "empty": lambda: torch.ones(3, 0),
    "conjugate": lambda: torch.randn(4, dtype=torch.complex64).conj(),
    "negative": lambda: torch.randn(4, dtype=torch.complex64).conj().imag,
    "sparse": lambda: torch.eye(4).to_sparse(),
    "compressed sparse": lambda: torch.eye(4).to_sparse_csr(),
    "quantised": lambda: torch.quantize_per_tensor(torch.randn(4), 0.1, 0, torch.qint8),
    "nested": lambda: torch.nested.nested_tensor([torch.randn(2), torch.randn(3)]),
    "jagged": lambda: torch.nested.nested_tensor([torch.randn(2), torch.randn(3)], layout=torch.jagged),
    "opaque": lambda: torch.randn(4).to_mkldnn(),
    "subclass": labelled,
    "fake": fake,
    "meta": lambda: torch.ones(4, device="meta"),
    "inference": inference,
}


@pytest.mark.parametrize("name", LEFT)
def test_what_cannot_come_back_as_it_was_is_left_alone(name: str) -> None:
    tensor, store = LEFT[name](), Store()
    assert not is_movable(tensor)
    found = store.put(tensor).get()
    assert store.bytes_spilled == 0
    assert type(found) is type(tensor)
    assert found.layout is tensor.layout
    assert (found.is_conj(), found.is_neg()) == (tensor.is_conj(), tensor.is_neg())
    if not (tensor.is_meta or name in {"fake", "jagged", "opaque"}):
        to_look_at = tensor.dequantize() if tensor.is_quantized else tensor
        assert str(found.dequantize() if tensor.is_quantized else found) == str(to_look_at)


@pytest.mark.parametrize("name", ["one", "view of one", "parameter", "scalar"])
def test_what_is_plain_is_moved(name: str) -> None:
    made = {
        "one": lambda: torch.randn(3),
        "view of one": lambda: torch.randn(3, 4).t()[1:],
        "parameter": lambda: nn.Parameter(torch.randn(3)),
        "scalar": lambda: torch.tensor(3.0),
    }[name]()
    assert is_movable(made)
    values, handle = made.detach().clone(), Store().put(made)
    del made
    found = handle.get()
    assert type(found) is Tensor
    assert torch.equal(found, values)


# -- once stored -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("whole", [False, True])
def test_views_of_one_storage_are_stored_once_and_come_back_on_one(whole: bool) -> None:
    store, x = Store(), torch.randn(30, 40)
    size, views = x.nbytes, [x] * whole + list(x.split([10, 10, 20], dim=1))
    values = [each.clone() for each in views]
    handles = [store.put(each) for each in views]
    assert store.bytes_spilled == size
    views.clear()
    del x
    found = [handle.get() for handle in handles]
    assert all(torch.equal(a, b) for a, b in zip(found, values, strict=True))
    assert len({each.untyped_storage().data_ptr() for each in found}) == 1


def test_a_view_that_repeats_is_not_blown_up() -> None:
    store, x = Store(), torch.randn(1, 64)
    handle = store.put(x.expand(1000, 64))
    assert store.bytes_spilled == x.nbytes
    values = x.clone()
    del x
    assert torch.equal(handle.get(), values.expand(1000, 64))
    assert handle.get().untyped_storage().nbytes() == values.nbytes


def test_small_parts_of_a_large_storage_are_moved_alone() -> None:
    store, x = Store(), torch.randn(16, 64)
    values = x.clone()
    handles = [store.put(row) for row in x]
    assert store.bytes_spilled == x.nbytes  # all of them together are all of it
    del x
    assert all(torch.equal(handle.get(), row) for handle, row in zip(handles, values, strict=True))
    assert handles[3].get().untyped_storage().nbytes() == 64 * 4


def test_a_part_finds_the_whole_that_is_stored() -> None:
    store, x = Store(), torch.randn(16, 64)
    whole = store.put(x)
    part = store.put(x[3])
    assert store.bytes_spilled == x.nbytes
    del whole
    assert store.bytes_held == x.nbytes  # the part needs it
    del part
    assert store.bytes_held == 0


def test_what_was_written_to_in_between_is_another_copy() -> None:
    store, x = Store(), torch.zeros(8)
    first = store.put(x)
    x.add_(1)
    second = store.put(x)
    assert store.bytes_spilled == 2 * x.nbytes
    del x
    assert torch.equal(second.get(), torch.ones(8))
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        first.get()


def test_parts_that_count_their_writes_apart_are_not_taken_for_one_another() -> None:
    store, x = Store(), torch.zeros(4, 8)
    left, right = x.unsafe_chunk(2, dim=1)  # as the gates of an LSTM's cell
    first = store.put(left.add_(1))
    second = store.put(right.add_(2))
    assert (left._version, right._version) == (1, 1)
    del x, left, right
    assert torch.equal(first.get(), torch.ones(4, 4))
    assert torch.equal(second.get(), torch.full((4, 4), 2.0))


def test_what_is_written_to_a_copy_is_not_seen_by_the_next() -> None:
    store = Store()
    handle = store.put(torch.zeros(8))
    mine = handle.get()
    mine.add_(1)
    assert torch.equal(handle.get(), torch.zeros(8))
    assert torch.equal(mine, torch.ones(8))


def test_writes_to_the_original_through_what_get_returned_are_counted() -> None:
    store, x = Store(), torch.zeros(8)
    handle = store.put(x)
    handle.get().add_(1)  # alive: it is the same memory
    assert x._version == 1
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        handle.get()


def test_a_storage_that_was_emptied_in_place_is_read_from_the_file() -> None:
    store, x = Store(), torch.arange(8.0)
    handle = store.put(x)
    x.untyped_storage().resize_(0)
    assert torch.equal(handle.get(), torch.arange(8.0))


def test_another_tensor_at_the_same_address_is_another() -> None:
    store, handles = Store(), list[Handle]()
    for value in range(50):
        handles.append(store.put(torch.full((64,), float(value))))
    assert all(torch.equal(handle.get(), torch.full((64,), float(at))) for at, handle in enumerate(handles))


def test_no_more_than_a_few_come_back_to_stay() -> None:
    store = Store()
    handles = [store.put(torch.randn(100)) for _ in range(10)]
    storages = [weakref.ref(handle.get().untyped_storage()) for handle in handles]
    assert sum(ref() is not None for ref in storages) <= 2
    handles.clear()
    assert all(ref() is None for ref in storages)


# -- the file ----------------------------------------------------------------------------------------------------------


@given(data=st.data())
@settings(max_examples=25)
def test_extents_never_overlap_and_are_used_again(data: st.DataObject) -> None:
    file, most = File(tempfile.gettempdir()), 0
    pieces: dict[int, tuple[Piece, int]] = {}
    for at in range(data.draw(st.integers(1, 40))):
        if pieces and data.draw(st.booleans()):
            del pieces[data.draw(st.sampled_from(sorted(pieces)))]
        else:
            size = data.draw(st.sampled_from([1, 100, 4096, 4097, 100_000, 1_000_000]))
            pieces[at] = file.put(torch.full((size,), at, dtype=torch.uint8)), size
        most = max(most, sum(-(-size // 4096) * 4096 for _, size in pieces.values()))
    for value, (piece, size) in pieces.items():
        assert torch.equal(piece.fetch(), torch.full((size,), value, dtype=torch.uint8))
    assert file.size <= 4 * most + (16 << 20)
    before = file.size
    pieces.clear()
    piece = None
    whole = file.put(torch.zeros(before, dtype=torch.uint8))  # what came back is one extent again
    assert whole.nbytes == before == file.size


def test_nothing_of_the_file_is_to_be_found_and_nothing_stays_open(tmp_path: Path) -> None:
    descriptors = Path("/proc/self/fd")
    if not descriptors.is_dir():
        pytest.skip("this system does not list open files")
    before = len(list(descriptors.iterdir()))
    store = Store(directory=tmp_path)
    handle = store.put(torch.randn(1000))
    assert store.file_bytes > 0
    assert list(tmp_path.iterdir()) == []
    assert len(list(descriptors.iterdir())) == before + 1
    del store
    assert len(list(descriptors.iterdir())) == before + 1  # the handle needs it
    del handle
    assert len(list(descriptors.iterdir())) == before


def test_a_file_that_ends_too_early_is_an_error(tmp_path: Path) -> None:
    file = File(tmp_path)
    with pytest.raises(SpillError, match=r"cannot read from the file .* with 8 B left: end of file"):
        file.transfer(1 << 40, torch.zeros(8, dtype=torch.uint8), write=False)


def test_a_directory_in_memory_is_said_to_be() -> None:
    shared = Path("/dev/shm")  # noqa: S108 - it is what this is about
    mounts = Path("/proc/self/mounts")
    if not mounts.exists() or f"{shared} tmpfs" not in mounts.read_text(encoding="utf-8"):
        pytest.skip("this system has no /dev/shm in memory")
    store = Store(directory=shared)
    with pytest.warns(UserWarning, match="tmpfs, which is memory"):
        handle = store.put(torch.ones(4))
    assert torch.equal(handle.get(), torch.ones(4))


def test_several_threads_put_and_get_at_once() -> None:
    store, wrong = Store(), list[Any]()

    def work(seed: int) -> None:
        generator = torch.Generator().manual_seed(seed)
        for _ in range(30):
            tensors = [torch.randn(500, generator=generator) for _ in range(5)]
            values = [each.clone() for each in tensors]
            handles = [store.put(each) for each in tensors]
            del tensors
            wrong.extend(1 for a, b in zip(handles, values, strict=True) if not torch.equal(a.get(), b))

    threads = [threading.Thread(target=work, args=(seed,)) for seed in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert wrong == []
    assert store.bytes_held == 0
    assert store.bytes_spilled == 6 * 30 * 5 * 2000


@pytest.mark.skipif(not hasattr(os, "fork"), reason="this system cannot fork")
def test_a_child_that_ends_gives_nothing_back_in_its_parent() -> None:
    store = Store()
    handle = store.put(torch.arange(100.0))
    child = os.fork()
    if child == 0:
        del handle
        os._exit(0)
    os.waitpid(child, 0)
    assert store.bytes_held == 400
    assert torch.equal(handle.get(), torch.arange(100.0))


# -- what may stay -----------------------------------------------------------------------------------------------------

KIB = 1 << 10


def block() -> Tensor:
    """Return a kibibyte."""
    return torch.ones(KIB // 4)


def test_what_is_put_away_briefly_has_the_first_claim_to_the_room() -> None:
    spill = Spill(smallest=KIB)
    first = [spill.put(block(), briefly=True) for _ in range(2)]
    del first
    spill.room = 3 * KIB
    for_long = [spill.put(block()) for _ in range(2)]
    assert [each.moved for each in for_long] == [False, True]
    briefly = [spill.put(block(), briefly=True) for _ in range(3)]
    assert [each.moved for each in briefly] == [False, False, True]
    del for_long, briefly
    # Three were asked for at once, so that nothing is left for others.
    spill.room = 3 * KIB
    assert spill.put(block()).moved
    assert not spill.put(block(), briefly=True).moved
    # And none since.
    spill.room = 3 * KIB
    spill.room = 3 * KIB
    assert [each.moved for each in [spill.put(block()) for _ in range(4)]] == [False, False, False, True]


def test_what_came_back_may_stay_as_long_as_there_is_room() -> None:
    spill = Spill(smallest=KIB)
    handles = [spill.put(block()) for _ in range(2)]
    spill.room = KIB
    back = [handle.get() for handle in handles]
    assert [spill.spares(each) for each in back] == [True, False]
    assert spill.spares(back[0])
    del back, handles[0]
    assert spill.spares(handles[0].get())


def test_what_stayed_briefly_does_not_stay_for_long() -> None:
    spill = Spill(smallest=KIB)
    spill.room = KIB
    x = block()
    assert not spill.put(x, briefly=True).moved
    assert spill.put(x).moved
