"""Which operators of two runs are the same ones, where a run of more rows goes round a loop more often."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import chain, pairwise

# Operators that have to agree behind a place for it to count as the same one; how many may be passed over to find it in
# one run, and in both; operators of a turn of a loop.
_AGREE, _SKIP, _OWN, _TURN = 8, 4096, 64, 64


def align(runs: Sequence[Sequence[str]]) -> list[list[int]] | None:
    """Match the operators of several runs.

    Where one run goes round a loop more often than another, its further turns are left out together with the last turn
    that both have, but for the first operator of that: it stands for all of them.

    Args:
        runs: Their operators, by name, in the order they ran.

    Returns:
        For each run the places of the operators that stand for those up to the next, ascending; `None` where the runs
        have less than half of their operators in common.

    Example:
        >>> align(["abxyc", "abxyxyc"])
        [[0, 1, 2, 4], [0, 1, 2, 6]]
    """
    first, *others = runs
    if all(list(first) == list(other) for other in others):
        return [list(range(len(first))) for _ in runs]
    maps: list[dict[int, int]] = []
    dropped: set[int] = set()
    for other in others:
        pairs = _pairs(first, other)
        maps.append(dict(pairs))
        for (i, j), (next_i, next_j) in pairwise([*pairs, (len(first), len(other))]):
            turn = max(_turn(first, i, next_i), _turn(other, j, next_j))
            dropped.update(range(i - turn + 2, i + 1))
    common = [place for place in range(len(first)) if place not in dropped and all(place in each for each in maps)]
    if 2 * len(common) < len(first) or not common:
        return None
    return [common, *([each[place] for place in common] for each in maps)]


def _turn(run: Sequence[str], last: int, following: int) -> int:
    """Count the operators of one turn of the loop whose further turns lie between two places; 1 where nothing lies."""
    more = following - last - 1
    for length in range(1, more):
        start = last + 1 - length
        if start >= 0 and all(run[at] == run[at - length] for at in range(last + 1, following)):
            return length
    return max(1, more)


def _pairs(left: Sequence[str], right: Sequence[str]) -> list[tuple[int, int]]:
    """Walk through both at once, passing over as little as possible where they differ."""
    found: list[tuple[int, int]] = []
    i = j = 0
    while i < len(left) and j < len(right):
        if left[i] == right[j]:
            found.append((i, j))
            i, j = i + 1, j + 1
            continue
        ahead = _meet(left, right, i, j)
        if ahead is None:
            break
        i, j = ahead
    return found


def _meet(left: Sequence[str], right: Sequence[str], i: int, j: int) -> tuple[int, int] | None:  # noqa: PLR0917
    """Find the nearest two places behind which both go on alike, or those behind a loop that either is in."""
    # What follows a loop may be nearer in the other run's next microbatch than behind all the turns.
    behind = chain(((i, end) for end in _behind(right, j)), ((end, j) for end in _behind(left, i)))
    one_sided = ((a, b) for skip in range(1, _SKIP) for a, b in ((i, j + skip), (i + skip, j)))
    # Or both have something of their own here.
    two_sided = ((i + skip, j + other) for skip in range(1, _OWN) for other in range(1, _OWN))
    for a, b in chain(behind, one_sided, two_sided):
        ahead = left[a : a + _AGREE]
        if ahead and ahead == right[b : b + _AGREE]:
            return a, b
    return None


def _behind(run: Sequence[str], at: int) -> Iterator[int]:
    """Find where further turns of the loop that a place is in end, for each length that a turn may have."""
    for length in range(1, min(_TURN, at) + 1):
        if run[at - length : at] == run[at : at + length]:
            end = at + length
            while run[end - length : end] == run[end : end + length]:
                end += length
            yield end


def spans(places: Sequence[int], length: int) -> list[range]:
    """Return the operators that each place stands for.

    Args:
        places: Ascending.
        length: Operators of the run.

    Returns:
        A range for each place, which together are the run.

    Example:
        >>> spans([0, 1, 4], 5)
        [range(0, 1), range(1, 4), range(4, 5)]
    """
    return [range(a, b) for a, b in pairwise([0, *places[1:], length])] if places else []
