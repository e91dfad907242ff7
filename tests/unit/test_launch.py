"""What a launcher says, which rows are whose, and who is missing."""

import json
import platform
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from threading import Timer

import pytest
from hypothesis import given
from hypothesis import strategies as st
from torch._C._distributed_c10d import HashStore

from microbatch.errors import ConfigError, RankError
from microbatch.ranks.lost_ranks import COMPUTING, WAITING, is_of_the_group
from microbatch.train.heartbeat import Heartbeat, who_is_missing
from microbatch.train.launch import Launch, launch_of, own_device
from microbatch.train.rendezvous import fresh
from microbatch.train.share import share

SAID = {"RANK": "2", "WORLD_SIZE": "4", "LOCAL_RANK": "0", "MASTER_ADDR": "node", "MASTER_PORT": "29500"}


def test_torchruns_environment_is_read() -> None:
    elastic = {"TORCHELASTIC_RESTART_COUNT": "1", "TORCHELASTIC_MAX_RESTARTS": "3"}
    assert launch_of(SAID) == Launch(rank=2, ranks=4)
    assert launch_of(SAID | elastic) == Launch(rank=2, ranks=4, restarts=1, restartable=True)
    # Clusters have these for purposes of their own.
    assert launch_of({"MASTER_ADDR": "node", "MASTER_PORT": "1"}) is None


@pytest.mark.parametrize("missing", sorted(SAID))
def test_half_an_environment_is_refused_by_what_is_missing(missing: str) -> None:
    with pytest.raises(ConfigError, match=f"and not {missing}: "):
        launch_of({name: value for name, value in SAID.items() if name != missing})


@pytest.mark.parametrize(("name", "value"), [("RANK", "4"), ("RANK", "two"), ("WORLD_SIZE", "-1")])
def test_numbers_that_cannot_be_are_refused(name: str, value: str) -> None:
    with pytest.raises(ConfigError, match=name):
        launch_of(SAID | {name: value})


def test_one_device_is_not_for_several_ranks() -> None:
    assert own_device("cuda:1", None) == "cuda:1"
    with pytest.raises(ConfigError, match="is one device, and there are 4 ranks"):
        own_device("cuda:1", launch_of(SAID))


@given(rows=st.integers(0, 60), ranks=st.integers(1, 9), unit=st.integers(1, 7))
def test_the_shares_are_the_batch_in_order(rows: int, ranks: int, unit: int) -> None:
    shares = [share(rows, ranks=ranks, rank=rank, unit=unit) for rank in range(ranks)]
    assert [row for each in shares for row in each] == list(range(rows))
    assert all(each.start % unit == 0 for each in shares if each)
    units = [-(-len(each) // unit) for each in shares]
    assert max(units) - min(units) <= 1


def test_who_has_not_arrived_is_named(tmp_path: Path) -> None:
    beats = [Heartbeat(tmp_path, rank) for rank in range(4)]
    for beat, stage in zip(beats, (WAITING, COMPUTING, WAITING, WAITING), strict=True):
        beat.at(7, stage, "after microbatch 1 of 2")
    found = who_is_missing(tmp_path, ranks=4, rank=0)
    assert "step 7" in found
    assert "rank 1 did not arrive: in step 7 it was computing, after microbatch 1 of 2" in found
    assert "rank 2" not in found
    assert "rank 3" not in found
    for beat in beats:
        beat.close()


def test_a_dead_rank_is_told_from_a_late_one_and_from_one_that_failed(tmp_path: Path) -> None:
    beats = [Heartbeat(tmp_path, rank) for rank in range(3)]
    for beat in beats:
        beat.at(3, WAITING)
    gone = subprocess.Popen([sys.executable, "--version"], stdout=subprocess.DEVNULL)
    gone.wait()
    said = {"step": 3, "stage": WAITING, "detail": "", "seconds": 0.0, "host": platform.node(), "process": gone.pid}
    (tmp_path / "rank-1.heartbeat").write_text(str(said).replace("'", '"'))
    beats[2].failed(ValueError("on purpose"))
    found = who_is_missing(tmp_path, ranks=3, rank=0)
    assert f"rank 1 has died (process {gone.pid}" in found
    assert "rank 2 failed in step 3 (ValueError: on purpose)" in found
    for beat in beats:
        beat.close()


def test_a_rank_that_dies_a_moment_after_its_connections_is_not_called_late(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("microbatch.ranks.lost_ranks._PATIENCE", 20.0)  # seconds; the machine may be busy
    beats = [Heartbeat(tmp_path, rank) for rank in range(2)]
    dying = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(60)"])
    Timer(0.2, dying.kill).start()
    for beat, stage in zip(beats, (WAITING, COMPUTING), strict=True):
        beat.at(3, stage)
    said = {"step": 3, "stage": COMPUTING, "detail": "", "seconds": 0.0, "host": platform.node(), "process": dying.pid}
    (tmp_path / "rank-1.heartbeat").write_text(json.dumps(said))
    assert f"rank 1 has died (process {dying.pid}" in who_is_missing(tmp_path, ranks=2, rank=0)
    dying.wait()
    for beat in beats:
        beat.close()


def test_what_a_lost_rank_looks_like() -> None:
    assert is_of_the_group(RuntimeError("[gloo/transport/tcp/pair.cc:534] Connection closed by peer [127.0.0.1]:3"))
    assert not is_of_the_group(RuntimeError("mat1 and mat2 shapes cannot be multiplied"))
    assert not is_of_the_group(ValueError("timed out"))


def test_new_ranks_meet_in_a_store_that_is_full_of_old_ones() -> None:
    """Two launches, one after the other, in one store, and in the second the first rank is late."""
    store = HashStore()
    names: list[bytes] = []
    for late in (False, True):
        with ThreadPoolExecutor(3) as pool:
            order = (1, 2, 0) if late else (0, 1, 2)
            found = {}
            for rank in order:
                found[rank] = pool.submit(fresh, store, rank=rank, ranks=3, patience=20.0)
                time.sleep(0.05)
            parts = [found[rank].result() for rank in range(3)]
        parts[0].set("where", f"late {late}")
        assert {bytes(part.get("where")) for part in parts} == {f"late {late}".encode()}
        names.append(bytes(parts[1].get("where")))
    assert names == [b"late False", b"late True"]


def test_who_does_not_come_to_the_start_is_named() -> None:
    with pytest.raises(RankError, match="rank 1, rank 2 did not start in time"):
        fresh(HashStore(), rank=0, ranks=3, patience=0.1)
    with pytest.raises(RankError, match="rank 0 did not start in time"):
        fresh(HashStore(), rank=2, ranks=3, patience=0.1)
