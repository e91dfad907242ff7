"""Heartbeats in the process group's store, for training loops of one's own: which rank is lost, and in which step."""

from __future__ import annotations

import itertools
import os
import platform
import socket
import sys
import threading
import time
import weakref
from collections.abc import Iterable, Mapping, Sequence
from contextlib import suppress
from dataclasses import replace
from multiprocessing import util
from typing import Any

import torch.distributed as dist

from microbatch.errors import RankError
from microbatch.ranks.lost_ranks import (
    BEGINNING,
    ENDED,
    FAILED,
    UNKNOWN,
    WAITING,
    Beat,
    describe_missing,
    is_of_a_lost_rank,
    pause,
    process_space,
)

_ANSWER = 10.0  # seconds that an answer of the store may take; a store on a busy machine may need several
_PATIENCE = 2.0  # seconds to wait until the other ranks have read the store
_AFTER = "after "  # of the detail of a rank that goes on after a failure
_LOOKING = "a collective failed, and the missing ranks are looked for"
_numbers = itertools.count()  # every rank makes its accumulators' first windows in the same order


class StoreBeats:
    """Record this rank's step in the store of the process group, and read the other ranks' steps after a failure.

    The store is a small server that all ranks have used to find one another. It answers also after a collective has
    failed. If the store is lost, what the ranks exchanged in their first window is left: the hosts and process ids.

    Args:
        ranks: The ranks that wait for one another, by their numbers in the default process group.

    Cost:
        About 3 microseconds for each heartbeat: the message is sent, and no answer is waited for. The store gets at
        most 1,000 messages a second from all ranks together.

    Source:
        Law F6.
    """

    def __init__(self, ranks: Iterable[int]) -> None:
        self._rank, self._number = dist.get_rank(), next(_numbers)
        self._known: dict[int, Beat | None] = dict.fromkeys(sorted({self._rank, *ranks}))
        self._reported: dict[int, int] = {}  # of each rank, how many failures have been described
        self._voice = voice = _Voice(_store_of_the_group(), self._key(self._rank), ranks=len(self._known))
        # When this object is freed, or the process ends; and when the process group is destroyed.
        util.Finalize(self, _Voice.end, args=(voice,), exitpriority=100)
        with suppress(TypeError):  # a group of another kind may not allow weak references
            weakref.finalize(dist.group.WORLD, _Voice.end, voice)

    @property
    def own(self) -> Beat:
        """The last heartbeat of this rank."""
        return self._voice.last

    def know(self, others: Mapping[int, Beat]) -> None:
        """Keep the other ranks' hosts and processes, in case the store is lost."""
        self._known.update(others)

    def at(self, step: int, stage: int) -> None:
        """Record the current stage of this rank."""
        self._voice.say(step, stage)

    def failed(self, error: BaseException) -> None:
        """Record that this rank failed with an error.

        The record stays, also if this rank opens another window, until the others know of it (`told`), or until all
        ranks have ended the step.
        """
        self._voice.say_failed(_named(error))

    def told(self) -> None:
        """Record that the other ranks know of this rank's failure."""
        self._voice.told = True

    def name(self, error: BaseException) -> None:
        """Raise an error that names the missing ranks, if a collective has failed because of them."""
        if not is_of_a_lost_rank(error):
            return
        if self._voice.untold:
            found = (
                f"step {self.own.step} came to a halt, because this rank failed in it ({self.own.detail}) and began "
                "another window, while the other ranks were still in the failed one"
            )
        else:
            # First, so that the ranks that fail a moment later do not take this one for the missing one.
            self.failed(RankError(_LOOKING))
            found = describe_missing(self.read, rank=self._rank)
        told = RankError(f"{found}. The ranks cannot go on without one another: restart all of them, from a checkpoint")
        self.failed(told)
        self._wait_for_others()
        raise told from error

    def failures(self, ranks: Sequence[int]) -> str:
        """Describe the failures of ranks that have reported them."""
        beats: dict[int, Beat] = {}
        for _ in range(10):  # the report may overtake the store's message
            told = {rank: _decoded(text) for rank, text in self._ask(ranks).items()}
            beats = {
                rank: beat for rank, beat in told.items() if beat.detail and beat.failures > self._reported.get(rank, 0)
            }
            if len(beats) == len(ranks):
                break
            time.sleep(pause(len(self._known)) / 2)
        self._reported |= {rank: beat.failures for rank, beat in beats.items()}
        why = {rank: f" ({beats[rank].detail.removeprefix(_AFTER)})" if rank in beats else "" for rank in ranks}
        return " and ".join(f"rank {rank} failed in step {self.own.step}{why[rank]}" for rank in ranks)

    def read(self) -> dict[int, Beat | None]:
        """Return the last heartbeat of each rank; `None` for a rank that has never had one."""
        told = self._ask([rank for rank in self._known if rank != self._rank])
        found: dict[int, Beat | None] = {}
        for rank, known in self._known.items():
            if rank == self._rank:
                found[rank] = replace(self.own, stage=WAITING)
            elif rank in told:
                found[rank] = self._at_least(_decoded(told[rank]))
            else:
                found[rank] = known and self._at_least(replace(known, step=-1, stage=UNKNOWN))
        return found

    def _wait_for_others(self) -> None:
        """Wait a moment until the other ranks have read the store, which may end with this process."""
        until = time.monotonic() + _PATIENCE
        while time.monotonic() < until:
            others = [beat for rank, beat in self.read().items() if rank != self._rank and beat is not None]
            reading = [beat for beat in others if beat.stage != FAILED or beat.detail.endswith(_LOOKING)]
            if all(beat.certain and not beat.detail.endswith(_LOOKING) for beat in reading):
                return
            time.sleep(pause(len(self._known)))

    def _at_least(self, beat: Beat) -> Beat:
        """Correct an old heartbeat: all ranks have ended the step before this one, because they agree in each step."""
        before = max(0, self.own.step - 1)
        if beat.step >= before:
            return beat
        return replace(beat, step=before, stage=WAITING if beat.stage >= 0 else beat.stage)

    def _ask(self, ranks: Sequence[int]) -> Mapping[int, str]:
        """Read heartbeats from the store, in a thread, because a store that is stopped never answers."""
        found: dict[int, str] = {}
        base = self._voice.base
        if base is None:
            return found

        def ask() -> None:
            with suppress(RuntimeError, OSError):
                _check_reachable(base)
                store, keys = _own_connection(base), [self._key(rank) for rank in ranks]
                if store.has_extended_api() and store.check(keys):
                    found.update(zip(ranks, [each.decode() for each in store.multi_get(keys)], strict=True))
                    return
                for rank, key in zip(ranks, keys, strict=True):
                    if store.check([key]):
                        found[rank] = store.get(key).decode()

        thread = threading.Thread(target=ask, daemon=True)
        thread.start()
        thread.join(_ANSWER)
        if thread.is_alive():
            self._voice.base = None
            return {}
        return found

    def _key(self, rank: int) -> str:
        return f"microbatch/{self._number}/{rank}"


