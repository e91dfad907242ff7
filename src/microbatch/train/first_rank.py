"""What one rank does for all."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar

from microbatch.errors import MicrobatchError
from microbatch.ranks.process_group import RankGroup

Result = TypeVar("Result")


def by_the_first(ranks: RankGroup | None, work: Callable[[], Result]) -> Result:
    """Let the first rank do it, and give what came of it, or went wrong, to all of them.

    Args:
        ranks: The ranks, all of which call this; `None` for a single process.
        work: What is done; its result can be pickled.

    Returns:
        The result.

    Raises:
        MicrobatchError: What the work raised, on every rank.

    Cost:
        Over several ranks one small message.
    """
    if ranks is None:
        return work()
    outcome: tuple[Any, MicrobatchError | None] = (None, None)
    if ranks.index == 0:
        try:
            outcome = work(), None
        except MicrobatchError as error:
            outcome = None, error
    result, refused = ranks.tell(outcome)[0]
    if refused is not None:
        raise refused
    return result
