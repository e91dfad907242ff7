"""Heartbeats in a process group's store, without other processes: what is read, and what is known without the store."""

import os
import platform
from collections.abc import Generator

import pytest
import torch
import torch.distributed as dist
from torch._C._distributed_c10d import HashStore

from microbatch.errors import RankError
from microbatch.ranks.lost_ranks import COMPUTING, FAILED, UNKNOWN, WAITING, Beat
from microbatch.ranks.process_group import RankGroup
from microbatch.ranks.store_beats import StoreBeats


@pytest.fixture
def store() -> Generator[HashStore]:
    store = HashStore()
    dist.init_process_group("gloo", store=store, rank=0, world_size=1)
    yield store
    if dist.is_initialized():
        dist.destroy_process_group()


def say(beats: StoreBeats, rank: int, step: int, stage: int, detail: str = "", *, failures: int = 0) -> None:
    """Send a heartbeat in the place of another rank, whose process is this one."""
    dist.distributed_c10d._get_default_store().set(
        beats._key(rank),
        f"{step}|{stage}|0.0|{os.getpid()}|{platform.node()}||{failures}|{detail}",
    )


@pytest.mark.usefixtures("store")
def test_what_other_ranks_have_sent_is_read() -> None:
    beats = StoreBeats([0, 1, 2])
    beats.at(4, COMPUTING)
    say(beats, 1, 4, WAITING)
    found = beats.read()
    assert (found[1] and found[1].step, found[1] and found[1].stage) == (4, WAITING)
    assert found[2] is None


@pytest.mark.usefixtures("store")
def test_an_old_heartbeat_counts_as_the_step_that_all_ranks_have_ended() -> None:
    beats = StoreBeats([0, 1])
    beats.at(9, COMPUTING)
    say(beats, 1, 3, COMPUTING)
    found = beats.read()[1]
    assert found is not None
    assert (found.step, found.stage) == (8, WAITING)


@pytest.mark.usefixtures("store")
def test_without_an_answer_of_the_store_the_hosts_and_processes_are_known() -> None:
    beats = StoreBeats([0, 1])
    gone = 2**22 + 1  # above the largest process id
    beats.know({1: Beat(0, 0, "", 0.0, platform.node(), gone)})
    beats.at(5, COMPUTING)
    found = beats.read()[1]
    assert found is not None
    assert (found.step, found.stage, found.gone) == (4, UNKNOWN, True)
    with pytest.raises(
        RankError, match=r"step 5 came to a halt, because rank 1 has ended or died; it took part in step 4"
    ):
        beats.name(RuntimeError("[gloo] Connection closed by peer"))


@pytest.mark.usefixtures("store")
def test_an_error_of_the_model_is_no_lost_rank() -> None:
    beats = StoreBeats([0, 1])
    beats.name(RuntimeError("mat1 and mat2 shapes cannot be multiplied"))
    beats.name(RankError("1 of 2 ranks failed, and one had timed out"))


@pytest.mark.usefixtures("store")
def test_the_ranks_that_report_a_failure_are_told_with_their_error() -> None:
    beats = StoreBeats([0, 1, 2])
    beats.at(5, WAITING)
    say(beats, 1, 5, FAILED, "ValueError: a | b", failures=1)
    assert beats.failures([1]) == "rank 1 failed in step 5 (ValueError: a | b)"
    assert beats.failures([2]) == "rank 2 failed in step 5"


@pytest.mark.usefixtures("store")
def test_a_failure_is_told_with_its_own_error_also_if_the_rank_has_gone_on() -> None:
    beats = StoreBeats([0, 1])
    beats.at(5, WAITING)
    say(beats, 1, 5, COMPUTING, "after ValueError: first", failures=1)
    assert beats.failures([1]) == "rank 1 failed in step 5 (ValueError: first)"
    # The next failure's message is late: the error of the first one is not told twice.
    assert beats.failures([1]) == "rank 1 failed in step 5"
    say(beats, 1, 5, COMPUTING, "after ValueError: second", failures=2)
    assert beats.failures([1]) == "rank 1 failed in step 5 (ValueError: second)"


@pytest.mark.usefixtures("store")
def test_a_failure_stays_until_the_others_know_of_it_or_have_ended_the_step() -> None:
    beats = StoreBeats([0, 1])
    beats.at(3, COMPUTING)
    beats.failed(ValueError("mine"))
    beats.at(3, COMPUTING)  # the next window of a loop that catches the error
    beats.failed(KeyError("another"))
    assert (beats.own.stage, beats.own.detail, beats.own.failures) == (FAILED, "ValueError: mine", 1)
    with pytest.raises(RankError, match=r"this rank failed in it \(ValueError: mine\) and began another window"):
        beats.name(RuntimeError("[gloo] Connection closed by peer"))
    assert beats.own.detail == "ValueError: mine"
    beats.told()
    beats.at(3, WAITING)
    assert (beats.own.stage, beats.own.detail) == (WAITING, "after ValueError: mine")
    beats.at(4, COMPUTING)
    assert (beats.own.stage, beats.own.detail) == (COMPUTING, "")
    beats.failed(OSError("the second one"))
    beats.at(5, COMPUTING)  # step 4 has ended, so all ranks have agreed
    assert (beats.own.stage, beats.own.detail, beats.own.failures) == (COMPUTING, "", 2)


def test_a_message_is_sent_when_the_group_is_destroyed(store: HashStore) -> None:
    beats = StoreBeats([0, 1])
    beats.at(2, WAITING)
    dist.destroy_process_group()
    assert beats.own.stage < 0
    assert beats.own.step == 2
    assert store.num_keys() > 0


@pytest.mark.parametrize("size", [2, 32, 33, 70])
def test_every_set_of_failed_ranks_is_told_by_its_flags(size: int) -> None:
    torch.manual_seed(size)
    failed = [index for index in range(size) if torch.rand(()) < 0.4] + [size - 1]
    sums: list[float] = []
    ranks = RankGroup.__new__(RankGroup)
    for index in range(size):
        ranks.size, ranks.index = size, index
        flags = ranks.failure_flags(failed=index in failed)
        sums = [a + b for a, b in zip(sums or [0.0] * len(flags), flags, strict=True)]
    assert ranks.failed(sums) == sorted(set(failed))