class _Voice:
    """The heartbeats that this rank sends.

    Args:
        store: The store of the process group; `None` to send nothing.
        key: The key of this rank.
        ranks: Number of ranks that send heartbeats.

    Attributes:
        base: The store, to make other connections; `None` if it does not answer, or the process group has ended.
        told: Whether the other ranks know of this rank's last failure.
    """

    def __init__(self, store: Any, key: str, *, ranks: int) -> None:
        self.base, self._key = store, key
        self._store = store and _own_connection(store)
        self.step, self.stage, self.detail, self.seconds = 0, BEGINNING, "", time.time()
        self._failures, self._failure, self.told = 0, "", False
        self._host, self.process, self._space = platform.node(), os.getpid(), process_space()
        self._where = f"{self.process}|{self._host}|{self._space}"
        # A store in a file grows with every message.
        server = isinstance(_innermost(store), dist.TCPStore)  # pyright: ignore[reportPrivateImportUsage]
        self._between = max(ranks / 1000, 0.0 if server else 1.0)
        self._next = 0.0
        self.say_now(0, BEGINNING, "")

    @property
    def last(self) -> Beat:
        """The last heartbeat, also if it was not sent."""
        where = self._host, self.process, self._space
        return Beat(self.step, self.stage, self.detail, self.seconds, *where, self._failures)

    @property
    def untold(self) -> bool:
        """Whether this rank has failed by an error of its own, of which the other ranks do not know."""
        return bool(self._failure) and not self.told and self.last.at_fault

    def say(self, step: int, stage: int) -> None:
        """Send a heartbeat, unless the last one was sent a moment ago, or is a failure that must stay."""
        if self._failure:
            if step > self.step:  # all ranks have agreed on the end of the failed step
                self._failure = ""
            elif not self.told:
                return
        self.step, self.stage, self.detail = step, stage, self._failure and _AFTER + self._failure
        if (now := time.monotonic()) >= self._next:
            self.say_now(step, stage, self.detail)
            self._next = now + self._between

    def say_failed(self, why: str) -> None:
        """Send a failure in the current step; the first failure stays, if the other ranks do not know of it."""
        if not self.untold:
            self._failures, self._failure, self.told = self._failures + 1, why, False
            self.say_now(self.step, FAILED, why)

    def say_now(self, step: int, stage: int, detail: str) -> None:
        """Send a heartbeat."""
        self._next = 0.0
        self.step, self.stage, self.detail, self.seconds = step, stage, detail[:300], time.time()
        if self._store is not None:
            try:
                self._store.set(
                    self._key, f"{step}|{stage}|{self.seconds:.1f}|{self._where}|{self._failures}|{self.detail}"
                )
            except RuntimeError:
                self._store = None  # the process that has the store is gone; the next collective fails, too

    def end(self) -> None:
        """Record that the accumulator or the process group is gone, or that the process ends."""
        if os.getpid() == self.process and self.stage not in {FAILED, ENDED}:
            error = sys.exception() or getattr(sys, "last_exc", None)
            if isinstance(error, SystemExit | GeneratorExit):
                error = error.__context__
            if isinstance(error, BaseException):
                self.step += self.stage == WAITING  # the step that waited for the others is over
                self.say_failed(_named(error))
            else:
                self.say_now(self.step, ENDED, "")
        self._store = self.base = None  # so that the store can end


def _named(error: BaseException) -> str:
    return f"{type(error).__name__}: {' '.join(str(error).split())}"


def _decoded(text: str) -> Beat:
    step, stage, seconds, process, host, space, failures, detail = text.split("|", 7)
    return Beat(int(step), int(stage), detail, float(seconds), host, int(process), space, int(failures))


def _store_of_the_group() -> Any:
    """Return the store of the default process group; `None` if there is none."""
    # Private to torch; without it, lost ranks are named by their processes alone.
    find = getattr(dist.distributed_c10d, "_get_default_store", None)
    return None if find is None else find()


def _own_connection(store: Any) -> Any:
    """Return a connection of one's own to a store: another thread may wait for an answer on the given one."""
    return store.clone() if hasattr(store, "clone") else store


def _check_reachable(store: Any) -> None:
    """Raise `OSError` if a store's server is gone; a new connection would report this with long warnings."""
    server = _innermost(store)
    if hasattr(server, "host") and hasattr(server, "port"):
        socket.create_connection((server.host, server.port), _ANSWER).close()


def _innermost(store: Any) -> Any:
    while isinstance(store, dist.PrefixStore):  # pyright: ignore[reportPrivateImportUsage]
        store = store.underlying_store
    return store
