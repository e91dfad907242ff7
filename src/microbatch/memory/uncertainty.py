"""Where one more window would tell most of the peak."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from itertools import pairwise

from microbatch.memory.ledger import Timeline
from microbatch.memory.predict import predict

_SURE = 0.005  # of the peak, by which it may be less than predicted without a look
_LOOKS = 4  # fake windows more
_NEAR = 4  # rows between two sizes, up to which a loop's tiles are a large part of the difference


def doubtful(sizes: Sequence[int], doubt: Callable[[int], float]) -> list[int]:
    """Say where one more window would tell most.

    Args:
        sizes: Those that were run, ascending.
        doubt: By which part of itself the peak at another size may be less than predicted.

    Returns:
        The middle of the gap between two sizes of which least is known; none where enough is known of all.

    Example:
        >>> doubtful([2, 4, 8, 16], lambda size: 0.01 if size > 8 else 0.02 if size == 6 else 0.0)
        [6]
    """
    wide = [(low, high) for low, high in pairwise(sizes) if high - low > 1]
    doubts = {(a + b) // 2: max(map(doubt, {a + 1, (a + b) // 2, b - 1})) for a, b in wide}
    return [size for size in doubts if doubts[size] == max(doubts.values()) > _SURE][:1]


def between(runs: Sequence[tuple[int, Timeline]]) -> list[int]:
    """Say where sizes lie close together and still go round a loop a different number of times.

    A tile that both cut alike may be another one between them, on no line through the two.

    Args:
        runs: Sizes, ascending, and what ran at each.

    Returns:
        The middle of each such two.
    """
    return [
        (low + high) // 2
        for (low, one), (high, other) in pairwise(runs)
        if 1 < high - low <= _NEAR and list(one.operators) != list(other.operators)
    ]


def enough_of(fake: Callable[[int], Timeline], sizes: Sequence[int]) -> list[int]:
    """Add sizes where loops that turn more often leave the peak of fake windows in doubt.

    Args:
        fake: Runs a window of so many rows that takes no memory, and remembers it.
        sizes: Two or more, ascending.

    Returns:
        These and the ones that were added, ascending.
    """
    enough = sorted([*sizes, *between([(size, fake(size)) for size in sizes])])
    for _ in range(_LOOKS):
        more = doubtful(enough, partial(predict(fake, sizes=enough).doubt, hidden=False))
        if not more:
            break
        enough = sorted([*enough, *more])
    return enough
