"""How ranks that have just been started find one another, and not those that were here before them."""

from __future__ import annotations

import datetime as dt
import secrets
import time

from torch.distributed.distributed_c10d import PrefixStore, Store

from microbatch.errors import RankError

_BETWEEN = 0.02


def fresh(store: Store, *, rank: int, ranks: int, patience: float) -> Store:
    """Return a part of the store that nobody has written to.

    A launcher that starts the ranks again keeps its store, and in it the addresses of those that are dead, which a
    new rank may read before they are overwritten. It does not number the launches alike on all machines either. So
    the first rank makes up a name, and each of the others a word of its own, by which it knows that the answer is to
    itself: an old answer has another word, and an old acknowledgement another name.

    Args:
        store: Which all ranks see; what is left of earlier launches may be in it.
        rank: This one.
        ranks: How many there are.
        patience: Seconds to wait for all of them.

    Returns:
        The part.

    Raises:
        RankError: A rank did not come.

    Cost:
        Some ten small messages a rank, most of them with the first one.
    """
    store.set_timeout(dt.timedelta(seconds=patience))
    deadline = time.monotonic() + patience
    name = _invite(store, ranks=ranks, deadline=deadline) if rank == 0 else _come(store, rank=rank, deadline=deadline)
    return PrefixStore(name, store)


def _invite(store: Store, *, ranks: int, deadline: float) -> str:
    name, missing = secrets.token_hex(8), set(range(1, ranks))
    while missing:
        for rank in sorted(missing):
            if _read(store, f"microbatch/came/{rank}") == name:
                missing.discard(rank)
            elif word := _read(store, f"microbatch/word/{rank}"):
                store.set(f"microbatch/answer/{rank}", f"{word} {name}")
        if missing and time.monotonic() > deadline:
            listed = ", ".join(f"rank {rank}" for rank in sorted(missing))
            raise RankError(f"{listed} did not start in time (--rank-timeout); see the launcher's own report")
        time.sleep(_BETWEEN if missing else 0)
    return name


def _come(store: Store, *, rank: int, deadline: float) -> str:
    own = secrets.token_hex(8)
    store.set(f"microbatch/word/{rank}", own)
    while time.monotonic() <= deadline:
        word, _, name = _read(store, f"microbatch/answer/{rank}").partition(" ")
        if word == own:
            store.set(f"microbatch/came/{rank}", name)
            return name
        time.sleep(_BETWEEN)
    raise RankError("rank 0 did not start in time (--rank-timeout); see the launcher's own report")


def _read(store: Store, key: str) -> str:
    return store.get(key).decode() if store.check([key]) else ""
