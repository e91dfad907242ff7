"""Effective batch = microbatch size * microbatches * ranks, in every direction."""

import itertools
import json
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import microbatch as mb
from microbatch.errors import ConfigError

SMALL = st.integers(1, 40)


@given(size=SMALL, count=SMALL, ranks=SMALL)
def test_of_an_even_division_every_number_follows_from_the_others(size: int, count: int, ranks: int) -> None:
    whole = {"batch_size": size * count * ranks, "microbatch_size": size, "microbatches": count, "ranks": ranks}
    expected = mb.Division(**whole)
    assert expected.even
    assert mb.divide_batch(**whole) == expected
    for left_out in whole:
        assert mb.divide_batch(**{name: value for name, value in whole.items() if name != left_out}) == expected


@given(batch=st.integers(1, 300), size=SMALL, ranks=st.integers(1, 8))
def test_any_batch_is_shared_and_cut_as_the_library_cuts_it(batch: int, size: int, ranks: int) -> None:
    if batch < ranks:
        return
    found = mb.divide_batch(batch, microbatch_size=size, ranks=ranks)
    shares = [len(share) for share in torch.tensor_split(torch.arange(batch), ranks)]
    assert max(shares) == found.share
    pieces = [[len(piece) for piece in mb.cut(torch.ones(share), size)] for share in shares]
    longest = max(pieces, key=sum)
    assert (len(longest), longest[0], longest[-1]) == (found.microbatches, found.microbatch_size, found.last)
    assert found.even == (len({tuple(rank) for rank in pieces}) == 1 == len(set(longest)))


@given(batch=st.integers(1, 300), count=SMALL, ranks=st.integers(1, 8))
def test_a_number_of_microbatches_is_not_passed(batch: int, count: int, ranks: int) -> None:
    if batch < ranks:
        return
    found = mb.divide_batch(batch, microbatches=count, ranks=ranks)
    assert found.batch_size == batch
    assert found.microbatches <= count
    # A row less at once would need more of them.
    assert found.microbatch_size == 1 or -(-found.share // (found.microbatch_size - 1)) > count


@given(batch=st.integers(1, 120), size=st.integers(1, 20), ranks=st.integers(1, 5))
def test_the_nearest_even_ones_are_the_nearest_of_all(batch: int, size: int, ranks: int) -> None:
    if batch < ranks:
        return
    found = mb.divide_batch(batch, microbatch_size=size, ranks=ranks)
    near = found.nearest()
    assert all(each.even and each.ranks == ranks for each in near)
    if found.even:
        assert near == (found,)
        return
    size = found.microbatch_size
    batches = {size * count * ranks for count in range(1, 130)}
    below = max((other for other in batches if other < batch), default=None)
    above = min(other for other in batches if other > batch)
    expected = {(other, size) for other in (below, above) if other is not None}
    sizes = {one for one, count in itertools.product(range(1, 121), repeat=2) if one * count * ranks == batch}
    if sizes:
        expected |= {(batch, max(one for one in sizes if one < size)), (batch, min(one for one in sizes if one > size))}
    assert {(each.batch_size, each.microbatch_size) for each in near} == expected
    assert [each.batch_size for each in near] == sorted(each.batch_size for each in near)


@pytest.mark.parametrize(
    ("numbers", "text"),
    [
        ({"batch_size": 64, "microbatch_size": 16}, "64 = 4 x 16 rows"),
        ({"batch_size": 64, "microbatch_size": 8, "ranks": 2}, "64 = 2 ranks of 4 x 8 rows"),
        ({"batch_size": 5, "microbatch_size": 8}, "5 = 1 x 5 rows"),
        ({"batch_size": 64}, "64 = 1 x 64 rows"),
        ({"microbatch_size": 8, "microbatches": 3}, "24 = 3 x 8 rows"),
        (
            {"batch_size": 10, "microbatch_size": 2, "ranks": 4},
            "10 = 4 ranks of 1 x 2 + 1 rows, 2 of them one row less",
        ),
        ({"batch_size": 9, "microbatches": 6}, "9 = 4 x 2 + 1 rows"),
    ],
)
def test_it_reads_as_a_sum(numbers: dict[str, int], text: str) -> None:
    first, *rest = mb.divide_batch(**numbers).describe().splitlines()
    assert first == text
    assert bool(rest) != mb.divide_batch(**numbers).even


def test_json_has_the_nearest_too() -> None:
    back = json.loads(json.dumps(mb.divide_batch(250, microbatch_size=16).as_dict()))
    assert back["even"] is False
    assert [(each["batch_size"], each["microbatch_size"]) for each in back["nearest"]] == [
        (240, 16),
        (250, 10),
        (250, 25),
        (256, 16),
    ]


@pytest.mark.parametrize("value", [0, -4, True])
@pytest.mark.parametrize("name", ["batch_size", "microbatch_size", "microbatches", "ranks"])
def test_a_number_that_is_none_is_refused(name: str, value: Any) -> None:
    numbers: dict[str, Any] = {"batch_size": 64, name: value}
    with pytest.raises(ConfigError, match=f"{name} must be a whole number of at least 1, not {value!r}"):
        mb.divide_batch(**numbers)


@pytest.mark.parametrize(
    ("numbers", "words"),
    [
        ({"microbatch_size": 8}, "give batch_size, or both"),
        ({"ranks": 8}, "give batch_size, or both"),
        ({"batch_size": 3, "ranks": 4}, "a batch of 3 has no row for some of 4 ranks"),
        (
            {"batch_size": 64, "microbatch_size": 8, "microbatches": 4, "ranks": 1},
            "64 rows on a rank make 8 microbatches of 8, not 4; leave one of the four numbers out",
        ),
    ],
)
def test_numbers_that_cannot_be_are_refused(numbers: dict[str, int], words: str) -> None:
    with pytest.raises(ConfigError, match=words):
        mb.divide_batch(**numbers)
