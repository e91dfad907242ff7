"""Matching of operators between runs whose loops have different numbers of iterations."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import chain, pairwise

# Two positions match if the next _AGREE operators are equal. To find a match, up to _SKIP operators are skipped in one
# run, or up to _OWN in each of both. A loop's iteration has at most _TURN operators.
_AGREE, _SKIP, _OWN, _TURN = 8, 4096, 64, 64


def align(runs: Sequence[Sequence[str]]) -> list[list[int]] | None:
    """Match the operators of several runs.

    If a loop has more iterations in one run than in another, the extra iterations are left out. So is the last
    iteration that both runs have, except its first operator, which stands for all of them.

    Args:
        runs: For each run, the names of its operators, in order.

    Returns:
        For each run, the indices of the matched operators, ascending; each stands for the operators up to the next.
        `None` if less than half of the operators match.

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
    """Return the length of an iteration of the loop between two indices; 1 if there is no operator between them."""
    more = following - last - 1
    for length in range(1, more):
        start = last + 1 - length
        if start >= 0 and all(run[at] == run[at - length] for at in range(last + 1, following)):
            return length
    return max(1, more)


def _pairs(left: Sequence[str], right: Sequence[str]) -> list[tuple[int, int]]:
    """Match two runs from the start, and skip as few operators as possible where they differ."""
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
    """Return the nearest two indices from which both runs are equal; the end of a loop is tried first."""
    # The operators after a loop also occur in the next microbatch, which may be nearer than the end of the loop.
    behind = chain(((i, end) for end in _behind(right, j)), ((end, j) for end in _behind(left, i)))
    one_sided = ((a, b) for skip in range(1, _SKIP) for a, b in ((i, j + skip), (i + skip, j)))
    # Both runs may have operators here that the other lacks.
    two_sided = ((i + skip, j + other) for skip in range(1, _OWN) for other in range(1, _OWN))
    for a, b in chain(behind, one_sided, two_sided):
        ahead = left[a : a + _AGREE]
        if ahead and ahead == right[b : b + _AGREE]:
            return a, b
    return None


def _behind(run: Sequence[str], at: int) -> Iterator[int]:
    """Yield where the loop around an index ends, for each possible length of its iterations."""
    for length in range(1, min(_TURN, at) + 1):
        if run[at - length : at] == run[at : at + length]:
            end = at + length
            while run[end - length : end] == run[end : end + length]:
                end += length
            yield end


def spans(places: Sequence[int], length: int) -> list[range]:
    """Return the range of operators that each matched operator stands for, in a run of ``length`` operators.

    Example:
        >>> spans([0, 1, 4], 5)
        [range(0, 1), range(1, 4), range(4, 5)]
    """
    return [range(a, b) for a, b in pairwise([0, *places[1:], length])] if places else []
