"""Choice of further microbatch sizes to measure, where a memory prediction is most uncertain."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from itertools import pairwise

from microbatch.memory.ledger import Timeline
from microbatch.memory.predict import predict

_SURE = 0.005  # relative uncertainty of the peak that needs no further window
_LOOKS = 4  # maximum number of additional fake windows
_NEAR = 4  # for sizes at most this many rows apart, a loop's tiles are a large part of the difference


def doubtful(sizes: Sequence[int], doubt: Callable[[int], float]) -> list[int]:
    """Return the middle of the most uncertain gap between two sizes, or nothing if ``doubt`` is small everywhere.

    Example:
        >>> doubtful([2, 4, 8, 16], lambda size: 0.01 if size > 8 else 0.02 if size == 6 else 0.0)
        [6]
    """
    wide = [(low, high) for low, high in pairwise(sizes) if high - low > 1]
    doubts = {(a + b) // 2: max(map(doubt, {a + 1, (a + b) // 2, b - 1})) for a, b in wide}
    return [size for size in doubts if doubts[size] == max(doubts.values()) > _SURE][:1]


def between(runs: Sequence[tuple[int, Timeline]]) -> list[int]:
    """Return the middle of every two sizes that are close together but whose loops differ.

    Between two such sizes, a tile may have another size than in both, so that the peak is not on their line.

    Args:
        runs: Microbatch sizes, ascending, with the timeline of each.

    Returns:
        The sizes in the middle.
    """
    return [
        (low + high) // 2
        for (low, one), (high, other) in pairwise(runs)
        if 1 < high - low <= _NEAR and list(one.operators) != list(other.operators)
    ]


def enough_of(fake: Callable[[int], Timeline], sizes: Sequence[int]) -> list[int]:
    """Add sizes where the predicted peak of fake windows is uncertain, because loops have more iterations."""
    enough = sorted([*sizes, *between([(size, fake(size)) for size in sizes])])
    for _ in range(_LOOKS):
        more = doubtful(enough, partial(predict(fake, sizes=enough).doubt, hidden=False))
        if not more:
            break
        enough = sorted([*enough, *more])
    return enough
