"""Check, before the first window, that all ranks have the same model, optimizer settings and options."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence

from microbatch.errors import RankError
from microbatch.ranks.lost_ranks import Beat
from microbatch.ranks.process_group import RankGroup

_SHOWN = 3


def check_same(groups: Sequence[tuple[RankGroup, Mapping[str, str]]], own: Beat) -> dict[int, Beat]:
    """Check that the ranks of each group are set up alike.

    The ranks compare hashes. Only if these differ, they exchange the texts. Every rank of every group raises the error,
    so no rank waits for another one.

    Args:
        groups: Process groups of this rank, and what must be the same on all ranks of each: texts by name, in an order
            that must be the same, too.
        own: Host and process of this rank, which the other ranks get.

    Returns:
        The heartbeats that the other ranks sent, by their numbers in the default process group.

    Raises:
        RankError: The ranks of a group are set up differently; the message names what, and on which rank.

    Cost:
        Two small all-gathers for each group.

    Source:
        Law F5.
    """
    problem, beats = "", dict[int, Beat]()
    for ranks, described in groups:
        told = ranks.tell((_digest(described), problem, own))
        beats |= zip(ranks.members, [beat for _, _, beat in told], strict=True)
        found = next((text for _, text, _ in told if text), "")
        if len({digest for digest, _, _ in told}) > 1:
            found = differences(dict(zip(ranks.members, ranks.tell(dict(described)), strict=True)))
        problem = problem or found
    if problem:
        raise RankError(problem)
    return beats


def differences(described: Mapping[int, Mapping[str, str]]) -> str:
    """Return an error message that names what differs between ranks, from texts by name for each rank.

    Example:
        >>> differences({0: {"max_grad_norm": "1.0"}, 1: {"max_grad_norm": "2.0"}})[:70]
        'the ranks are not set up alike: max_grad_norm is 1.0 on rank 0, and 2.'
    """
    names = list(dict.fromkeys(name for each in described.values() for name in each))
    found: list[str] = []
    for name in names:
        where: dict[str, list[int]] = {}
        for rank, each in described.items():
            where.setdefault(each.get(name, "missing"), []).append(rank)
        if len(where) > 1:
            parts = [f"{text} on {ranks_named(ranks)}" for text, ranks in where.items()]
            found.append(f"{name} is {', and '.join(parts)}")
    if not found:
        orders = {rank: list(each) for rank, each in described.items()}
        first, other = next((a, b) for a in orders for b in orders if orders[a] != orders[b])
        place = next(
            index for index, pair in enumerate(zip(orders[first], orders[other], strict=True)) if len({*pair}) > 1
        )
        found.append(
            f"the order differs: {orders[first][place]} on rank {first} is at the place of {orders[other][place]} on "
            f"rank {other}"
        )
    more = f"; and {len(found) - _SHOWN} more differences" if len(found) > _SHOWN else ""
    return (
        f"the ranks are not set up alike: {'; '.join(found[:_SHOWN])}{more}. Give every rank the same model, optimizer "
        "settings and options, and the same state to continue from"
    )


def ranks_named(ranks: Sequence[int]) -> str:
    """Return for example ``"ranks 0, 2 and 3"``; of more than six ranks, the first six."""
    names = [str(rank) for rank in ranks[:6]] + ([f"{len(ranks) - 6} more"] if len(ranks) > 6 else [])
    listed = names[0] if len(names) == 1 else f"{', '.join(names[:-1])} and {names[-1]}"
    return f"rank{'s' if len(names) > 1 else ''} {listed}"


def _digest(described: Mapping[str, str]) -> bytes:
    return hashlib.sha256(repr(list(described.items())).encode()).digest()
